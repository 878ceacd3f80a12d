"""Databases that tests make for themselves."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

import psycopg
from psycopg.sql import SQL, Identifier

from deploy.local.databases import drop_database

TEMPLATE_VARIABLE: Final = "PAYFOLD_TEST_TEMPLATE"
"""Names a migrated database from which tests copy theirs, so that a run of few tests need not migrate one."""


@contextmanager
def copied(server_url: str, template: str, prefix: str = "payfold_test") -> Iterator[str]:
    """Make a database like *template*, named *prefix* and more, and yield its URL."""
    name = f"{prefix}_{secrets.token_hex(4)}"
    # Copying files beats copying through the log where nothing is forced to disk.
    create = SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(Identifier(name), Identifier(template))
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(create)
    try:
        yield urlsplit(server_url)._replace(path=f"/{name}").geturl()
    finally:
        with psycopg.connect(server_url, autocommit=True) as connection:
            drop_database(connection, name)


@contextmanager
def migrated(server_url: str) -> Iterator[str]:
    """Make an empty migrated database, and yield its name."""
    from schemas.migrate import upgrade  # noqa: PLC0415 - the tests of the servers themselves need no schema

    name = f"payfold_template_{secrets.token_hex(4)}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
        try:
            upgrade(urlsplit(server_url)._replace(path=f"/{name}").geturl())
            yield name
        finally:
            drop_database(connection, name)
