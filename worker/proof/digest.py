"""Computes one hash for each table, so that two states of the tables can be compared at a glance."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from psycopg import sql
from sqlalchemy import Engine, Table

from schemas import database, tables
from schemas.database import Cursor

ALL: Final = "all"


@dataclass(frozen=True, slots=True)
class Digest:
    """The rows of *table*, counted and hashed; the one named ``all`` stands for every table."""

    table: str
    rows: int
    sha256: str


def digests(engine: Engine, *, schema: str | None = None) -> list[Digest]:
    """Return the digest of each projection table, by name, and of all, as of one moment.

    Every column counts. *schema* is the schema of the tables, by default the one where the connection looks first.
    """
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        database.take_snapshot(cursor)
        return digests_seen(cursor, schema=schema)


def digests_seen(cursor: Cursor, *, schema: str | None = None) -> list[Digest]:
    """Return the digests of the tables as the cursor's transaction sees them; it has to read only from here on."""
    # The text form of times depends on the server's configuration, so it is set here.
    cursor.execute("SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO, YMD'")
    each = [_digest(cursor, table, schema) for table in sorted(tables.PROJECTIONS, key=lambda table: table.name)]
    whole = hashlib.sha256("".join(f"{one.table} {one.sha256}\n" for one in each).encode()).hexdigest()
    return [*each, Digest(ALL, sum(one.rows for one in each), whole)]


def _digest(cursor: Cursor, table: Table, schema: str | None) -> Digest:
    hashed, rows = hashlib.sha256(), 0
    for line in _lines(cursor, table, schema):
        hashed.update(line)
        rows += 1
    return Digest(str(table.name), rows, hashed.hexdigest())  # a str, where SQLAlchemy has a kind of one


def _lines(cursor: Cursor, table: Table, schema: str | None) -> Iterator[bytes]:
    """Yield the rows in PostgreSQL's own text form, sorted by key in a collation that is the same everywhere."""
    statement = sql.SQL("COPY (SELECT {columns} FROM {table} ORDER BY {key}) TO STDOUT").format(
        columns=sql.SQL(", ").join(sql.Identifier(column.name) for column in table.columns),
        table=sql.Identifier(*([] if schema is None else [schema]), table.name),
        key=sql.SQL(", ").join(
            sql.SQL("{}{}").format(
                sql.Identifier(column.name), sql.SQL(' COLLATE "C"' if column.type.python_type is str else "")
            )
            for column in table.primary_key.columns
        ),
    )
    with cursor.copy(statement) as copied:
        for chunk in copied:
            yield bytes(chunk)
