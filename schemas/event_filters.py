"""The filters of the inbox, one set for the API, the commands, the pages, and the acts on all events that match.

Note [A page of events costs the same in any inbox]
    Where an index leads to few events (those of an object, of a type; those that are parked or pending, or of an
    account, where these are few), only these are read. Any other filter is applied to the events in the order of the
    list, of which a page looks at ``SCAN_ROWS_MAX`` at most. So a page may have fewer rows than were asked for, or
    none, and more behind it.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    DateTime,
    FromClause,
    Select,
    and_,
    func,
    literal,
    select,
    text,
    true,
    tuple_,
    union_all,
)

from schemas import lookup, tables
from schemas.own_events import EVENT_IGNORED

TYPE_CHARACTERS_MAX: Final = 255
STARS_MAX: Final = 5
"""In a pattern of types."""
SCAN_ROWS_MAX: Final = 5_000
"""Events that a page looks at."""
TYPES_MAX: Final = 25
"""A pattern of more types than this is applied to the events in the order of the list."""
VALUES: Final[Mapping[str, tuple[str, ...]]] = {
    "state": tables.STATES,
    "cause": tables.CAUSES,
    "source": tables.SOURCES,
}
"""By filter, all the values that there are."""
TYPE_HELP: Final = f"a type, or a pattern of types with * for any characters, at most {STARS_MAX} times: invoice.*"
_THIN: Final = "v_.%"
_RARE_SOURCES: Final = ("gap", "observation")
"""There are fewer events of these than of most types."""

_events: Final = tables.events
_inbox: Final = tables.inbox


class Position(NamedTuple):
    """The place of an event in the list."""

    received_at: datetime
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilters:
    """The events to list or to act on; None is any.

    *type* is one type, or a pattern in which ``*`` stands for any characters. *received_from* is included,
    *received_before* is not.
    """

    state: str | None = None
    cause: str | None = None
    type: str | None = None
    object_id: str | None = None
    source: str | None = None
    account: str | None = None
    livemode: bool | None = None
    received_from: datetime | None = None
    received_before: datetime | None = None

    def faults(self) -> dict[str, str]:
        """Return what is wrong with each value that cannot be used, by the name of the filter."""
        found = {name: f"it is none of {', '.join(values)}" for name, values in VALUES.items() if self._is_odd(name)}
        fault = None if self.type is None else type_fault(self.type)
        return found if fault is None else {**found, "type": fault}

    def _is_odd(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value not in VALUES[name]

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """The conditions on the view ``events``."""
        equal = ("state", "cause", "object_id", "source", "account", "livemode")
        found = [_events.c[name] == getattr(self, name) for name in equal if getattr(self, name) is not None]
        if self.type is not None:
            found.append(_is_of_type(_events.c.type, self.type))
        return found + self.within(_events)

    def within(self, table: FromClause) -> list[ColumnElement[bool]]:
        """Return the conditions that rows of *table* were received in time."""
        at = table.c.received_at
        since = [] if self.received_from is None else [at >= self.received_from]
        return since if self.received_before is None else [*since, at < self.received_before]

    @property
    def is_narrow(self) -> bool:
        """Whether events may be left out for another reason than their time."""
        return len(self.conditions) > len(self.within(_events))


@dataclass(frozen=True, slots=True)
class EventPage:
    """The *rows* of a page, and the place behind which the next one begins; None where this is the last."""

    rows: list[dict[str, Any]]
    following: Position | None


def type_fault(pattern: str) -> str | None:
    """Return why *pattern* cannot be used as a filter of types, None if it can."""
    if len(pattern) > TYPE_CHARACTERS_MAX:
        return f"it is longer than {TYPE_CHARACTERS_MAX} characters"
    if pattern.count("*") > STARS_MAX:
        return f"it has more than {STARS_MAX} stars"
    return "it has a NUL character" if "\0" in pattern else None


def _like(pattern: str) -> str:
    """Return *pattern* as LIKE has it: a star is a per cent sign, and LIKE's own signs stand for themselves."""
    for sign in "\\%_":
        pattern = pattern.replace(sign, f"\\{sign}")
    return pattern.replace("*", "%")


def _is_of_type(column: ColumnElement[str], pattern: str) -> ColumnElement[bool]:
    return column.like(_like(pattern)) if "*" in pattern else column == pattern


def page(
    connection: Connection,
    filters: EventFilters,
    columns: Collection[ColumnElement[Any]],
    *,
    after: Position | None,
    limit: int,
    scan_rows_max: int = SCAN_ROWS_MAX,
) -> EventPage:
    """Return *columns* of up to *limit* events, newest received first, from behind the place *after*."""
    few = few_of(connection, filters, scan_rows_max=scan_rows_max)
    if few is not None:
        return _page(connection, _of_few(few, filters, columns, after).limit(limit + 1), limit)
    scanned = scan_rows_max if filters.is_narrow else limit + 1
    window = _window(connection, filters, after, scanned)
    if window is None:
        return EventPage([], None)
    found = _page(connection, _of_window(window, filters, columns).limit(limit + 1), limit)
    if found.following is not None or not filters.is_narrow:
        return found
    end = connection.execute(select(window).order_by(*_newest(window)).offset(scanned - 1)).first()
    return EventPage(found.rows, None if end is None else Position(*end))


def latest(
    connection: Connection, filters: EventFilters, columns: Collection[ColumnElement[Any]], *, limit: int
) -> list[dict[str, Any]]:
    """Return *columns* of the *limit* events that were received last, however far back they are."""
    rows: list[dict[str, Any]] = []
    found = EventPage([], None)
    while len(rows) < limit:
        found = page(connection, filters, columns, after=found.following, limit=limit - len(rows))
        rows += found.rows
        if found.following is None:
            break
    return rows


def following(
    connection: Connection, filters: EventFilters, columns: Collection[ColumnElement[Any]], *, after: int, limit: int
) -> list[dict[str, Any]]:
    """Return *columns* of the first *limit* events with a number above *after*, in the order of their numbers.

    An event with a lower number may be committed later.
    """
    wanted = (_events.c.seq > after, *filters.conditions)
    query = select(*columns).where(*wanted).order_by(_events.c.seq).limit(limit)
    return [dict(row) for row in connection.execute(query).mappings()]


def _page(connection: Connection, query: Select[Any], limit: int) -> EventPage:
    rows = [dict(row) for row in connection.execute(query).mappings()]
    places = [Position(row.pop("at_received"), row.pop("at_seq")) for row in rows]
    return EventPage(rows[:limit], places[limit - 1] if len(rows) > limit else None)


def _newest(table: FromClause) -> list[ColumnElement[Any]]:
    return [table.c.received_at.desc(), table.c.seq.desc()]


def _is_behind(table: FromClause, place: Position | None) -> list[ColumnElement[bool]]:
    if place is None:
        return []
    at, seq = literal(place.received_at, DateTime(timezone=True)), literal(place.seq, BigInteger)
    return [tuple_(table.c.received_at, table.c.seq) < tuple_(at, seq)]


def _selected(columns: Collection[ColumnElement[Any]], place: FromClause) -> Select[Any]:
    places = (place.c.received_at.label("at_received"), place.c.seq.label("at_seq"))
    return select(*columns, *places).order_by(*_newest(place))


# ---- Few events ----


def few_of(
    connection: Connection, filters: EventFilters, *, scan_rows_max: int = SCAN_ROWS_MAX
) -> Select[Any] | None:  # fmt: skip
    """Return a query of the numbers of events among which are all that *filters* want, None where there may be many."""
    if filters.object_id is not None:
        return _of_object(filters)
    if filters.cause == "set_aside":
        return _set_aside()
    return next((few for few in _perhaps_few(filters) if _is_few(connection, few, scan_rows_max)), None)


def waiting(filters: EventFilters) -> Select[Any]:
    """Return a query of the numbers of events among which are all that *filters* want, however many there are.

    The filters want parked events alone, or pending ones alone.
    """
    if filters.object_id is not None:
        return _of_object(filters)
    found = _pending() if filters.state == "pending" else _of_outcome("parked")
    # An order would keep PostgreSQL from joining them as it sees fit.
    return found.order_by(None)


def _of_object(filters: EventFilters) -> Select[Any]:
    wanted = lookup.of_object(str(filters.object_id), account=filters.account, livemode=filters.livemode)
    return select(_inbox.c.seq).where(*wanted)


def _of_outcome(state: str) -> Select[Any]:
    seq = tables.outcomes.c.seq
    return select(seq).where(tables.outcomes.c.state == literal(state, literal_execute=True)).order_by(seq)


def _pending() -> Select[Any]:
    return select(tables.pending.c.seq).order_by(tables.pending.c.seq)


def _set_aside() -> Select[Any]:
    word = _inbox.alias("word")
    same = (_inbox.c.account == word.c.account, _inbox.c.livemode == word.c.livemode, _inbox.c.id == word.c.object_id)
    return select(_inbox.c.seq).select_from(_inbox.join(word, and_(*same))).where(word.c.type == EVENT_IGNORED)


def _perhaps_few(filters: EventFilters) -> Iterator[Select[Any]]:
    """Yield queries of the numbers of events that an index finds, in the order of this index."""
    if filters.state == "parked" or filters.cause in tables.PARKED_CAUSES:
        yield _of_outcome("parked")
    if filters.state == "pending" or filters.cause in tables.PENDING_CAUSES:
        yield _pending()
    if filters.state == "ignored" or filters.cause in tables.IGNORED_CAUSES:
        yield _of_outcome("ignored")
    if filters.account is not None or filters.livemode is not None:
        wanted = lookup.in_world(_inbox, account=filters.account, livemode=filters.livemode)
        yield select(_inbox.c.seq).where(*wanted).order_by(_inbox.c.account, _inbox.c.livemode, _inbox.c.id)


def _is_few(connection: Connection, some: Select[Any], scan_rows_max: int) -> bool:
    counted = select(func.count()).select_from(some.limit(scan_rows_max + 1).subquery())
    return int(connection.execute(counted).scalar_one()) <= scan_rows_max


def _of_few(
    few: Select[Any], filters: EventFilters, columns: Collection[ColumnElement[Any]], after: Position | None
) -> Select[Any]:
    wanted = (_events.c.seq.in_(few), *filters.conditions, *_is_behind(_events, after))
    return _selected(columns, _events).where(*wanted)


# ---- Events in the order of the list ----


def _window(
    connection: Connection, filters: EventFilters, after: Position | None, scan_rows_max: int
) -> FromClause | None:  # fmt: skip
    """Return the places of the events that a page looks at; None where there are none."""
    wanted = [*filters.within(_inbox), *_is_behind(_inbox, after)]
    places = select(_inbox.c.received_at, _inbox.c.seq).where(*wanted).order_by(*_newest(_inbox)).limit(scan_rows_max)
    kinds = None if filters.source in _RARE_SOURCES else _kinds(connection, filters)
    if kinds == []:
        return None
    if kinds is not None:
        # A query for each type, which PostgreSQL merges in their order.
        each = union_all(*(select(places.where(_inbox.c.type == kind).subquery()) for kind in kinds)).subquery()
        return select(each).order_by(*_newest(each)).limit(scan_rows_max).subquery()
    if filters.source not in (None, "webhook"):
        # Written out, so that PostgreSQL knows that the partial index has these events.
        places = places.where(_inbox.c.source == literal(filters.source, literal_execute=True))
    return places.subquery()


def _of_window(window: FromClause, filters: EventFilters, columns: Collection[ColumnElement[Any]]) -> Select[Any]:
    event = select(*columns).where(_events.c.seq == window.c.seq, *filters.conditions)
    # The offset keeps this at one look for each event, no matter what the planner estimates.
    of_each = event.offset(0).lateral("event")
    return _selected(list(of_each.c), window).select_from(window.join(of_each, true()))


def _kinds(connection: Connection, filters: EventFilters) -> list[str] | None:
    """Return the types in the inbox that *filters* want; None where these are all, or more than ``TYPES_MAX``."""
    if filters.type is not None and "*" not in filters.type:
        return [filters.type]
    thin = _THIN if filters.cause == "thin_event" else None
    pattern = thin if filters.type is None else _like(filters.type)
    if pattern is None:
        return None
    found = list(connection.scalars(_TYPES, {"pattern": pattern, "limit": TYPES_MAX + 1}))
    return None if len(found) > TYPES_MAX else found


# Reads one index entry for each type.
_TYPES: Final = text("""
WITH RECURSIVE kinds AS (
    SELECT min(type) AS type FROM inbox
    UNION ALL
    SELECT (SELECT min(i.type) FROM inbox AS i WHERE i.type > kinds.type) FROM kinds WHERE kinds.type IS NOT NULL
)
SELECT type FROM kinds WHERE type LIKE :pattern LIMIT :limit
""")
