"""The acts of an operator on single events, done in this process: fold one again, or ignore one."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from sqlalchemy import Engine

from schemas import database, event_acts
from schemas.event_acts import FoundEvent
from schemas.own_events import BY_COMMAND
from worker.folding import projection
from worker.logs import archive as archives
from worker.logs import restore


def retry(
    engine: Engine,
    event_id: str,
    *,
    now: datetime,
    account: str | None = None,
    livemode: bool | None = None,
    archive: Path | None = None,
) -> FoundEvent:
    """Fold the event *event_id* again, in this process, and return its outcome.

    Archived payloads of its objects are brought back from the logs in the folder *archive*. Events of these objects
    that were parked because the payloads were missing are folded too.

    Raises:
        ConflictError: payloads are archived, and no *archive* is given or it lacks them; nothing has changed.
    """
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        found = event_acts.find(connection, event_id, account=account, livemode=livemode)
        archived = event_acts.archived_with(cursor, found.seq)
    if archive is None:
        event_acts.require_at_hand(found, archived)
    if archived and archive is not None:
        restore.logs_in(archive)
        with archives.alone(archive):
            restore.bring_back(engine, archived, archive)
            return _folded(engine, found, _queue(engine, found.seq, archived=archived), now)
    return _folded(engine, found, _queue(engine, found.seq), now)


def _queue(engine: Engine, seq: int, *, archived: Sequence[int] = ()) -> list[int]:
    """Queue the event *seq*, and those that were parked while the *archived* ones were missing; return these."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(_WAITING, {"archived": list(archived)})
        waiting = [other for (other,) in cursor.fetchall() if other != seq]
        event_acts.queue(cursor, [seq, *waiting])
    return waiting


def _folded(engine: Engine, found: FoundEvent, waiting: Sequence[int], now: datetime) -> FoundEvent:
    for seq in (found.seq, *waiting):
        projection.run_one(engine, seq, now=now)
    return _now(engine, found.seq)


def _now(engine: Engine, seq: int) -> FoundEvent:
    with database.transaction(engine) as connection:
        return event_acts.at(connection, seq)


# Parked events of the objects that the archived events are about.
_WAITING: Final = """
WITH objects AS (
    SELECT account, livemode, object_id FROM inbox WHERE seq = ANY (%(archived)s) AND object_id IS NOT NULL
    UNION
    SELECT account, livemode, object_id FROM mentions WHERE seq = ANY (%(archived)s)
)
SELECT o.seq FROM outcomes AS o JOIN inbox AS i USING (seq)
WHERE o.state = 'parked' AND o.cause = 'payload_archived' AND NOT o.seq = ANY (%(archived)s) AND (
    (i.account, i.livemode, i.object_id) IN (SELECT * FROM objects)
    OR EXISTS (SELECT FROM mentions AS m JOIN objects USING (account, livemode, object_id) WHERE m.seq = o.seq)
) ORDER BY o.seq
"""


def ignore(
    engine: Engine,
    event_id: str,
    *,
    reason: str,
    now: datetime,
    account: str | None = None,
    livemode: bool | None = None,
) -> FoundEvent:
    """Ignore the event *event_id*, which is parked or pending, from now on, and return its outcome.

    Raises:
        ConflictError: it is neither, or was folded before, so rows of the tables depend on it; or a worker folds it.
    """
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        found = event_acts.find(connection, event_id, account=account, livemode=livemode)
        event_acts.ignore(cursor, found, reason=reason, by=BY_COMMAND, now=now)
    projection.fold_pending(engine, now=now)
    return _now(engine, found.seq)
