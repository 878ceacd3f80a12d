"""``payfold accounts``: the names of accounts, and what would split one."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer
from sqlalchemy import Connection

from deploy import output
from deploy.commands.bars import bars, shown_on
from deploy.commands.base import (
    USAGE,
    ArchiveOption,
    FormatOption,
    opened_database,
    settings_here,
)
from deploy.output import Format, err
from schemas import accounts, database
from schemas.accounts import Fault
from schemas.errors import ConfigurationError
from schemas.settings import LABEL, Settings

app: Final = typer.Typer(help="The names of accounts.", no_args_is_help=True)

_COLUMNS: Final = (
    "account", "livemode", "events", "orders", "first_received_at", "last_received_at", "labelled_by", "renamed_from"
)  # fmt: skip


@app.command("list")
def accounts_list(form: FormatOption = Format.TABLE) -> None:
    """List the accounts and modes that the inbox holds, and what labels them."""
    settings = settings_here()
    with opened_database() as engine, database.transaction(engine) as connection:
        with database.cursor(connection) as cursor:
            found = [_row(each, settings) for each in accounts.overview(cursor)]
        faults = faults_in(connection, settings)
    if form is Format.TABLE:
        found = [
            {
                **row,
                "account": accounts.shown(row["account"]),
                "labelled_by": ", ".join(row["labelled_by"]) or None,
                "renamed_from": ", ".join(map(accounts.shown, row["renamed_from"])) or None,
            }
            for row in found
        ]
    output.rows(found, _COLUMNS, form, empty="Nothing is recorded yet.")
    if any(row["events"] is None or row["orders"] is None for row in found):
        err.print(f"What is not counted is more than {accounts.COUNTED_MAX:,}.")
    show(faults)


def _row(world: accounts.Known, settings: Settings) -> dict[str, Any]:
    labels = {
        "secret": {secret.account for secret in settings.signing_secrets},
        "key": {key.account for key in settings.api_keys if key.livemode == world.livemode},
    }
    names = {world.account, *world.renamed_from}
    labelled_by = [what for what, given in labels.items() if names & given]
    return {**asdict(world), "labelled_by": labelled_by}


@app.command("rename")
def accounts_rename(
    old: Annotated[str, typer.Argument(metavar="OLD", help="The name until now; '' is the account without one.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The name from now on: letters, digits and _, or ''.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only show what would be done.")] = False,
    archive: ArchiveOption = None,
    same_account: Annotated[
        bool, typer.Option("--same-account", help="You know that it is one account, where no payload is left to show.")
    ] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Join two names of one account: all that was recorded under OLD, and all that arrives under it, is NEW's."""
    from worker.logs import renaming

    old, new = ("" if each in accounts.DEFAULT_WORDS else each for each in (old, new))
    if new and not LABEL.fullmatch(new):
        raise ConfigurationError(
            "NEW holds letters, digits and _ only. Example: payfold accounts rename '' acct_1 --yes"
        )
    with opened_database() as engine, bars() as bar:
        if not yes:
            planned = renaming.plan(engine, old, new, is_one=same_account)
        else:
            done = renaming.rename(
                engine,
                old,
                new,
                now=datetime.now(UTC),
                archive=archive,
                is_one=same_account,
                progress=shown_on(bar),
            )
    if not yes:
        output.one(asdict(planned), form)
        err.print(
            f"{planned.events:,} events and {planned.orders:,} orders of {accounts.shown(old)} would be"
            f" {accounts.shown(new)}'s; nothing has changed. Add --yes to do it."
        )
        raise typer.Exit(USAGE)
    output.one(asdict(done), form)


def show(faults: Sequence[Fault]) -> bool:
    """Print *faults*, each with the command that mends it, and return whether there is one."""
    for fault in faults:
        err.print(f"{fault.detail}\n  {fault.command}", style="red")
    return bool(faults)


def faults_in(connection: Connection, settings: Settings) -> list[Fault]:
    """Return what splits an account, as *connection* sees the database."""
    with database.cursor(connection) as cursor:
        return accounts.faults(cursor, settings)
