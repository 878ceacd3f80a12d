"""One row by its id, by the driver alone: for a command that shows it, which starts sooner without SQLAlchemy.

It finds the same row as ``schemas.lookup``, in the same way: see Note [An id is looked up in every account] there.
"""

from collections.abc import Sequence
from typing import Any, Final

from psycopg.rows import dict_row
from psycopg.sql import SQL, Identifier

from schemas.database import Driver

ORDER: Final = (
    *("account", "livemode", "id", "status", "session_status", "payment_status", "mode", "currency"),
    *("amount_subtotal", "amount_discount", "amount_shipping", "amount_tax", "amount_total"),
    *("presentment_currency", "presentment_amount", "customer", "customer_email", "client_reference_id"),
    *("payment_link", "payment_intent", "subscription", "invoice", "recovered_from", "recovery_url", "shipping"),
    *("metadata", "created", "expires_at", "completed_at", "paid_at", "failed_at", "expired_at", "lines_complete"),
    *("event_id", "as_of"),
)
"""The columns of an order, in the order in which they are shown; a test holds them against the table."""

_OF_ONE = SQL("WITH accounts AS (SELECT %(account)s::text AS account)")
_OF_ALL = SQL(
    """WITH RECURSIVE accounts AS (
    SELECT min(account) AS account FROM {table} UNION ALL
    SELECT (SELECT min(account) FROM {table} WHERE account > accounts.account) FROM accounts WHERE account IS NOT NULL
)"""
)
# The offset keeps this at one look at the index for each world, no matter what the planner estimates.
_FOUND = SQL(
    """{accounts} SELECT found.* FROM accounts CROSS JOIN unnest(%(modes)s::boolean[]) AS modes (livemode)
CROSS JOIN LATERAL (
    SELECT {columns} FROM {table}
    WHERE id = %(id)s AND livemode = modes.livemode AND account = accounts.account OFFSET 0
) AS found LIMIT 2"""
)


def by_id(
    driver: Driver, table: str, columns: Sequence[str], key: str, *, account: str | None, livemode: bool | None
) -> list[dict[str, Any]]:
    """Return *columns* of the rows of *table* with the id *key* in the world that is asked for, at most two."""
    named = Identifier(table)
    accounts = _OF_ALL.format(table=named) if account is None else _OF_ONE
    shown = SQL(", ").join(map(Identifier, columns))
    values = {"id": key, "account": account, "modes": [True, False] if livemode is None else [livemode]}
    with driver.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_FOUND.format(accounts=accounts, columns=shown, table=named), values).fetchall()
