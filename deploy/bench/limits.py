"""What PostgreSQL and a typed decoder do at most with the same events, measured and not quoted.

Nothing here is part of Payfold: no order of events, no changes, no anomalies, only rows that are already made.

``python -m deploy.bench.limits FOLDER`` decodes the events of the database that DATABASE_URL names, loads the rows in
the folder, and prints how long it took.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Final

import msgspec
import psycopg
from psycopg import sql
from sqlalchemy import Engine

from deploy.bench.apart import Inside, hand_over
from deploy.bench.events import deliveries
from schemas import database, events
from schemas.inbox import Delivery
from schemas.settings import Settings
from worker.folding.claim import event_of_delivery
from worker.folds import (
    balance,
    charge,
    checkout_session,
    credit_note,
    customer,
    dispute,
    invoice,
    join,
    payment_intent,
    payment_link,
    portal,
    refund,
)
from worker.folds.facts import Row
from worker.folds.reading import Reader
from worker.proof import processes, rebuild, shadow
from worker.proof.shadow import REPLACED, Shadow

CHUNK: Final = 500
COMMITS: Final = 300
"""Rows that are committed one by one."""
BLOCK_BYTES: Final = 1024 * 1024

READERS: Final[dict[str, Reader]] = {  # type: ignore[type-arg]  # of one type each
    "billing_portal.configuration": Reader(portal.Configuration),
    "billing_portal.session": Reader(portal.Session),
    "charge": Reader(charge.Charge),
    "checkout.session": Reader(checkout_session.CheckoutSession),
    "credit_note": Reader(credit_note.CreditNote),
    "customer": Reader(customer.Customer),
    "customer_balance_transaction": Reader(balance.Transaction),
    "dispute": Reader(dispute.Dispute),
    "invoice": Reader(invoice.Invoice),
    "invoice_payment": Reader(invoice.InvoicePayment),
    "payment_intent": Reader(payment_intent.PaymentIntent),
    "payment_link": Reader(payment_link.PaymentLink),
    "refund": Reader(refund.Refund),
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
    return READERS[str(events.read(body).object_type)]


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


# ---- Rebuilding: read, decode and load ----


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


def decode_and_load_seconds(engine: Engine, folder: Path) -> float:
    """Read and decode every payload of the inbox, load the exported rows of *folder*, and return how long it takes.

    As many processes as a rebuild uses decode while this one loads. They make the indexes at the end.
    """
    with shadow.shadow(engine) as made:
        started = time.monotonic()
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            cursor.execute("SELECT coalesce(min(seq), 0), coalesce(max(seq), -1), count(*) FROM inbox")
            first, last, count = cursor.fetchone() or (0, -1, 0)
            indexes, keys = shadow.indexes(cursor, made), shadow.keys(cursor, made)
        ranges = [(at, at + rebuild.USUAL.per_task) for at in range(first, last + 1, rebuild.USUAL.per_task)]
        url = engine.url.render_as_string(hide_password=False)
        with processes.crew(rebuild.USUAL.processes_for(count), _begin, url) as crew:
            decoding = [crew.begin(_decode, each) for each in ranges]
            _load(engine, made, folder)
            for each in decoding:
                each.result()
            for _ in (*crew.each(_execute, [[each] for each in indexes]), *crew.each(_execute, keys)):
                pass
        return time.monotonic() - started


def quick_load_seconds(engine: Engine, folder: Path) -> float:
    """Load those rows as fast as one connection can: frozen, before there is an index, and analyzed at the end."""
    with shadow.shadow(engine) as made:
        started = time.monotonic()
        _load(engine, made, folder)
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            for statement in (*shadow.indexes(cursor, made), *chain.from_iterable(shadow.keys(cursor, made))):
                cursor.execute(statement)
        return time.monotonic() - started


def _load(engine: Engine, made: Shadow, folder: Path) -> None:
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        shadow.make_tables(cursor, made)
        for table in REPLACED:
            statement = sql.SQL("COPY {} FROM STDIN (FREEZE)").format(sql.Identifier(made.schema, table.name))
            with (folder / table.name).open("rb") as file, cursor.copy(statement) as copy:
                while block := file.read(BLOCK_BYTES):
                    copy.write(block)


# ---- In each process ----

_ENGINE: Engine


def _begin(url: str) -> None:
    global _ENGINE  # noqa: PLW0603 - what a process begins with is the one thing its tasks share
    _ENGINE = database.engine(url, connections_max=1)


def _decode(bounds: tuple[int, int]) -> None:
    first, end = bounds
    with database.transaction(_ENGINE) as connection:
        driver = connection.connection.driver_connection
        with driver.cursor("payloads", binary=True) as rows:  # type: ignore[union-attr]  # the pool does not know the driver's type
            rows.itersize = rebuild.ROWS_READ
            rows.execute(_PAYLOADS, {"first": first, "end": end})
            for object_type, payload in rows:
                reader = READERS.get(object_type)
                if reader is not None:
                    reader.read(payload)


_PAYLOADS: Final = """
SELECT i.object_type, b.payload FROM inbox AS i JOIN payloads AS b USING (seq)
WHERE i.seq >= %(first)s AND i.seq < %(end)s AND b.seq >= %(first)s AND b.seq < %(end)s
"""


def _execute(statements: Sequence[str]) -> None:
    with database.transaction(_ENGINE) as connection, database.cursor(connection) as cursor:
        for statement in statements:
            cursor.execute(statement)


# ---- As a process of its own ----


def main(folder: str) -> None:
    """Decode and load, and print what it took."""
    seconds = decode_and_load_seconds(database.engine(Settings.load().postgresql), Path(folder))
    hand_over(Inside(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
