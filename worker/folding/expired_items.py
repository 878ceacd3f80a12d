"""Adds an order's items to its change: those of a paid order to be sent, those of an expired one to be put back."""

from collections.abc import Sequence
from typing import Final

from schemas import change_rows
from schemas.change_rows import ChangeRow
from schemas.database import Cursor

# See Note [A row is found by its key, by any plan].
_LINES: Final = """
SELECT k.account, k.livemode, k.id, l.lines
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
CROSS JOIN LATERAL (
    SELECT jsonb_agg(
        jsonb_build_object('price', l.price, 'product', l.product, 'quantity', l.quantity) ORDER BY l.id
    ) AS lines
    FROM (
        SELECT * FROM order_lines AS l WHERE (l.account, l.livemode, l.order_id) = (k.account, k.livemode, k.id)
        OFFSET 0
    ) AS l
) AS l
WHERE l.lines IS NOT NULL
"""


def add_lines(cursor: Cursor, changes: Sequence[ChangeRow]) -> None:
    """Fill the ``lines`` of *changes* from the saved lines, if the order's lines are complete.

    A line is its price, product and quantity. It holds nothing about the buyer.
    """
    chosen = [change for change in changes if change["after"].get("lines") is not None]
    if not chosen:
        return
    cursor.execute(
        _LINES,
        change_rows.arrays(chosen, "subject_id"),
    )
    known = {(account, livemode, order): lines for account, livemode, order, lines in cursor.fetchall()}
    for change in chosen:
        lines = known.get((change["account"], change["livemode"], change["subject_id"]), [])
        change["after"] = {**change["after"], "lines": lines}
