"""The inbox: every fact that enters Payfold's tables enters here.

Note [An account is recorded under its newest name]
    The statement that records reads ``account_names`` itself, so a rename that is committed holds for every process at
    once: webhook, replay, jobs and commands. A rename locks the tables that arrivals are written to (see
    logs/renaming.py). So a statement either ends before it, and its rows are moved, or begins after it, and sees the
    new name. Few databases have such names. So ``RECORD`` only checks whether a given account has one. If so, it
    records nothing, and ``RECORD_NAMED`` then renames and records. Two deliveries of one statement may be one event
    once they are renamed: the first is recorded, and the other is a copy of it.

Note [A copy with other bytes is kept until it is compared]
    ``RECORD`` writes the first delivery of an event. For a later one ``KEEP_COPIES`` compares the hash of the body:
    the same bytes are a duplicate, unless this delivery is signed and the other was not. Other bytes are kept in
    ``renderings``. The fold looks for copies that are not compared yet, and finds out whether their content differs
    (see folding/renderings.py). ``KEEP_COPIES`` is a statement of its own, so that its snapshot includes the rows that
    ``RECORD`` waited for. It writes new rows alone, and none of ``pending``, so that it never waits for a fold to end.

Note [What names a copy]
    Where credentials are blanked, a log can claim any hash for the body. The hash is known only for a signed delivery,
    and for a payload that is as it came. So a copy that is unsigned and blanked is compared by its payload. In
    ``renderings`` a copy is named by the hash of its body if it is signed, else by the hash of the claimed hash and the
    payload together. So a signed delivery never shares a row with a copy that only claims to be the same.

Note [Payloads are vacuumed while they are in memory]
    Rows of payloads are never updated, so there is nothing to remove. But what looks for archived payloads reads the
    index alone, if vacuum has marked the pages as visible to all. PostgreSQL would do that once a table has grown by a
    fifth. By then the pages have left its memory; and if a checkpoint came between, a database with checksums logs each
    page whole, so a payload is written three times. After ``VACUUM_AFTER`` rows a page is still in memory, and only the
    mark is logged. Of payloads few rows are sampled by ANALYZE, since no query needs to know more of them.
"""

import base64
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import msgspec
import psycopg
from msgspec import Struct
from psycopg import sql

from schemas import database, events, locks
from schemas.database import Cursor, boolean_array, integer_array, text_array
from schemas.events import Envelope, Key
from schemas.lines import log

if TYPE_CHECKING:
    from sqlalchemy import Engine

RECORD_ROWS_MAX = 1000
"""Deliveries in one statement: more bytes at once gain nothing and hold locks for longer."""


PARTITION_EVENTS: Final = 1_000_000
"""A partition keeps the payloads of this many numbers."""
VACUUM_AFTER: Final = 10_000
"""Rows of a partition after which PostgreSQL is to vacuum it."""
VACUUMED_SOON: Final = (
    "ALTER TABLE {name} SET ("
    f"autovacuum_vacuum_insert_threshold = {VACUUM_AFTER}, autovacuum_vacuum_insert_scale_factor = 0"
    "), ALTER COLUMN seq SET STATISTICS 10, ALTER COLUMN payload SET STATISTICS 0"
)
"""Settings of a new partition: see Note [Payloads are vacuumed while they are in memory]."""
ROOM_LOCK: Final = "1s"
"""For this long a new partition waits for readers, since every statement that comes after it waits as well."""
ROOM_BOUNDS: Final = database.BATCH._replace(statement=18)
"""Making a partition may take nearly as long as a transaction may: the rest is scanned for rows that belong in it."""
REST_BYTES_MAX: Final = 2**30
"""Of a larger rest the scan might not end in time, and would keep others from reading payloads at each attempt."""


class Recorded(Enum):
    """What recording a delivery did."""

    NEW = "new"
    COPY = "copy"
    """Of an event that is there, with other bytes, or the first that is signed: the fold compares them."""
    DUPLICATE = "duplicate"


class Receipt(Struct, frozen=True):
    """What recording a delivery did, and the number of its event; None for a duplicate."""

    recorded: Recorded
    seq: int | None


_DUPLICATE: Final = Receipt(Recorded.DUPLICATE, None)


class Delivery(Struct, frozen=True):
    """An event on its way into the inbox.

    ``account`` is the event's own or the label of the secret that verified it, and is recorded under its newest name:
    see Note [An account is recorded under its newest name]. ``sha256`` is of the body as it came; ``signature`` is the
    header that came with it, None where none did. It is *verified* unless a log only quotes it.
    """

    envelope: Envelope
    account: str
    sha256: bytes
    signature: str | None
    source: str
    received_at: datetime
    verified: bool = True

    @property
    def signed(self) -> bool:
        """Whether one of our secrets vouches for it."""
        return self.signature is not None and self.verified

    @property
    def is_claimed(self) -> bool:
        """Whether its hash may be of other bytes: see Note [What names a copy]."""
        return not self.signed and bool(self.envelope.redacted)

    @property
    def sha256_chosen(self) -> bytes:
        """The hash that the delivery has in the inbox if it takes the place of another copy."""
        if not self.is_claimed:
            return self.sha256
        return hashlib.sha256(self.sha256 + self.envelope.payload).digest()

    @property
    def key(self) -> Key:
        """What makes two deliveries the same event."""
        return (self.account, self.envelope.livemode, self.envelope.id)

    def named(self, names: Mapping[str, str]) -> "Delivery":
        """Return the delivery under the newest name of its account; *names* has the newest name by each old one."""
        new = names.get(self.account)
        return self if new is None else msgspec.structs.replace(self, account=new)


_NEXT_SEQ: Final = "nextval((SELECT pg_get_serial_sequence('inbox', 'seq')::regclass))"
# Numbers are drawn in the order of arrival, so that an object's events are folded as they came. Rows are written in the
# order of their keys: two statements with the same events in another order would wait for each other for ever. Events
# that were there already are not returned.
_GIVEN: Final = """
    unnest(
        %(account)s::text[], %(livemode)s::boolean[], %(id)s::text[], %(type)s::text[], %(api_version)s::text[],
        %(created)s::bigint[], %(object_type)s::text[], %(object_id)s::text[],
        %(begins)s::integer[], %(size)s::integer[],
        %(redacted)s::text[], %(payload_sha256)s::text[], %(signature)s::text[], %(verified)s::boolean[],
        %(source)s::text[], %(received_at)s::timestamptz[]
    ) {ordinality} AS t (account, livemode, id, type, api_version, created, object_type, object_id, begins, size,
        redacted, payload_sha256, signature, verified, source, received_at{number})
"""
_RECORD: Final = """
WITH renamed AS MATERIALIZED (
    SELECT NOT {may_rename} AND EXISTS (SELECT FROM account_names WHERE old = ANY (%(account)s::text[])) AS is_so
), given AS MATERIALIZED (
    SELECT *, {seq} AS seq FROM {given}
    WHERE NOT (SELECT is_so FROM renamed)
), named AS {named}, recorded AS (
    INSERT INTO inbox (account, livemode, id, seq, type, api_version, created, object_type, object_id,
        redacted, payload_sha256, signature, verified, source, received_at)
    OVERRIDING SYSTEM VALUE
    SELECT name, livemode, id, seq, type, nullif(api_version, ''), to_timestamp(created), nullif(object_type, ''),
        nullif(object_id, ''), string_to_array(redacted, ' '), decode(payload_sha256, 'hex'), nullif(signature, ''),
        verified, source, received_at
    FROM named ORDER BY name, livemode, id
    ON CONFLICT (account, livemode, id) DO NOTHING
    RETURNING seq, account AS name, livemode, id
), placed AS MATERIALIZED (
    SELECT n.account, livemode, id, r.seq, n.begins, n.size
    FROM recorded AS r JOIN named AS n USING (name, livemode, id)
), kept AS (
    INSERT INTO payloads (seq, payload)
    SELECT seq, substring(%(payloads)b::bytea FROM begins FOR size) FROM placed ORDER BY seq
), queued AS (
    INSERT INTO pending (seq) SELECT seq FROM recorded ORDER BY seq
)
SELECT account, livemode, id, seq FROM placed
UNION ALL SELECT NULL, NULL, NULL, NULL FROM renamed WHERE is_so
"""
_AS_GIVEN: Final = "NOT MATERIALIZED (SELECT account AS name, * FROM given)"
_BY_NEWEST_NAME: Final = """MATERIALIZED (
    SELECT DISTINCT ON (name, livemode, id) coalesce(n.new, given.account) AS name, given.*
    FROM given LEFT JOIN account_names AS n ON n.old = given.account
    ORDER BY name, livemode, id, seq
)"""
_ONCE: Final = _GIVEN.format(ordinality="", number="")
RECORD: Final = _RECORD.format(given=_ONCE, seq=_NEXT_SEQ, named=_AS_GIVEN, may_rename="false")
RECORD_NAMED: Final = _RECORD.format(given=_ONCE, seq=_NEXT_SEQ, named=_BY_NEWEST_NAME, may_rename="true")
_TRY: Final = _RECORD.format(given=_ONCE, seq="%(seq)s::bigint", named=_AS_GIVEN, may_rename="true")

COPY_SHA256: Final = "CASE WHEN {signed} THEN {sha256} ELSE sha256({sha256} || {payload}) END"
"""What names a copy in ``renderings``: see Note [What names a copy]."""
BODY_SHA256: Final = """
CASE WHEN (r.signature IS NOT NULL AND r.verified) OR cardinality(r.redacted) > 0 OR r.payload IS NULL
THEN r.payload_sha256 ELSE sha256(r.payload) END
"""
"""The hash of the body of a row *r* of ``renderings``, or, where that cannot be known, what names it."""

# Copies that are kept already are left out before the insert, so that no lock is taken for them.
_KEEP_COPIES: Final = """
WITH named AS MATERIALIZED (
    SELECT *, {copy_sha256} AS copy_sha256 FROM (
        SELECT coalesce(n.new, t.account) AS name, t.*, decode(payload_sha256, 'hex') AS sha256,
            substring(%(payloads)b::bytea FROM begins FOR size) AS payload,
            signature <> '' AND verified AS is_signed
        FROM {given}
        LEFT JOIN account_names AS n ON n.old = t.account
    ) AS t
), others AS MATERIALIZED (
    SELECT DISTINCT ON (name, livemode, id, copy_sha256) named.*, i.seq
    FROM named CROSS JOIN LATERAL (
        SELECT seq, payload_sha256, signature IS NOT NULL AND verified AS is_signed, cardinality(redacted) > 0 AS is_cut
        FROM inbox
        WHERE (inbox.account, inbox.livemode, inbox.id) = (named.name, named.livemode, named.id) OFFSET 0
    ) AS i
    WHERE CASE
            WHEN named.is_signed THEN NOT i.is_signed OR i.payload_sha256 <> named.sha256
            WHEN named.redacted <> '' OR (i.is_cut AND NOT i.is_signed)
                -- Of what is archived the hash has to be believed.
                THEN coalesce(
                    (SELECT b.payload <> named.payload FROM payloads AS b WHERE b.seq = i.seq),
                    i.payload_sha256 <> named.sha256
                )
            ELSE i.payload_sha256 <> named.sha256
        END
        AND NOT EXISTS (
            SELECT FROM renderings AS r
            WHERE (r.account, r.livemode, r.id, r.payload_sha256) = (name, named.livemode, named.id, copy_sha256)
                AND ((r.signature IS NOT NULL AND r.verified) OR NOT named.is_signed)
        )
    ORDER BY name, livemode, id, copy_sha256, number
), kept AS (
    INSERT INTO renderings AS known (account, livemode, id, type, api_version, created, object_type, object_id,
        redacted, payload_sha256, signature, verified, source, received_at, payload)
    SELECT name, livemode, id, type, nullif(api_version, ''), to_timestamp(created), nullif(object_type, ''),
        nullif(object_id, ''), string_to_array(redacted, ' '), copy_sha256, nullif(signature, ''), verified, source,
        received_at, payload
    FROM others ORDER BY name, livemode, id, copy_sha256
    ON CONFLICT (account, livemode, id, payload_sha256) DO UPDATE SET
        type = excluded.type, api_version = excluded.api_version, created = excluded.created,
        object_type = excluded.object_type, object_id = excluded.object_id, redacted = excluded.redacted,
        signature = excluded.signature, verified = excluded.verified, source = excluded.source,
        received_at = excluded.received_at, payload = excluded.payload, content_sha256 = NULL
    WHERE excluded.signature IS NOT NULL AND excluded.verified AND (known.signature IS NULL OR NOT known.verified)
)
SELECT number, seq FROM others
"""
KEEP_COPIES: Final = _KEEP_COPIES.format(
    given=_GIVEN.format(ordinality="WITH ORDINALITY", number=", number"),
    copy_sha256=COPY_SHA256.format(signed="is_signed", sha256="sha256", payload="payload"),
)

_REFUSAL: Final = (None,) * 4
"""The row by which ``RECORD`` answers that one of the accounts has a newer name, and that nothing is recorded."""


def arguments(deliveries: Sequence[Delivery]) -> dict[str, str | bytes]:
    """Return *deliveries* as the columns that ``RECORD`` takes, and their payloads one behind the other.

    An empty text stands for null: a column that may be null never has an empty text.
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
        "verified": boolean_array(delivery.verified for delivery in deliveries),
        "source": text_array([delivery.source for delivery in deliveries]),
        "received_at": text_array([delivery.received_at.isoformat() for delivery in deliveries]),
    }


def first_of_each(deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Return the first delivery of each event."""
    first: dict[Key, Delivery] = {}
    for delivery in deliveries:
        first.setdefault(delivery.key, delivery)
    return list(first.values())


def record(cursor: Cursor, deliveries: Sequence[Delivery]) -> list[Receipt]:
    """Record *deliveries* and return what became of each; the caller commits."""
    given = arguments(first_of_each(deliveries))
    rows = cursor.execute(RECORD, given).fetchall()
    if _REFUSAL in rows:
        rows = cursor.execute(RECORD_NAMED, given).fetchall()
    receipts, further = _receipts(deliveries, rows)
    if further:
        found = cursor.execute(KEEP_COPIES, arguments([deliveries[at] for at in further])).fetchall()
        _note_copies(receipts, further, found)
    return receipts


async def record_async(connection: psycopg.AsyncConnection[Any], deliveries: Sequence[Delivery]) -> list[Receipt]:
    """Do as ``record`` does, on asyncio's connection."""
    given = arguments(first_of_each(deliveries))
    rows = await (await connection.execute(RECORD, given)).fetchall()
    if _REFUSAL in rows:
        rows = await (await connection.execute(RECORD_NAMED, given)).fetchall()
    receipts, further = _receipts(deliveries, rows)
    if further:
        values = arguments([deliveries[at] for at in further])
        _note_copies(receipts, further, await (await connection.execute(KEEP_COPIES, values)).fetchall())
    return receipts


def _receipts(
    deliveries: Sequence[Delivery], rows: Sequence[tuple[str, bool, str, int]]
) -> tuple[list[Receipt], list[int]]:
    """Return what became of each delivery, from the *rows* that are new, and which of them were not recorded."""
    fresh = {(account, livemode, event): Receipt(Recorded.NEW, seq) for account, livemode, event, seq in rows}
    receipts = [fresh.pop(delivery.key, _DUPLICATE) for delivery in deliveries]
    return receipts, [at for at, receipt in enumerate(receipts) if receipt is _DUPLICATE]


def _note_copies(receipts: list[Receipt], further: Sequence[int], rows: Sequence[tuple[int, int]]) -> None:
    for number, seq in rows:
        receipts[further[number - 1]] = Receipt(Recorded.COPY, seq)


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
    # By numbers in the text, and not by a join or a parameter, so that no partition but theirs is locked: a plan that
    # is kept for all parameters has all partitions in it.
    statement = sql.SQL("SELECT seq, payload FROM payloads WHERE seq = ANY ({}::bigint[])")
    cursor.execute(statement.format(sql.Literal(integer_array(seqs))), binary=True)
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


def make_room(of: "Engine", *, rest_bytes_max: int = REST_BYTES_MAX) -> int | None:
    """Make the partitions that the next payloads will need, and return how many those are.

    A payload that comes before its partition is made is kept with the rest, so being late loses nothing. Where
    partitions cannot be made (for now, because another session reads the whole table, or at all, because more than
    *rest_bytes_max* came too early), that is logged, and None is returned.

    Raises:
        DatabaseAway: when PostgreSQL does not answer.
    """
    try:
        with database.transaction(of, ROOM_BOUNDS) as connection, database.cursor(connection) as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = '{ROOM_LOCK}'")
            return _make_room(cursor, rest_bytes_max)
    except database.DriverError as error:
        log.warning("payloads.no_room_made", reason=database.condition(error))
        return None


def _make_room(cursor: Cursor, rest_bytes_max: int) -> int | None:
    locks.keep_others_from_making_partitions(cursor)
    cursor.execute(_NEXT_PARTITION, {"size": PARTITION_EVENTS})
    last, begins, rest_bytes = cursor.fetchone() or (0, 0, 0)
    if begins <= last + PARTITION_EVENTS and rest_bytes > rest_bytes_max:
        log.warning("payloads.no_room_made", reason="payloads_rest is too large to scan", bytes=rest_bytes)
        return None
    made = 0
    while begins <= last + PARTITION_EVENTS:
        name = sql.Identifier(f"payloads_from_{begins}")
        bounds = {"name": name, "begins": sql.Literal(begins), "ends": sql.Literal(begins + PARTITION_EVENTS)}
        # Made and then attached, which does not block processes that record at the same time.
        cursor.execute(
            sql.SQL(
                "CREATE TABLE {name} (LIKE payloads INCLUDING ALL) WITH (toast_tuple_target = 8160);"
                f" {VACUUMED_SOON};"
                " ALTER TABLE payloads ATTACH PARTITION {name} FOR VALUES FROM ({begins}) TO ({ends})"
            ).format(**bounds)
        )
        begins += PARTITION_EVENTS
        made += 1
    return made


# The next partition begins after all payloads, those in partitions and those that are kept with the rest.
_NEXT_PARTITION: Final = """
SELECT last, greatest(
    (
        SELECT coalesce(max(substr(c.relname, 15)::bigint + %(size)s), 0) FROM pg_inherits AS p
        JOIN pg_class AS c ON c.oid = p.inhrelid
        WHERE p.inhparent = 'payloads'::regclass AND c.relname ~ '^payloads_from_[0-9]+$'
    ),
    CASE WHEN EXISTS (SELECT FROM payloads_rest) THEN (last / %(size)s + 1) * %(size)s ELSE 0 END
), pg_relation_size('payloads_rest')
FROM (SELECT coalesce(max(seq), 0) AS last FROM inbox) AS known
"""
