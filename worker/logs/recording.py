"""Records the events of a replay, has them folded, and counts their outcomes."""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import Engine

from schemas import database, inbox
from schemas.database import Cursor, integer_array
from schemas.events import Key
from schemas.inbox import Delivery, Receipt, Recorded
from worker.folding import parallel
from worker.folding.parallel import FoldProcess, FoldRequest, Start
from worker.logs.selection import Counts

OUTCOMES_READ: Final = 100_000
NEWER: Final = "newer"
MENDED: Final = "mended"


@dataclass(frozen=True, slots=True)
class Parked:
    """How many *events* are parked by one *cause*; the first of them is the *example*, which has this *reason*."""

    cause: str | None
    events: int
    example: str
    reason: str | None


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


class EventFolder:
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
            self._fold_process.start(_how_to_start())
            self._fold_process.begin(FoldRequest(now=self._now))

    @property
    def _has_partner(self) -> bool:
        return self._backlog is not None and self._recorded >= self._backlog

    def end(self) -> None:
        """Return once nothing is pending, of this recording or of any other."""
        if self._backlog is not None:
            partner = self._fold_process if self._has_partner else None
            parallel.fold(self._engine, now=self._now, partner=partner)

    def close(self) -> None:
        """End the process that folds, where there is one."""
        self._fold_process.close()


def _how_to_start() -> Start:
    """Return how another process starts: by a fork where that is safe, since it need not load all modules again."""
    return "fork" if database.may_fork() else "spawn"


class Recording:
    """Records deliveries, and has them folded."""

    def __init__(self, engine: Engine, now: datetime, folder: EventFolder) -> None:
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
