"""Brings the schema to this release, and checks whether it is there.

Old code must run on the new schema. So a migration only adds, and a later release drops what is no longer used.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from schemas import database, locks

if TYPE_CHECKING:
    from alembic.config import Config


def _config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def pending(connection: Connection) -> list[str]:
    """Return the revisions that *connection*'s schema lacks, oldest first.

    Nothing is lacking where a newer release has migrated: old code runs on the new schema.
    """
    from alembic.migration import MigrationContext

    return list(pending_after(MigrationContext.configure(connection).get_current_heads()))


@cache
def pending_after(current: tuple[str, ...]) -> tuple[str, ...]:
    """Return the revisions that a schema with the revisions *current* lacks, as ``pending`` does."""
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(_config())
    known = {revision.revision for revision in script.walk_revisions()}
    if not known.issuperset(current):
        return ()
    return tuple(revision.revision for revision in reversed(list(script.iterate_revisions("heads", current or "base"))))


def upgrade(database_url: str) -> list[str]:
    """Apply what is pending at *database_url* and return the revisions applied, oldest first.

    Raises:
        DatabaseAway: PostgreSQL does not answer.
    """
    engine = database.engine(database_url)
    try:
        with database.transaction(engine) as connection:
            with database.cursor(connection) as cursor:
                locks.keep_others_from_migrating(cursor)
            applied = pending(connection)
            if applied:
                from alembic import command

                config = _config()
                config.attributes["connection"] = connection
                command.upgrade(config, "heads")
            return applied
    finally:
        engine.dispose()
