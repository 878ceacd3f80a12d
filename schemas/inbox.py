"""The inbox: the only door by which anything that Payfold comes to know enters its tables.

Note [An account is recorded under its newest name]
    The statement that records reads ``account_names`` itself, so a rename that is committed holds for every process at
    once: webhook, replay, jobs and commands. Who renames locks the tables that arrivals are written to (see
    worker/renaming.py), so that a statement either ended before, and its rows are moved, or begins after, and sees the
    name. Few databases have such names. So ``RECORD`` only looks for one of a given account, and then records nothing;
    ``RECORD_NAMED`` then renames. Two deliveries of one statement may be one event once they are renamed: the newer
    rendering is kept, as ``newest_of_each`` does.
"""

import base64
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from itertools import accumulate
from typing import Any, Final

import msgspec
import psycopg
import structlog
from msgspec import Struct
from psycopg import sql
from sqlalchemy import Engine

from schemas import database, events
from schemas.database import Cursor, boolean_array, integer_array, text_array
from schemas.events import Envelope

RECORD_ROWS_MAX = 1000
"""Deliveries in one statement: more bytes at once gain nothing and hold locks for longer."""


PARTITION_EVENTS: Final = 1_000_000
"""Numbers for which a partition keeps the payloads."""
ROOM_LOCK: Final = "1s"
"""For so long a new partition waits for those who read: whoever comes behind it waits as well."""
ROOM_BOUNDS: Final = database.BATCH._replace(statement=18)
"""To make a partition may take nearly as long as a transaction may: it is compared with the rest."""

_log = structlog.get_logger()


class Recorded(Enum):
    """What recording a delivery did."""

    NEW = "new"
    NEWER_RENDERING = "newer rendering"
    DUPLICATE = "duplicate"


class Receipt(Struct, frozen=True):
    """What recording a delivery did, and the event's number in the inbox; None for a duplicate."""

    recorded: Recorded
    seq: int | None


_DUPLICATE: Final = Receipt(Recorded.DUPLICATE, None)


class Delivery(Struct, frozen=True):
    """An event on its way into the inbox.

    ``account`` is the event's own or the label of the secret that verified it, and is recorded under its newest name:
    see Note [An account is recorded under its newest name]. ``sha256`` is of the body as it came; ``signature`` is the
    header that vouched for it, None where none did.
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

    def named(self, names: Mapping[str, str]) -> "Delivery":
        """Return it with its account called by the newest of *names*, by the old ones."""
        new = names.get(self.account)
        return self if new is None else msgspec.structs.replace(self, account=new)

    @property
    def rendering(self) -> str:
        """The date of the API version that shaped the payload; versions sort by it alone."""
        return (self.envelope.api_version or "")[:10]


_NEXT_SEQ: Final = "nextval((SELECT pg_get_serial_sequence('inbox', 'seq')::regclass))"
# Numbers are drawn in the order of arrival, so that an object's events are folded as they came. Rows are written in the
# order of their keys: two statements with the same events in another order would wait for each other for ever. Rows
# that were there come back from neither branch: that is how a duplicate is told.
_RECORD: Final = """
WITH renamed AS MATERIALIZED (
    SELECT NOT {may_rename} AND EXISTS (SELECT FROM account_names WHERE old = ANY (%(account)s::text[])) AS is_so
), given AS MATERIALIZED (
    SELECT *, {seq} AS seq FROM unnest(
        %(account)s::text[], %(livemode)s::boolean[], %(id)s::text[], %(type)s::text[], %(api_version)s::text[],
        %(created)s::bigint[], %(object_type)s::text[], %(object_id)s::text[],
        %(begins)s::integer[], %(size)s::integer[],
        %(redacted)s::text[], %(payload_sha256)s::text[], %(signature)s::text[], %(source)s::text[],
        %(received_at)s::timestamptz[]
    ) AS t (account, livemode, id, type, api_version, created, object_type, object_id, begins, size, redacted,
        payload_sha256, signature, source, received_at)
    WHERE NOT (SELECT is_so FROM renamed)
), named AS {named}, recorded AS (
    INSERT INTO inbox AS known (account, livemode, id, seq, type, api_version, created, object_type, object_id,
        redacted, payload_sha256, signature, source, received_at)
    OVERRIDING SYSTEM VALUE
    SELECT name, livemode, id, seq, type, nullif(api_version, ''), to_timestamp(created), nullif(object_type, ''),
        nullif(object_id, ''), string_to_array(redacted, ' '), decode(payload_sha256, 'hex'), nullif(signature, ''),
        source, received_at
    FROM named ORDER BY name, livemode, id
    ON CONFLICT (account, livemode, id) DO UPDATE SET
        api_version = excluded.api_version, object_type = excluded.object_type, object_id = excluded.object_id,
        redacted = excluded.redacted, payload_sha256 = excluded.payload_sha256, signature = excluded.signature
    WHERE left(excluded.api_version, 10) > left(coalesce(known.api_version, ''), 10)
    RETURNING known.seq, known.account AS name, known.livemode, known.id, known.xmax = 0 AS is_new
), placed AS MATERIALIZED (
    SELECT n.account, livemode, id, r.is_new, r.seq, n.begins, n.size
    FROM recorded AS r JOIN named AS n USING (name, livemode, id)
), kept AS (
    INSERT INTO payloads (seq, payload)
    SELECT seq, substring(%(payloads)b::bytea FROM begins FOR size) FROM placed ORDER BY seq
    ON CONFLICT (seq) DO UPDATE SET payload = excluded.payload
), queued AS (
    INSERT INTO pending (seq, again) SELECT seq, NOT is_new FROM recorded ORDER BY seq
    ON CONFLICT (seq) DO UPDATE SET again = true, attempts = 0, due_at = NULL, cause = NULL, reason = NULL
)
SELECT account, livemode, id, is_new, seq FROM placed
UNION ALL SELECT NULL, NULL, NULL, NULL, NULL FROM renamed WHERE is_so
"""
_AS_GIVEN: Final = "NOT MATERIALIZED (SELECT account AS name, * FROM given)"
_BY_NEWEST_NAME: Final = """MATERIALIZED (
    SELECT DISTINCT ON (name, livemode, id) coalesce(n.new, given.account) AS name, given.*
    FROM given LEFT JOIN account_names AS n ON n.old = given.account
    ORDER BY name, livemode, id, left(api_version, 10) DESC, seq
)"""
RECORD: Final = _RECORD.format(seq=_NEXT_SEQ, named=_AS_GIVEN, may_rename="false")
RECORD_NAMED: Final = _RECORD.format(seq=_NEXT_SEQ, named=_BY_NEWEST_NAME, may_rename="true")
_TRY: Final = _RECORD.format(seq="%(seq)s::bigint", named=_AS_GIVEN, may_rename="true")

_REFUSAL: Final = (None,) * 5
"""The row by which ``RECORD`` answers that one of the accounts has a newer name, and that nothing is recorded."""


def arguments(deliveries: Sequence[Delivery]) -> dict[str, str | bytes]:
    """Return *deliveries* as the columns that ``RECORD`` takes, and their payloads one behind the other.

    An empty text stands for null: where one may be missing, none is ever empty.
    """
    envelopes = [delivery.envelope for delivery in deliveries]
    sizes = [len(envelope.payload) for envelope in envelopes]
    return {
        "account": text_array([delivery.account for delivery in deliveries]),
        "livemode": boolean_array(envelope.livemode for envelope in envelopes),
        "id": text_array([envelope.id for envelope in envelopes]),
        "type": text_array([envelope.type for envelope in envelopes]),
        "api_version": text_array([envelope.api_version or "" for envelope in envelopes]),
        "created": integer_array(envelope.created for envelope in envelopes),
        "object_type": text_array([envelope.object_type or "" for envelope in envelopes]),
        "object_id": text_array([envelope.object_id or "" for envelope in envelopes]),
        "begins": integer_array(accumulate(sizes[:-1], initial=1)),
        "size": integer_array(sizes),
        "payloads": b"".join([envelope.payload for envelope in envelopes]),
        "redacted": text_array([" ".join(envelope.redacted) for envelope in envelopes]),
        "payload_sha256": text_array([delivery.sha256.hex() for delivery in deliveries]),
        "signature": text_array([delivery.signature or "" for delivery in deliveries]),
        "source": text_array([delivery.source for delivery in deliveries]),
        "received_at": text_array([delivery.received_at.isoformat() for delivery in deliveries]),
    }


def newest_of_each(deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Return one delivery per event: the first of the newest rendering."""
    newest: dict[tuple[str, bool, str], Delivery] = {}
    for delivery in deliveries:
        known = newest.get(delivery.key)
        if known is None or delivery.rendering > known.rendering:
            newest[delivery.key] = delivery
    return list(newest.values())


def receipts(deliveries: Sequence[Delivery], rows: Sequence[tuple[str, bool, str, bool, int]]) -> list[Receipt]:
    """Return what became of each delivery, from the rows that recording answered, by the accounts that were given."""
    fresh = {
        (account, livemode, event): Receipt(Recorded.NEW if is_new else Recorded.NEWER_RENDERING, seq)
        for account, livemode, event, is_new, seq in rows
    }
    return [fresh.pop(delivery.key, _DUPLICATE) for delivery in deliveries]


def record(cursor: Cursor, deliveries: Sequence[Delivery]) -> list[Receipt]:
    """Record *deliveries* with one statement and return what became of each; the caller commits."""
    given = arguments(newest_of_each(deliveries))
    rows = cursor.execute(RECORD, given).fetchall()
    if _REFUSAL in rows:
        rows = cursor.execute(RECORD_NAMED, given).fetchall()
    return receipts(deliveries, rows)


async def record_async(connection: psycopg.AsyncConnection[Any], deliveries: Sequence[Delivery]) -> list[Receipt]:
    """Do as ``record`` does, on asyncio's connection."""
    given = arguments(newest_of_each(deliveries))
    rows = await (await connection.execute(RECORD, given)).fetchall()
    if _REFUSAL in rows:
        rows = await (await connection.execute(RECORD_NAMED, given)).fetchall()
    return receipts(deliveries, rows)


async def try_to_record(connection: psycopg.AsyncConnection[Any], *, bytes_min: int = 0) -> None:
    """Do all that recording an event of *bytes_min* bytes does; the caller rolls it back.

    The event's key and its number are of no other event and no other try, so that no one ever waits for its
    transaction. The number is drawn by chance and below zero: those of the sequence would fill partitions.
    """
    chance = secrets.randbits(62)
    # By chance as well, so that it is not compressed.
    filling = base64.b64encode(secrets.token_bytes(bytes_min * 3 // 4))
    body = b'{"id":"payfold_try_%x","type":"payfold.try","created":0,"data":{"object":{"filling":"%b"}}}' % (
        chance,
        filling,
    )
    delivery = Delivery(events.read(body), "", hashlib.sha256(body).digest(), None, "webhook", datetime.now(UTC))
    await connection.execute(_TRY, arguments([delivery]) | {"seq": -chance})


def payloads_of(cursor: Cursor, seqs: Sequence[int]) -> dict[int, bytes]:
    """Return the payloads of the events numbered *seqs*, by number, without those that are archived."""
    # By a list of numbers, and not by a join, so that the planner looks at no partition but theirs.
    cursor.execute(
        "SELECT seq, payload FROM payloads WHERE seq = ANY (%s::bigint[])", (integer_array(seqs),), binary=True
    )
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


def make_room(of: Engine) -> int | None:
    """Make the partitions that the next payloads will need, and return how many those are.

    What comes before one is made is kept with the rest, so being late loses nothing: where they cannot be made, for
    now because somebody reads everything, or at all, that is logged, and None is returned.

    Raises:
        DatabaseAway: when PostgreSQL does not answer.
    """
    try:
        with database.transaction(of, ROOM_BOUNDS) as connection, database.cursor(connection) as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = '{ROOM_LOCK}'")
            return _make_room(cursor)
    except database.DriverError as error:
        _log.warning("payloads.no_room_made", reason=database.condition(error))
        return None


def _make_room(cursor: Cursor) -> int:
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
