"""What came back of an order: the four columns that the view `order_book` adds, each condition by a small history.

The sums are arithmetic by hand. What Stripe's words mean is in docs.stripe.com/api/refunds/object, /charges/object,
/disputes/object, /credit_notes/object and /invoice-payment/object; stripe-facts, sections 2.5, 2.8 and 11. In a history
`#` stands for its name, so that no two share an object.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine

from tests.envelopes import Json, event
from tests.ledger import rows, take_in

PAID, LATER, LATEST = 1_760_000_000, 1_760_001_000, 1_760_002_000


def session(total: int | None = 1500, **fields: object) -> bytes:
    """Return a session that is paid by the payment intent pi_#."""
    known: Json = {
        "id": "cs_#",
        "object": "checkout.session",
        "amount_subtotal": total,
        "amount_total": total,
        "created": PAID - 60,
        "currency": "usd",
        "customer": "cus_#",
        "invoice": None,
        "metadata": {},
        "mode": "payment",
        "payment_intent": "pi_#",
        "payment_status": "paid",
        "status": "complete",
        "subscription": None,
    }
    return event("evt_#_cs", "checkout.session.completed", PAID, {**known, **fields})


def subscribed(**fields: object) -> bytes:
    """Return a session that is paid by its invoice in_#, and names no payment intent."""
    whole: dict[str, Any] = {
        "mode": "subscription",
        "payment_intent": None,
        "invoice": "in_#",
        "subscription": "sub_#",
        **fields,
    }
    return session(**whole)


def charge(at: int = PAID, type_: str = "charge.succeeded", **fields: object) -> bytes:
    """Return what Stripe reported at *at* of charge ch_#, captured whole unless *fields* say otherwise."""
    known: Json = {
        "id": "ch_#",
        "object": "charge",
        "amount": 1500,
        "amount_captured": 1500,
        "amount_refunded": 0,
        "captured": True,
        "created": PAID,
        "currency": "usd",
        "disputed": False,
        "payment_intent": "pi_#",
        "refunded": False,
        "status": "succeeded",
    }
    whole = {**known, **fields}
    return event(f"evt_{whole['id']}_{at}", type_, at, whole)


def refund(
    id_: str, amount: int, status: str = "succeeded", *, at: int = LATER, livemode: bool = False, **fields: object
) -> bytes:
    """Return refund *id_* of charge ch_# and intent pi_#, made at *at*."""
    known: Json = {
        "id": f"{id_}_#",
        "object": "refund",
        "amount": amount,
        "charge": "ch_#",
        "created": at,
        "currency": "usd",
        "payment_intent": "pi_#",
        "reason": "requested_by_customer",
        "status": status,
    }
    return event(f"evt_{id_}_#_{at}", "refund.created", at, {**known, **fields}, livemode=livemode)


def failed(id_: str, amount: int, *, made: int, at: int) -> bytes:
    """Return refund *id_* that was made at *made* and failed at *at*."""
    whole: Json = {
        "id": f"{id_}_#",
        "object": "refund",
        "amount": amount,
        "charge": "ch_#",
        "created": made,
        "currency": "usd",
        "failure_reason": "expired_or_canceled_card",
        "payment_intent": "pi_#",
        "reason": None,
        "status": "failed",
    }
    return event(f"evt_{id_}_#_failed", "refund.failed", at, whole)


def dispute(id_: str, amount: int, status: str, **fields: object) -> bytes:
    """Return dispute *id_* of charge ch_# and intent pi_#."""
    known: Json = {
        "id": f"{id_}_#",
        "object": "dispute",
        "amount": amount,
        "charge": "ch_#",
        "created": LATER,
        "currency": "usd",
        "payment_intent": "pi_#",
        "reason": "fraudulent",
        "status": status,
    }
    return event(f"evt_{id_}_#", "charge.dispute.updated", LATER, {**known, **fields})


def note(id_: str, amount: int, status: str = "issued", **fields: object) -> bytes:
    """Return credit note *id_* of invoice in_#."""
    known: Json = {
        "id": f"{id_}_#",
        "object": "credit_note",
        "amount": amount,
        "created": LATER,
        "currency": "usd",
        "customer": "cus_#",
        "invoice": "in_#",
        "number": f"{id_}-1",
        "out_of_band_amount": None,
        "post_payment_amount": amount,
        "pre_payment_amount": 0,
        "refunds": [],
        "status": status,
        "total": amount,
        "type": "post_payment",
    }
    type_ = "credit_note.voided" if status == "void" else "credit_note.created"
    return event(f"evt_{id_}_#", type_, LATER, {**known, **fields})


def invoice_payment(id_: str, amount: int, **payment: object) -> bytes:
    """Return payment *id_* of invoice in_#."""
    whole: Json = {
        "id": f"{id_}_#",
        "object": "invoice_payment",
        "amount_paid": amount,
        "amount_requested": amount,
        "created": PAID,
        "currency": "usd",
        "invoice": "in_#",
        "is_default": True,
        "payment": payment,
        "status": "paid",
        "status_transitions": {"canceled_at": None, "paid_at": PAID},
    }
    return event(f"evt_{id_}_#", "invoice_payment.paid", PAID, whole)


BY_INTENT: Json = {"type": "payment_intent", "payment_intent": "pi_#"}
BY_CHARGE: Json = {"type": "charge", "charge": "ch_#"}
ALL_OF_IT: Json = {"amount_refunded": 1500, "refunded": True}
LOOSE: Json = {"charge": None, "payment_intent": None}

# A history, and the order's refunded and disputed amount and its refund status.
Money = tuple[int | None, int | None, str | None]
Histories = Mapping[str, tuple[Sequence[bytes], Money]]
HISTORIES: Histories = {
    "untouched": ([session(), charge()], (0, 0, "none")),
    "part": ([session(), charge(), refund("re", 501)], (501, 0, "partial")),
    "whole": ([session(), charge(), refund("re", 701), refund("rf", 799)], (1500, 0, "full")),
    # ---- which refunds count ----
    "statuses": (
        [
            session(),
            charge(),
            refund("ra", 1, "pending"),
            refund("rb", 20, "requires_action"),
            refund("rc", 300, "succeeded"),
            refund("rd", 404, "canceled"),
            failed("re", 505, made=LATER, at=LATEST),
        ],
        (321, 0, "partial"),
    ),
    "by_charge": ([session(), charge(), refund("re", 502, payment_intent=None)], (502, 0, "partial")),
    "by_intent": ([session(), charge(), refund("re", 503, charge=None)], (503, 0, "partial")),
    "of_another": (
        [
            session(),
            charge(),
            refund("ra", 504, **LOOSE),
            refund("rb", 505, charge="ch_0#", payment_intent="pi_0#"),
        ],
        (0, 0, "none"),
    ),
    "of_the_other_mode": ([session(), charge(), refund("re", 511, livemode=True)], (0, 0, "none")),
    "second_charge": (
        [
            session(),
            charge(id="ch_#_1", status="failed", captured=False, amount_captured=0),
            charge(),
            refund("re", 507),
        ],
        (507, 0, "partial"),
    ),
    # ---- which disputes count: those by which money is or may be gone ----
    "needs_response": ([session(), charge(), dispute("dp", 601, "needs_response")], (0, 601, "none")),
    "under_review": ([session(), charge(), dispute("dp", 602, "under_review")], (0, 602, "none")),
    "lost": ([session(), charge(), dispute("dp", 603, "lost")], (0, 603, "none")),
    "appealed": ([session(), charge(), dispute("dp", 604, "appeal_needs_response")], (0, 604, "none")),
    "appeal": ([session(), charge(), dispute("dp", 605, "appeal_under_review")], (0, 605, "none")),
    "won": ([session(), charge(), dispute("dp", 606, "won")], (0, 0, "none")),
    "prevented": ([session(), charge(), dispute("dp", 607, "prevented")], (0, 0, "none")),
    "disputes": (
        [session(), charge(), dispute("da", 61, "lost"), dispute("db", 620, "under_review"), dispute("dc", 63, "won")],
        (0, 681, "none"),
    ),
    # Before 2019 a dispute named no payment intent.
    "dispute_by_charge": (
        [session(), charge(), dispute("dp", 611, "lost", payment_intent=None)],
        (0, 611, "none"),
    ),
    "dispute_of_another": (
        [session(), charge(), dispute("dp", 612, "lost", charge="ch_0#", payment_intent="pi_0#")],
        (0, 0, "none"),
    ),
    "disputed_and_refunded": (
        [session(), charge(), refund("re", 508), dispute("dp", 613, "needs_response")],
        (508, 613, "partial"),
    ),
    # ---- which credit notes count: those of its invoice that are not void ----
    "credited": (
        [session(invoice="in_#"), charge(), note("na", 71), note("nb", 720), note("nc", 73, "void")],
        (0, 0, "none"),
    ),
    "note_of_another": ([session(invoice="in_#"), charge(), note("na", 74, invoice="in_0#")], (0, 0, "none")),
    # ---- by the payments of its invoice, where the order names no intent ----
    "invoiced": (
        [
            subscribed(),
            invoice_payment("inpay", 1500, **BY_INTENT),
            charge(),
            refund("re", 509),
            dispute("dp", 614, "lost"),
            note("na", 75),
        ],
        (509, 614, "partial"),
    ),
    "invoiced_untouched": ([subscribed(), invoice_payment("inpay", 1500, **BY_INTENT), charge()], (0, 0, "none")),
    "invoiced_by_charge": (
        [
            subscribed(),
            invoice_payment("inpay", 1500, **BY_CHARGE),
            charge(payment_intent=None),
            refund("re", 1500, payment_intent=None),
            dispute("dp", 615, "lost", payment_intent=None),
        ],
        (1500, 615, "full"),
    ),
    "invoiced_twice": (
        [
            subscribed(),
            invoice_payment("ia", 900, **BY_INTENT),
            invoice_payment("ib", 600, type="payment_intent", payment_intent="pi_2#"),
            charge(amount=900, amount_captured=900),
            charge(id="ch_2#", payment_intent="pi_2#", amount=600, amount_captured=600),
            refund("ra", 90),
            refund("rb", 61, charge="ch_2#", payment_intent="pi_2#"),
        ],
        (151, 0, "partial"),
    ),
    # Through the intent that it names, and not through its invoice too.
    "intent_first": (
        [
            session(invoice="in_#"),
            invoice_payment("inpay", 1500, type="payment_intent", payment_intent="pi_2#"),
            charge(),
            refund("ra", 91),
            refund("rb", 62, charge="ch_2#", payment_intent="pi_2#"),
        ],
        (91, 0, "partial"),
    ),
    # ---- with neither an intent nor a payment of an invoice nothing is known ----
    "open": ([session(status="open", payment_status="unpaid", payment_intent=None)], (None, None, None)),
    "free": ([session(0, payment_status="no_payment_required", payment_intent=None)], (None, None, None)),
    "no_payment_known": ([subscribed(), refund("re", 510), note("na", 76)], (None, None, None)),
}
# Of those that name an invoice: what was credited by its notes.
CREDITED: Mapping[str, int | None] = {
    "credited": 791,
    "note_of_another": 0,
    "invoiced": 75,
    "invoiced_untouched": 0,
    "invoiced_by_charge": 0,
    "invoiced_twice": 0,
    "intent_first": 0,
    "no_payment_known": 76,
}


def test_what_came_back_of_an_order(engine: Engine) -> None:
    """The money of each history, whichever order its events arrive in."""
    assert_money(engine, HISTORIES, CREDITED)


def assert_money(engine: Engine, histories: Histories, credited: Mapping[str, int | None]) -> None:
    """Take in *histories*, every other one backwards, and compare what the view adds to each order."""
    for number, (name, (steps, _)) in enumerate(histories.items()):
        bodies = [body.replace(b"#", name.encode()) for body in steps]
        take_in(engine, *(bodies if number % 2 else reversed(bodies)))
    found = {row["id"].removeprefix("cs_"): row for row in rows(engine, "SELECT * FROM order_book")}
    assert {name: money_of(row) for name, row in found.items()} == {
        name: money for name, (_, money) in histories.items()
    }
    assert {name: found[name]["credited_amount"] for name in credited} == credited


def money_of(row: Mapping[str, Any]) -> Money:
    """Return the columns that the view adds to every order."""
    return (row["refunded_amount"], row["disputed_amount"], row["refund_status"])
