"""The one writer of the tables: takes what is pending, joins it with what is known, saves the difference.

Note [Folding one object is exclusive]
    Two workers may claim events of one object. Each takes an advisory lock on every object of its batch, in
    one order, and only then loads the rows, so that the second sees what the first saved. The locks end with
    the transaction.

Note [Changes come in commit order]
    A reader of ``changes`` keeps the last number it saw. Numbers are drawn before the commit, so a slower
    transaction could bring a smaller one to light later. Hence one lock, taken directly before the numbers
    are drawn and held to the commit that follows at once. What follows from the rows of several objects is looked
    for under that lock too: see Note [Whoever comes second sees the other].

Note [A row is found by its key, whatever the planner believes]
    A batch asks for some hundred rows of a table that grows while it is folded. Of a table that was small when it was
    last looked at, the planner would read all and hash it. A lateral subquery with an OFFSET is not merged into a
    join, so that each key is one probe of an index: what a batch costs does not depend on what is there already.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, cached_property
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
import structlog
from msgspec import Struct
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from schemas import database, inbox, tables
from schemas.database import Bounds, Cursor, boolean_array, integer_array, text_array
from schemas.errors import Archived, Transient
from schemas.inbox import Delivery
from worker import copying, correcting, folds, history, refunding, renderings, settling, stock
from worker.folds import join
from worker.folds.checkout_session import CORRECTED
from worker.folds.facts import Anomaly, Change, Event, Facts, Row, Subject, Value, utc
from worker.folds.join import Joined
from worker.refunding import Moved
from worker.renderings import Choice

FOLD_BATCH_MAX: Final = 500
"""Events folded in one transaction."""
LOOK_AHEAD_BATCHES: Final = 3
"""How many batches of what is pending a share looks through for its own; what others have at hand is among them."""
REFOLD_EVENTS_MAX: Final = 5000
"""Events of an older fold version that are queued at once."""
REASON_CHARACTERS_MAX: Final = 500

RETRY_SECONDS_MIN: Final = 1
RETRY_SECONDS_MAX: Final = 300
"""An event that failed alone, its data not at fault, is tried again after the first, then twice as late, up to this."""

_Object: TypeAlias = tuple[str, bool, str]
"""An object's id in its world."""
Apart: TypeAlias = deque[tuple[int, ...]]
"""Groups of pending events, by their numbers, that are to be folded apart since their batch failed."""

_log = structlog.get_logger()


class Claimed(Struct, frozen=True):
    """An event taken for folding; ``again`` where it had an outcome before, ``set_aside`` by an operator's word.

    ``attempts`` is how often it has failed alone since it became pending. Of an event of which copies say different
    things ``choice`` is what they come to. Where its outcome ``stands``, only copies came, and none was chosen.
    """

    event: Event
    again: bool
    set_aside: str | None
    attempts: int = 0
    choice: Choice | None = None
    stands: bool = False


class Share(NamedTuple):
    """One of *of* shares, among which the events are dealt by their object."""

    number: int
    of: int


class _Outcome(Struct):
    seq: int
    state: str
    reason: str | None
    cause: str | None
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an event could not be folded. It *is_of_data* where it would fail again, and so is parked."""

    cause: str
    reason: str
    is_of_data: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """Events of a batch, as they are *judged*: what they say, and the rows and *objects* to be folded again for it."""

    judged: Sequence[tuple[Claimed, folds.Verdict]]
    facts: dict[Subject, list[Facts]]
    anew: set[Subject]
    objects: set[_Object]

    @property
    def outcomes(self) -> list[_Outcome]:
        """What became of the events."""
        return [
            _Outcome(each.event.seq, verdict.state, shortened(verdict.reason), verdict.cause, each.attempts + 1)
            for each, verdict in self.judged
        ]


@dataclass
class _Saved:
    """What one batch of events, as they are *judged*, came to."""

    rows: dict[Subject, Joined]
    known: dict[Subject, Row]
    gone: list[Subject]
    judged: Sequence[tuple[Claimed, folds.Verdict]] = ()

    @cached_property
    def fresh(self) -> dict[_Object, str]:
        """The sources of the events that had no outcome before."""
        events = [each.event for each, _ in self.judged if not each.again]
        return {(event.account, event.livemode, event.id): event.source for event in events}


def run_once(
    engine: Engine,
    *,
    now: datetime,
    limit: int = FOLD_BATCH_MAX,
    share: Share | None = None,
    apart: Apart | None = None,
    bounds: Bounds | None = None,
) -> int:
    """Fold up to *limit* pending events, of one *share* or of all, in one transaction; return how many those were.

    A batch that fails is divided until the event at fault stands alone; that is parked where its data is at fault, and
    otherwise tried again later. The parts are kept in *apart* for the next calls, which take them first; without it
    they are folded before this returns.

    Raises:
        Transient: PostgreSQL does not answer, or has not given any event in time; nothing is lost.
    """
    parts: Apart = deque() if apart is None else apart
    folded = _run_batch(engine, parts, now=now, limit=limit, share=share, bounds=bounds)
    while apart is None and parts:
        folded += _run_batch(engine, parts, now=now, limit=limit, share=share, bounds=bounds)
    return folded


def run_one(engine: Engine, seq: int, *, now: datetime) -> int:
    """Fold the pending event *seq* by itself, due or not, and return whether it had been pending."""
    return _run_batch(engine, deque([(seq,)]), now=now, limit=1, share=None, bounds=None)


def _run_batch(
    engine: Engine,
    apart: Apart,
    *,
    now: datetime,
    limit: int,
    share: Share | None,
    bounds: Bounds | None,
    is_queued: bool = False,
) -> int:
    only = apart.popleft() if apart else None
    claimed: list[Claimed] = []
    owes = False
    compared: list[int] = []
    try:
        with database.transaction(engine, bounds) as connection, database.cursor(connection) as cursor:
            # What is queued is queued for good, though the batch may fail: it is committed by itself.
            queued = renderings.queue(cursor) if only is None and not is_queued else 0
            if not queued:
                claimed = claim(
                    cursor, limit=limit if only is None else len(only), only=only, share=share, compared=compared
                )
                owes = project(cursor, claimed, now=now) if claimed else bool(settling.owed(cursor))
    except Exception as error:
        failure = None if isinstance(error, Transient) or not (claimed or compared) else failure_of(error)
        if failure is None:
            if only is not None:
                apart.appendleft(only)
            raise
        if not claimed:
            return _divide_compared(engine, apart, compared, failure, bounds=bounds)
        return _divide(engine, apart, claimed, failure, now=now, bounds=bounds)
    if queued:
        return _run_batch(engine, apart, now=now, limit=limit, share=share, bounds=bounds, is_queued=True)
    if owes:
        _settle_owed(engine, now=now, bounds=bounds)
    return len(claimed)


def _divide(
    engine: Engine, apart: Apart, claimed: Sequence[Claimed], failure: Failure, *, now: datetime, bounds: Bounds | None
) -> int:
    """Put the halves of a batch that failed into *apart*; conclude what failed alone, and return how many that is."""
    if len(claimed) == 1:
        return _conclude_alone(engine, claimed[0], failure, now=now, bounds=bounds)
    seqs = tuple(each.event.seq for each in claimed)
    half = len(seqs) // 2
    apart.extendleft([seqs[half:], seqs[:half]])
    return 0


def _divide_compared(
    engine: Engine, apart: Apart, compared: Sequence[int], failure: Failure, *, bounds: Bounds | None
) -> int:
    """Divide events whose copies could not be compared, as ``_divide`` does; one alone is tried again later.

    It is never parked: what is not compared yet would be queued at once, to fail again.
    """
    if len(compared) > 1:
        half = len(compared) // 2
        apart.extendleft([tuple(compared[half:]), tuple(compared[:half])])
        return 0
    with database.transaction(engine, bounds) as connection, database.cursor(connection) as cursor:
        share_folding(cursor)
        cursor.execute("SELECT attempts FROM pending WHERE seq = ANY (%s) FOR UPDATE SKIP LOCKED", (list(compared),))
        for (attempts,) in cursor.fetchall():
            _postpone(cursor, compared[0], attempts, failure)
    _log.warning("event.postponed", seq=compared[0], cause=failure.cause, reason=failure.reason)
    return 1


def failure_of(error: Exception) -> Failure:
    """Return why the events failed that met *error*; PostgreSQL's own words could quote them, so none is kept."""
    if isinstance(error, Archived):
        return Failure("payload_archived", str(error), is_of_data=True)
    if isinstance(error, (DBAPIError, database.DriverError)):
        condition = database.condition(error)
        if database.is_fault_of_data(error):
            return Failure("row_refused", f"PostgreSQL refused its row: {condition}", is_of_data=True)
        cause = "database_busy" if database.is_busy(error) else "database_refused"
        return Failure(cause, f"PostgreSQL did not fold it: {condition}", is_of_data=False)
    if isinstance(error, (MemoryError, OSError)):
        return Failure("machine_short", f"this machine could not fold it: {type(error).__name__}", is_of_data=False)
    return Failure("fold_failed", f"the join failed with {type(error).__name__}", is_of_data=True)


def _conclude_alone(engine: Engine, claimed: Claimed, failure: Failure, *, now: datetime, bounds: Bounds | None) -> int:
    """Park the event, or let it be tried again later, unless it is no longer what was *claimed*; return how many.

    Another copy may have been chosen since, or another worker may have folded it: it is claimed again, and what is
    pending then is compared with what failed.
    """
    owes = False
    with database.transaction(engine, bounds) as connection, database.cursor(connection) as cursor:
        share_folding(cursor)
        cursor.execute("SAVEPOINT untouched")
        if claim(cursor, limit=1, only=(claimed.event.seq,)) != [claimed]:
            return 0
        if failure.is_of_data:
            owes = park(cursor, claimed, failure, now=now)
        else:
            # A choice of another copy stays with the fold that it is made for: the next try makes it again.
            cursor.execute("ROLLBACK TO SAVEPOINT untouched")
            _postpone(cursor, claimed.event.seq, claimed.attempts, failure)
    if owes:
        _settle_owed(engine, now=now, bounds=bounds)
    event = "event.parked" if failure.is_of_data else "event.postponed"
    _log.warning(event, event_id=claimed.event.id, cause=failure.cause, reason=failure.reason)
    return 1


def park(cursor: Cursor, claimed: Claimed, failure: Failure, *, now: datetime) -> bool:
    """Park the event: its data is at fault. The rows that it, or another copy of it, had made are folded without it.

    Returns whether rows that this may settle are held by others.
    """
    _note_contradictions(cursor, [claimed], now)
    outcome = _Outcome(claimed.event.seq, "parked", failure.reason, failure.cause, claimed.attempts + 1)
    _conclude(cursor, [outcome], now, folds.FOLD_VERSION)
    return claimed.again and _fold_without(cursor, claimed, now)


def _fold_without(cursor: Cursor, claimed: Claimed, now: datetime) -> bool:
    """Fold the rows that the parked event had made from what the others say; where that fails too, they stay."""
    part = replace(_part(cursor, [(claimed, folds.Verdict("parked"))]), judged=())
    is_history = claimed.choice is not None and claimed.choice.is_history
    try:
        with cursor.connection.transaction():
            _lock(cursor, part.anew, part.objects)
            return _project(cursor, part, now, folds.FOLD_VERSION, withheld="rendering" if is_history else None)
    except Exception as error:
        if isinstance(error, Transient) or not failure_of(error).is_of_data:
            raise
        _log.warning("event.rows_stay", event_id=claimed.event.id, reason=failure_of(error).reason)
        return False


def _postpone(cursor: Cursor, seq: int, attempts: int, failure: Failure) -> None:
    """Let the event *seq*, which has failed alone so many times before, be tried again later."""
    delay = min(RETRY_SECONDS_MAX, RETRY_SECONDS_MIN * 2 ** min(attempts, 16))
    cursor.execute(
        "UPDATE pending SET attempts = %s, due_at = now() + make_interval(secs => %s), cause = %s, reason = %s"
        " WHERE seq = %s",
        (min(attempts + 1, 32767), delay, failure.cause, failure.reason, seq),
    )


_ENVELOPE: Final = "i.seq, i.account, i.livemode, i.id, i.type, i.created, i.object_type, i.object_id, i.source"
# Nothing is asked for each event where no event at all is set aside, as is usual.
_SET_ASIDE: Final = """CASE WHEN (SELECT EXISTS (SELECT FROM inbox WHERE type = 'payfold.event.ignored')) THEN (
    SELECT a.seq FROM inbox AS a
    WHERE a.type = 'payfold.event.ignored'
        AND (a.account, a.livemode, a.object_id) = (i.account, i.livemode, i.id)
    ORDER BY a.seq LIMIT 1
) END"""


def share_folding(cursor: Cursor) -> None:
    """Wait for the one that keeps others from folding, and let none begin to until the transaction ends."""
    cursor.execute("SELECT pg_advisory_xact_lock_shared(hashtextextended(current_schema() || ' fold', 0))")


def keep_others_from_folding(cursor: Cursor) -> None:
    """Let nobody else fold until the transaction ends, as soon as those who do have ended theirs."""
    cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || ' fold', 0))")


def keep_others_from_appending(cursor: Cursor) -> None:
    """Let nobody else append to ``changes`` until the transaction ends."""
    cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || ' changes', 0))")


def claim(
    cursor: Cursor,
    *,
    limit: int,
    only: Sequence[int] | None = None,
    share: Share | None = None,
    though_renamed: bool = False,
    compared: list[int] | None = None,
) -> list[Claimed]:
    """Take up to *limit* pending events that are due, oldest first, that no other worker has taken.

    Of one *share* these are not all that are pending: see ``LOOK_AHEAD_BATCHES``. Of those numbered *only* each is
    taken, due or not. Those of an account that is being renamed are left to who renames it, *though_renamed*: see
    worker/renaming.py. *compared* gets the numbers of what was taken while copies are compared, and is empty after.
    """
    # A swap, and a snapshot to compare the tables in, hold the lock alone.
    share_folding(cursor)
    number, of = share or (None, None)
    cursor.execute(
        _CLAIM_ONLY if only is not None else _CLAIM if share is None else _CLAIM_SHARE,
        {
            "only": None if only is None else integer_array(only),
            "limit": limit,
            "number": number,
            "of": of,
            "near": limit * LOOK_AHEAD_BATCHES,
            "though_renamed": though_renamed,
        },
        binary=True,
    )
    rows = cursor.fetchall()
    underway = [] if compared is None else compared
    underway[:] = [row[0] for row in rows]
    choices = _choices(cursor, rows)
    underway.clear()
    _as_chosen(cursor, rows, choices)
    payloads = inbox.payloads_of(cursor, [seq for row in rows for seq in (row[0], row[10]) if seq is not None])
    # What is set aside is not read, and neither is that of which the outcome stands.
    standing = _standing(cursor, rows, choices)
    payloads = {row[0]: b"" for row in rows if row[10] is not None or row[0] in standing} | payloads
    archived = [row for row in rows if row[0] not in payloads]
    if archived:
        _leave(cursor, archived)
        if len(archived) == len(rows):
            return claim(cursor, limit=limit, only=only, share=share, though_renamed=though_renamed)
    return [
        Claimed(
            _event(row, payloads),
            row[9] or (row[0] in choices and choices[row[0]].is_other and choices[row[0]].state is not None),
            None if row[10] is None else reason_of(payloads.get(row[10])),
            row[11],
            choices.get(row[0]),
            row[0] in standing,
        )
        for row in rows
        if row[0] in payloads
    ]


def _choices(cursor: Cursor, rows: Sequence[Sequence[Any]]) -> dict[int, Choice]:
    """Return what the copies of each event come to; a first delivery has none that was looked for."""
    asked = [row[0] for row in rows if row[9] or row[12]]
    return renderings.examine(cursor, asked) if asked else {}


def _as_chosen(cursor: Cursor, rows: list[tuple[Any, ...]], choices: Mapping[int, Choice]) -> None:
    """Bring *rows* to what the inbox has now of the events of which another copy was chosen."""
    moved = [seq for seq, choice in choices.items() if choice.moved]
    if not moved:
        return
    cursor.execute(f"SELECT {_ENVELOPE} FROM inbox AS i WHERE seq = ANY (%s::bigint[])", (integer_array(moved),))
    found = {row[0]: row for row in cursor.fetchall()}
    rows[:] = [(*found.get(row[0], row[:9]), *row[9:]) for row in rows]


def _standing(cursor: Cursor, rows: Sequence[Sequence[Any]], choices: Mapping[int, Choice]) -> set[int]:
    """Return the events of which only copies came, and the outcome that they have stands."""
    asked = [row[0] for row in rows if row[12] and not row[9] and not (row[0] in choices and choices[row[0]].is_other)]
    if not asked:
        return set()
    cursor.execute("SELECT seq FROM outcomes WHERE seq = ANY (%s::bigint[])", (integer_array(asked),))
    return {seq for (seq,) in cursor.fetchall()}


# Nothing is asked for each event unless a rename goes on, which is seldom.
_SETTLED: Final = """
CASE WHEN %(though_renamed)s OR NOT (SELECT EXISTS (SELECT FROM account_names WHERE finished_at IS NULL)) THEN true
ELSE NOT EXISTS (
    SELECT FROM inbox AS i JOIN account_names AS n ON i.account IN (n.old, n.new)
    WHERE i.seq = pending.seq AND n.finished_at IS NULL
) END"""
# What waits to be tried again is stepped over.
_DUE: Final = f"(due_at IS NULL OR due_at <= now()) AND {_SETTLED}"
_TAKEN: Final = f"""
SELECT {_ENVELOPE}, taken.again, {_SET_ASIDE}, taken.attempts, taken.copies
FROM taken CROSS JOIN LATERAL (SELECT * FROM inbox WHERE inbox.seq = taken.seq OFFSET 0) AS i ORDER BY i.seq
"""
_CLAIM: Final = f"""
WITH taken AS MATERIALIZED (
    SELECT seq, again, attempts, copies FROM pending WHERE {_DUE} ORDER BY seq LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
{_TAKEN}
"""
_CLAIM_ONLY: Final = f"""
WITH taken AS MATERIALIZED (
    SELECT seq, again, attempts, copies FROM pending WHERE seq = ANY (%(only)s::bigint[]) AND {_SETTLED}
    ORDER BY seq LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
{_TAKEN}
"""
# Only what is near is looked at: where all that is pending is of one object, the other shares find that soon. What is
# found is locked one by one, until there is enough.
_CLAIM_SHARE: Final = f"""
WITH near AS MATERIALIZED (
    SELECT seq FROM pending WHERE {_DUE} ORDER BY seq LIMIT %(near)s
), own AS MATERIALIZED (
    SELECT i.* FROM near CROSS JOIN LATERAL (SELECT * FROM inbox WHERE inbox.seq = near.seq OFFSET 0) AS i
    WHERE mod(hashtext(concat(i.account, i.object_id)), %(of)s) IN (%(number)s, %(number)s - %(of)s)
), taken AS MATERIALIZED (
    SELECT o.*, p.again, p.attempts, p.copies
    FROM (SELECT * FROM own ORDER BY seq) AS o CROSS JOIN LATERAL (
        SELECT again, attempts, copies FROM pending WHERE pending.seq = o.seq FOR UPDATE SKIP LOCKED
    ) AS p
    LIMIT %(limit)s
)
SELECT {_ENVELOPE}, i.again, {_SET_ASIDE}, i.attempts, i.copies FROM taken AS i ORDER BY i.seq
"""


def _leave(cursor: Cursor, archived: Sequence[Sequence[Any]]) -> None:
    """Take events whose payloads are archived off what is pending: the outcome that each has stands."""
    seqs = [row[0] for row in archived]
    cursor.execute(
        "INSERT INTO outcomes (seq, state, reason, cause, attempts, folded_at, fold_version)"
        " SELECT seq, 'parked', 'its payload is archived', 'payload_archived', 1, now(), %s"
        " FROM unnest(%s::bigint[]) AS k (seq)"
        " ON CONFLICT (seq) DO NOTHING",
        (folds.FOLD_VERSION, seqs),
    )
    cursor.execute("DELETE FROM pending WHERE seq = ANY (%s)", (seqs,))
    for row in archived:
        _log.warning("event.archived", event_id=row[3], reason="it is not folded anew: its payload is archived")


def _event(row: Sequence[Any], payloads: Mapping[int, bytes]) -> Event:
    """Return the event of a row of ``_ENVELOPE``.

    Raises:
        Archived: when its payload is not at hand.
    """
    payload = payloads.get(row[0])
    if payload is None:
        raise Archived(
            f"The payload of {row[3]} is archived: "
            "`payfold rebuild --archive DIR --swap` folds its object from the archive."
        )
    return Event(*(*row[:8], payload, row[8]))


def event_of(delivery: Delivery) -> Event:
    """Return *delivery* as it would be claimed once it is recorded, but for its number."""
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


class _Ignored(Struct):
    reason: str | None = None


class _IgnoredData(Struct):
    object: _Ignored


class _IgnoredEvent(Struct):
    data: _IgnoredData


_decode_ignored = msgspec.json.Decoder(_IgnoredEvent).decode


def reason_of(observation: bytes | None) -> str:
    """Return why an operator ignores an event, by the *observation* that says so, None where that is archived.

    An observation of a replayed log may hold anything, and sets its event aside all the same.
    """
    try:
        reason = None if observation is None else _decode_ignored(observation).data.object.reason
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        reason = None
    # PostgreSQL's text holds any character but this one.
    kept = (reason or "").replace("\0", "")
    return f"set aside by an operator: {kept}" if kept else "set aside by an operator"


def project(
    cursor: Cursor, claimed: Sequence[Claimed], *, now: datetime, fold_version: int = folds.FOLD_VERSION
) -> bool:
    """Fold *claimed* into the tables, in the cursor's transaction; the caller commits at once.

    Returns whether rows that *claimed* may settle are held by others: none are while others are kept from folding.
    """
    if not claimed:
        return False
    _let_stand(cursor, [each for each in claimed if each.stands])
    part = _part(cursor, [(each, _judge(each)) for each in claimed if not each.stands])
    neighbours = history.neighbours(cursor, part.facts) if history.is_at_hand(cursor, fold_version) else None
    _lock(cursor, part.facts.keys() | part.anew | (neighbours or set()), part.objects)
    past, news = (None, part) if neighbours is None else _divided(cursor, part, neighbours, fold_version)
    owes = past is not None and _project(cursor, past, now, fold_version, withheld="fold_version")
    owes |= news is not None and _project(cursor, news, now, fold_version)
    _note_contradictions(cursor, claimed, now)
    return owes


def _project(cursor: Cursor, part: _Part, now: datetime, fold_version: int, *, withheld: str | None = None) -> bool:
    """Fold *part*, of which the objects are locked; its changes are kept from the feed where they are *withheld*.

    Returns whether rows that it may settle are held by others.
    """
    events = [each.event for each, _ in part.judged]
    anew = part.anew | _rows_of(cursor, part.objects)
    _mention(cursor, events, part.facts)
    saved = _join(cursor, part.facts, anew)
    saved.judged = part.judged
    left_open = settling.open_rows(saved.rows)
    for subject in left_open:
        del saved.rows[subject]
    _save(cursor, saved)
    _note_anomalies(cursor, saved, now)
    _conclude(cursor, part.outcomes, now, fold_version)
    _set_aside(cursor, [event for event in events if event.type == folds.EVENT_IGNORED])
    reasons = _Reasons(part, withheld)
    owes = _settle(cursor, saved, left_open, reasons, now)
    _append_changes(cursor, saved, reasons)
    return owes


def _part(cursor: Cursor, judged: Sequence[tuple[Claimed, folds.Verdict]]) -> _Part:
    """Return *judged* with what it says, and what is to be folded again for it."""
    facts: dict[Subject, list[Facts]] = defaultdict(list)
    anew: set[Subject] = set()
    for each, verdict in judged:
        for one in verdict.facts:
            facts[one.subject].append(one)
        if each.again:
            anew |= _rows_before(each).union(one.subject for one in verdict.facts)
    again = [event for each, _ in judged if each.again for event in _every_copy(each)]
    return _Part(judged, facts, anew, _objects_of(cursor, again))


def _divided(
    cursor: Cursor, part: _Part, neighbours: set[Subject], fold_version: int
) -> tuple[_Part | None, _Part | None]:
    """Return of *part* what an older fold version had folded, and what is new, each None where it is nothing.

    To the first belong all rows that the second may touch, or find with its own, and that are not folded again yet.
    """
    again = [each.event.seq for each, _ in part.judged if each.again and each.set_aside is None]
    outdated = history.outdated(cursor, again, fold_version)
    if len(outdated) == len(part.judged):
        return part, None
    past, news = (
        _part(cursor, [each for each in part.judged if (each[0].event.seq in outdated) is is_past])
        for is_past in (True, False)
    )
    touched = news.facts.keys() | news.anew | neighbours
    objects = history.objects(cursor, {_object_of(subject) for subject in touched}, fold_version)
    if not outdated and not objects:
        return None, news
    waiting = {subject for subject in touched if _object_of(subject) in objects}
    return replace(past, anew=past.anew | waiting, objects=past.objects | objects), news


class _Reasons:
    """Why changes are not in the feed: all of a part that is *withheld*, and those by copies of what was known."""

    def __init__(self, part: _Part, withheld: str | None) -> None:
        self.of_all = withheld
        history = [each for each, _ in part.judged if each.choice is not None and each.choice.is_history]
        self._events = {(each.event.account, each.event.livemode, each.event.id) for each in history}
        self._objects = {_object_of(subject) for each in history for subject in _rows_before(each)}
        for subject, several in part.facts.items() if history else ():
            if any(_by(one) not in self._events for one in several):
                self._objects.discard(_object_of(subject))
            else:
                self._objects.add(_object_of(subject))

    @property
    def is_one(self) -> bool:
        """Whether there is one reason, or none, for all changes."""
        return not self._events and not self._objects

    def of(self, subject: Subject, joined: Joined | None) -> str | None:
        """Return why changes of the row *joined* of *subject*, or of one that is gone, are withheld; None for news."""
        if self.is_one:
            return self.of_all
        by = None if joined is None else joined.decided_by
        is_by_history = by is not None and (subject.account, subject.livemode, by.event_id) in self._events
        is_history = is_by_history or _object_of(subject) in self._objects
        return self.of_all or ("rendering" if is_history else None)


_NOTHING: Final = _Part((), {}, set(), set())
NEWS: Final = _Reasons(_NOTHING, None)
"""Nothing is withheld."""


def _settle(cursor: Cursor, saved: _Saved, left_open: dict[Subject, Joined], reasons: _Reasons, now: datetime) -> bool:
    """Save the rows *left_open*, and those at rest that what is *saved* may settle, as other objects settle them.

    Returns whether there are some at rest that others hold, which are owed then: see Note [The lock of an order at rest
    is only tried].
    """
    ways = settling.moved(saved.rows, saved.known, saved.gone)
    if not left_open and not any(ways):
        return False
    keep_others_from_appending(cursor)
    own = left_open.keys() | saved.rows.keys() | set(saved.gone)
    found = [subject for subject in settling.found_by(cursor, ways) if subject not in own]
    held = _try_locks(cursor, found)
    why = {reasons.of(subject, joined) for subject, joined in saved.rows.items() if subject.table in settling.MOVING}
    _save_settled(cursor, saved, left_open, held, now)
    passed = [subject for subject in found if subject not in held]
    settling.owe(cursor, passed, why.pop() if len(why) == 1 else None)
    return bool(passed)


def _save_settled(
    cursor: Cursor, saved: _Saved, left_open: dict[Subject, Joined], at_rest: Collection[Subject], now: datetime
) -> None:
    """Settle the rows *left_open*, which were joined, and those *at_rest*, and add them to what is *saved*.

    The caller holds the locks of their objects, and keeps others from appending.
    """
    resting = settling.at_rest(cursor, at_rest) | _notes_at_rest(cursor, at_rest)
    rows = settling.settled(cursor, {**left_open, **{subject: own for subject, (_, own) in resting.items()}})
    saved.known |= {subject: row for subject, (row, _) in resting.items()}
    if rows:
        _save(cursor, settled := _Saved(rows, saved.known, []))
        _note_anomalies(cursor, settled, now)
        saved.rows |= rows


def _notes_at_rest(cursor: Cursor, subjects: Iterable[Subject]) -> dict[Subject, tuple[Row, Joined]]:
    """Return those of *subjects* that are notes at rest and still open: each row, and what its own events alone make.

    What the row was before a refund is in its events alone, so a note with archived ones stays as it is.
    """
    known = load(cursor, [subject for subject in subjects if subject.table == "credit_notes"])
    facts = facts_at_hand(cursor, set(known))
    own = {subject: join.fold_all(folds.SHAPES[subject.table], several or ()) for subject, several in facts}
    joined = {subject: each for subject, each in own.items() if each is not None}
    return {subject: (known[subject], each) for subject, each in settling.open_rows(joined).items()}


def _settle_owed(engine: Engine, *, now: datetime, bounds: Bounds | None) -> None:
    """Settle orders and notes that others held while what settles them moved, once those are done with them."""
    try:
        with database.transaction(engine, bounds) as connection, database.cursor(connection) as cursor:
            share_folding(cursor)
            subjects = settling.owed(cursor)
            _lock(cursor, subjects, ())
            keep_others_from_appending(cursor)
            for withheld, some in settling.take_owed(cursor, subjects).items():
                _save_settled(cursor, saved := _Saved({}, {}, []), {}, some, now)
                _append_changes(cursor, saved, _Reasons(_NOTHING, withheld))
    except (DBAPIError, database.DriverError) as error:
        if not database.is_busy(error):
            raise
        # They are owed still, and a later turn settles them.
        _log.warning("orders.unsettled", condition=database.condition(error))


def settle_all(cursor: Cursor, *, now: datetime, account: str | None = None) -> None:
    """Settle all orders and notes at rest, or those of one *account*, while no one else folds or sees them."""
    for page in settling.pages(cursor, account):
        keep_others_from_appending(cursor)
        notes = load(cursor, [subject for subject in page if subject.table == "credit_notes"])
        as_they_are = {subject: settling.note_as_it_is(row) for subject, row in notes.items()}
        orders = [subject for subject in page if subject.table == "orders"]
        _save_settled(cursor, saved := _Saved({}, dict(notes), []), as_they_are, orders, now)
        _append_changes(cursor, saved, NEWS)


def _object_of(subject: Subject) -> _Object:
    return (subject.account, subject.livemode, subject.source)


def _by(one: Facts) -> _Object:
    """Return the event that *one* is said by."""
    return (one.subject.account, one.subject.livemode, one.event_id)


def _let_stand(cursor: Cursor, standing: Sequence[Claimed]) -> None:
    """Take events off what is pending, whose copies were compared and change nothing.

    Where one says something else, its event counts as folded once more, which a rebuild catches up with.
    """
    if not standing:
        return
    more = [each.event.seq for each in standing if each.choice is not None and each.choice.is_more]
    cursor.execute(
        "UPDATE outcomes SET attempts = least(attempts::integer + 1, 32767) WHERE seq = ANY (%s::bigint[])",
        (integer_array(more),),
    )
    seqs = integer_array(each.event.seq for each in standing)
    cursor.execute("DELETE FROM pending WHERE seq = ANY (%s::bigint[])", (seqs,))


def _every_copy(claimed: Claimed) -> list[Event]:
    """Return the event with all that its copies say instead."""
    return [claimed.event, *(copy.event for copy in (claimed.choice.kept if claimed.choice else ()))]


def _rows_before(claimed: Claimed) -> set[Subject]:
    """Return the rows that the event, or another copy of it, may have made before."""
    found = {subject for event in _every_copy(claimed) for subject in _own_subjects(event)}
    kept = claimed.choice.kept if claimed.choice else ()
    return found | {one.subject for copy in kept for one in copy.verdict.facts}


def shortened(reason: str | None) -> str | None:
    """Return *reason* as it is kept."""
    return reason[:REASON_CHARACTERS_MAX] if reason else None


def _judge(claimed: Claimed) -> folds.Verdict:
    if claimed.set_aside is not None:
        return folds.set_aside(claimed.set_aside)
    return folds.judge(claimed.event)


def _own_subjects(event: Event) -> list[Subject]:
    """Return the rows that *event* may have made before, whatever it says now."""
    if event.object_type is None or event.object_id is None:
        return []
    names = folds.TABLES_OF_OBJECT.get(event.object_type, ())
    return [Subject(table, event.account, event.livemode, event.object_id) for table in names]


def _objects_of(cursor: Cursor, events: Sequence[Event]) -> set[_Object]:
    """Return the customers and notes that *events* may have told of before: their own, or those of a transaction."""
    found = {
        (event.account, event.livemode, event.object_id)
        for event in events
        if event.object_type in ("customer", "credit_note") and event.object_id is not None
    }
    seqs = [event.seq for event in events if event.object_type == "customer_balance_transaction"]
    if seqs:
        # Seldom asked, so that no index by number is kept for it.
        cursor.execute("SELECT account, livemode, object_id FROM mentions WHERE seq = ANY (%s)", (seqs,))
        found.update(cursor.fetchall())
    return found


def _rows_of(cursor: Cursor, objects: set[_Object]) -> set[Subject]:
    """Return the rows at rest that are folded from the events of *objects*, which are customers, notes and invoices."""
    if not objects:
        return set()
    accounts, modes, keys = map(list, zip(*objects, strict=True))
    cursor.execute(_OTHER_ROWS, {"accounts": accounts, "modes": modes, "keys": keys})
    return {Subject(*row) for row in cursor.fetchall()}


_OTHER_ROWS: Final = """
WITH k AS (
    SELECT * FROM unnest(%(accounts)s::text[], %(modes)s::boolean[], %(keys)s::text[]) AS k (account, livemode, key)
)
SELECT 'balances', k.account, k.livemode, customer, '', currency
FROM k JOIN balances AS t ON (t.account, t.livemode, t.customer) = (k.account, k.livemode, k.key)
UNION ALL
SELECT 'credit_note_lines', k.account, k.livemode, t.id, t.credit_note, ''
FROM k JOIN credit_note_lines AS t ON (t.account, t.livemode, t.credit_note) = (k.account, k.livemode, k.key)
UNION ALL
SELECT 'invoice_payments', k.account, k.livemode, t.id, '', ''
FROM k JOIN invoice_payments AS t ON (t.account, t.livemode, t.id) = (k.account, k.livemode, k.key)
UNION ALL
SELECT 'credit_notes', k.account, k.livemode, t.id, '', ''
FROM k JOIN credit_notes AS t ON (t.account, t.livemode, t.id) = (k.account, k.livemode, k.key)
"""


def _lock_key(subject: Subject) -> str:
    # By the object whose events they come from, so that a row and its children are one.
    return f"{subject.account} {subject.livemode} {subject.source}"


def _try_locks(cursor: Cursor, subjects: Sequence[Subject]) -> set[Subject]:
    """Return those of *subjects* that no one else holds, and hold them until the transaction ends."""
    if not subjects:
        return set()
    cursor.execute(
        "SELECT pg_try_advisory_xact_lock(hashtextextended(current_schema() || key, 0))"
        " FROM unnest(%s::text[]) WITH ORDINALITY AS k (key, number) ORDER BY number",
        (text_array([_lock_key(each) for each in subjects]),),
    )
    return {subject for subject, (is_held,) in zip(subjects, cursor.fetchall(), strict=True) if is_held}


def _lock(cursor: Cursor, subjects: Iterable[Subject], objects: Iterable[_Object]) -> None:
    keys = {_lock_key(each) for each in subjects}
    keys |= {f"{account} {livemode} {id_}" for account, livemode, id_ in objects}
    cursor.execute(
        """
        SELECT pg_advisory_xact_lock(number) FROM (
            SELECT DISTINCT hashtextextended(current_schema() || key, 0) AS number FROM unnest(%s::text[]) AS key
            ORDER BY number
        ) AS sorted
        """,
        (text_array([*keys]),),
    )


def _mention(cursor: Cursor, events: Sequence[Event], facts: dict[Subject, list[Facts]]) -> None:
    """Note which events speak of another object's rows, so that those rows can be folded from all that is said."""
    by_id = {(event.account, event.livemode, event.id): event for event in events}
    found = {
        (event.account, event.livemode, subject.source, event.seq)
        for subject, ones in facts.items()
        for one in ones
        if (event := by_id.get(_by(one))) is not None and event.object_id != subject.source
    }
    if found:
        cursor.execute(
            "INSERT INTO mentions (account, livemode, object_id, seq)"
            " SELECT * FROM unnest(%s::text[], %s::boolean[], %s::text[], %s::bigint[]) ON CONFLICT DO NOTHING",
            (
                text_array([account for account, _, _, _ in found]),
                boolean_array(livemode for _, livemode, _, _ in found),
                text_array([source for _, _, source, _ in found]),
                integer_array(seq for _, _, _, seq in found),
            ),
        )


def _join(cursor: Cursor, facts: dict[Subject, list[Facts]], anew: set[Subject]) -> _Saved:
    known = load(cursor, facts.keys() | anew)
    joined: dict[Subject, Joined] = {}
    led = _led_rows(cursor, facts.keys() - anew)
    # A doubt is for all the events of the object to decide, which all of its rows share.
    refold = anew | _in_doubt(cursor, (known.keys() - anew) | led)
    for subject in facts.keys() - refold:
        shape, row = folds.SHAPES[subject.table], known.get(subject)
        if row is not None and settling.is_laid_on(subject, row):
            refold.add(subject)
            continue
        # An object without a row has no folded events, so that this batch has all of them; unless others speak of it.
        leader = join.leader_of(shape, subject)
        is_new = row is None and (shape.keeps_all if leader is None else leader not in known)
        result = join.fold_all(shape, join.with_leader(shape, subject, facts)) if is_new else None
        result = join.advance(shape, row, facts[subject]) if row is not None else result
        if result is None:
            refold.add(subject)
        else:
            joined[subject] = result
    refold |= {each for each in led if join.leader_of(folds.SHAPES[each.table], each) in refold}
    known |= load(cursor, refold - facts.keys() - anew)
    gone = []
    for subject, all_facts in facts_of(cursor, refold, facts).items():
        result = join.fold_all(folds.SHAPES[subject.table], all_facts)
        if result is not None:
            joined[subject] = result
        elif subject in known:
            gone.append(subject)
    return _Saved(joined, known, gone)


def _in_doubt(cursor: Cursor, at_rest: Collection[Subject]) -> set[Subject]:
    """Return those of the rows *at_rest* whose order is noted as ambiguous, and the rows that order them."""
    if not at_rest:
        return set()
    named = {_named(subject): subject for subject in at_rest}
    cursor.execute(
        """
        SELECT a.account, a.livemode, a.subject, a.subject_id
        FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, subject_id)
        CROSS JOIN LATERAL (
            SELECT * FROM anomalies AS a WHERE a.resolved_at IS NULL AND a.kind = %s
                AND (a.account, a.livemode, a.subject_id) = (k.account, k.livemode, k.subject_id) OFFSET 0
        ) AS a
        """,
        (*_world_arrays([*named.values()]), text_array([name for *_, name in named]), join.AMBIGUOUS_ORDER),
    )
    found = {named[row] for row in cursor.fetchall() if row in named}
    leaders = {join.leader_of(folds.SHAPES[each.table], each) for each in found}
    return found.union(each for each in leaders if each is not None)


def _led_rows(cursor: Cursor, subjects: Iterable[Subject]) -> set[Subject]:
    """Return the rows at rest that share the order of one of *subjects*, and so change with it."""
    leaders = {shape.leader for shape in folds.SHAPES.values() if shape.leader}
    found = {(each.account, each.livemode, each.id) for each in subjects if each.table in leaders}
    return {each for each in _rows_of(cursor, found) if folds.SHAPES[each.table].leader}


def load(cursor: Cursor, subjects: Iterable[Subject]) -> dict[Subject, Row]:
    """Return the rows at rest, without those that are not there."""
    found: dict[Subject, Row] = {}
    for table, keys in _by_table(subjects).items():
        names = _key_names(table)
        wanted = {(key.account, key.livemode, *key.key): key for key in keys}
        with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
            rows.execute(_rows_by_key(table), _key_arrays(keys))
            for row in rows:
                found[wanted[tuple(row[name] for name in names)]] = row
    return found


@cache
def _rows_by_key(table: str) -> bytes:
    names = _key_names(table)
    statement = sql.SQL(
        "SELECT t.* FROM {keys} CROSS JOIN LATERAL (SELECT * FROM {table} AS t WHERE {same} OFFSET 0) AS t"
    )
    return statement.format(keys=_key_rows(names), table=sql.Identifier(table), same=_same(names)).as_bytes()


def _key_names(table: str) -> tuple[str, ...]:
    return ("account", "livemode", *folds.SHAPES[table].key)


def _key_arrays(keys: Sequence[Subject]) -> list[str]:
    """Return the values of *keys*, an array for each column."""
    columns = zip(*(key.key for key in keys), strict=True)
    return [*_world_arrays(keys), *map(text_array, columns)]


def _world_arrays(keys: Sequence[Subject]) -> tuple[str, str]:
    return text_array([key.account for key in keys]), boolean_array(key.livemode for key in keys)


def _key_rows(names: Sequence[str]) -> sql.Composed:
    """Return keys given as arrays, as rows that can be joined with."""
    arrays = sql.SQL(", ").join(sql.SQL("%s::boolean[]" if name == "livemode" else "%s::text[]") for name in names)
    return sql.SQL("unnest({arrays}) AS k ({names})").format(arrays=arrays, names=_listed(names))


def _listed(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _by_table(subjects: Iterable[Subject]) -> dict[str, list[Subject]]:
    grouped: dict[str, list[Subject]] = defaultdict(list)
    for subject in subjects:
        grouped[subject.table].append(subject)
    return grouped


def facts_of(
    cursor: Cursor, subjects: set[Subject], at_hand: dict[Subject, list[Facts]], *, with_pending: bool = False
) -> dict[Subject, list[Facts]]:
    """Return all that the inbox says of *subjects* and of what orders them, but for what is not or no longer folded.

    Of what is to be folded that counts of which the facts are *at_hand*, or all *with_pending*.
    """
    found: dict[Subject, list[Facts]] = {subject: [] for subject in subjects}
    if not subjects:
        return found
    judged = [one for several in at_hand.values() for one in several]
    led: dict[Subject | None, list[Subject]] = defaultdict(list)
    for subject in subjects:
        led[join.leader_of(folds.SHAPES[subject.table], subject)].append(subject)
    cursor.execute(
        f"""
        WITH k AS (
            SELECT DISTINCT * FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, object_id)
        ), wanted AS (
            SELECT i.seq FROM k JOIN inbox AS i USING (account, livemode, object_id)
            UNION
            SELECT m.seq FROM k JOIN mentions AS m USING (account, livemode, object_id)
        )
        SELECT {_ENVELOPE}
        FROM wanted JOIN inbox AS i USING (seq) LEFT JOIN outcomes AS o USING (seq)
        WHERE {_SET_ASIDE} IS NULL AND (
            coalesce(o.state, %s) <> 'parked' OR (i.account, i.livemode, i.id) IN (
                SELECT * FROM unnest(%s::text[], %s::boolean[], %s::text[])
            )
        )
        """,
        (
            *_world_arrays(keys := list(subjects)),
            text_array([key.source for key in keys]),
            "pending" if with_pending else "parked",
            # What is new, and what was parked and may fold now: the batch has judged it already.
            *_world_arrays([one.subject for one in judged]),
            text_array([one.event_id for one in judged]),
        ),
        binary=True,
    )
    rows = cursor.fetchall()
    payloads = inbox.payloads_of(cursor, [row[0] for row in rows])
    for row in rows:
        for one in folds.judge(_event(row, payloads)).facts:
            if one.subject in found:
                found[one.subject].append(one)
            for subject in led.get(one.subject, ()):
                found[subject].append(one)
    return found


def facts_at_hand(cursor: Cursor, subjects: set[Subject]) -> Iterator[tuple[Subject, list[Facts] | None]]:
    """Yield all that the inbox says of each of *subjects*, None where a payload of it is archived."""
    try:
        yield from facts_of(cursor, subjects, {}).items()
    except Archived:
        if len(subjects) > 1:
            for subject in subjects:
                yield from facts_at_hand(cursor, {subject})
        else:
            yield from ((subject, None) for subject in subjects)


def _save(cursor: Cursor, saved: _Saved) -> None:
    moved: dict[str, list[Row]] = defaultdict(list)
    new: dict[str, list[Row]] = defaultdict(list)
    for subject, joined in saved.rows.items():
        known = saved.known.get(subject)
        # What has no row is locked and not there, so it is appended; what has one is merged.
        if known is None:
            new[subject.table].append(joined.row)
        elif joined.row != known:
            moved[subject.table].append(joined.row)
        if joined.children:
            moved[folds.SHAPES[subject.table].child] += joined.children
    _drop_strayed_children(cursor, saved)
    for table, rows in new.items():
        form = _FORMS[table]
        copying.into(cursor, sql.Identifier(table), form.columns, map(form.line, rows))
    for table, rows in moved.items():
        # Two objects that claim one child would otherwise stop the batch; Stripe's ids are one object's.
        distinct = {_identity(table, row): row for row in rows}
        cursor.execute(_merge(table), (msgspec.json.encode(list(distinct.values())).decode(),))
    for table, keys in _by_table(saved.gone).items():
        names = _key_names(table)
        cursor.execute(
            sql.SQL("DELETE FROM {table} AS t USING {keys} WHERE {same}").format(
                table=sql.Identifier(table), keys=_key_rows(names), same=_same(names)
            ),
            _key_arrays(keys),
        )


_FORMS: Final = {table.name: copying.Form(table) for table in tables.PROJECTIONS}


def _drop_strayed_children(cursor: Cursor, saved: _Saved) -> None:
    """Delete the children of rows that are gone, or have other ones now, which are no longer theirs."""
    whole = [subject for subject, joined in saved.rows.items() if joined.replace_all and subject in saved.known]
    for table, keys in _by_table([*whole, *saved.gone]).items():
        shape = folds.SHAPES[table]
        if shape.child:
            names = _key_names(table)
            child_names = ("account", "livemode", *shape.child_key)
            kept = [str(child["id"]) for key in keys if key in saved.rows for child in saved.rows[key].children]
            cursor.execute(
                sql.SQL("DELETE FROM {table} AS t USING {keys} WHERE {same} AND NOT (t.id = ANY (%s::text[]))").format(
                    table=sql.Identifier(shape.child), keys=_key_rows(names), same=_same(names, child_names)
                ),
                [*_key_arrays(keys), text_array(kept)],
            )


def _same(names: Sequence[str], of_table: Sequence[str] = ()) -> sql.Composed:
    """Return the condition that a row's key is one of those given, where the table may name its columns otherwise."""
    pairs = zip(of_table or names, names, strict=True)
    return sql.SQL(" AND ").join(sql.SQL("t.{} = k.{}").format(*map(sql.Identifier, pair)) for pair in pairs)


def _identity(table: str, row: Row) -> tuple[Value, ...]:
    return tuple(row[column.name] for column in tables.metadata.tables[table].primary_key)


@cache
def _merge(table: str) -> bytes:
    columns = tables.metadata.tables[table].columns
    values = [column.name for column in columns if not column.primary_key]
    return (
        sql.SQL(
            "INSERT INTO {table} SELECT * FROM json_populate_recordset(NULL::{table}, %s)"
            " ON CONFLICT ({key}) DO UPDATE SET ({columns}) = ROW ({values})"
        )
        .format(
            table=sql.Identifier(table),
            key=_listed([column.name for column in columns if column.primary_key]),
            columns=_listed(values),
            values=sql.SQL(", ").join(sql.Identifier("excluded", name) for name in values),
        )
        .as_bytes()
    )


def _conclude(cursor: Cursor, outcomes: Sequence[_Outcome], now: datetime, fold_version: int) -> None:
    """Write what became of the events and take them off what is pending."""
    seqs = integer_array(outcome.seq for outcome in outcomes)
    cursor.execute(
        """
        INSERT INTO outcomes AS known (seq, state, reason, cause, attempts, folded_at, fold_version)
        SELECT seq, state, nullif(reason, ''), nullif(cause, ''), attempts, %s, %s
        FROM unnest(%s::bigint[], %s::text[], %s::text[], %s::text[], %s::integer[])
            AS t (seq, state, reason, cause, attempts)
        ON CONFLICT (seq) DO UPDATE SET
            state = excluded.state, reason = excluded.reason, cause = excluded.cause,
            attempts = least(known.attempts::integer + excluded.attempts, 32767),
            folded_at = excluded.folded_at, fold_version = excluded.fold_version
        """,
        (
            now,
            fold_version,
            seqs,
            text_array([outcome.state for outcome in outcomes]),
            text_array([outcome.reason or "" for outcome in outcomes]),
            text_array([outcome.cause or "" for outcome in outcomes]),
            integer_array(min(outcome.attempts, 32767) for outcome in outcomes),
        ),
    )
    cursor.execute("DELETE FROM pending WHERE seq = ANY(%s::bigint[])", (seqs,))


def _set_aside(cursor: Cursor, words: Sequence[Event]) -> None:
    """Queue the events that an operator has set aside, so that they and their rows are judged anew."""
    for word in words:
        cursor.execute(
            """
            INSERT INTO pending (seq, again) SELECT seq, true FROM inbox WHERE (account, livemode, id) = (%s, %s, %s)
            ON CONFLICT (seq) DO UPDATE SET
                again = true, attempts = 0, due_at = NULL, cause = NULL, reason = NULL
            """,
            (word.account, word.livemode, word.object_id),
        )


def _note_anomalies(cursor: Cursor, saved: _Saved, now: datetime) -> None:
    """Write which anomalies of the rows that were folded are in force now, and which are over."""
    found = [row for subject, joined in saved.rows.items() for row in anomaly_rows(subject, joined, now)]
    # Of what had no row before none is in force.
    touched = {_named(subject): subject for subject in (*saved.rows, *saved.gone) if subject in saved.known}
    if not touched:
        _write_anomalies(cursor, found, (), now)
        return
    cursor.execute(
        """
        SELECT a.account, a.livemode, a.subject, a.subject_id, a.id, a.kind
        FROM (SELECT DISTINCT * FROM unnest(%s::text[], %s::boolean[], %s::text[])) AS k (account, livemode, subject_id)
        JOIN anomalies AS a USING (account, livemode, subject_id) WHERE a.resolved_at IS NULL
        """,
        (*_world_arrays([*touched.values()]), text_array([subject_id for *_, subject_id in touched])),
    )
    in_force = cursor.fetchall()
    held = {(row["account"], row["livemode"], row["id"]) for row in found}
    over = [
        (account, livemode, anomaly)
        for account, livemode, subject, subject_id, anomaly, kind in in_force
        if (row := touched.get((account, livemode, subject, subject_id))) is not None
        and (account, livemode, anomaly) not in held
        # A row that was only advanced does not show what only all its events show.
        and not (row in saved.rows and _keeps(saved.rows[row], kind))
    ]
    _write_anomalies(cursor, found, over, now)


def _write_anomalies(
    cursor: Cursor, found: Sequence[Mapping[str, Any]], over: Sequence[tuple[str, bool, str]], now: datetime
) -> None:
    """Put in force what was *found*, and resolve what is *over*: account, mode and id of anomalies."""
    if over:
        cursor.execute(
            """
            UPDATE anomalies SET resolved_at = %s WHERE (account, livemode, id) IN
                (SELECT * FROM unnest(%s::text[], %s::boolean[], %s::text[]))
            """,
            (now, *map(list, zip(*over, strict=True))),
        )
    if found:
        cursor.execute(
            """
            INSERT INTO anomalies SELECT * FROM json_populate_recordset(NULL::anomalies, %s)
            ON CONFLICT (account, livemode, id) DO UPDATE SET resolved_at = NULL, detail = excluded.detail
            """,
            (msgspec.json.encode(found).decode(),),
        )


def _keeps(joined: Joined, kind: str) -> bool:
    """Return whether an anomaly of *kind* may be in force though *joined*, of which not all events were read, has none.

    What is at rest is in the doubt in which its last event left it.
    """
    is_of_order = kind == join.AMBIGUOUS_ORDER and joined.is_at_rest
    return not joined.is_whole and (kind in join.SEEN_IN_ALL or is_of_order)


def _note_contradictions(cursor: Cursor, claimed: Sequence[Claimed], now: datetime) -> None:
    """Write which anomalies are in force of the events of which copies were compared."""
    choices = [each.choice for each in claimed if each.choice is not None]
    if not choices:
        return
    found = [row for choice in choices for row in contradictions(choice, now)]
    events = [choice.chosen.event for choice in choices]
    cursor.execute(
        """
        SELECT a.account, a.livemode, a.id
        FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, subject_id)
        JOIN anomalies AS a USING (account, livemode, subject_id) WHERE a.resolved_at IS NULL AND a.subject = 'event'
        """,
        (
            text_array([event.account for event in events]),
            boolean_array(event.livemode for event in events),
            text_array([event.id for event in events]),
        ),
    )
    held = {(row["account"], row["livemode"], row["id"]) for row in found}
    _write_anomalies(cursor, found, [row for row in cursor.fetchall() if row not in held], now)


def contradictions(choice: Choice, now: datetime) -> list[dict[str, Any]]:
    """Return the rows by which the table shows that copies of one event contradict each other."""
    event = choice.chosen.event
    return [
        {
            **_identified("events", event.id, anomaly, by=renderings.NAMED_BY),
            "account": event.account,
            "livemode": event.livemode,
            "subject": "event",
            "object_id": event.object_id,
            "event_id": event.id,
            "as_of": event.created,
            "seen_at": now,
            "resolved_at": None,
        }
        for anomaly in choice.anomalies
    ]


def _identified(table: str, name: str, anomaly: Anomaly, *, by: Collection[str] | None = None) -> dict[str, Any]:
    """Return what tells an anomaly of what is called *name* from all others: its detail, or what that has *by* name."""
    detail = {key: value for key, value in anomaly.detail.items() if by is None or key in by}
    identity = msgspec.json.encode([table, name, anomaly.kind, detail], order="sorted")
    return {
        "id": f"anm_{hashlib.blake2b(identity, digest_size=12).hexdigest()}",
        "kind": anomaly.kind,
        "subject_id": name,
        "detail": anomaly.detail,
    }


def _named(subject: Subject) -> tuple[str, bool, str, str]:
    """Return what names the row of *subject* where rows of all tables stand together."""
    return (subject.account, subject.livemode, folds.SHAPES[subject.table].subject, tables.key_name(subject.key))


def anomaly_rows(subject: Subject, joined: Joined, now: datetime) -> list[dict[str, Any]]:
    """Return the rows by which the table tells what is wrong with a row; *now* is when that was seen."""
    if not joined.anomalies:
        return []
    rows = [_anomaly_row(subject, joined.row, anomaly, now) for anomaly in joined.anomalies]
    # The same may be wrong twice, as a ledger's chain may be broken by the same amount in two places.
    return list({row["id"]: row for row in rows}.values())


def _anomaly_row(subject: Subject, row: Row, anomaly: Anomaly, now: datetime) -> dict[str, Any]:
    return {
        **_identified(subject.table, tables.key_name(subject.key), anomaly),
        "account": subject.account,
        "livemode": subject.livemode,
        "subject": folds.SHAPES[subject.table].subject,
        "object_id": subject.source,
        "event_id": row["event_id"],
        "as_of": row["as_of"],
        "seen_at": now,
        "resolved_at": None,
    }


def _append_changes(cursor: Cursor, saved: _Saved, reasons: _Reasons) -> None:
    """Append what the rows that were *saved* imply, withheld where there is a reason."""
    begun = saved.known | correcting.openings(cursor, saved.rows, saved.known)
    found = [
        {
            "account": subject.account,
            "livemode": subject.livemode,
            "subject": folds.SHAPES[subject.table].subject,
            "subject_id": subject.id,
            "kind": change.kind,
            **named_by,
            "before": change.before,
            "after": change.after,
            "withheld": reasons.of(subject, joined),
        }
        for subject, joined in saved.rows.items()
        for change, named_by in _implied(subject, joined, begun.get(subject), saved)
    ]
    stock.add_lines(cursor, found)
    moved = _moved(saved, reasons)
    if found or any(moved.values()):
        keep_others_from_appending(cursor)
    append(cursor, found + _refund_changes(cursor, moved))


def _implied(
    subject: Subject, joined: Joined, before: Row | None, saved: _Saved
) -> Iterator[tuple[Change, dict[str, object]]]:
    """Yield what the row *joined* implies, and which event each change names: every step where all of them are new."""
    shape = folds.SHAPES[subject.table]
    changes = shape.changes(before, joined.row if joined.announced is None else joined.announced)
    if not changes:
        return
    world = (subject.account, subject.livemode)
    children = joined.children if shape.child_of is not None else ()
    fresh = [child for child in children if (*world, str(child["event_id"])) in saved.fresh]
    steps = shape.steps(before, joined.row, fresh) if fresh else []
    if not steps:
        yield from ((change, _named_by(joined)) for change in changes)
        return
    for change, child in zip(steps, fresh, strict=True):
        source = saved.fresh[*world, str(child["event_id"])]
        yield change, {"event_id": child["event_id"], "source": source, "at": child["as_of"]}


def _moved(saved: _Saved, reasons: _Reasons) -> dict[str | None, list[Moved]]:
    """Return what may have moved the refunds of orders, by the reason why that is withheld, news first."""
    if reasons.is_one:
        moved = [*refunding.moved(saved.rows, saved.known), *refunding.vanished(saved.gone, saved.known)]
        return {reasons.of_all: moved}
    rows: dict[str | None, dict[Subject, Joined]] = defaultdict(dict, {None: {}})
    gone: dict[str | None, list[Subject]] = defaultdict(list)
    for subject, joined in saved.rows.items():
        rows[reasons.of(subject, joined)][subject] = joined
    for subject in saved.gone:
        gone[reasons.of(subject, None)].append(subject)
    return {
        reason: [*refunding.moved(rows[reason], saved.known), *refunding.vanished(gone[reason], saved.known)]
        for reason in [*rows, *(gone.keys() - rows.keys())]
    }


def _refund_changes(cursor: Cursor, moved: Mapping[str | None, list[Moved]]) -> list[dict[str, Any]]:
    """Return how the refunds of orders changed; withheld is what nothing but known history moved."""
    found: dict[_Object, dict[str, Any]] = {}
    for reason, rows in moved.items():
        for row in refunding.changes(cursor, rows):
            found.setdefault((row["account"], row["livemode"], row["subject_id"]), {**row, "withheld": reason})
    return list(found.values())


def _named_by(joined: Joined) -> dict[str, object]:
    """Return which event a change of the row *joined* names: the one that decided its state."""
    by = joined.decided_by
    if by is not None:
        return {"event_id": by.event_id, "source": by.source, "at": by.at}
    return {"event_id": joined.row["event_id"], "source": joined.source, "at": joined.row["as_of"]}


def append(cursor: Cursor, found: list[dict[str, Any]], withheld: str | None = None) -> None:
    """Append the changes *found*, but for one-shots that are there; the caller keeps others from appending.

    They are kept from the feed where they are *withheld*, which is the reason, as is one that a row has of its own.
    """
    if not found:
        return
    found.sort(key=lambda row: (row["at"], row["subject"], row["subject_id"]))
    rows = found
    if withheld is not None or any("withheld" not in row for row in found):
        rows = [{**row, "withheld": row.get("withheld") or withheld} for row in found]
    if any(row["kind"] == CORRECTED for row in rows) or _may_be_told(cursor, rows):
        settled = correcting.against_the_feed(cursor, rows)
        cursor.execute(_APPEND, (msgspec.json.encode(settled).decode(),))
    else:
        copying.into(cursor, sql.Identifier("changes"), _CHANGES.columns, map(_CHANGES.line, rows))


def _may_be_told(cursor: Cursor, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the feed has one of the changes *rows*, or has told of an object that had no row before."""
    closed = [row for row in rows if row["kind"] == tables.DISPUTE_CLOSED]
    if closed:
        cursor.execute(_CLOSED_BEFORE, _names_of(closed, "subject_id"))
        if cursor.fetchone() == (True,):
            return True
    is_first = boolean_array(row["before"] is None for row in rows)
    cursor.execute(_TOLD_BEFORE, [*_names_of(rows, "subject", "subject_id", "kind"), is_first])
    return cursor.fetchone() == (True,)


def _names_of(rows: Sequence[Mapping[str, Any]], *names: str) -> list[str]:
    """Return the worlds of *rows* and their columns *names*, an array for each column."""
    texts = [text_array([str(row[name]) for row in rows]) for name in ("account", *names)]
    return [texts[0], boolean_array(row["livemode"] is True for row in rows), *texts[1:]]


# A one-shot change is told once: an object that is folded anew may come by its state a second time. Who appends holds
# the lock, so what is not there cannot appear.
_TOLD_BEFORE: Final = f"""
SELECT EXISTS (
    SELECT FROM unnest(%s::text[], %s::boolean[], %s::text[], %s::text[], %s::text[], %s::boolean[])
        AS k (account, livemode, subject, subject_id, kind, is_first)
    CROSS JOIN LATERAL (
        SELECT FROM changes AS c WHERE c.kind IN ({", ".join(f"'{kind}'" for kind in tables.ONE_SHOT_KINDS)})
            AND (c.account, c.livemode, c.subject, c.subject_id) = (k.account, k.livemode, k.subject, k.subject_id)
            AND (k.is_first OR c.kind = k.kind)
        OFFSET 0
    ) AS told
)
"""
# By another status, or by the same.
_CLOSED_BEFORE: Final = f"""
SELECT EXISTS (
    SELECT FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, subject_id)
    CROSS JOIN LATERAL (
        SELECT FROM changes AS c WHERE c.kind = '{tables.DISPUTE_CLOSED}'
            AND (c.account, c.livemode, c.subject_id) = (k.account, k.livemode, k.subject_id)
        OFFSET 0
    ) AS told
)
"""
_APPEND: Final = """
INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at, before, after, withheld)
SELECT account, livemode, subject, subject_id, kind, event_id, source, at, before, after, withheld
FROM json_populate_recordset(NULL::changes, %s)
ON CONFLICT DO NOTHING
"""
_CHANGES: Final = copying.Form(
    tables.changes,
    ("account", "livemode", "subject", "subject_id", "kind", "event_id", "source", "at", "before", "after", "withheld"),
)


def queue_outdated(cursor: Cursor, *, limit: int = REFOLD_EVENTS_MAX, fold_version: int = folds.FOLD_VERSION) -> int:
    """Queue up to *limit* events that an older fold version gave their outcome, and return how many.

    Not those whose payload is archived: without it they could only be parked.
    """
    queued, version, seq = 0, -1, -1
    # From what is at hand to what is outdated and back, so that no pass counts through all that is archived.
    while queued < limit:
        cursor.execute(_OUTDATED, {"version": version, "newest": fold_version, "seq": seq, "limit": limit})
        version, outdated = cursor.fetchone() or (None, None)
        if version is None:
            break
        if not outdated:
            version, seq = version + 1, -1
            continue
        cursor.execute(_QUEUE, (outdated, limit - queued))
        queued += cursor.rowcount
        seq = outdated[-1] + 1
    return queued


# Of the oldest fold version from *version* on, the outdated events from the first payload at hand on.
_OUTDATED: Final = """
WITH oldest AS (
    SELECT fold_version FROM outcomes WHERE fold_version >= %(version)s AND fold_version < %(newest)s
    ORDER BY fold_version LIMIT 1
), at_hand AS (
    SELECT seq FROM payloads WHERE seq >= %(seq)s ORDER BY seq LIMIT 1
)
SELECT fold_version, ARRAY(
    SELECT o.seq FROM outcomes AS o
    WHERE o.fold_version = oldest.fold_version AND o.seq >= (SELECT seq FROM at_hand) ORDER BY o.seq LIMIT %(limit)s
)
FROM oldest
"""
_QUEUE: Final = """
INSERT INTO pending (seq, again)
SELECT seq, true FROM unnest(%s::bigint[]) AS k (seq)
WHERE EXISTS (SELECT FROM payloads AS b WHERE b.seq = k.seq)
    AND NOT EXISTS (SELECT FROM pending AS p WHERE p.seq = k.seq)
ORDER BY seq LIMIT %s
ON CONFLICT (seq) DO NOTHING
"""
