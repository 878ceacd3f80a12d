"""The door to PostgreSQL.

Nothing here needs a session's state: no prepared statements, no session settings, no LISTEN, so that a pooler
in transaction mode may stand between.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import psycopg
from psycopg.types.json import set_json_dumps, set_json_loads
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError

from schemas.errors import DatabaseAway

CONNECT_SECONDS_MAX = 5

Cursor = psycopg.Cursor[tuple[Any, ...]]
DriverError = psycopg.Error

set_json_dumps(msgspec.json.encode)
set_json_loads(msgspec.json.decode)


def sqlalchemy_url(database_url: str) -> str:
    """Return *database_url*, in any of PostgreSQL's spellings, as SQLAlchemy wants it."""
    return f"postgresql+psycopg://{database_url.split('://', 1)[1]}"


def engine(database_url: str, *, connections_max: int = 5) -> Engine:
    """Return an engine for *database_url* that never shows a statement's parameters in an error."""
    return create_engine(
        sqlalchemy_url(database_url),
        pool_size=connections_max,
        max_overflow=0,
        pool_pre_ping=True,
        hide_parameters=True,
        json_serializer=lambda value: msgspec.json.encode(value).decode(),
        json_deserializer=msgspec.json.decode,
        connect_args={"prepare_threshold": None, "connect_timeout": CONNECT_SECONDS_MAX},
    )


@contextmanager
def transaction(of: Engine) -> Iterator[Connection]:
    """Open one transaction, committed at the end and rolled back on an error.

    Raises:
        DatabaseAway: when PostgreSQL does not answer or goes away meanwhile.
    """
    try:
        with of.begin() as connection:
            yield connection
    except (DBAPIError, DriverError) as error:
        if is_away(error):
            raise DatabaseAway from error
        raise


def _cause(error: BaseException) -> BaseException | None:
    return error.orig if isinstance(error, DBAPIError) else error


def is_away(error: BaseException) -> bool:
    """Tell whether *error* says that the server is gone, rather than that the work was wrong."""
    cause = _cause(error)
    if isinstance(cause, (psycopg.errors.AdminShutdown, psycopg.errors.CrashShutdown, psycopg.errors.CannotConnectNow)):
        return True
    return isinstance(cause, (psycopg.OperationalError, psycopg.InterfaceError)) and cause.sqlstate is None


# Classes of SQLSTATE that judge the data: data exception, integrity violation, limit exceeded.
_CLASSES_OF_DATA = ("22", "23", "54")


def is_fault_of_data(error: BaseException) -> bool:
    """Tell whether the same data would fail again."""
    cause = _cause(error)
    if isinstance(cause, psycopg.DataError):
        return True
    return isinstance(cause, psycopg.Error) and (cause.sqlstate or "").startswith(_CLASSES_OF_DATA)


def condition(error: BaseException) -> str:
    """Return PostgreSQL's name for what went wrong; its message could quote the data."""
    return type(_cause(error)).__name__


def text_array(values: Sequence[str]) -> str:
    """Return *values* as PostgreSQL writes a text[]: the driver's own way takes ten times as long."""
    joined = '","'.join(values)
    if "\\" in joined or joined.count('"') != 2 * max(len(values) - 1, 0):
        joined = '","'.join(value.replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return f'{{"{joined}"}}' if values else "{}"


def integer_array(values: Iterable[int]) -> str:
    """Return *values* as PostgreSQL writes a bigint[]."""
    return f"{{{','.join(map(str, values))}}}"


def boolean_array(values: Iterable[bool]) -> str:
    """Return *values* as PostgreSQL writes a boolean[]."""
    return f"{{{','.join('t' if value else 'f' for value in values)}}}"


@contextmanager
def cursor(connection: Connection) -> Iterator[Cursor]:
    """Return the driver's own cursor within *connection*'s transaction, for the hot paths."""
    driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]  # the pool does not know the driver's type
    with driver.cursor() as opened:
        yield opened
