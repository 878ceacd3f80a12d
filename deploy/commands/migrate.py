"""Bring the schema to this release."""

from typing import Final

import typer

from deploy import output
from deploy.commands import accounts
from deploy.commands.base import FAILED, MIGRATIONS_PENDING, FormatOption, opened_database, settings_here
from deploy.output import Format, err
from schemas import database, migrate
from schemas.accounts import faults_here

app: Final = typer.Typer(help="Bring the schema to this release.", invoke_without_command=True)


@app.callback()
def migrate_default(context: typer.Context) -> None:
    """Bring the schema to this release; `status` only reports."""
    if context.invoked_subcommand is None:
        migrate_up()


@app.command("up")
def migrate_up() -> None:
    """Apply the migrations that are pending; exit 1 where a label would split an account."""
    settings = settings_here()
    applied = migrate.upgrade(settings.postgresql)
    err.print(f"Applied {', '.join(applied)}." if applied else "The schema is up to date.")
    if accounts.show(faults_here(settings)):
        raise typer.Exit(FAILED)


@app.command("status")
def migrate_status(form: FormatOption = Format.TABLE) -> None:
    """List the migrations that are pending; exit 4 if there are any."""
    with opened_database(behind_is_fine=True) as engine:
        with database.transaction(engine) as connection:
            pending = migrate.pending(connection)
        output.rows(
            [{"pending": revision} for revision in pending], ["pending"], form, empty="The schema is up to date."
        )
    if pending:
        raise typer.Exit(MIGRATIONS_PENDING)
