"""What paid an invoice: every column, from every version, as literals.

The objects are those of https://docs.stripe.com/api/invoice-payment/object (since 2025-03-31.basil; the event
``invoice_payment.paid`` since 2025-05-28); before, an invoice names ``payment_intent`` and ``charge`` itself
(stripe-facts sections 6 and 11).
"""

from typing import Any

import pytest
from sqlalchemy import Engine

from tests.ledger import anomalies, take_in
from tests.literals import assert_rows, at
from tests.stripe_events import event

T = 1_700_000_000
OBSERVED = "payfold.invoice_payment.observed"

# Each value stands once, so that none can be read from another's place.
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


def test_the_later_word(engine: Engine) -> None:
    """A payment has no ranks (design rule 3): what was seen later is so, and what arrives late is not."""
    take_in(
        engine,
        event("obs_2", OBSERVED, T + 9, CANCELED, version=None),
        event("obs_1", OBSERVED, T + 5, OPEN, version=None),
    )

    row = {**UNPAID_ROW, "status": "canceled", "event_id": "obs_2", "as_of": at(T + 9)}
    assert_rows(engine, {"invoice_payments": [row]})
