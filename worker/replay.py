"""Brings event logs into the inbox and out of it."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Final, TypeAlias

from sqlalchemy import Engine

from schemas import database, inbox
from schemas.inbox import RECORD_ROWS_MAX, Delivery, Recorded
from worker import eventlog, folds, projection
from worker.eventlog import Entry
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


Counts: TypeAlias = Counter[str]
"""What a replay met.

``seen`` is the sum of ``filtered``, ``new``, ``newer rendering``, ``duplicate`` and ``refused``; what became of the
new and the newer is the sum of ``folded``, ``ignored``, ``parked`` and ``pending``.
"""
Key: TypeAlias = tuple[str, bool, str]
"""Account, mode and id of an event."""


def replay(
    engine: Engine,
    paths: Sequence[str],
    *,
    filters: Filters,
    account: str,
    now: datetime,
    dry_run: bool = False,
    refuse: Callable[[Entry], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
) -> Counts:
    """Record what the inbox lacks of the logs at *paths*, fold it, and return what was met.

    A *dry_run* writes nothing and counts what would happen. *refuse* is told each entry that cannot be read, and
    *progress* how many entries each step took.
    """
    counts: Counts = Counter()
    taken = _Foresight(engine) if dry_run else _Recording(engine, now)
    for chunk in _chunks(_read(paths, account, now), RECORD_ROWS_MAX):
        wanted = _sorted_out(chunk, filters, counts, refuse)
        if wanted:
            counts.update(taken.take(wanted))
        progress(len(chunk))
    counts.update(taken.outcomes())
    return counts


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


def _sorted_out(
    chunk: Sequence[Entry], filters: Filters, counts: Counts, refuse: Callable[[Entry], None]
) -> list[Delivery]:
    wanted = []
    for entry in chunk:
        counts["seen"] += 1
        if entry.delivery is None:
            counts["refused"] += 1
            refuse(entry)
        elif filters.wants(entry.delivery):
            wanted.append(entry.delivery)
        else:
            counts["filtered"] += 1
    return wanted


class _Recording:
    """Brings deliveries in, and folds them at once."""

    def __init__(self, engine: Engine, now: datetime) -> None:
        self._engine = engine
        self._now = now
        self._fresh = array("q")

    def take(self, deliveries: Sequence[Delivery]) -> Iterable[str]:
        """Record *deliveries* and fold what is pending; return what became of each."""
        with database.transaction(self._engine) as connection, database.cursor(connection) as cursor:
            receipts = inbox.record(cursor, deliveries)
        while projection.run_once(self._engine, now=self._now):
            pass
        self._fresh.extend(receipt.seq for receipt in receipts if receipt.seq is not None)
        return [receipt.recorded.value for receipt in receipts]

    def outcomes(self) -> Mapping[str, int]:
        """Return how many of what was new have which state."""
        with database.transaction(self._engine) as connection, database.cursor(connection) as cursor:
            cursor.execute(
                "SELECT state, count(*) FROM unnest(%b::bigint[]) AS k (seq) JOIN events USING (seq) GROUP BY state",
                (list(self._fresh),),
            )
            return dict(cursor.fetchall())


@dataclass(slots=True)
class _Foreseen:
    """What an event that is not in the inbox, or not in this rendering, would come to."""

    rendering: str
    state: str
    times: int = 1
    """How often it would be recorded: once, and once more for each newer rendering."""


class _Foresight:
    """Tells what a recording would do, by the inbox and the folds alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._foreseen: dict[Key, _Foreseen] = {}
        self._set_aside: set[Key] = set()

    def take(self, deliveries: Sequence[Delivery]) -> Iterable[str]:
        """Return what would become of each of *deliveries*."""
        newest = inbox.newest_of_each(deliveries)
        known = self._known(newest)
        for _ in range(len(deliveries) - len(newest)):
            yield Recorded.DUPLICATE.value
        for delivery in newest:
            yield self._foresee(delivery, known.get(delivery.key)).value

    def outcomes(self) -> Mapping[str, int]:
        """Return how many of what would be new would have which state."""
        counts: Counts = Counter()
        for key, foreseen in self._foreseen.items():
            counts["ignored" if key in self._set_aside else foreseen.state] += foreseen.times
        return counts

    def _foresee(self, delivery: Delivery, known: str | None) -> Recorded:
        before = self._foreseen.get(delivery.key)
        rendering = before.rendering if before is not None else known
        if rendering is not None and delivery.rendering <= rendering:
            return Recorded.DUPLICATE
        event = _event(delivery)
        times = 1 if before is None else before.times + 1
        self._foreseen[delivery.key] = _Foreseen(delivery.rendering, folds.judge(event).state, times)
        if event.type == folds.EVENT_IGNORED and event.object_id is not None:
            self._set_aside.add((event.account, event.livemode, event.object_id))
        return Recorded.NEW if rendering is None else Recorded.NEWER_RENDERING

    def _known(self, deliveries: Sequence[Delivery]) -> dict[Key, str]:
        """Return the rendering that the inbox has of each event, and note which of them an operator has set aside."""
        keys = [list(column) for column in zip(*(delivery.key for delivery in deliveries), strict=True)]
        with database.transaction(self._engine) as connection, database.cursor(connection) as cursor:
            cursor.execute(_KNOWN, keys)
            found = cursor.fetchall()
        self._set_aside.update((row[0], row[1], row[2]) for row in found if row[4])
        return {(row[0], row[1], row[2]): row[3] for row in found if row[3] is not None}


_KNOWN: Final = """
SELECT account, livemode, id, CASE WHEN i.seq IS NOT NULL THEN coalesce(left(i.api_version, 10), '') END, EXISTS (
    SELECT FROM inbox AS a WHERE a.type = 'payfold.event.ignored'
        AND (a.account, a.livemode, a.object_id) = (k.account, k.livemode, k.id)
)
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
LEFT JOIN inbox AS i USING (account, livemode, id)
"""


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


def export(engine: Engine, *, filters: Filters) -> Iterator[bytes]:
    """Yield the inbox as lines of our log, in the order in which it was recorded, without what is archived."""
    with database.transaction(engine) as connection:
        driver = connection.connection.driver_connection
        with driver.cursor("export") as cursor:  # type: ignore[union-attr]  # the pool does not know the driver's type
            cursor.itersize = EXPORT_ROWS
            cursor.execute(_EXPORTED, {"since": filters.since, "until": filters.until})
            for row in cursor:
                yield eventlog.line_of(*row)


def left_out(engine: Engine, *, filters: Filters) -> int:
    """Return how many events an export leaves out, since their payloads are archived."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(_LEFT_OUT, {"since": filters.since, "until": filters.until})
        (count,) = cursor.fetchone() or (0,)
        return int(count)


_LEFT_OUT: Final = """
SELECT count(*) FROM inbox AS i
WHERE (%(since)s::timestamptz IS NULL OR created >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR created < %(until)s)
    AND NOT EXISTS (SELECT FROM payloads AS b WHERE b.seq = i.seq)
"""
_EXPORTED: Final = """
SELECT account, source, received_at, signature, encode(payload_sha256, 'hex'), redacted, payload
FROM inbox JOIN payloads USING (seq)
WHERE (%(since)s::timestamptz IS NULL OR created >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR created < %(until)s)
ORDER BY seq
"""
