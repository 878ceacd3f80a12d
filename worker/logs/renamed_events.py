"""Finds the events that a rename moves, and joins those that both names have: see logs/renaming.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from schemas import inbox, tables
from schemas.database import Cursor, boolean_array, integer_array, text_array
from schemas.own_events import EVENT_IGNORED

Object = tuple[bool, str]
"""Mode and id of an object."""
EventKey = tuple[bool, str]
"""Mode and id of an event."""


def arrays_of(objects: Sequence[Object]) -> dict[str, str]:
    """Return *objects* as the parameters of the statements here."""
    return {
        "modes": boolean_array(livemode for livemode, _ in objects),
        "objects": text_array([each for _, each in objects]),
    }


# Each key is one probe of an index: see Note [A row is found by its key, by any plan] in
# worker/folding/rows.py.
_OBJECTS: Final = "unnest(%(modes)s::boolean[], %(objects)s::text[]) AS k (livemode, object_id)"
_EVENTS: Final = f"""
(SELECT * FROM (
    SELECT * FROM inbox WHERE {tables.id_hash("inbox.object_id")} = {tables.id_hash("k.object_id")} OFFSET 0
) AS i WHERE i.account = ANY (ARRAY[{{accounts}}]) AND (i.livemode, i.object_id) = (k.livemode, k.object_id)) AS i
"""
_MENTIONS: Final = """
(SELECT * FROM mentions WHERE account = ANY (ARRAY[{accounts}])
    AND (mentions.livemode, mentions.object_id) = (k.livemode, k.object_id) OFFSET 0) AS m
"""
_OLD: Final = {"accounts": "%(old)s"}
_NEW: Final = {"accounts": "%(new)s"}
_EITHER: Final = {"accounts": "%(old)s, %(new)s"}


def next_objects(
    cursor: Cursor, names: dict[str, str], after: EventKey, limit: int
) -> tuple[list[Object], list[int], EventKey]:
    """Return the objects of the next events of the old name, the numbers of those without an object, and the last one.

    Where there are no more, these are objects that only other events mention, or events that came behind *after*.
    """
    values = {**names, "mode": after[0], "event": after[1], "limit": limit}
    cursor.execute(_NEXT_EVENTS, values)
    if events := cursor.fetchall():
        objects = {(livemode, object_id) for livemode, _, object_id, _ in events if object_id is not None}
        livemode, event, *_ = events[-1]
        return sorted(objects), [seq for *_, object_id, seq in events if object_id is None], (livemode, event)
    cursor.execute(_NEXT_MENTIONED, values)
    if mentioned := cursor.fetchall():
        return mentioned, [], after
    cursor.execute("SELECT seq FROM inbox WHERE account = %(old)s LIMIT %(limit)s", values)
    return [], [seq for (seq,) in cursor.fetchall()], after


_NEXT_EVENTS: Final = """
SELECT livemode, id, object_id, seq FROM inbox
WHERE account = %(old)s AND (livemode, id) > (%(mode)s, %(event)s) ORDER BY livemode, id LIMIT %(limit)s
"""
_NEXT_MENTIONED: Final = """
SELECT DISTINCT livemode, object_id FROM mentions WHERE account = %(old)s ORDER BY livemode, object_id LIMIT %(limit)s
"""


def with_neighbours(
    cursor: Cursor, names: dict[str, str], objects: Sequence[Object], seqs: Sequence[int]
) -> list[Object]:
    """Return *objects*, and the objects that have to be moved with them.

    These are the objects of events that mention one of *objects*, since it could not be folded without these events,
    and the objects that an event of theirs has under the other name, if that copy is of another object.
    """
    found, news = set(objects), list(objects)
    while news or seqs:
        cursor.execute(_NEIGHBOURS, {**names, **arrays_of(news), "seqs": integer_array(seqs)})
        news, seqs = [each for each in cursor.fetchall() if each not in found], ()
        found.update(news)
    return sorted(found)


_NEIGHBOURS: Final = f"""
WITH k AS MATERIALIZED (SELECT * FROM {_OBJECTS}), own AS MATERIALIZED (
    SELECT i.account, i.livemode, i.id FROM k CROSS JOIN LATERAL {_EVENTS.format(**_EITHER)}
    UNION ALL
    SELECT account, livemode, id FROM inbox WHERE seq = ANY (%(seqs)s::bigint[])
)
SELECT i.livemode, i.object_id FROM k CROSS JOIN LATERAL {_MENTIONS.format(**_EITHER)}
CROSS JOIN LATERAL (SELECT * FROM inbox WHERE inbox.seq = m.seq OFFSET 0) AS i
WHERE i.object_id IS NOT NULL
UNION
SELECT i.livemode, i.object_id FROM own CROSS JOIN LATERAL (
    SELECT * FROM inbox
    WHERE account = CASE own.account WHEN %(old)s THEN %(new)s ELSE %(old)s END
        AND (inbox.livemode, inbox.id) = (own.livemode, own.id) OFFSET 0
) AS i WHERE i.object_id IS NOT NULL
"""


def both_of(cursor: Cursor, names: dict[str, str], objects: Sequence[Object]) -> list[Object]:
    """Return those of *objects* that are folded from events of both names."""
    cursor.execute(_BOTH.format(objects=_OBJECTS), {**names, **arrays_of(objects)})
    return cursor.fetchall()


def all_of_both(cursor: Cursor, names: dict[str, str]) -> list[Object]:
    """Return all objects that are folded from events of both names."""
    cursor.execute(_BOTH.format(objects=f"({_OF_BOTH}) AS k"), names)
    return cursor.fetchall()


_IS_FOLDED: Final = """
(EXISTS (SELECT FROM {events} JOIN outcomes USING (seq)) OR EXISTS (SELECT FROM {mentions}))
"""
_FOLDED_OF_OLD: Final = _IS_FOLDED.format(events=_EVENTS.format(**_OLD), mentions=_MENTIONS.format(**_OLD))
_FOLDED_OF_NEW: Final = _IS_FOLDED.format(events=_EVENTS.format(**_NEW), mentions=_MENTIONS.format(**_NEW))
_BOTH: Final = f"SELECT DISTINCT k.livemode, k.object_id FROM {{objects}} WHERE {_FOLDED_OF_OLD} AND {_FOLDED_OF_NEW}"
_OF_ONE: Final = """
(SELECT livemode, object_id FROM inbox WHERE account = {0} AND object_id IS NOT NULL
UNION SELECT livemode, object_id FROM mentions WHERE account = {0})
"""
_OF_BOTH: Final = f"{_OF_ONE.format('%(old)s')} INTERSECT {_OF_ONE.format('%(new)s')}"


def _seqs_of(cursor: Cursor, names: dict[str, str], objects: Sequence[Object], condition: str) -> list[int]:
    cursor.execute(_SEQS.format(condition=condition), {**names, **arrays_of(objects)})
    return [seq for (seq,) in cursor.fetchall()]


_SEQS: Final = f"""
WITH k AS MATERIALIZED (SELECT * FROM {_OBJECTS})
SELECT seq FROM (
    SELECT i.seq FROM k CROSS JOIN LATERAL {_EVENTS.format(**_EITHER)}
    UNION
    SELECT m.seq FROM k CROSS JOIN LATERAL {_MENTIONS.format(**_EITHER)}
) AS found WHERE {{condition}} ORDER BY seq
"""


def archived_of(cursor: Cursor, names: dict[str, str], objects: Sequence[Object]) -> list[int]:
    """Return the archived events that are needed to fold *objects* again."""
    return _seqs_of(cursor, names, objects, "NOT EXISTS (SELECT FROM payloads AS b WHERE b.seq = found.seq)")


def folded_of(cursor: Cursor, names: dict[str, str], objects: Sequence[Object]) -> list[int]:
    """Return the events that *objects* were folded from."""
    is_folded = "EXISTS (SELECT FROM outcomes AS o WHERE o.seq = found.seq AND o.state <> 'parked')"
    return _seqs_of(cursor, names, objects, is_folded) if objects else []


def events_of(cursor: Cursor, names: dict[str, str], objects: Sequence[Object]) -> list[int]:
    """Return the events of *objects* that the old name has."""
    cursor.execute(
        f"SELECT i.seq FROM {_OBJECTS} CROSS JOIN LATERAL {_EVENTS.format(**_OLD)}", {**names, **arrays_of(objects)}
    )
    return [seq for (seq,) in cursor.fetchall()]


RELABEL_MENTIONS: Final = f"""
UPDATE mentions AS m SET account = %(new)s FROM {_OBJECTS}
WHERE m.account = %(old)s AND (m.livemode, m.object_id) = (k.livemode, k.object_id)
"""
# An event that an operator ignored under one name may have been folded under the other.
SET_ASIDE: Final = f"""
SELECT i.seq FROM inbox AS w JOIN inbox AS i ON (i.account, i.livemode, i.id) = (w.account, w.livemode, w.object_id)
JOIN outcomes AS o ON o.seq = i.seq
WHERE w.type = '{EVENT_IGNORED}' AND w.account = %(new)s AND o.cause IS DISTINCT FROM 'set_aside'
"""


# ---- Events that both names have ----


def move_renderings(cursor: Cursor, values: Mapping[str, str]) -> None:
    """Relabel the other copies of the old name's events *seqs*, except those that the new name has too."""
    for statement in _MOVE_RENDERINGS:
        cursor.execute(statement, values)


_SAME_COPY: Final = """
EXISTS (
    SELECT FROM renderings AS n
    WHERE (n.account, n.livemode, n.id, n.payload_sha256) = (%(new)s, r.livemode, r.id, r.payload_sha256)
)
"""
_MOVE_RENDERINGS: Final = (
    f"""
    DELETE FROM renderings AS r USING inbox AS i
    WHERE i.seq = ANY (%(seqs)s::bigint[]) AND r.account = %(old)s AND (r.livemode, r.id) = (i.livemode, i.id)
        AND {_SAME_COPY}
    """,
    """
    UPDATE renderings AS r SET account = %(new)s FROM inbox AS i
    WHERE i.seq = ANY (%(seqs)s::bigint[]) AND r.account = %(old)s AND (r.livemode, r.id) = (i.livemode, i.id)
    """,
)


@dataclass(frozen=True, slots=True)
class _Pair:
    """One event under both names: the number that is *kept*, and the one that is *gone*."""

    kept: int
    gone: int


def pairs_of(cursor: Cursor, new: str, seqs: Sequence[int]) -> list[_Pair]:
    """Return a pair for each of the old name's events *seqs* that the *new* name has too; the lower number is kept."""
    cursor.execute(_DOUBLED, {"new": new, "seqs": integer_array(seqs)})
    return [_Pair(*row) for row in cursor.fetchall()]


_DOUBLED: Final = """
SELECT least(o.seq, n.seq), greatest(o.seq, n.seq)
FROM (SELECT livemode, id, seq FROM inbox WHERE seq = ANY (%(seqs)s::bigint[])) AS o
CROSS JOIN LATERAL (
    SELECT seq FROM inbox
    WHERE account = %(new)s AND (inbox.livemode, inbox.id) = (o.livemode, o.id) OFFSET 0
) AS n
"""


def join_pairs(cursor: Cursor, pairs: Sequence[_Pair], names: Mapping[str, str]) -> list[int]:
    """Make one event of each pair, with the copies of both, and return the numbers of those that were folded."""
    if not pairs:
        return []
    values = {
        **names,
        "kept": integer_array(pair.kept for pair in pairs),
        "gone": integer_array(pair.gone for pair in pairs),
        "seqs": integer_array(seq for pair in pairs for seq in (pair.kept, pair.gone)),
    }
    move_renderings(cursor, values)
    for statement in _JOIN:
        cursor.execute(statement, values)
    cursor.execute("SELECT seq FROM outcomes WHERE seq = ANY (%(kept)s::bigint[])", values)
    return [seq for (seq,) in cursor.fetchall()]


_PAIRS: Final = "unnest(%(kept)s::bigint[], %(gone)s::bigint[]) AS p (kept, gone)"
_GONE: Final = "seq = ANY (%(gone)s::bigint[])"
_COPY_SHA256: Final = inbox.COPY_SHA256.format(
    signed="g.signature IS NOT NULL AND g.verified", sha256="g.payload_sha256", payload="b.payload"
)
_JOIN: Final = (
    # As when a copy arrives, it is compared when the event is folded. If both are archived, only the kept one counts.
    f"""
    INSERT INTO renderings (account, livemode, id, type, api_version, created, object_type, object_id, redacted,
        payload_sha256, signature, verified, source, received_at, payload)
    SELECT %(new)s, g.livemode, g.id, g.type, g.api_version, g.created, g.object_type, g.object_id, g.redacted,
        {_COPY_SHA256}, g.signature, g.verified, g.source, g.received_at, b.payload
    FROM {_PAIRS} JOIN inbox AS g ON g.seq = p.gone JOIN inbox AS k ON k.seq = p.kept
    JOIN payloads AS b ON b.seq = p.gone
    WHERE g.payload_sha256 <> k.payload_sha256 OR cardinality(g.redacted) > 0
        OR (g.signature IS NOT NULL AND g.verified AND (k.signature IS NULL OR NOT k.verified))
    ON CONFLICT (account, livemode, id, payload_sha256) DO NOTHING
    """,
    f"""
    INSERT INTO outcomes (seq, state, reason, attempts, folded_at, fold_version, cause)
    SELECT p.kept, o.state, o.reason, o.attempts, o.folded_at, o.fold_version, o.cause
    FROM {_PAIRS} JOIN outcomes AS o ON o.seq = p.gone
    ON CONFLICT (seq) DO NOTHING
    """,
    f"DELETE FROM outcomes WHERE {_GONE}",
    f"DELETE FROM pending WHERE {_GONE}",
    f"DELETE FROM payloads WHERE {_GONE}",
    f"DELETE FROM contents WHERE {_GONE}",
    f"DELETE FROM inbox WHERE {_GONE}",
)
