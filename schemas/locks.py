"""Advisory locks, by name. Each is held until the transaction ends, and has its own number in each schema.

A transaction that waits for several of them takes them in this order: folding, objects, appending. So no two
transactions wait for each other.

Note [The log is on disk before the lock is taken]
    A commit waits until its transaction's log is on disk, and the lock to append is held to the end of the commit. A
    batch on a long history logs ten megabytes, most of them pages that it changes first after a checkpoint. So it has
    the log of its rows written before it takes the lock, while another batch may hold it, and the commit is left with
    the log of its changes. The server must know how to write the log on request, as PostgreSQL does since 17.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import psycopg

from schemas.database import Cursor, text_array
from schemas.events import Key

# A schema to migrate may not exist yet, so this lock has one number for all. It is ours to choose and means nothing.
_MIGRATION: Final = 7_041_776_001
_UPGRADE: Final = 7_041_776_002
_ROWS_LOGGED_FIRST: Final = 100
"""With fewer rows it would take longer to wait for the disk twice."""
_WRITES_LOG_ON_REQUEST: Final = 170_000


def _number(name: str) -> str:
    """Return SQL for the number of the lock that the SQL expression *name* names in this schema."""
    return f"hashtextextended(current_schema() || {name}, 0)"


_PARTITIONS: Final = _number("' payloads'")
_FOLD: Final = _number("' fold'")
_CHANGES: Final = _number("' changes'")
_OBJECT: Final = _number("key")
FOLDING, APPENDING = _FOLD, _CHANGES
"""SQL for the numbers of these locks, for those who look at ``pg_locks``."""


def keep_others_from_migrating(cursor: Cursor) -> None:
    """Wait for other releases that migrate, then keep others from it until this transaction ends."""
    cursor.execute(f"SELECT pg_advisory_xact_lock({_MIGRATION})")


def try_to_keep_others_from_upgrading(cursor: Cursor) -> bool:
    """Keep others from bringing the schema to this release until this transaction ends; return False if one is at it.

    It does not wait: see Note [No transaction waits for the schema] in schemas/migrate.py.
    """
    cursor.execute(f"SELECT pg_try_advisory_xact_lock({_UPGRADE})")
    return cursor.fetchone() == (True,)


def keep_others_from_making_partitions(cursor: Cursor) -> None:
    """Keep others from making partitions of ``payloads`` until this transaction ends."""
    cursor.execute(f"SELECT pg_advisory_xact_lock({_PARTITIONS})")


def share_folding(cursor: Cursor) -> None:
    """Wait while a transaction keeps others from folding, and let none start to until this transaction ends."""
    cursor.execute(f"SELECT pg_advisory_xact_lock_shared({_FOLD})")


def keep_others_from_folding(cursor: Cursor) -> None:
    """Wait for all transactions that fold, then keep others from folding until this transaction ends."""
    cursor.execute(f"SELECT pg_advisory_xact_lock({_FOLD})")


def keep_others_from_appending(cursor: Cursor, *, rows: int = 0) -> None:
    """Keep other transactions from appending to ``changes`` until this transaction ends.

    With many *rows* that it has saved, see Note [The log is on disk before the lock is taken].
    """
    if rows >= _ROWS_LOGGED_FIRST and cursor.connection.info.server_version >= _WRITES_LOG_ON_REQUEST:
        cursor.execute("SELECT pg_logical_emit_message(false, 'payfold', '', true)")
    cursor.execute(f"SELECT pg_advisory_xact_lock({_CHANGES})")


def taken_in_time(cursor: Cursor, take: Callable[[], None], *, seconds_max: float) -> bool:
    """Call *take*, which waits for locks, and return whether it got each of them within *seconds_max*.

    If not, it holds none of them, and the caller may try again: this returns after a random pause.
    """
    cursor.execute(f"SET LOCAL lock_timeout = {round(seconds_max * 1000)}")
    try:
        with cursor.connection.transaction():
            take()
    except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
        time.sleep(random.uniform(0.05, 0.5))  # noqa: S311 - jitter
        return False
    return True


def lock_objects(cursor: Cursor, objects: Iterable[Key]) -> None:
    """Wait for the locks of *objects*, in one order for all, and hold them until the transaction ends."""
    cursor.execute(_LOCK_OBJECTS, (_names_of(objects),))


def try_objects(cursor: Cursor, objects: Sequence[Key]) -> list[bool]:
    """Return of each of *objects* whether no one else holds its lock, and hold those until the transaction ends."""
    cursor.execute(_TRY_OBJECTS, (_names_of(objects),))
    return [is_held for (is_held,) in cursor.fetchall()]


def _names_of(objects: Iterable[Key]) -> str:
    return text_array([f"{account} {livemode} {id_}" for account, livemode, id_ in objects])


_LOCK_OBJECTS: Final = f"""
SELECT pg_advisory_xact_lock(number) FROM (
    SELECT DISTINCT {_OBJECT} AS number FROM unnest(%s::text[]) AS key ORDER BY number
) AS sorted
"""
_TRY_OBJECTS: Final = f"""
SELECT pg_try_advisory_xact_lock({_OBJECT}) FROM unnest(%s::text[]) WITH ORDINALITY AS k (key, number) ORDER BY number
"""
