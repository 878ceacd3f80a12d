"""Compares objects with their rows by the map of proof/witness.py.

Note [The map is a second witness]
    If the folds read a column from the wrong place, it is as wrong in the observation as in the row, so joining cannot
    find the fault. Each column that an object has is therefore also compared with the row in the table, by the map of
    proof/witness.py, which shares nothing with the folds. Only settled rows are compared: no event of the object is
    pending, and the row was decided before Stripe answered. A repair cannot correct what only the map finds.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from psycopg import sql
from psycopg.rows import dict_row

from schemas.database import Cursor
from schemas.observations import Answer, World
from worker.folds.facts import utc
from worker.proof import difference, witness
from worker.proof.difference import Pair
from worker.proof.in_flight import on_the_way
from worker.proof.pairs import Place, key_of, place_of, table_of
from worker.proof.witness import Statement


class Lines(NamedTuple):
    """The key under which an object lists its lines, the *table* of their rows, and its *column* for the object.

    *parent* is the table of the object's own row. At Stripe all lines are listed behind *folder*, the object's id and
    *listed*.
    """

    listed: str
    table: str
    column: str
    parent: str
    folder: tuple[str, ...]


LINES: Final = {
    "checkout.session": Lines("line_items", "order_lines", "order_id", "orders", ("checkout", "sessions")),
    "credit_note": Lines("lines", "credit_note_lines", "credit_note", "credit_notes", ("credit_notes",)),
}
_PARENT_COLUMNS: Final = {each.table: each.column for each in LINES.values()}


def pairs_by_map(cursor: Cursor, world: World, objects: Sequence[Answer]) -> Iterator[Pair]:
    """Yield rows as they are and as the map makes them: see Note [The map is a second witness]."""
    stated = {str(each.id): (each, witness.statements(each.body)) for each in objects if not each.odd}
    rows = _rows_at_rest(cursor, world, stated)
    names = {statement.id for _, statements in stated.values() for statement in statements}
    busy = {id_ for *_, id_ in on_the_way(cursor, ((*key_of(world), id_) for id_ in {*stated, *names}))}
    for id_, (answer, statements) in stated.items():
        if id_ in busy:
            continue
        lines = LINES.get(str(answer.body.get("object")))
        has_lines = lines is not None and _has_all_lines(lines, answer, rows)
        for statement in statements:
            row = rows.get(place_of(statement))
            is_compared = statement.id not in busy and (has_lines or statement.table not in _PARENT_COLUMNS)
            if row is not None and is_compared and _is_settled(row, answer):
                yield Pair(table_of(statement.table), row, {**row, **_known(statement, row)})
        if lines is not None and has_lines:
            yield from _missing_lines(world, lines, answer, statements, rows)


def _known(statement: Statement, row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in statement.columns.items() if name in row}


def _is_settled(row: Mapping[str, Any], answer: Answer) -> bool:
    """Return whether *row* was decided before Stripe answered, so that the answer includes all that the row has."""
    decided: datetime = row["as_of"]
    return decided < utc(answer.at)


def _rows_at_rest(
    cursor: Cursor, world: World, stated: Mapping[str, tuple[Answer, Sequence[Statement]]]
) -> dict[Place, dict[str, Any]]:
    """Return the rows that the objects state, and all lines of objects that list any, by one query for each table."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for id_, (_, statements) in stated.items():
        for statement in statements:
            wanted[statement.table].add(id_ if statement.table in _PARENT_COLUMNS else statement.id)
    rows: dict[Place, dict[str, Any]] = {}
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as opened:
        for name, ids in wanted.items():
            column = _PARENT_COLUMNS.get(name, "customer" if name == "balances" else "id")
            query = sql.SQL("SELECT * FROM {} WHERE (account, livemode) = (%s, %s) AND {} = ANY (%s)").format(
                sql.Identifier(name), sql.Identifier(column)
            )
            opened.execute(query, (*key_of(world), sorted(ids)))
            rows |= {(name, difference.identity(table_of(name), row)): row for row in opened}
    return rows


def lacks_lines(answer: Answer) -> bool:
    """Return whether *answer* is an object with lines of which it lists only a part."""
    lines = LINES.get(str(answer.body.get("object")))
    page = None if lines is None else answer.body.get(lines.listed)
    return isinstance(page, dict) and page.get("has_more") is not False


def with_known_lines(cursor: Cursor, *, world: World, kind: str, ids: Sequence[str]) -> set[str]:
    """Return those of the objects *ids* of which the tables hold all lines, so that they can be compared."""
    query = sql.SQL("SELECT id FROM {} WHERE (account, livemode) = (%s, %s) AND id = ANY (%s) AND lines_complete")
    cursor.execute(query.format(sql.Identifier(LINES[kind].parent)), (*key_of(world), list(ids)))
    return {id_ for (id_,) in cursor.fetchall()}


def _has_all_lines(lines: Lines, answer: Answer, rows: Mapping[Place, dict[str, Any]]) -> bool:
    """Return whether the lines can be compared: Stripe lists all, and the object's row is settled and has all."""
    parent, page = rows.get((lines.parent, str(answer.id))), answer.body.get(lines.listed)
    if parent is None or not isinstance(page, dict) or page.get("has_more") is not False:
        return False
    return parent["lines_complete"] is True and _is_settled(parent, answer)


def _missing_lines(
    world: World,
    lines: Lines,
    answer: Answer,
    statements: Sequence[Statement],
    rows: Mapping[Place, dict[str, Any]],
) -> Iterator[Pair]:
    """Yield the listed lines that have no row, and the rows of lines that are not listed."""
    table, parent = table_of(lines.table), rows[lines.parent, str(answer.id)]
    listed = {place_of(statement): statement for statement in statements if statement.table == lines.table}
    key = {"account": world.account, "livemode": world.livemode, "as_of": parent["as_of"]}
    for place, statement in listed.items():
        if place not in rows:
            yield Pair(table, None, {**statement.columns, **key, "id": statement.id})
    for place, row in rows.items():
        if place[0] == lines.table and row[lines.column] == answer.id and place not in listed:
            yield Pair(table, row, None)
