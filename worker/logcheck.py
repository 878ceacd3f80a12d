"""Holds the inbox against somebody else's log: what is missing here, or there, and what is told otherwise."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

import msgspec
from psycopg import sql
from sqlalchemy import Engine

from schemas import database, inbox
from schemas.inbox import RECORD_ROWS_MAX, Recorded
from worker import eventlog, projection
from worker.difference import DIFFERENT, EXTRA, MISSING, Difference
from worker.shadow import Shadow

TABLE: Final = "events"
ROWS_READ: Final = 500

# Of what the log covers, and no more: its accounts and modes, from its first event to its last. Observations are ours
# alone, unless the log has some.
_COMPARED: Final = """
WITH covered AS (
    SELECT account, livemode, min(created) AS first, max(created) AS last, bool_or(source = 'observation') AS has_ours
    FROM {log} GROUP BY account, livemode
)
SELECT h.id IS NOT NULL, e.id IS NOT NULL, account, livemode, id, coalesce(h.created, e.created),
    CASE WHEN h.payload <> e.payload THEN h.payload END, CASE WHEN h.payload <> e.payload THEN e.payload END
FROM (
    SELECT i.*, coalesce(b.payload, a.payload) AS payload
    FROM {inbox} AS i LEFT JOIN {payloads} AS b USING (seq) LEFT JOIN {archived} AS a USING (seq)
    JOIN covered AS c USING (account, livemode)
    WHERE i.created BETWEEN c.first AND c.last AND (c.has_ours OR i.source <> 'observation')
) AS h
FULL JOIN (SELECT * FROM {log} JOIN {log_payloads} USING (seq)) AS e USING (account, livemode, id)
WHERE h.id IS NULL OR e.id IS NULL OR h.payload <> e.payload
    OR (h.payload IS NULL AND h.payload_sha256 <> e.payload_sha256)
ORDER BY 6, account, livemode, id
"""


def compare(made: Shadow, *, tell: Callable[[Difference], None]) -> dict[str, int]:
    """Compare the live inbox with that of *made*, tell each difference, and return how many there are of each kind.

    An event whose payload is archived is compared by its hash; where that differs, nobody can tell whether it says
    something else, and it is counted as ``archived``.
    """
    names = {
        "log": sql.Identifier(made.schema, "inbox"),
        "log_payloads": sql.Identifier(made.schema, "payloads"),
        "inbox": sql.Identifier(made.live, "inbox"),
        "payloads": sql.Identifier(made.live, "payloads"),
        "archived": sql.Identifier(made.schema, "archived"),
    }
    counts = {"events": 0, "missing_here": 0, "missing_there": 0, "different": 0}
    with database.transaction(made.engine, may_idle=True) as connection, database.cursor(connection) as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        cursor.execute(sql.SQL("SELECT count(*) FROM {log}").format(**names))
        (counts["events"],) = cursor.fetchone() or (0,)
        with cursor.connection.cursor("compared", binary=True) as rows:
            rows.itersize = ROWS_READ
            rows.execute(sql.SQL(_COMPARED).format(**names))
            for is_held, is_expected, account, livemode, event, created, held, expected in rows:
                if is_held and is_expected and held is None:
                    counts["archived"] = counts.get("archived", 0) + 1
                    continue
                if is_held and is_expected and not _differs(bytes(held), bytes(expected)):
                    continue
                kind = DIFFERENT if is_held and is_expected else EXTRA if is_held else MISSING
                counts[{MISSING: "missing_here", EXTRA: "missing_there"}.get(kind, kind)] += 1
                column = "payload" if kind == DIFFERENT else None
                tell(Difference(TABLE, kind, account, livemode, event, column, at=created))
    return counts


def _differs(held: bytes, expected: bytes) -> bool:
    """Tell whether two renderings of one event say something else of its object; Stripe lays a list out in its own way.

    What another API version tells cannot be compared.
    """
    one, other = (_decoded(each) for each in (held, expected))
    if one is None or other is None:
        return True
    if one.get("api_version") != other.get("api_version"):
        return False
    return any(one.get(name) != other.get(name) for name in ("type", "created", "data"))


def _decoded(payload: bytes) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def record_missing(engine: Engine, paths: Sequence[str], *, account: str) -> int:
    """Record what the inbox lacks of the logs at *paths*, fold it, and return how many events that was."""
    recorded, now = 0, datetime.now(UTC)
    for path in paths:
        entries = eventlog.read(path, account=account, now=now)
        while chunk := list(islice(entries, RECORD_ROWS_MAX)):
            with database.transaction(engine) as connection, database.cursor(connection) as cursor:
                told = [entry.delivery for entry in chunk if entry.delivery is not None]
                recorded += sum(receipt.recorded is Recorded.NEW for receipt in inbox.record(cursor, told))
        while projection.run_once(engine, now=now):
            pass
    return recorded
