"""The change feed, as the API and the command read it: which changes a reader wants, page by page.

Note [A filtered reader moves on]
    A reader who wants one kind in a thousand would otherwise have the same rows scanned at every request. A page looks
    at a bounded number of rows, and its cursor moves past all of them, wanted or not. A first statement reads how far
    the page looks, and a second one the wanted changes up to there. Numbers appear in the order of their commits, so a
    change that commits between the two statements is beyond that number.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Select, func, select, text

from schemas import tables
from schemas.errors import CursorBeyond

SCAN_ROWS_MAX: Final = 20_000
"""Changes that are looked at for one page of a reader who wants some of them."""

_changes: Final = tables.changes
_shown: Final = _changes.c.withheld.is_(None)


@dataclass(frozen=True, slots=True)
class Selection:
    """The changes that a reader wants: those that have, in every named column, one of the values given for it."""

    values: Mapping[str, Collection[object]]

    def wants(self, change: Mapping[str, Any]) -> bool:
        """Return whether a reader of this selection wants *change*."""
        return all(change[name] in values for name, values in self.values.items())


ALL: Final = Selection({})


def selection(**given: Collection[object] | object | None) -> Selection:
    """Return the selection of changes with the values *given* by column: a set of them, or one; None is any."""
    return Selection(
        {
            name: value if isinstance(value, frozenset) else frozenset((value,))
            for name, value in given.items()
            if value is not None
        }
    )


@dataclass(frozen=True, slots=True)
class FeedPage:
    """Changes, the cursor after all rows that were looked at, and whether there are more rows to look at."""

    rows: Sequence[Mapping[str, Any]]
    next_after: int
    has_more: bool


def page(
    connection: Connection, after: int, limit: int, wanted: Selection = ALL, *, scan_rows_max: int = SCAN_ROWS_MAX
) -> FeedPage:
    """Return up to *limit* changes after the number *after*, in their order.

    A page may be empty and have more behind it, where none of the rows that were looked at is *wanted*.

    Raises:
        CursorBeyond: no number as great as *after* has ever been given.
    """
    if wanted == ALL:
        found = _rows(connection, _following(after, limit + 1))
        reached, is_all = after, True
    else:
        reached, is_all = _reach(connection, after, scan_rows_max)
        found = _rows(connection, query_of(wanted, after, reached, limit + 1, scan_rows_max))
    if reached == after and not found:
        _require_given(connection, after)
    rows = found[:limit]
    if len(found) > limit or (rows and wanted == ALL):
        reached = rows[-1]["seq"]
    return FeedPage(rows, reached, has_more=len(found) > limit or not is_all)


def latest(connection: Connection, after: int, limit: int) -> Sequence[Mapping[str, Any]]:
    """Return the columns for selecting, of up to *limit* changes after the number *after*, in their order."""
    names = ("seq", "account", "livemode", "subject", "subject_id", "kind")
    query = select(*(_changes.c[name] for name in names)).where(_shown, _changes.c.seq > after)
    return _rows(connection, query.order_by(_changes.c.seq).limit(limit))


def _rows(connection: Connection, query: Select[Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(query).mappings()]


def _following(after: int, limit: int) -> Select[Any]:
    return select(_changes).where(_shown, _changes.c.seq > after).order_by(_changes.c.seq).limit(limit)


def _reach(connection: Connection, after: int, scan_rows_max: int) -> tuple[int, bool]:
    """Return how far a page after *after* looks, and whether nothing is there beyond it."""
    looked_at = _following(after, scan_rows_max).with_only_columns(_changes.c.seq).subquery()
    last, count = connection.execute(select(func.max(looked_at.c.seq), func.count()).select_from(looked_at)).one()
    return after if last is None else last, count < scan_rows_max


def query_of(wanted: Selection, after: int, reached: int, limit: int, scan_rows_max: int) -> Select[Any]:
    """Return the query of the *wanted* changes; the limit on the inner query makes PostgreSQL read rows by number."""
    looked_at = _following(after, scan_rows_max).where(_changes.c.seq <= reached).subquery()
    conditions = [looked_at.c[name].in_(values) for name, values in wanted.values.items()]
    return select(looked_at).where(*conditions).order_by(looked_at.c.seq).limit(limit)


# The sequence itself, since the last number may have been of a change that was rolled back, or withheld.
_LAST_GIVEN: Final = text("SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM changes_seq_seq")


def _require_given(connection: Connection, after: int) -> None:
    last = 0 if after == 0 else connection.execute(_LAST_GIVEN).scalar_one()
    if after > last:
        raise CursorBeyond(after, last)
