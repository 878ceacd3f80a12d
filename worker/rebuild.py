"""Folds the whole inbox anew, beside the live tables, in an order of its own.

The tables are a function of the events, so what comes out has to be the same; that is the proof.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

from psycopg import sql
from sqlalchemy import Engine

from schemas import database, tables
from schemas.database import Cursor
from worker import projection

SCHEMA: Final = "payfold_rebuild"


@contextmanager
def rebuilt(engine: Engine, *, seed: int, progress: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """Fold the inbox in an order drawn from *seed* and yield the schema that holds the result, then drop it.

    *progress* is told how many events each step folded.
    """
    live = _make(engine)
    try:
        chance = random.Random(seed)  # noqa: S311 - an order to be repeated, not a secret
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            cursor.execute("SELECT seq FROM inbox ORDER BY seq")
            seqs = [row[0] for row in cursor.fetchall()]
        chance.shuffle(seqs)
        while seqs:
            batch = [seqs.pop() for _ in range(min(len(seqs), chance.randint(1, projection.FOLD_BATCH_MAX)))]
            _fold(engine, live, batch)
            progress(len(batch))
        yield SCHEMA
    finally:
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            cursor.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(SCHEMA)))


def _make(engine: Engine) -> str:
    """Make the shadow schema with empty copies of the tables, and return the name of the live one."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("SELECT current_schema()")
        (live,) = cursor.fetchone() or ("public",)
        cursor.execute(sql.SQL("DROP SCHEMA IF EXISTS {0} CASCADE; CREATE SCHEMA {0}").format(sql.Identifier(SCHEMA)))
        for table in tables.REBUILT:
            cursor.execute(
                sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(
                    sql.Identifier(SCHEMA, table.name), sql.Identifier(live, table.name)
                )
            )
    return str(live)


def _fold(engine: Engine, live: str, seqs: list[int]) -> None:
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        _enter(cursor, live)
        cursor.execute("INSERT INTO pending (seq) SELECT unnest(%s::bigint[])", (seqs,))
        claimed = projection.claim(cursor, limit=len(seqs))
        projection.project(cursor, claimed, now=datetime.now(UTC))


def _enter(cursor: Cursor, live: str) -> None:
    cursor.execute(sql.SQL("SET LOCAL search_path = {}, {}").format(sql.Identifier(SCHEMA), sql.Identifier(live)))
