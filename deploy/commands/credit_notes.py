"""The credit notes."""

from typing import Annotated, Final

import typer

from deploy.commands.base import AccountOption, FormatOption, ModeOption
from deploy.commands.explaining import AsOf, explain_row
from deploy.output import Format

app: Final = typer.Typer(help="The credit notes.", no_args_is_help=True)


@app.command("explain")
def credit_notes_explain(
    note: Annotated[str, typer.Argument(metavar="NOTE", help="Its id, as cn_1….")],
    as_of: AsOf = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Show which event set each column of a credit note, and what became of the others."""
    explain_row("credit_notes", note, as_of, account=account, livemode=livemode, form=form)
