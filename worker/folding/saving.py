"""Writes rows and deletes them by their keys."""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Final

import msgspec
from psycopg import sql

from schemas import tables
from schemas.database import Cursor, text_array
from worker import folds
from worker.folding import copy_rows
from worker.folding.batch import Saved
from worker.folding.rows import by_table, key_arrays, key_names, key_rows, listed, same
from worker.folds.facts import Row, Value


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
        _FORMS[table].append(cursor, rows)
    for table, rows in moved.items():
        # If two objects claimed one child, the statement would fail, so one row wins. An id of Stripe's has one object.
        distinct = {_identity(table, row): row for row in rows}
        cursor.execute(_merge(table), (msgspec.json.encode(list(distinct.values())).decode(),))
    for table, keys in by_table(saved.gone).items():
        names = key_names(table)
        cursor.execute(_delete(table, names, same(names)), key_arrays(keys))


_FORMS: Final = {table.name: copy_rows.Form(table) for table in tables.PROJECTIONS}


def _drop_strayed_children(cursor: Cursor, saved: Saved) -> None:
    """Delete all children of rows that are gone, and the former children of rows that have other ones now."""
    whole = [subject for subject, joined in saved.rows.items() if joined.replace_all and subject in saved.known]
    for table, keys in by_table([*whole, *saved.gone]).items():
        spec = folds.ROW_SPECS[table]
        if spec.child:
            names = key_names(table)
            child_names = ("account", "livemode", *spec.child_key)
            kept = [str(child["id"]) for key in keys if key in saved.rows for child in saved.rows[key].children]
            strayed = sql.SQL("{} AND NOT (t.id = ANY (%s::text[]))").format(same(names, child_names))
            cursor.execute(_delete(spec.child, names, strayed), [*key_arrays(keys), text_array(kept)])


def _delete(table: str, names: Sequence[str], condition: sql.Composed) -> sql.Composed:
    """Return SQL that deletes the rows of *table* that fulfil *condition* for one of the keys *names*.

    Only who has locked their object writes them, so each is still where it was found. See Note [A row is found by its
    key, by any plan] in worker/folding/rows.py.
    """
    return sql.SQL(
        "DELETE FROM {table} WHERE ctid = ANY (ARRAY("
        "SELECT f.place FROM {keys} CROSS JOIN LATERAL"
        " (SELECT t.ctid AS place FROM {table} AS t WHERE {condition} OFFSET 0) AS f))"
    ).format(table=sql.Identifier(table), keys=key_rows(names), condition=condition)


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
            key=listed([column.name for column in columns if column.primary_key]),
            columns=listed(values),
            values=sql.SQL(", ").join(sql.Identifier("excluded", name) for name in values),
        )
        .as_bytes()
    )
