"""The order table."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime
from typing import Annotated, Any, Final

import typer

from deploy import output
from deploy.commands.base import TIMES, AccountOption, FormatOption, ModeOption, one_row, opened_database, utc
from deploy.commands.explaining import AsOf, explain_row
from deploy.output import Format, err
from schemas import database, lookup, search, tables
from schemas.errors import ConfigurationError

app: Final = typer.Typer(help="The order table.", no_args_is_help=True)
CreatedSince = Annotated[
    datetime | None,
    typer.Option("--since", formats=TIMES, metavar="TIME", help="Only those created from then on: 2026-01-31, UTC."),
]
CreatedUntil = Annotated[
    datetime | None,
    typer.Option("--until", formats=TIMES, metavar="TIME", help="Only those created before then: 2026-02-01, UTC."),
]
OrderId = Annotated[str, typer.Argument(metavar="ORDER", help="The id of its Checkout Session, as cs_live_1….")]


_LIMIT_MAX: Final = 10_000
_ORDER_COLUMNS: Final = (
    *("id", "status", "created", "amount_total", "refund_status", "customer_email", "customer", "client_reference_id"),
    "payment_link",
)


@app.command("list")
def orders_list(  # noqa: PLR0913, PLR0917 - an option each
    status: Annotated[
        str | None, typer.Option("--status", help=f"Only those {', '.join(tables.ORDER_STATUSES)}.")
    ] = None,
    customer: Annotated[str | None, typer.Option("--customer", help="Only those of this customer.")] = None,
    email: Annotated[str | None, typer.Option("--email", help="Only those of this email, in any case.")] = None,
    payment_link: Annotated[str | None, typer.Option("--payment-link", help="Only those of this link.")] = None,
    reference: Annotated[str | None, typer.Option("--reference", help="Only this client_reference_id.")] = None,
    invoice: Annotated[str | None, typer.Option("--invoice", help="Only those of this invoice.")] = None,
    since: CreatedSince = None,
    until: CreatedUntil = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    limit: Annotated[int, typer.Option(min=1, max=_LIMIT_MAX, help="How many.")] = 50,
    form: FormatOption = Format.TABLE,
) -> None:
    """List orders, newest first."""
    if status is not None and status not in tables.ORDER_STATUSES:
        raise ConfigurationError(f"--status is one of {', '.join(tables.ORDER_STATUSES)}.")
    given = {"status": status, "customer": customer, "payment_link": payment_link, "invoice": invoice}
    wanted = lookup.where(
        tables.orders, {**given, "client_reference_id": reference, "account": account, "livemode": livemode}
    )
    wanted += lookup.created_within(tables.orders, utc(since), utc(until))
    wanted += [] if email is None else [lookup.has_email(tables.orders.c.customer_email, email)]
    with opened_database() as engine, database.transaction(engine) as connection:
        query = lookup.newest(tables.orders, wanted, limit=limit, shown=tables.order_book)
        found = [dict(row) for row in connection.execute(query).mappings()]
    shown = _ORDER_COLUMNS if form is Format.TABLE else [column.name for column in tables.order_book.c]
    output.rows([_as_shown(row, form) for row in found], shown, form, empty="No such order.")


@app.command("search")
def orders_search(
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="An id, number, email, reference, or amount as '49.99 eur'.")
    ],
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Find orders by what is at hand: the id of any object, a number, an email, a reference, or an amount."""
    with opened_database() as engine, database.transaction(engine) as connection:
        hits = search.find(connection, text, account=account, livemode=livemode)
        if not hits:
            hits = search.in_events(connection, text, account=account, livemode=livemode, personal=True)
    rows = [asdict(hit) for hit in hits[: search.HITS_MAX]]
    shown = [_as_shown(row, form, "amount") for row in rows]
    if form is Format.TABLE:
        shown = [{**row, "orders": " ".join(order["id"] for order in row["orders"])} for row in shown]
    output.rows(shown, _HIT_COLUMNS if form is Format.TABLE else _FIELDS_OF_HIT, form, empty="Nothing is found.")
    if len(hits) > search.HITS_MAX:
        err.print(f"Only the newest {search.HITS_MAX} are shown: narrow the search.")


_HIT_COLUMNS: Final = ("kind", "id", "matched", "status", "amount", "created", "orders")
_FIELDS_OF_HIT: Final = tuple(field.name for field in fields(search.Hit))


def _as_shown(row: Mapping[str, Any], form: Format, amount: str = "amount_total") -> dict[str, Any]:
    """Return *row* with its amount as money where people read it."""
    is_read = form is Format.TABLE
    return {**row, amount: output.amount(amount, row[amount], row["currency"])} if is_read else dict(row)


@app.command("show")
def orders_show(
    order_id: OrderId, account: AccountOption = None, livemode: ModeOption = None, form: FormatOption = Format.TABLE
) -> None:
    """Show one order."""
    with opened_database() as engine:
        output.one(one_row(engine, tables.orders, order_id, account=account, livemode=livemode), form)


@app.command("explain")
def orders_explain(
    order_id: OrderId,
    as_of: AsOf = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Show which event set each column of an order, and what became of the others."""
    explain_row("orders", order_id, as_of, account=account, livemode=livemode, form=form)
