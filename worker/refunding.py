"""What an order's refunds come to, as a change: a truth that spans several objects.

Note [Whoever comes second sees the other]
    A refund knows its payment intent or its charge, and the order that intent, or an invoice that was paid by it.
    Whichever is folded last has to notice the others, and neither knows all of the way between. So this is asked
    under the lock of those who append changes, which is held to the commit: whoever has it sees all that was
    saved by those who had it before.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from psycopg import sql
from psycopg.rows import dict_row

from schemas.database import Cursor, boolean_array, text_array
from worker.folds.facts import Row, Subject
from worker.folds.join import Joined

KIND: Final = "order.refund_changed"
_SHOWN: Final = (
    *("status", "payment_status", "mode", "currency", "amount_total"),
    *("client_reference_id", "customer", "payment_link", "payment_intent", "invoice"),
    *("refunded_amount", "refund_status"),
)
REFUNDS_AT_ONCE: Final = 1_000
_TABLES: Final = ("charges", "invoice_payments", "orders", "refunds")


def moved(rows: Mapping[Subject, Joined], known: Mapping[Subject, Row]) -> dict[Subject, Joined]:
    """Return those of *rows* that may change what an order's refunds come to."""
    return {
        subject: joined
        for subject, joined in rows.items()
        if subject.table in _TABLES and _moves_money(subject, joined.row, known.get(subject))
    }


def changes(cursor: Cursor, moved: Mapping[Subject, Joined]) -> list[dict[str, Any]]:
    """Return a change for each order whose refunded amount is another than was last told, once *moved* are saved.

    Nobody else may append meanwhile.
    """
    if not moved or not _may_affect(cursor, moved):
        return []
    with cursor.connection.cursor(row_factory=dict_row) as found:
        found.execute(_AFFECTED, _columns(moved))
        return [_change(row) for row in found]


def untold(cursor: Cursor, *, told_in: str) -> list[dict[str, Any]]:
    """Return a change for each order whose refunded amount is another than the feed of the schema *told_in* last told.

    It is by the event of the order's row, since no one event is behind it.
    """
    with cursor.connection.cursor(row_factory=dict_row) as found:
        found.execute(sql.SQL(_UNTOLD).format(changes=sql.Identifier(told_in, "changes")))
        return [_change(row) for row in found]


def untold_of(cursor: Cursor, account: str) -> list[dict[str, Any]]:
    """Return a change for each order of *account* that was refunded another amount than its last change has.

    The caller keeps others from appending.
    """
    changes: list[dict[str, Any]] = []
    after = (False, "")
    while True:
        cursor.execute(_REFUNDS_OF, (account, *after, REFUNDS_AT_ONCE))
        rows = cursor.fetchall()
        if not rows:
            return list({(row["livemode"], row["subject_id"]): row for row in changes}.values())
        *columns, ids = map(list, zip(*rows, strict=True))
        with cursor.connection.cursor(row_factory=dict_row) as found:
            found.execute(_AFFECTED, columns)
            changes += [_change(row) for row in found]
        after = (rows[-1][1], ids[-1])


_REFUNDS_OF: Final = """
SELECT account, livemode, false, r.payment_intent, r.charge, NULL::text, r.event_id, r.as_of, i.source, r.id
FROM refunds AS r JOIN inbox AS i USING (account, livemode)
WHERE i.id = r.event_id AND account = %s AND (livemode, r.id) > (%s, %s) ORDER BY livemode, r.id LIMIT %s
"""


def _moves_money(subject: Subject, row: Row, known: Row | None) -> bool:
    """Tell whether *row* may change what an order's refunds come to; most orders only ever tell of themselves."""
    if subject.table == "charges":
        return known is None or row["payment_intent"] != known["payment_intent"]
    if subject.table == "orders":
        names = ("payment_intent", "invoice")
        return any(row[name] is not None and (known is None or row[name] != known[name]) for name in names)
    return row != known


def _may_affect(cursor: Cursor, moved: Mapping[Subject, Joined]) -> bool:
    """Tell whether any of *moved* may concern an order that was refunded: most never were."""
    if any(subject.table != "orders" for subject in moved):
        return True
    intents = _ways(moved, "payment_intent")
    cursor.execute(_REFUNDED, (*intents, *intents, *_ways(moved, "invoice")))
    return cursor.fetchone() == (True,)


def _ways(moved: Mapping[Subject, Joined], name: str) -> tuple[str, str, str]:
    """Return the *name* that each of *moved* has, in its world, as arrays."""
    told = [(subject, str(joined.row[name])) for subject, joined in moved.items() if joined.row[name] is not None]
    return (
        text_array([subject.account for subject, _ in told]),
        boolean_array(subject.livemode for subject, _ in told),
        text_array([way for _, way in told]),
    )


_REFUNDED: Final = """
SELECT EXISTS (
    SELECT FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, payment_intent)
    JOIN refunds USING (account, livemode, payment_intent)
    UNION ALL
    SELECT FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, payment_intent)
    JOIN charges USING (account, livemode, payment_intent)
    JOIN refunds AS r ON (r.account, r.livemode, r.charge) = (charges.account, charges.livemode, charges.id)
    UNION ALL
    SELECT FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, invoice)
    JOIN invoice_payments USING (account, livemode, invoice)
)
"""


def _columns(moved: Mapping[Subject, Joined]) -> list[list[Any]]:
    """Return, a list for each column: the world, the ways, what moved, and by which event."""
    columns: list[list[Any]] = [[] for _ in range(9)]
    for subject, joined in moved.items():
        row = joined.row
        charge = subject.id if subject.table == "charges" else row.get("charge")
        values: Iterable[object] = (
            subject.account,
            subject.livemode,
            subject.table == "orders",
            row.get("payment_intent"),
            charge,
            row.get("invoice"),
            row["event_id"],
            row["as_of"],
            joined.source,
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return columns


# Whether *b*, a row of the order book, comes to another sum than was last told as *t*, or than 0 where nothing was. A
# sum that is not known has a status alone. Where no way to the payments is known there is no sum to tell of.
_IS_ANOTHER_SUM: Final = """
(b.refunded_amount, CASE WHEN b.refunded_amount IS NULL THEN b.refund_status END) IS DISTINCT FROM (
    CASE WHEN t.told IS NULL THEN 0 ELSE (t.told ->> 'refunded_amount')::bigint END,
    CASE WHEN t.told ->> 'refunded_amount' IS NULL THEN t.told ->> 'refund_status' END
) AND (
    b.refunded_amount IS NOT NULL OR t.told IS NOT NULL OR b.payment_intent IS NOT NULL OR EXISTS (
        SELECT FROM invoice_payments AS p
        WHERE (p.account, p.livemode, p.invoice) = (b.account, b.livemode, b.invoice)
            AND coalesce(p.payment_intent, p.charge) IS NOT NULL
    )
)
"""

# An order is looked at when a refund or a way to it moved, and when it appears where refunds are known already: the
# joins with refunds and invoice payments drop the many orders that nobody refunded, by an index probe each.
_AFFECTED: Final = f"""
WITH moved AS (
    SELECT * FROM unnest(
        %s::text[], %s::boolean[], %s::boolean[], %s::text[], %s::text[], %s::text[], %s::text[], %s::timestamptz[],
        %s::text[]
    ) AS t (account, livemode, is_order, intent, charge, invoice, event_id, as_of, source)
), ways AS (
    SELECT m.*, r.payment_intent AS way FROM moved AS m
    JOIN refunds AS r ON (r.account, r.livemode, r.payment_intent) = (m.account, m.livemode, m.intent)
    UNION
    SELECT m.*, c.payment_intent FROM moved AS m
    JOIN charges AS c ON (c.account, c.livemode, c.id) = (m.account, m.livemode, m.charge)
    JOIN refunds AS r ON (r.account, r.livemode, r.charge) = (c.account, c.livemode, c.id)
), affected AS (
    SELECT o.account, o.livemode, o.id, w.event_id, w.as_of, w.source FROM ways AS w
    JOIN orders AS o ON (o.account, o.livemode, o.payment_intent) = (w.account, w.livemode, w.way)
    UNION ALL
    SELECT o.account, o.livemode, o.id, w.event_id, w.as_of, w.source FROM ways AS w
    JOIN invoice_payments AS p ON (p.account, p.livemode, p.payment_intent) = (w.account, w.livemode, w.way)
    JOIN orders AS o ON (o.account, o.livemode, o.invoice) = (p.account, p.livemode, p.invoice)
    UNION ALL
    SELECT o.account, o.livemode, o.id, m.event_id, m.as_of, m.source FROM moved AS m
    JOIN invoice_payments AS p ON (p.account, p.livemode, p.charge) = (m.account, m.livemode, m.charge)
    JOIN orders AS o ON (o.account, o.livemode, o.invoice) = (p.account, p.livemode, p.invoice)
    UNION ALL
    SELECT o.account, o.livemode, o.id, m.event_id, m.as_of, m.source FROM moved AS m
    JOIN invoice_payments AS p ON (p.account, p.livemode, p.invoice) = (m.account, m.livemode, m.invoice)
    JOIN orders AS o ON (o.account, o.livemode, o.invoice) = (m.account, m.livemode, m.invoice)
), last AS (
    SELECT DISTINCT ON (account, livemode, id) * FROM affected ORDER BY account, livemode, id, as_of DESC, event_id DESC
)
SELECT l.event_id AS by_event, l.as_of AS at, l.source, t.told, b.*
FROM last AS l JOIN order_book AS b USING (account, livemode, id)
LEFT JOIN LATERAL (
    SELECT c.after AS told FROM changes AS c
    WHERE (c.account, c.livemode, c.subject_id) = (l.account, l.livemode, l.id) AND c.kind = 'order.refund_changed'
    ORDER BY c.seq DESC LIMIT 1
) AS t ON true
WHERE {_IS_ANOTHER_SUM}"""


_UNTOLD: Final = f"""
SELECT b.event_id AS by_event, b.as_of AS at, i.source, t.told, b.*
FROM order_book AS b
JOIN inbox AS i ON (i.account, i.livemode, i.id) = (b.account, b.livemode, b.event_id)
LEFT JOIN LATERAL (
    SELECT c.after AS told FROM {{changes}} AS c
    WHERE (c.account, c.livemode, c.subject_id) = (b.account, b.livemode, b.id) AND c.kind = 'order.refund_changed'
    ORDER BY c.seq DESC LIMIT 1
) AS t ON true
WHERE {_IS_ANOTHER_SUM}"""


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
