"""Finds saved rows by their keys.

Note [A row is found by its key, by any plan]
    A batch needs some hundred rows of a table that grows during the folding. If the table was small when PostgreSQL
    last analyzed it, the planner would read and hash all of it. A lateral subquery with an OFFSET is not merged into a
    join, so each key is one probe of an index. The cost of a batch then does not depend on the size of the table.

    So one plan is right for all values, and to plan a statement again for each batch takes a tenth of what PostgreSQL
    does for a batch. ``probe_indexes`` lets PostgreSQL keep the first plan. That plan may have been made while the
    table was empty, so it must not scan tables, cheap as that was then. And the subquery has no condition of a
    partial index with another key: while that is empty it looks cheaper than the right one, and would be read by
    account and mode alone until the table is analyzed. The rows of an object that are to be deleted are found in
    this way too, and are then deleted by their places. A few statements, of copies and of what is owed, join without
    such a subquery. A test looks at the plans of all but the latter, made of empty tables and of small ones.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache

from psycopg import sql
from psycopg.rows import dict_row

from schemas import tables
from schemas.database import ONE_PLAN, Cursor, text_array, world_arrays
from worker import folds
from worker.folds.facts import Row, Subject


def probe_indexes(cursor: Cursor) -> None:
    """Let the statements of this transaction keep their first plans, which read a whole table only without an index.

    See Note [A row is found by its key, by any plan].
    """
    cursor.execute(ONE_PLAN)


def load_rows(cursor: Cursor, subjects: Iterable[Subject]) -> dict[Subject, Row]:
    """Return the saved rows of *subjects*. Subjects without a row are left out."""
    found: dict[Subject, Row] = {}
    for table, keys in by_table(subjects).items():
        names = key_names(table)
        wanted = {(key.account, key.livemode, *key.key): key for key in keys}
        with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
            rows.execute(_rows_by_key(table), key_arrays(keys))
            for row in rows:
                found[wanted[tuple(row[name] for name in names)]] = row
    return found


@cache
def _rows_by_key(table: str) -> bytes:
    names = key_names(table)
    statement = sql.SQL(
        "SELECT t.* FROM {keys} CROSS JOIN LATERAL (SELECT {columns} FROM {table} AS t WHERE {same} OFFSET 0) AS t"
    )
    # Named, since a prepared statement fails once where a newer release has added a column.
    columns = listed([column.name for column in tables.metadata.tables[table].columns])
    return statement.format(
        keys=key_rows(names), columns=columns, table=sql.Identifier(table), same=same(names)
    ).as_bytes()


def key_names(table: str) -> tuple[str, ...]:
    """Return the columns of the key of *table*, as they name the subject of a row."""
    return ("account", "livemode", *folds.ROW_SPECS[table].key)


def key_arrays(keys: Sequence[Subject]) -> list[str]:
    """Return the values of *keys*, of one table, an array for each column."""
    columns = zip(*(key.key for key in keys), strict=True)
    return [*world_arrays(keys), *map(text_array, columns)]


def key_rows(names: Sequence[str]) -> sql.Composed:
    """Return SQL that turns keys given as arrays into rows to join with."""
    arrays = sql.SQL(", ").join(sql.SQL("%s::boolean[]" if name == "livemode" else "%s::text[]") for name in names)
    return sql.SQL("unnest({arrays}) AS k ({names})").format(arrays=arrays, names=listed(names))


def listed(names: Sequence[str]) -> sql.Composed:
    """Return the columns *names* as SQL."""
    return sql.SQL(", ").join(map(sql.Identifier, names))


def by_table(subjects: Iterable[Subject]) -> dict[str, list[Subject]]:
    """Return *subjects* by their table."""
    grouped: dict[str, list[Subject]] = defaultdict(list)
    for subject in subjects:
        grouped[subject.table].append(subject)
    return grouped


def same(names: Sequence[str], of_table: Sequence[str] = ()) -> sql.Composed:
    """Return the condition that a row's key is one of those given. *of_table* are the table's own column names."""
    pairs = zip(of_table or names, names, strict=True)
    return sql.SQL(" AND ").join(sql.SQL("t.{} = k.{}").format(*map(sql.Identifier, pair)) for pair in pairs)
