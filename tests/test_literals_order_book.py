"""The money returned from an order: the four columns that the view `order_book` adds, each by a small history.

The sums are arithmetic by hand. Stripe's terms are defined in docs.stripe.com/api/refunds/object, /charges/object,
/disputes/object, /credit_notes/object and /invoice-payment/object; stripe-facts, sections 2.5, 2.8 and 11. In a history
`#` stands for its name, so that no two share an object.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.envelopes import Json, event
from tests.ledger import kinds, rows, take_in

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
    """Return the event of *at* about charge ch_#, captured whole unless *fields* override it."""
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
    id_: str,
    amount: int,
    status: str | None = "succeeded",
    *,
    at: int = LATER,
    livemode: bool = False,
    **fields: object,
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


def failed_in_euro(id_: str, amount: int, *, made: int, at: int) -> bytes:
    """Return a refund in euro that was made at *made* and failed at *at*."""
    return failed(id_, amount, made=made, at=at).replace(b'"usd"', b'"eur"')


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
    # `status` may be null (docs.stripe.com/api/refunds/object#refund_object-status): such a refund has not failed.
    "without_status": ([session(), charge(), refund("re", 506, None)], (506, 0, "partial")),
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
    # A declined charge took no money, whether or not it reports capture.
    "declined_first": (
        [session(), charge(id="ch_#_1", status="failed"), charge(), refund("re", 1500)],
        (1500, 0, "full"),
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
    # Of two payments one is refunded: the order is neither untouched nor refunded in full.
    "invoiced_twice_one_back": (
        [
            subscribed(),
            invoice_payment("ia", 900, **BY_INTENT),
            invoice_payment("ib", 600, type="payment_intent", payment_intent="pi_2#"),
            charge(LATEST, amount=900, amount_captured=900, amount_refunded=900, refunded=True),
            charge(id="ch_2#", payment_intent="pi_2#", amount=600, amount_captured=600),
            refund("ra", 900, charge=None),
        ],
        (900, 0, "partial"),
    ),
    # The refund is of a charge that no event has reported: it is compared with the money of all charges.
    "invoiced_twice_one_unknown": (
        [
            subscribed(),
            invoice_payment("ia", 900, **BY_INTENT),
            invoice_payment("ib", 600, type="payment_intent", payment_intent="pi_2#"),
            charge(amount=900, amount_captured=900),
            charge(id="ch_2#", payment_intent="pi_2#", amount=600, amount_captured=600),
            refund("ra", 1000, charge="ch_3#"),
        ],
        (1000, 0, "partial"),
    ),
    "invoiced_by_unknown_charge": (
        [
            subscribed(),
            invoice_payment("inpay", 1500, **BY_CHARGE),
            refund("re", 96, payment_intent=None),
            dispute("dp", 617, "lost", payment_intent=None),
        ],
        (96, 617, "partial"),
    ),
    # Counted through the intent that it names, and not again through its invoice.
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
    "intent_alone": (
        [
            session(invoice="in_#"),
            invoice_payment("inpay", 1500, type="charge", charge="ch_2#"),
            charge(),
            charge(id="ch_2#", payment_intent="pi_2#", invoice="in_#"),
            refund("ra", 92),
            refund("rb", 63, charge=None, payment_intent="pi_2#"),
            refund("rc", 64, charge="ch_2#", payment_intent=None),
        ],
        (92, 0, "partial"),
    ),
    # A refund by bank transfer names no charge: its intent is that of the charge that paid the invoice.
    "invoiced_by_charge_of_intent": (
        [subscribed(), invoice_payment("inpay", 1500, **BY_CHARGE), charge(), refund("re", 93, charge=None)],
        (93, 0, "partial"),
    ),
    # Before basil a charge names its invoice.
    "named_by_charge": ([subscribed(), charge(invoice="in_#"), refund("re", 94, charge=None)], (94, 0, "partial")),
    "named_by_charge_alone": (
        [
            subscribed(),
            charge(invoice="in_#", payment_intent=None),
            refund("re", 95, payment_intent=None),
            dispute("dp", 616, "lost", payment_intent=None),
        ],
        (95, 616, "partial"),
    ),
    # ---- with neither an intent nor a payment of an invoice the amounts are unknown ----
    "open": ([session(status="open", payment_status="unpaid", payment_intent=None)], (None, None, None)),
    "free": ([session(0, payment_status="no_payment_required", payment_intent=None)], (None, None, None)),
    "no_payment_known": ([subscribed(), refund("re", 510), note("na", 76)], (None, None, None)),
}
# The amount credited by the notes of the order's invoice; unknown for an order without an invoice.
CREDITED: Mapping[str, int | None] = {
    "untouched": None,
    "free": None,
    "credited": 791,
    "note_of_another": 0,
    "invoiced": 75,
    "invoiced_untouched": 0,
    "invoiced_by_charge": 0,
    "invoiced_twice": 0,
    "invoiced_twice_one_back": 0,
    "invoiced_twice_one_unknown": 0,
    "invoiced_by_unknown_charge": 0,
    "intent_first": 0,
    "intent_alone": 0,
    "invoiced_by_charge_of_intent": 0,
    "named_by_charge": 0,
    "named_by_charge_alone": 0,
    "no_payment_known": 76,
}


def test_the_money_returned_from_an_order(engine: Engine) -> None:
    """Each history gives its money, whichever order its events arrive in."""
    assert_money(engine, HISTORIES, CREDITED)


def assert_money(engine: Engine, histories: Histories, credited: Mapping[str, int | None]) -> None:
    """Take in *histories*, every other one backwards, and compare the columns that the view adds to each order."""
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


def test_a_change_for_each_refund_that_counts(engine: Engine) -> None:
    """The feed has one change for each new sum, also for a lower one, and none for an equal one."""
    steps = [
        session(),
        charge(),
        refund("ra", 101, "pending"),
        refund("rb", 202),
        refund("rc", 303, "canceled"),
        failed("ra", 101, made=LATER, at=LATEST),
    ]
    take_in(engine, *(body.replace(b"#", b"1") for body in steps))
    take_in(engine, *(body.replace(b"#", b"2") for body in (steps[3], steps[1], steps[0])))

    assert kinds(engine, "cs_1") == ["order.paid", *["order.refund_changed"] * 3]
    assert kinds(engine, "cs_2") == ["order.paid", "order.refund_changed"]


# ---- Rule 10: inquiries, other currencies, refunds that only the charge reports, holds ----

RULE_10: Histories = {
    # ---- an inquiry is no dispute: no money has moved (stripe-facts, section 11) ----
    "asked": ([session(), charge(), dispute("dp", 608, "warning_needs_response")], (0, 0, "none")),
    "answered": ([session(), charge(), dispute("dp", 609, "warning_under_review")], (0, 0, "none")),
    "settled": ([session(), charge(), dispute("dp", 610, "warning_closed")], (0, 0, "none")),
    # ---- an amount in another currency is unknown in the order's ----
    "dispute_in_euro": (
        [session(), charge(), dispute("da", 616, "lost"), dispute("db", 617, "lost", currency="eur")],
        (0, None, "none"),
    ),
    "won_in_euro": ([session(), charge(), dispute("dp", 618, "won", currency="eur")], (0, 0, "none")),
    "note_in_euro": (
        [session(invoice="in_#"), charge(), note("na", 77), note("nb", 78, currency="eur")],
        (0, 0, "none"),
    ),
    "void_in_euro": (
        [session(invoice="in_#"), charge(), note("na", 79, "void", currency="eur")],
        (0, 0, "none"),
    ),
    "refund_in_euro": (
        [session(), charge(currency="eur"), refund("ra", 511, currency="eur")],
        (None, 0, "partial"),
    ),
    "whole_in_euro": (
        [session(), charge(currency="eur"), refund("ra", 1500, currency="eur")],
        (None, 0, "full"),
    ),
    "failed_in_euro": (
        [session(), charge(), refund("ra", 512, "canceled", currency="eur")],
        (0, 0, "none"),
    ),
    "untouched_in_euro": ([session(), charge(currency="eur")], (0, 0, "none")),
    "no_currency": (
        [session(None, currency=None), charge(), refund("ra", 513)],
        (None, 0, "partial"),
    ),
    # ---- refunds that only a charge reports ----
    "unseen": ([session(), charge(LATER, "charge.refunded", amount_refunded=514)], (514, 0, "partial")),
    "unseen_whole": ([session(), charge(LATER, "charge.refunded", **ALL_OF_IT)], (1500, 0, "full")),
    "unseen_rest": (
        [session(), charge(LATER, "charge.refunded", **ALL_OF_IT), refund("ra", 515)],
        (1500, 0, "full"),
    ),
    "seen": (
        [session(), charge(LATER, "charge.refunded", amount_refunded=516), refund("ra", 516)],
        (516, 0, "partial"),
    ),
    # The charge's last event does not include a refund made after it.
    "newer_refund": (
        [
            session(),
            charge(LATER, "charge.refunded", amount_refunded=517),
            refund("ra", 400),
            refund("rb", 201, at=LATEST),
        ],
        (718, 0, "partial"),
    ),
    # It includes a refund that failed after it, and not one that failed before.
    "failed_after": (
        [
            session(),
            charge(LATER, "charge.refunded", amount_refunded=518),
            failed("ra", 518, made=LATER, at=LATEST),
        ],
        (0, 0, "none"),
    ),
    "failed_before": (
        [
            session(),
            charge(LATEST, "charge.refunded", amount_refunded=202),
            failed("ra", 519, made=PAID + 5, at=LATER),
        ],
        (202, 0, "partial"),
    ),
    # More refunds known than the charge reports: nothing is unseen.
    "behind": (
        [session(), charge(LATER, "charge.refunded", amount_refunded=203), refund("ra", 203), refund("rb", 304)],
        (507, 0, "partial"),
    ),
    "unseen_of_two": (
        [
            session(),
            charge(LATER, "charge.refunded", amount=900, amount_captured=900, amount_refunded=204),
            charge(LATER, id="ch_2#", amount=600, amount_captured=600, amount_refunded=600, refunded=True),
        ],
        (804, 0, "partial"),
    ),
    # Captured in part, and 300 is neither 0 nor 0 and the released 200: the second charge's refunds are unknown.
    "unclear_of_two": (
        [
            subscribed(),
            invoice_payment("ia", 900, **BY_INTENT),
            invoice_payment("ib", 400, type="payment_intent", payment_intent="pi_2#"),
            charge(amount=900, amount_captured=900),
            charge(LATER, id="ch_2#", payment_intent="pi_2#", amount=600, amount_captured=400, amount_refunded=300),
        ],
        (None, 0, None),
    ),
    "unseen_of_invoice": (
        [
            subscribed(),
            invoice_payment("inpay", 1500, **BY_INTENT),
            charge(LATER, "charge.refunded", amount_refunded=520),
        ],
        (520, 0, "partial"),
    ),
    "unseen_by_charge": (
        [
            subscribed(),
            invoice_payment("inpay", 1500, **BY_CHARGE),
            charge(LATER, "charge.refunded", payment_intent=None, amount_refunded=521),
        ],
        (521, 0, "partial"),
    ),
    "unseen_in_euro": (
        [session(), charge(LATER, "charge.refunded", currency="eur", amount_refunded=522)],
        (None, 0, "partial"),
    ),
    "unseen_in_no_currency": (
        [session(None, currency=None), charge(LATER, "charge.refunded", **ALL_OF_IT)],
        (None, 0, "full"),
    ),
    # ---- the release of uncaptured money is no refund ----
    "released_refund": (
        [
            session(payment_status="unpaid"),
            charge(captured=False, amount_captured=0),
            refund("re", 1500, reason="expired_uncaptured_charge"),
        ],
        (0, 0, "none"),
    ),
    "reported_by_a_held_charge": (
        [
            session(payment_status="unpaid"),
            charge(captured=False, amount_captured=0),
            charge(LATER, "charge.refunded", captured=False, amount_captured=0, **ALL_OF_IT),
        ],
        (0, 0, "none"),
    ),
    "released": (
        [
            session(payment_status="unpaid"),
            charge(LATER, "charge.expired", captured=False, amount_captured=0, **ALL_OF_IT),
        ],
        (0, 0, "none"),
    ),
    # Captured in part: it is unknown whether `amount_refunded` contains the 500 that were released.
    "captured_part": ([session(), charge(LATER, "charge.captured", amount_captured=1000)], (0, 0, "none")),
    "part_released": (
        [session(), charge(LATER, "charge.captured", amount_captured=1000, amount_refunded=500)],
        (0, 0, "none"),
    ),
    "part_refunded": (
        [session(), charge(LATER, "charge.refunded", amount_captured=1000, amount_refunded=301), refund("ra", 301)],
        (301, 0, "partial"),
    ),
    "part_both": (
        [session(), charge(LATER, "charge.refunded", amount_captured=1000, amount_refunded=802), refund("ra", 302)],
        (302, 0, "partial"),
    ),
    "part_whole": (
        [session(), charge(LATER, "charge.refunded", amount_captured=1000, **ALL_OF_IT), refund("ra", 1000)],
        (1000, 0, "full"),
    ),
    "part_refunded_whole": (
        [session(), charge(LATER, "charge.captured", amount_captured=1000), refund("ra", 1000, at=LATEST)],
        (1000, 0, "full"),
    ),
    # ---- before basil, where the invoice and the charge name each other ----
    "before_basil": (
        [
            subscribed(),
            event(
                "evt_#_in",
                "invoice.paid",
                PAID,
                {
                    "id": "in_#",
                    "object": "invoice",
                    "amount_due": 1500,
                    "amount_paid": 1500,
                    "amount_remaining": 0,
                    "charge": "ch_#",
                    "created": PAID - 9,
                    "currency": "usd",
                    "customer": "cus_#",
                    "paid": True,
                    "payment_intent": "pi_#",
                    "status": "paid",
                    "status_transitions": {"finalized_at": PAID - 8, "paid_at": PAID},
                    "subscription": "sub_#",
                    "total": 1500,
                },
                version="2022-11-15",
            ),
            charge(invoice="in_#"),
            refund("re", 523),
            dispute("dp", 619, "lost"),
        ],
        (523, 619, "partial"),
    ),
}
CREDITED_BY_RULE_10: Mapping[str, int | None] = {
    "note_in_euro": None,
    "void_in_euro": 0,
    "unclear_of_two": 0,
    "unseen_of_invoice": 0,
    "unseen_by_charge": 0,
    "before_basil": 0,
}


def test_the_money_returned_by_rule_10(engine: Engine) -> None:
    """Refunds that a charge reports count once, and an amount unknown in the order's currency is null."""
    assert_money(engine, RULE_10, CREDITED_BY_RULE_10)


def test_an_unknown_sum(engine: Engine) -> None:
    """A charge captured in part gives null if it reports neither the known refunds nor these and the released rest."""
    bodies = [session(), charge(LATER, "charge.refunded", amount_captured=1000, amount_refunded=700)]
    take_in(engine, *(body.replace(b"#", b"part") for body in bodies))

    assert [row["refunded_amount"] for row in rows(engine, "SELECT refunded_amount FROM order_book")] == [None]


def test_a_change_for_each_refunded_sum(engine: Engine) -> None:
    """The feed has one change for each new sum, by a refund or a charge, and one when the sum becomes null."""
    reported = [session(), charge(), charge(LATER, "charge.refunded", amount_refunded=524)]
    euro = refund("rb", 401, at=LATEST, currency="eur")
    for name, steps in (("twice", [*reported, refund("ra", 524)]), ("null", [*reported, euro])):
        take_in(engine, *(body.replace(b"#", name.encode()) for body in steps))

    assert kinds(engine, "cs_twice") == ["order.paid", "order.refund_changed"]
    assert kinds(engine, "cs_null") == ["order.paid", "order.refund_changed", "order.refund_changed"]


# ---- Each condition of the view by itself ----

MOST = 9_223_372_036_854_775_807
"""The greatest amount that a column holds."""
UNSTATED: Json = {"amount_captured": None}
RELEASED: Json = {"captured": False, "amount_captured": 0, **ALL_OF_IT}


def reading(at: int = LATER, **fields: object) -> bytes:
    """Return a charge that we read ourselves, dated up to 5 seconds before the state that was seen."""
    body = charge(at, "payfold.charge.observed", **fields)
    return body.replace(b'"evt_ch_', b'"obs_ch_')


CLOSELY: Histories = {
    # ---- what a reading has seen: 100 were known, and what was made within 5 seconds after it may be in it ----
    "late": (
        [session(), reading(amount_refunded=300), refund("ra", 100, at=PAID + 5), refund("rb", 200, at=LATER + 5)],
        (300, 0, "partial"),
    ),
    "late_alone": ([session(), reading(amount_refunded=100), refund("ra", 100, at=LATER + 3)], (100, 0, "partial")),
    "too_late": ([session(), reading(amount_refunded=100), refund("ra", 100, at=LATER + 6)], (200, 0, "partial")),
    "late_after_an_event": (
        [session(), charge(LATER, "charge.refunded", amount_refunded=100), refund("ra", 100, at=LATER + 3)],
        (200, 0, "partial"),
    ),
    "the_first_of_two_late": (
        [
            session(),
            reading(amount_refunded=300),
            refund("ra", 100, at=PAID + 5),
            refund("rb", 200, at=LATER + 2),
            refund("rc", 50, at=LATER + 4),
        ],
        (350, 0, "partial"),
    ),
    "both_of_two_late": (
        [
            session(),
            reading(amount_refunded=300),
            refund("ra", 100, at=PAID + 5),
            refund("rb", 150, at=LATER + 2),
            refund("rc", 50, at=LATER + 4),
        ],
        (300, 0, "partial"),
    ),
    "late_and_something_else": (
        [session(), reading(amount_refunded=250), refund("ra", 100, at=PAID + 5), refund("rb", 200, at=LATER + 2)],
        (None, 0, None),
    ),
    "late_and_more_known": (
        [session(), reading(amount_refunded=250), refund("ra", 300, at=PAID + 5), refund("rb", 200, at=LATER + 2)],
        (500, 0, "partial"),
    ),
    # Made in the second of the reading it is known, and not late: 200 of 400 are unseen.
    "in_time": (
        [session(), reading(amount_refunded=400), refund("ra", 100, at=PAID + 5), refund("rb", 100, at=LATER)],
        (400, 0, "partial"),
    ),
    # Captured in part: 800 may contain the 500 that were released.
    "late_with_the_rest": (
        [
            session(),
            reading(amount_captured=1000, amount_refunded=800),
            refund("ra", 100, at=PAID + 5),
            refund("rb", 200, at=LATER + 2),
        ],
        (300, 0, "partial"),
    ),
    "late_without_the_rest": (
        [
            session(),
            reading(amount_captured=1000, amount_refunded=300),
            refund("ra", 100, at=PAID + 5),
            refund("rb", 200, at=LATER + 2),
        ],
        (300, 0, "partial"),
    ),
    # ---- what a charge reports ----
    "known_of_two": (
        [
            session(),
            charge(LATEST, "charge.refunded", amount_refunded=300),
            refund("ra", 100),
            refund("rb", 200),
        ],
        (300, 0, "partial"),
    ),
    "a_cent_unseen": ([session(), charge(LATER, "charge.refunded", amount_refunded=1)], (1, 0, "partial")),
    "not_reported": ([session(), charge(amount_refunded=None)], (None, 0, None)),
    "reported_as_refunded_and_0": ([session(), charge(**UNSTATED, refunded=True)], (0, 0, "none")),
    # Of 1500 that were refunded 500 came back to the shop after the report.
    "lessened": (
        [
            session(),
            charge(LATER, "charge.refunded", **UNSTATED, **ALL_OF_IT),
            refund("ra", 1000, at=PAID + 5),
            failed("rb", 500, made=PAID + 6, at=LATEST),
        ],
        (1000, 0, "partial"),
    ),
    "of_no_known_amount": (
        [session(), charge(LATEST, amount=None, **UNSTATED, amount_refunded=300), refund("ra", 300)],
        (300, 0, None),
    ),
    "a_cent_of_no_known_amount": (
        [session(), charge(LATEST, amount=None, **UNSTATED, amount_refunded=1), refund("ra", 1)],
        (1, 0, None),
    ),
    "a_cent": (
        [session(1), charge(amount=1, amount_captured=1), refund("ra", 1)],
        (1, 0, "full"),
    ),
    "a_cent_of_an_unknown_charge": ([session(), charge(), refund("ra", 1, charge="ch_3#")], (1, 0, "partial")),
    # ---- other currencies ----
    "in_two_currencies": (
        [session(), charge(), refund("ra", 100), refund("rb", 200, currency="eur")],
        (None, 0, None),
    ),
    "a_cent_in_euro": ([session(), charge(), refund("ra", 1, currency="eur")], (None, 0, None)),
    "nothing_in_euro": ([session(), charge(), refund("ra", 0, currency="eur")], (0, 0, "none")),
    "disputed_a_cent_in_euro": ([session(), charge(), dispute("dp", 1, "lost", currency="eur")], (0, None, "none")),
    "credited_a_cent_in_euro": ([session(invoice="in_#"), charge(), note("na", 1, currency="eur")], (0, 0, "none")),
    # Known in euro by the report, and failed since: what the report of 300 contains is not known, 0 contains nothing.
    "failed_in_euro_after": (
        [
            session(),
            charge(LATER, "charge.refunded", amount_refunded=300),
            refund("ra", 100, at=PAID + 5),
            failed_in_euro("rb", 200, made=PAID + 6, at=LATEST),
        ],
        (None, 0, None),
    ),
    "failed_in_euro_after_0": (
        [session(), charge(LATER), failed_in_euro("rb", 200, made=PAID + 6, at=LATEST)],
        (0, 0, "none"),
    ),
    # ---- which charge gave back ----
    "released_and_refunded": (
        [session(payment_status="unpaid"), charge(LATER, "charge.expired", **RELEASED), refund("ra", 1500)],
        (0, 0, "none"),
    ),
    "held_and_refunded": (
        [session(payment_status="unpaid"), charge(captured=False, amount_captured=0), refund("ra", 400)],
        (400, 0, "partial"),
    ),
    "by_the_captured_one": (
        [
            session(),
            charge(PAID, "charge.expired", id="ch_#_1", **RELEASED),
            charge(),
            refund("ra", 500, charge=None),
        ],
        (500, 0, "partial"),
    ),
    "of_the_captured_one": (
        [session(), charge(PAID, "charge.expired", id="ch_#_1", **RELEASED), charge(), refund("ra", 501)],
        (501, 0, "partial"),
    ),
    "of_the_released_one": (
        [
            session(),
            charge(PAID, "charge.expired", id="ch_#_1", **RELEASED),
            charge(),
            refund("ra", 502, charge="ch_#_1"),
        ],
        (0, 0, "none"),
    ),
    "neither_captured_nor_not": (
        [session(), charge(captured=None, status=None, **UNSTATED, amount_refunded=300)],
        (None, 0, None),
    ),
    "pending": ([session(), charge(status="pending", amount_refunded=300)], (0, 0, "none")),
    # A bank debit that was captured and fell through: its own amount counts, and not the order's.
    "captured_and_failed": (
        [
            session(),
            charge(amount=1000, amount_captured=1000),
            charge(LATER, "charge.failed", amount=1000, amount_captured=1000, status="failed"),
            refund("ra", 1000),
        ],
        (1000, 0, "full"),
    ),
    "no_charge_known": ([session(amount_subtotal=2000), refund("ra", 1500)], (1500, 0, "full")),
    # ---- as much as a column holds, and more ----
    "most": ([session(), charge(), refund("ra", MOST)], (MOST, 0, "full")),
    "more_than_most": ([session(), charge(), refund("ra", MOST), refund("rb", 1)], (None, 0, "full")),
    "most_disputed": ([session(), charge(), dispute("dp", MOST, "lost")], (0, MOST, "none")),
    "most_credited": ([session(invoice="in_#"), charge(), note("na", MOST)], (0, 0, "none")),
    "more_than_most_credited": (
        [session(invoice="in_#"), charge(), note("na", MOST), note("nb", MOST)],
        (0, 0, "none"),
    ),
}
CREDITED_CLOSELY: Mapping[str, int | None] = {
    "credited_a_cent_in_euro": None,
    "most_credited": MOST,
    "more_than_most_credited": None,
    "late": None,
}


def test_each_condition_of_the_book(engine: Engine) -> None:
    """What a charge has seen, what it gave back, in which currency, and how much a column holds."""
    assert_money(engine, CLOSELY, CREDITED_CLOSELY)


# ---- What has the same ids in another world ----


def elsewhere(body: bytes) -> bytes:
    """Mark *body* as of another world, which the test chooses."""
    return body + b"elsewhere"


OTHER_INTENT: Json = {"payment_intent": "pi_2#"}
# An order that would have money behind it if it took what another world has for its own.
WORLDS: Histories = {
    "disputed_elsewhere": ([session(), charge(), elsewhere(dispute("dp", 621, "lost"))], (0, 0, "none")),
    "refunded_elsewhere": ([session(), charge(), elsewhere(refund("re", 524))], (0, 0, "none")),
    "charged_elsewhere": (
        [
            subscribed(),
            invoice_payment("inpay", 1500, **BY_CHARGE),
            elsewhere(charge(**OTHER_INTENT)),
            refund("re", 525, charge=None, **OTHER_INTENT),
        ],
        (0, 0, "none"),
    ),
    "paid_elsewhere": (
        [
            subscribed(),
            elsewhere(invoice_payment("inpay", 1500, **BY_CHARGE)),
            elsewhere(charge(**OTHER_INTENT)),
            refund("re", 526, charge=None, **OTHER_INTENT),
        ],
        (None, None, None),
    ),
    "invoiced_elsewhere": (
        [
            subscribed(),
            elsewhere(charge(invoice="in_#", **OTHER_INTENT)),
            refund("re", 527, charge=None, **OTHER_INTENT),
        ],
        (None, None, None),
    ),
    "credited_elsewhere": ([session(invoice="in_#"), charge(), elsewhere(note("na", 79))], (0, 0, "none")),
}


@pytest.mark.parametrize("world", [{"livemode": True}, {"account": "acct_2"}])
def test_another_world(engine: Engine, world: dict[str, object]) -> None:
    """Nothing of another mode or account counts, with the same ids too."""

    def placed(body: bytes) -> bytes:
        own = body.removesuffix(b"elsewhere")
        return own if own == body else json.dumps(json.loads(own) | world).encode()

    placed_all = {name: ([placed(body) for body in bodies], money) for name, (bodies, money) in WORLDS.items()}
    assert_money(engine, placed_all, {"credited_elsewhere": 0, "disputed_elsewhere": None})
