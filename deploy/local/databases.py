"""Databases on an embedded server."""

import time
from typing import Any, Final

import psycopg
from psycopg import sql

DROP_SECONDS_MAX: Final = 30


def drop_database(connection: "psycopg.Connection[Any]", name: str) -> None:
    """Drop a database, if there is one, and end its sessions.

    PostgreSQL refuses while its own vacuum is in it, which only a superuser may end; then it is tried again.

    Raises:
        psycopg.errors.InsufficientPrivilege: it was refused for DROP_SECONDS_MAX.
    """
    deadline = time.monotonic() + DROP_SECONDS_MAX
    statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    while True:
        try:
            connection.execute(statement)
        except psycopg.errors.InsufficientPrivilege:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
