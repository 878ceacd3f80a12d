"""Joins new facts with the saved rows, or with all facts of the inbox about an object."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

from schemas import inbox
from schemas.database import Cursor, boolean_array, integer_array, text_array, world_arrays
from schemas.errors import Archived
from schemas.events import Key
from worker import folds
from worker.folding import settling
from worker.folding.anomalies import row_name
from worker.folding.batch import Saved, event_key_of
from worker.folding.claim import ENVELOPE, IGNORED_BECAUSE, event_in
from worker.folding.rows import load_rows
from worker.folds import join
from worker.folds.facts import Event, Facts, Subject
from worker.folds.join import Joined


def objects_of(cursor: Cursor, events: Sequence[Event]) -> set[Key]:
    """Return the customers and credit notes that earlier folds of *events* may have changed.

    They are the events' own objects, and the ones that a balance transaction mentions.
    """
    found = {
        (event.account, event.livemode, event.object_id)
        for event in events
        if event.object_type in ("customer", "credit_note") and event.object_id is not None
    }
    seqs = [event.seq for event in events if event.object_type == "customer_balance_transaction"]
    if seqs:
        # This query is rare, so there is no index by number for it.
        cursor.execute("SELECT account, livemode, object_id FROM mentions WHERE seq = ANY (%s)", (seqs,))
        found.update(cursor.fetchall())
    return found


def rows_of(cursor: Cursor, objects: set[Key]) -> set[Subject]:
    """Return the saved rows that are folded from the events of *objects*: customers, credit notes and invoices."""
    if not objects:
        return set()
    accounts, modes, keys = map(list, zip(*objects, strict=True))
    cursor.execute(_OTHER_ROWS, {"accounts": accounts, "modes": modes, "keys": keys})
    return {Subject(*row) for row in cursor.fetchall()}


_OTHER_ROWS: Final = """
WITH k AS (
    SELECT * FROM unnest(%(accounts)s::text[], %(modes)s::boolean[], %(keys)s::text[]) AS k (account, livemode, key)
)
SELECT 'balances', k.account, k.livemode, customer, '', currency
FROM k JOIN balances AS t ON (t.account, t.livemode, t.customer) = (k.account, k.livemode, k.key)
UNION ALL
SELECT 'credit_note_lines', k.account, k.livemode, t.id, t.credit_note, ''
FROM k JOIN credit_note_lines AS t ON (t.account, t.livemode, t.credit_note) = (k.account, k.livemode, k.key)
UNION ALL
SELECT 'invoice_payments', k.account, k.livemode, t.id, '', ''
FROM k JOIN invoice_payments AS t ON (t.account, t.livemode, t.id) = (k.account, k.livemode, k.key)
UNION ALL
SELECT 'credit_notes', k.account, k.livemode, t.id, '', ''
FROM k JOIN credit_notes AS t ON (t.account, t.livemode, t.id) = (k.account, k.livemode, k.key)
"""


def mention(cursor: Cursor, events: Sequence[Event], facts: dict[Subject, list[Facts]]) -> None:
    """Note which events have facts about another object's rows, so that a fold of those rows can find the events."""
    by_id = {(event.account, event.livemode, event.id): event for event in events}
    found = {
        (event.account, event.livemode, subject.source, event.seq)
        for subject, ones in facts.items()
        for one in ones
        if (event := by_id.get(event_key_of(one))) is not None and event.object_id != subject.source
    }
    if found:
        cursor.execute(
            "INSERT INTO mentions (account, livemode, object_id, seq)"
            " SELECT * FROM unnest(%s::text[], %s::boolean[], %s::text[], %s::bigint[]) ON CONFLICT DO NOTHING",
            (
                text_array([account for account, _, _, _ in found]),
                boolean_array(livemode for _, livemode, _, _ in found),
                text_array([source for _, _, source, _ in found]),
                integer_array(seq for _, _, _, seq in found),
            ),
        )


def join_facts(cursor: Cursor, facts: dict[Subject, list[Facts]], refold: set[Subject]) -> Saved:
    """Return the saved rows with *facts* joined. The rows *refold* are folded from all their facts in the inbox.

    The caller holds the locks of their objects.
    """
    known = load_rows(cursor, facts.keys() | refold)
    joined: dict[Subject, Joined] = {}
    led = _led_rows(cursor, facts.keys() - refold)
    # An ambiguous order can be settled only by all the events of the object, and all its rows share that order.
    from_all = refold | _in_doubt(cursor, (known.keys() - refold) | led)
    for subject in facts.keys() - from_all:
        spec, row = folds.ROW_SPECS[subject.table], known.get(subject)
        if row is not None and settling.is_laid_on(subject, row):
            from_all.add(subject)
            continue
        # An object without a row has no folded events, so this batch has all of them, except those that mention it from
        # another object.
        leader = join.leader_of(spec, subject)
        is_new = row is None and (spec.keeps_all if leader is None else leader not in known)
        result = join.fold_all(spec, join.with_leader(spec, subject, facts)) if is_new else None
        result = join.advance(spec, row, facts[subject]) if row is not None else result
        if result is None:
            from_all.add(subject)
        else:
            joined[subject] = result
    from_all |= {each for each in led if join.leader_of(folds.ROW_SPECS[each.table], each) in from_all}
    known |= load_rows(cursor, from_all - facts.keys() - refold)
    gone = []
    for subject, all_facts in facts_of(cursor, from_all, facts).items():
        result = join.fold_all(folds.ROW_SPECS[subject.table], all_facts)
        if result is not None:
            joined[subject] = result
        elif subject in known:
            gone.append(subject)
    return Saved(joined, known, gone)


def _in_doubt(cursor: Cursor, at_rest: Collection[Subject]) -> set[Subject]:
    """Return those of the rows *at_rest* that have an ambiguous order, and the rows that lead them."""
    if not at_rest:
        return set()
    named = {row_name(subject): subject for subject in at_rest}
    cursor.execute(
        """
        SELECT a.account, a.livemode, a.subject, a.subject_id
        FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, subject_id)
        CROSS JOIN LATERAL (
            SELECT * FROM anomalies AS a WHERE a.resolved_at IS NULL AND a.kind = %s
                AND (a.account, a.livemode, a.subject_id) = (k.account, k.livemode, k.subject_id) OFFSET 0
        ) AS a
        """,
        (*world_arrays([*named.values()]), text_array([name for *_, name in named]), join.AMBIGUOUS_ORDER),
    )
    found = {named[row] for row in cursor.fetchall() if row in named}
    leaders = {join.leader_of(folds.ROW_SPECS[each.table], each) for each in found}
    return found.union(each for each in leaders if each is not None)


def _led_rows(cursor: Cursor, subjects: Iterable[Subject]) -> set[Subject]:
    """Return the saved rows that share the order of one of *subjects*, and so change with it."""
    leaders = {spec.leader for spec in folds.ROW_SPECS.values() if spec.leader}
    found = {(each.account, each.livemode, each.id) for each in subjects if each.table in leaders}
    return {each for each in rows_of(cursor, found) if folds.ROW_SPECS[each.table].leader}


def facts_of(
    cursor: Cursor, subjects: set[Subject], at_hand: dict[Subject, list[Facts]], *, with_pending: bool = False
) -> dict[Subject, list[Facts]]:
    """Return all facts of the inbox about *subjects* and about the rows that lead them.

    Ignored and parked events are left out. A pending event counts if its facts are *at_hand*; *with_pending* lets
    every pending event count.
    """
    found: dict[Subject, list[Facts]] = {subject: [] for subject in subjects}
    if not subjects:
        return found
    judged = [one for several in at_hand.values() for one in several]
    led: dict[Subject | None, list[Subject]] = defaultdict(list)
    for subject in subjects:
        led[join.leader_of(folds.ROW_SPECS[subject.table], subject)].append(subject)
    cursor.execute(
        f"""
        WITH k AS (
            SELECT DISTINCT * FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, object_id)
        ), wanted AS (
            SELECT i.seq FROM k JOIN inbox AS i USING (account, livemode, object_id)
            UNION
            SELECT m.seq FROM k JOIN mentions AS m USING (account, livemode, object_id)
        )
        SELECT {ENVELOPE}
        FROM wanted JOIN inbox AS i USING (seq) LEFT JOIN outcomes AS o USING (seq)
        WHERE {IGNORED_BECAUSE} IS NULL AND (
            coalesce(o.state, %s) <> 'parked' OR (i.account, i.livemode, i.id) IN (
                SELECT * FROM unnest(%s::text[], %s::boolean[], %s::text[])
            )
        )
        """,
        (
            *world_arrays(keys := list(subjects)),
            text_array([key.source for key in keys]),
            "pending" if with_pending else "parked",
            # New events, and parked events that may be folded now: the batch has judged both already.
            *world_arrays([one.subject for one in judged]),
            text_array([one.event_id for one in judged]),
        ),
        binary=True,
    )
    rows = cursor.fetchall()
    payloads = inbox.payloads_of(cursor, [row[0] for row in rows])
    for row in rows:
        for one in folds.judge(event_in(row, payloads)).facts:
            if one.subject in found:
                found[one.subject].append(one)
            for subject in led.get(one.subject, ()):
                found[subject].append(one)
    return found


def facts_at_hand(cursor: Cursor, subjects: set[Subject]) -> Iterator[tuple[Subject, list[Facts] | None]]:
    """Yield each of *subjects* with all its facts in the inbox, None where one of the payloads is archived."""
    try:
        yield from facts_of(cursor, subjects, {}).items()
    except Archived:
        if len(subjects) > 1:
            for subject in subjects:
                yield from facts_at_hand(cursor, {subject})
        else:
            yield from ((subject, None) for subject in subjects)
