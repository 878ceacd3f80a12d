"""Changes that rows imply are appended to the feed, each once.

Note [Changes come in commit order]
    A reader of ``changes`` keeps the last number it saw. Numbers are drawn before the commit, so a slower
    transaction could bring a smaller one to light later. Hence one lock, taken directly before the numbers
    are drawn and held to the commit that follows at once. What follows from the rows of several objects is looked
    for under that lock too: see Note [Whoever comes second sees the other].
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from psycopg import sql

from schemas import tables
from schemas.database import Cursor, boolean_array, text_array
from worker import folds
from worker.folding import copy_rows, corrections, expired_items, order_refunds
from worker.folding.batch import Object, Reasons, Saved
from worker.folding.claim import keep_others_from_appending
from worker.folding.order_refunds import Moved
from worker.folds.checkout_session import CORRECTED
from worker.folds.facts import Change, Row, Subject
from worker.folds.join import Joined


def announce(cursor: Cursor, saved: Saved, reasons: Reasons) -> None:
    """Append what the rows that were *saved* imply, withheld where there is a reason."""
    begun = saved.known | corrections.openings(cursor, saved.rows, saved.known)
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
    expired_items.add_lines(cursor, found)
    moved = _moved(saved, reasons)
    if found or any(moved.values()):
        keep_others_from_appending(cursor)
    append_changes(cursor, found + _refund_changes(cursor, moved))


def _implied(
    subject: Subject, joined: Joined, before: Row | None, saved: Saved
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


def _moved(saved: Saved, reasons: Reasons) -> dict[str | None, list[Moved]]:
    """Return what may have moved the refunds of orders, by the reason why that is withheld, news first."""
    if reasons.is_one:
        moved = [*order_refunds.moved(saved.rows, saved.known), *order_refunds.vanished(saved.gone, saved.known)]
        return {reasons.of_all: moved}
    rows: dict[str | None, dict[Subject, Joined]] = defaultdict(dict, {None: {}})
    gone: dict[str | None, list[Subject]] = defaultdict(list)
    for subject, joined in saved.rows.items():
        rows[reasons.of(subject, joined)][subject] = joined
    for subject in saved.gone:
        gone[reasons.of(subject, None)].append(subject)
    return {
        reason: [*order_refunds.moved(rows[reason], saved.known), *order_refunds.vanished(gone[reason], saved.known)]
        for reason in [*rows, *(gone.keys() - rows.keys())]
    }


def _refund_changes(cursor: Cursor, moved: Mapping[str | None, list[Moved]]) -> list[dict[str, Any]]:
    """Return how the refunds of orders changed; withheld is what nothing but known history moved."""
    found: dict[Object, dict[str, Any]] = {}
    for reason, rows in moved.items():
        for row in order_refunds.changes(cursor, rows):
            found.setdefault((row["account"], row["livemode"], row["subject_id"]), {**row, "withheld": reason})
    return list(found.values())


def _named_by(joined: Joined) -> dict[str, object]:
    """Return which event a change of the row *joined* names: the one that decided its state."""
    by = joined.decided_by
    if by is not None:
        return {"event_id": by.event_id, "source": by.source, "at": by.at}
    return {"event_id": joined.row["event_id"], "source": joined.source, "at": joined.row["as_of"]}


def append_changes(cursor: Cursor, found: list[dict[str, Any]], withheld: str | None = None) -> None:
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
        settled = corrections.against_the_feed(cursor, rows)
        cursor.execute(_APPEND, (msgspec.json.encode(settled).decode(),))
    else:
        copy_rows.into(cursor, sql.Identifier("changes"), _CHANGES.columns, map(_CHANGES.line, rows))


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
_CHANGES: Final = copy_rows.Form(
    tables.changes,
    ("account", "livemode", "subject", "subject_id", "kind", "event_id", "source", "at", "before", "after", "withheld"),
)
