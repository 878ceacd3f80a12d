"""Compares the inbox with another program's log: events missing here, missing there, and with other content."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from psycopg import sql
from sqlalchemy import Engine

from schemas import contents, database, events
from schemas.database import Cursor
from schemas.inbox import Recorded
from schemas.settings import SigningSecret
from worker import folds
from worker.folds.facts import Event
from worker.logs import recording, replay
from worker.logs.selection import Reading
from worker.proof.difference import DIFFERENT, EXTRA, MISSING, Difference
from worker.proof.shadow import Shadow

TABLE: Final = "events"
ROWS_READ: Final = 500

# Only the range of the log is compared: its accounts and modes, from its first event to its last. Observations are left
# out unless the log has some, since otherwise only the inbox has them.
_COMPARED: Final = """
WITH covered AS (
    SELECT account, livemode, min(created) AS first, max(created) AS last, bool_or(source = 'observation') AS has_ours
    FROM {log} GROUP BY account, livemode
)
SELECT h.id IS NOT NULL, e.id IS NOT NULL, account, livemode, id, coalesce(h.created, e.created), h.seq, h.is_parked,
    CASE WHEN h.payload <> e.payload THEN h.payload END, CASE WHEN h.payload <> e.payload THEN e.payload END,
    e.type, e.created, e.object_type, e.object_id, e.source
FROM (
    SELECT i.*, coalesce(b.payload, a.payload) AS payload, coalesce(o.state = 'parked', false) AS is_parked
    FROM {inbox} AS i LEFT JOIN {payloads} AS b USING (seq) LEFT JOIN {archived} AS a USING (seq)
    LEFT JOIN {outcomes} AS o USING (seq)
    JOIN covered AS c USING (account, livemode)
    WHERE i.created BETWEEN c.first AND c.last AND (c.has_ours OR i.source <> 'observation')
) AS h
FULL JOIN (SELECT * FROM {log} JOIN {log_payloads} USING (seq)) AS e USING (account, livemode, id)
WHERE h.id IS NULL OR e.id IS NULL OR h.payload <> e.payload
    OR (h.payload IS NULL AND h.payload_sha256 <> e.payload_sha256)
ORDER BY 6, account, livemode, id
"""
_KEPT: Final = """
SELECT content_sha256 FROM {inbox} AS i JOIN {renderings} AS r USING (account, livemode, id)
WHERE i.seq = %(seq)s AND content_sha256 IS NOT NULL
UNION ALL SELECT content_sha256 FROM {contents} WHERE seq = %(seq)s
"""


def compare(made: Shadow, *, on_difference: Callable[[Difference], None]) -> dict[str, int]:
    """Compare the live inbox with that of *made*, and return how many differences there are of each kind.

    *on_difference* is called with each difference. A copy of an event is no difference if the inbox keeps its content
    too, or has the event in another API version. It is one, however, if the copy could be folded and that of the inbox
    is parked. An archived event is compared by hashes. If no hash of its content is kept, it is counted as
    ``archived``.
    """
    names = {
        "log": sql.Identifier(made.schema, "inbox"),
        "log_payloads": sql.Identifier(made.schema, "payloads"),
        "inbox": sql.Identifier(made.live, "inbox"),
        "payloads": sql.Identifier(made.live, "payloads"),
        "archived": sql.Identifier(made.schema, "archived"),
        **{name: sql.Identifier(made.live, name) for name in ("outcomes", "renderings", "contents")},
    }
    counts = {"events": 0, "missing_here": 0, "missing_there": 0, "different": 0}
    with database.transaction(made.engine, may_idle=True) as connection, database.cursor(connection) as cursor:
        database.take_snapshot(cursor)
        cursor.execute(sql.SQL("SELECT count(*) FROM {log}").format(**names))
        (counts["events"],) = cursor.fetchone() or (0,)
        with cursor.connection.cursor("compared", binary=True) as rows:
            rows.itersize = ROWS_READ
            rows.execute(sql.SQL(_COMPARED).format(**names))
            for row in rows:
                kind = _kind_of(row, lambda seq: _kept(cursor, names, seq))
                if kind is None:
                    continue
                counts[_COUNTED.get(kind, kind)] = counts.get(_COUNTED.get(kind, kind), 0) + 1
                if kind != ARCHIVED:
                    _, _, account, livemode, event, created, *_ = row
                    column = "payload" if kind == DIFFERENT else None
                    on_difference(Difference(TABLE, kind, account, livemode, event, column, at=created))
    return counts


ARCHIVED: Final = "archived"
_COUNTED: Final = {MISSING: "missing_here", EXTRA: "missing_there"}


def _kept(cursor: Cursor, names: Mapping[str, sql.Composable], seq: int) -> set[bytes]:
    """Return the hashes of an event's other contents that are kept, and of its archived content."""
    cursor.execute(sql.SQL(_KEPT).format(**names), {"seq": seq})
    return {bytes(content) for (content,) in cursor.fetchall()}


def _kind_of(row: Sequence[Any], kept: Callable[[int], set[bytes]]) -> str | None:
    """Return the kind of difference that a row of ``_COMPARED`` is; None where it is none."""
    is_held, is_expected, account, livemode, event, _, seq, is_parked, payload, expected, *more = row
    if not is_held or not is_expected:
        return EXTRA if is_held else MISSING
    if payload is None:
        return _kind_of_archived(expected, kept(seq))
    if is_parked:
        kind, created, object_type, object_id, source = more
        copy = Event(0, account, livemode, event, kind, created, object_type, object_id, bytes(expected), source)
        if folds.judge(copy).state != "parked":
            return DIFFERENT
    if _is_of_another_version(bytes(payload), bytes(expected)):
        return None
    content = contents.hash_of(bytes(expected))
    return None if content == contents.hash_of(bytes(payload)) or content in kept(seq) else DIFFERENT


def _kind_of_archived(expected: bytes | None, kept: set[bytes]) -> str | None:
    if not kept or expected is None:
        return ARCHIVED
    return None if contents.hash_of(bytes(expected)) in kept else DIFFERENT


def _is_of_another_version(one: bytes, other: bytes) -> bool:
    """Return whether two copies have different API versions, in which the same content has another form."""
    versions = [events.value_at(each, "api_version") for each in (one, other)]
    return versions[0] != versions[1]


def record_missing(
    engine: Engine, paths: Sequence[str], *, account: str, secrets: Sequence[SigningSecret] = ()
) -> tuple[int, int]:
    """Record the events of the logs at *paths* that the inbox lacks, and fold them.

    Returns how many events were new, and how many parked ones could be folded thanks to a better copy.
    """
    done = replay.replay(engine, Reading(paths, datetime.now(UTC), account=account, secrets=secrets))
    return done.counts[Recorded.NEW.value], done.counts[recording.MENDED]
