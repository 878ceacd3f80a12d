"""One object at a time: its row, and what made it."""

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer
from sqlalchemy import Engine, select

from deploy import output
from deploy.commands.base import TIMES, AccountOption, FormatOption, ModeOption, one_row, opened_database, utc
from deploy.output import Format, err
from schemas import database, lookup, tables
from schemas.errors import ConflictError, NotFoundError

if TYPE_CHECKING:
    from worker.proof.explain import Explanation

orders_app: Final = typer.Typer(help="The order table.", no_args_is_help=True)
credit_notes_app: Final = typer.Typer(help="The credit notes.", no_args_is_help=True)
payment_links_app: Final = typer.Typer(help="The payment links.", no_args_is_help=True)
customers_app: Final = typer.Typer(help="The customers and their balances.", no_args_is_help=True)

OrderId = Annotated[str, typer.Argument(metavar="ORDER", help="The id of its Checkout Session, as cs_live_1….")]
AsOf = Annotated[
    datetime | None,
    typer.Option(
        formats=TIMES, metavar="TIME", help="As it was known then, by what had been received: 2026-01-31T12:00:00, UTC."
    ),
]


@orders_app.command("show")
def orders_show(
    order_id: OrderId, account: AccountOption = None, livemode: ModeOption = None, form: FormatOption = Format.TABLE
) -> None:
    """Show one order."""
    with opened_database() as engine:
        output.one(one_row(engine, tables.orders, order_id, account=account, livemode=livemode), form)


@orders_app.command("explain")
def orders_explain(
    order_id: OrderId,
    as_of: AsOf = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Say which event set each column of an order, and what became of the others."""
    _explain("orders", order_id, as_of, account=account, livemode=livemode, form=form)


@credit_notes_app.command("explain")
def credit_notes_explain(
    note: Annotated[str, typer.Argument(metavar="NOTE", help="Its id, as cn_1….")],
    as_of: AsOf = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Say which event set each column of a credit note, and what became of the others."""
    _explain("credit_notes", note, as_of, account=account, livemode=livemode, form=form)


@payment_links_app.command("explain")
def payment_links_explain(
    link: Annotated[str, typer.Argument(metavar="LINK", help="Its id, as plink_1….")],
    as_of: AsOf = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Say which event set each column of a payment link, and what became of the others."""
    _explain("payment_links", link, as_of, account=account, livemode=livemode, form=form)


@customers_app.command("explain")
def customers_explain(
    customer: Annotated[str, typer.Argument(metavar="CUSTOMER", help="The id, as cus_1….")],
    currency: Annotated[str | None, typer.Option(help="Explain the balance in this currency instead, as usd.")] = None,
    as_of: AsOf = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Say which event set each column of a customer, or of a balance, and what became of the others."""
    table = "customers" if currency is None else "balances"
    _explain(table, customer, as_of, currency=(currency or "").lower(), account=account, livemode=livemode, form=form)


def _explain(
    table: str,
    id_: str,
    as_of: datetime | None,
    *,
    currency: str = "",
    account: str | None,
    livemode: bool | None,
    form: Format,
) -> None:
    from worker.folds.facts import Subject
    from worker.proof import explain

    with opened_database() as engine:
        world = _world_of(engine, id_, account=account, livemode=livemode)
        told = explain.explain(engine, Subject(table, *world, id_, currency=currency), as_of=utc(as_of))
    if form is Format.TABLE:
        _print(told, as_of)
    else:
        output.one(asdict(told), form)


def _world_of(engine: Engine, object_id: str, *, account: str | None, livemode: bool | None) -> tuple[str, bool]:
    inbox = tables.inbox
    wanted = lookup.where(inbox, {"object_id": object_id, "account": account, "livemode": livemode})
    query = select(inbox.c.account, inbox.c.livemode).where(*wanted).distinct().limit(2)
    with database.transaction(engine) as connection:
        found = connection.execute(query).all()
    if not found:
        raise NotFoundError(f"There is no {object_id} here.")
    if len(found) > 1:
        raise ConflictError(f"Several accounts or modes have {object_id}: say which (--account, --live, --test).")
    return found[0].account, found[0].livemode


_MONEY = ("object", "id", "status", "amount", "amount_captured", "amount_refunded", "amount_by_refunds", "verdict")


def _print(told: "Explanation", as_of: datetime | None) -> None:
    if as_of is not None:
        err.print(f"As it was known at {output.shown(utc(as_of))} UTC, by what had been received until then.")
    out = output.out
    out.print("Timeline, in the order in which the events are laid over each other", style="bold")
    events = [{**each, "sets": ", ".join(each["sets"]) or None} for each in told.timeline]
    shown = ("created", "received_at", "source", "type", "event_id", "verdict", "sets")
    output.rows(events, shown, Format.TABLE, empty="")
    out.print()
    if told.row is None:
        out.print("These events make no row.")
        return
    out.print("Columns", style="bold")
    currency = told.row.get("currency")
    columns = [
        {**each, "value": output.amount(each["column"], each["value"], currency), "event": each["event_id"]}
        for each in told.columns
    ]
    output.rows(columns, ("column", "value", "how", "type", "event", "created"), Format.TABLE, empty="")
    if told.money:
        out.print("\nThe charges and refunds behind refunded_amount", style="bold")
        money = [
            {name: output.amount(name, value, each["currency"]) for name, value in each.items()} for each in told.money
        ]
        output.rows(money, _MONEY, Format.TABLE, empty="")
    for anomaly in told.anomalies:
        out.print(f"\n{anomaly['kind']}: {output.shown(anomaly['detail'])}")
    if told.dashboard is not None:
        out.print(f"\nStripe shows it at {told.dashboard}")
