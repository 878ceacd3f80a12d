"""The order table."""

from typing import Annotated, Final

import typer

from deploy import output
from deploy.commands.base import AccountOption, FormatOption, ModeOption, one_row, opened_database
from deploy.commands.explaining import AsOf, explain_row
from deploy.output import Format
from schemas import tables

app: Final = typer.Typer(help="The order table.", no_args_is_help=True)
OrderId = Annotated[str, typer.Argument(metavar="ORDER", help="The id of its Checkout Session, as cs_live_1….")]


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
