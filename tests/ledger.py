"""Helpers for tests of the projection: record events, fold them, and read the tables."""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import combinations, pairwise, permutations
from typing import Any

from alembic import command
from sqlalchemy import Engine, insert, text

from schemas import database, events, inbox, migrate, own_events, tables
from schemas.inbox import Delivery
from worker.folding import projection
from worker.folds.facts import Row, Subject
from worker.proof import digest

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
REFERENCE_SCHEMA = "reference"


def delivery(body: bytes, *, account: str = "", source: str | None = None) -> Delivery:
    """Return the delivery of *body* under a secret labelled *account*."""
    envelope = events.read(body)
    return Delivery(
        envelope=envelope,
        account=envelope.account or account,
        sha256=hashlib.sha256(body).digest(),
        signature=None,
        source=source or ("observation" if own_events.is_own(envelope.type) else "webhook"),
        received_at=NOW,
    )


def record(engine: Engine, deliveries: Iterable[Delivery]) -> list[inbox.Receipt]:
    """Record *deliveries* in one statement."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        return inbox.record(cursor, list(deliveries))


def fold(engine: Engine, *, limit: int = projection.FOLD_BATCH_MAX) -> int:
    """Fold until nothing is pending, *limit* events at a time, and return the number of folded events."""
    return projection.fold_pending(engine, now=NOW, limit=limit)


def fold_with_workers(engine: Engine, workers: int, *, limit: int) -> None:
    """Fold until nothing is pending, with several workers at once."""
    faults: list[BaseException] = []

    def work() -> None:
        try:
            fold(engine, limit=limit)
        except BaseException as fault:  # noqa: BLE001 - handed to the test
            faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A worker does not see events that another one had claimed, so the last fold runs alone.
    fold(engine, limit=limit)
    assert not faults, faults


def take_in(engine: Engine, *bodies: bytes, account: str = "") -> None:
    """Record and fold *bodies* one by one."""
    for body in bodies:
        record(engine, [delivery(body, account=account)])
        fold(engine)


def splits(bodies: Sequence[bytes]) -> Iterator[list[list[bytes]]]:
    """Yield *bodies* in every order, each order divided into batches in every possible way."""
    for order in permutations(bodies):
        for count in range(len(order)):
            for cuts in combinations(range(1, len(order)), count):
                yield [list(order[start:end]) for start, end in pairwise([0, *cuts, len(order)])]


def take_in_batches(engine: Engine, batches: Iterable[Iterable[bytes]]) -> None:
    """Empty every table, then record and fold *batches* one after the other."""
    clear(engine)
    for batch in batches:
        record(engine, map(delivery, batch))
        fold(engine)


def rows(engine: Engine, statement: str, **values: object) -> list[dict[str, Any]]:
    """Return the rows that *statement* selects."""
    with database.transaction(engine) as connection:
        return [dict(row) for row in connection.execute(text(statement), values).mappings()]


def execute(engine: Engine, statement: str, **values: object) -> None:
    """Execute a statement."""
    with database.transaction(engine) as connection:
        connection.execute(text(statement), values)


def kinds(engine: Engine, subject_id: str) -> list[str]:
    """Return the kinds of the changes of one subject, in the feed's order."""
    return [
        row["kind"]
        for row in rows(engine, "SELECT kind FROM changes WHERE subject_id = :id ORDER BY seq", id=subject_id)
    ]


def anomalies(engine: Engine) -> list[str]:
    """Return the kinds of the anomalies in force."""
    found = rows(engine, "SELECT kind FROM anomalies WHERE resolved_at IS NULL ORDER BY kind")
    return [row["kind"] for row in found]


def downgrade(engine: Engine, revision: str) -> None:
    """Migrate down to *revision*."""
    config = migrate._config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def clear(engine: Engine) -> None:
    """Empty every table."""
    names = ", ".join(
        table.name for table in (tables.inbox, tables.payloads, tables.contents, tables.renderings, *tables.REBUILT)
    )
    with database.transaction(engine) as connection:
        connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY"))


@contextmanager
def schema_of(engine: Engine, reference: dict[Subject, Row]) -> Iterator[str]:
    """Write the rows of *reference* unchanged into a schema of their own, and yield its name."""
    with database.transaction(engine) as connection:
        connection.execute(text(f"DROP SCHEMA IF EXISTS {REFERENCE_SCHEMA} CASCADE"))
        connection.execute(text(f"CREATE SCHEMA {REFERENCE_SCHEMA}"))
        for table in tables.PROJECTIONS:
            copy = f"{REFERENCE_SCHEMA}.{table.name}"
            connection.execute(text(f"CREATE TABLE {copy} (LIKE {table.name} INCLUDING ALL)"))
            found = [row for subject, row in reference.items() if subject.table == table.name]
            if found:
                options = {"schema_translate_map": {None: REFERENCE_SCHEMA}}
                connection.execution_options(**options).execute(insert(table), found)
    yield REFERENCE_SCHEMA


def digest_of(engine: Engine, schema: str | None = None) -> str:
    """Return the one digest of all tables."""
    return digest.digests(engine, schema=schema)[-1].sha256


def digest_of_reference(engine: Engine, reference: dict[Subject, Row]) -> str:
    """Return the digest of the rows of *reference*."""
    with schema_of(engine, reference) as schema:
        return digest_of(engine, schema)


def batches(items: Sequence[Delivery], sizes: Iterable[int]) -> Iterator[list[Delivery]]:
    """Yield *items* in batches of *sizes*, and the rest in one."""
    start = 0
    for size in sizes:
        if start >= len(items):
            return
        yield list(items[start : start + size])
        start += size
    if start < len(items):
        yield list(items[start:])
