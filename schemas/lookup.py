"""Finding a row by its id alone, however many rows there are.

Note [An id is one account's, and nobody says whose]
    Every key begins with the account and the mode, so that accounts can be dealt out. Who asks by the id alone would
    have a whole index read, in PostgreSQL before 18. There are few accounts, and the index leads from each to the next:
    so they are walked first, and the row is looked up in each.
"""

from functools import cache
from typing import Any, Final

from sqlalchemy import Boolean, Connection, FromClause, RowMapping, Select, Table, bindparam, func, select, true
from sqlalchemy.dialects.postgresql import ARRAY

from schemas import tables

FOUND_MAX: Final = 2
"""Rows that are looked for: one, and another that makes it doubtful which is meant."""
_KEYS: Final = {tables.order_book.name: tables.orders, tables.events.name: tables.inbox}
"""The table whose keys a view's rows have."""


def by_id(
    connection: Connection, table: Table, key: str, *, account: str | None, livemode: bool | None
) -> list[RowMapping]:
    """Return the rows of *table*, or of a view, that have the id *key* in the world that is asked for, at most two."""
    modes = [True, False] if livemode is None else [livemode]
    query = query_of(table, of_account=account is not None)
    return list(connection.execute(query, {"id": key, "modes": modes, "account": account}).mappings())


@cache
def query_of(table: Table, *, of_account: bool) -> Select[Any]:
    """Return the query by ``id``, ``modes`` and, where it is *of_account*, ``account``.

    It is kept, since making it takes as long as asking it.
    """
    modes = (
        func.unnest(bindparam("modes", type_=ARRAY(Boolean))).table_valued("livemode", name="modes").render_derived()
    )
    found = select(table).where(table.c.id == bindparam("id"), table.c.livemode == modes.c.livemode)
    if of_account:
        worlds: FromClause = modes
        found = found.where(table.c.account == bindparam("account"))
    else:
        keys = _KEYS.get(table.name, table)
        accounts = select(func.min(keys.c.account).label("account")).cte("accounts", recursive=True)
        following = select(func.min(keys.c.account)).where(keys.c.account > accounts.c.account).scalar_subquery()
        accounts = accounts.union_all(select(following).where(accounts.c.account.is_not(None)))
        worlds = accounts.join(modes, true())
        found = found.where(table.c.account == accounts.c.account)
    # Behind an offset it stays one look at the index for each, whatever the planner believes.
    of_each = found.offset(0).lateral("found")
    return select(of_each).select_from(worlds.join(of_each, true())).limit(FOUND_MAX)
