"""Brings event logs into the inbox and out of it.

Note [What is withheld was never to be seen]
    The first import of an old shop's history would announce to its consumers every order that it ever had. With
    *withhold* the changes that the import makes are kept for the record, and hidden from the feed. Each step therefore
    records and folds in one transaction, during which no one else folds: otherwise a worker could find a recorded
    event pending, fold it, and announce the change. Changes by webhooks that arrive during the import, and are folded
    with it, are announced as usual.
"""

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Final, TypeAlias

from sqlalchemy import Engine

from schemas import accounts, database, inbox
from schemas.database import Cursor, integer_array
from schemas.errors import ConflictError, Transient
from schemas.events import Key
from schemas.inbox import RECORD_ROWS_MAX, Delivery, Receipt, Recorded
from schemas.locks import keep_others_from_folding
from schemas.progress import do_nothing
from schemas.settings import SigningSecret
from worker.folding import parallel, projection, renderings
from worker.folding.batch import Claimed
from worker.folding.claim import claim
from worker.folding.parallel import FoldProcess, FoldRequest
from worker.folds.facts import utc
from worker.logs import reader, writer
from worker.logs.reader import Entry

EXPORT_ROWS: Final = 500
OUTCOMES_READ: Final = 100_000
BACKLOG: Final = 5_000
"""From so many events on, it is worth having another process fold while this one records."""
RECORD_BYTES_MAX: Final = 16 * 1024 * 1024
LOOK_SECONDS: Final = 0.5
PATIENCE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class LogFilters:
    """Which events of a log are wanted.

    Created from *since* up to but not at *until*, of a type like *type*, of one *account*, of one mode.
    """

    since: datetime | None = None
    until: datetime | None = None
    type: str | None = None
    account: str | None = None
    livemode: bool | None = None

    def wants(self, delivery: Delivery) -> bool:
        """Return whether *delivery* passes the filters."""
        created = utc(delivery.envelope.created)
        return (
            (self.since is None or created >= self.since)
            and (self.until is None or created < self.until)
            and (self.type is None or fnmatchcase(delivery.envelope.type, self.type))
            and (self.account is None or delivery.account == self.account)
            and (self.livemode is None or delivery.envelope.livemode == self.livemode)
        )


ALL_EVENTS: Final = LogFilters()

Counts: TypeAlias = Counter[str]
"""What a replay met.

``seen`` is the sum of ``filtered``, ``new``, ``newer``, ``mended``, ``duplicate`` and ``refused``. The sum of ``new``,
``newer`` and ``mended`` is that of ``folded``, ``ignored``, ``parked`` and ``pending``, which count their outcomes. A
copy counts as newer when it is now folded in place of another copy, and as mended when its event was parked and no
longer is.
"""
NEWER: Final = "newer"
MENDED: Final = "mended"


@dataclass(frozen=True, slots=True)
class Parked:
    """How many *events* are parked by one *cause*; the first of them is the *example*, which has this *reason*."""

    cause: str | None
    events: int
    example: str
    reason: str | None


@dataclass(slots=True)
class Replayed:
    """The result of a replay: its counts, how many changes of each kind it withheld, and why events are parked."""

    counts: Counts
    withheld: Counts
    parked: list[Parked]


@dataclass(frozen=True, slots=True)
class Reading:
    """Which logs are read, and how that is reported.

    *filters* choose the events that are wanted, *account* stands for events that name none, and *now* is when events
    are received. *names* maps the old names of accounts to their newest, for the events and for the filter. *refuse* is
    called with each entry that cannot be read, *warn* with a text about anything odd in a file, and *progress* with how
    many entries were read so far, and how many bytes of the files since its last call. A signature counts where one of
    *secrets* verifies it.
    """

    paths: Sequence[str]
    now: datetime
    filters: LogFilters = ALL_EVENTS
    account: str = ""
    refuse: Callable[[Entry], None] = do_nothing
    progress: Callable[[int, int], None] = do_nothing
    warn: Callable[[str], None] = do_nothing
    names: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[SigningSecret] = ()

    def named_as_in(self, engine: Engine) -> "Reading":
        """Return the same logs, with the names that accounts have in the database of *engine*."""
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            names = accounts.names(cursor)
        account = None if self.filters.account is None else names.get(self.filters.account, self.filters.account)
        return replace(self, names=names, filters=replace(self.filters, account=account))

    def chunks(self, counts: Counts) -> Iterator[list[Delivery]]:
        """Yield the wanted deliveries of the logs, several at once, and count all entries."""
        wanted: list[Delivery] = []
        size = 0
        for entry in self._entries(counts):
            counts["seen"] += 1
            if entry.delivery is None:
                counts["refused"] += 1
                self.refuse(entry)
                continue
            delivery = entry.delivery.named(self.names)
            if self.filters.wants(delivery):
                wanted.append(delivery)
                size += len(delivery.envelope.payload)
            else:
                counts["filtered"] += 1
            if len(wanted) == RECORD_ROWS_MAX or size >= RECORD_BYTES_MAX:
                yield wanted
                self.progress(counts["seen"], 0)
                wanted, size = [], 0
        if wanted:
            yield wanted

    def _entries(self, counts: Counts) -> Iterator[Entry]:
        for path in self.paths:
            yield from reader.read(
                path,
                account=self.account,
                now=self.now,
                progress=lambda read: self.progress(counts["seen"], read),
                warn=self.warn,
                secrets=self.secrets,
                names=self.names,
            )


def replay(
    engine: Engine,
    logs: Reading,
    *,
    others: Callable[[], object] | None = None,
    withhold: bool = False,
    backlog: int = BACKLOG,
) -> Replayed:
    """Record the events of *logs* that the inbox lacks, fold them, and return the counts.

    Where *others* are given, they fold, and this waits for them. With *withhold* the changes that this makes are kept
    from the feed, which is meant for a first import: see Note [What is withheld was never to be seen]. From *backlog*
    events on, another process folds while this one records.

    Raises:
        ConflictError: changes have been announced here, so this is no first import.
    """
    counts: Counts = Counter()
    logs = logs.named_as_in(engine)
    with closing(_Folder(engine, logs.now, None if others else backlog)) as folder:
        taken = _Withholding(engine, logs.now, folder) if withhold else _Recording(engine, logs.now, folder)
        for wanted in logs.chunks(counts):
            counts.update(taken.take(wanted))
        if others is not None:
            others()
        folder.end()
    counts.update(taken.outcomes())
    return Replayed(counts, taken.withheld, taken.parked() if counts["parked"] else [])


class _Folder:
    """Folds recorded events: at the end, or from a *backlog* on while others are recorded; None leaves it to others."""

    def __init__(self, engine: Engine, now: datetime, backlog: int | None) -> None:
        self._engine = engine
        self._now = now
        self._backlog = backlog
        self._fold_process = FoldProcess(engine.url.render_as_string(hide_password=False))
        self._recorded = 0

    def go_on(self, recorded: int) -> None:
        """Have pending events folded, of which there are *recorded* more."""
        self._recorded += recorded
        if self._has_partner and not self._fold_process.is_folding:
            self._fold_process.begin(FoldRequest(now=self._now))

    @property
    def _has_partner(self) -> bool:
        return self._backlog is not None and self._recorded >= self._backlog

    def end(self) -> None:
        """Return once nothing is pending, of this recording or of any other."""
        if self._backlog is not None:
            parallel.fold(self._engine, now=self._now, partner=self._fold_process if self._has_partner else None)

    def close(self) -> None:
        """End the process that folds, where there is one."""
        self._fold_process.close()


class _Recording:
    """Records deliveries, and has them folded."""

    def __init__(self, engine: Engine, now: datetime, folder: _Folder) -> None:
        self._engine = engine
        self._now = now
        self._folder = folder
        self._fresh = array("q")
        self._copies: list[tuple[int, bytes]] = []
        self._parked_before: set[int] = set()
        self._is_known = True
        self._partition = -1
        self.withheld: Counts = Counter()

    def take(self, deliveries: Sequence[Delivery]) -> list[str]:
        """Record *deliveries* and fold pending events; return the result of recording each."""
        self._make_room()
        news = self._news(deliveries)
        receipts = self._record(news) if news else []
        self._fresh.extend(each.seq for each in receipts if each.seq is not None and each.recorded is Recorded.NEW)
        became = [receipt.recorded for receipt in receipts]
        became += [Recorded.DUPLICATE] * (len(deliveries) - len(news))
        self._is_known = not all(each is Recorded.NEW for each in became)
        # The outcome of a copy is known only when it is folded.
        return [each.value for each in became if each is not Recorded.COPY]

    def _news(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Return the *deliveries* that the inbox may lack: after a chunk of new ones only, all of them, unchecked."""
        if not self._is_known:
            return deliveries
        with database.transaction(self._engine) as connection, database.cursor(connection) as cursor:
            known = held(cursor, deliveries)
        return [each for each in deliveries if each.key not in known or known[each.key].may_gain_by(each)]

    def _record(self, deliveries: Sequence[Delivery]) -> list[Receipt]:
        with database.transaction(self._engine) as connection, database.cursor(connection) as cursor:
            receipts = inbox.record(cursor, deliveries)
            self._note_copies(cursor, deliveries, receipts)
        self._folder.go_on(len(receipts))
        return receipts

    def _note_copies(self, cursor: Cursor, deliveries: Sequence[Delivery], receipts: Sequence[Receipt]) -> None:
        """Remember the copies among *deliveries*, and which of their events are parked, before they are folded."""
        found = [
            (receipt.seq, delivery.sha256_chosen)
            for delivery, receipt in zip(deliveries, receipts, strict=True)
            if receipt.recorded is Recorded.COPY and receipt.seq is not None
        ]
        if found:
            self._copies += found
            cursor.execute(_ARE_PARKED, (integer_array(seq for seq, _ in found),))
            self._parked_before.update(seq for (seq,) in cursor.fetchall())

    def _conclude_copies(self) -> Counts:
        """Return how many copies are newer, have mended their events, or are nothing new after all."""
        counts: Counts = Counter()
        new = set(self._fresh) if self._copies else set()
        taken: set[int] = set()
        with database.transaction(self._engine) as connection, database.cursor(connection) as cursor:
            for at in range(0, len(self._copies), OUTCOMES_READ):
                some = self._copies[at : at + OUTCOMES_READ]
                cursor.execute(_NOW_CHOSEN, (integer_array(seq for seq, _ in some),))
                chosen = {seq: (bytes(sha256), is_parked) for seq, sha256, is_parked in cursor.fetchall()}
                for seq, sha256 in some:
                    is_taken = seq in taken or chosen[seq][0] != sha256
                    was_parked = seq in self._parked_before and seq not in new
                    became = MENDED if was_parked and not chosen[seq][1] else NEWER
                    counts[Recorded.DUPLICATE.value if is_taken else became] += 1
                    if not is_taken:
                        taken.add(seq)
                        self._fresh.append(seq)
        return counts

    def _make_room(self) -> None:
        """Make the next partition as soon as one is begun: the clock that would make it may not be running yet."""
        partition = self._fresh[-1] // inbox.PARTITION_EVENTS if self._fresh else 0
        if partition > self._partition and inbox.make_room(self._engine) is not None:
            self._partition = partition

    def outcomes(self) -> Mapping[str, int]:
        """Return how many copies had which result, and how many of the new events have which state."""
        found = self._conclude_copies()
        with database.transaction(self._engine) as connection, database.cursor(connection) as cursor:
            for at in range(0, len(self._fresh), OUTCOMES_READ):
                cursor.execute(
                    "SELECT CASE WHEN p.seq IS NULL THEN o.state ELSE 'pending' END, count(*)"
                    " FROM unnest(%s::bigint[]) AS k (seq) LEFT JOIN pending AS p USING (seq)"
                    " LEFT JOIN outcomes AS o USING (seq) GROUP BY 1",
                    (integer_array(self._fresh[at : at + OUTCOMES_READ]),),
                )
                found.update(dict(cursor.fetchall()))
        return found

    def parked(self) -> list[Parked]:
        """Return the new events that are parked, by cause, the most frequent cause first."""
        events: Counts = Counter()
        first: dict[str, int] = {}
        with database.transaction(self._engine) as connection, database.cursor(connection) as cursor:
            for at in range(0, len(self._fresh), OUTCOMES_READ):
                cursor.execute(_PARKED, (integer_array(self._fresh[at : at + OUTCOMES_READ]),))
                for cause, count, seq in cursor.fetchall():
                    events[cause] += count
                    first[cause] = min(seq, first.get(cause, seq))
            cursor.execute(_EXAMPLES, (integer_array(first.values()),))
            examples = {seq: (event, reason) for seq, event, reason in cursor.fetchall()}
        return [Parked(cause or None, count, *examples[first[cause]]) for cause, count in events.most_common()]


_ARE_PARKED: Final = "SELECT seq FROM outcomes WHERE seq = ANY (%s::bigint[]) AND state = 'parked'"
_NOW_CHOSEN: Final = """
SELECT i.seq, i.payload_sha256, coalesce(o.state = 'parked', false)
FROM inbox AS i LEFT JOIN outcomes AS o USING (seq) WHERE i.seq = ANY (%s::bigint[])
"""
_PARKED: Final = """
SELECT coalesce(cause, ''), count(*), min(seq) FROM unnest(%s::bigint[]) AS k (seq) JOIN outcomes AS o USING (seq)
WHERE o.state = 'parked' AND NOT EXISTS (SELECT FROM pending AS p WHERE p.seq = k.seq) GROUP BY 1
"""
_EXAMPLES: Final = """
SELECT seq, id, reason FROM unnest(%s::bigint[]) AS k (seq) JOIN inbox AS i USING (seq)
JOIN outcomes AS o USING (seq)
"""


class _Withholding(_Recording):
    """Records deliveries and folds them, and keeps the changes that this makes from the feed."""

    def __init__(self, engine: Engine, now: datetime, folder: _Folder) -> None:
        super().__init__(engine, now, folder)
        # Observations of the log. Nothing else distinguishes them from observations made during the import.
        self._observed: set[Key] = set()
        self._names: Mapping[str, str] = {}
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            accounts.require_settled(cursor)
            cursor.execute("SELECT EXISTS (SELECT FROM changes WHERE withheld IS NULL)")
            if cursor.fetchone() != (False,):
                raise ConflictError(
                    "Changes have been announced here, so this is no first import: a consumer that wants none of"
                    " history's starts its cursor after them. Nothing was recorded."
                )

    def take(self, deliveries: Sequence[Delivery]) -> list[str]:
        """Record and fold *deliveries*, and remember the log's observations, even those that the inbox has already."""
        observed = (each.named(self._names) for each in deliveries if each.source == "observation")
        self._observed.update(each.key for each in observed)
        return super().take(deliveries)

    def _record(self, deliveries: Sequence[Delivery], *, is_again: bool = False) -> list[Receipt]:
        claimed: Sequence[Claimed] = ()
        copies, parked = list(self._copies), set(self._parked_before)
        try:
            with database.transaction(self._engine) as connection, database.cursor(connection) as cursor:
                keep_others_from_folding(cursor)
                # Events that a rename holds back would be folded, and announced, by the worker that folds after it.
                accounts.require_settled(cursor)
                cursor.execute("SELECT coalesce(max(seq), 0) FROM changes")
                (last,) = cursor.fetchone() or (0,)
                receipts = inbox.record(cursor, deliveries)
                self._note_copies(cursor, deliveries, receipts)
                renderings.queue(cursor)
                while claimed := claim(cursor, limit=projection.FOLD_BATCH_MAX):
                    projection.project(cursor, claimed, now=self._now)
                self._withhold(cursor, last)
        except Exception as error:
            self._copies, self._parked_before = copies, parked
            # One event is at fault. It is looked for, since it alone is to be parked, and announces nothing.
            if isinstance(error, Transient) or not claimed or not projection.failure_of(error).is_of_data:
                raise
            half = len(deliveries) // 2
            if not half and not is_again:
                # Another pending event may be at fault, and is parked by this.
                self._folder.end()
                return self._record(deliveries, is_again=True)
            if not half:
                receipts = super()._record(deliveries)
                self._folder.end()  # before the next step meets it
                return receipts
            return [*self._record(deliveries[:half]), *self._record(deliveries[half:])]
        return receipts

    def _withhold(self, cursor: Cursor, last: int) -> None:
        """Withhold the changes numbered above *last* that came from the log's events."""
        names = accounts.names(cursor)
        if names != self._names:
            self._observed = {(names.get(account, account), mode, event) for account, mode, event in self._observed}
            self._names = names
        cursor.execute(_OBSERVED, (last,))
        others = [change for change, *event in cursor.fetchall() if tuple(event) not in self._observed]
        cursor.execute(_WITHHELD, (last, others))
        self.withheld.update(dict(cursor.fetchall()))


_OBSERVED: Final = """
SELECT seq, account, livemode, event_id FROM changes WHERE seq > %s AND source = 'observation'
"""
_WITHHELD: Final = """
WITH hidden AS (
    UPDATE changes SET withheld = 'import'
    WHERE seq > %s AND source IN ('replay', 'observation') AND NOT (seq = ANY (%s::bigint[])) RETURNING kind
)
SELECT kind, count(*) FROM hidden GROUP BY kind
"""


@dataclass(frozen=True, slots=True)
class Held:
    """An event in the inbox: its number, the hash of its body, and whether that body was signed, or is only claimed."""

    seq: int
    sha256: bytes
    signed: bool
    is_claimed: bool

    def may_gain_by(self, delivery: Delivery) -> bool:
        """Return whether *delivery* may have other bytes, or is the first that is signed."""
        return delivery.sha256 != self.sha256 or self.is_claimed or delivery.is_claimed or delivery.signed > self.signed


def held(cursor: Cursor, deliveries: Sequence[Delivery]) -> dict[Key, Held]:
    """Return, by key, the events of *deliveries* that the inbox has."""
    keys = [list(column) for column in zip(*(delivery.key for delivery in deliveries), strict=True)]
    cursor.execute(_HELD, keys)
    return {(row[0], row[1], row[2]): Held(row[3], bytes(row[4]), row[5], row[6]) for row in cursor.fetchall()}


_HELD: Final = """
SELECT account, livemode, id, i.seq, i.payload_sha256, i.signature IS NOT NULL AND i.verified,
    cardinality(i.redacted) > 0 AND NOT (i.signature IS NOT NULL AND i.verified)
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
JOIN inbox AS i USING (account, livemode, id)
"""


def follow(
    engine: Engine,
    *,
    wake: Callable[[], None],
    progress: Callable[[int, int], None],
    patience_seconds: float = PATIENCE_SECONDS,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Wait until others have folded all pending events, and return how many are left.

    The others are woken again and again. *progress* is called with how many events are folded, of how many. Some are
    left only when no event was folded for *patience_seconds*.
    """
    total = left = _pending(engine)
    waited = 0.0
    while left and waited < patience_seconds:
        wake()
        pause(LOOK_SECONDS)
        before, left = left, _pending(engine)
        total = max(total, left)
        waited = 0.0 if left < before else waited + LOOK_SECONDS
        progress(total - left, total)
    return left


def _pending(engine: Engine) -> int:
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(
            "SELECT (SELECT count(*) FROM pending)"
            " + (SELECT count(*) FROM (SELECT FROM renderings WHERE content_sha256 IS NULL LIMIT 1) AS fresh)"
        )
        (count,) = cursor.fetchone() or (0,)
        return int(count)


def why_pending(engine: Engine) -> str:
    """Return why events are still pending after a replay that folds, and what to do."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        try:
            accounts.require_settled(cursor)
        except ConflictError as error:
            return f"Events wait. {error}"
        cursor.execute("SELECT count(*), min(reason) FROM pending WHERE due_at IS NOT NULL")
        postponed, reason = cursor.fetchone() or (0, None)
    if postponed:
        return (
            f"{postponed:,} events could not be folded for now and are tried again by the worker, or when this is run"
            f" again in a few minutes. One of the reasons: {reason}."
        )
    return "What is pending was taken by other workers, or recorded, while this ended: run it again to see."


def export(engine: Engine, *, filters: LogFilters, with_renderings: bool = False) -> Iterator[bytes]:
    """Yield the inbox as lines of our log, in the order in which it was recorded, without archived events.

    Of an event with several contents the folded one is exported, and with *with_renderings* the others after it.

    Each transaction reads a few events and ends before their lines are taken, so that a slow reader keeps no
    transaction open. Events that are recorded after the export has begun are left to the next export.
    """
    given = {"since": filters.since, "until": filters.until, "rows": EXPORT_ROWS}
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("SELECT coalesce(max(seq), 0) FROM inbox")
        (end,) = cursor.fetchone() or (0,)
    last: int | None = 0
    while last is not None:
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            cursor.execute(_NEXT, {**given, "after": last, "end": end})
            first, last = cursor.fetchone() or (None, None)
            statement = _ALL_EXPORTED if with_renderings else _EXPORTED
            cursor.execute(statement, {**given, "first": first, "last": last})
            rows = cursor.fetchall()
        for row in rows:
            yield writer.line_of(*row[:7])


def left_out(engine: Engine, *, filters: LogFilters) -> int:
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
_NEXT: Final = """
SELECT min(seq), max(seq) FROM (
    SELECT seq FROM inbox
    WHERE seq > %(after)s AND seq <= %(end)s AND (%(since)s::timestamptz IS NULL OR created >= %(since)s)
        AND (%(until)s::timestamptz IS NULL OR created < %(until)s)
    ORDER BY seq LIMIT %(rows)s
) AS few
"""
# Each table has bounds of its own, so that PostgreSQL reads neither of them as a whole.
_EXPORTED: Final = """
SELECT account, source, received_at, signature, encode(payload_sha256, 'hex'), redacted, payload, i.seq
FROM inbox AS i JOIN payloads AS b USING (seq)
WHERE i.seq BETWEEN %(first)s AND %(last)s AND b.seq BETWEEN %(first)s AND %(last)s
    AND (%(since)s::timestamptz IS NULL OR created >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR created < %(until)s)
ORDER BY seq
"""
# The other contents come after the folded one.
_ALL_EXPORTED: Final = f"""
SELECT account, source, received_at, signature, sha256, redacted, payload FROM (
    SELECT account, source, received_at, signature, sha256, redacted, payload, seq, 0 AS place
    FROM ({_EXPORTED}) AS chosen (account, source, received_at, signature, sha256, redacted, payload, seq)
    UNION ALL
    SELECT account, r.source, r.received_at, r.signature, encode({inbox.BODY_SHA256}, 'hex'), r.redacted, r.payload,
        i.seq, 1
    FROM inbox AS i JOIN renderings AS r USING (account, livemode, id)
    WHERE i.seq BETWEEN %(first)s AND %(last)s AND r.payload IS NOT NULL
        AND (%(since)s::timestamptz IS NULL OR i.created >= %(since)s)
        AND (%(until)s::timestamptz IS NULL OR i.created < %(until)s)
) AS every ORDER BY seq, place, sha256
"""
