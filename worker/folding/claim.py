"""Claims pending events for folding, in whole or by shares, takes the locks, and queues events of older fold versions.

Note [Folding one object is exclusive]
    Two workers may claim events of one object. Each takes an advisory lock on every object of its batch, always in the
    same order, and loads the rows only then. So the second worker sees the rows that the first saved. The locks end
    with the transaction.

Note [A shard looks far ahead]
    Which shard an event belongs to is seen from its object, that is in the inbox, and the other shard's events lie
    between its own. To find a batch, at least two batches are looked through, and what is deleted before them is passed
    over until it is vacuumed away. So a look finds the events of several batches, and each of these takes the next of
    them that are still pending. What becomes pending before them, since it is to be folded once more, is found by the
    next look.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Final

import msgspec
import structlog
from msgspec import Struct

from schemas import inbox, locks
from schemas.database import Cursor, integer_array
from schemas.errors import Archived
from schemas.events import Key
from schemas.inbox import Delivery
from schemas.locks import share_folding
from schemas.own_events import BY_COMMAND, EVENT_IGNORED
from worker import folds
from worker.folding import renderings
from worker.folding.batch import Claimed
from worker.folding.renderings import Choice
from worker.folds.facts import Event, Subject, object_of, utc

_log: Final = structlog.get_logger()

LOOK_AHEAD_BATCHES: Final = 12
"""Batches of pending events that a shard looks through for its own; events that other workers hold are among them."""
REFOLD_EVENTS_MAX: Final = 5000
"""Events of older fold versions that one call queues."""


@dataclass(slots=True)
class Shard:
    """Shard *number* of the *of* shards of the pending events. All events of an object are in the same shard.

    *ahead* has its events that the last look found and that are not taken yet, by their numbers, oldest first.
    """

    number: int
    of: int
    ahead: list[int] = field(default_factory=list)


ENVELOPE: Final = "i.seq, i.account, i.livemode, i.id, i.type, i.created, i.object_type, i.object_id, i.source"
# Usually no event at all is ignored, and then nothing is looked up for the single events.
IGNORED_BECAUSE: Final = f"""CASE WHEN (SELECT EXISTS (SELECT FROM inbox WHERE type = '{EVENT_IGNORED}')) THEN (
    SELECT a.seq FROM inbox AS a
    WHERE a.type = '{EVENT_IGNORED}'
        AND (a.account, a.livemode, a.object_id) = (i.account, i.livemode, i.id)
    ORDER BY a.seq LIMIT 1
) END"""


def claim(
    cursor: Cursor,
    *,
    limit: int,
    only: Sequence[int] | None = None,
    shard: Shard | None = None,
    though_renamed: bool = False,
    compared: list[int] | None = None,
) -> list[Claimed]:
    """Take up to *limit* pending events that are due, oldest first, that no other worker has taken.

    With a *shard* it may miss pending events of that shard: see ``LOOK_AHEAD_BATCHES``. With *only* it takes the events
    of those numbers, due or not. Events of an account that is being renamed are taken only with *though_renamed*, by
    the rename itself: see logs/renaming.py. While copies are compared, *compared* holds the numbers of the events that
    were taken; it is empty afterwards.
    """
    # A swap of schemas, and a snapshot to compare the tables in, hold this lock exclusively.
    share_folding(cursor)
    common = {"limit": limit, "though_renamed": though_renamed}
    if only is not None:
        rows = _taken(cursor, _CLAIM_ONLY, common | {"only": integer_array(only)})
    elif shard is not None:
        rows = _of_shard(cursor, shard, common)
    else:
        rows = _taken(cursor, _CLAIM, common)
    underway = [] if compared is None else compared
    underway[:] = [row[0] for row in rows]
    choices = _choices(cursor, rows)
    underway.clear()
    _as_chosen(cursor, rows, choices)
    payloads = inbox.payloads_of(cursor, [seq for row in rows for seq in (row[0], row[10]) if seq is not None])
    # Ignored events and events that keep their outcome are not folded, so their payloads are not needed.
    standing = _standing(cursor, rows, choices)
    payloads = {row[0]: b"" for row in rows if row[10] is not None or row[0] in standing} | payloads
    archived = [row for row in rows if row[0] not in payloads]
    if archived:
        _leave(cursor, archived)
        if len(archived) == len(rows):
            return claim(cursor, limit=limit, only=only, shard=shard, though_renamed=though_renamed)
    return [
        Claimed(
            event_in(row, payloads),
            row[9] or (row[0] in choices and choices[row[0]].is_other and choices[row[0]].state is not None),
            None if row[10] is None else reason_of(payloads.get(row[10])),
            row[11],
            choices.get(row[0]),
            row[0] in standing,
        )
        for row in rows
        if row[0] in payloads
    ]


def _of_shard(cursor: Cursor, shard: Shard, common: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Take a batch of what was found ahead. If others have taken all of it since, look once more."""
    had_some = bool(shard.ahead)
    if not had_some:
        near = common["limit"] * LOOK_AHEAD_BATCHES
        cursor.execute(_AHEAD, {**common, "near": near, "number": shard.number, "of": shard.of}, binary=True)
        shard.ahead = [seq for (seq,) in cursor.fetchall()]
    rows = _taken(cursor, _CLAIM_AHEAD, {**common, "ahead": integer_array(shard.ahead)}) if shard.ahead else []
    last = rows[-1][0] if rows and len(rows) == common["limit"] else math.inf
    shard.ahead = [seq for seq in shard.ahead if seq > last]
    return rows if rows or not had_some else _of_shard(cursor, shard, common)


def _taken(cursor: Cursor, statement: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    cursor.execute(statement, parameters, binary=True)
    return cursor.fetchall()


def _choices(cursor: Cursor, rows: Sequence[Sequence[Any]]) -> dict[int, Choice]:
    """Return the choice among the copies of each event. A first delivery has no copies, so it is not looked up."""
    asked = [row[0] for row in rows if row[9] or row[12]]
    return renderings.examine(cursor, asked) if asked else {}


def _as_chosen(cursor: Cursor, rows: list[tuple[Any, ...]], choices: Mapping[int, Choice]) -> None:
    """Replace in *rows* the events of which another copy was chosen by what the inbox holds now."""
    moved = [seq for seq, choice in choices.items() if choice.moved]
    if not moved:
        return
    cursor.execute(f"SELECT {ENVELOPE} FROM inbox AS i WHERE seq = ANY (%s::bigint[])", (integer_array(moved),))
    found = {row[0]: row for row in cursor.fetchall()}
    rows[:] = [(*found.get(row[0], row[:9]), *row[9:]) for row in rows]


def _standing(cursor: Cursor, rows: Sequence[Sequence[Any]], choices: Mapping[int, Choice]) -> set[int]:
    """Return the events that keep their outcome: only copies of them came, and none with another content was chosen."""
    asked = [row[0] for row in rows if row[12] and not row[9] and not (row[0] in choices and choices[row[0]].is_other)]
    if not asked:
        return set()
    cursor.execute("SELECT seq FROM outcomes WHERE seq = ANY (%s::bigint[])", (integer_array(asked),))
    return {seq for (seq,) in cursor.fetchall()}


# Usually no rename is under way, and then nothing is looked up for the single events.
_SETTLED: Final = """
CASE WHEN %(though_renamed)s OR NOT (SELECT EXISTS (SELECT FROM account_names WHERE finished_at IS NULL)) THEN true
ELSE NOT EXISTS (
    SELECT FROM inbox AS i JOIN account_names AS n ON i.account IN (n.old, n.new)
    WHERE i.seq = pending.seq AND n.finished_at IS NULL OFFSET 0
) END"""
# Events that wait for their next try are skipped.
_DUE: Final = f"(due_at IS NULL OR due_at <= now()) AND {_SETTLED}"
_TAKEN: Final = f"""
SELECT {ENVELOPE}, taken.again, {IGNORED_BECAUSE}, taken.attempts, taken.copies
FROM taken CROSS JOIN LATERAL (SELECT * FROM inbox WHERE inbox.seq = taken.seq OFFSET 0) AS i ORDER BY i.seq
"""
_CLAIM: Final = f"""
WITH taken AS MATERIALIZED (
    SELECT seq, again, attempts, copies FROM pending WHERE {_DUE} ORDER BY seq LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
{_TAKEN}
"""
_CLAIM_ONLY: Final = f"""
WITH taken AS MATERIALIZED (
    SELECT seq, again, attempts, copies FROM pending WHERE seq = ANY (%(only)s::bigint[]) AND {_SETTLED}
    ORDER BY seq LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
{_TAKEN}
"""
# Look through a bounded number of pending events, so that a shard without any of its own finds that out quickly.
_AHEAD: Final = f"""
WITH near AS MATERIALIZED (
    SELECT seq FROM pending WHERE {_DUE} ORDER BY seq LIMIT %(near)s
)
SELECT near.seq
FROM near CROSS JOIN LATERAL (SELECT account, object_id FROM inbox WHERE inbox.seq = near.seq OFFSET 0) AS i
WHERE mod(hashtext(concat(i.account, i.object_id)), %(of)s) IN (%(number)s, %(number)s - %(of)s)
ORDER BY near.seq
"""
# They are locked one by one, until there are enough.
_CLAIM_AHEAD: Final = f"""
WITH taken AS MATERIALIZED (
    SELECT p.*
    FROM unnest(%(ahead)s::bigint[]) AS k (seq) CROSS JOIN LATERAL (
        SELECT seq, again, attempts, copies FROM pending WHERE pending.seq = k.seq AND {_DUE} FOR UPDATE SKIP LOCKED
    ) AS p
    LIMIT %(limit)s
)
{_TAKEN}
"""


def _leave(cursor: Cursor, archived: Sequence[Sequence[Any]]) -> None:
    """Delete events with archived payloads from ``pending``. Each keeps its outcome; one without any is parked."""
    seqs = [row[0] for row in archived]
    cursor.execute(
        "INSERT INTO outcomes (seq, state, reason, cause, attempts, folded_at, fold_version)"
        " SELECT seq, 'parked', 'its payload is archived', 'payload_archived', 1, now(), %s"
        " FROM unnest(%s::bigint[]) AS k (seq)"
        " ON CONFLICT (seq) DO NOTHING",
        (folds.FOLD_VERSION, seqs),
    )
    cursor.execute("DELETE FROM pending WHERE seq = ANY (%s)", (seqs,))
    for row in archived:
        _log.warning("event.archived", event_id=row[3], reason="it is not folded anew: its payload is archived")


def event_in(row: Sequence[Any], payloads: Mapping[int, bytes]) -> Event:
    """Return the event of a row of ``ENVELOPE``.

    Raises:
        Archived: when its payload is archived.
    """
    payload = payloads.get(row[0])
    if payload is None:
        raise Archived(
            f"The payload of {row[3]} is archived: "
            "`payfold rebuild --archive DIR --swap` folds its object from the archive."
        )
    return Event(*(*row[:8], payload, row[8]))


def event_of_delivery(delivery: Delivery) -> Event:
    """Return the event that would be claimed once *delivery* is recorded. Its number is 0."""
    envelope = delivery.envelope
    return Event(
        seq=0,
        account=delivery.account,
        livemode=envelope.livemode,
        id=envelope.id,
        type=envelope.type,
        created=utc(envelope.created),
        object_type=envelope.object_type,
        object_id=envelope.object_id,
        payload=envelope.payload,
        source=delivery.source,
    )


class _Ignored(Struct):
    reason: str | None = None
    by: str | None = None


class _IgnoredData(Struct):
    object: _Ignored


class _IgnoredEvent(Struct):
    data: _IgnoredData


_decode_ignored = msgspec.json.Decoder(_IgnoredEvent).decode


def reason_of(observation: bytes | None) -> str:
    """Return the reason of an *observation* by which an operator ignores an event; pass None where it is archived.

    The observation ignores its event even where it is malformed, as one from a replayed log may be.
    """
    try:
        word = _Ignored() if observation is None else _decode_ignored(observation).data.object
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        word = _Ignored()
    # NUL is the only character that PostgreSQL's text cannot hold.
    reason, by = ((text or "").replace("\0", "") for text in (word.reason, word.by))
    who = f"the token {by}" if by and by != BY_COMMAND else "an operator"
    return f"set aside by {who}: {reason}" if reason else f"set aside by {who}"


def try_locks(cursor: Cursor, subjects: Sequence[Subject]) -> set[Subject]:
    """Return those of *subjects* that no one else holds, and hold them until the transaction ends."""
    if not subjects:
        return set()
    held = locks.try_objects(cursor, [object_of(subject) for subject in subjects])
    return set(compress(subjects, held))


def lock_objects(cursor: Cursor, subjects: Iterable[Subject], objects: Iterable[Key]) -> None:
    """Wait for the locks of *objects* and of the objects of *subjects*, and hold them until the transaction ends."""
    # A row is locked by the object that has its events, so that the row and its children share one lock.
    locks.lock_objects(cursor, {object_of(subject) for subject in subjects}.union(objects))


def queue_outdated(cursor: Cursor, *, limit: int = REFOLD_EVENTS_MAX, fold_version: int = folds.FOLD_VERSION) -> int:
    """Queue up to *limit* events with an outcome of an older fold version, and return how many.

    Events with an archived payload are left out, because without the payload they could only be parked.
    """
    queued, version, seq = 0, -1, -1
    # Each pass starts at the first payload that is not archived, so that no pass reads through the archived events.
    while queued < limit:
        # A statement of its own: to plan what reads payloads takes longer with each of their partitions.
        cursor.execute(_OLDEST, {"version": version, "newest": fold_version})
        found = cursor.fetchone()
        if found is None:
            break
        (version,) = found
        cursor.execute(_OUTDATED, {"version": version, "seq": seq, "limit": limit})
        outdated = [each for (each,) in cursor.fetchall()]
        if not outdated:
            version, seq = version + 1, -1
            continue
        cursor.execute(_QUEUE, (outdated, limit - queued))
        queued += cursor.rowcount
        seq = outdated[-1] + 1
    return queued


# The oldest fold version from *version* on.
_OLDEST: Final = """
SELECT fold_version FROM outcomes WHERE fold_version >= %(version)s AND fold_version < %(newest)s
ORDER BY fold_version LIMIT 1
"""
# The events that *version* folded, numbered from *seq* on, from the first payload that is not archived.
_OUTDATED: Final = """
SELECT seq FROM outcomes
WHERE fold_version = %(version)s AND seq >= (SELECT seq FROM payloads WHERE seq >= %(seq)s ORDER BY seq LIMIT 1)
ORDER BY seq LIMIT %(limit)s
"""
_QUEUE: Final = """
INSERT INTO pending (seq, again)
SELECT seq, true FROM unnest(%s::bigint[]) AS k (seq)
WHERE EXISTS (SELECT FROM payloads AS b WHERE b.seq = k.seq)
    AND NOT EXISTS (SELECT FROM pending AS p WHERE p.seq = k.seq)
ORDER BY seq LIMIT %s
ON CONFLICT (seq) DO NOTHING
"""
