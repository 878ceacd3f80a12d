"""What the tables hold, and the proof of it."""

from typing import Annotated, Final

import typer

from deploy import output
from deploy.commands.base import FormatOption, opened_database
from deploy.output import Format
from schemas import tables
from schemas.errors import ConfigurationError

app: Final = typer.Typer()


@app.command()
def digest(
    table: Annotated[str | None, typer.Option(help="Only this table.")] = None, form: FormatOption = Format.TABLE
) -> None:
    """Print one line per projection table and one for all: its name, its rows, and the hash of them."""
    from worker.proof.digest import digests

    known = [each.name for each in tables.PROJECTIONS]
    if table is not None and table not in known:
        raise ConfigurationError(f"--table is one of {', '.join(known)}.")
    with opened_database() as engine:
        found = [each for each in digests(engine) if table in (None, each.table)]
    if form is Format.TABLE:
        for each in found:
            output.out.print(f"{each.table:<24}{each.rows:>12}  {each.sha256}")
    else:
        rows = [{"table": each.table, "rows": each.rows, "sha256": each.sha256} for each in found]
        output.rows(rows, ["table", "rows", "sha256"], form, empty="")
