"""Payments of invoices: every column, from every version, as literals.

The objects are those of https://docs.stripe.com/api/invoice-payment/object (since 2025-03-31.basil; the event
``invoice_payment.paid`` since 2025-05-28); before, an invoice names ``payment_intent`` and ``charge`` itself
(stripe-facts sections 6 and 11).
"""

from typing import Any

import pytest
from sqlalchemy import Engine

from tests.envelopes import event
from tests.ledger import anomalies, rows, take_in
from tests.literals import assert_rows, at

T = 1_700_000_000
OBSERVED = "payfold.invoice_payment.observed"

# Each value occurs once, so that no column can hold another's by chance.
FULL: dict[str, Any] = {
    "id": "inpay_1",
    "object": "invoice_payment",
    "amount_paid": 6001,
    "amount_requested": 6002,
    "created": T + 1,
    "currency": "eur",
    "invoice": "in_1",
    "is_default": True,
    "livemode": False,
    "payment": {"type": "payment_intent", "payment_intent": "pi_1"},
    "status": "paid",
    "status_transitions": {"canceled_at": None, "paid_at": T + 2},
}
ROW: dict[str, Any] = {
    "id": "inpay_1",
    "invoice": "in_1",
    "payment_intent": "pi_1",
    "charge": None,
    "status": "paid",
    "currency": "eur",
    "amount_paid": 6001,
    "paid_at": at(T + 2),
}
EXPANDED: dict[str, Any] = {
    **FULL,
    "invoice": {"id": "in_1", "object": "invoice", "amount_paid": 6003, "currency": "usd"},
    "payment": {
        "type": "payment_intent",
        "payment_intent": {"id": "pi_1", "object": "payment_intent", "amount": 6004, "latest_charge": "ch_latest"},
    },
}
BY_CHARGE = {**FULL, "payment": {"type": "charge", "charge": "ch_1"}}
BY_RECORD = {**FULL, "payment": {"type": "payment_record", "payment_record": "prec_1"}}
UNPAID = {**FULL, "amount_paid": None, "is_default": False}
OPEN = {**UNPAID, "status": "open", "status_transitions": {"canceled_at": None, "paid_at": None}}
CANCELED = {**UNPAID, "status": "canceled", "status_transitions": {"canceled_at": T + 3, "paid_at": None}}
UNPAID_ROW = {**ROW, "amount_paid": None, "paid_at": None}


@pytest.mark.parametrize(
    ("kind", "about", "row"),
    [
        pytest.param("invoice_payment.paid", FULL, ROW, id="by payment intent"),
        pytest.param(OBSERVED, EXPANDED, ROW, id="expanded"),
        pytest.param(
            "invoice_payment.paid", BY_CHARGE, {**ROW, "payment_intent": None, "charge": "ch_1"}, id="by charge"
        ),
        pytest.param(
            "invoice_payment.paid", BY_RECORD, {**ROW, "payment_intent": None, "charge": None}, id="by payment record"
        ),
        pytest.param(OBSERVED, OPEN, {**UNPAID_ROW, "status": "open"}, id="open"),
        pytest.param(OBSERVED, CANCELED, {**UNPAID_ROW, "status": "canceled"}, id="canceled"),
    ],
)
def test_columns(engine: Engine, kind: str, about: dict[str, Any], row: dict[str, Any]) -> None:
    """Each field has its column; whether a payment intent or a charge paid depends on ``payment.type``."""
    version = None if kind == OBSERVED else "2026-10-28.endive"
    take_in(engine, event("evt_1", kind, T + 9, about, version=version))

    assert_rows(engine, {"invoice_payments": [{**row, "event_id": "evt_1", "as_of": at(T + 9)}]})
    assert anomalies(engine) == []


def test_several_payments_of_one_invoice(engine: Engine) -> None:
    """Since basil an invoice may be paid in parts (https://docs.stripe.com/changelog/basil/2025-03-31)."""
    second = {**FULL, "id": "inpay_2", "amount_paid": 6005, "payment": {"type": "charge", "charge": "ch_2"}}
    take_in(
        engine,
        event("evt_1", "invoice_payment.paid", T + 5, FULL),
        event("evt_2", "invoice_payment.paid", T + 9, second),
    )

    of_second = {"id": "inpay_2", "amount_paid": 6005, "payment_intent": None, "charge": "ch_2"}
    assert_rows(
        engine,
        {
            "invoice_payments": [
                {**ROW, "event_id": "evt_1", "as_of": at(T + 5)},
                {**ROW, **of_second, "event_id": "evt_2", "as_of": at(T + 9)},
            ]
        },
    )


def test_the_later_event_decides(engine: Engine) -> None:
    """A payment has no ranks (design rule 3): the event created later decides, not the one that arrives later."""
    take_in(
        engine,
        event("obs_2", OBSERVED, T + 9, CANCELED, version=None),
        event("obs_1", OBSERVED, T + 5, OPEN, version=None),
    )

    row = {**UNPAID_ROW, "status": "canceled", "event_id": "obs_2", "as_of": at(T + 9)}
    assert_rows(engine, {"invoice_payments": [row]})


# ---- Before basil ----

OLD_INVOICE: dict[str, Any] = {
    "id": "in_1",
    "object": "invoice",
    "amount_due": 6101,
    "amount_paid": 6102,
    "amount_remaining": 6103,
    "charge": "ch_1",
    "created": T + 1,
    "currency": "eur",
    "customer": "cus_1",
    "ending_balance": 6104,
    "number": "NUMBER-1",
    "paid": True,
    "payment_intent": "pi_1",
    "post_payment_credit_notes_amount": 6105,
    "pre_payment_credit_notes_amount": 6106,
    "starting_balance": 6107,
    "status": "paid",
    "status_transitions": {
        "finalized_at": T + 2,
        "marked_uncollectible_at": None,
        "paid_at": T + 3,
        "voided_at": None,
    },
    "subscription": "sub_1",
    "total": 6108,
}
OLD_INVOICE_ROW: dict[str, Any] = {
    "id": "in_1",
    "number": "NUMBER-1",
    "status": "paid",
    "currency": "eur",
    "total": 6108,
    "amount_due": 6101,
    "amount_paid": 6102,
    "amount_remaining": 6103,
    "amount_overpaid": None,
    "starting_balance": 6107,
    "ending_balance": 6104,
    "pre_payment_credit_notes_amount": 6106,
    "post_payment_credit_notes_amount": 6105,
    "customer": "cus_1",
    "subscription": "sub_1",
    "deleted": False,
    "created": at(T + 1),
    "finalized_at": at(T + 2),
    "paid_at": at(T + 3),
    "voided_at": None,
}


def _id_of_the_only_payment(engine: Engine) -> str:
    """Return the id that Payfold gives the payment: Stripe has none for it, so no document names one."""
    [payment] = rows(engine, "SELECT id FROM invoice_payments")
    return str(payment["id"])


@pytest.mark.parametrize(
    ("kind", "version", "intent", "charge"),
    [
        ("invoice.paid", "2025-02-24.acacia", "pi_1", "ch_1"),
        # Before 2019 there was no payment intent, and ``invoice.paid`` was ``invoice.payment_succeeded``.
        ("invoice.payment_succeeded", "2018-11-08", None, "ch_1"),
    ],
)
def test_payment_of_an_old_invoice(
    engine: Engine, kind: str, version: str, intent: str | None, charge: str | None
) -> None:
    """Before basil a paid invoice is its own payment: intent or charge, amount and time are the invoice's."""
    about = {**OLD_INVOICE, "payment_intent": intent, "charge": charge}
    take_in(engine, event("evt_1", kind, T + 9, about, version=version))

    seen = {"event_id": "evt_1", "as_of": at(T + 9)}
    payment = {
        "id": _id_of_the_only_payment(engine),
        "invoice": "in_1",
        "payment_intent": intent,
        "charge": charge,
        "status": "paid",
        "currency": "eur",
        "amount_paid": 6102,
        "paid_at": at(T + 3),
    }
    assert_rows(engine, {"invoices": [{**OLD_INVOICE_ROW, **seen}], "invoice_payments": [{**payment, **seen}]})


@pytest.mark.parametrize(
    ("version", "intent"), [("2025-02-24.acacia", {"payment_intent": None}), ("2018-11-08", {})], ids=["2025", "2018"]
)
def test_old_invoice_without_a_payment(engine: Engine, version: str, intent: dict[str, None]) -> None:
    """An invoice that the balance paid, or a payment outside of Stripe, names neither and has no payment."""
    about = {key: value for key, value in OLD_INVOICE.items() if key != "payment_intent"}
    about = {**about, "charge": None, **intent}
    take_in(engine, event("evt_1", "invoice.paid", T + 9, about, version=version))

    assert_rows(engine, {"invoices": [{**OLD_INVOICE_ROW, "event_id": "evt_1", "as_of": at(T + 9)}]})


def test_read_with_its_payment_expanded(engine: Engine) -> None:
    """An answer of the API may hold the objects where an event holds their ids."""
    about = {
        **OLD_INVOICE,
        "payment_intent": {"id": "pi_1", "object": "payment_intent", "amount_received": 6109, "status": "succeeded"},
        "charge": {"id": "ch_1", "object": "charge", "amount": 6110, "invoice": "in_other", "status": "succeeded"},
    }
    take_in(engine, event("obs_1", "payfold.invoice.observed", T + 9, about, version=None))

    [payment] = rows(engine, "SELECT invoice, payment_intent, charge, amount_paid FROM invoice_payments")
    assert payment == {"invoice": "in_1", "payment_intent": "pi_1", "charge": "ch_1", "amount_paid": 6102}


# The event's type, what the invoice carries, and the payment's status and amount: it is open, paid or canceled.
NOT_PAID_BY_IT: list[tuple[str, dict[str, Any], str | None, int | None]] = [
    # ``charge`` is the latest one, also where it failed.
    ("invoice.payment_failed", {"status": "open", "paid": False, "charge": "ch_1", "amount_paid": 0}, "open", 0),
    ("invoice.voided", {"status": "void", "paid": False, "charge": None, "amount_paid": 0}, "canceled", 0),
    # ``paid_out_of_band``: "manually marked paid", so its payment intent paid nothing.
    ("invoice.paid", {"status": "paid", "paid": True, "paid_out_of_band": True, "charge": None}, None, None),
    # It may still be paid (docs.stripe.com/invoicing/overview, statuses).
    ("invoice.marked_uncollectible", {"status": "uncollectible", "paid": False, "amount_paid": 0}, "open", 0),
]


def test_old_invoice_that_its_payment_intent_did_not_pay(engine: Engine) -> None:
    """An old invoice names its payment intent once it is finalized, which is no payment yet."""
    for number, (kind, values, *_) in enumerate(NOT_PAID_BY_IT):
        paid = OLD_INVOICE["status_transitions"] if values["paid"] else {"finalized_at": T + 2, "paid_at": None}
        about = {**OLD_INVOICE, "id": f"in_{number}", **values, "status_transitions": paid}
        take_in(engine, event(f"evt_{number}", kind, T + 9, about, version="2022-11-15"))

    found = rows(engine, "SELECT status, amount_paid, paid_at FROM invoice_payments ORDER BY invoice")
    assert [tuple(row.values()) for row in found] == [(status, amount, None) for *_, status, amount in NOT_PAID_BY_IT]


def test_invoice_of_2015_paid_by_a_charge(engine: Engine) -> None:
    """The charge of an invoice of 2015 is its payment, of an unknown amount."""
    about = {
        "id": "in_1",
        "object": "invoice",
        "amount_due": 6101,
        "attempted": True,
        "charge": "ch_1",
        "closed": True,
        "currency": "eur",
        "customer": "cus_1",
        "date": T + 1,
        "ending_balance": 6104,
        "forgiven": False,
        "paid": True,
        "starting_balance": 6107,
        "subscription": "sub_1",
        "total": 6108,
    }
    take_in(engine, event("evt_1", "invoice.payment_succeeded", T + 9, about, version="2015-10-16"))

    assert_rows_of_2015(engine, {"event_id": "evt_1", "as_of": at(T + 9)})


def assert_rows_of_2015(engine: Engine, seen: dict[str, Any]) -> None:
    """Compare the invoice and its payment: fields unknown in 2015 are null, and paid_at is the event's time."""
    unknown = dict.fromkeys(
        (
            "number",
            "amount_paid",
            "amount_remaining",
            "pre_payment_credit_notes_amount",
            "post_payment_credit_notes_amount",
            "finalized_at",
        )
    )
    payment = {
        "id": _id_of_the_only_payment(engine),
        "invoice": "in_1",
        "payment_intent": None,
        "charge": "ch_1",
        "status": "paid",
        "currency": "eur",
        "amount_paid": None,
        "paid_at": at(T + 9),
    }
    invoice = {**OLD_INVOICE_ROW, **unknown, "paid_at": at(T + 9)}
    assert_rows(engine, {"invoices": [{**invoice, **seen}], "invoice_payments": [{**payment, **seen}]})


def test_an_old_invoice_that_is_void_after_it_was_paid(engine: Engine) -> None:
    """The payment keeps its time; the anomaly (paid and void) is the invoice's."""
    about = {**OLD_INVOICE, "id": "in_v", "payment_intent": "pi_v", "charge": "ch_v"}
    void = {**about, "status": "void", "status_transitions": {"paid_at": None, "voided_at": T + 20}}
    take_in(engine, event("evt_1", "invoice.paid", T + 9, about), event("evt_2", "invoice.voided", T + 20, void))

    [payment] = rows(engine, "SELECT status, paid_at, event_id FROM invoice_payments")
    assert payment == {"status": "canceled", "paid_at": at(T + 3), "event_id": "evt_2"}
