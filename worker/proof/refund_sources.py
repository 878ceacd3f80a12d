"""Lists the charges and refunds behind an order's refunded amount, and where they contradict each other.

The order book computes the amount. This module only lists the charges and refunds, so that a person sees the reason.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from psycopg.rows import dict_row

from schemas import tables
from schemas.database import Cursor, id_arrays
from worker import folds
from worker.folding.rows import load_rows
from worker.folds import join, payment
from worker.folds.facts import Facts, Row, Subject, event_of

_LOST: Final = {"failed": "it failed", "canceled": "it was canceled"}


def of_order(cursor: Cursor, order: Row, *, as_of: datetime | None) -> list[dict[str, Any]]:
    """Return the charges and refunds behind *order*, as they are, or as they were known at *as_of*.

    Each is a dict of object, id, status, currency, amount, amount_captured, amount_refunded (as a charge reports it),
    amount_by_refunds (the sum of a charge's refunds; None if one is in another currency, or of unknown amount),
    event_id, as_of and verdict. As of an earlier time objects with an archived payload are not known, and are left out.
    """
    subjects = _subjects(cursor, order)
    rows = load_rows(cursor, subjects) if as_of is None else _received(cursor, subjects, as_of)
    charges, refunds = _linked(order, rows)
    of_charges = [(refund, _charge_of(refund, charges)) for refund in refunds]
    shown = [_charge(charge, [refund for refund, its in of_charges if its is charge]) for charge in charges]
    return shown + [_refund(refund, charge, order) for refund, charge in of_charges]


# ---- The charges and refunds of an order ----


def _subjects(cursor: Cursor, order: Row) -> list[Subject]:
    cursor.execute(_BEHIND, {name: order[name] for name in ("account", "livemode", "payment_intent", "invoice")})
    return [Subject(table, str(order["account"]), order["livemode"] is True, id_) for table, id_ in cursor.fetchall()]


# With arrays PostgreSQL looks up each table by an index, and reads none as a whole.
_BEHIND: Final = """
WITH payments AS (
    SELECT id, payment_intent, charge FROM invoice_payments
    WHERE %(payment_intent)s::text IS NULL
        AND (account, livemode, invoice) = (%(account)s, %(livemode)s, %(invoice)s::text)
), named AS (
    SELECT id, payment_intent FROM charges
    WHERE %(payment_intent)s::text IS NULL
        AND (account, livemode, invoice) = (%(account)s, %(livemode)s, %(invoice)s::text)
    UNION
    SELECT id, payment_intent FROM charges
    WHERE (account, livemode) = (%(account)s, %(livemode)s) AND id = ANY (ARRAY(SELECT charge FROM payments))
), intents AS (
    SELECT %(payment_intent)s::text AS id
    UNION SELECT payment_intent FROM payments
    UNION SELECT payment_intent FROM named
), charged AS (
    SELECT id FROM named
    UNION SELECT charge FROM payments WHERE charge IS NOT NULL
    UNION SELECT id FROM charges
    WHERE (account, livemode) = (%(account)s, %(livemode)s) AND payment_intent = ANY (ARRAY(SELECT id FROM intents))
)
SELECT 'invoice_payments', id FROM payments
UNION ALL SELECT 'charges', id FROM charged
UNION SELECT 'refunds', id FROM refunds
WHERE (account, livemode) = (%(account)s, %(livemode)s) AND payment_intent = ANY (ARRAY(SELECT id FROM intents))
UNION SELECT 'refunds', id FROM refunds
WHERE (account, livemode) = (%(account)s, %(livemode)s) AND charge = ANY (ARRAY(SELECT id FROM charged))
"""


def _received(cursor: Cursor, subjects: Sequence[Subject], as_of: datetime) -> dict[Subject, Row]:
    """Return the rows of *subjects* as the events that had been received by *as_of* make them."""
    facts: dict[Subject, list[Facts]] = defaultdict(list)
    archived: set[str] = set()
    for event in _events(cursor, subjects, as_of):
        if event["payload"] is None:
            archived.add(event["object_id"])
            continue
        for one in folds.judge(event_of(event)).facts:
            facts[one.subject].append(one)
    joined = {
        subject: join.fold_all(folds.ROW_SPECS[subject.table], facts[subject])
        for subject in subjects
        if subject in facts and subject.id not in archived
    }
    return {subject: each.row for subject, each in joined.items() if each is not None}


def _events(cursor: Cursor, subjects: Sequence[Subject], as_of: datetime) -> list[dict[str, Any]]:
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
        return rows.execute(_RECEIVED, (*id_arrays(subjects), as_of)).fetchall()


_RECEIVED: Final = f"""
SELECT e.* FROM (
    SELECT DISTINCT i.seq FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, object_id)
    JOIN inbox AS i ON {tables.of_object("i", "k.account", "k.livemode", "k.object_id")}
) AS own JOIN events AS e USING (seq)
WHERE e.state = 'folded' AND e.received_at <= %s
"""


def _linked(order: Row, rows: Mapping[Subject, Row]) -> tuple[list[Row], list[Row]]:
    """Return the charges and the refunds among *rows* that belong to *order*, sorted by id."""
    by_table: dict[str, list[Row]] = defaultdict(list)
    for subject in sorted(rows):
        by_table[subject.table].append(rows[subject])
    invoice = order["invoice"] if order["payment_intent"] is None else None
    payments = [each for each in by_table["invoice_payments"] if invoice is not None and each["invoice"] == invoice]
    intents = {order["payment_intent"], *(each["payment_intent"] for each in payments)} - {None}
    ids = {each["charge"] for each in payments} - {None}
    named = [each for each in by_table["charges"] if each["id"] in ids or (invoice and each["invoice"] == invoice)]
    intents |= {each["payment_intent"] for each in named} - {None}
    ids |= {each["id"] for each in named}
    charges = [each for each in by_table["charges"] if each["id"] in ids or each["payment_intent"] in intents]
    ids |= {each["id"] for each in charges}
    refunds = [each for each in by_table["refunds"] if each["charge"] in ids or each["payment_intent"] in intents]
    return charges, refunds


# ---- Their verdicts ----


def _is_captured(charge: Row) -> bool:
    return charge["captured_at"] is not None or (charge["status"] == "succeeded" and charge["captured"] is True)


def _is_released(charge: Row) -> bool:
    return charge["released_at"] is not None and not _is_captured(charge)


def _charge_of(refund: Row, charges: Iterable[Row]) -> Row | None:
    """Return the charge that *refund* names, else a charge of its intent: a captured one rather than a released one.

    This is the order book's rule.
    """
    if refund["charge"] is not None:
        return next((each for each in charges if each["id"] == refund["charge"]), None)
    found = [each for each in charges if _shares_intent(each, refund) and (_is_captured(each) or _is_released(each))]
    return min(found, key=lambda each: (not _is_captured(each), str(each["id"])), default=None)


def _shares_intent(charge: Row, refund: Row) -> bool:
    return charge["payment_intent"] is not None and charge["payment_intent"] == refund["payment_intent"]


def _gives_back(refund: Row, charge: Row | None) -> bool:
    return refund["reason"] != payment.RELEASED and (charge is None or not _is_released(charge))


def _counts(refund: Row, charge: Row | None) -> bool:
    return refund["status"] not in _LOST and _gives_back(refund, charge)


def _charge(charge: Row, refunds: Sequence[Row]) -> dict[str, Any]:
    names = ("id", "status", "currency", "amount", "amount_captured", "amount_refunded", "event_id", "as_of")
    by_refunds = _sum([each for each in refunds if _counts(each, charge)], charge)
    shown = {"object": "charge", **{name: charge[name] for name in names}, "amount_by_refunds": by_refunds}
    return shown | {"verdict": _verdict(charge, refunds)}


def _sum(refunds: Iterable[Row], charge: Row) -> int | None:
    """Return the sum of *refunds* in the currency of *charge*; None if one is in another, or of unknown amount."""
    amounts = [
        each["amount"] if each["currency"] == charge["currency"] else None for each in refunds if each["amount"] != 0
    ]
    return None if None in amounts else sum(amount for amount in amounts if isinstance(amount, int))


def _verdict(charge: Row, refunds: Sequence[Row]) -> str:
    reported = charge["amount_refunded"]
    if not _is_captured(charge):
        released = "a hold that was released: nothing came, and nothing came back"
        return released if _is_released(charge) else "not captured"
    if not isinstance(reported, int):
        return "it does not report what was refunded"
    giving = [each for each in refunds if _gives_back(each, charge)]
    counted = [each for each in giving if _counts(each, charge)]
    known = _sum([each for each in giving if _is_known(each, charge)], charge)
    if known is None or _sum(counted, charge) is None:
        return f"it reports {reported} refunded, and its refunds are in another currency, or of an unknown amount"
    return _compared(reported, known, _released_rest(charge), _since(charge, giving, counted))


def _compared(reported: int, known: int, rest: int, since: str) -> str:
    """Return how the amount that a charge *reported* as refunded compares with its refunds *known* by then, as words.

    *rest* was never captured, and may be part of the reported amount. *since* describes what happened to the refunds
    after the report.
    """
    if known in (reported, reported - rest):
        less = "" if known == reported else f", less the {rest} that was released"
        return f"it reports {reported} refunded: {since}" if since else f"its refunds come to what it reports{less}"
    by_then = " by then" if since else ""
    if 0 < rest <= reported:
        without = f"or {reported - rest} without what was released, and its refunds{by_then} come to {known}"
        return f"it reports {reported} refunded, {without}" + (since and f": {since}")
    more_or_less = "more" if reported > known else "less"
    contradiction = f"it reports {reported} refunded, which is {more_or_less} than its refunds{by_then}, {known}"
    return contradiction + (since and f": {since}")


def _released_rest(charge: Row) -> int:
    """Return how much of *charge* was not captured, and so was released; 0 if that is not known."""
    amount, captured = charge["amount"], charge["amount_captured"]
    return max(0, amount - captured) if isinstance(amount, int) and isinstance(captured, int) else 0


def _since(charge: Row, giving: Sequence[Row], counted: Sequence[Row]) -> str:
    """Return, as words, what happened to the refunds of *charge* since its last event; empty if nothing did."""
    newer = [each for each in counted if not _is_known(each, charge)]
    if newer:
        return f"{'its' if len(newer) == len(counted) else 'some of its'} refunds are newer"
    is_less = any(_is_known(each, charge) and each["status"] in _LOST for each in giving)
    return "some of its refunds failed or were canceled since" if is_less else ""


def _is_known(refund: Row, charge: Row) -> bool:
    """Return whether the last event of *charge* can have counted *refund*: made by then, and not failed yet."""
    at, failed_at = charge["as_of"], refund["failed_at"]
    made = min(each for each in (refund["created"], refund["as_of"]) if isinstance(each, datetime))
    return isinstance(at, datetime) and made <= at and not (isinstance(failed_at, datetime) and failed_at <= at)


def _refund(refund: Row, charge: Row | None, order: Row) -> dict[str, Any]:
    names = ("id", "status", "currency", "amount", "event_id", "as_of")
    shown = {"object": "refund", **{name: refund[name] for name in names}}
    if not _counts(refund, charge):
        return shown | {"verdict": f"it does not count: {_LOST.get(str(refund['status']), 'it releases a hold')}"}
    is_other = refund["currency"] != order["currency"]
    return shown | {"verdict": "it counts" + (", in another currency than the order" if is_other else "")}
