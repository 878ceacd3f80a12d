"""The customers and their balances."""

from typing import Annotated, Final

import typer

from deploy.commands.base import AccountOption, FormatOption, ModeOption
from deploy.commands.explaining import AsOf, explain_row
from deploy.output import Format

app: Final = typer.Typer(help="The customers and their balances.", no_args_is_help=True)


@app.command("explain")
def customers_explain(
    customer: Annotated[str, typer.Argument(metavar="CUSTOMER", help="The id, as cus_1….")],
    currency: Annotated[str | None, typer.Option(help="Explain the balance in this currency instead, as usd.")] = None,
    as_of: AsOf = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Show which event set each column of a customer, or of a balance, and what became of the others."""
    table = "customers" if currency is None else "balances"
    explain_row(
        table, customer, as_of, currency=(currency or "").lower(), account=account, livemode=livemode, form=form
    )
