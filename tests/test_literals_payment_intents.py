"""A canceled payment intent's row, by docs.stripe.com/api/payment_intents/object; no other event of it is kept."""

import pytest
from sqlalchemy import Engine

from tests import ledger
from tests.literals import assert_rows, at
from tests.stripe_payments import T, event

CANCELED = {
    "id": "pi_1",
    "object": "payment_intent",
    "amount": 3001,
    "amount_capturable": 0,
    "amount_received": 0,
    # "Populated when `status` is `canceled`, this is the time at which the PaymentIntent was canceled."
    "canceled_at": T + 70,
    "cancellation_reason": "requested_by_customer",
    "capture_method": "manual",
    "client_secret": "pi_1_secret_1",
    "created": T + 5,
    "currency": "usd",
    "customer": "cus_1",
    "latest_charge": "ch_1",
    "livemode": False,
    "metadata": {},
    "next_action": None,
    "status": "canceled",
}
ROW = {
    "id": "pi_1",
    "status": "canceled",
    "canceled_at": at(T + 70),
    "event_id": "evt_canceled",
    "as_of": at(T + 71),
}


@pytest.mark.parametrize("version", ["2026-10-28.endive", "2019-05-16"])
def test_every_column(engine: Engine, version: str) -> None:
    """The row of a canceled intent has its status and the time at which it was canceled, in every version."""
    ledger.take_in(engine, event("evt_canceled", "payment_intent.canceled", 71, CANCELED, version=version))

    assert_rows(engine, {"payment_intents": [ROW]})
    assert (ledger.rows(engine, "SELECT kind FROM changes"), ledger.anomalies(engine)) == ([], [])


@pytest.mark.parametrize(
    ("type_", "status"),
    [
        ("payment_intent.created", "requires_payment_method"),
        ("payment_intent.processing", "processing"),
        ("payment_intent.requires_action", "requires_action"),
        ("payment_intent.amount_capturable_updated", "requires_capture"),
        ("payment_intent.partially_funded", "requires_action"),
        ("payment_intent.succeeded", "succeeded"),
        ("payment_intent.payment_failed", "requires_payment_method"),
    ],
)
def test_only_the_cancellation_is_kept(engine: Engine, type_: str, status: str) -> None:
    """The other events of an intent (docs.stripe.com/api/events/types) make no row, and change none."""
    other = event("evt_other", type_, 72, {**CANCELED, "status": status, "canceled_at": None})

    ledger.take_in(engine, other)

    assert_rows(engine, {})
    (outcome,) = ledger.rows(engine, "SELECT state, cause FROM events WHERE id = 'evt_other'")
    assert outcome == {"state": "ignored", "cause": "type_unwanted"}
