"""Roles in PostgreSQL for those who read the tables by SQL."""

import re
import secrets as random_secrets
from collections.abc import Iterator, Sequence
from typing import Annotated, Final

import typer
from psycopg import errors
from psycopg.sql import SQL, Composed, Identifier, Literal
from sqlalchemy import Table

from deploy import output
from deploy.commands.base import opened_database
from deploy.output import Format, err
from schemas import answers, database, tables
from schemas.database import Cursor
from schemas.errors import ConfigurationError, ConflictError

STATEMENT_SECONDS_MAX: Final = 60
CONNECTIONS_MAX: Final = 5

app: Final = typer.Typer(help="Roles in PostgreSQL that read the tables.", no_args_is_help=True)

_NEVER: Final = frozenset({"payload", "signature"})
"""Columns of events that hold what Stripe sent, and how it was signed."""
_READ: Final = (*tables.PROJECTIONS, tables.order_book, tables.payment_link_funnel)
_FEED: Final = (tables.events, tables.changes, tables.anomalies)


@app.command("create")
def roles_create(
    name: Annotated[str, typer.Argument(help="Of the role: lower-case letters, digits and _.")],
    personal: Annotated[
        bool, typer.Option("--personal", help="Personal data too, such as emails, addresses and metadata.")
    ] = False,
) -> None:
    """Make a role that may read the tables and nothing else, or grant one again what it may read."""
    if not re.fullmatch("[a-z][a-z0-9_]{0,62}", name):
        raise ConfigurationError(
            "NAME is lower-case letters, digits and _, 63 at most. Example: payfold roles create reports"
        )
    with (
        opened_database() as engine,
        database.transaction(engine) as connection,
        database.cursor(connection) as cursor,
    ):
        password = _made(cursor, name)
        for statement in _grants(name, personal=personal):
            cursor.execute(statement)
        where = cursor.connection.info.dbname
    if password is None:
        err.print(f"The role {name} was there; what it may read is granted again, and its password stays.")
    shown = {"role": name, "database": where, "password": "unchanged" if password is None else password}
    output.one({**shown, "personal_data": personal}, Format.TABLE)


def _made(cursor: Cursor, name: str) -> str | None:
    """Make the role *name*, and return its password; None where it is there and was made by this command.

    Raises:
        ConflictError: a role of that name may more than read, or we may make none.
    """
    cursor.execute("SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = %s", (name,))
    if known := cursor.fetchone():
        if known[0] != _MARK:
            raise ConflictError(f"There is a role {name} that this command has not made: choose another name.")
        return None
    password = random_secrets.token_urlsafe(24)
    role = Identifier(name)
    try:
        cursor.execute(
            SQL("CREATE ROLE {} LOGIN PASSWORD {} CONNECTION LIMIT {}").format(
                role, Literal(password), Literal(CONNECTIONS_MAX)
            )
        )
    except errors.InsufficientPrivilege:
        raise ConflictError(
            "The role of DATABASE_URL may make no roles: let an administrator type ALTER ROLE … CREATEROLE."
        ) from None
    cursor.execute(SQL("COMMENT ON ROLE {} IS {}").format(role, Literal(_MARK)))
    cursor.execute(SQL("ALTER ROLE {} SET default_transaction_read_only = on").format(role))
    cursor.execute(SQL("ALTER ROLE {} SET statement_timeout = {}").format(role, Literal(f"{STATEMENT_SECONDS_MAX}s")))
    return password


_MARK: Final = "reads the tables of Payfold"


def _grants(name: str, *, personal: bool) -> Iterator[Composed]:
    """Yield the statements after which the role *name* may read what it is to read, and no more."""
    role = Identifier(name)
    yield SQL("GRANT USAGE ON SCHEMA public TO {}").format(role)
    for table in (*_READ, *_FEED):
        # Where it may read less than before, the rest is taken away.
        yield SQL("REVOKE ALL ON {} FROM {}").format(Identifier(table.name), role)
        columns = SQL(", ").join(map(Identifier, _columns(table, personal=personal)))
        yield SQL("GRANT SELECT ({}) ON {} TO {}").format(columns, Identifier(table.name), role)


def _columns(table: Table, *, personal: bool) -> Sequence[str]:
    """Return the columns of *table* that may be read; without *personal* those that no answer hides."""
    hidden = set(_NEVER)
    if not personal:
        hidden |= answers.personal_fields(answers.OF_TABLES.get(table.name, answers.Answer))
        # An operator's own words.
        hidden |= {"reason"} if table is tables.events else set()
    return [column.name for column in table.columns if column.name not in hidden]
