"""What an order's refunds come to, as a change: a truth that spans several objects.

Note [Whoever comes second sees the other]
    A refund knows its payment intent or its charge, a charge its intent or its invoice, and the order that intent, or
    an invoice that was paid by it. Whichever is folded last has to notice the others, and neither knows all of the way
    between. So this is asked under the lock of those who append changes, which is held to the commit: whoever has it
    sees all that was saved by those who had it before.

Note [Most orders were never refunded]
    First one statement finds which of a batch's rows lead to a refund at all, or to a charge that reports one, by index
    probes. Only for those are the orders looked for, and what the order book shows of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from psycopg import sql
from psycopg.rows import dict_row

from schemas.database import Cursor, boolean_array, text_array
from worker.folds.facts import Row, Subject, Value
from worker.folds.join import Joined

KIND: Final = "order.refund_changed"
_SHOWN: Final = (
    *("status", "payment_status", "mode", "currency", "amount_total"),
    *("client_reference_id", "customer", "payment_link", "payment_intent", "invoice"),
    *("refunded_amount", "refund_status"),
)
ROWS_AT_ONCE: Final = 1_000
# What of an order decides which refunds are its own, whether they can be added up, and how much of it they are.
_OF_ORDER: Final = ("payment_intent", "invoice", "currency", "amount_total")
_TABLES: Final = ("charges", "invoice_payments", "orders", "refunds")


class Moved(NamedTuple):
    """A row that may change what an order's refunds come to: how its orders are found, and which event moved it.

    It *is_refunded* where it is a refund, or a charge that reports one; of others that is asked.
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


def moved(rows: Mapping[Subject, Joined], known: Mapping[Subject, Row]) -> list[Moved]:
    """Return those of *rows* that may change what an order's refunds come to, where they were *known* otherwise."""
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
    """Return those of the rows that are *gone*, as they were *known*, that may change it."""
    return [
        _leading(subject, known[subject], known[subject], "observation") for subject in gone if subject.table in _TABLES
    ]


def _moves_money(subject: Subject, row: Row, known: Row) -> bool:
    if subject.table == "orders":
        return any(row[name] != known[name] for name in _OF_ORDER)
    return row != known


def _moved(subject: Subject, row: Row, known: Row, source: str) -> list[Moved]:
    """Return what leads to the orders of *row*, and to those that it led to before, when it was *known*."""
    now, before = (_leading(subject, each, row, source) for each in (row, known))
    is_refunded = now.is_refunded or before.is_refunded
    return list(dict.fromkeys(each._replace(is_refunded=is_refunded) for each in (now, before)))


def _leading(subject: Subject, row: Row, by: Row, source: str) -> Moved:
    """Return what leads to the orders of *row*, which was moved *by* what made it what it is."""
    is_refunded = _is_refunded(subject, row)
    return Moved(
        subject.account, subject.livemode, *_ways(subject, row), by["event_id"], by["as_of"], source, is_refunded
    )


def _is_refunded(subject: Subject, row: Row) -> bool:
    # A charge that does not report what was refunded of it leaves the sum unknown.
    return subject.table == "refunds" or (subject.table == "charges" and row["amount_refunded"] != 0)


def _ways(subject: Subject, row: Row) -> tuple[Value, Value, Value]:
    """Return the payment intent, charge and invoice that *row* names, or is."""
    charge = subject.id if subject.table == "charges" else row.get("charge")
    # An order with an intent was paid by that.
    is_by_intent = subject.table == "orders" and row["payment_intent"] is not None
    return row.get("payment_intent"), charge, None if is_by_intent else row.get("invoice")


def changes(cursor: Cursor, moved: list[Moved]) -> list[dict[str, Any]]:
    """Return a change for each order of which *moved* changed what was refunded, since it was last announced.

    The rows are saved. The caller keeps others from appending.
    """
    return _changes(cursor, _refunded(cursor, moved))


def _changes(cursor: Cursor, moved: list[Moved]) -> list[dict[str, Any]]:
    if not moved:
        return []
    with cursor.connection.cursor(row_factory=dict_row) as found:
        found.execute(_AFFECTED, [list(column) for column in zip(*(each[:-1] for each in moved), strict=True)])
        return [_change(row) for row in found]


def untold(cursor: Cursor, *, told_in: str) -> list[dict[str, Any]]:
    """Return a change for each order that was refunded otherwise than the feed of the schema *told_in* last has it.

    It is by the event of the order's row, since no one event is behind it.
    """
    with cursor.connection.cursor(row_factory=dict_row) as found:
        last = sql.SQL(_LAST).format(changes=sql.Identifier(told_in, "changes"))
        found.execute(sql.SQL(_UNTOLD) + last)
        return [_change(row) for row in found]


def untold_of(cursor: Cursor, account: str) -> list[dict[str, Any]]:
    """Return a change for each order of *account* that was refunded otherwise than its last change has it.

    The caller keeps others from appending.
    """
    found = [row for query in (_REFUNDS_OF, _REFUNDED_CHARGES_OF) for row in _changes_of(cursor, account, query)]
    return list({(row["livemode"], row["subject_id"]): row for row in found}.values())


def _changes_of(cursor: Cursor, account: str, query: str) -> Iterator[dict[str, Any]]:
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
    asked = [each for each in moved if not each.is_refunded]
    if not asked:
        return moved
    cursor.execute(
        _REFUNDED,
        (
            text_array([each.account for each in asked]),
            boolean_array(each.livemode for each in asked),
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


# An EXISTS with an OFFSET is made no join, nor a table read whole: see Note [A row is found by its key] in projection.
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

# What was last announced of an order's refunds, and whether the order book has another sum or status. Where nothing was
# announced the sum was 0, of whatever status: then one that is not known is announced only if a way to a payment is
# known, and something was refunded.
_LAST: Final = """
LEFT JOIN LATERAL (
    SELECT c.after AS told FROM {changes} AS c
    WHERE (c.account, c.livemode, c.subject_id) = (b.account, b.livemode, b.id) AND c.kind = 'order.refund_changed'
    ORDER BY c.seq DESC LIMIT 1
) AS t ON true
WHERE CASE
    WHEN t.told IS NOT NULL THEN (b.refunded_amount, b.refund_status)
        IS DISTINCT FROM ((t.told ->> 'refunded_amount')::bigint, t.told ->> 'refund_status')
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
# From what moved to its intents and charges, from these to their invoices, and from all of them to the orders.
_AFFECTED: Final = sql.Composed(
    [
        sql.SQL(
            """
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
SELECT l.event_id AS by_event, l.as_of AS at, l.source, t.told, b.*
FROM last AS l CROSS JOIN LATERAL (
    SELECT * FROM order_book AS k WHERE (k.account, k.livemode, k.id) = (l.account, l.livemode, l.id) OFFSET 0
) AS b
"""
        ),
        sql.SQL(_LAST).format(changes=sql.Identifier("changes")),
    ]
).as_bytes()
_UNTOLD: Final = """
SELECT b.event_id AS by_event, b.as_of AS at, i.source, t.told, b.*
FROM order_book AS b
JOIN inbox AS i ON (i.account, i.livemode, i.id) = (b.account, b.livemode, b.event_id)
"""


def _change(row: Mapping[str, Any]) -> dict[str, Any]:
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
        "before": row["told"] or {**now, "refunded_amount": 0, "refund_status": "none"},
        "after": now,
    }
