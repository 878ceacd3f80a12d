"""Compares tables with expected rows that are written out by hand: every column of every row of every table.

The expected rows are in the tests, taken from Stripe's documentation and independent of the folds.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, Table, select

from schemas import database, tables

WORLD = {"account": "", "livemode": False}
TABLES: Mapping[str, Table] = {table.name: table for table in (*tables.PROJECTIONS, tables.order_book)}

Rows = Mapping[str, Iterable[Mapping[str, Any]]]


def at(seconds: int) -> datetime:
    """Return Stripe's *seconds* since 1970 as the time that a column holds."""
    return datetime.fromtimestamp(seconds, UTC)


def assert_rows(engine: Engine, expected: Rows, *, views: Iterable[str] = ()) -> None:
    """Compare every projection table, and the *views* named, with the rows *expected* by table.

    A row names all columns of its table but the account and the mode, which are '' and test unless it names them; a
    table that is not named must be empty. Every time is aware; use ``at``.
    """
    names = [*(table.name for table in tables.PROJECTIONS), *views]
    assert set(expected) <= set(names), f"no such table: {set(expected) - set(names)}"
    wanted = in_whole(expected)
    for name in names:
        assert sorted_rows(_found(engine, TABLES[name])) == wanted.get(name, []), name


def in_whole(expected: Rows) -> dict[str, list[dict[str, Any]]]:
    """Return the rows *expected* by table, sorted, each with its account and mode."""
    wanted = {name: [{**WORLD, **row} for row in rows] for name, rows in expected.items()}
    for name, rows in wanted.items():
        for row in rows:
            assert set(row) == set(TABLES[name].columns.keys()), f"a row of {name} does not name every column"
    return {name: sorted_rows(rows) for name, rows in wanted.items()}


def _found(engine: Engine, table: Table) -> list[dict[str, Any]]:
    with database.transaction(engine) as connection:
        return [dict(row) for row in connection.execute(select(table)).mappings()]


def sorted_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return *rows* sorted by their own values."""
    return sorted(({name: row[name] for name in sorted(row)} for row in rows), key=repr)
