"""A refund's row, by docs.stripe.com/api/refunds/object: every column, every status, every order.

Types of the SDK 16.1.0: status is pending, requires_action, succeeded, failed or canceled; a refund has no `livemode`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.local.services import Services
from tests import ledger
from tests.literals import assert_rows, at
from tests.stripe_payments import T, arrived_in_every_order, event, refund, suffixes

NEWEST: dict[str, Any] = {
    "id": "re_newest",
    "object": "refund",
    "amount": 1503,
    "balance_transaction": "txn_1",
    "charge": "ch_newest",
    "created": T + 30,
    "currency": "usd",
    "customer": "cus_1",
    "customer_account": "acct_4",
    "description": "Not as pictured",
    "destination_details": {"type": "card", "card": {"reference": "74", "type": "refund"}},
    "failure_balance_transaction": "txn_2",
    "failure_reason": "lost_or_stolen_card",
    "instructions_email": "buyer@example.com",
    "metadata": {"order": "7"},
    "payment_intent": "pi_newest",
    "payment_method": "pm_1",
    "pending_reason": "insufficient_funds",
    "presentment_details": {"presentment_amount": 1409, "presentment_currency": "eur"},
    "reason": "duplicate",
    "receipt_number": "1234-5678",
    "source_transfer_reversal": "trr_1",
    "status": "failed",
    "transfer_reversal": "trr_2",
}
# The refund inside the recorded charge.refunded of API 2020-03-02, as charge.refund.updated reports such a one.
OLD: dict[str, Any] = {
    "id": "re_old",
    "object": "refund",
    "amount": 2502,
    "balance_transaction": "txn_3",
    "charge": "ch_old",
    "created": T + 31,
    "currency": "cad",
    "metadata": {},
    "payment_intent": "pi_old",
    "reason": None,
    "receipt_number": None,
    "source_transfer_reversal": None,
    "status": "succeeded",
    "transfer_reversal": None,
}
ROW_SPECS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "newest": (
        event("evt_newest", "refund.failed", 50, NEWEST),
        {
            "id": "re_newest",
            "status": "failed",
            "currency": "usd",
            "amount": 1503,
            "charge": "ch_newest",
            "payment_intent": "pi_newest",
            "reason": "duplicate",
            "failure_reason": "lost_or_stolen_card",
            "created": at(T + 30),
            "failed_at": at(T + 50),
            "event_id": "evt_newest",
            "as_of": at(T + 50),
        },
    ),
    "of_2020": (
        event("evt_old", "charge.refund.updated", 51, OLD, version="2020-03-02"),
        {
            "id": "re_old",
            "status": "succeeded",
            "currency": "cad",
            "amount": 2502,
            "charge": "ch_old",
            "payment_intent": "pi_old",
            "reason": None,
            "failure_reason": None,
            "created": at(T + 31),
            "failed_at": None,
            "event_id": "evt_old",
            "as_of": at(T + 51),
        },
    ),
    # Both references expanded, as an API read with `expand` gives them.
    "expanded": (
        event(
            "evt_expanded",
            "refund.created",
            52,
            {
                **OLD,
                "id": "re_expanded",
                "charge": {"id": "ch_x", "object": "charge", "amount": 9, "payment_intent": "pi_y"},
                "payment_intent": {"id": "pi_x", "object": "payment_intent", "amount": 8},
                "reason": "fraudulent",
            },
        ),
        {
            "id": "re_expanded",
            "status": "succeeded",
            "currency": "cad",
            "amount": 2502,
            "charge": "ch_x",
            "payment_intent": "pi_x",
            "reason": "fraudulent",
            "failure_reason": None,
            "created": at(T + 31),
            "failed_at": None,
            "event_id": "evt_expanded",
            "as_of": at(T + 52),
        },
    ),
    # A bank transfer's refund that waits for the buyer: no charge (docs.stripe.com/refunds, requires_action).
    "without_charge": (
        event(
            "evt_pyr",
            "refund.created",
            53,
            {**OLD, "id": "pyr_1", "charge": None, "status": "requires_action", "reason": "requested_by_customer"},
        ),
        {
            "id": "pyr_1",
            "status": "requires_action",
            "currency": "cad",
            "amount": 2502,
            "charge": None,
            "payment_intent": "pi_old",
            "reason": "requested_by_customer",
            "failure_reason": None,
            "created": at(T + 31),
            "failed_at": None,
            "event_id": "evt_pyr",
            "as_of": at(T + 53),
        },
    ),
}


@pytest.mark.parametrize("shape", ROW_SPECS)
def test_every_column(engine: Engine, shape: str) -> None:
    """A refund's row holds its fields as Stripe's API reference defines them, and no other row appears."""
    body, row = ROW_SPECS[shape]

    ledger.take_in(engine, body)

    assert_rows(engine, {"refunds": [row]})


def test_the_mode_is_the_events(engine: Engine) -> None:
    """A refund does not name its mode (stripe-facts section 2.8): a live event's refund is live."""
    ledger.take_in(engine, event("evt_live", "refund.created", 50, refund("re_live", created=50), livemode=True))

    assert ledger.rows(engine, "SELECT livemode, id FROM refunds") == [{"livemode": True, "id": "re_live"}]


def reported(id_: str, type_: str, created: int, status: str, /, **fields: object) -> bytes:
    """Return an event of a refund that was created at 10."""
    return event(id_, type_, created, refund(created=10, status=status, **fields))


FAILED = {"failure_reason": "expired_or_canceled_card"}
# Each history: its events, then status, failure_reason, failed_at, event and anomalies. Times run against ranks.
HISTORIES: dict[str, tuple[list[bytes], tuple[object, ...]]] = {
    "pending": ([reported("evt_p@", "refund.created", 10, "pending")], ("pending", None, None, "evt_p@", [])),
    "requires_action": (
        [reported("evt_a@", "refund.created", 10, "requires_action")],
        ("requires_action", None, None, "evt_a@", []),
    ),
    "pending_and_action_alike": (
        [
            reported("evt_1@", "refund.created", 10, "requires_action"),
            reported("evt_2@", "refund.updated", 20, "pending"),
        ],
        ("pending", None, None, "evt_2@", []),
    ),
    "action_and_pending_alike": (
        [
            reported("evt_1@", "refund.created", 10, "pending"),
            reported("evt_2@", "refund.updated", 20, "requires_action"),
        ],
        ("requires_action", None, None, "evt_2@", []),
    ),
    "succeeded_over_later_pending": (
        [reported("evt_s@", "refund.updated", 20, "succeeded"), reported("evt_p@", "refund.updated", 30, "pending")],
        ("succeeded", None, None, "evt_s@", []),
    ),
    "succeeded_over_later_action": (
        [
            reported("evt_s@", "refund.updated", 20, "succeeded"),
            reported("evt_a@", "refund.updated", 30, "requires_action"),
        ],
        ("succeeded", None, None, "evt_s@", []),
    ),
    "failed_over_later_success": (
        [
            reported("evt_f@", "refund.failed", 20, "failed", **FAILED),
            reported("evt_s@", "refund.updated", 30, "succeeded"),
            reported("evt_p@", "refund.updated", 40, "pending"),
        ],
        ("failed", "expired_or_canceled_card", at(T + 20), "evt_f@", []),
    ),
    "canceled_over_later_action": (
        [
            reported("evt_c@", "refund.updated", 20, "canceled"),
            reported("evt_a@", "refund.updated", 30, "requires_action"),
            reported("evt_s@", "charge.refund.updated", 40, "succeeded"),
        ],
        ("canceled", None, at(T + 20), "evt_c@", []),
    ),
    "failed_and_canceled_alike": (
        [
            reported("evt_1@", "refund.failed", 20, "failed", **FAILED),
            reported("evt_2@", "refund.updated", 30, "canceled"),
        ],
        ("canceled", "expired_or_canceled_card", at(T + 20), "evt_2@", []),
    ),
    "canceled_and_failed_alike": (
        [
            reported("evt_1@", "refund.updated", 20, "canceled"),
            reported("evt_2@", "refund.failed", 30, "failed", **FAILED),
        ],
        ("failed", "expired_or_canceled_card", at(T + 20), "evt_2@", []),
    ),
    # "succeeded -> failed is possible (bank returns it)": stripe-facts section 2.8.
    "returned_by_the_bank": (
        [
            reported("evt_p@", "refund.created", 10, "pending"),
            reported("evt_s@", "refund.updated", 20, "succeeded"),
            reported("evt_f@", "refund.failed", 30, "failed", failure_reason="declined"),
            reported("evt_u@", "refund.updated", 40, "failed", failure_reason="unknown"),
        ],
        ("failed", "unknown", at(T + 30), "evt_u@", []),
    ),
    "in_one_second": (
        [
            reported("evt_1f@", "refund.failed", 10, "failed", **FAILED),
            reported("evt_2s@", "refund.updated", 10, "succeeded"),
            reported("evt_3p@", "refund.created", 10, "pending"),
        ],
        ("failed", "expired_or_canceled_card", at(T + 10), "evt_1f@", []),
    ),
    "read": ([reported("obs_1@", "payfold.refund.observed", 20, "succeeded")], ("succeeded", None, None, "obs_1@", [])),
    "unknown": (
        [reported("evt_u@", "refund.updated", 20, "under_review")],
        ("under_review", None, None, "evt_u@", ["unknown_status"]),
    ),
    "unknown_is_lowest": (
        [
            reported("evt_s@", "refund.created", 10, "succeeded"),
            reported("evt_u@", "refund.updated", 20, "under_review"),
        ],
        ("succeeded", None, None, "evt_s@", []),
    ),
    # One change reported under both names (stripe-facts section 1): one row, one moment.
    "twins": (
        [
            reported("evt_1@", "charge.refund.updated", 20, "failed", **FAILED),
            reported("evt_2@", "refund.failed", 20, "failed", **FAILED),
        ],
        ("failed", "expired_or_canceled_card", at(T + 20), "evt_2@", []),
    ),
}


@pytest.fixture(scope="module")
def arrived(services: Services) -> Iterator[Engine]:
    """Return a database into which every history came in every order."""
    with arrived_in_every_order(services, {name: bodies for name, (bodies, _) in HISTORIES.items()}) as engine:
        yield engine


@pytest.mark.parametrize("name", HISTORIES)
def test_statuses_in_every_order(arrived: Engine, name: str) -> None:
    """Ranks are pending and requires_action, succeeded, then failed and canceled; failed_at is the first failure's."""
    bodies, expected = HISTORIES[name]

    for end in suffixes(name, bodies):
        (row,) = ledger.rows(
            arrived,
            """
            SELECT status, failure_reason, failed_at, event_id,
                array(SELECT kind FROM anomalies a WHERE a.subject = 'refund' AND a.subject_id = refunds.id
                    AND a.resolved_at IS NULL ORDER BY kind) AS anomalies
            FROM refunds WHERE id = :id
            """,
            id=f"re{end}",
        )
        assert tuple(row.values()) == tuple(
            value.replace("@", end) if isinstance(value, str) else value for value in expected
        ), end
