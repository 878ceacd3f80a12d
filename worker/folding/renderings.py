"""Chooses which copy of an event is folded, if copies with different contents came.

Note [One content is folded]
    Under one event id every different content is kept (see schemas/contents.py): the chosen one in ``inbox``, the
    others in ``renderings``. The choice depends on the contents alone. It prefers a content that these folds can read,
    then one that a verified delivery signed, then the newer API version, then the greater hash. So it is the same for
    every order of arrival. If one content was written in several ways, the first readable and signed one is kept.

    A copy is recorded as bytes, without a comparison (see Note [A copy with other bytes is kept until it is compared]).
    ``queue`` makes its event pending. The worker that claims the event has it alone, and ``examine`` compares the
    copies. If another copy is chosen, ``inbox`` and ``renderings`` exchange the two, and the objects of both are folded
    again. Otherwise the event keeps its outcome.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import structlog
from msgspec import Struct
from msgspec.structs import replace

from schemas import contents, inbox
from schemas.database import Cursor, id_arrays, integer_array, text_array
from worker import folds
from worker.folds.facts import Anomaly, Event

KEPT_MAX: Final = 16
"""Other contents of one event that are kept. Beyond these, those of least weight are dropped."""
QUEUED_MAX: Final = 1_000
"""Events that one call of ``queue`` makes pending."""
COMPARED_AT_ONCE: Final = 50
"""Events with copies to compare between two statements. Hosts end a transaction that waits long for its client."""
HASH_BYTES_SHOWN: Final = 8
NAMED_BY: Final = ("api_version",)
"""The details that identify an anomaly of copies. It stays the same anomaly while copies come and go."""

_log = structlog.get_logger()


class Rendering(Struct, frozen=True, kw_only=True):
    """One copy of an event, as it was written. *sha256* is its name, and *content* is None until it is compared.

    Its event has no payload if the payload is archived.
    """

    event: Event
    api_version: str | None
    sha256: bytes
    signed: bool
    content: bytes | None
    is_archived: bool = False
    is_chosen: bool = False
    verdict: folds.Verdict = folds.Verdict("folded")

    @property
    def is_readable(self) -> bool:
        """Whether these folds can read it. An archived copy counts as readable, because it was folded."""
        return self.is_archived or self.verdict.state != "parked"

    @property
    def version(self) -> str:
        """The date of its API version, by which versions are sorted."""
        return (self.api_version or "")[:10]

    @property
    def about(self) -> tuple[str, str, str]:
        """The event's type and its object's type and id. If copies differ in these, the event's id was reused."""
        return (self.event.type, self.event.object_type or "", self.event.object_id or "")

    @property
    def weight(self) -> tuple[bool, str, bytes]:
        """The order in which other copies are kept, the greatest first, readable or not."""
        return (self.signed, self.version, self.content or b"")

    @property
    def rank(self) -> tuple[bool, bool, str, bytes]:
        """The order by which a copy is chosen: the greatest."""
        return (self.is_readable, *self.weight)


class Choice(Struct, frozen=True):
    """The choice among several copies of one event.

    *kept* are the other contents, one copy of each; *dropped* counts the contents beyond ``KEPT_MAX``. *moved* is true
    if the chosen copy was not the chosen one before, and *is_other* if its content differs from the one before or only
    one of the two is readable. *state* is the outcome of the event until then. *is_more* is true if there are contents
    that were not known.
    """

    chosen: Rendering
    kept: tuple[Rendering, ...]
    anomalies: tuple[Anomaly, ...]
    moved: bool = False
    is_other: bool = False
    is_more: bool = False
    dropped: int = 0
    state: str | None = None

    @property
    def is_history(self) -> bool:
        """Whether changes by this choice are no news: the event had been folded, and the new copy is unsigned."""
        return self.is_other and self.state == "folded" and not self.chosen.signed


# ---- Choosing, which depends on the copies alone ----


def judged(rendering: Rendering, hashes: contents.Hashes) -> Rendering:
    """Return *rendering* with its content, computed by *hashes*, and these folds' verdict; unchanged if archived."""
    if rendering.is_archived:
        return rendering
    content = rendering.content or hashes.of(rendering.event.payload)
    return replace(rendering, content=content, verdict=folds.judge(rendering.event))


def chosen_of(copies: Iterable[Rendering]) -> tuple[Rendering, list[Rendering]]:
    """Return the copy of an event that is folded, and one of each other content, the weightiest first."""
    by_content: dict[bytes, list[Rendering]] = defaultdict(list)
    for copy in copies:
        by_content[copy.content or b""].append(copy)
    best = [max(several, key=_merit) for several in by_content.values()]
    # An archived copy cannot be folded, so it is chosen only if it was the chosen one before.
    at_hand = [each for each in best if each.is_chosen or not each.is_archived]
    chosen = max(at_hand or best, key=lambda each: each.rank)
    others = sorted((each for each in best if each is not chosen), key=lambda each: each.weight, reverse=True)
    return chosen, others


def _merit(copy: Rendering) -> tuple[bool, bool, bool]:
    """Return the order by which one copy of a content is better than another."""
    return (copy.is_readable, copy.signed, copy.is_chosen)


def choose(copies: Sequence[Rendering]) -> Choice:
    """Return the choice among *copies* of one event. One of them is in the inbox."""
    hashes = contents.Hashes()
    found = [judged(copy, hashes) for copy in copies]
    before = next(copy for copy in found if copy.is_chosen)
    if before.content is None:
        before, found = _guessed(before, found)
    chosen, others = chosen_of(found)
    kept = tuple(others[:KEPT_MAX])
    known = {copy.content for copy, given in zip(found, copies, strict=True) if given.content or given.is_chosen}
    return Choice(
        chosen,
        kept,
        tuple(anomalies_of([chosen, *kept])),
        moved=chosen is not before,
        is_other=(chosen.content, chosen.is_readable) != (before.content, before.is_readable),
        is_more=any(each.content not in known for each in (chosen, *kept)),
        dropped=len(others) - len(kept),
    )


def _guessed(archived: Rendering, found: Sequence[Rendering]) -> tuple[Rendering, list[Rendering]]:
    """Treat a copy that was archived without a hash as equal to a copy of its version, as nothing shows otherwise."""
    alike = [
        copy.content
        for copy in found
        if copy.content is not None and (copy.version, copy.about) == (archived.version, archived.about)
    ]
    guessed = replace(archived, content=max(alike, default=archived.sha256))
    return guessed, [guessed if copy is archived else copy for copy in found]


def anomalies_of(several: Sequence[Rendering]) -> list[Anomaly]:
    """Return the anomalies of an event with *several* contents.

    Different API versions write the same state differently, so only contents of one version can contradict each other.
    """
    found: list[Anomaly] = []
    abouts = sorted({each.about for each in several})
    if len(abouts) > 1:
        found.append(Anomaly("id_reused", {"events": [" ".join(filter(None, about)) for about in abouts]}))
    by_about: dict[tuple[str, tuple[str, str, str]], list[str]] = defaultdict(list)
    for each in several:
        shown = (each.content or b"")[:HASH_BYTES_SHOWN].hex()
        by_about[each.api_version or "", each.about].append(shown)
    differing: dict[str, list[str]] = defaultdict(list)
    types: dict[str, str] = {}
    for (version, about), hashes in sorted(by_about.items()):
        if len(hashes) > 1:
            differing[version] += hashes
            types.setdefault(version, about[0])
    for version, hashes in differing.items():
        detail = {"api_version": version or None, "type": types[version], "contents": sorted(hashes)}
        found.append(Anomaly("contents_differ", detail))
    return found


# ---- In the database ----

# A rebuild's schema reads the inbox of the live schema, and only the live schema may choose copies.
_IS_OWN: Final = """
SELECT count(DISTINCT relnamespace) = 1 FROM pg_class WHERE oid IN ('pending'::regclass, 'renderings'::regclass)
"""


def queue(cursor: Cursor) -> int:
    """Make events pending that have copies to compare, and return how many.

    Events that another worker has claimed are left for the next call.
    """
    cursor.execute("SELECT EXISTS (SELECT FROM renderings WHERE content_sha256 IS NULL)")
    if cursor.fetchone() != (True,) or not _is_own(cursor):
        return 0
    cursor.execute(_QUEUE, (QUEUED_MAX,))
    (count,) = cursor.fetchone() or (0,)
    return int(count)


def _is_own(cursor: Cursor) -> bool:
    cursor.execute(_IS_OWN)
    return cursor.fetchone() == (True,)


_QUEUE: Final = """
WITH fresh AS MATERIALIZED (
    SELECT i.seq, p.seq IS NOT NULL AS is_pending
    FROM (SELECT DISTINCT account, livemode, id FROM renderings WHERE content_sha256 IS NULL) AS r
    CROSS JOIN LATERAL (
        SELECT seq FROM inbox
        WHERE (inbox.account, inbox.livemode, inbox.id) = (r.account, r.livemode, r.id) OFFSET 0
    ) AS i
    LEFT JOIN LATERAL (SELECT seq, copies FROM pending WHERE pending.seq = i.seq OFFSET 0) AS p ON true
    WHERE p.copies IS NOT TRUE LIMIT %s
), idle AS MATERIALIZED (
    SELECT seq FROM pending WHERE seq = ANY (ARRAY(SELECT seq FROM fresh WHERE is_pending))
    ORDER BY seq FOR UPDATE SKIP LOCKED
), marked AS (
    UPDATE pending AS p SET copies = true, attempts = 0, due_at = NULL, cause = NULL, reason = NULL
    FROM idle WHERE p.seq = idle.seq
    RETURNING p.seq
), queued AS (
    INSERT INTO pending (seq, copies) SELECT seq, true FROM fresh WHERE NOT is_pending ORDER BY seq
    ON CONFLICT (seq) DO NOTHING
    RETURNING seq
)
SELECT (SELECT count(*) FROM marked) + (SELECT count(*) FROM queued)
"""


def examine(cursor: Cursor, seqs: Sequence[int]) -> dict[int, Choice]:
    """Choose among the copies of the events numbered *seqs*, which the caller has claimed, and write the choice.

    Returns the choice for each event that has several copies. A rebuild's schema reads the inbox of the live schema and
    may not change it. So in a rebuild nothing is written, and copies that the live schema has not compared yet are left
    out.
    """
    is_own = _is_own(cursor)
    cursor.execute(_COPIES, (integer_array(seqs),), binary=True)
    copies: dict[int, list[Rendering]] = defaultdict(list)
    for row in cursor.fetchall():
        if is_own or row[_CONTENT] is not None:
            copies[row[0]].append(_of_row(row))
    if not copies:
        return {}
    found: dict[int, Choice] = {}
    for seqs_at_once in _at_once([*copies]):
        some = {seq: copies[seq] for seq in seqs_at_once}
        states = _add_chosen(cursor, some)
        found |= {seq: _with_state(choose(several), states[seq], is_own=is_own) for seq, several in some.items()}
    if is_own:
        _write(cursor, copies, found)
    return found


def _at_once(seqs: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield *seqs* in parts of ``COMPARED_AT_ONCE``."""
    for start in range(0, len(seqs), COMPARED_AT_ONCE):
        yield seqs[start : start + COMPARED_AT_ONCE]


def _with_state(choice: Choice, state: str | None, *, is_own: bool) -> Choice:
    return replace(choice, moved=choice.moved and is_own, is_other=choice.is_other and is_own, state=state)


_EVENT: Final = "seq, account, livemode, id, type, created, object_type, object_id, payload, source"
_CONTENT: Final = 13
# Each key is one probe of an index, in the order in which recording writes: see the Note [A row is found by its key,
# by any plan] in worker/folding/rows.py.
_COPIES: Final = """
SELECT i.seq, r.account, r.livemode, r.id, r.type, r.created, r.object_type, r.object_id, r.payload, r.source,
    r.api_version, r.payload_sha256, r.signature IS NOT NULL AND r.verified, r.content_sha256, false
FROM (
    SELECT i.* FROM unnest(%s::bigint[]) AS k (seq) CROSS JOIN LATERAL (
        SELECT seq, account, livemode, id FROM inbox WHERE inbox.seq = k.seq OFFSET 0
    ) AS i ORDER BY account, livemode, id
) AS i CROSS JOIN LATERAL (
    SELECT * FROM renderings
    WHERE (renderings.account, renderings.livemode, renderings.id) = (i.account, i.livemode, i.id)
    ORDER BY payload_sha256 OFFSET 0
) AS r
"""
_CHOSEN: Final = """
SELECT i.seq, i.account, i.livemode, i.id, i.type, i.created, i.object_type, i.object_id, NULL::bytea, i.source,
    i.api_version, i.payload_sha256, i.signature IS NOT NULL AND i.verified,
    (SELECT content_sha256 FROM contents AS c WHERE c.seq = i.seq), true,
    (SELECT state FROM outcomes AS o WHERE o.seq = i.seq)
FROM inbox AS i WHERE i.seq = ANY (%s::bigint[])
"""


def _of_row(row: Sequence[Any]) -> Rendering:
    """Return the copy of a row of ``_COPIES`` or ``_CHOSEN``."""
    api_version, sha256, signed, content, is_chosen = row[10:15]
    return Rendering(
        event=Event(*(*row[:8], row[8] or b"", row[9])),
        api_version=api_version,
        sha256=sha256,
        signed=signed,
        content=content,
        is_archived=row[8] is None,
        is_chosen=is_chosen,
    )


def _add_chosen(cursor: Cursor, copies: dict[int, list[Rendering]]) -> dict[int, str | None]:
    """Add to *copies* the copy in the inbox of each event, and return the state of each event's outcome."""
    cursor.execute(_CHOSEN, (integer_array(copies),), binary=True)
    rows = cursor.fetchall()
    payloads = inbox.payloads_of(cursor, [row[0] for row in rows])
    for row in rows:
        payload = payloads.get(row[0])
        # A kept hash is that of an archived payload. If a payload is there, it may have replaced that one since.
        content = row[_CONTENT] if payload is None else None
        copies[row[0]].append(_of_row([*row[:8], payload, *row[9:_CONTENT], content, row[14]]))
    return {row[0]: row[15] for row in rows}


def _write(cursor: Cursor, copies: Mapping[int, Sequence[Rendering]], found: Mapping[int, Choice]) -> None:
    """Write the choices: chosen copies into the inbox and the others into ``renderings``. All further copies go."""
    moved = {seq: choice.chosen for seq, choice in found.items() if choice.moved}
    left = [(each, seq) for seq in moved for each in found[seq].kept if each.is_chosen]
    stays = {
        (seq, each.sha256)
        for seq, choice in found.items()
        for each in (choice.chosen, *choice.kept)
        if not each.is_chosen
    }
    going = [copy for seq in copies for copy in copies[seq] if not copy.is_chosen and (seq, copy.sha256) not in stays]
    _delete(cursor, going)
    if moved:
        _exchange(cursor, moved, left)
        _delete(cursor, list(moved.values()))
    _note_contents(cursor, [copy for choice in found.values() for copy in choice.kept if not copy.is_chosen])
    for choice in found.values():
        if choice.dropped:
            _log.warning("renderings.dropped", event_id=choice.chosen.event.id, contents=choice.dropped, kept=KEPT_MAX)


def _exchange(cursor: Cursor, moved: Mapping[int, Rendering], left: Sequence[tuple[Rendering, int]]) -> None:
    """Put the copies *moved* into the inbox, and the earlier ones that are *left* into ``renderings``."""
    keep = (integer_array(seq for _, seq in left), _hex(copy.content for copy, _ in left))
    cursor.execute(_SET_ASIDE, keep)
    seqs, hashes = integer_array(moved), _hex(copy.sha256 for copy in moved.values())
    for statement in (_REPLACE, _REPLACE_PAYLOAD):
        cursor.execute(statement, (seqs, hashes))
    cursor.execute("DELETE FROM contents WHERE seq = ANY (%s::bigint[])", (seqs,))


def _hex(hashes: Iterable[bytes | None]) -> str:
    return text_array([(each or b"").hex() for each in hashes])


_COLUMNS: Final = (
    "type, api_version, created, object_type, object_id, redacted, payload_sha256, signature, verified, source"
)
_COPY_SHA256: Final = inbox.COPY_SHA256.format(
    signed="i.signature IS NOT NULL AND i.verified", sha256="i.payload_sha256", payload="coalesce(b.payload, '')"
)
_SET_ASIDE: Final = f"""
INSERT INTO renderings (account, livemode, id, {_COLUMNS}, received_at, content_sha256, payload)
SELECT account, livemode, id, {_COLUMNS.replace("payload_sha256", _COPY_SHA256)}, received_at,
    decode(k.content, 'hex'), b.payload
FROM unnest(%s::bigint[], %s::text[]) AS k (seq, content) JOIN inbox AS i USING (seq)
LEFT JOIN payloads AS b USING (seq)
ON CONFLICT (account, livemode, id, payload_sha256) DO UPDATE SET content_sha256 = excluded.content_sha256
"""
_TAKEN: Final = """
unnest(%s::bigint[], %s::text[]) AS k (seq, sha256) JOIN inbox AS n USING (seq) JOIN renderings AS r
    ON (r.account, r.livemode, r.id, r.payload_sha256) = (n.account, n.livemode, n.id, decode(k.sha256, 'hex'))
"""
_GIVEN: Final = ", ".join(f"r.{name}" for name in _COLUMNS.split(", "))
_REPLACE: Final = f"""
UPDATE inbox AS i SET ({_COLUMNS}) = ROW ({_GIVEN.replace("r.payload_sha256", inbox.BODY_SHA256)})
FROM {_TAKEN} WHERE i.seq = k.seq
"""
_REPLACE_PAYLOAD: Final = f"""
INSERT INTO payloads (seq, payload) SELECT k.seq, r.payload FROM {_TAKEN}
ON CONFLICT (seq) DO UPDATE SET payload = excluded.payload
"""


def _keys(copies: Sequence[Rendering]) -> tuple[str, str, str, str]:
    events = [copy.event for copy in copies]
    return (
        *id_arrays(events),
        _hex(copy.sha256 for copy in copies),
    )


def _delete(cursor: Cursor, copies: Sequence[Rendering]) -> None:
    if copies:
        cursor.execute(_DELETE, _keys(copies))


_DELETE: Final = """
DELETE FROM renderings AS r
USING unnest(%s::text[], %s::boolean[], %s::text[], %s::text[]) AS k (account, livemode, id, sha256)
WHERE (r.account, r.livemode, r.id, r.payload_sha256) = (k.account, k.livemode, k.id, decode(k.sha256, 'hex'))
"""


def _note_contents(cursor: Cursor, copies: Sequence[Rendering]) -> None:
    """Save the contents of *copies*, which marks them as compared."""
    if copies:
        cursor.execute(_NOTE_CONTENTS, (*_keys(copies), _hex(copy.content for copy in copies)))


# Only the worker that claimed an event notes contents of its copies. An arrival that replaces a copy leaves it to be
# compared again.
_NOTE_CONTENTS: Final = """
UPDATE renderings SET content_sha256 = found.content
FROM unnest(%s::text[], %s::boolean[], %s::text[], %s::text[], %s::text[])
    AS k (account, livemode, id, sha256, content)
CROSS JOIN LATERAL (
    SELECT r.ctid AS place, r.content_sha256, decode(k.content, 'hex') AS content FROM renderings AS r
    WHERE (r.account, r.livemode, r.id, r.payload_sha256) = (k.account, k.livemode, k.id, decode(k.sha256, 'hex'))
    OFFSET 0
) AS found
WHERE renderings.ctid = found.place AND found.content_sha256 IS NULL
"""


# ---- For a rebuild ----


def of_range(cursor: Cursor, first: int, end: int, *, with_fresh: bool) -> dict[int, list[Rendering]]:
    """Return the copies of each event numbered from *first* up to *end*, if it has copies besides that in the inbox.

    The copy in the inbox comes without its payload. *with_fresh* includes copies that are not compared yet.
    """
    found: dict[int, list[Rendering]] = defaultdict(list)
    cursor.execute(_OF_RANGE, (first, end, with_fresh), binary=True)
    for row in cursor.fetchall():
        found[row[0]].append(_of_row(row))
    if found:
        cursor.execute(_CHOSEN_OF_RANGE, (integer_array(found),), binary=True)
        for row in cursor.fetchall():
            found[row[0]].append(_of_row(row))
    return found


_OF_RANGE: Final = """
SELECT i.seq, r.account, r.livemode, r.id, r.type, r.created, r.object_type, r.object_id, r.payload, r.source,
    r.api_version, r.payload_sha256, r.signature IS NOT NULL AND r.verified, r.content_sha256, false
FROM renderings AS r JOIN inbox AS i USING (account, livemode, id)
WHERE i.seq >= %s AND i.seq < %s AND (%s OR r.content_sha256 IS NOT NULL)
"""
_CHOSEN_OF_RANGE: Final = """
SELECT i.seq, i.account, i.livemode, i.id, i.type, i.created, i.object_type, i.object_id, NULL::bytea, i.source,
    i.api_version, i.payload_sha256, i.signature IS NOT NULL AND i.verified, NULL::bytea, true
FROM inbox AS i WHERE i.seq = ANY (%s::bigint[])
"""


def choose_with(copies: Sequence[Rendering], payload: bytes) -> Choice:
    """Return the choice among *copies* of ``of_range``. *payload* is that of the copy in the inbox."""
    return choose(
        [
            replace(copy, event=replace(copy.event, payload=payload), is_archived=False) if copy.is_chosen else copy
            for copy in copies
        ]
    )
