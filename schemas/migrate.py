"""Brings the schema to this release, and checks whether it is there.

Old code must run on the new schema. So a migration only adds, and a later release drops what is no longer used.

Note [Large indexes are built ahead]
    An index that is built in a transaction keeps writers away until the end of that transaction, for minutes where the
    table is large, and dropping one keeps everyone away, also while it waits for a backup. So a migration may name in
    ``BUILT`` the indexes to build before it, and in ``DROPPED`` those to drop then, both concurrently: deliveries and
    folding go on, and these wait for older transactions, however long they take. The migrations before it are committed
    by then. A build that was interrupted leaves an invalid index, which the next run replaces; complete ones stay. What
    old code finds by an index that is dropped, it finds by reading much more: then its migration says so.

Note [No transaction waits for the schema]
    An index that is built concurrently waits for each transaction that had a snapshot when it looked, to the end of
    that transaction, even if the snapshot is long gone. Who waits for the builder within a transaction has a snapshot
    at each look. If both look at the same moment, each waits for the other, and PostgreSQL sees no deadlock, since the
    builder's lock is held by another of its connections. So each look is a transaction of its own.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from schemas import database, locks
from schemas.database import Cursor

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection, Engine

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_POLL_SECONDS: Final = 0.2


def _config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    return config


def pending(connection: "Connection") -> list[str]:
    """Return the revisions that *connection*'s schema lacks, oldest first.

    Nothing is lacking where a newer release has migrated: old code runs on the new schema.
    """
    with database.cursor(connection) as cursor:
        return pending_for(cursor)


def pending_for(cursor: Cursor) -> list[str]:
    """Return the revisions that the schema of *cursor* lacks, as ``pending`` does."""
    cursor.execute("SELECT to_regclass('alembic_version') IS NOT NULL")
    if cursor.fetchone() != (True,):
        return list(revisions())
    cursor.execute("SELECT version_num FROM alembic_version")
    return list(pending_after(tuple(version for (version,) in cursor.fetchall())))


def pending_after(current: tuple[str, ...]) -> tuple[str, ...]:
    """Return the revisions that a schema with the revisions *current* lacks, as ``pending`` does."""
    known = revisions()
    if not current:
        return known
    return known[known.index(max(current)) + 1 :] if set(known).issuperset(current) else ()


@cache
def revisions() -> tuple[str, ...]:
    """Return this release's revisions, oldest first: each has a file whose name begins with it.

    They are read without alembic, which takes longer to load than most commands take; a test holds them against it.
    """
    files = sorted((_MIGRATIONS / "versions").glob("[0-9]*_*.py"))
    return tuple(file.name.partition("_")[0] for file in files)


def upgrade(database_url: str) -> list[str]:
    """Apply what is pending at *database_url* and return the revisions applied, oldest first.

    If it fails, the migrations up to the last that builds indexes ahead may have been applied.

    Raises:
        DatabaseAway: PostgreSQL does not answer.
    """
    engine = database.engine(database_url, prepare_after=database.NEVER)
    try:
        with _alone(engine):
            # In a transaction of its own: a query with parameters keeps its snapshot after its end, until the next one.
            with database.transaction(engine) as reading:
                applied = pending(reading)
            for part in _parts(applied):
                _build_ahead(engine, part[0])
                _apply(engine, part[-1])
            return applied
    finally:
        engine.dispose()


@contextmanager
def _alone(engine: "Engine") -> Iterator[None]:
    """Wait for others that bring the schema to this release, and keep others from it until the block ends."""
    while True:
        with database.transaction(engine, may_idle=True) as connection, database.cursor(connection) as cursor:
            if locks.try_to_keep_others_from_upgrading(cursor):
                yield
                return
        time.sleep(_POLL_SECONDS)


def _parts(revisions: Iterable[str]) -> list[list[str]]:
    """Return *revisions* in parts: all but the first begin with one that builds indexes ahead."""
    parts: list[list[str]] = []
    for revision in revisions:
        if not parts or _ahead_of(revision) != _NOTHING:
            parts.append([])
        parts[-1].append(revision)
    return parts


class _Ahead(NamedTuple):
    """Indexes to build, by name the rest of the statement (after UNIQUE, if it is), and the names to drop then."""

    built: Mapping[str, str]
    dropped: Sequence[str]


_NOTHING: Final = _Ahead({}, ())


@cache
def _ahead_of(revision: str) -> _Ahead:
    from alembic.script import ScriptDirectory

    module = ScriptDirectory.from_config(_config()).get_revision(revision).module
    return _Ahead(getattr(module, "BUILT", {}), getattr(module, "DROPPED", ()))


def _build_ahead(engine: "Engine", revision: str) -> None:
    """Do what is to be done before *revision*; see Note [Large indexes are built ahead]."""
    ahead = _ahead_of(revision)
    with database.transaction(engine.execution_options(isolation_level="AUTOCOMMIT")) as connection:
        for name, definition in ahead.built.items():
            _build(connection, name, definition)
        for name in ahead.dropped:
            _drop(connection, name)


def _build(connection: "Connection", name: str, definition: str) -> None:
    """Build an index, unless it is there already and complete."""
    is_valid = connection.exec_driver_sql(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%(name)s)", {"name": name}
    ).scalar()
    if is_valid:
        return
    _drop(connection, name)
    unique = "UNIQUE " if definition.startswith("UNIQUE ") else ""
    connection.exec_driver_sql(f"CREATE {unique}INDEX CONCURRENTLY {name} {definition.removeprefix(unique)}")
    # Without statistics of its expressions, an index may be thought to find a great part of a large table.
    table = connection.exec_driver_sql(_ANALYZED_TABLE, {"name": name}).scalar()
    if table is not None:
        connection.exec_driver_sql(f"ANALYZE {table}")


_ANALYZED_TABLE: Final = """
SELECT c.oid::regclass::text FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indrelid
WHERE i.indexrelid = to_regclass(%(name)s) AND c.reltuples > 0
"""


def _drop(connection: "Connection", name: str) -> None:
    connection.exec_driver_sql(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")


def _apply(engine: "Engine", revision: str) -> None:
    """Apply what is pending up to *revision*, in one transaction."""
    from alembic import command

    with database.transaction(engine) as connection:
        with database.cursor(connection) as cursor:
            # A release without parts waits for this one.
            locks.keep_others_from_migrating(cursor)
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
