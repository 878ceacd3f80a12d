"""Finds the events that an older fold version had folded, and that wait to be folded again.

Note [History is not news]
    When a release folds differently, the clock queues all events that an older version folded. The changes that follow
    happened long ago, so they are withheld. A new event may come for an object while that object's history still waits.
    Then, in the same transaction, the object is first folded from the events that were folded before. The result is the
    row that this release would have made from the beginning, and its changes are withheld. Only the changes that the
    new event makes to that row are announced. A parked event had no part in the row, so it counts as new. An object
    with archived events cannot be folded again, so its row stays as it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from schemas import tables
from schemas.database import Cursor, boolean_array, integer_array, text_array
from schemas.events import Key
from worker.folds.facts import Facts, Subject


def is_at_hand(cursor: Cursor, fold_version: int) -> bool:
    """Return whether an event with a payload has an outcome of a version older than *fold_version*."""
    # This form makes the planner use the index. It would read the whole table to find that no row is older.
    cursor.execute("SELECT fold_version FROM outcomes ORDER BY fold_version LIMIT 1")
    oldest = cursor.fetchone()
    if oldest is None or oldest[0] >= fold_version:
        return False
    cursor.execute(_IS_AT_HAND, {"version": fold_version})
    return cursor.fetchone() == (True,)


# Goes from one version to the next, so that it does not read through archived events, which keep old versions for ever.
_IS_AT_HAND: Final = """
WITH RECURSIVE older AS (
    SELECT min(fold_version) AS version FROM outcomes WHERE fold_version < %(version)s
    UNION ALL
    SELECT (
        SELECT min(o.fold_version) FROM outcomes AS o
        WHERE o.fold_version > older.version AND o.fold_version < %(version)s
    ) FROM older WHERE older.version IS NOT NULL
)
SELECT EXISTS (
    SELECT FROM older WHERE EXISTS (
        SELECT FROM outcomes AS o WHERE o.fold_version = older.version
            AND o.seq >= (SELECT seq FROM payloads ORDER BY seq LIMIT 1)
    )
)
"""


def outdated(cursor: Cursor, seqs: Sequence[int], fold_version: int) -> set[int]:
    """Return the events among *seqs* that a version older than *fold_version* had folded or ignored."""
    cursor.execute(
        "SELECT seq FROM outcomes WHERE seq = ANY (%s::bigint[]) AND fold_version < %s AND state <> 'parked'",
        (integer_array(seqs), fold_version),
    )
    return {seq for (seq,) in cursor.fetchall()}


def objects(cursor: Cursor, of: set[Key], fold_version: int) -> set[Key]:
    """Return the objects among *of* that have an event of a version older than *fold_version*, and all payloads."""
    if not of:
        return set()
    cursor.execute(_WITH_HISTORY, {**_arrays(of), "version": fold_version})
    return set(cursor.fetchall())


def _arrays(of: Iterable[Key]) -> dict[str, str]:
    accounts, modes, keys = zip(*of, strict=True)
    return {"accounts": text_array(accounts), "modes": boolean_array(modes), "keys": text_array(keys)}


_OBJECTS: Final = "unnest(%(accounts)s::text[], %(modes)s::boolean[], %(keys)s::text[]) AS k (account, livemode, key)"
_WITH_HISTORY: Final = f"""
SELECT k.account, k.livemode, k.key FROM {_OBJECTS}
CROSS JOIN LATERAL (
    SELECT i.seq FROM inbox AS i WHERE {tables.of_object("i", "k.account", "k.livemode", "k.key")}
    UNION
    SELECT m.seq FROM mentions AS m WHERE (m.account, m.livemode, m.object_id) = (k.account, k.livemode, k.key)
) AS e
GROUP BY k.account, k.livemode, k.key
HAVING bool_or(EXISTS (
        SELECT FROM outcomes AS o WHERE o.seq = e.seq AND o.fold_version < %(version)s AND o.state <> 'parked'
    )) AND bool_and(EXISTS (SELECT FROM payloads AS b WHERE b.seq = e.seq))
"""

_WAYS: Final = {
    "charges": ("payment_intent", "invoice"),
    "invoice_payments": ("invoice", "payment_intent", "charge"),
    "orders": ("payment_intent", "invoice"),
    "payment_intents": (),
    "refunds": ("payment_intent", "charge"),
}
"""By table: the columns that lead from an order to the objects of its money, and back."""


def neighbours(cursor: Cursor, facts: Mapping[Subject, Sequence[Facts]]) -> set[Subject]:
    """Return the saved rows that decide about an order's money together with the rows of *facts*."""
    found: set[Subject] = set()
    ids = {
        (subject.account, subject.livemode, each)
        for subject, several in facts.items()
        if subject.table in _WAYS
        for each in (subject.id, *(one.after.get(way) for one in several for way in _WAYS[subject.table]))
        if isinstance(each, str)
    }
    seen = set(ids)
    while ids:
        cursor.execute(_NEIGHBOURS, _arrays(ids))
        rows = cursor.fetchall()
        found |= {Subject(table, account, livemode, key) for table, account, livemode, key, _ in rows}
        ids = {(account, livemode, each) for _, account, livemode, _, ways in rows for each in ways if each} - seen
        seen |= ids
    return found


# Each key is one probe of an index: see Note [A row is found by its key, by any plan] in
# worker/folding/rows.py.
_NEIGHBOURS: Final = " UNION ALL ".join(
    f"SELECT '{table}', t.account, t.livemode, t.id, ARRAY[{', '.join(f't.{way}' for way in ('id', *ways))}]"
    f" FROM {_OBJECTS} CROSS JOIN LATERAL (SELECT * FROM {table} AS t"
    f" WHERE (t.account, t.livemode, t.{name}) = (k.account, k.livemode, k.key) OFFSET 0) AS t"
    for table, ways in _WAYS.items()
    for name in ("id", *ways)
)
