"""A charge's row agrees with Stripe's documentation: every column and status, in every order of arrival.

Fields as in docs.stripe.com/api/charges/object (types of the SDK 16.1.0) and the recorded ``charge.refunded`` of API
2020-03-02; event types as in docs.stripe.com/api/events/types.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.local.services import Services
from tests import ledger
from tests.literals import assert_rows, at
from tests.stripe_payments import T, arrived_in_every_order, charge, event, hold, named, released, suffixes

# Every field that is kept, and its neighbours: each amount differs from all others.
NEWEST: dict[str, Any] = {
    "id": "ch_newest",
    "object": "charge",
    "amount": 5012,
    "amount_captured": 5011,
    "amount_refunded": 1503,
    "application": "ca_1",
    "application_fee": "fee_1",
    "application_fee_amount": 77,
    "authorization_code": "00A1B2",
    "balance_transaction": "txn_1",
    "billing_details": {"address": None, "email": "buyer@example.com", "name": "Buyer", "phone": None, "tax_id": None},
    "calculated_statement_descriptor": "SHOP",
    "captured": True,
    "created": T + 1,
    "currency": "usd",
    "customer": "cus_1",
    "description": "Subscription creation",
    "disputed": True,
    "failure_balance_transaction": "txn_2",
    "failure_code": None,
    "failure_message": None,
    "fraud_details": {},
    "livemode": False,
    "metadata": {"order": "7"},
    "on_behalf_of": "acct_2",
    "outcome": {"network_status": "approved_by_network", "reason": None, "type": "authorized"},
    "paid": True,
    "payment_intent": "pi_newest",
    "payment_method": "pm_1",
    "payment_method_details": {
        "type": "card",
        "card": {
            "amount_authorized": 5013,
            "amount_requested": 5010,
            "overcapture": {"maximum_amount_capturable": 5014, "status": "available"},
        },
    },
    "presentment_details": {"presentment_amount": 4709, "presentment_currency": "eur"},
    "receipt_email": None,
    "refunded": False,
    "review": "prv_1",
    "source_transfer": "tr_1",
    "status": "succeeded",
    "transfer": "tr_2",
    "transfer_data": {"amount": 4001, "destination": "acct_3"},
    "transfer_group": "group_1",
}

# API 2020-03-02 as recorded: names its invoice, lists its refunds inline, and names its dispute.
BEFORE_BASIL: dict[str, Any] = {
    "id": "ch_before",
    "object": "charge",
    "amount": 2512,
    "amount_captured": 2511,
    "amount_refunded": 2503,
    "application_fee_amount": None,
    "balance_transaction": "txn_3",
    "captured": True,
    "created": T + 2,
    "currency": "cad",
    "customer": "cus_2",
    "destination": None,
    "dispute": "dp_1",
    "disputed": False,
    "failure_code": None,
    "invoice": "in_before",
    "livemode": False,
    "metadata": {},
    "order": "or_1",
    "paid": True,
    "payment_intent": "pi_before",
    "refunded": True,
    "refunds": {
        "object": "list",
        "data": [
            {
                "id": "re_before",
                "object": "refund",
                "amount": 2502,
                "charge": "ch_before",
                "created": T + 3,
                "currency": "cad",
                "payment_intent": "pi_before",
                "status": "succeeded",
            }
        ],
        "has_more": False,
        "total_count": 1,
    },
    "status": "succeeded",
    "transfer_data": None,
}

# The recorded failed charge of API 2020-03-02: no money is captured.
FAILED: dict[str, Any] = {
    "id": "ch_failed",
    "object": "charge",
    "amount": 2513,
    "amount_captured": 0,
    "amount_refunded": 0,
    "captured": False,
    "created": T + 4,
    "currency": "eur",
    "disputed": False,
    "failure_code": "card_declined",
    "invoice": None,
    "livemode": False,
    "paid": False,
    "payment_intent": {"id": "pi_failed", "object": "payment_intent", "amount": 2514, "status": "requires_action"},
    "refunded": False,
    "status": "failed",
}

ROW_SPECS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "newest": (
        event("evt_newest", "charge.updated", 50, NEWEST),
        {
            "id": "ch_newest",
            "payment_intent": "pi_newest",
            "invoice": None,
            "status": "succeeded",
            "currency": "usd",
            "amount": 5012,
            "captured": True,
            "amount_captured": 5011,
            "captured_at": at(T + 50),
            "released_at": None,
            "amount_refunded": 1503,
            "refunded": False,
            "disputed": True,
            "event_id": "evt_newest",
            "as_of": at(T + 50),
        },
    ),
    "before_basil": (
        event("evt_before", "charge.refunded", 51, BEFORE_BASIL, version="2020-03-02"),
        {
            "id": "ch_before",
            "payment_intent": "pi_before",
            "invoice": "in_before",
            "status": "succeeded",
            "currency": "cad",
            "amount": 2512,
            "captured": True,
            "amount_captured": 2511,
            "captured_at": at(T + 51),
            "released_at": None,
            "amount_refunded": 2503,
            "refunded": True,
            "disputed": False,
            "event_id": "evt_before",
            "as_of": at(T + 51),
        },
    ),
    "failed_and_expanded": (
        event("evt_failed", "charge.failed", 52, FAILED, version="2020-03-02"),
        {
            "id": "ch_failed",
            "payment_intent": "pi_failed",
            "invoice": None,
            "status": "failed",
            "currency": "eur",
            "amount": 2513,
            "captured": False,
            "amount_captured": 0,
            "captured_at": None,
            "released_at": None,
            "amount_refunded": 0,
            "refunded": False,
            "disputed": False,
            "event_id": "evt_failed",
            "as_of": at(T + 52),
        },
    ),
    # Before PaymentIntents (2018) and before amount_captured a charge lacks both keys, which means unknown, not 0.
    "of_2018": (
        event(
            "evt_old",
            "charge.succeeded",
            53,
            {
                "id": "ch_old",
                "object": "charge",
                "amount": 901,
                "amount_refunded": 0,
                "captured": True,
                "created": T + 5,
                "currency": "gbp",
                "invoice": "in_old",
                "livemode": False,
                "paid": True,
                "refunded": False,
                "status": "succeeded",
            },
            version="2018-02-28",
        ),
        {
            "id": "ch_old",
            "payment_intent": None,
            "invoice": "in_old",
            "status": "succeeded",
            "currency": "gbp",
            "amount": 901,
            "captured": True,
            "amount_captured": None,
            "captured_at": at(T + 53),
            "released_at": None,
            "amount_refunded": 0,
            "refunded": False,
            "disputed": None,
            "event_id": "evt_old",
            "as_of": at(T + 53),
        },
    ),
}


@pytest.mark.parametrize("shape", ROW_SPECS)
def test_every_column(engine: Engine, shape: str) -> None:
    """A charge's row holds its fields as Stripe's API reference defines them, and nothing else."""
    body, row = ROW_SPECS[shape]

    ledger.take_in(engine, body)

    assert_rows(engine, {"charges": [row]})


def test_an_absent_key_erases_nothing(engine: Engine) -> None:
    """Basil took `invoice` from the charge (stripe-facts section 6): a later event without it leaves it."""
    first = event("evt_a", "charge.succeeded", 10, charge("ch_a", invoice="in_a"), version="2024-06-20")
    later = event("evt_b", "charge.refunded", 20, charge("ch_a", amount_refunded=700, disputed=True))

    ledger.take_in(engine, first, later)

    (row,) = ledger.rows(engine, "SELECT invoice, amount_refunded, disputed, captured_at, event_id FROM charges")
    assert row == {
        "invoice": "in_a",
        "amount_refunded": 700,
        "disputed": True,
        "captured_at": at(T + 10),
        "event_id": "evt_b",
    }


def without_captured(**fields: object) -> dict[str, Any]:
    """Return a charge that succeeded and does not report whether it was captured."""
    return {name: value for name, value in charge(**fields).items() if name not in ("captured", "amount_captured")}


PENDING = charge(status="pending", paid=False, captured=True)
# Each history: its events, then status, captured, captured_at, released_at, refunded, event and anomalies.
# The times run against the ranks, so that without a rank the wrong event would decide.
HISTORIES: dict[str, tuple[list[bytes], tuple[object, ...]]] = {
    "pending_is_not_captured": (
        [event("evt_p@", "charge.pending", 10, PENDING)],
        ("pending", True, None, None, False, "evt_p@", []),
    ),
    "read": (
        [event("obs_1@", "payfold.charge.observed", 10, charge())],
        ("succeeded", True, at(T + 10), None, False, "obs_1@", []),
    ),
    "uncaptured": (
        [event("evt_h@", "charge.succeeded", 10, hold())],
        ("succeeded", False, None, None, False, "evt_h@", []),
    ),
    "captured_over_later_hold_and_pending": (
        [
            event("evt_c@", "charge.captured", 10, charge()),
            event("evt_h@", "charge.updated", 20, hold()),
            event("evt_p@", "charge.pending", 30, PENDING),
        ],
        ("succeeded", True, at(T + 10), None, False, "evt_c@", []),
    ),
    "hold_over_later_pending": (
        [event("evt_h@", "charge.succeeded", 10, hold()), event("evt_p@", "charge.pending", 20, PENDING)],
        ("succeeded", False, None, None, False, "evt_h@", []),
    ),
    "failed_over_later_pending": (
        [
            event("evt_f@", "charge.failed", 10, charge(status="failed", captured=False, amount_captured=0)),
            event("evt_p@", "charge.pending", 20, PENDING),
        ],
        ("failed", False, None, None, False, "evt_f@", []),
    ),
    "released_over_later_hold": (
        [event("evt_x@", "charge.expired", 10, released()), event("evt_h@", "charge.updated", 20, hold())],
        ("succeeded", False, None, at(T + 10), True, "evt_x@", []),
    ),
    # Only a charge that reports captured: false is uncaptured; one without the key is not known to be held.
    "without_captured_over_later_hold": (
        [event("evt_u@", "charge.updated", 10, without_captured()), event("evt_h@", "charge.succeeded", 20, hold())],
        ("succeeded", False, None, None, False, "evt_u@", []),
    ),
    "without_captured_in_one_second": (
        [event("evt_1u@", "charge.updated", 10, without_captured()), event("evt_2h@", "charge.succeeded", 10, hold())],
        ("succeeded", False, None, None, False, "evt_1u@", []),
    ),
    "in_one_second": (
        [
            event("evt_1c@", "charge.captured", 10, charge()),
            event("evt_2h@", "charge.succeeded", 10, hold()),
            event("evt_3p@", "charge.pending", 10, PENDING),
        ],
        ("succeeded", True, at(T + 10), None, False, "evt_1c@", []),
    ),
    "captured_then_failed": (
        [
            event("evt_c@", "charge.succeeded", 10, charge()),
            event("evt_f@", "charge.failed", 20, charge(status="failed")),
        ],
        ("failed", True, at(T + 10), None, False, "evt_f@", []),
    ),
    "captured_at_is_the_first": (
        [
            event("evt_h@", "charge.succeeded", 10, hold()),
            event("evt_c@", "charge.captured", 20, charge()),
            event("evt_r@", "charge.refunded", 30, charge(amount_refunded=5000, refunded=True)),
        ],
        ("succeeded", True, at(T + 20), None, True, "evt_r@", []),
    ),
    "released_as_refunded": (
        [
            event("evt_h@", "charge.succeeded", 10, hold()),
            event("evt_r@", "charge.refunded", 20, released()),
            event("evt_u@", "charge.updated", 30, released()),
        ],
        ("succeeded", False, None, at(T + 20), True, "evt_u@", []),
    ),
    # By the type alone: docs.stripe.com/api/events/types "Occurs whenever an uncaptured charge expires."
    # A refund releases only a hold, and a charge without the key is not known to be a hold.
    "refunded_without_captured": (
        [event("evt_r@", "charge.refunded", 10, without_captured(amount_refunded=5000, refunded=True))],
        ("succeeded", None, None, None, True, "evt_r@", []),
    ),
    "released_as_expired": (
        [event("evt_h@", "charge.succeeded", 10, hold()), event("evt_x@", "charge.expired", 20, hold())],
        ("succeeded", False, None, at(T + 20), False, "evt_x@", []),
    ),
    "released_and_captured": (
        [event("evt_x@", "charge.expired", 10, released()), event("evt_c@", "charge.captured", 20, charge())],
        ("succeeded", True, at(T + 20), at(T + 10), False, "evt_c@", ["released_and_captured"]),
    ),
    "unknown": (
        [event("evt_u@", "charge.updated", 10, charge(status="frozen"))],
        ("frozen", True, None, None, False, "evt_u@", ["unknown_status"]),
    ),
    "unknown_is_lowest": (
        [
            event("evt_h@", "charge.succeeded", 10, hold()),
            event("evt_u@", "charge.updated", 20, charge(status="frozen")),
        ],
        ("succeeded", False, None, None, False, "evt_h@", []),
    ),
    "two_intents": (
        [
            event("evt_1@", "charge.succeeded", 10, charge(payment_intent="pi_other@")),
            event("evt_2@", "charge.updated", 20, charge()),
        ],
        ("succeeded", True, at(T + 10), None, False, "evt_2@", ["two_references"]),
    ),
}


@pytest.fixture(scope="module")
def arrived(services: Services) -> Iterator[Engine]:
    """Return a database into which every history came in every order."""
    with arrived_in_every_order(services, {name: bodies for name, (bodies, _) in HISTORIES.items()}) as engine:
        yield engine


@pytest.mark.parametrize("name", HISTORIES)
def test_statuses_in_every_order(arrived: Engine, name: str) -> None:
    """Ranks are pending, uncaptured, then captured, failed and released alike; the first event sets a moment."""
    bodies, expected = HISTORIES[name]

    for end in suffixes(name, bodies):
        (row,) = ledger.rows(
            arrived,
            """
            SELECT status, captured, captured_at, released_at, refunded, event_id,
                array(SELECT kind FROM anomalies a WHERE a.subject = 'charge' AND a.subject_id = charges.id
                    AND a.resolved_at IS NULL ORDER BY kind) AS anomalies
            FROM charges WHERE id = :id
            """,
            id=f"ch{end}",
        )
        assert tuple(row.values()) == tuple(
            value.replace("@", end) if isinstance(value, str) else value for value in expected
        ), end


def test_the_larger_refund_of_one_second_is_later(engine: Engine) -> None:
    """Of two events of one second without previous attributes, the one with more refunded is the later (rule 4)."""
    for id_, (more, less) in {"ch_a": ("a", "b"), "ch_b": ("b", "a")}.items():
        bodies = [
            event(f"evt_{id_}_{more}", "charge.refunded", 10, charge(id_, amount_refunded=700)),
            event(f"evt_{id_}_{less}", "charge.refunded", 10, charge(id_, amount_refunded=500)),
        ]
        ledger.take_in(engine, *bodies)
        ledger.take_in(engine, *(body.replace(id_.encode(), f"{id_}2".encode()) for body in reversed(bodies)))

    found = ledger.rows(engine, "SELECT id, amount_refunded, event_id FROM charges ORDER BY id")
    assert [tuple(row.values()) for row in found] == [
        ("ch_a", 700, "evt_ch_a_a"),
        ("ch_a2", 700, "evt_ch_a2_a"),
        ("ch_b", 700, "evt_ch_b_b"),
        ("ch_b2", 700, "evt_ch_b2_b"),
    ]


def test_a_charge_alone_records_no_change(engine: Engine) -> None:
    """A charge has no kinds of its own in the feed (design.md, Changes)."""
    ledger.take_in(engine, *(named(body, "alone") for body in HISTORIES["captured_at_is_the_first"][0]))

    assert ledger.rows(engine, "SELECT kind FROM changes") == []
