"""A second set of the tables, in a schema next to the live one, to be filled and compared, then dropped."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from psycopg import sql
from sqlalchemy import Connection, Engine, Table, event

from schemas import accounts, database, tables
from schemas.database import Cursor
from schemas.errors import ConflictError, DatabaseAway

SCHEMA_PREFIX: Final = "payfold_rebuild_"
SCHEMA_HOURS_MAX: Final = 24
"""Each rebuild has its own schema, so that two may run at once. An older schema is left from a killed rebuild."""
_FILLING: Final = "payfold is filling this"

REPLACED: Final = (tables.mentions, tables.outcomes, *tables.PROJECTIONS)
"""The tables that a rebuild fills, and that a swap brings the live ones to."""
_BESIDE: Final = (tables.pending, tables.changes, tables.anomalies)
"""The other tables that the projection writes; they begin empty in the schema, and are never swapped."""
_RECORDED: Final = (tables.inbox, tables.payloads, tables.contents, tables.renderings)
"""The tables of an inbox, for a schema with its own."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """A *schema* next to the *live* one. ``within`` looks for a table in it first, and then in the live one.

    It has a table ``archived`` for payloads that the live schema lacks. With *has_archive* these are found among the
    live payloads. Its table ``left_out`` has the objects that are not to be compared.
    """

    engine: Engine
    within: Engine
    schema: str
    live: str
    has_inbox: bool
    has_archive: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    """The names of accounts when the schema was made."""

    def path(self) -> sql.Composed:
        """Return the statement that lets a transaction look in this schema first, and then in the live one."""
        return sql.SQL("SET LOCAL search_path = {}, {}").format(sql.Identifier(self.schema), sql.Identifier(self.live))


@contextmanager
def shadow(engine: Engine, *, has_inbox: bool = False, has_archive: bool = False) -> Iterator[Shadow]:
    """Make a schema, yield it, and drop it with all that is left in it.

    With *has_inbox* it has its own inbox, to be filled from logs. With *has_archive* it has payloads of an archive, in
    addition to the live ones.

    Raises:
        ConflictError: an account is being renamed, so that the inbox holds a part of it under each name.
    """
    made = _make(engine, has_inbox=has_inbox, has_archive=has_archive)
    try:
        yield made
    finally:
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            _drop(cursor, made.schema)


# If a payload is in both, the live one is read last, and is used.
_BESIDE_THE_PAYLOADS: Final = """
CREATE UNLOGGED TABLE {schema}.archived (LIKE {live}.payloads INCLUDING ALL) WITH (toast_tuple_target = 8160);
CREATE TABLE {schema}.left_out (
    account text, livemode boolean, object_id text, PRIMARY KEY (account, livemode, object_id)
)
"""
_WITH_ARCHIVED: Final = """
CREATE VIEW {schema}.payloads AS
SELECT seq, payload FROM {schema}.archived UNION ALL SELECT seq, payload FROM {live}.payloads
"""


def _make(engine: Engine, *, has_inbox: bool, has_archive: bool) -> Shadow:
    now = int(time.time())
    schema = f"{SCHEMA_PREFIX}{now}_{secrets.token_hex(4)}"
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        for old in _schemas(cursor):
            if now - _made_at(old) > SCHEMA_HOURS_MAX * 3600 or _is_abandoned(cursor, old):
                _drop(cursor, old)
        accounts.require_settled(cursor)
        called = accounts.names(cursor)
        cursor.execute("SELECT current_schema()")
        (live,) = cursor.fetchone() or ("public",)
        cursor.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        for table in (*_BESIDE, *(_RECORDED if has_inbox else ())):
            _copy_table(cursor, table, schema, live, parts="INCLUDING ALL")
        names = {"schema": sql.Identifier(schema), "live": sql.Identifier(live)}
        cursor.execute(sql.SQL(_BESIDE_THE_PAYLOADS).format(**names))
        if has_archive:
            cursor.execute(sql.SQL(_WITH_ARCHIVED).format(**names))
    return Shadow(engine, _within(engine, schema, str(live)), schema, str(live), has_inbox, has_archive, called)


def require_same_names(cursor: Cursor, made: Shadow) -> None:
    """Check that accounts still have the names that they had when *made* was made.

    Raises:
        ConflictError: an account was renamed since, so that its rows cannot be compared.
    """
    accounts.require_settled(cursor)
    if accounts.names(cursor) != made.names:
        raise ConflictError("An account was renamed since this began. Nothing has changed: run it again.")


def make_tables(cursor: Cursor, made: Shadow, several: Sequence[Table] = REPLACED) -> None:
    """Make *several* of the tables that a rebuild fills, without their indexes, in the caller's transaction."""
    for table in several:
        _copy_table(cursor, table, made.schema, made.live, parts="INCLUDING ALL EXCLUDING INDEXES")


def make_empty(cursor: Cursor, made: Shadow) -> None:
    """Make all tables that a rebuild fills, with their indexes; whatever is there of an earlier try is dropped."""
    cursor.execute(
        sql.SQL("DROP TABLE IF EXISTS {} CASCADE").format(
            sql.SQL(", ").join(sql.Identifier(made.schema, table.name) for table in REPLACED)
        )
    )
    cursor.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier(made.schema, tables.anomalies.name)))
    make_tables(cursor, made)
    for statement in (*indexes(cursor, made), *(each for table in keys(cursor, made) for each in table)):
        cursor.execute(statement)
    make_view(cursor, made)


def indexes(cursor: Cursor, made: Shadow, several: Sequence[Table] = REPLACED) -> list[str]:
    """Return a statement for each index that *several* of the live tables have; those of the largest tables first.

    Any number of them may run at once. The indexes get the names of the live ones.
    """
    cursor.execute(
        """
        SELECT replace(pg_get_indexdef(i.indexrelid), format(' ON %%I.%%I USING ', %(live)s::text, t.relname),
            format(' ON %%I.%%I USING ', %(schema)s::text, t.relname))
        FROM pg_index AS i JOIN pg_class AS t ON t.oid = i.indrelid
        WHERE t.relnamespace = %(live)s::regnamespace AND t.relname = ANY (%(names)s)
        ORDER BY pg_relation_size(t.oid) DESC, i.indexrelid
        """,
        {"schema": made.schema, "live": made.live, "names": [table.name for table in several]},
    )
    return [statement for (statement,) in cursor.fetchall()]


def keys(cursor: Cursor, made: Shadow) -> list[list[str]]:
    """Return statements that make keys of the indexes of a table and then analyze it, for each table a rebuild fills.

    The tables may be dealt with at once.
    """
    cursor.execute(
        """
        SELECT t.relname, format('ALTER TABLE %%I.%%I ADD CONSTRAINT %%I %%s USING INDEX %%I', %(schema)s::text,
            t.relname, c.conname, CASE c.contype WHEN 'p' THEN 'PRIMARY KEY' ELSE 'UNIQUE' END, c.conname)
        FROM pg_constraint AS c JOIN pg_class AS t ON t.oid = c.conrelid
        WHERE t.relnamespace = %(live)s::regnamespace AND t.relname = ANY (%(names)s) AND c.contype IN ('p', 'u')
        """,
        {"schema": made.schema, "live": made.live, "names": [table.name for table in REPLACED]},
    )
    found: dict[str, list[str]] = {table.name: [] for table in REPLACED}
    for name, statement in cursor.fetchall():
        found[name].append(statement)
    for name, statements in found.items():
        # The tables are read as a whole or by their keys, so a tenth of the usual sample is enough for the planner.
        statements.append("SET LOCAL default_statistics_target = 10")
        statements.append(sql.SQL("ANALYZE {}").format(sql.Identifier(made.schema, name)).as_string())
    return list(found.values())


def make_view(cursor: Cursor, made: Shadow) -> None:
    """Make the view that the projection finds an order's refunds by."""
    _copy_view(cursor, "order_book", made.schema, made.live)


def _copy_table(cursor: Cursor, table: Table, schema: str, live: str, *, parts: str) -> None:
    # LIKE leaves out how full the pages are filled.
    options: Mapping[str, int] = table.dialect_options["postgresql"]["with"] or {}
    settings = sql.SQL(", ").join(sql.SQL(f"{name} = {value}") for name, value in options.items())
    cursor.execute(
        sql.SQL("CREATE TABLE {} (LIKE {} {}) {}").format(
            sql.Identifier(schema, table.name),
            sql.Identifier(live, table.name),
            sql.SQL(parts),
            sql.SQL("WITH ({})").format(settings) if options else sql.SQL(""),
        )
    )


def _copy_view(cursor: Cursor, view: str, schema: str, live: str) -> None:
    """Make *view* over the tables of *schema*."""
    cursor.execute("SELECT pg_get_viewdef(%s::regclass)", (view,))
    (definition,) = cursor.fetchone() or ("",)
    # The view's definition has no schemas, so the search path decides which tables it names.
    cursor.execute("SELECT current_setting('search_path')")
    (before,) = cursor.fetchone() or ("",)
    cursor.execute(sql.SQL("SET LOCAL search_path = {}, {}").format(sql.Identifier(schema), sql.Identifier(live)))
    cursor.execute(sql.SQL("CREATE VIEW {} AS {}").format(sql.Identifier(schema, view), sql.SQL(definition)))
    cursor.execute("SELECT set_config('search_path', %s, true)", (before,))


def _schemas(cursor: Cursor) -> list[str]:
    cursor.execute("SELECT nspname FROM pg_namespace WHERE starts_with(nspname, %s)", (SCHEMA_PREFIX,))
    return [name for (name,) in cursor.fetchall()]


def _made_at(schema: str) -> int:
    return int(schema.removeprefix(SCHEMA_PREFIX).partition("_")[0])


@contextmanager
def being_filled(made: Shadow, holder: Cursor) -> Iterator[None]:
    """Let the next rebuild drop *made* if this process is killed meanwhile: by then it may be as large as all tables.

    The transaction of *holder* lasts as long.
    """
    holder.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (made.schema,))
    _comment(made, _FILLING)
    try:
        yield
    finally:
        with suppress(DatabaseAway):
            _comment(made, None)


def _is_abandoned(cursor: Cursor, schema: str) -> bool:
    """Return whether the process that was filling *schema* is gone, which held a lock."""
    cursor.execute(
        "SELECT obj_description(to_regnamespace(%s), 'pg_namespace') = %s"
        " AND pg_try_advisory_xact_lock(hashtextextended(%s, 0))",
        (schema, _FILLING, schema),
    )
    return cursor.fetchone() == (True,)


def _comment(made: Shadow, words: str | None) -> None:
    with database.transaction(made.engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(sql.SQL("COMMENT ON SCHEMA {} IS {}").format(sql.Identifier(made.schema), sql.Literal(words)))


def _drop(cursor: Cursor, schema: str) -> None:
    cursor.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


def _within(engine: Engine, schema: str, live: str) -> Engine:
    """Return *engine* with *schema* in the search path before the *live* one."""
    path = sql.SQL("SET LOCAL search_path = {}, {}").format(sql.Identifier(schema), sql.Identifier(live)).as_string()
    within = engine.execution_options()

    @event.listens_for(within, "begin")
    def _enter(connection: Connection) -> None:
        connection.exec_driver_sql(path)

    return within
