"""Relabels the rows of tables for a rename: see logs/renaming.py."""

from collections.abc import Callable, Sequence
from typing import Final

from psycopg import sql
from sqlalchemy import Table

from schemas import tables
from schemas.database import Cursor

ROWS_AT_ONCE: Final = 5_000
MOVED: Final = (
    tables.inbox, tables.renderings, tables.mentions, tables.unsettled, tables.stripe_calls, tables.stripe_jobs,
    tables.anomalies, tables.changes, *tables.PROJECTIONS, *tables.SUMS,
)  # fmt: skip
"""Every table that names an account."""


def mover_of(table: Table) -> Callable[[Cursor, dict[str, str]], int]:
    """Return a function that relabels some rows of *table*, and drops rows that the new name has too."""
    keys = [column.name for column in table.primary_key if column.name != "account"]
    statement = sql.SQL(
        """
        WITH few AS MATERIALIZED (SELECT {keys} FROM {table} WHERE account = %(old)s ORDER BY {keys} LIMIT {limit}),
        doubled AS (
            DELETE FROM {table} AS t USING few AS s WHERE t.account = %(old)s AND {same}
                AND EXISTS (SELECT FROM {table} AS n WHERE n.account = %(new)s AND {same_as_new})
        ), moved AS (
            UPDATE {table} AS t SET account = %(new)s FROM few AS s WHERE t.account = %(old)s AND {same}
                AND NOT EXISTS (SELECT FROM {table} AS n WHERE n.account = %(new)s AND {same_as_new})
        )
        SELECT count(*) FROM few
        """
    ).format(
        table=sql.Identifier(table.name),
        keys=sql.SQL(", ").join(map(sql.Identifier, keys)),
        limit=sql.Literal(ROWS_AT_ONCE),
        same=_equal("t", "s", keys),
        same_as_new=_equal("n", "t", keys),
    )

    def move(cursor: Cursor, names: dict[str, str]) -> int:
        cursor.execute(statement, names)
        (count,) = cursor.fetchone() or (0,)
        return int(count)

    return move


def _equal(one: str, other: str, names: Sequence[str]) -> sql.Composed:
    pairs = (sql.SQL("{} = {}").format(sql.Identifier(one, name), sql.Identifier(other, name)) for name in names)
    return sql.SQL(" AND ").join(pairs)


# Each job is set back to the lesser progress of the two names, and looks again at all that comes after it. If a name
# has no row, its job had not begun: it has seen none of its changes, though the other name's job is past their numbers.
JOBS: Final = (
    """
    INSERT INTO stripe_jobs (account, livemode, job)
    SELECT %(old)s, n.livemode, n.job FROM stripe_jobs AS n WHERE n.account = %(new)s AND n.job = 'fetch'
    ON CONFLICT DO NOTHING
    """,
    """
    UPDATE stripe_jobs AS n SET
        reached_at = CASE WHEN n.reached_at IS NOT NULL AND o.reached_at IS NOT NULL
            THEN least(n.reached_at, o.reached_at) END,
        reached_seq = CASE WHEN n.reached_seq IS NOT NULL THEN least(n.reached_seq, coalesce(o.reached_seq, (
            SELECT min(c.seq) - 1 FROM changes AS c WHERE (c.account, c.livemode) = (%(old)s, o.livemode)
        ))) END,
        done_at = greatest(n.done_at, o.done_at), found = n.found + o.found
    FROM stripe_jobs AS o
    WHERE n.account = %(new)s AND o.account = %(old)s AND (n.livemode, n.job) = (o.livemode, o.job)
    """,
    """
    DELETE FROM stripe_jobs AS o USING stripe_jobs AS n
    WHERE n.account = %(new)s AND o.account = %(old)s AND (n.livemode, n.job) = (o.livemode, o.job)
    """,
    "UPDATE stripe_jobs SET account = %(new)s, leased_until = NULL WHERE account = %(old)s",
)
# If an anomaly is in force under either name, it stays in force until its row is folded again.
ANOMALIES: Final = (
    """
    UPDATE anomalies AS n SET
        resolved_at = CASE WHEN o.resolved_at IS NOT NULL THEN n.resolved_at END, seen_at = least(n.seen_at, o.seen_at)
    FROM anomalies AS o
    WHERE n.account = %(new)s AND o.account = %(old)s AND (n.livemode, n.id) = (o.livemode, o.id)
    """,
    """
    DELETE FROM anomalies AS o USING anomalies AS n
    WHERE n.account = %(new)s AND o.account = %(old)s AND (n.livemode, n.id) = (o.livemode, o.id)
    """,
    "UPDATE anomalies SET account = %(new)s WHERE account = %(old)s",
)
# The sums follow the rows, so all that is left under the old name adds up to nothing.
SUMS: Final = tuple(f"DELETE FROM {table.name} WHERE account = %(old)s" for table in tables.SUMS)
BOUNDS: Final = "SELECT coalesce(min(seq), 0), coalesce(max(seq), -1) FROM changes WHERE account = %(old)s"
_ONE_SHOT: Final = f"""
o.seq BETWEEN %(first)s AND %(last)s AND o.account = %(old)s AND n.account = %(new)s
AND (n.livemode, n.subject, n.subject_id, n.kind) = (o.livemode, o.subject, o.subject_id, o.kind)
AND (
    n.kind IN ({", ".join(f"'{kind}'" for kind in tables.ONE_SHOT_KINDS)})
    OR n.kind = '{tables.DISPUTE_CLOSED}' AND n.after ->> 'status' = o.after ->> 'status'
)
"""
# If both names have a change that may happen only once, the one that was announced stays.
CHANGES: Final = (
    f"DELETE FROM changes AS n USING changes AS o WHERE {_ONE_SHOT} AND n.withheld IS NOT NULL AND o.withheld IS NULL",
    f"DELETE FROM changes AS o USING changes AS n WHERE {_ONE_SHOT}",
    "UPDATE changes SET account = %(new)s WHERE seq BETWEEN %(first)s AND %(last)s AND account = %(old)s",
)
