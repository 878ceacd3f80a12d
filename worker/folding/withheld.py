"""Counts the changes that are withheld from the feed, by reason, and releases them.

Note [What is released is new]
    A reader's cursor is past the old number of a withheld change. So the change is appended again with a new number,
    under the lock to append, and the old row is deleted in the same transaction. At each moment exactly one of the two
    is there.

Note [What is overtaken stays withheld]
    The last change of a subject must show its present state. If the feed has order.paid, releasing an earlier
    order.opened after it would be wrong, and so would be an older balance after a newer one. So within each line of
    changes of one subject, no change is released behind a change of a later time. That later change may be withheld
    too, with a lower number, because a rename joins two histories.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, FromClause, and_, delete, exists, func, insert, select

from schemas import database, tables
from schemas.change_rows import IN_FEED
from schemas.feed import Selection
from schemas.kinds import Kind
from schemas.locks import keep_others_from_appending, share_folding
from schemas.progress import do_nothing

RELEASE_BATCH_MAX: Final = 5_000
"""Changes that are released in one transaction. Folding waits for that transaction."""
_REFUNDS: Final[Kind] = "order.refund_changed"
"""This kind is a line of its own. All other kinds of a subject are one line, where each overtakes the earlier ones."""
_CORRECTED: Final[Kind] = "order.corrected"
"""A correction may name an older event than the change that it corrects, so its number counts and not its time."""

_changes: Final = tables.changes


@dataclass(frozen=True, slots=True)
class WithheldChanges:
    """The withheld changes of a *selection* with a deciding event that was created at *since* or later."""

    selection: Selection
    since: datetime | None = None

    @property
    def condition(self) -> ColumnElement[bool]:
        """The condition that a change is withheld and belongs to the selection."""
        chosen = [_changes.c[name].in_(values) for name, values in self.selection.values.items()]
        dated = [] if self.since is None else [_changes.c.at >= self.since]
        return and_(_changes.c.withheld.is_not(None), *chosen, *dated)


def counts(
    connection: Connection, wanted: WithheldChanges, *, overtaken: bool | None = None
) -> Sequence[dict[str, Any]]:
    """Return how many changes are withheld, by reason and kind, with their earliest and their latest time.

    With *overtaken* true or false, only the changes that are overtaken, or that are not, are counted.
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
    wanted: WithheldChanges,
    *,
    progress: Callable[[int], None] = do_nothing,
    batch_max: int = RELEASE_BATCH_MAX,
) -> int:
    """Append the *wanted* changes that are not overtaken to the feed, in their old order, and return how many.

    If the process is killed, each change is either in the feed or withheld. *progress* gets the number released so far.
    """
    released = 0
    while (batch := _release_batch(engine, wanted, batch_max)) > 0:
        released += batch
        progress(released)
    return released


def _release_batch(engine: Engine, wanted: WithheldChanges, batch_max: int) -> int:
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        # Folding takes this lock too. It keeps a release apart from an import, which withholds the changes it appends.
        share_folding(cursor)
        keep_others_from_appending(cursor)
        oldest = select(_changes.c.seq).where(wanted.condition, ~_OVERTAKEN).order_by(_changes.c.seq).limit(batch_max)
        batch = oldest.correlate(None).scalar_subquery()
        gone = delete(_changes).where(_changes.c.seq.in_(batch)).returning(_changes).cte("gone")
        again = select(*(gone.c[name] for name in IN_FEED)).order_by(gone.c.seq)
        statement = insert(_changes).from_select(IN_FEED, again).execution_options(preserve_rowcount=True)
        return connection.execute(statement).rowcount


def _overtaken() -> ColumnElement[bool]:
    """Return the condition that the feed has a later change of the same line, or would get it first."""
    later = _changes.alias("later")
    subject = ("account", "livemode", "subject", "subject_id")
    same = [later.c[name] == _changes.c[name] for name in subject]
    comes_before = later.c.withheld.is_(None) | (later.c.seq < _changes.c.seq)
    return exists().where(*same, comes_before, _is_later_step(later) | _is_other_word(later))


def _is_later_step(later: FromClause) -> ColumnElement[bool]:
    line = (later.c.kind == _changes.c.kind) | (later.c.kind != _REFUNDS) & (_changes.c.kind != _REFUNDS)
    # A customer has one balance in each currency.
    one, other = (table.c.after["currency"].astext for table in (later, _changes))
    balance = (_changes.c.subject != "balance") | (one == other)
    is_step = (later.c.kind != _CORRECTED) & (_changes.c.kind != _CORRECTED)
    return and_(line, balance, is_step, later.c.at > _changes.c.at)


def _is_other_word(later: FromClause) -> ColumnElement[bool]:
    """Return the condition that one of the two changes is a correction, and makes the other one outdated."""
    is_line = (later.c.kind != _REFUNDS) & (_changes.c.kind != _REFUNDS) & (later.c.seq > _changes.c.seq)
    # A correction follows the change that it corrects, even if that change was released with a newer number.
    was = later.c.after.op("-")("lines")
    corrects = (_changes.c.kind == _CORRECTED) & was.is_distinct_from(_changes.c.before)
    one, other = (table.c.after["status"].astext for table in (later, _changes))
    # If a correction left the status and changed only the amount, the payment is still released, to be announced once.
    steps_back = (later.c.kind == _CORRECTED) & (_changes.c.kind != _CORRECTED) & one.is_distinct_from(other)
    return and_(is_line, corrects | steps_back)


_OVERTAKEN: Final = _overtaken()
