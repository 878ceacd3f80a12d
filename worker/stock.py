"""What an expired order gives back: its items, told with the change, so that the shop can release its stock."""

from collections.abc import Sequence
from typing import Any, Final

from schemas.database import Cursor

_LINES: Final = """
SELECT o.account, o.livemode, o.id,
    coalesce(
        jsonb_agg(jsonb_build_object('price', l.price, 'product', l.product, 'quantity', l.quantity) ORDER BY l.id)
            FILTER (WHERE l.id IS NOT NULL),
        '[]'
    )
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
JOIN orders AS o USING (account, livemode, id)
LEFT JOIN order_lines AS l ON (l.account, l.livemode, l.order_id) = (o.account, o.livemode, o.id)
WHERE o.lines_complete
GROUP BY o.account, o.livemode, o.id
"""


def add_lines(cursor: Cursor, changes: Sequence[dict[str, Any]]) -> None:
    """Add to each ``order.expired`` of *changes* the order's lines as they are at rest, null where not all are known.

    A line is told by its price, product and quantity; of the buyer nothing is told.
    """
    expired = [change for change in changes if change["kind"] == "order.expired"]
    if not expired:
        return
    columns = [[change[name] for change in expired] for name in ("account", "livemode", "subject_id")]
    cursor.execute(_LINES, columns)
    known = {(account, livemode, order): lines for account, livemode, order, lines in cursor.fetchall()}
    for change in expired:
        lines = known.get((change["account"], change["livemode"], change["subject_id"]))
        change["after"] = {**change["after"], "lines": lines}
