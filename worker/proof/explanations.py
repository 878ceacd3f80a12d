"""Finds the differences from what Stripe lists that other rows explain.

Note [What no event of a charge reports]
    A dispute sets ``disputed`` of its charge, and a refund that fails may lower ``amount_refunded``, without an event
    of the charge. The row has the new values only from the charge's next event on. Until then they are not reported as
    differences, if the dispute or the refunds are in the tables and explain them to the cent.

Note [No event of a session reports its capture]
    If a payment is captured by hand, its session completes as unpaid, and its charge reports the capture later: see
    Note [A charge decides what its session leaves open] in worker/folds/payment.py. Stripe then shows the session as
    paid, without an event of it. That is no difference if a charge of the intent was captured. A repair does
    not record the session as it is shown, because that adds nothing: the charge decides, and dates the payment.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import product
from typing import Any, Final

from psycopg.rows import dict_row

from schemas.database import Cursor
from schemas.observations import World
from worker.folds import payment
from worker.folds.facts import Subject
from worker.proof.difference import DIFFERENT, Difference, Pair
from worker.proof.pairs import Name, key_of, name_of


def explained(
    cursor: Cursor,
    world: World,
    found: Sequence[Difference],
    pairs: Mapping[Subject, Pair],
    captured: Mapping[str, datetime],
) -> set[Name]:
    """Return those of *found* that other rows explain."""
    charges = [each for each in found if each.table == "charges"]
    orders = [each for each in found if each.table == "orders" and each.id in captured]
    return {
        *_explained_charges(cursor, world, charges),
        *_paid_by_invoice(cursor, world, pairs),
        *(name_of(each) for each in orders if _is_by_capture(each, captured[each.id])),
    }


_REPORTED_BY_OTHERS: Final = ("amount_refunded", "refunded", "disputed")


_OF_CHARGES: Final = """
SELECT c.id, c.amount, c.amount_captured, r.newer, r.not_older, r.newer_failed, r.failed_since, r.failed_from,
    EXISTS (
        SELECT FROM disputes AS d WHERE (d.account, d.livemode, d.charge) = (c.account, c.livemode, c.id)
    ) AS is_disputed
FROM charges AS c CROSS JOIN LATERAL (
    SELECT
        coalesce(sum(r.amount) FILTER (WHERE failed_at IS NULL AND r.created > c.as_of), 0) AS newer,
        coalesce(sum(r.amount) FILTER (WHERE failed_at IS NULL AND r.created >= c.as_of), 0) AS not_older,
        coalesce(sum(r.amount) FILTER (WHERE failed_at IS NOT NULL AND r.created >= c.as_of), 0) AS newer_failed,
        coalesce(sum(r.amount) FILTER (WHERE r.created <= c.as_of AND failed_at > c.as_of), 0) AS failed_since,
        coalesce(sum(r.amount) FILTER (WHERE r.created <= c.as_of AND failed_at >= c.as_of), 0) AS failed_from
    FROM refunds AS r
    WHERE (r.account, r.livemode, r.charge, r.currency) = (c.account, c.livemode, c.id, c.currency)
) AS r
WHERE (c.account, c.livemode) = (%s, %s) AND c.id = ANY (%s)
"""


def _explained_charges(cursor: Cursor, world: World, found: Sequence[Difference]) -> Iterator[Name]:
    """See Note [What no event of a charge reports]."""
    by_charge: dict[str, dict[str | None, Difference]] = defaultdict(dict)
    for each in found:
        if each.kind == DIFFERENT and each.column in _REPORTED_BY_OTHERS:
            by_charge[each.id][each.column] = each
    if not by_charge:
        return
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as opened:
        for row in opened.execute(_OF_CHARGES, (*key_of(world), sorted(by_charge))):
            for column in _explained_columns(row, by_charge[row["id"]]):
                yield ("charges", row["id"], column)


def _explained_columns(row: Mapping[str, Any], columns: Mapping[str | None, Difference]) -> Iterator[str]:
    disputed, refunded = columns.get("disputed"), columns.get("refunded")
    if disputed is not None and disputed.expected is True and row["is_disputed"]:
        yield "disputed"
    amount = columns.get("amount_refunded")
    if amount is not None and _is_moved_by_refunds(row, amount):
        yield "amount_refunded"
        if refunded is not None and _may_be_refunded(row, amount.expected) in (refunded.expected, None):
            yield "refunded"


def _may_be_refunded(row: Mapping[str, Any], amount: object) -> bool | None:
    """Return whether a charge with *amount* refunded is fully refunded.

    None if that is all that was captured, but less than the charge's amount: it is not documented whether Stripe calls
    that a full refund.
    """
    if amount == row["amount"]:
        return True
    return None if amount == row["amount_captured"] else False


def _is_moved_by_refunds(row: Mapping[str, Any], amount: Difference) -> bool:
    if not isinstance(amount.held, int) or not isinstance(amount.expected, int):
        return False
    # It is not known whether the event counts refunds of its own second, and whether the amount falls when one fails.
    grown, failed = (row["newer"], row["not_older"]), (0, row["newer_failed"])
    fallen = (0, row["failed_since"], row["failed_from"])
    explained = {more + lost - less for more, lost, less in product(grown, failed, fallen)}
    return amount.expected - amount.held in explained


def _paid_by_invoice(cursor: Cursor, world: World, pairs: Mapping[Subject, Pair]) -> Iterator[Name]:
    """Yield the invoice payments without a row for which the invoice itself reports a payment, as before basil."""
    invoices = {
        subject.id: pair.expected["invoice"]
        for subject, pair in pairs.items()
        if subject.table == "invoice_payments" and pair.held is None and pair.expected is not None
    }
    if not invoices:
        return
    cursor.execute(
        "SELECT id FROM invoice_payments WHERE (account, livemode) = (%s, %s) AND id = ANY (%s)",
        (*key_of(world), [str(invoice) for invoice in invoices.values()]),
    )
    known = {id_ for (id_,) in cursor.fetchall()}
    for id_, invoice in invoices.items():
        if invoice in known:
            yield ("invoice_payments", id_, None)


_CAPTURED: Final = """
SELECT o.id, min(c.captured_at) FROM orders AS o JOIN charges AS c USING (account, livemode, payment_intent)
WHERE (o.account, o.livemode) = (%s, %s) AND o.id = ANY (%s) AND c.captured_at IS NOT NULL
    AND (c.status = 'succeeded' OR c.released_at IS NOT NULL)
GROUP BY o.id
"""


def captured(cursor: Cursor, world: World, pairs: Mapping[Subject, Pair]) -> dict[str, datetime]:
    """Return the time of the capture for each order that Stripe shows as paid, though its session left it open.

    See Note [No event of a session reports its capture].
    """
    orders = [
        subject.id
        for subject, pair in pairs.items()
        if subject.table == "orders" and pair.held and pair.expected and payment.is_open(pair.held)
        if pair.expected["payment_status"] == "paid"
    ]
    if not orders:
        return {}
    cursor.execute(_CAPTURED, (*key_of(world), orders))
    return dict(cursor.fetchall())


def _is_by_capture(order: Difference, captured_at: datetime) -> bool:
    return order.column == "payment_status" or (order.column == "paid_at" and order.held == captured_at)
