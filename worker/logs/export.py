"""Writes the inbox out as a log."""

from collections.abc import Iterator
from typing import Final

from sqlalchemy import Engine

from schemas import database, inbox
from worker.logs import writer
from worker.logs.selection import LogFilters

EXPORT_ROWS: Final = 500


def export(engine: Engine, *, filters: LogFilters, with_renderings: bool = False) -> Iterator[bytes]:
    """Yield the inbox as lines of our log, in the order in which it was recorded, without archived events.

    Of an event with several contents the folded one is exported, and with *with_renderings* the others after it.

    Each transaction reads a few events and ends before their lines are taken, so that a slow reader keeps no
    transaction open. Events that are recorded after the export has begun are left to the next export.
    """
    given = {"since": filters.since, "until": filters.until, "rows": EXPORT_ROWS}
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("SELECT coalesce(max(seq), 0) FROM inbox")
        (end,) = cursor.fetchone() or (0,)
    last: int | None = 0
    while last is not None:
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            cursor.execute(_NEXT, {**given, "after": last, "end": end})
            first, last = cursor.fetchone() or (None, None)
            statement = _ALL_EXPORTED if with_renderings else _EXPORTED
            cursor.execute(statement, {**given, "first": first, "last": last})
            rows = cursor.fetchall()
        for row in rows:
            yield writer.line_of(*row[:7])


def left_out(engine: Engine, *, filters: LogFilters) -> int:
    """Return how many events an export leaves out, since their payloads are archived."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(_LEFT_OUT, {"since": filters.since, "until": filters.until})
        (count,) = cursor.fetchone() or (0,)
        return int(count)


_LEFT_OUT: Final = """
SELECT count(*) FROM inbox AS i
WHERE (%(since)s::timestamptz IS NULL OR created >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR created < %(until)s)
    AND NOT EXISTS (SELECT FROM payloads AS b WHERE b.seq = i.seq)
"""
_NEXT: Final = """
SELECT min(seq), max(seq) FROM (
    SELECT seq FROM inbox
    WHERE seq > %(after)s AND seq <= %(end)s AND (%(since)s::timestamptz IS NULL OR created >= %(since)s)
        AND (%(until)s::timestamptz IS NULL OR created < %(until)s)
    ORDER BY seq LIMIT %(rows)s
) AS few
"""
# Each table has bounds of its own, so that PostgreSQL reads neither of them as a whole.
_EXPORTED: Final = """
SELECT account, source, received_at, signature, encode(payload_sha256, 'hex'), redacted, payload, i.seq
FROM inbox AS i JOIN payloads AS b USING (seq)
WHERE i.seq BETWEEN %(first)s AND %(last)s AND b.seq BETWEEN %(first)s AND %(last)s
    AND (%(since)s::timestamptz IS NULL OR created >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR created < %(until)s)
ORDER BY seq
"""
# The other contents come after the folded one.
_ALL_EXPORTED: Final = f"""
SELECT account, source, received_at, signature, sha256, redacted, payload FROM (
    SELECT account, source, received_at, signature, sha256, redacted, payload, seq, 0 AS place
    FROM ({_EXPORTED}) AS chosen (account, source, received_at, signature, sha256, redacted, payload, seq)
    UNION ALL
    SELECT account, r.source, r.received_at, r.signature, encode({inbox.BODY_SHA256}, 'hex'), r.redacted, r.payload,
        i.seq, 1
    FROM inbox AS i JOIN renderings AS r USING (account, livemode, id)
    WHERE i.seq BETWEEN %(first)s AND %(last)s AND r.payload IS NOT NULL
        AND (%(since)s::timestamptz IS NULL OR i.created >= %(since)s)
        AND (%(until)s::timestamptz IS NULL OR i.created < %(until)s)
) AS every ORDER BY seq, place, sha256
"""
