"""The order table."""

from datetime import datetime
from typing import Annotated, Final

import typer

from deploy import output
from deploy.commands.base import TIMES, AccountOption, FormatOption, ModeOption, one_order
from deploy.commands.explaining import AsOf, explain_row
from deploy.output import Format
from schemas.errors import ConfigurationError
from schemas.kinds import ORDER_STATUSES

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


@app.command("list")
def orders_list(  # noqa: PLR0913, PLR0917 - an option each
    status: Annotated[str | None, typer.Option("--status", help=f"Only those {', '.join(ORDER_STATUSES)}.")] = None,
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
    if status is not None and status not in ORDER_STATUSES:
        raise ConfigurationError(f"--status is one of {', '.join(ORDER_STATUSES)}.")
    from deploy.commands.orders_found import print_list

    given: dict[str, object] = {
        "customer": customer,
        "payment_link": payment_link,
        "invoice": invoice,
    }
    given |= {"client_reference_id": reference, "account": account, "livemode": livemode}
    print_list(given, status=status, email=email, since=since, until=until, limit=limit, form=form)


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
    from deploy.commands.orders_found import print_hits

    print_hits(text, account=account, livemode=livemode, form=form)


@app.command("show")
def orders_show(
    order_id: OrderId, account: AccountOption = None, livemode: ModeOption = None, form: FormatOption = Format.TABLE
) -> None:
    """Show one order."""
    output.one(one_order(order_id, account=account, livemode=livemode), form)


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
