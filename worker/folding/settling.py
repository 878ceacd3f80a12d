"""Settles rows that their own events leave open, by the rows of other objects.

An order may leave open whether it is paid, and its charges then show it: worker/folds/payment.py. A credit note of an
old API version may leave open how much of it was refunded, and the refund that it names shows it:
worker/folds/credit_note.py. Those modules have the rules, and this one finds the rows. Of an order and its charges, or
of a note and its refund, the row that is folded last has to notice the other. So this is done under the lock to append
changes: see Note [The second transaction sees the first] in worker/folding/order_refunds.py.

Note [The lock of an order at rest is only tried]
    A batch that holds the lock to append must not wait for the lock of an object, because the holder of that lock may
    wait for the lock to append. So it only tries the lock of an order at rest. If another batch holds that lock, it
    settles the order itself: it gets the lock to append later, and then sees the charges that the first batch saved.
    But that other batch may fail, and its event be parked. So the orders that were passed over are noted in
    ``unsettled``, in the transaction that saves their charges. They are settled in a transaction of their own after the
    commit, or by a later turn. The same holds for credit notes and their refunds.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, cast

from msgspec.structs import replace
from psycopg.rows import dict_row

from schemas import tables
from schemas.database import Cursor, id_arrays
from worker.folds import checkout_session, credit_note, payment
from worker.folds.facts import Row, Subject
from worker.folds.join import Joined
from worker.folds.payment import Payment

ORDERS_AT_ONCE: Final = 1_000

MOVING: Final = {
    "charges": ("payment_intent", "status", "captured_at", "released_at"),
    "payment_intents": ("canceled_at",),
    "refunds": ("payment_intent", "charge", "reason", "created", "currency", "amount"),
}
"""By table: the columns that decide whether a row settles an order or a credit note."""
IS_OPEN: Final = {"orders": payment.is_unsettled, "credit_notes": credit_note.is_open}
"""By table: whether a row may be settled by the rows of other objects."""


class Ways(NamedTuple):
    """Payment intents, charges and refunds, as subjects. They lead to the rows that a batch may settle."""

    intents: set[Subject]
    charges: set[Subject]
    refunds: set[Subject]


def open_rows(rows: Mapping[Subject, Joined]) -> dict[Subject, Joined]:
    """Return the orders and credit notes among *rows* that their own events leave open."""
    return {
        subject: joined
        for subject, joined in rows.items()
        if subject.table in IS_OPEN and IS_OPEN[subject.table](joined.row)
    }


def is_laid_on(subject: Subject, row: Row) -> bool:
    """Return whether *row* is an order that its charges may have settled, so that no event may be laid over it."""
    if subject.table != "orders" or (row["paid_at"] is None and row["failed_at"] is None):
        return False
    return payment.is_open(row) or (payment.may_be_read(row) and row["paid_at"] != row["completed_at"])


def moved(rows: Mapping[Subject, Joined], known: Mapping[Subject, Row], gone: Iterable[Subject]) -> Ways:
    """Return the ways to the orders and notes that may be settled because *rows* changed or rows are *gone*."""
    ways = Ways(set(), set(), set())
    for subject, joined in rows.items():
        if subject.table in MOVING:
            before = known.get(subject)
            if before is None or any(joined.row[name] != before[name] for name in MOVING[subject.table]):
                _add_ways(ways, subject, joined.row)
                _add_ways(ways, subject, before)
    for subject in gone:
        if subject.table in MOVING:
            _add_ways(ways, subject, known.get(subject))
    return ways


def _add_ways(ways: Ways, subject: Subject, row: Row | None) -> None:
    if row is not None and subject.table == "refunds":
        ways.refunds.add(subject)
    if row is None or (subject.table == "refunds" and row["reason"] != payment.RELEASED):
        return
    intent = subject.id if subject.table == "payment_intents" else row["payment_intent"]
    if intent is not None:
        ways.intents.add(Subject("payment_intents", subject.account, subject.livemode, str(intent)))
    if row.get("charge") is not None:
        ways.charges.add(Subject("charges", subject.account, subject.livemode, str(row["charge"])))


def found_by(cursor: Cursor, ways: Ways) -> list[Subject]:
    """Return the saved open orders and notes that *ways* lead to. The caller keeps others from appending."""
    found: list[Subject] = []
    if ways.intents or ways.charges:
        cursor.execute(_FOUND, (*id_arrays(ways.intents), *id_arrays(ways.charges)))
        found += [Subject("orders", *row) for row in cursor.fetchall()]
    if ways.refunds:
        cursor.execute(_FOUND_NOTES, id_arrays(ways.refunds))
        found += [Subject("credit_notes", *row) for row in cursor.fetchall()]
    return found


_WAYS: Final = """
ways AS MATERIALIZED (
    SELECT * FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, payment_intent)
    UNION
    SELECT k.account, k.livemode, c.payment_intent
    FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
    CROSS JOIN LATERAL (
        SELECT payment_intent FROM charges AS c WHERE (c.account, c.livemode, c.id) = (k.account, k.livemode, k.id)
        OFFSET 0
    ) AS c WHERE c.payment_intent IS NOT NULL
)
"""


def _leading_to(condition: str) -> str:
    """Return the statement that finds the saved orders of some ways that meet a *condition*."""
    return f"""
    WITH {_WAYS}
    SELECT w.account, w.livemode, o.id FROM ways AS w CROSS JOIN LATERAL (
        SELECT id FROM orders
        WHERE (orders.account, orders.livemode, orders.payment_intent) = (w.account, w.livemode, w.payment_intent)
            AND {condition}
        OFFSET 0
    ) AS o ORDER BY 1, 2, 3
    """


_FOUND: Final = _leading_to(payment.OF_ORDER_OPEN)
_READ: Final = _leading_to(payment.OF_ORDER_READ)
_FOUND_NOTES: Final = """
SELECT k.account, k.livemode, n.id FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, refund)
CROSS JOIN LATERAL (
    SELECT id FROM credit_notes AS n
    WHERE (n.account, n.livemode, n.refund) = (k.account, k.livemode, k.refund) OFFSET 0
) AS n ORDER BY 1, 2, 3
"""


def read_by(cursor: Cursor, ways: Ways) -> list[Subject]:
    """Return the saved orders that *ways* lead to, and that a reading may have shown as paid."""
    if not ways.intents and not ways.charges:
        return []
    cursor.execute(_READ, (*id_arrays(ways.intents), *id_arrays(ways.charges)))
    return [Subject("orders", *row) for row in cursor.fetchall()]


def fold_again(cursor: Cursor, ways: Ways) -> None:
    """Queue the deciding events of the saved orders that *ways* lead to, and that a reading may have shown as paid.

    Only all their events show the time of the reading: see Note [A reading shows that it was paid, and not when] in
    worker/folds/payment.py. Orders with an archived event stay as they are. An event that another worker has claimed is
    passed over, because a transaction that holds the lock to append must not wait for another: that worker settles the
    order later, and then sees what this one saved.
    """
    if read := read_by(cursor, ways):
        cursor.execute(_FOLD_AGAIN, id_arrays(read))


_FOLD_AGAIN: Final = """
WITH due AS (
    SELECT DISTINCT e.seq FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
    CROSS JOIN LATERAL (
        SELECT account, livemode, event_id FROM orders AS o
        WHERE (o.account, o.livemode, o.id) = (k.account, k.livemode, k.id) OFFSET 0
    ) AS o CROSS JOIN LATERAL (
        SELECT seq FROM inbox AS i WHERE (i.account, i.livemode, i.id) = (o.account, o.livemode, o.event_id) OFFSET 0
    ) AS e
    WHERE EXISTS (SELECT FROM payloads AS p WHERE p.seq = e.seq OFFSET 0)
), added AS (
    INSERT INTO pending (seq, again) SELECT seq, true FROM due ON CONFLICT (seq) DO NOTHING
), free AS (
    SELECT seq FROM pending WHERE seq = ANY (ARRAY(SELECT seq FROM due)) AND NOT again FOR UPDATE SKIP LOCKED
)
UPDATE pending SET again = true WHERE seq = ANY (ARRAY(SELECT seq FROM free))
"""


def at_rest(cursor: Cursor, subjects: Collection[Subject]) -> dict[Subject, tuple[Row, Joined]]:
    """Return the unsettled orders among *subjects*: each saved row, and the row that its own events alone make.

    The caller holds their locks.
    """
    orders = [subject for subject in subjects if subject.table == "orders"]
    if not orders:
        return {}
    found: dict[Subject, tuple[Row, Joined]] = {}
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
        for row in rows.execute(_AT_REST, id_arrays(orders)):
            failed_at, source = cast("datetime | None", row.pop("own_failed_at")), str(row.pop("source"))
            own = payment.base(row, failed_at=failed_at)
            anomalies = tuple(checkout_session.ROW_SPEC.anomalies(own))
            joined = Joined(own, anomalies, (), source, is_whole=False, replace_all=False, is_at_rest=True)
            found[Subject("orders", row["account"], row["livemode"], row["id"])] = (row, joined)
    return found


# Without the OFFSET an index of another column that is compared may look better, by a plan that was made while there
# were few events: see Note [A row is found by its key, by any plan] in worker/folding/rows.py.
_EVENTS_OF_ORDER: Final = f"""
(SELECT seq, type, created, source FROM inbox AS i
WHERE {tables.of_object("i", "o.account", "o.livemode", "o.id")} OFFSET 0) AS i
"""
# Only its event shows that a session itself failed. The event may be archived, but its time of creation is enough.
_AT_REST: Final = f"""
SELECT o.*, coalesce(e.source, 'replay') AS source, (
    SELECT min(i.created) FROM {_EVENTS_OF_ORDER}
    WHERE i.type = '{checkout_session.ASYNC_PAYMENT_FAILED}'
        AND (SELECT state FROM outcomes AS u WHERE u.seq = i.seq) = 'folded'
) AS own_failed_at
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
CROSS JOIN LATERAL (
    SELECT * FROM orders AS o WHERE (o.account, o.livemode, o.id) = (k.account, k.livemode, k.id) OFFSET 0
) AS o
LEFT JOIN LATERAL (
    SELECT source FROM inbox AS i WHERE (i.account, i.livemode, i.id) = (o.account, o.livemode, o.event_id) OFFSET 0
) AS e ON true
WHERE ({payment.OF_ORDER_OPEN}) OR ({payment.OF_ORDER_READ})
"""


def settled(cursor: Cursor, rows: Mapping[Subject, Joined]) -> dict[Subject, Joined]:
    """Return the open *rows*, made by their own events, with the decisions of other objects' rows laid on."""
    orders = {subject: joined for subject, joined in rows.items() if subject.table == "orders"}
    payments = payments_of(cursor, orders)
    found = {subject: payment.settle(joined, payments[subject]) for subject, joined in orders.items()}
    notes = {subject: joined for subject, joined in rows.items() if subject.table == "credit_notes"}
    refunds = refunds_of(cursor, notes)
    return found | {subject: credit_note.with_refund(joined, refunds.get(subject)) for subject, joined in notes.items()}


def pages(cursor: Cursor, account: str | None) -> Iterator[list[Subject]]:
    """Yield pages of all open orders and of the notes that their refunds may change, or of those of one *account*."""
    yield from _pages_of_orders(cursor, account)
    yield from _pages_of_read_orders(cursor, account)
    yield from _pages_of_notes(cursor, account)


def _pages_of_orders(cursor: Cursor, account: str | None) -> Iterator[list[Subject]]:
    after: Sequence[Any] = ("", False, "", "")
    while True:
        cursor.execute(_PAGE, {"account": account, "limit": ORDERS_AT_ONCE, **_named(after)})
        rows = cursor.fetchall()
        if not rows:
            return
        yield [Subject("orders", row[0], row[1], row[3]) for row in rows]
        after = rows[-1]


def _pages_of_read_orders(cursor: Cursor, account: str | None) -> Iterator[list[Subject]]:
    after: Sequence[Any] = ("", False, "")
    while True:
        values = dict(zip(("of_account", "mode", "id"), after, strict=True))
        cursor.execute(_PAGE_OF_READ, {"account": account, "limit": ORDERS_AT_ONCE, **values})
        rows = cursor.fetchall()
        if not rows:
            return
        yield [Subject("orders", *row) for row in rows]
        after = rows[-1]


def _named(after: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(("of_account", "mode", "intent", "id"), after, strict=True))


_PAGE: Final = f"""
SELECT account, livemode, payment_intent, id FROM orders
WHERE {payment.OF_ORDER_OPEN} AND (%(account)s::text IS NULL OR account = %(account)s)
    AND (account, livemode, payment_intent, id) > (%(of_account)s, %(mode)s, %(intent)s, %(id)s)
ORDER BY account, livemode, payment_intent, id LIMIT %(limit)s
"""


_IS_READ: Final = f"""
EXISTS (SELECT FROM {_EVENTS_OF_ORDER} WHERE i.created = o.paid_at AND i.source = 'observation')
AND NOT EXISTS (SELECT FROM {_EVENTS_OF_ORDER} WHERE i.created = o.paid_at AND i.source <> 'observation')
"""
_PAGE_OF_READ: Final = f"""
SELECT account, livemode, id FROM orders AS o
WHERE {payment.OF_ORDER_READ} AND (%(account)s::text IS NULL OR account = %(account)s) AND {_IS_READ}
    AND (account, livemode, id) > (%(of_account)s, %(mode)s, %(id)s)
ORDER BY account, livemode, id LIMIT %(limit)s
"""


def _pages_of_notes(cursor: Cursor, account: str | None) -> Iterator[list[Subject]]:
    after: Sequence[Any] = ("", False, "")
    while True:
        values = dict(zip(("of_account", "mode", "id"), after, strict=True))
        cursor.execute(_PAGE_OF_NOTES, {"account": account, "limit": ORDERS_AT_ONCE, **values})
        rows = cursor.fetchall()
        if not rows:
            return
        yield [Subject("credit_notes", *row) for row in rows]
        after = rows[-1]


# Notes with an anomaly of contradictory parts are left out, because no refund can resolve the contradiction.
_PAGE_OF_NOTES: Final = f"""
SELECT account, livemode, id FROM credit_notes AS n
WHERE refund IS NOT NULL AND (%(account)s::text IS NULL OR account = %(account)s)
    AND EXISTS (SELECT FROM refunds AS r WHERE (r.account, r.livemode, r.id) = (n.account, n.livemode, n.refund))
    AND NOT EXISTS (
        SELECT FROM anomalies AS a WHERE a.resolved_at IS NULL AND a.subject = '{credit_note.ROW_SPEC.subject}'
            AND a.kind = '{credit_note.SPLIT}'
            AND (a.account, a.livemode, a.subject_id) = (n.account, n.livemode, n.id)
    )
    AND (account, livemode, id) > (%(of_account)s, %(mode)s, %(id)s)
ORDER BY account, livemode, id LIMIT %(limit)s
"""


def note_as_it_is(row: Row) -> Joined:
    """Return a note of ``pages`` as it is. Its refund may be laid on already, and can be laid on again."""
    anomalies = tuple(credit_note.ROW_SPEC.anomalies(row))
    return Joined(row, anomalies, (), "replay", is_whole=False, replace_all=False, is_at_rest=True)


def refunds_of(cursor: Cursor, notes: Mapping[Subject, Joined]) -> dict[Subject, Row]:
    """Return the refunds that *notes* name, by the note. Unknown refunds are left out."""
    named = {subject: replace(subject, table="refunds", id=str(each.row["refund"])) for subject, each in notes.items()}
    if not named:
        return {}
    found: dict[Subject, Row] = {}
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
        for row in rows.execute(_REFUNDS, id_arrays(set(named.values()))):
            found[Subject("refunds", row["account"], row["livemode"], row["id"])] = row
    return {subject: found[refund] for subject, refund in named.items() if refund in found}


_REFUNDS: Final = """
SELECT r.* FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
CROSS JOIN LATERAL (
    SELECT * FROM refunds AS r WHERE (r.account, r.livemode, r.id) = (k.account, k.livemode, k.id) OFFSET 0
) AS r
"""


def releases_of(cursor: Cursor, charges: Collection[Subject]) -> dict[Subject, list[Row]]:
    """Return the refunds at rest that release one of *charges*, by the charge, which may not be at rest."""
    found: dict[Subject, list[Row]] = defaultdict(list)
    if charges:
        with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
            for row in rows.execute(_RELEASES, (*id_arrays(charges), payment.RELEASED)):
                found[Subject("charges", row["account"], row["livemode"], row["charge"])].append(row)
    return found


_RELEASES: Final = """
SELECT r.*, 'replay' AS source FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, charge)
CROSS JOIN LATERAL (
    SELECT * FROM refunds AS r
    WHERE (r.account, r.livemode, r.charge) = (k.account, k.livemode, k.charge) AND r.reason = %s OFFSET 0
) AS r
"""


def payments_of(cursor: Cursor, orders: Mapping[Subject, Joined]) -> dict[Subject, Payment]:
    """Return the payments of *orders*, by the order."""
    intents = {_intent_of(subject, joined.row) for subject, joined in orders.items()}
    if not intents:
        return {}
    cursor.execute(_HAVE_PAYMENT, id_arrays(intents))
    charges, refunds, canceled = [
        _by_intent(cursor, statement, intents if is_any else ())
        for is_any, statement in zip(cursor.fetchall()[0], _OF_PAYMENT, strict=True)
    ]
    found = {
        intent: Payment(charges[intent], refunds[intent], next(iter(canceled[intent]), None)) for intent in intents
    }
    read = _read_at(cursor, {subject: each.row for subject, each in orders.items() if not payment.is_open(each.row)})
    return {
        subject: dataclasses.replace(found[_intent_of(subject, joined.row)], read_at=read.get(subject))
        for subject, joined in orders.items()
    }


def _read_at(cursor: Cursor, orders: Mapping[Subject, Row]) -> dict[Subject, datetime]:
    """Return the times of payment of *orders* that are times of readings, and of no event of Stripe's."""
    if not orders:
        return {}
    moments = [cast("datetime", row["paid_at"]) for row in orders.values()]
    cursor.execute(_READ_AT, (*id_arrays(orders), moments))
    return {Subject("orders", *key): at for *key, at in cursor.fetchall()}


_READ_AT: Final = f"""
SELECT account, livemode, id, paid_at
FROM unnest(%s::text[], %s::boolean[], %s::text[], %s::timestamptz[]) AS o (account, livemode, id, paid_at)
WHERE {_IS_READ}
"""


def _intent_of(subject: Subject, row: Row) -> Subject:
    return Subject("payment_intents", subject.account, subject.livemode, str(row["payment_intent"]))


def _by_intent(cursor: Cursor, statement: str, intents: Collection[Subject]) -> dict[Subject, list[Row]]:
    found: dict[Subject, list[Row]] = defaultdict(list)
    if not intents:
        return found
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
        for row in rows.execute(statement, id_arrays(intents)):
            found[Subject("payment_intents", row["account"], row["livemode"], row.pop("of_intent"))].append(row)
    return found


# The event_id, as_of and source of a row are replaced by those of the event that decided it.
_OF_INTENT: Final = """
SELECT k.payment_intent AS of_intent, t.*,
    coalesce(e.id, t.event_id) AS event_id, coalesce(e.created, t.as_of) AS as_of,
    coalesce(e.source, 'replay') AS source
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, payment_intent)
CROSS JOIN LATERAL ({rows} OFFSET 0) AS t
LEFT JOIN LATERAL ({event} LIMIT 1) AS e ON true
"""
_DECIDING: Final = """
SELECT id, source, created FROM inbox AS i
WHERE (i.account, i.livemode, i.id) = (t.account, t.livemode, t.event_id)
"""
# Events of a charge after its capture or its release did not settle the order, so they are not named.
_MOVING_CHARGE: Final = f"""
SELECT i.id, i.source, i.created FROM inbox AS i
WHERE {tables.of_object("i", "t.account", "t.livemode", "t.id")}
    AND (SELECT state FROM outcomes AS u WHERE u.seq = i.seq) = 'folded'
    AND i.created = coalesce(t.captured_at, t.released_at)
ORDER BY i.type IN ('charge.captured', 'charge.expired') DESC, i.type = 'charge.updated', i.source = 'observation', i.id
"""
_PAID_BY: Final = "({0}.account, {0}.livemode, {0}.payment_intent) = (k.account, k.livemode, k.payment_intent)"
_CHARGES: Final = f"charges AS c WHERE {_PAID_BY.format('c')}"
_RELEASED: Final = f"refunds AS r WHERE {_PAID_BY.format('r')} AND r.reason = '{payment.RELEASED}'"
_RELEASED_CHARGES: Final = f"""
charges AS c CROSS JOIN LATERAL (
    SELECT * FROM refunds AS t
    WHERE (t.account, t.livemode, t.charge) = (c.account, c.livemode, c.id) AND t.reason = '{payment.RELEASED}' OFFSET 0
) AS r WHERE {_PAID_BY.format("c")}
"""
_CANCELED: Final = """
payment_intents AS p WHERE (p.account, p.livemode, p.id) = (k.account, k.livemode, k.payment_intent)
"""
# Whether any of the intents has charges, releasing refunds and a cancellation. Most have none of the last two.
_HAVE_PAYMENT: Final = f"""
SELECT bool_or(EXISTS (SELECT FROM {_CHARGES} OFFSET 0)),
    bool_or(EXISTS (SELECT FROM {_RELEASED} OFFSET 0) OR EXISTS (SELECT FROM {_RELEASED_CHARGES} OFFSET 0)),
    bool_or(EXISTS (SELECT FROM {_CANCELED} OFFSET 0))
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, payment_intent)
"""
_OF_PAYMENT: Final = (
    _OF_INTENT.format(rows=f"SELECT * FROM {_CHARGES}", event=_MOVING_CHARGE),
    _OF_INTENT.format(rows=f"SELECT * FROM {_RELEASED} UNION SELECT r.* FROM {_RELEASED_CHARGES}", event=_DECIDING),
    _OF_INTENT.format(rows=f"SELECT * FROM {_CANCELED}", event=_DECIDING),
)
