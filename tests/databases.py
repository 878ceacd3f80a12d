"""Databases that tests make for themselves."""

import time
from typing import Final

import psycopg
from psycopg.sql import SQL, Identifier

DROP_SECONDS_MAX: Final = 30


def drop(connection: "psycopg.Connection[tuple[object, ...]]", name: str) -> None:
    """Drop a database with whoever is in it, once the server's own vacuum is out, which only a superuser may end."""
    deadline = time.monotonic() + DROP_SECONDS_MAX
    while True:
        try:
            connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))
        except psycopg.errors.InsufficientPrivilege:
            if time.monotonic() > deadline:
                raise
        else:
            return
