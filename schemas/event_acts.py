"""The acts of an operator on events: fold them again, or ignore one. For the web process, the worker and the commands.

Nothing is folded here. An event that is to be folded again is put into ``pending``, and one that is to be ignored gets
an observation; the caller commits, and wakes the worker or folds.

Note [What was confirmed is what is done]
    An operator sees a count and confirms it. Between the two, events may be folded, parked or recorded. So events that
    were recorded later are left out by their number, and one statement counts what matches and queues it only if that
    is the confirmed count. What is done was seen, or nothing is done.

Note [An act has the event alone]
    The view ``events`` shows an event as pending while a worker folds it, and also where it was folded and waits to be
    folded again. So an act first takes the event's row in ``pending``, without which no worker folds it, and only then
    reads the outcome that counts. It makes the row where there is none, so that no one else can queue the event before
    the act is committed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    Connection,
    RowMapping,
    ScalarSelect,
    Select,
    Table,
    any_,
    func,
    literal,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from schemas import inbox, lookup, observations, tables
from schemas.database import Cursor, integer_array
from schemas.errors import ConfigurationError, ConflictError, CountDiffers, NotFoundError
from schemas.event_filters import EventFilters, waiting
from schemas.own_events import EVENT_IGNORED

RETRY_EVENTS_MAX: Final = 100_000
"""Events that one act queues: more in one statement would keep others from their rows for too long."""
OPEN_STATES: Final = ("parked", "pending")
"""No row of the tables depends on an event in one of these states."""
REASON_CHARACTERS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class FoundEvent:
    """An event in the inbox, and its outcome."""

    seq: int
    account: str
    livemode: bool
    id: str
    state: str
    reason: str | None

    @property
    def is_open(self) -> bool:
        """Whether it is parked or pending."""
        return self.state in OPEN_STATES


@dataclass(frozen=True, slots=True)
class Matching:
    """How many events match, of those with a number up to *until*, and the numbers of those that were *queued*."""

    count: int
    until: int
    queued: Sequence[int] = ()

    @property
    def is_too_many(self) -> bool:
        """Whether there are more than one act may queue; *count* is then only the first number that is too large."""
        return self.count > RETRY_EVENTS_MAX


def find(
    connection: Connection, event_id: str, *, account: str | None = None, livemode: bool | None = None
) -> FoundEvent:  # fmt: skip
    """Return the event *event_id*, of any account and mode unless *account* or *livemode* is given.

    Raises:
        NotFoundError: the inbox has no event of that id.
        ConflictError: several accounts or modes have one.
    """
    rows = lookup.by_id(connection, tables.events, event_id, account=account, livemode=livemode)
    if not rows:
        raise NotFoundError(f"The inbox has no event {event_id}.")
    if len(rows) > 1:
        raise ConflictError(f"Several accounts or modes have an event {event_id}: say which account, and live or test.")
    return _found(rows[0])


def at(connection: Connection, seq: int) -> FoundEvent:
    """Return the event numbered *seq*, which is in the inbox."""
    events = tables.events
    return _found(
        connection.execute(select(*(events.c[name] for name in _FIELDS)).where(events.c.seq == seq)).mappings().one()
    )


def _found(row: RowMapping) -> FoundEvent:
    return FoundEvent(*(row[name] for name in _FIELDS))


_FIELDS: Final = tuple(field.name for field in fields(FoundEvent))


# ---- Fold again ----


def retry(cursor: Cursor, found: FoundEvent) -> FoundEvent:
    """Queue an event that is parked or pending to be folded again, and return it as it then is.

    Raises:
        ConflictError: it is in another state, a worker folds it, or payloads that the fold needs are archived.
    """
    again = f"`payfold events retry {found.id}`"
    if not found.is_open:
        raise ConflictError(
            f"{found.id} is {found.state}, and only a parked or pending event is tried again here. {again} folds it all"
            " the same."
        )
    require_at_hand(found, archived_with(cursor, found.seq))
    if not _take(cursor, found).is_open:
        raise ConflictError(f"{found.id} has just been folded: look at it again.")
    queue(cursor, [found.seq])
    return replace(found, state="pending", reason=None)


def require_at_hand(found: FoundEvent, archived: Sequence[int]) -> None:
    """Raise ConflictError where events that are needed to fold *found* again are *archived*."""
    if archived:
        raise ConflictError(
            f"{found.id} cannot be folded again, since {len(archived):,} events of its objects are archived; it stays"
            f" {found.state}. `payfold events retry {found.id} --archive DIR` brings them back."
        )


def archived_with(cursor: Cursor, seq: int) -> list[int]:
    """Return the archived events that are needed to fold event *seq* again: those about the same objects."""
    cursor.execute(_ARCHIVED_WITH, {"seq": seq})
    return [found for (found,) in cursor.fetchall()]


_ARCHIVED_WITH: Final = f"""
WITH objects AS (
    SELECT account, livemode, object_id FROM inbox WHERE seq = %(seq)s AND object_id IS NOT NULL
    UNION
    SELECT account, livemode, object_id FROM mentions WHERE seq = %(seq)s
), logged AS (
    SELECT %(seq)s::bigint AS seq
    UNION
    SELECT i.seq FROM objects AS k JOIN inbox AS i ON {tables.of_object("i", "k.account", "k.livemode", "k.object_id")}
    UNION
    SELECT m.seq FROM objects JOIN mentions AS m USING (account, livemode, object_id)
)
SELECT seq FROM logged WHERE NOT EXISTS (SELECT FROM payloads AS b WHERE b.seq = logged.seq) ORDER BY seq
"""


def queue(cursor: Cursor, seqs: Sequence[int]) -> None:
    """Queue the events numbered *seqs* to be folded again, now."""
    cursor.execute(_QUEUE, {"seqs": integer_array(sorted(seqs))})


_QUEUE: Final = """
INSERT INTO pending (seq, again) SELECT seq, true FROM inbox WHERE seq = ANY (%(seqs)s::bigint[]) ORDER BY seq
ON CONFLICT (seq) DO UPDATE SET again = true, attempts = 0, due_at = NULL, cause = NULL, reason = NULL
"""
_AGAIN: Final[Mapping[str, Any]] = {"again": True, "attempts": 0, "due_at": None, "cause": None, "reason": None}


def matching(connection: Connection, filters: EventFilters) -> Matching:
    """Return how many events match *filters*, and the number up to which they were counted.

    Raises:
        ConfigurationError: the filters are of events that are neither parked nor pending.
    """
    wanted = _wanted(filters, until=None).cte("wanted")
    until = select(func.coalesce(func.max(tables.inbox.c.seq), 0)).scalar_subquery()
    count, last = connection.execute(select(_count(wanted), until)).one()
    return Matching(count, last)


def retry_matching(connection: Connection, filters: EventFilters, *, confirm: int, until: int) -> Matching:
    """Queue the events that match *filters* to be folded again, if there are *confirm* up to the number *until*.

    See Note [What was confirmed is what is done]: if *count* of what is returned is another number, nothing was queued.
    Nor is anything where that are more than ``RETRY_EVENTS_MAX``.

    Raises:
        ConfigurationError: the filters are of events that are neither parked nor pending.
        CountDiffers: a worker has just folded some of the events; the transaction is to be rolled back.
    """
    wanted = _wanted(filters, until=until).cte("wanted")
    is_confirmed = _count(wanted) == literal(min(confirm, RETRY_EVENTS_MAX))
    chosen = select(wanted.c.seq, true()).where(is_confirmed).order_by(wanted.c.seq)
    pending = tables.pending
    statement = insert(pending).from_select(["seq", "again"], chosen)
    again = statement.on_conflict_do_update(index_elements=[pending.c.seq], set_=_AGAIN)
    queued = again.returning(pending.c.seq, literal_column(_WAS_PENDING, Boolean).label("was_pending")).cte("queued")
    made = select(queued.c.seq).where(~queued.c.was_pending)
    numbers, new = (func.array(some.scalar_subquery()) for some in (select(queued.c.seq), made))
    count, done, newly = connection.execute(select(_count(wanted), numbers, new)).one()
    # The insert waits for workers that have some of the events; their outcomes are seen only by a later statement.
    outcomes = _states_in(connection, tables.outcomes, newly)
    gone = sum(number for state, number in outcomes.items() if state != filters.state)
    if gone:
        raise CountDiffers(count - gone, until)
    return Matching(count, until, done)


def states_of(connection: Connection, seqs: Sequence[int]) -> dict[str, int]:
    """Return how many of the events numbered *seqs* are in each state."""
    return _states_in(connection, tables.events, seqs)


def _states_in(connection: Connection, table: Table, seqs: Sequence[int]) -> dict[str, int]:
    is_one = table.c.seq == any_(literal(list(seqs), ARRAY(BigInteger)))
    query = select(table.c.state, func.count().label("number")).where(is_one).group_by(table.c.state)
    return {row.state: row.number for row in connection.execute(query)}


def require_not_too_many(found: Matching) -> None:
    """Raise ConflictError where more events match than one act queues."""
    if found.is_too_many:
        raise ConflictError(f"More than {RETRY_EVENTS_MAX:,} events match: narrow the filters, as by type or by time.")


@dataclass(frozen=True, slots=True)
class Progress:
    """Of the events that one act queued, how many still wait, and how many were parked again."""

    waiting: int
    parked: int


def progress(connection: Connection, filters: EventFilters, *, until: int, since: datetime) -> Progress:
    """Return what became of the events that ``retry_matching`` queued at *since*, by the same *filters* and *until*."""
    events, queued = tables.events, select(tables.pending.c.seq).where(tables.pending.c.again)

    def of(state: str, wanted: ColumnElement[bool]) -> int:
        # An event that failed again has a cause of its own.
        left = _wanted(replace(filters, state=state, cause=None), until=until).where(wanted)
        return connection.execute(select(func.count()).select_from(left.subquery())).scalar_one()

    return Progress(of("pending", events.c.seq.in_(queued)), of("parked", events.c.folded_at >= since))


def _wanted(filters: EventFilters, *, until: int | None) -> Select[Any]:
    if filters.state not in OPEN_STATES:
        raise ConfigurationError(f"Only events that are {' or '.join(OPEN_STATES)} are tried again.")
    seq = tables.events.c.seq
    wanted = [*filters.conditions, seq.in_(waiting(filters)), *([] if until is None else [seq <= until])]
    return select(seq).where(*wanted).limit(RETRY_EVENTS_MAX + 1)


def _count(of: CTE) -> ScalarSelect[int]:
    return select(func.count()).select_from(of).scalar_subquery()


# ---- Ignore ----


def ignore(cursor: Cursor, found: FoundEvent, *, reason: str, by: str, now: datetime) -> str:
    """Record that the event *found* is ignored for *reason* from now on, and return the id of that observation.

    *by* names the token of the person, or is ``BY_COMMAND``.

    Raises:
        ConflictError: a worker folds the event, or rows of the tables depend on it: it is neither parked nor pending,
            or was folded and is pending again.
    """
    if not found.is_open:
        raise _not_open(found, found.state)
    taken = _take(cursor, found)
    if taken.outcome == "folded" or not taken.is_open:
        raise _not_open(found, taken.outcome)
    word = observations.observe(
        EVENT_IGNORED,
        {"object": "event", "id": found.id, "reason": reason, "by": by},
        account=found.account,
        livemode=found.livemode,
        created=int(now.timestamp()),
        now=now,
    )
    inbox.record(cursor, [word])
    if not taken.was_pending:
        cursor.execute("DELETE FROM pending WHERE seq = %s", (found.seq,))
    return word.envelope.id


def _not_open(found: FoundEvent, state: str | None) -> ConflictError:
    return ConflictError(f"Only a parked or pending event can be set aside, and {found.id} is {state}.")


# ---- Taking an event: see Note [An act has the event alone] ----

_WAS_PENDING: Final = "xmax <> 0"
"""Whether a row that ``INSERT ... ON CONFLICT DO UPDATE`` returns was there before: only then was it locked."""
_HELD: Final = """
WITH free AS MATERIALIZED (SELECT seq FROM pending WHERE seq = %(seq)s FOR UPDATE SKIP LOCKED)
SELECT FROM pending WHERE seq = %(seq)s AND NOT EXISTS (SELECT FROM free)
"""
_TAKE: Final = f"""
INSERT INTO pending (seq, again) VALUES (%(seq)s, true)
ON CONFLICT (seq) DO UPDATE SET again = pending.again RETURNING {_WAS_PENDING}
"""


class _Taken(NamedTuple):
    """An event that no worker folds until the transaction ends: whether it *was_pending*, and its last *outcome*."""

    was_pending: bool
    outcome: str | None

    @property
    def is_open(self) -> bool:
        """Whether it was parked or pending when it was taken."""
        return self.was_pending or self.outcome == "parked"


def _take(cursor: Cursor, found: FoundEvent) -> _Taken:
    """Take the event *found*, which is in ``pending`` then.

    Raises:
        ConflictError: a worker folds it.
    """
    if cursor.execute(_HELD, {"seq": found.seq}).fetchone() is not None:
        raise ConflictError(f"{found.id} is being folded: try again.")
    (was_pending,) = cursor.execute(_TAKE, {"seq": found.seq}).fetchone() or (False,)
    (outcome,) = cursor.execute("SELECT state FROM outcomes WHERE seq = %s", (found.seq,)).fetchone() or (None,)
    return _Taken(was_pending, outcome)
