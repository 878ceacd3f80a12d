"""The payment links."""

from typing import Annotated, Final

import typer

from deploy.commands.base import AccountOption, FormatOption, ModeOption
from deploy.commands.explaining import AsOf, explain_row
from deploy.output import Format

app: Final = typer.Typer(help="The payment links.", no_args_is_help=True)


@app.command("explain")
def payment_links_explain(
    link: Annotated[str, typer.Argument(metavar="LINK", help="Its id, as plink_1….")],
    as_of: AsOf = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Show which event set each column of a payment link, and what became of the others."""
    explain_row("payment_links", link, as_of, account=account, livemode=livemode, form=form)
