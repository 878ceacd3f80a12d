"""The one writer of the tables: takes pending events, joins their facts with the known rows, saves the difference."""

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, TypeAlias

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from schemas import database
from schemas.database import Bounds, Cursor, integer_array, text_array
from schemas.errors import Archived, Transient
from schemas.locks import keep_others_from_appending, share_folding
from schemas.logs import Seldom
from schemas.own_events import EVENT_IGNORED
from worker import folds
from worker.folding import older_versions, renderings, settling, unsettled
from worker.folding.anomalies import note_anomalies, note_contradictions
from worker.folding.batch import (
    NEWS,
    NOTHING,
    Claimed,
    Outcome,
    Part,
    Reasons,
    Saved,
    every_copy,
    rows_before,
)
from worker.folding.changes import announce
from worker.folding.claim import Shard, claim, lock_objects, try_locks
from worker.folding.joining import facts_at_hand, join_facts, mention, objects_of, rows_of
from worker.folding.rows import load_rows, probe_indexes
from worker.folding.saving import save_rows
from worker.folds import join
from worker.folds.facts import Event, Facts, Row, Subject, object_of
from worker.folds.join import Joined

FOLD_BATCH_MAX: Final = 500
"""Events that are folded in one transaction."""
RETRY_SECONDS_MIN: Final = 1
RETRY_SECONDS_MAX: Final = 300
"""An event that failed alone, not because of its data, is tried again after ``RETRY_SECONDS_MIN``.

The delay doubles with each try, up to this.
"""
Apart: TypeAlias = deque[tuple[int, ...]]
"""Groups of pending events, by their numbers. Each group is to be folded by itself, because their batch failed."""
_log = structlog.get_logger()
_seldom: Final = Seldom(60)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an event could not be folded. With *is_of_data* it would fail again, so the event is parked."""

    cause: str
    reason: str
    is_of_data: bool


def run_once(
    engine: Engine,
    *,
    now: datetime,
    limit: int = FOLD_BATCH_MAX,
    shard: Shard | None = None,
    apart: Apart | None = None,
    bounds: Bounds | None = None,
) -> int:
    """Fold up to *limit* pending events, of one *shard* or of all, in one transaction, and return their number.

    A batch that fails is divided until the event at fault is alone. That event is parked if its data is at fault, and
    otherwise tried again later. The parts are kept in *apart* for the next calls, which take them first. Without
    *apart* they are folded before this returns.

    Raises:
        Transient: PostgreSQL does not answer, or has not given any event in time; nothing is lost.
    """
    parts: Apart = deque() if apart is None else apart
    folded = _run_batch(engine, parts, now=now, limit=limit, shard=shard, bounds=bounds)
    while apart is None and parts:
        folded += _run_batch(engine, parts, now=now, limit=limit, shard=shard, bounds=bounds)
    return folded


def fold_pending(engine: Engine, *, now: datetime | None = None, limit: int = FOLD_BATCH_MAX) -> int:
    """Fold until nothing that is due is pending, up to *limit* events at a time, and return their number.

    *now* replaces the current time, if it is given. The worker has a loop of its own, which ends in time: see
    ``parallel.fold``.

    Raises:
        Transient: as from ``run_once``.
    """
    folded = 0
    while batch := run_once(engine, now=now or datetime.now(UTC), limit=limit):
        folded += batch
    return folded


def run_one(engine: Engine, seq: int, *, now: datetime) -> int:
    """Fold the pending event *seq* by itself, due or not, and return whether it had been pending."""
    return _run_batch(engine, deque([(seq,)]), now=now, limit=1, shard=None, bounds=None)


def _run_batch(
    engine: Engine,
    apart: Apart,
    *,
    now: datetime,
    limit: int,
    shard: Shard | None,
    bounds: Bounds | None,
    is_queued: bool = False,
) -> int:
    only = apart.popleft() if apart else None
    claimed: list[Claimed] = []
    owes = False
    compared: list[int] = []
    try:
        with database.transaction(engine, bounds) as connection, database.cursor(connection) as cursor:
            probe_indexes(cursor)
            # Queued events must stay queued even if the batch fails, so they are committed by themselves.
            queued = renderings.queue(cursor) if only is None and not is_queued else 0
            if not queued:
                claimed = claim(
                    cursor, limit=limit if only is None else len(only), only=only, shard=shard, compared=compared
                )
                owes = project(cursor, claimed, now=now) if claimed else bool(unsettled.owed(cursor))
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
        return _run_batch(engine, apart, now=now, limit=limit, shard=shard, bounds=bounds, is_queued=True)
    if owes:
        _settle_owed(engine, now=now, bounds=bounds)
    return len(claimed)


def _divide(
    engine: Engine, apart: Apart, claimed: Sequence[Claimed], failure: Failure, *, now: datetime, bounds: Bounds | None
) -> int:
    """Put the halves of a failed batch into *apart*, or conclude an event that failed alone.

    Return how many events were concluded.
    """
    if len(claimed) == 1:
        return _conclude_alone(engine, claimed[0], failure, now=now, bounds=bounds)
    # An event whose data is at fault has a line of its own when it is parked.
    if not failure.is_of_data:
        _seldom.warning("batch.divided", cause=failure.cause, reason=failure.reason)
    seqs = tuple(each.event.seq for each in claimed)
    half = len(seqs) // 2
    apart.extendleft([seqs[half:], seqs[:half]])
    return 0


def _divide_compared(
    engine: Engine, apart: Apart, compared: Sequence[int], failure: Failure, *, bounds: Bounds | None
) -> int:
    """Divide events with copies that could not be compared, as ``_divide`` does; one alone is tried again later.

    It is never parked, because copies that are not compared would be queued again at once, and fail again.
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
    """Return the failure for *error*. PostgreSQL's message could quote an event, so only its condition is kept."""
    if isinstance(error, Archived):
        return Failure("payload_archived", str(error), is_of_data=True)
    if isinstance(error, (DBAPIError, database.DriverError)):
        condition = database.condition(error)
        if database.is_fault_of_data(error):
            return Failure("row_refused", f"PostgreSQL refused its row: {condition}", is_of_data=True)
        if database.is_short_of_locks(error):
            return Failure("database_busy", database.LOCKS_MORE, is_of_data=False)
        cause = "database_busy" if database.is_busy(error) else "database_refused"
        return Failure(cause, f"PostgreSQL did not fold it: {condition}", is_of_data=False)
    if isinstance(error, (MemoryError, OSError)):
        return Failure("machine_short", f"this machine could not fold it: {type(error).__name__}", is_of_data=False)
    return Failure("fold_failed", f"the join failed with {type(error).__name__}", is_of_data=True)


def _conclude_alone(engine: Engine, claimed: Claimed, failure: Failure, *, now: datetime, bounds: Bounds | None) -> int:
    """Park the event, or let it be tried again later; return 1, or 0 if it is no longer as it was *claimed*.

    Since the failure another copy may have been chosen, or another worker may have folded the event. So it is claimed
    again and compared with the event that failed.
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
            # A choice of another copy must be saved together with its fold, so it is undone until the next try.
            cursor.execute("ROLLBACK TO SAVEPOINT untouched")
            _postpone(cursor, claimed.event.seq, claimed.attempts, failure)
    if owes:
        _settle_owed(engine, now=now, bounds=bounds)
    event = "event.parked" if failure.is_of_data else "event.postponed"
    _log.warning(event, event_id=claimed.event.id, cause=failure.cause, reason=failure.reason)
    return 1


def park(cursor: Cursor, claimed: Claimed, failure: Failure, *, now: datetime) -> bool:
    """Park the event, because its data is at fault, and fold the rows that it or another copy had made without it.

    Returns whether other transactions hold rows that this may settle.
    """
    note_contradictions(cursor, [claimed], now)
    outcome = Outcome(claimed.event.seq, "parked", failure.reason, failure.cause, claimed.attempts + 1)
    _conclude(cursor, [outcome], now, folds.FOLD_VERSION)
    return claimed.is_refold and _fold_without(cursor, claimed, now)


def _fold_without(cursor: Cursor, claimed: Claimed, now: datetime) -> bool:
    """Fold the rows that the parked event had made from their other events. If that fails too, the rows stay."""
    part = replace(_part(cursor, [(claimed, folds.Verdict("parked"))]), judged=())
    is_history = claimed.choice is not None and claimed.choice.is_history
    try:
        with cursor.connection.transaction():
            lock_objects(cursor, part.refold, part.objects)
            return _project(cursor, part, now, folds.FOLD_VERSION, withheld="rendering" if is_history else None)
    except Exception as error:
        if isinstance(error, Transient) or not failure_of(error).is_of_data:
            raise
        _log.warning("event.rows_stay", event_id=claimed.event.id, reason=failure_of(error).reason)
        return False


def _postpone(cursor: Cursor, seq: int, attempts: int, failure: Failure) -> None:
    """Let the event *seq* be tried again later; it has failed alone *attempts* times before."""
    delay = min(RETRY_SECONDS_MAX, RETRY_SECONDS_MIN * 2 ** min(attempts, 16))
    cursor.execute(
        "UPDATE pending SET attempts = %s, due_at = now() + make_interval(secs => %s), cause = %s, reason = %s"
        " WHERE seq = %s",
        (min(attempts + 1, 32767), delay, failure.cause, failure.reason, seq),
    )


def project(
    cursor: Cursor, claimed: Sequence[Claimed], *, now: datetime, fold_version: int = folds.FOLD_VERSION
) -> bool:
    """Fold *claimed* into the tables, in the cursor's transaction. The caller commits at once.

    Returns whether other transactions hold rows that *claimed* may settle. None do while others are kept from folding.
    """
    if not claimed:
        return False
    _let_stand(cursor, [each for each in claimed if each.stands])
    part = _part(cursor, [(each, _judge(each)) for each in claimed if not each.stands])
    neighbours = (
        older_versions.neighbours(cursor, part.facts) if older_versions.is_at_hand(cursor, fold_version) else None
    )
    lock_objects(cursor, part.facts.keys() | part.refold | (neighbours or set()), part.objects)
    past, news = (None, part) if neighbours is None else _divided(cursor, part, neighbours, fold_version)
    owes = past is not None and _project(cursor, past, now, fold_version, withheld="fold_version")
    owes |= news is not None and _project(cursor, news, now, fold_version)
    note_contradictions(cursor, claimed, now)
    return owes


def project_pending(cursor: Cursor, *, now: datetime, fold_version: int = folds.FOLD_VERSION) -> None:
    """Fold all events that are due in the cursor's transaction, which keeps others from folding. Commit at once."""
    while claimed := claim(cursor, limit=FOLD_BATCH_MAX):
        project(cursor, claimed, now=now, fold_version=fold_version)


def _project(cursor: Cursor, part: Part, now: datetime, fold_version: int, *, withheld: str | None = None) -> bool:
    """Fold *part*, with its objects locked. *withheld* is the reason to keep its changes from the feed, if any.

    Returns whether other transactions hold rows that *part* may settle.
    """
    events = [each.event for each, _ in part.judged]
    refold = part.refold | rows_of(cursor, part.objects)
    mention(cursor, events, part.facts)
    saved = join_facts(cursor, part.facts, refold)
    saved.judged = part.judged
    left_open = settling.open_rows(saved.rows)
    for subject in left_open:
        del saved.rows[subject]
    save_rows(cursor, saved)
    note_anomalies(cursor, saved, now)
    all_new = not any(each.is_refold for each, _ in part.judged)
    _conclude(cursor, part.outcomes, now, fold_version, all_new=all_new)
    _note_ignored(cursor, [event for event in events if event.type == EVENT_IGNORED])
    reasons = Reasons(part, withheld)
    owes = _settle(cursor, saved, left_open, reasons, now)
    announce(cursor, saved, reasons)
    return owes


def _part(cursor: Cursor, judged: Sequence[tuple[Claimed, folds.Verdict]]) -> Part:
    """Return the part of *judged*: its facts, and the rows and objects that have to be folded again."""
    facts: dict[Subject, list[Facts]] = defaultdict(list)
    refold: set[Subject] = set()
    for each, verdict in judged:
        for one in verdict.facts:
            facts[one.subject].append(one)
        if each.is_refold:
            refold |= rows_before(each).union(one.subject for one in verdict.facts)
    judged_before = [event for each, _ in judged if each.is_refold for event in every_copy(each)]
    return Part(judged, facts, refold, objects_of(cursor, judged_before))


def _divided(
    cursor: Cursor, part: Part, neighbours: set[Subject], fold_version: int
) -> tuple[Part | None, Part | None]:
    """Divide *part* into events that an older fold version had folded, and new events; each is None if it is empty.

    The first also gets all rows that the second may touch, or find next to its own, and that are not folded again yet.
    """
    judged_before = [each.event.seq for each, _ in part.judged if each.is_refold and each.ignored_because is None]
    outdated = older_versions.outdated(cursor, judged_before, fold_version)
    if len(outdated) == len(part.judged):
        return part, None
    past, news = (
        _part(cursor, [each for each in part.judged if (each[0].event.seq in outdated) is is_past])
        for is_past in (True, False)
    )
    touched = news.facts.keys() | news.refold | neighbours
    objects = older_versions.objects(cursor, {object_of(subject) for subject in touched}, fold_version)
    if not outdated and not objects:
        return None, news
    waiting = {subject for subject in touched if object_of(subject) in objects}
    return replace(past, refold=past.refold | waiting, objects=past.objects | objects), news


def _settle(cursor: Cursor, saved: Saved, left_open: dict[Subject, Joined], reasons: Reasons, now: datetime) -> bool:
    """Settle by other objects the rows *left_open* and the resting rows that *saved* may settle, and save them.

    Returns whether other transactions hold some of the resting rows, which are then owed: see Note [The lock of an
    order at rest is only tried].
    """
    ways = settling.moved(saved.rows, saved.known, saved.gone)
    if not left_open and not any(ways):
        return False
    keep_others_from_appending(cursor, rows=len(saved.rows))
    saved.is_alone = True
    own = left_open.keys() | saved.rows.keys() | set(saved.gone)
    found = [subject for subject in settling.found_by(cursor, ways) if subject not in own]
    held = try_locks(cursor, found)
    why = {reasons.of(subject, joined) for subject, joined in saved.rows.items() if subject.table in settling.MOVING}
    _save_settled(cursor, saved, left_open, held, now)
    settling.fold_again(cursor, ways)
    passed = [subject for subject in found if subject not in held]
    unsettled.owe(cursor, passed, why.pop() if len(why) == 1 else None)
    return bool(passed)


def _save_settled(
    cursor: Cursor, saved: Saved, left_open: dict[Subject, Joined], at_rest: Collection[Subject], now: datetime
) -> None:
    """Settle the rows *left_open*, which were just joined, and the rows *at_rest*, and add them to *saved*.

    The caller holds the locks of their objects, and keeps others from appending.
    """
    resting = settling.at_rest(cursor, at_rest) | _notes_at_rest(cursor, at_rest)
    rows = settling.settled(cursor, {**left_open, **{subject: own for subject, (_, own) in resting.items()}})
    saved.known |= {subject: row for subject, (row, _) in resting.items()}
    if rows:
        save_rows(cursor, settled := Saved(rows, saved.known, []))
        note_anomalies(cursor, settled, now)
        saved.rows |= rows


def _notes_at_rest(cursor: Cursor, subjects: Iterable[Subject]) -> dict[Subject, tuple[Row, Joined]]:
    """Return the open credit notes among *subjects*: each saved row, and the row that its own events alone make.

    Only the events show the row before its refund, so a note with archived events is left out and stays as it is.
    """
    known = load_rows(cursor, [subject for subject in subjects if subject.table == "credit_notes"])
    facts = facts_at_hand(cursor, set(known))
    own = {subject: join.fold_all(folds.ROW_SPECS[subject.table], several or ()) for subject, several in facts}
    joined = {subject: each for subject, each in own.items() if each is not None}
    return {subject: (known[subject], each) for subject, each in settling.open_rows(joined).items()}


def _settle_owed(engine: Engine, *, now: datetime, bounds: Bounds | None) -> None:
    """Settle the orders and notes that another transaction held when they should have been settled."""
    try:
        with database.transaction(engine, bounds) as connection, database.cursor(connection) as cursor:
            probe_indexes(cursor)
            share_folding(cursor)
            subjects = unsettled.owed(cursor)
            lock_objects(cursor, subjects, ())
            keep_others_from_appending(cursor)
            for withheld, some in unsettled.take_owed(cursor, subjects).items():
                _save_settled(cursor, saved := Saved({}, {}, []), {}, some, now)
                announce(cursor, saved, Reasons(NOTHING, withheld))
    except (DBAPIError, database.DriverError) as error:
        if not database.is_busy(error):
            raise
        # They are still owed, and a later turn settles them.
        _log.warning("orders.unsettled", condition=database.condition(error))


def settle_all(cursor: Cursor, *, now: datetime, account: str | None = None) -> None:
    """Settle all saved orders and notes, or those of one *account*, while no one else folds or sees them."""
    for page in settling.pages(cursor, account):
        keep_others_from_appending(cursor)
        notes = load_rows(cursor, [subject for subject in page if subject.table == "credit_notes"])
        as_they_are = {subject: settling.note_as_it_is(row) for subject, row in notes.items()}
        orders = [subject for subject in page if subject.table == "orders"]
        _save_settled(cursor, saved := Saved({}, dict(notes), []), as_they_are, orders, now)
        announce(cursor, saved, NEWS)


def _let_stand(cursor: Cursor, standing: Sequence[Claimed]) -> None:
    """Delete from ``pending`` the events that keep their outcome although their copies were compared.

    An event with a new content counts one more attempt, so that a rebuild notices it and catches up.
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


def _judge(claimed: Claimed) -> folds.Verdict:
    if claimed.ignored_because is not None:
        return folds.ignored_by_operator(claimed.ignored_because)
    return folds.judge(claimed.event)


def _conclude(
    cursor: Cursor, outcomes: Sequence[Outcome], now: datetime, fold_version: int, *, all_new: bool = False
) -> None:
    """Write the outcomes of the events, of which *all_new* had none, and delete the events from ``pending``."""
    cursor.execute(
        _CONCLUDE_NEW if all_new else _CONCLUDE,
        {
            "now": now,
            "fold_version": fold_version,
            "seqs": integer_array(outcome.seq for outcome in outcomes),
            "states": text_array([outcome.state for outcome in outcomes]),
            "reasons": text_array([outcome.reason or "" for outcome in outcomes]),
            "causes": text_array([outcome.cause or "" for outcome in outcomes]),
            "attempts": integer_array(min(outcome.attempts, 32767) for outcome in outcomes),
        },
    )


_CONCLUDE_NEW: Final = """
WITH gone AS (DELETE FROM pending WHERE seq = ANY (%(seqs)s::bigint[]))
INSERT INTO outcomes AS known (seq, state, reason, cause, attempts, folded_at, fold_version)
SELECT seq, state, nullif(reason, ''), nullif(cause, ''), attempts, %(now)s, %(fold_version)s
FROM unnest(%(seqs)s::bigint[], %(states)s::text[], %(reasons)s::text[], %(causes)s::text[], %(attempts)s::integer[])
    AS t (seq, state, reason, cause, attempts)
"""
# Looking for outcomes to replace takes as long as writing them, so it is left out where there are none.
_CONCLUDE: Final = f"""
{_CONCLUDE_NEW}
ON CONFLICT (seq) DO UPDATE SET
    state = excluded.state, reason = excluded.reason, cause = excluded.cause,
    attempts = least(known.attempts::integer + excluded.attempts, 32767),
    folded_at = excluded.folded_at, fold_version = excluded.fold_version
"""


def _note_ignored(cursor: Cursor, words: Sequence[Event]) -> None:
    """Queue the events that an operator ignores, so that they are judged and their rows folded again."""
    for word in words:
        cursor.execute(
            """
            INSERT INTO pending (seq, again) SELECT seq, true FROM inbox WHERE (account, livemode, id) = (%s, %s, %s)
            ON CONFLICT (seq) DO UPDATE SET
                again = true, attempts = 0, due_at = NULL, cause = NULL, reason = NULL
            """,
            (word.account, word.livemode, word.object_id),
        )
