"""Announces the sum of an order's refunds, which depends on several objects.

Note [The second transaction sees the first]
    A refund names its payment intent or its charge, a charge names its intent or its invoice, and the order names the
    intent or an invoice that was paid by it. The object that is folded last has to notice the others, and none of them
    has the whole path between refund and order. So the orders are looked up under the lock of transactions that append
    changes, which is held to the commit. A transaction that has the lock sees everything that earlier holders saved.

Note [Most orders were never refunded]
    First one statement finds by index probes which rows of a batch lead to a refund at all, or to a charge that reports
    one. Only for those rows are the orders, and their state in the order book, looked up.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from psycopg import sql
from psycopg.rows import dict_row

from schemas.change_rows import ChangeRow
from schemas.database import Cursor, text_array, world_arrays
from worker.folds.facts import Row, Subject, Value
from worker.folds.join import Joined

KIND: Final = "order.refund_changed"
_SHOWN: Final = (
    *("status", "payment_status", "mode", "currency", "amount_total"),
    *("client_reference_id", "customer", "payment_link", "payment_intent", "invoice"),
    *("refunded_amount", "refund_status"),
)
ROWS_AT_ONCE: Final = 1_000
# The columns of an order that decide which refunds belong to it, whether these can be added up, and which part of the
# order they are.
_OF_ORDER: Final = ("payment_intent", "invoice", "currency", "amount_total")
_TABLES: Final = ("charges", "invoice_payments", "orders", "refunds")


class Moved(NamedTuple):
    """A row that may change the sum of an order's refunds, with the references to find the order and its last event.

    *is_refunded* is true for a refund, and for a charge that reports one. Other rows have to be looked up.
    """

    account: str
    livemode: bool
    payment_intent: Value
    charge: Value
    invoice: Value
    event_id: Value
    as_of: Value
    source: str
    is_refunded: bool

    @property
    def leads_on(self) -> bool:
        """Whether it names an object that refunds may name as well. An open order often names none."""
        return self.payment_intent is not None or self.charge is not None or self.invoice is not None


def moved(rows: Mapping[Subject, Joined], known: Mapping[Subject, Row]) -> list[Moved]:
    """Return those of *rows* that may change the sum of an order's refunds and differ from the *known* row."""
    found: list[Moved] = []
    for subject, joined in rows.items():
        if subject.table in _TABLES:
            before = known.get(subject)
            if before is None:
                found.append(_leading(subject, joined.row, joined.row, joined.source))
            elif _moves_money(subject, joined.row, before):
                found += _moved(subject, joined.row, before, joined.source)
    return found


def vanished(gone: Iterable[Subject], known: Mapping[Subject, Row]) -> list[Moved]:
    """Return those of the rows *gone* that may change the sum of an order's refunds, as they were *known*."""
    return [
        _leading(subject, known[subject], known[subject], "observation") for subject in gone if subject.table in _TABLES
    ]


def _moves_money(subject: Subject, row: Row, known: Row) -> bool:
    if subject.table == "orders":
        return any(row[name] != known[name] for name in _OF_ORDER)
    return row != known


def _moved(subject: Subject, row: Row, known: Row, source: str) -> list[Moved]:
    """Return the references to the orders of *row* and, from the row *known* before, to its earlier orders."""
    now, before = (_leading(subject, each, row, source) for each in (row, known))
    is_refunded = now.is_refunded or before.is_refunded
    return list(dict.fromkeys(each._replace(is_refunded=is_refunded) for each in (now, before)))


def _leading(subject: Subject, row: Row, by: Row, source: str) -> Moved:
    """Return the references to the orders of *row*, with the event of the row *by*, which moved it."""
    is_refunded = _is_refunded(subject, row)
    return Moved(
        subject.account, subject.livemode, *_ways(subject, row), by["event_id"], by["as_of"], source, is_refunded
    )


def _is_refunded(subject: Subject, row: Row) -> bool:
    # A charge that does not report its refunded amount leaves the sum unknown.
    return subject.table == "refunds" or (subject.table == "charges" and row["amount_refunded"] != 0)


def _ways(subject: Subject, row: Row) -> tuple[Value, Value, Value]:
    """Return the payment intent, charge and invoice of *row*. It names them, or is one of them itself."""
    charge = subject.id if subject.table == "charges" else row.get("charge")
    # An order with an intent was paid by its intent, not by its invoice.
    is_by_intent = subject.table == "orders" and row["payment_intent"] is not None
    return row.get("payment_intent"), charge, None if is_by_intent else row.get("invoice")


def changes(cursor: Cursor, moved: list[Moved]) -> list[ChangeRow]:
    """Return a change for each order of *moved* with other refunds than its last announced change.

    The rows are saved. The caller keeps others from appending.
    """
    return _changes(cursor, _refunded(cursor, moved))


def _changes(cursor: Cursor, moved: list[Moved]) -> list[ChangeRow]:
    if not moved:
        return []
    cursor.execute(_AFFECTED, [list(column) for column in zip(*(each[:-1] for each in moved), strict=True)])
    affected = cursor.fetchall()
    if not affected:
        return []
    with cursor.connection.cursor(row_factory=dict_row) as found:
        found.execute(_CHANGED, [list(column) for column in zip(*affected, strict=True)])
        return [_change(row) for row in found]


def unannounced(cursor: Cursor, *, announced_in: str) -> list[ChangeRow]:
    """Return a change for each order with other refunds than its last change in the feed of the schema *announced_in*.

    The change names the event of the order's row, because no single event caused it.
    """
    with cursor.connection.cursor(row_factory=dict_row) as found:
        last = sql.SQL(_LAST).format(changes=sql.Identifier(announced_in, "changes"))
        found.execute(sql.SQL(_UNTOLD) + last)
        return [_change(row) for row in found]


def unannounced_of(cursor: Cursor, account: str) -> list[ChangeRow]:
    """Return a change for each order of *account* with other refunds than its last change in the feed.

    The caller keeps others from appending.
    """
    found = [row for query in (_REFUNDS_OF, _REFUNDED_CHARGES_OF) for row in _changes_of(cursor, account, query)]
    return list({(row["livemode"], row["subject_id"]): row for row in found}.values())


def _changes_of(cursor: Cursor, account: str, query: str) -> Iterator[ChangeRow]:
    after = (False, "")
    while True:
        cursor.execute(query, (account, *after, ROWS_AT_ONCE))
        rows = cursor.fetchall()
        if not rows:
            return
        yield from _changes(cursor, [Moved._make([*row[:8], True]) for row in rows])
        after = (rows[-1][1], rows[-1][-1])


_REFUNDS_OF: Final = """
SELECT account, livemode, r.payment_intent, r.charge, NULL::text, r.event_id, r.as_of, i.source, r.id
FROM refunds AS r JOIN inbox AS i USING (account, livemode)
WHERE i.id = r.event_id AND account = %s AND (livemode, r.id) > (%s, %s) ORDER BY livemode, r.id LIMIT %s
"""
_REFUNDED_CHARGES_OF: Final = """
SELECT account, livemode, c.payment_intent, c.id, c.invoice, c.event_id, c.as_of, i.source, c.id
FROM charges AS c JOIN inbox AS i USING (account, livemode)
WHERE i.id = c.event_id AND account = %s AND (livemode, c.id) > (%s, %s) AND c.amount_refunded IS DISTINCT FROM 0
ORDER BY livemode, c.id LIMIT %s
"""


def _refunded(cursor: Cursor, moved: list[Moved]) -> list[Moved]:
    """Return those of *moved* that lead to a refund, or to a charge that reports one."""
    asked = [each for each in moved if not each.is_refunded and each.leads_on]
    if not asked:
        return [each for each in moved if each.is_refunded]
    cursor.execute(
        _REFUNDED,
        (
            *world_arrays(asked),
            *(
                text_array([str(way or "") for way in ways])
                for ways in zip(*(each[2:5] for each in asked), strict=True)
            ),
        ),
    )
    refunded = {number for (number,) in cursor.fetchall()}
    return [each for each in moved if each.is_refunded] + [
        each for number, each in enumerate(asked, 1) if number in refunded
    ]


# An EXISTS with an OFFSET becomes no join, and no scan of a whole table: see Note [A row is found by its key,
# by any plan] in worker/folding/rows.py.
_REFUNDED: Final = """
WITH m AS (
    SELECT * FROM unnest(%s::text[], %s::boolean[], %s::text[], %s::text[], %s::text[])
        WITH ORDINALITY AS m (account, livemode, intent, charge, invoice, number)
), named AS (
    SELECT number, account, livemode, intent, charge FROM m
    UNION ALL
    SELECT m.number, m.account, m.livemode, p.payment_intent, p.charge FROM m CROSS JOIN LATERAL (
        SELECT t.payment_intent, t.charge FROM invoice_payments AS t
        WHERE (t.account, t.livemode, t.invoice) = (m.account, m.livemode, m.invoice) OFFSET 0
    ) AS p
    WHERE m.invoice <> ''
    UNION ALL
    SELECT m.number, m.account, m.livemode, c.payment_intent, c.id FROM m CROSS JOIN LATERAL (
        SELECT t.payment_intent, t.id FROM charges AS t
        WHERE (t.account, t.livemode, t.invoice) = (m.account, m.livemode, m.invoice) OFFSET 0
    ) AS c
    WHERE m.invoice <> ''
), ways AS (
    SELECT * FROM named
    UNION ALL
    SELECT n.number, n.account, n.livemode, c.payment_intent, NULL FROM named AS n CROSS JOIN LATERAL (
        SELECT t.payment_intent FROM charges AS t
        WHERE (t.account, t.livemode, t.id) = (n.account, n.livemode, n.charge) OFFSET 0
    ) AS c
    WHERE n.charge <> '' AND coalesce(n.intent, '') = ''
)
SELECT DISTINCT number FROM ways AS w WHERE
    (w.intent <> '' AND EXISTS (
        SELECT FROM refunds AS r
        WHERE (r.account, r.livemode, r.payment_intent) = (w.account, w.livemode, w.intent) OFFSET 0
    ))
    OR (w.charge <> '' AND EXISTS (
        SELECT FROM refunds AS r WHERE (r.account, r.livemode, r.charge) = (w.account, w.livemode, w.charge) OFFSET 0
    ))
    OR (w.charge <> '' AND EXISTS (
        SELECT FROM charges AS c
        WHERE (c.account, c.livemode, c.id) = (w.account, w.livemode, w.charge)
            AND c.amount_refunded IS DISTINCT FROM 0 OFFSET 0
    ))
    OR (w.intent <> '' AND EXISTS (
        SELECT FROM charges AS c
        WHERE (c.account, c.livemode, c.payment_intent) = (w.account, w.livemode, w.intent)
            AND (c.amount_refunded IS DISTINCT FROM 0 OR EXISTS (
                SELECT FROM refunds AS r
                WHERE (r.account, r.livemode, r.charge) = (c.account, c.livemode, c.id) OFFSET 0
            )) OFFSET 0
    ))
"""

# The last announced refunds of an order, if the order book has another sum or status. Where nothing was announced, the
# sum was 0, and the status does not matter. Then an unknown sum is announced only if something was refunded and a path
# from the order to a payment is known.
_LAST: Final = """
LEFT JOIN LATERAL (
    SELECT c.after AS announced FROM {changes} AS c
    WHERE (c.account, c.livemode, c.subject_id) = (b.account, b.livemode, b.id) AND c.kind = 'order.refund_changed'
    ORDER BY c.seq DESC LIMIT 1
) AS t ON true
WHERE CASE
    WHEN t.announced IS NOT NULL THEN (b.refunded_amount, b.refund_status)
        IS DISTINCT FROM ((t.announced ->> 'refunded_amount')::bigint, t.announced ->> 'refund_status')
    WHEN b.refunded_amount IS NOT NULL THEN b.refunded_amount <> 0
    ELSE b.refund_status IS DISTINCT FROM 'none' AND (
        b.payment_intent IS NOT NULL
        OR EXISTS (
            SELECT FROM invoice_payments AS p
            WHERE (p.account, p.livemode, p.invoice) = (b.account, b.livemode, b.invoice)
                AND coalesce(p.payment_intent, p.charge) IS NOT NULL OFFSET 0
        )
        OR EXISTS (
            SELECT FROM charges AS p
            WHERE (p.account, p.livemode, p.invoice) = (b.account, b.livemode, b.invoice) OFFSET 0
        )
    )
END
"""
# From the moved rows to their intents and charges, from these to their invoices, and from all of them to the orders.
_AFFECTED: Final = """
WITH moved AS (
    SELECT * FROM unnest(
        %s::text[], %s::boolean[], %s::text[], %s::text[], %s::text[], %s::text[], %s::timestamptz[], %s::text[]
    ) AS t (account, livemode, intent, charge, invoice, event_id, as_of, source)
), by_charge AS (
    SELECT m.*, c.payment_intent, c.invoice AS of_invoice FROM moved AS m CROSS JOIN LATERAL (
        SELECT t.payment_intent, t.invoice FROM charges AS t
        WHERE (t.account, t.livemode, t.id) = (m.account, m.livemode, m.charge) OFFSET 0
    ) AS c
), intents AS (
    SELECT m.account, m.livemode, m.intent, m.event_id, m.as_of, m.source FROM moved AS m WHERE m.intent IS NOT NULL
    UNION
    SELECT b.account, b.livemode, b.payment_intent, b.event_id, b.as_of, b.source FROM by_charge AS b
    WHERE b.payment_intent IS NOT NULL
), charged AS (
    SELECT i.account, i.livemode, c.id AS charge, c.invoice, i.event_id, i.as_of, i.source
    FROM intents AS i CROSS JOIN LATERAL (
        SELECT t.id, t.invoice FROM charges AS t
        WHERE (t.account, t.livemode, t.payment_intent) = (i.account, i.livemode, i.intent) OFFSET 0
    ) AS c
    UNION
    SELECT m.account, m.livemode, m.charge, NULL, m.event_id, m.as_of, m.source FROM moved AS m
    WHERE m.charge IS NOT NULL
), invoices_of AS (
    SELECT m.account, m.livemode, m.invoice, m.event_id, m.as_of, m.source FROM moved AS m WHERE m.invoice IS NOT NULL
    UNION
    SELECT b.account, b.livemode, b.of_invoice, b.event_id, b.as_of, b.source FROM by_charge AS b
    WHERE b.of_invoice IS NOT NULL
    UNION
    SELECT c.account, c.livemode, c.invoice, c.event_id, c.as_of, c.source FROM charged AS c WHERE c.invoice IS NOT NULL
    UNION
    SELECT i.account, i.livemode, p.invoice, i.event_id, i.as_of, i.source FROM intents AS i CROSS JOIN LATERAL (
        SELECT t.invoice FROM invoice_payments AS t
        WHERE (t.account, t.livemode, t.payment_intent) = (i.account, i.livemode, i.intent) OFFSET 0
    ) AS p
    UNION
    SELECT c.account, c.livemode, p.invoice, c.event_id, c.as_of, c.source FROM charged AS c CROSS JOIN LATERAL (
        SELECT t.invoice FROM invoice_payments AS t
        WHERE (t.account, t.livemode, t.charge) = (c.account, c.livemode, c.charge) OFFSET 0
    ) AS p
), affected AS (
    SELECT o.account, o.livemode, o.id, i.event_id, i.as_of, i.source FROM intents AS i CROSS JOIN LATERAL (
        SELECT t.* FROM orders AS t
        WHERE (t.account, t.livemode, t.payment_intent) = (i.account, i.livemode, i.intent) OFFSET 0
    ) AS o
    UNION ALL
    SELECT o.account, o.livemode, o.id, i.event_id, i.as_of, i.source FROM invoices_of AS i CROSS JOIN LATERAL (
        SELECT t.* FROM orders AS t
        WHERE (t.account, t.livemode, t.invoice) = (i.account, i.livemode, i.invoice) OFFSET 0
    ) AS o
), last AS (
    SELECT DISTINCT ON (account, livemode, id) * FROM affected ORDER BY account, livemode, id, as_of DESC, event_id DESC
)
SELECT account, livemode, id, event_id, as_of, source FROM last
"""
# A statement of its own, because planning it takes five times as long together with the paths to the orders.
_CHANGED: Final = f"""
SELECT l.event_id AS by_event, l.as_of AS at, l.source, t.announced, b.*
FROM unnest(%s::text[], %s::boolean[], %s::text[], %s::text[], %s::timestamptz[], %s::text[])
    AS l (account, livemode, id, event_id, as_of, source)
CROSS JOIN LATERAL (
    SELECT * FROM order_book AS k WHERE (k.account, k.livemode, k.id) = (l.account, l.livemode, l.id) OFFSET 0
) AS b
{_LAST.format(changes="changes")}
"""
_UNTOLD: Final = """
SELECT b.event_id AS by_event, b.as_of AS at, i.source, t.announced, b.*
FROM order_book AS b
JOIN inbox AS i ON (i.account, i.livemode, i.id) = (b.account, b.livemode, b.event_id)
"""


def _change(row: Mapping[str, Any]) -> ChangeRow:
    now = {name: row[name] for name in _SHOWN}
    return {
        "account": row["account"],
        "livemode": row["livemode"],
        "subject": "order",
        "subject_id": row["id"],
        "kind": KIND,
        "event_id": row["by_event"],
        "source": row["source"],
        "at": row["at"],
        "before": row["announced"] or {**now, "refunded_amount": 0, "refund_status": "none"},
        "after": now,
    }
