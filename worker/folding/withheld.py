"""Changes that are kept from the feed: how many there are, and why, and their release.

Note [What is released is new]
    A reader's cursor is past the old number of a withheld change. So it is appended again with a new number, under the
    lock of those who append, and the old row goes in the same transaction: at each moment there is one of them.

Note [What is overtaken stays withheld]
    The last change of a subject shows what it now is. A withheld order.opened that came after the order.paid which the
    feed has had, or an older balance after a newer one, would be a lie. Of each line of changes of one subject, none is
    released behind one of a later time, which may be withheld with a lower number: a rename joins two histories.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, FromClause, and_, delete, exists, func, insert, select

from schemas import database, tables
from schemas.feed import Selection
from schemas.kinds import Kind
from worker.folding.claim import keep_others_from_appending, share_folding

RELEASE_BATCH_MAX: Final = 5_000
"""Changes that are released in one transaction, for which folding waits."""
_REFUNDS: Final[Kind] = "order.refund_changed"
"""A line of its own; all other kinds of one subject are one line, in which each overtakes those before."""
_CORRECTED: Final[Kind] = "order.corrected"
"""It may be by an older event than what it corrects, so that its number counts and not its time."""

_changes: Final = tables.changes
_NAMES: Final = [column.name for column in _changes.c if column.name not in ("seq", "withheld")]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which withheld changes are meant: those of a *selection* whose deciding event was created from *since* on."""

    selection: Selection
    since: datetime | None = None

    @property
    def condition(self) -> ColumnElement[bool]:
        """The condition that a change is withheld and meant."""
        chosen = [_changes.c[name].in_(values) for name, values in self.selection.values.items()]
        dated = [] if self.since is None else [_changes.c.at >= self.since]
        return and_(_changes.c.withheld.is_not(None), *chosen, *dated)


def counts(connection: Connection, wanted: Wanted, *, overtaken: bool | None = None) -> Sequence[dict[str, Any]]:
    """Return how many changes are withheld, by reason and kind, with the earliest and the latest of their times.

    Of those that are *overtaken*, or of the others, where that is given.
    """
    at, number = _changes.c.at, func.count().label("changes")
    query = select(
        _changes.c.withheld.label("reason"),
        _changes.c.kind,
        number,
        func.min(at).label("first"),
        func.max(at).label("last"),
    ).where(wanted.condition)
    if overtaken is not None:
        query = query.where(_OVERTAKEN if overtaken else ~_OVERTAKEN)
    grouped = query.group_by(_changes.c.withheld, _changes.c.kind).order_by(_changes.c.withheld, _changes.c.kind)
    return [dict(row) for row in connection.execute(grouped).mappings()]


def release(
    engine: Engine,
    wanted: Wanted,
    *,
    progress: Callable[[int], None] = lambda _: None,
    batch_max: int = RELEASE_BATCH_MAX,
) -> int:
    """Append the *wanted* changes that are not overtaken to the feed, in their old order, and return how many.

    Killed at any point, each of them is either in the feed or withheld. *progress* gets the number released so far.
    """
    released = 0
    while (batch := _release_batch(engine, wanted, batch_max)) > 0:
        released += batch
        progress(released)
    return released


def _release_batch(engine: Engine, wanted: Wanted, batch_max: int) -> int:
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        # As folding does, so that an import that withholds what it appends has not begun, or has ended.
        share_folding(cursor)
        keep_others_from_appending(cursor)
        oldest = select(_changes.c.seq).where(wanted.condition, ~_OVERTAKEN).order_by(_changes.c.seq).limit(batch_max)
        batch = oldest.correlate(None).scalar_subquery()
        gone = delete(_changes).where(_changes.c.seq.in_(batch)).returning(_changes).cte("gone")
        again = select(*(gone.c[name] for name in _NAMES)).order_by(gone.c.seq)
        statement = insert(_changes).from_select(_NAMES, again).execution_options(preserve_rowcount=True)
        return connection.execute(statement).rowcount


def _overtaken() -> ColumnElement[bool]:
    """Return the condition that the feed has had a later change of the same line, or would have it before."""
    later = _changes.alias("later")
    subject = ("account", "livemode", "subject", "subject_id")
    same = [later.c[name] == _changes.c[name] for name in subject]
    comes_before = later.c.withheld.is_(None) | (later.c.seq < _changes.c.seq)
    return exists().where(*same, comes_before, _is_later_step(later) | _is_other_word(later))


def _is_later_step(later: FromClause) -> ColumnElement[bool]:
    line = (later.c.kind == _changes.c.kind) | (later.c.kind != _REFUNDS) & (_changes.c.kind != _REFUNDS)
    # A customer has a balance in each currency.
    one, other = (table.c.after["currency"].astext for table in (later, _changes))
    balance = (_changes.c.subject != "balance") | (one == other)
    is_step = (later.c.kind != _CORRECTED) & (_changes.c.kind != _CORRECTED)
    return and_(line, balance, is_step, later.c.at > _changes.c.at)


def _is_other_word(later: FromClause) -> ColumnElement[bool]:
    """Return the condition that one of the two is a correction, by which the other is no more what is last told."""
    is_line = (later.c.kind != _REFUNDS) & (_changes.c.kind != _REFUNDS) & (later.c.seq > _changes.c.seq)
    # A correction follows what it corrects, though that may have been released with a newer number.
    was = later.c.after.op("-")("lines")
    corrects = (_changes.c.kind == _CORRECTED) & was.is_distinct_from(_changes.c.before)
    one, other = (table.c.after["status"].astext for table in (later, _changes))
    # A payment whose amount alone was corrected is released, so that it is told once.
    steps_back = (later.c.kind == _CORRECTED) & (_changes.c.kind != _CORRECTED) & one.is_distinct_from(other)
    return and_(is_line, corrects | steps_back)


_OVERTAKEN: Final = _overtaken()
