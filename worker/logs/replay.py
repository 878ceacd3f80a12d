"""Brings event logs into the inbox, and from there into the tables."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Engine

from schemas import accounts, database
from schemas.errors import ConflictError
from worker.logs.first_import import FirstImport
from worker.logs.recording import EventFolder, Parked, Recording
from worker.logs.selection import Counts, Reading

BACKLOG: Final = 5_000
"""From so many events on, it is worth having another process fold while this one records."""
LOOK_SECONDS: Final = 0.5
PATIENCE_SECONDS: Final = 60.0


@dataclass(slots=True)
class Replayed:
    """The result of a replay: its counts, how many changes of each kind it withheld, and why events are parked."""

    counts: Counts
    withheld: Counts
    parked: list[Parked]


def replay(
    engine: Engine,
    logs: Reading,
    *,
    others: Callable[[], object] | None = None,
    withhold: bool = False,
    backlog: int = BACKLOG,
) -> Replayed:
    """Record the events of *logs* that the inbox lacks, fold them, and return the counts.

    Where *others* are given, they fold, and this waits for them. With *withhold* the changes that this makes are kept
    from the feed, which is meant for a first import: see Note [What is withheld was never to be seen] in
    first_import.py. From *backlog* events on, another process folds while this one records.

    Raises:
        ConflictError: changes have been announced here, so this is no first import.
    """
    counts: Counts = Counter()
    logs = logs.named_as_in(engine)
    with closing(EventFolder(engine, logs.now, None if others else backlog)) as folder:
        taken = FirstImport(engine, logs.now, folder) if withhold else Recording(engine, logs.now, folder)
        for wanted in logs.chunks(counts):
            counts.update(taken.take(wanted))
        if others is not None:
            others()
        folder.end()
    counts.update(taken.outcomes())
    return Replayed(counts, taken.withheld, taken.parked() if counts["parked"] else [])


def follow(
    engine: Engine,
    *,
    wake: Callable[[], None],
    progress: Callable[[int, int], None],
    patience_seconds: float = PATIENCE_SECONDS,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Wait until others have folded all pending events, and return how many are left.

    The others are woken again and again. *progress* is called with how many events are folded, of how many. Some are
    left only when no event was folded for *patience_seconds*.
    """
    total = left = _pending(engine)
    waited = 0.0
    while left and waited < patience_seconds:
        wake()
        pause(LOOK_SECONDS)
        before, left = left, _pending(engine)
        total = max(total, left)
        waited = 0.0 if left < before else waited + LOOK_SECONDS
        progress(total - left, total)
    return left


def _pending(engine: Engine) -> int:
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(
            "SELECT (SELECT count(*) FROM pending)"
            " + (SELECT count(*) FROM (SELECT FROM renderings WHERE content_sha256 IS NULL LIMIT 1) AS fresh)"
        )
        (count,) = cursor.fetchone() or (0,)
        return int(count)


def why_pending(engine: Engine) -> str:
    """Return why events are still pending after a replay that folds, and what to do."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        try:
            accounts.require_settled(cursor)
        except ConflictError as error:
            return f"Events wait. {error}"
        cursor.execute("SELECT count(*), min(reason) FROM pending WHERE due_at IS NOT NULL")
        postponed, reason = cursor.fetchone() or (0, None)
    if postponed:
        return (
            f"{postponed:,} events could not be folded for now and are tried again by the worker, or when this is run"
            f" again in a few minutes. One of the reasons: {reason}."
        )
    return "What is pending was taken by other workers, or recorded, while this ended: run it again to see."
