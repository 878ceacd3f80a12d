"""The inbox: the only door by which anything that Payfold comes to know enters its tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Final

import psycopg
from psycopg import sql

from schemas.database import Cursor
from schemas.events import Envelope

RECORD_ROWS_MAX = 1000
"""Deliveries in one statement: more bytes at once gain nothing and hold locks for longer."""


PARTITION_EVENTS: Final = 1_000_000
"""Numbers for which a partition keeps the payloads."""


class Recorded(Enum):
    """What recording a delivery did."""

    NEW = "new"
    NEWER_RENDERING = "newer rendering"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What recording a delivery did, and the event's number in the inbox; None for a duplicate."""

    recorded: Recorded
    seq: int | None


_DUPLICATE: Final = Receipt(Recorded.DUPLICATE, None)


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event on its way into the inbox.

    ``account`` is the event's own or the label of the secret that verified it; ``sha256`` is of the body as
    it came; ``signature`` is the header that vouched for it, None where none did.
    """

    envelope: Envelope
    account: str
    sha256: bytes
    signature: str | None
    source: str
    received_at: datetime

    @property
    def key(self) -> tuple[str, bool, str]:
        """What makes two deliveries the same event."""
        return (self.account, self.envelope.livemode, self.envelope.id)

    @property
    def rendering(self) -> str:
        """The date of the API version that shaped the payload; versions sort by it alone."""
        return (self.envelope.api_version or "")[:10]


# Two statements that record the same events in another order would wait for each other for ever, hence the
# ORDER BY. Rows that were there come back from neither branch: that is how a duplicate is told.
RECORD: Final = """
WITH given AS (
    SELECT * FROM unnest(
        %b::text[], %b::boolean[], %b::text[], %b::text[], %b::text[], %b::bigint[], %b::text[], %b::text[],
        %b::bytea[], %b::text[], %b::bytea[], %b::text[], %b::text[], %b::timestamptz[]
    ) AS t (account, livemode, id, type, api_version, created, object_type, object_id, payload, redacted,
        payload_sha256, signature, source, received_at)
), recorded AS (
    INSERT INTO inbox AS known (account, livemode, id, type, api_version, created, object_type, object_id,
        redacted, payload_sha256, signature, source, received_at)
    SELECT account, livemode, id, type, api_version, to_timestamp(created), object_type, object_id,
        string_to_array(redacted, ' '), payload_sha256, signature, source, received_at
    FROM given ORDER BY account, livemode, id
    ON CONFLICT (account, livemode, id) DO UPDATE SET
        api_version = excluded.api_version, object_type = excluded.object_type, object_id = excluded.object_id,
        redacted = excluded.redacted, payload_sha256 = excluded.payload_sha256, signature = excluded.signature
    WHERE left(excluded.api_version, 10) > left(coalesce(known.api_version, ''), 10)
    RETURNING known.seq, known.account, known.livemode, known.id, known.xmax = 0 AS is_new
), kept AS (
    INSERT INTO payloads (seq, payload)
    SELECT seq, payload FROM recorded JOIN given USING (account, livemode, id) ORDER BY seq
    ON CONFLICT (seq) DO UPDATE SET payload = excluded.payload
), queued AS (
    INSERT INTO pending (seq, again) SELECT seq, NOT is_new FROM recorded ORDER BY seq
    ON CONFLICT (seq) DO UPDATE SET again = true
)
SELECT account, livemode, id, is_new, seq FROM recorded
"""


def arguments(deliveries: Sequence[Delivery]) -> list[list[Any]]:
    """Return *deliveries* as the columns that ``RECORD`` takes."""
    envelopes = [delivery.envelope for delivery in deliveries]
    return [
        [delivery.account for delivery in deliveries],
        [envelope.livemode for envelope in envelopes],
        [envelope.id for envelope in envelopes],
        [envelope.type for envelope in envelopes],
        [envelope.api_version for envelope in envelopes],
        [envelope.created for envelope in envelopes],
        [envelope.object_type for envelope in envelopes],
        [envelope.object_id for envelope in envelopes],
        [envelope.payload for envelope in envelopes],
        [" ".join(envelope.redacted) for envelope in envelopes],
        [delivery.sha256 for delivery in deliveries],
        [delivery.signature for delivery in deliveries],
        [delivery.source for delivery in deliveries],
        [delivery.received_at for delivery in deliveries],
    ]


def newest_of_each(deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Return one delivery per event: the first of the newest rendering."""
    newest: dict[tuple[str, bool, str], Delivery] = {}
    for delivery in deliveries:
        known = newest.get(delivery.key)
        if known is None or delivery.rendering > known.rendering:
            newest[delivery.key] = delivery
    return list(newest.values())


def receipts(deliveries: Sequence[Delivery], rows: Sequence[tuple[str, bool, str, bool, int]]) -> list[Receipt]:
    """Return what became of each delivery, from the rows that ``RECORD`` answered."""
    fresh = {
        (account, livemode, event): Receipt(Recorded.NEW if is_new else Recorded.NEWER_RENDERING, seq)
        for account, livemode, event, is_new, seq in rows
    }
    return [fresh.pop(delivery.key, _DUPLICATE) for delivery in deliveries]


def record(cursor: Cursor, deliveries: Sequence[Delivery]) -> list[Receipt]:
    """Record *deliveries* with one statement and return what became of each; the caller commits."""
    cursor.execute(RECORD, arguments(newest_of_each(deliveries)))
    return receipts(deliveries, cursor.fetchall())


async def record_async(connection: psycopg.AsyncConnection[Any], deliveries: Sequence[Delivery]) -> list[Receipt]:
    """Do as ``record`` does, on asyncio's connection."""
    cursor = await connection.execute(RECORD, arguments(newest_of_each(deliveries)))
    return receipts(deliveries, await cursor.fetchall())


def payloads_of(cursor: Cursor, seqs: Sequence[int]) -> dict[int, bytes]:
    """Return the payloads of the events numbered *seqs*, by number, without those that are archived."""
    # By a list of numbers, and not by a join, so that the planner looks at no partition but theirs.
    cursor.execute("SELECT seq, payload FROM payloads WHERE seq = ANY (%s)", (list(seqs),), binary=True)
    return dict(cursor.fetchall())


def partitions(cursor: Cursor) -> list[str]:
    """Return the names of the tables that the payloads are kept in, oldest first and the rest last."""
    cursor.execute(
        """
        SELECT c.relname FROM pg_inherits AS p JOIN pg_class AS c ON c.oid = p.inhrelid
        WHERE p.inhparent = 'payloads'::regclass ORDER BY c.relname = 'payloads_rest', length(c.relname), c.relname
        """
    )
    return [name for (name,) in cursor.fetchall()]


def make_room(cursor: Cursor) -> int:
    """Make the partitions that the next payloads will need, and return how many those are.

    What comes before one is made is kept with the rest, so being late loses nothing.
    """
    cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || ' payloads', 0))")
    cursor.execute(_NEXT_PARTITION, {"size": PARTITION_EVENTS})
    last, begins = cursor.fetchone() or (0, 0)
    made = 0
    while begins <= last + PARTITION_EVENTS:
        name = sql.Identifier(f"payloads_from_{begins}")
        bounds = {"name": name, "begins": sql.Literal(begins), "ends": sql.Literal(begins + PARTITION_EVENTS)}
        # Made and then attached, which leaves those alone who record meanwhile.
        cursor.execute(
            sql.SQL(
                "CREATE TABLE {name} (LIKE payloads INCLUDING ALL) WITH (toast_tuple_target = 8160);"
                " ALTER TABLE payloads ATTACH PARTITION {name} FOR VALUES FROM ({begins}) TO ({ends})"
            ).format(**bounds)
        )
        begins += PARTITION_EVENTS
        made += 1
    return made


# Begins after all that is, whether it has a partition or is kept with the rest.
_NEXT_PARTITION: Final = """
SELECT last, greatest(
    (
        SELECT coalesce(max(substr(c.relname, 15)::bigint + %(size)s), 0) FROM pg_inherits AS p
        JOIN pg_class AS c ON c.oid = p.inhrelid
        WHERE p.inhparent = 'payloads'::regclass AND c.relname ~ '^payloads_from_[0-9]+$'
    ),
    CASE WHEN EXISTS (SELECT FROM payloads_rest) THEN (last / %(size)s + 1) * %(size)s ELSE 0 END
)
FROM (SELECT coalesce(max(seq), 0) AS last FROM inbox) AS known
"""
