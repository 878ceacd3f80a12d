"""The ``payfold`` command. Data goes to stdout, everything else to stderr."""

import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer
from sqlalchemy.exc import DBAPIError

from deploy.commands import (
    at_stripe,
    bench,
    connecting,
    inbox,
    objects,
    proof,
    rebuilding,
    reconciling,
    replaying,
    running,
)
from deploy.commands.base import FAILED, MIGRATIONS_PENDING, USAGE, first_line
from deploy.output import err
from deploy.services import ServicesError
from schemas import database, envfile
from schemas.errors import ConfigurationError, DatabaseAway, MigrationsPendingError, PayfoldError

app: Final = typer.Typer(
    name="payfold",
    help="Stripe's checkout events, folded into order tables that can be proven right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_GROUPS: Final = {
    "migrate": running.migrate_app,
    "events": inbox.events_app,
    "orders": objects.orders_app,
    "credit-notes": objects.credit_notes_app,
    "payment-links": objects.payment_links_app,
    "customers": objects.customers_app,
    "reconcile": reconciling.app,
    "sessions": at_stripe.sessions_app,
    "gaps": at_stripe.gaps_app,
    "endpoints": connecting.endpoints_app,
    "tokens": running.tokens_app,
}
for each in (connecting.app, running.app, inbox.app, replaying.app, proof.app, rebuilding.app, bench.app):
    app.add_typer(each)
for name, group in _GROUPS.items():
    app.add_typer(group, name=name)


@app.callback()
def options(
    env_file: Annotated[
        Path | None, typer.Option("--env-file", metavar="FILE", help="Settings that `init` wrote; else .payfold/.env.")
    ] = None,
) -> None:
    """Take what is the same for every command."""
    if env_file is not None:
        os.environ[envfile.ENV_FILE] = str(env_file.absolute())  # the processes of `up` are to have it, too


def main() -> None:
    """Run the command and end the process: 0 ok, 1 failed, 2 usage, 3 drift, 4 migrations pending."""
    try:
        app()
    except ConfigurationError as error:
        _fail(error, USAGE)
    except MigrationsPendingError as error:
        _fail(error, MIGRATIONS_PENDING)
    except DatabaseAway as error:
        _fail(f"PostgreSQL does not answer, so check DATABASE_URL: {first_line(error.__cause__)}", FAILED)
    except (DBAPIError, database.DriverError) as error:
        _fail(f"PostgreSQL refused this: {_refusal(error)}", FAILED)
    except (PayfoldError, ServicesError) as error:
        _fail(error, FAILED)


def _fail(words: object, code: int) -> None:
    err.print(str(words), style="red")
    sys.exit(code)


def _refusal(error: DBAPIError | database.DriverError) -> str:
    # What it says of data may quote the data.
    return database.condition(error) if database.is_fault_of_data(error) else first_line(error)
