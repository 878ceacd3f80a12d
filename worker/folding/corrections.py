"""Compares an order's new state with the last one that the feed announced, and corrects the feed if needed.

Note [The feed's last word of an order is its row]
    A fold compares a row with the row before it, but a reader acts on the announcements of the feed, and the two may
    differ. A row that was deleted because its only event was ignored has no row before it when it comes back, and a
    one-shot that the feed has is not announced again. So the changes that a fold finds are compared with the order's
    last one-shot or correction, under the lock to append changes. Withheld changes count as announced, because they may
    be released.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from schemas import change_rows, tables
from schemas.change_rows import ChangeRow
from schemas.database import Cursor
from schemas.events import Key
from worker.folding.order_refunds import KIND as REFUND_CHANGED
from worker.folding.rows import key_arrays
from worker.folds import checkout_session
from worker.folds.checkout_session import CORRECTED, KINDS_WITH_LINES
from worker.folds.facts import Row, Subject
from worker.folds.join import Joined

_Announced: TypeAlias = tuple[Mapping[str, Any] | None, Sequence[str]]
"""The last announced state of an order, and the kinds of one-shots that were announced of it."""


def is_of_order(change: ChangeRow) -> bool:
    """Return whether *change* is a step of an order itself, and not of its refunds."""
    return bool(change["subject"] == "order" and change["kind"] != REFUND_CHANGED)


def against_the_feed(cursor: Cursor, found: Sequence[ChangeRow]) -> list[ChangeRow]:
    """Return *found* with each step of an order compared with the feed: kept, dropped, or made a correction.

    The caller keeps others from appending.
    """
    announced = _announced(cursor, [change for change in found if is_of_order(change)])
    return [each for change in found for each in (_settled(change, announced) if is_of_order(change) else [change])]


def _settled(change: ChangeRow, announced: Mapping[Key, _Announced]) -> list[ChangeRow]:
    last, kinds = announced.get((change["account"], change["livemode"], change["subject_id"]), (None, ()))
    kind = checkout_session.kind_of_step(last, change["after"], kinds)
    if kind is None:
        return []
    if kind == change["kind"] != CORRECTED:
        return [change]
    after = {name: value for name, value in change["after"].items() if name != "lines"}
    before = change["before"] if last is None else {name: last.get(name) for name in after}
    # A fold found a correction, but the feed never had the one-shot, so that is sent. Its lines are not loaded here.
    more = {"lines": None} if kind in KINDS_WITH_LINES else {}
    return [{**change, "kind": kind, "before": before, "after": {**after, **more}}]


def _announced(cursor: Cursor, changes: Sequence[ChangeRow]) -> dict[Key, _Announced]:
    """Return what the feed announced of the orders of *changes*. Orders without any announcement are left out."""
    if not changes:
        return {}
    cursor.execute(
        _LAST_ANNOUNCED,
        change_rows.arrays(changes, "subject_id"),
    )
    return {(account, livemode, order): (after, kinds) for account, livemode, order, after, kinds in cursor.fetchall()}


def openings(cursor: Cursor, rows: Mapping[Subject, Joined], known: Mapping[Subject, Row]) -> dict[Subject, Row]:
    """Return the openings of balances among *rows* that have no announced change yet.

    See Note [A currency moves no balance]. The caller holds the lock of each customer, so no change of these balances
    can be announced at the same time.
    """
    found = {subject: joined.opening for subject, joined in rows.items() if joined.opening is not None}
    resting = [subject for subject in found if subject in known]
    if resting:
        cursor.execute(_BALANCES_ANNOUNCED, key_arrays(resting))
        for number, *_ in cursor.fetchall():
            del found[resting[number - 1]]
    return found


_BALANCES_ANNOUNCED: Final = """
SELECT k.number
FROM unnest(%s::text[], %s::boolean[], %s::text[], %s::text[]) WITH ORDINALITY
    AS k (account, livemode, customer, currency, number)
WHERE EXISTS (
    SELECT FROM changes AS c
    WHERE (c.account, c.livemode, c.subject_id) = (k.account, k.livemode, k.customer)
        AND c.kind = 'balance.changed' AND c.after ->> 'currency' = k.currency
    OFFSET 0
)
"""
_OF_AN_ORDER: Final = """
SELECT seq, kind, after FROM changes AS c
WHERE (c.account, c.livemode, c.subject, c.subject_id) = (k.account, k.livemode, 'order', k.id) AND c.kind
"""
# See Note [A row is found by its key, by any plan]; each kind is found by the index of its own.
_LAST_ANNOUNCED: Final = f"""
SELECT k.account, k.livemode, k.id, (array_agg(t.after ORDER BY t.seq DESC))[1], array_agg(t.kind)
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
CROSS JOIN LATERAL (
    ({_OF_AN_ORDER} IN ({", ".join(f"'{kind}'" for kind in tables.ONE_SHOT_KINDS)})
        AND {tables.id_hash("c.subject_id")} = {tables.id_hash("k.id")} OFFSET 0)
    UNION ALL ({_OF_AN_ORDER} = '{CORRECTED}' OFFSET 0)
) AS t
GROUP BY k.account, k.livemode, k.id
"""
