"""Appends the changes that rows imply to the feed, each once.

Note [Changes come in commit order]
    A reader of ``changes`` keeps the last number that it saw. Numbers are drawn before the commit, so a slower
    transaction could make a smaller number visible later. So one lock is taken directly before the numbers are drawn,
    and held to the commit that follows at once. Changes that depend on the rows of several objects are computed under
    that lock too: see Note [The second transaction sees the first].
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from schemas import change_rows, tables
from schemas.change_rows import ChangeRow, DecidingEvent
from schemas.database import Cursor, boolean_array
from schemas.events import Key
from schemas.locks import keep_others_from_appending
from worker import folds
from worker.folding import copy_rows, corrections, expired_items, order_refunds
from worker.folding.batch import Reasons, Saved
from worker.folding.order_refunds import Moved
from worker.folds.checkout_session import CORRECTED
from worker.folds.facts import Change, Row, Subject
from worker.folds.join import Joined


def announce(cursor: Cursor, saved: Saved, reasons: Reasons) -> None:
    """Append the changes that the *saved* rows imply. Changes with one of *reasons* are withheld."""
    begun = saved.known | corrections.openings(cursor, saved.rows, saved.known)
    found: list[ChangeRow] = [
        {
            "account": subject.account,
            "livemode": subject.livemode,
            "subject": folds.ROW_SPECS[subject.table].subject,
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
    if (found or any(moved.values())) and not saved.is_alone:
        keep_others_from_appending(cursor, rows=len(saved.rows))
    append_changes(cursor, found + _refund_changes(cursor, moved))


def _implied(
    subject: Subject, joined: Joined, before: Row | None, saved: Saved
) -> Iterator[tuple[Change, DecidingEvent]]:
    """Yield the changes that the row *joined* implies, each with the event that it names.

    It is a change for every step where the new steps lead from the row before to this one, otherwise one change.
    """
    spec = folds.ROW_SPECS[subject.table]
    changes = spec.changes(before, joined.row if joined.announced is None else joined.announced)
    if not changes:
        return
    world = (subject.account, subject.livemode)
    children = joined.children if spec.child_of is not None else ()
    fresh = [child for child in children if (*world, str(child["event_id"])) in saved.fresh]
    steps = spec.steps(before, joined.row, fresh) if fresh else []
    if not steps:
        yield from ((change, _named_by(joined)) for change in changes)
        return
    for change, child in zip(steps, fresh, strict=True):
        source = saved.fresh[*world, str(child["event_id"])]
        yield change, {"event_id": child["event_id"], "source": source, "at": child["as_of"]}


def _moved(saved: Saved, reasons: Reasons) -> dict[str | None, list[Moved]]:
    """Return the rows that may have changed the refunds of orders, by the reason to withhold that; news come first."""
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


def _refund_changes(cursor: Cursor, moved: Mapping[str | None, list[Moved]]) -> list[ChangeRow]:
    """Return the changes of orders' refunds. A change is withheld only if no row that is news contributed to it."""
    found: dict[Key, ChangeRow] = {}
    for reason, rows in moved.items():
        for row in order_refunds.changes(cursor, rows):
            found.setdefault((row["account"], row["livemode"], row["subject_id"]), {**row, "withheld": reason})
    return list(found.values())


def _named_by(joined: Joined) -> DecidingEvent:
    """Return the event that a change of the row *joined* names: the one that decided the row's state."""
    by = joined.decided_by
    if by is not None:
        return {"event_id": by.event_id, "source": by.source, "at": by.at}
    return {"event_id": joined.row["event_id"], "source": joined.source, "at": joined.row["as_of"]}


def append_changes(cursor: Cursor, found: list[ChangeRow], withheld: str | None = None) -> None:
    """Append the changes *found*, without one-shots that the feed already has.

    *withheld* is a reason to keep them all from the feed. A change may also have such a reason of its own. The caller
    keeps others from appending.
    """
    if not found:
        return
    found.sort(key=lambda row: (row["at"], row["subject"], row["subject_id"]))
    rows = found
    if withheld is not None or any("withheld" not in row for row in found):
        rows = [{**row, "withheld": row.get("withheld") or withheld} for row in found]
    if any(row["kind"] == CORRECTED for row in rows) or _may_be_announced(cursor, rows):
        settled = corrections.against_the_feed(cursor, rows)
        cursor.execute(_APPEND, (msgspec.json.encode(settled).decode(),))
    else:
        _CHANGES.append(cursor, rows)


def _may_be_announced(cursor: Cursor, rows: Sequence[ChangeRow]) -> bool:
    """Return whether the feed may already have one of the changes *rows*.

    That is so if it has a change of the same kind, or any change of an object that had no row before.
    """
    closed = [row for row in rows if row["kind"] == tables.DISPUTE_CLOSED]
    if closed:
        cursor.execute(_CLOSED_BEFORE, change_rows.arrays(closed, "subject_id"))
        if cursor.fetchone() == (True,):
            return True
    is_first = boolean_array(row["before"] is None for row in rows)
    cursor.execute(_TOLD_BEFORE, [*change_rows.arrays(rows, "subject", "subject_id", "kind"), is_first])
    return cursor.fetchone() == (True,)


# A one-shot change is announced once, but an object that is folded again may reach its state a second time. The caller
# holds the lock to append, so no such change can appear after this query.
_TOLD_BEFORE: Final = f"""
SELECT EXISTS (
    SELECT FROM unnest(%s::text[], %s::boolean[], %s::text[], %s::text[], %s::text[], %s::boolean[])
        AS k (account, livemode, subject, subject_id, kind, is_first)
    CROSS JOIN LATERAL (
        SELECT FROM changes AS c WHERE c.kind IN ({", ".join(f"'{kind}'" for kind in tables.ONE_SHOT_KINDS)})
            AND (c.account, c.livemode, c.subject, c.subject_id) = (k.account, k.livemode, k.subject, k.subject_id)
            AND {tables.id_hash("c.subject_id")} = {tables.id_hash("k.subject_id")}
            AND (k.is_first OR c.kind = k.kind)
        OFFSET 0
    ) AS announced
)
"""
# With another status, or with the same.
_CLOSED_BEFORE: Final = f"""
SELECT EXISTS (
    SELECT FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, subject_id)
    CROSS JOIN LATERAL (
        SELECT FROM changes AS c WHERE c.kind = '{tables.DISPUTE_CLOSED}'
            AND (c.account, c.livemode, c.subject_id) = (k.account, k.livemode, k.subject_id)
        OFFSET 0
    ) AS announced
)
"""
_APPEND: Final = f"""
INSERT INTO changes ({change_rows.LISTED}) SELECT {change_rows.LISTED}
FROM json_populate_recordset(NULL::changes, %s)
ON CONFLICT DO NOTHING
"""
_CHANGES: Final = copy_rows.Form(tables.changes, change_rows.COLUMNS)
