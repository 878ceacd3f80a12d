"""Brings event logs into the inbox and out of it."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Final

from sqlalchemy import Engine

from schemas import database, inbox
from schemas.inbox import RECORD_ROWS_MAX, Delivery, Recorded
from worker import eventlog, folds, projection
from worker.eventlog import Entry, OwnLine
from worker.folds.facts import Event, utc

EXPORT_ROWS: Final = 500


@dataclass(frozen=True, slots=True)
class Filters:
    """Which events of a log are wanted: created from *since* up to but not at *until*, of a type like *type*."""

    since: datetime | None = None
    until: datetime | None = None
    type: str | None = None

    def wants(self, delivery: Delivery) -> bool:
        """Tell whether *delivery* passes."""
        created = utc(delivery.envelope.created)
        return (
            (self.since is None or created >= self.since)
            and (self.until is None or created < self.until)
            and (self.type is None or fnmatchcase(delivery.envelope.type, self.type))
        )


@dataclass(slots=True)
class Report:
    """What a replay met: ``counts`` by seen, filtered, new, newer rendering, duplicate, and what became of the new."""

    counts: Counter[str] = field(default_factory=Counter)
    refused: list[Entry] = field(default_factory=list)


def replay(
    engine: Engine,
    paths: Sequence[str],
    *,
    filters: Filters,
    account: str,
    now: datetime,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Record what the inbox lacks of the logs at *paths*, fold it, and return what was met.

    A *dry_run* writes nothing and tells what would be new. *progress* is told how many entries each step took.
    """
    report, fresh = Report(), array("q")
    for chunk in _chunks(_read(paths, account, now), RECORD_ROWS_MAX):
        wanted = _sorted_out(chunk, filters, report)
        if dry_run:
            _foresee(engine, wanted, report)
        else:
            _record(engine, wanted, report, fresh)
            _fold_pending(engine, now)
        progress(len(chunk))
    _count_outcomes(engine, fresh, report)
    return report


def _read(paths: Sequence[str], account: str, now: datetime) -> Iterator[Entry]:
    for path in paths:
        yield from eventlog.read(path, account=account, now=now)


def _chunks(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _sorted_out(chunk: Sequence[Entry], filters: Filters, report: Report) -> list[Delivery]:
    wanted = []
    for entry in chunk:
        report.counts["seen"] += 1
        if entry.delivery is None:
            report.counts["refused"] += 1
            report.refused.append(entry)
        elif filters.wants(entry.delivery):
            wanted.append(entry.delivery)
        else:
            report.counts["filtered"] += 1
    return wanted


def _record(engine: Engine, deliveries: Sequence[Delivery], report: Report, fresh: "array[int]") -> None:
    if not deliveries:
        return
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        receipts = inbox.record(cursor, deliveries)
    for receipt in receipts:
        report.counts[receipt.recorded.value] += 1
        if receipt.seq is not None:
            fresh.append(receipt.seq)


def _fold_pending(engine: Engine, now: datetime) -> None:
    while projection.run_once(engine, now=now):
        pass


def _foresee(engine: Engine, deliveries: Sequence[Delivery], report: Report) -> None:
    """Count what recording and folding *deliveries* would do, by the inbox and the folds alone."""
    newest = inbox.newest_of_each(deliveries)
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(
            "SELECT account, livemode, id FROM inbox JOIN"
            " unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)"
            " USING (account, livemode, id)",
            tuple(map(list, zip(*(delivery.key for delivery in newest), strict=True))) or ([], [], []),
        )
        known = {(row[0], row[1], row[2]) for row in cursor.fetchall()}
    report.counts[Recorded.DUPLICATE.value] += len(deliveries) - len(newest)
    for delivery in newest:
        if delivery.key in known:
            report.counts[Recorded.DUPLICATE.value] += 1
        else:
            report.counts[Recorded.NEW.value] += 1
            report.counts[folds.judge(_event(delivery)).state] += 1


def _event(delivery: Delivery) -> Event:
    envelope = delivery.envelope
    return Event(
        seq=0,
        account=delivery.account,
        livemode=envelope.livemode,
        id=envelope.id,
        type=envelope.type,
        created=utc(envelope.created),
        object_type=envelope.object_type,
        object_id=envelope.object_id,
        payload=envelope.payload,
        source=delivery.source,
    )


def _count_outcomes(engine: Engine, fresh: "array[int]", report: Report) -> None:
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(
            "SELECT coalesce(o.state, 'pending'), count(*)"
            " FROM unnest(%b::bigint[]) AS k (seq) LEFT JOIN outcomes AS o USING (seq) GROUP BY 1",
            (list(fresh),),
        )
        for state, count in cursor.fetchall():
            report.counts[state] += count


def export(engine: Engine, *, filters: Filters) -> Iterator[bytes]:
    """Yield the inbox as lines of our log, in the order in which it was recorded."""
    with database.transaction(engine) as connection:
        cursor = connection.connection.driver_connection.cursor("export")  # type: ignore[union-attr]  # the pool does not know the driver's type
        cursor.itersize = EXPORT_ROWS
        cursor.execute(
            "SELECT account, source, received_at, signature, encode(payload_sha256, 'hex'), payload FROM inbox"
            " WHERE (%(since)s::timestamptz IS NULL OR created >= %(since)s)"
            " AND (%(until)s::timestamptz IS NULL OR created < %(until)s) ORDER BY seq",
            {"since": filters.since, "until": filters.until},
        )
        for account, source, received_at, signature, sha256, payload in cursor:
            line = OwnLine(
                account=account,
                source=source,
                received_at=received_at,
                signature=signature,
                payload_sha256=sha256,
                payload=payload.decode(),
            )
            yield eventlog.write(line)
