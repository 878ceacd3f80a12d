"""Folds the whole inbox anew, beside the live tables, in an order of its own.

The tables are a function of the events, so what comes out has to be the same; that is the proof.
"""

import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

from psycopg import sql
from sqlalchemy import Connection, Engine, event

from schemas import database, tables
from schemas.database import Cursor
from worker import projection

SCHEMA_PREFIX: Final = "payfold_rebuild_"
SCHEMA_HOURS_MAX: Final = 24
"""Each rebuild has a schema of its own, so that two may run at once; an older one was left by a killed process."""


@contextmanager
def rebuilt(engine: Engine, *, seed: int, progress: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """Fold the inbox in an order drawn from *seed* and yield the schema that holds the result, then drop it.

    *progress* is told how many events each step folded.
    """
    schema, live = _make(engine)
    try:
        _fold_all(engine, _within(engine, schema, live), random.Random(seed), progress)  # noqa: S311 - an order to be repeated, not a secret
        yield schema
    finally:
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            _drop(cursor, schema)


def _make(engine: Engine) -> tuple[str, str]:
    """Make a schema with empty copies of the tables, and return its name and that of the live one."""
    now = int(time.time())
    schema = f"{SCHEMA_PREFIX}{now}_{secrets.token_hex(4)}"
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        for old in _schemas(cursor):
            if now - _made_at(old) > SCHEMA_HOURS_MAX * 3600:
                _drop(cursor, old)
        cursor.execute("SELECT current_schema()")
        (live,) = cursor.fetchone() or ("public",)
        cursor.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        for table in tables.REBUILT:
            cursor.execute(
                sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(
                    sql.Identifier(schema, table.name), sql.Identifier(live, table.name)
                )
            )
        _copy_view(cursor, "order_book", schema, str(live))
    return schema, str(live)


def _copy_view(cursor: Cursor, view: str, schema: str, live: str) -> None:
    """Make *view*, by which the projection finds an order's refunds, over the tables of *schema*."""
    cursor.execute("SELECT pg_get_viewdef(%s::regclass)", (view,))
    (definition,) = cursor.fetchone() or ("",)
    # The definition names its tables as the path finds them, so the path decides which they are.
    cursor.execute(sql.SQL("SET LOCAL search_path = {}, {}").format(sql.Identifier(schema), sql.Identifier(live)))
    cursor.execute(sql.SQL("CREATE VIEW {} AS {}").format(sql.Identifier(schema, view), sql.SQL(definition)))


def _schemas(cursor: Cursor) -> list[str]:
    cursor.execute("SELECT nspname FROM pg_namespace WHERE starts_with(nspname, %s)", (SCHEMA_PREFIX,))
    return [name for (name,) in cursor.fetchall()]


def _made_at(schema: str) -> int:
    return int(schema.removeprefix(SCHEMA_PREFIX).partition("_")[0])


def _drop(cursor: Cursor, schema: str) -> None:
    cursor.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


def _within(engine: Engine, schema: str, live: str) -> Engine:
    """Return *engine* with *schema* before the *live* one, in which only the inbox is then found."""
    path = sql.SQL("SET LOCAL search_path = {}, {}").format(sql.Identifier(schema), sql.Identifier(live)).as_string()
    within = engine.execution_options()

    @event.listens_for(within, "begin")
    def _enter(connection: Connection) -> None:
        connection.exec_driver_sql(path)

    return within


def _fold_all(engine: Engine, within: Engine, chance: random.Random, progress: Callable[[int], None]) -> None:
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("SELECT seq FROM inbox ORDER BY seq")
        seqs = [row[0] for row in cursor.fetchall()]
    chance.shuffle(seqs)
    while seqs:
        batch = [seqs.pop() for _ in range(min(len(seqs), chance.randint(1, projection.FOLD_BATCH_MAX)))]
        with database.transaction(within) as connection, database.cursor(connection) as cursor:
            # An operator's word queues its event, which may be in this batch too.
            cursor.execute("INSERT INTO pending (seq) SELECT unnest(%s::bigint[]) ON CONFLICT DO NOTHING", (batch,))
        while projection.run_once(within, now=datetime.now(UTC)):
            pass
        progress(len(batch))
