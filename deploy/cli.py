"""The ``payfold`` command. Data goes to stdout, everything else to stderr."""

import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer
from sqlalchemy.exc import DBAPIError

from deploy import output
from deploy.commands import (
    accounts,
    bench,
    changes,
    config,
    credit_notes,
    customers,
    demo,
    digest,
    doctor,
    emit,
    endpoints,
    events,
    gaps,
    init,
    migrate,
    orders,
    payment_links,
    rebuild,
    reconcile,
    replay,
    roles,
    sessions,
    status,
    summary,
    tokens,
    up,
)
from deploy.commands.base import FAILED
from deploy.output import err
from schemas import database, envfile
from schemas.errors import ConfigurationError, DatabaseAway, PayfoldError
from schemas.version import version

app: Final = typer.Typer(
    name="payfold",
    help="Stripe's checkout events, folded into order tables that can be proven right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for each in (init, config, up, demo, doctor, status, summary, emit, replay, digest, rebuild, bench):
    app.add_typer(each.app)
_GROUPS: Final = {
    "migrate": migrate,
    "events": events,
    "changes": changes,
    "orders": orders,
    "credit-notes": credit_notes,
    "payment-links": payment_links,
    "customers": customers,
    "reconcile": reconcile,
    "sessions": sessions,
    "gaps": gaps,
    "accounts": accounts,
    "endpoints": endpoints,
    "roles": roles,
    "tokens": tokens,
}
for name, group in _GROUPS.items():
    app.add_typer(group.app, name=name)


def _print_version(is_asked: bool) -> None:  # noqa: FBT001 - as typer calls it
    if is_asked:
        output.out.print(f"payfold {version()}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    env_file: Annotated[
        Path | None, typer.Option("--env-file", metavar="FILE", help="Settings that `init` wrote; else .payfold/.env.")
    ] = None,
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Take what is the same for every command."""
    if env_file is not None:
        os.environ[envfile.ENV_FILE] = str(env_file.absolute())  # the processes of `up` are to have it, too
    if warning := envfile.open_to_others(os.environ):
        err.print(output.shown(warning), style="yellow", soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    """Run the command and end the process: 0 ok, 1 failed, 2 usage, 3 drift, 4 migrations pending."""
    try:
        _settle_streams()
        app(prog_name="payfold")
    except DatabaseAway as error:
        _fail(f"PostgreSQL does not answer, so check DATABASE_URL: {database.first_line(error.__cause__)}", FAILED)
    except (DBAPIError, database.DriverError) as error:
        _fail(f"PostgreSQL refused this: {_refusal(error)}", FAILED)
    except PayfoldError as error:
        _fail(error, error.exit_code)


def _settle_streams() -> None:
    """Find out whether a stream was closed before the start: Python has None in its place, and writes into nothing.

    Raises:
        ConfigurationError: data would be lost.
    """
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    if sys.stdout is None:
        raise ConfigurationError("Standard output is closed, and data goes there. Example: payfold status >/dev/null")


def _fail(words: object, code: int) -> None:
    # A name in the message may come from a stranger.
    err.print(output.shown(str(words)), style="red")
    sys.exit(code)


def _refusal(error: DBAPIError | database.DriverError) -> str:
    if database.is_short_of_locks(error):
        return f"{database.LOCKS_MORE}."
    # The message of a fault in data may quote the data.
    return database.condition(error) if database.is_fault_of_data(error) else database.first_line(error)
