"""Rows as they are and as they should be, and how one names them."""

from typing import Final, TypeAlias

from sqlalchemy import Table

from schemas import tables
from schemas.observations import World
from worker.proof import difference
from worker.proof.difference import Difference, Pair
from worker.proof.witness import Statement

DECIDED_BY: Final = ("event_id", "as_of")
"""Columns that name the deciding event."""


Place: TypeAlias = tuple[str, str]
"""Table, and the key of a row within its account and mode."""


Name: TypeAlias = tuple[str, str, str | None]
"""The same, and a column."""


def name_of(each: Difference) -> Name:
    """Return the name of a difference."""
    return (each.table, each.id, each.column)


def row_of(pair: Pair) -> Place:
    """Return the place of the row of *pair*."""
    return (str(pair.table.name), difference.identity(pair.table, pair.held or pair.expected or {}))


def differences_of(pair: Pair) -> list[Difference]:
    """Return the differences of *pair*, other than the event that decides it."""
    return [each for each in difference.differences(pair) if each.column not in DECIDED_BY]


def key_of(world: World) -> tuple[str, bool]:
    """Return the part of a key that *world* is."""
    return (world.account, world.livemode)


def place_of(statement: Statement) -> Place:
    """Return the place of the row that *statement* is about."""
    return (
        statement.table,
        tables.key_name([statement.id, statement.currency] if statement.currency else [statement.id]),
    )


def table_of(name: str) -> Table:
    """Return the table *name*."""
    return tables.metadata.tables[name]
