"""The actions of an operator on single events: fold one again, or ignore one."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from sqlalchemy import Engine

from schemas import database, inbox, observations
from schemas.database import Cursor
from schemas.errors import ConflictError, NotFoundError
from schemas.own_events import EVENT_IGNORED
from worker.folding import projection
from worker.logs import archive as archives
from worker.logs import restore


@dataclass(frozen=True, slots=True)
class FoundEvent:
    """An event in the inbox, and its outcome."""

    seq: int
    account: str
    livemode: bool
    id: str
    state: str
    reason: str | None


def find(cursor: Cursor, event_id: str, *, account: str | None = None, livemode: bool | None = None) -> FoundEvent:
    """Return the event *event_id*, of any account and mode unless *account* or *livemode* is given.

    Raises:
        NotFoundError: the inbox has no event of that id.
        ConflictError: several accounts or modes have one.
    """
    cursor.execute(
        "SELECT seq, account, livemode, id, state, reason FROM events WHERE id = %(id)s"
        " AND (%(account)s::text IS NULL OR account = %(account)s)"
        " AND (%(livemode)s::boolean IS NULL OR livemode = %(livemode)s) LIMIT 2",
        {"id": event_id, "account": account, "livemode": livemode},
    )
    rows = cursor.fetchall()
    if not rows:
        raise NotFoundError(f"The inbox has no event {event_id}.")
    if len(rows) > 1:
        raise ConflictError(
            f"Several accounts or modes have an event {event_id}: say which (--account, --live, --test)."
        )
    return FoundEvent(*rows[0])


def _at(engine: Engine, seq: int) -> FoundEvent:
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("SELECT seq, account, livemode, id, state, reason FROM events WHERE seq = %s", (seq,))
        return FoundEvent(*cursor.fetchall()[0])


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
        found = find(cursor, event_id, account=account, livemode=livemode)
        archived = restore.archived_with(cursor, found.seq)
    if archived and archive is None:
        raise ConflictError(
            f"{event_id} cannot be folded anew, since {len(archived):,} events of its objects are archived; it stays"
            f" {found.state}. `payfold events retry {event_id} --archive DIR` brings them back."
        )
    waiting = [found.seq]
    if archived and archive is not None:
        restore.logs_in(archive)
        with archives.alone(archive):
            restore.bring_back(engine, archived, archive)
            waiting += _queue(engine, found.seq, archived=archived)
            return _folded(engine, waiting, now)
    _queue(engine, found.seq)
    return _folded(engine, waiting, now)


def _queue(engine: Engine, seq: int, *, archived: Sequence[int] = ()) -> list[int]:
    """Queue the event *seq*, and those that were parked while the *archived* ones were missing; return these."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(_WAITING, {"archived": list(archived)})
        waiting = [other for (other,) in cursor.fetchall() if other != seq]
        cursor.execute(
            "INSERT INTO pending (seq, again) SELECT unnest(%s::bigint[]), true"
            " ON CONFLICT (seq) DO UPDATE SET"
            " again = true, attempts = 0, due_at = NULL, cause = NULL, reason = NULL",
            ([seq, *waiting],),
        )
    return waiting


def _folded(engine: Engine, seqs: Sequence[int], now: datetime) -> FoundEvent:
    for seq in seqs:
        projection.run_one(engine, seq, now=now)
    return _at(engine, seqs[0])


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
        ConflictError: it is neither, so rows of the tables depend on it.
    """
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        found = find(cursor, event_id, account=account, livemode=livemode)
        if found.state not in ("parked", "pending"):
            raise ConflictError(f"Only a parked or pending event can be set aside, and {event_id} is {found.state}.")
        word = observations.observe(
            EVENT_IGNORED,
            {"object": "event", "id": found.id, "reason": reason},
            account=found.account,
            livemode=found.livemode,
            created=int(now.timestamp()),
            now=now,
        )
        inbox.record(cursor, [word])
    projection.fold_pending(engine, now=now)
    return _at(engine, found.seq)
