"""Joins new facts with the saved rows, or with all facts of the inbox about an object."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

from schemas import inbox, tables
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
from worker.folds.join import Joined, RowSpec


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
    return {row for table in _ROWS_OF if objects for row in _rows_in(cursor, table, objects)}


def _rows_in(cursor: Cursor, table: str, objects: Collection[Key]) -> set[Subject]:
    """Return the saved rows of *table* that are folded from the events of *objects*, of which there are some."""
    cursor.execute(_ROWS_OF[table], _arrays_of(objects))
    return {Subject(table, *row) for row in cursor.fetchall()}


def _arrays_of(keys: Collection[Key]) -> tuple[str, str, str]:
    """Return the accounts, modes and ids of *keys*, an array each."""
    modes = boolean_array(livemode for _, livemode, _ in keys)
    return text_array([account for account, _, _ in keys]), modes, text_array([id_ for _, _, id_ in keys])


# See Note [A row is found by its key, by any plan] in worker/folding/rows.py.
_ROWS_OF: Final = {
    table: f"""
    SELECT k.account, k.livemode, {names}
    FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, key)
    CROSS JOIN LATERAL (
        SELECT * FROM {table} AS t WHERE (t.account, t.livemode, t.{by}) = (k.account, k.livemode, k.key) OFFSET 0
    ) AS t
    """
    for table, by, names in (
        ("balances", "customer", "t.customer, '', t.currency"),
        ("credit_note_lines", "credit_note", "t.id, t.credit_note, ''"),
        ("credit_notes", "id", "t.id, '', ''"),
        ("invoice_payments", "id", "t.id, '', ''"),
    )
}


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
    led = _led_rows(cursor, facts.keys() - refold, known.keys())
    # An ambiguous order can be settled only by all the events of the object, and all its rows share that order.
    from_all = refold | _in_doubt(cursor, (known.keys() - refold) | led)
    mentioned = _mentioned(cursor, (facts.keys() - from_all).difference(known))
    for subject in facts.keys() - from_all:
        spec, row = folds.ROW_SPECS[subject.table], known.get(subject)
        if row is not None and settling.is_laid_on(subject, row):
            from_all.add(subject)
            continue
        # An object without a row has no folded events, so this batch has all of them, except those that mention it from
        # another object.
        leader = join.leader_of(spec, subject)
        is_new = row is None and (subject not in mentioned if leader is None else leader not in known)
        result = join.fold_all(spec, _with_leader(spec, subject, facts)) if is_new else None
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


def _with_leader(spec: RowSpec, subject: Subject, facts: Mapping[Subject, Sequence[Facts]]) -> Sequence[Facts]:
    """Return the *facts* about *subject* and its leader.

    Where they are one fact each, of the same event, there is no other order, and those of the leader are left out.
    """
    leader = join.leader_of(spec, subject)
    own, leading = facts[subject], () if leader is None else facts.get(leader, ())
    is_one = spec.order is None and len(own) == len(leading) == 1 and own[0].event_id == leading[0].event_id
    return own if is_one or not leading else [*own, *leading]


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


def _mentioned(cursor: Cursor, without_rows: Iterable[Subject]) -> set[Subject]:
    """Return those of the subjects *without_rows* that events of other objects may have facts about.

    Only subjects of tables without ``keeps_all`` and without a leader are looked up.
    """
    asked = [each for each in without_rows if not (spec := folds.ROW_SPECS[each.table]).keeps_all and not spec.leader]
    if not asked:
        return set()
    cursor.execute(_MENTIONED, (*world_arrays(asked), text_array([each.source for each in asked])))
    return {asked[number - 1] for (number,) in cursor.fetchall()}


_MENTIONED: Final = """
SELECT k.number
FROM unnest(%s::text[], %s::boolean[], %s::text[]) WITH ORDINALITY AS k (account, livemode, object_id, number)
WHERE EXISTS (
    SELECT FROM mentions AS m
    WHERE (m.account, m.livemode, m.object_id) = (k.account, k.livemode, k.object_id) OFFSET 0
)
"""


def _led_rows(cursor: Cursor, subjects: Collection[Subject], known: Collection[Subject]) -> set[Subject]:
    """Return the saved rows that share the order of one of *subjects*, and so change with it.

    Only balances may have a row where their leader, the customer, is not *known*: a ledger makes them too.
    """
    found: set[Subject] = set()
    for table, spec in folds.ROW_SPECS.items():
        of = {
            (each.account, each.livemode, each.id)
            for each in subjects
            if each.table == spec.leader and (each in known or table == "balances")
        }
        found |= _rows_in(cursor, table, of) if of else set()
    return found


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
    judged: dict[Key, list[Facts]] = defaultdict(list)
    for one in (one for several in at_hand.values() for one in several):
        judged[event_key_of(one)].append(one)
    led: dict[Subject | None, list[Subject]] = defaultdict(list)
    for subject in subjects:
        led[join.leader_of(folds.ROW_SPECS[subject.table], subject)].append(subject)
    cursor.execute(
        f"""
        WITH k AS (
            SELECT DISTINCT * FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, object_id)
        ), wanted AS (
            SELECT i.seq FROM k CROSS JOIN LATERAL (
                SELECT seq FROM inbox AS i
                WHERE {tables.of_object("i", "k.account", "k.livemode", "k.object_id")} OFFSET 0
            ) AS i
            UNION
            SELECT m.seq FROM k CROSS JOIN LATERAL (
                SELECT seq FROM mentions AS m
                WHERE (m.account, m.livemode, m.object_id) = (k.account, k.livemode, k.object_id) OFFSET 0
            ) AS m
        )
        SELECT {ENVELOPE}
        FROM wanted CROSS JOIN LATERAL (SELECT * FROM inbox WHERE inbox.seq = wanted.seq OFFSET 0) AS i
        LEFT JOIN LATERAL (SELECT state FROM outcomes WHERE outcomes.seq = wanted.seq OFFSET 0) AS o ON true
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
            *_arrays_of(judged),
        ),
        binary=True,
    )
    rows = cursor.fetchall()
    further = [row[0] for row in rows if row[1:4] not in judged]
    payloads = inbox.payloads_of(cursor, further) if further else {}
    for row in rows:
        for one in judged.get(row[1:4]) or folds.judge(event_in(row, payloads)).facts:
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
