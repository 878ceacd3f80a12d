"""What PostgreSQL and a typed decoder do at most with the same events, measured and not quoted.

Nothing here is part of Payfold: no order of events, no changes, no anomalies, only rows that are already made.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import psycopg
from psycopg import sql
from sqlalchemy import Engine

from deploy.bench.events import deliveries
from schemas import database, events
from schemas.database import Cursor
from schemas.inbox import Delivery
from worker.folding.claim import event_of_delivery
from worker.folds import checkout_session, join, payment_link
from worker.folds.facts import Row
from worker.folds.reading import Reader
from worker.proof import shadow
from worker.proof.shadow import REPLACED

CHUNK: Final = 500
COMMITS: Final = 300
"""Rows that are committed one by one."""
BLOCK_BYTES: Final = 1024 * 1024
_SCHEMA: Final = "payfold_bench"

_READERS: Final[dict[str, Reader]] = {  # type: ignore[type-arg]  # of one type each
    "checkout.session": Reader(checkout_session.CheckoutSession),
    "payment_link": Reader(payment_link.PaymentLink),
}


# ---- Folding: decode and merge ----


def merge_seconds(libpq: str, bodies: Sequence[bytes]) -> tuple[float, float]:
    """Decode *bodies* and merge an order row for each, prepared before, in chunks with a commit each.

    The rows go by COPY into a temporary table and from there into a copy of ``orders`` with all its indexes. Returns
    the seconds that took, and how many rows a second are inserted with a commit for each.
    """
    chunks = [list(bodies[at : at + CHUNK]) for at in range(0, len(bodies), CHUNK)]
    with _schema(libpq) as connection:
        connection.execute("CREATE TABLE payfold_bench.orders (LIKE public.orders INCLUDING ALL)")
        connection.execute("CREATE TEMP TABLE staging (LIKE public.orders) ON COMMIT DELETE ROWS")
        prepared = [_prepared(connection, chunk) for chunk in chunks]
        parsed = [[(_reader(body), body) for body in chunk] for chunk in chunks]
        columns = [column.name for column in _described(connection)]
        merge = _merge(columns)
        started = time.monotonic()
        for chunk, rows in zip(parsed, prepared, strict=True):
            for reader, body in chunk:
                reader.read(body)
            with connection.transaction(), connection.cursor() as cursor:
                with cursor.copy("COPY staging FROM STDIN") as copy:
                    copy.write(rows)
                cursor.execute(merge)
        seconds = time.monotonic() - started
        return seconds, _commits_a_second(connection)


def _reader(body: bytes) -> Reader:  # type: ignore[type-arg]  # of either type
    """Return what decodes *body*; the inbox knows of what type an event's object is, so this is not measured."""
    return _READERS[str(events.read(body).object_type)]


def _prepared(connection: "psycopg.Connection[tuple[object, ...]]", chunk: Sequence[bytes]) -> bytes:
    """Return the order row of each event of *chunk* in the form of COPY; an event of a link has none."""
    rows = [row for each in deliveries(chunk) if (row := _order_row(each)) is not None]
    with connection.transaction(force_rollback=True), connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO staging SELECT * FROM json_populate_recordset(NULL::public.orders, %s)",
            (msgspec.json.encode(rows).decode(),),
        )
        with cursor.copy("COPY staging TO STDOUT") as copy:
            return b"".join(bytes(block) for block in copy)


def _order_row(delivery: Delivery) -> Row | None:
    event = event_of_delivery(delivery)
    if event.object_type != "checkout.session":
        return None
    joined = join.fold_all(checkout_session.ROW_SPEC, list(checkout_session.fold(event)))
    return None if joined is None else joined.row


def _described(connection: "psycopg.Connection[tuple[object, ...]]") -> "list[psycopg.Column]":
    return connection.execute("SELECT * FROM public.orders LIMIT 0").description or []


def _merge(columns: Sequence[str]) -> sql.Composed:
    key = ("account", "livemode", "id")
    values = [name for name in columns if name not in key]
    return sql.SQL(
        "INSERT INTO payfold_bench.orders SELECT DISTINCT ON (account, livemode, id) * FROM staging"
        " ORDER BY account, livemode, id, as_of DESC"
        " ON CONFLICT (account, livemode, id) DO UPDATE SET ({columns}) = ROW ({values})"
    ).format(
        columns=sql.SQL(", ").join(map(sql.Identifier, values)),
        values=sql.SQL(", ").join(sql.Identifier("excluded", name) for name in values),
    )


def _commits_a_second(connection: "psycopg.Connection[tuple[object, ...]]") -> float:
    """Return how many rows a second are inserted one by one, each with a commit of its own."""
    connection.execute("CREATE TABLE payfold_bench.singles (LIKE public.orders INCLUDING ALL)")
    found = connection.execute("SELECT id FROM payfold_bench.orders LIMIT %s", (COMMITS,)).fetchall()
    insert = "INSERT INTO payfold_bench.singles SELECT * FROM payfold_bench.orders WHERE id = %s"
    started = time.monotonic()
    for row in found:
        connection.execute(insert, row)
    return len(found) / (time.monotonic() - started)


@contextmanager
def _schema(libpq: str) -> "Iterator[psycopg.Connection[tuple[object, ...]]]":
    with psycopg.connect(libpq, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS payfold_bench CASCADE")
        connection.execute("CREATE SCHEMA payfold_bench")
        try:
            yield connection
        finally:
            connection.execute("DROP SCHEMA payfold_bench CASCADE")


# ---- Rebuilding: bulk load ----


def export_rows(libpq: str, folder: Path) -> int:
    """Write the rows that a rebuild makes, a file for each table, and return how many they are."""
    rows = 0
    with psycopg.connect(libpq) as connection, connection.cursor() as cursor:
        for table in REPLACED:
            statement = sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(table.name))
            with (folder / table.name).open("wb") as file, cursor.copy(statement) as copy:
                for block in copy:
                    file.write(block)
            rows += max(cursor.rowcount, 0)
    return rows


def load_seconds(libpq: str, folder: Path) -> float:
    """Load those rows by COPY into empty tables that have their keys and indexes, and return how long it takes."""
    with _schema(libpq) as connection:
        for table in REPLACED:
            connection.execute(
                sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(
                    sql.Identifier(_SCHEMA, table.name), sql.Identifier("public", table.name)
                )
            )
        started = time.monotonic()
        with connection.transaction(), connection.cursor() as cursor:
            for table in REPLACED:
                _copy(cursor, sql.SQL("COPY {} FROM STDIN"), sql.Identifier(_SCHEMA, table.name), folder / table.name)
        return time.monotonic() - started


def quick_load_seconds(engine: Engine, folder: Path) -> float:
    """Load those rows as fast as it can be done: frozen, before there is an index, and analyzed at the end."""
    with shadow.shadow(engine) as made:
        started = time.monotonic()
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            shadow.make_tables(cursor, made)
            for table in REPLACED:
                name = sql.Identifier(made.schema, table.name)
                _copy(cursor, sql.SQL("COPY {} FROM STDIN (FREEZE)"), name, folder / table.name)
            shadow.make_indexes(cursor, made)
        return time.monotonic() - started


def _copy(cursor: Cursor, statement: sql.SQL, name: sql.Identifier, path: Path) -> None:
    with path.open("rb") as file, cursor.copy(statement.format(name)) as copy:
        while block := file.read(BLOCK_BYTES):
            copy.write(block)
