"""Keeps the orders and credit notes that are still to be settled, because another transaction held their locks.

See Note [The lock of an order at rest is only tried] in worker/folding/settling.py.
"""

from collections import defaultdict
from collections.abc import Collection
from typing import Final

from schemas.database import Cursor, id_arrays
from worker.folding import settling
from worker.folds.facts import Subject


def owe(cursor: Cursor, subjects: Collection[Subject], withheld: str | None) -> None:
    """Add *subjects* to ``unsettled``. Their changes are *withheld* only if each call for them has such a reason."""
    if subjects:
        cursor.execute(_OWE, (withheld, *id_arrays(subjects)))


_OWE: Final = """
INSERT INTO unsettled AS known (account, livemode, id, withheld)
SELECT account, livemode, id, %s FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
ON CONFLICT (account, livemode, id) DO UPDATE
SET withheld = CASE WHEN excluded.withheld IS NOT NULL THEN known.withheld END
"""


def owed(cursor: Cursor) -> list[Subject]:
    """Return some of the rows that are to be settled. Rows of an account wait while it is being renamed.

    Each is returned as an order and as a credit note, although only one of the two exists.
    """
    cursor.execute(_OWED, (settling.ORDERS_AT_ONCE,))
    return [each for key in cursor.fetchall() for each in _either(*key)]


def _either(account: str, livemode: bool, id_: str) -> list[Subject]:  # noqa: FBT001 - a row of its table
    return [Subject(table, account, livemode, id_) for table in settling.IS_OPEN]


_OWED: Final = """
SELECT account, livemode, id FROM unsettled AS u
WHERE NOT EXISTS (SELECT FROM account_names AS n WHERE n.finished_at IS NULL AND u.account IN (n.old, n.new)) LIMIT %s
"""


def take_owed(cursor: Cursor, subjects: Collection[Subject]) -> dict[str | None, list[Subject]]:
    """Delete *subjects* from ``unsettled``, and return those that were there, by the reason to withhold their changes.

    The caller holds their locks.
    """
    cursor.execute(_TAKE_OWED, id_arrays(subjects))
    found: dict[str | None, list[Subject]] = defaultdict(list)
    for withheld, *key in cursor.fetchall():
        found[withheld] += _either(*key)
    return found


_TAKE_OWED: Final = """
DELETE FROM unsettled AS u USING unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
WHERE (u.account, u.livemode, u.id) = (k.account, k.livemode, k.id)
RETURNING u.withheld, u.account, u.livemode, u.id
"""
