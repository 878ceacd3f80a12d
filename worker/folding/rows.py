"""Finds saved rows by their keys, writes rows and deletes them.

Note [A row is found by its key, whatever the planner believes]
    A batch needs some hundred rows of a table that grows during the folding. If the table was small when PostgreSQL
    last analyzed it, the planner would read and hash all of it. A lateral subquery with an OFFSET is not merged into a
    join, so each key is one probe of an index. The cost of a batch then does not depend on the size of the table.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final

import msgspec
from psycopg import sql
from psycopg.rows import dict_row

from schemas import tables
from schemas.database import Cursor, boolean_array, text_array
from worker import folds
from worker.folding import copy_rows
from worker.folding.batch import Saved
from worker.folds.facts import Row, Subject, Value


def load_rows(cursor: Cursor, subjects: Iterable[Subject]) -> dict[Subject, Row]:
    """Return the saved rows of *subjects*. Subjects without a row are left out."""
    found: dict[Subject, Row] = {}
    for table, keys in _by_table(subjects).items():
        names = _key_names(table)
        wanted = {(key.account, key.livemode, *key.key): key for key in keys}
        with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
            rows.execute(_rows_by_key(table), _key_arrays(keys))
            for row in rows:
                found[wanted[tuple(row[name] for name in names)]] = row
    return found


@cache
def _rows_by_key(table: str) -> bytes:
    names = _key_names(table)
    statement = sql.SQL(
        "SELECT t.* FROM {keys} CROSS JOIN LATERAL (SELECT * FROM {table} AS t WHERE {same} OFFSET 0) AS t"
    )
    return statement.format(keys=_key_rows(names), table=sql.Identifier(table), same=_same(names)).as_bytes()


def _key_names(table: str) -> tuple[str, ...]:
    return ("account", "livemode", *folds.ROW_SPECS[table].key)


def _key_arrays(keys: Sequence[Subject]) -> list[str]:
    """Return the values of *keys*, an array for each column."""
    columns = zip(*(key.key for key in keys), strict=True)
    return [*world_arrays(keys), *map(text_array, columns)]


def world_arrays(keys: Sequence[Subject]) -> tuple[str, str]:
    """Return the accounts and modes of *keys*, an array each."""
    return text_array([key.account for key in keys]), boolean_array(key.livemode for key in keys)


def _key_rows(names: Sequence[str]) -> sql.Composed:
    """Return SQL that turns keys given as arrays into rows to join with."""
    arrays = sql.SQL(", ").join(sql.SQL("%s::boolean[]" if name == "livemode" else "%s::text[]") for name in names)
    return sql.SQL("unnest({arrays}) AS k ({names})").format(arrays=arrays, names=_listed(names))


def _listed(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _by_table(subjects: Iterable[Subject]) -> dict[str, list[Subject]]:
    grouped: dict[str, list[Subject]] = defaultdict(list)
    for subject in subjects:
        grouped[subject.table].append(subject)
    return grouped


def save_rows(cursor: Cursor, saved: Saved) -> None:
    """Write the rows of *saved* that differ from the known ones, with their children, and delete the rows gone."""
    moved: dict[str, list[Row]] = defaultdict(list)
    new: dict[str, list[Row]] = defaultdict(list)
    for subject, joined in saved.rows.items():
        known = saved.known.get(subject)
        # A new row is appended: its object is locked, so no one else can have added it. A known row is merged.
        if known is None:
            new[subject.table].append(joined.row)
        elif joined.row != known:
            moved[subject.table].append(joined.row)
        if joined.children:
            moved[folds.ROW_SPECS[subject.table].child] += joined.children
    _drop_strayed_children(cursor, saved)
    for table, rows in new.items():
        form = _FORMS[table]
        copy_rows.into(cursor, sql.Identifier(table), form.columns, map(form.line, rows))
    for table, rows in moved.items():
        # If two objects claimed one child, the statement would fail, so one row wins. An id of Stripe's has one object.
        distinct = {_identity(table, row): row for row in rows}
        cursor.execute(_merge(table), (msgspec.json.encode(list(distinct.values())).decode(),))
    for table, keys in _by_table(saved.gone).items():
        names = _key_names(table)
        cursor.execute(
            sql.SQL("DELETE FROM {table} AS t USING {keys} WHERE {same}").format(
                table=sql.Identifier(table), keys=_key_rows(names), same=_same(names)
            ),
            _key_arrays(keys),
        )


_FORMS: Final = {table.name: copy_rows.Form(table) for table in tables.PROJECTIONS}


def _drop_strayed_children(cursor: Cursor, saved: Saved) -> None:
    """Delete all children of rows that are gone, and the former children of rows that have other ones now."""
    whole = [subject for subject, joined in saved.rows.items() if joined.replace_all and subject in saved.known]
    for table, keys in _by_table([*whole, *saved.gone]).items():
        spec = folds.ROW_SPECS[table]
        if spec.child:
            names = _key_names(table)
            child_names = ("account", "livemode", *spec.child_key)
            kept = [str(child["id"]) for key in keys if key in saved.rows for child in saved.rows[key].children]
            cursor.execute(
                sql.SQL("DELETE FROM {table} AS t USING {keys} WHERE {same} AND NOT (t.id = ANY (%s::text[]))").format(
                    table=sql.Identifier(spec.child), keys=_key_rows(names), same=_same(names, child_names)
                ),
                [*_key_arrays(keys), text_array(kept)],
            )


def _same(names: Sequence[str], of_table: Sequence[str] = ()) -> sql.Composed:
    """Return the condition that a row's key is one of those given. *of_table* are the table's own column names."""
    pairs = zip(of_table or names, names, strict=True)
    return sql.SQL(" AND ").join(sql.SQL("t.{} = k.{}").format(*map(sql.Identifier, pair)) for pair in pairs)


def _identity(table: str, row: Row) -> tuple[Value, ...]:
    return tuple(row[column.name] for column in tables.metadata.tables[table].primary_key)


@cache
def _merge(table: str) -> bytes:
    columns = tables.metadata.tables[table].columns
    values = [column.name for column in columns if not column.primary_key]
    return (
        sql.SQL(
            "INSERT INTO {table} SELECT * FROM json_populate_recordset(NULL::{table}, %s)"
            " ON CONFLICT ({key}) DO UPDATE SET ({columns}) = ROW ({values})"
        )
        .format(
            table=sql.Identifier(table),
            key=_listed([column.name for column in columns if column.primary_key]),
            columns=_listed(values),
            values=sql.SQL(", ").join(sql.Identifier("excluded", name) for name in values),
        )
        .as_bytes()
    )
