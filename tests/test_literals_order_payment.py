"""The charges of an order's payment intent decide whether it is paid where its session does not report it (rule 10).

Manual capture, delayed methods and released holds after docs.stripe.com/payments/place-a-hold-on-a-payment-method,
/api/charges/object and /api/events/types; stripe-facts, section 11. In a history `#` stands for its name.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

import pytest
from sqlalchemy import Engine

from tests.envelopes import Json, event
from tests.ledger import rows, splits, take_in, take_in_batches
from tests.literals import at

DONE, LATER, LATEST = 1_760_000_300, 1_760_090_000, 1_760_100_000


def session(type_: str = "completed", created: int = DONE, *, without: Sequence[str] = (), **fields: object) -> bytes:
    """Return a session of the intent pi_# that is complete and unpaid."""
    known: Json = {
        "id": "cs_#",
        "object": "checkout.session",
        "amount_subtotal": 1500,
        "amount_total": 1500,
        "created": DONE - 60,
        "currency": "usd",
        "metadata": {},
        "mode": "payment",
        "payment_intent": "pi_#",
        "payment_status": "unpaid",
        "status": "complete",
    }
    whole = {name: value for name, value in {**known, **fields}.items() if name not in without}
    return event(f"evt_#_{type_}", f"checkout.session.{type_}", created, whole)


def charge(type_: str, created: int = DONE, *, number: int = 1, **fields: object) -> bytes:
    """Return a `charge.TYPE` event about a charge of pi_#, captured whole unless *fields* override it."""
    known: Json = {
        "id": f"ch_#_{number}",
        "object": "charge",
        "amount": 1500,
        "amount_captured": 1500,
        "amount_refunded": 0,
        "captured": True,
        "created": DONE,
        "currency": "usd",
        "disputed": False,
        "paid": True,
        "payment_intent": "pi_#",
        "refunded": False,
        "status": "succeeded",
    }
    return event(f"evt_#_{type_}_{number}", f"charge.{type_}", created, {**known, **fields})


HELD: Json = {"captured": False, "amount_captured": 0}
RELEASED: Json = {**HELD, "amount_refunded": 1500, "refunded": True}
NOT_PAID: Json = {**HELD, "paid": False, "status": "failed"}
PENDING: Json = {"paid": False, "status": "pending"}
OF_2019 = ("amount_subtotal", "amount_total", "created", "currency", "payment_status", "status")

CANCELED = event(
    "evt_#_canceled",
    "payment_intent.canceled",
    LATER,
    {
        "id": "pi_#",
        "object": "payment_intent",
        "amount": 1500,
        "canceled_at": LATER,
        "cancellation_reason": "automatic",
        "created": DONE - 50,
        "currency": "usd",
        "status": "canceled",
    },
)
RELEASING_REFUND = event(
    "evt_#_refund",
    "refund.created",
    LATER,
    {
        "id": "re_#",
        "object": "refund",
        "amount": 1500,
        "charge": "ch_#_1",
        "created": LATER,
        "currency": "usd",
        "payment_intent": "pi_#",
        "reason": "expired_uncaptured_charge",
        "status": "succeeded",
    },
)


def reported_late(body: bytes) -> bytes:
    """Return the event *body* as one that Stripe created later than the reported moment."""
    return json.dumps({**json.loads(body), "created": LATEST}).encode()


# A history; the order's status, paid_at and failed_at; its changes, each with the event that it names.
Outcome = tuple[str | None, datetime | None, datetime | None]
PROCESSING: Outcome = ("processing", None, None)
OPENED_PROCESSING = ("order.processing", "completed")
HISTORIES: Mapping[str, tuple[Sequence[bytes], Outcome, Sequence[tuple[str, str]]]] = {
    "held": ([session(), charge("succeeded", **HELD)], PROCESSING, [OPENED_PROCESSING]),
    "captured": (
        [session(), charge("succeeded", **HELD), charge("captured", LATER)],
        ("paid", at(LATER), None),
        [OPENED_PROCESSING, ("order.paid", "captured_1")],
    ),
    # The charge's event arrives before the session's: the order was never processing.
    "captured_first": (
        [charge("captured", LATER), charge("succeeded", **HELD), session()],
        ("paid", at(LATER), None),
        [("order.paid", "captured_1")],
    ),
    # A later event of the charge does not set the moment of its capture.
    "captured_and_more": (
        [session(), charge("updated", LATEST), charge("captured", LATER)],
        ("paid", at(LATER), None),
        [OPENED_PROCESSING, ("order.paid", "updated_1")],
    ),
    "captured_part": (
        [session(), charge("captured", LATER, amount_captured=900)],
        ("paid", at(LATER), None),
        [OPENED_PROCESSING, ("order.paid", "captured_1")],
    ),
    # A delayed method's charge is `captured` from the start, and pays when it has succeeded.
    "pending": ([session(), charge("pending", **PENDING)], PROCESSING, [OPENED_PROCESSING]),
    "cleared": (
        [session(), charge("pending", **PENDING), charge("succeeded", LATER)],
        ("paid", at(LATER), None),
        [OPENED_PROCESSING, ("order.paid", "succeeded_1")],
    ),
    # The session's own moment, where an event of the session reports it.
    "own_moment": (
        [session(), charge("captured", LATER), session("async_payment_succeeded", LATEST, payment_status="paid")],
        ("paid", at(LATEST), None),
        [OPENED_PROCESSING, ("order.paid", "captured_1")],
    ),
    # A failed charge is one attempt: the buyer may try again.
    "refused": ([session(), charge("failed", LATER, **NOT_PAID)], PROCESSING, [OPENED_PROCESSING]),
    "second_attempt": (
        [session(), charge("failed", **NOT_PAID), charge("succeeded", LATER, number=2)],
        ("paid", at(LATER), None),
        [OPENED_PROCESSING, ("order.paid", "succeeded_2")],
    ),
    # A charge of a delayed method may fail after it succeeded: it pays nothing (rule 10: succeeded, and captured). The
    # order has the status of its session's event again, and so the correction names that event.
    "captured_and_failed_before": (
        [charge("succeeded"), charge("failed", LATER, paid=False, status="failed"), session()],
        PROCESSING,
        [OPENED_PROCESSING],
    ),
    "captured_and_failed": (
        [session(), charge("succeeded"), charge("failed", LATER, paid=False, status="failed")],
        PROCESSING,
        [OPENED_PROCESSING, ("order.paid", "succeeded_1"), ("order.corrected", "completed")],
    ),
    "captured_and_failed_and_again": (
        [
            session(),
            charge("succeeded"),
            charge("failed", LATER, paid=False, status="failed"),
            charge("succeeded", LATEST, number=2),
        ],
        ("paid", at(LATEST), None),
        [
            OPENED_PROCESSING,
            ("order.paid", "succeeded_1"),
            ("order.corrected", "completed"),
            ("order.corrected", "succeeded_2"),
        ],
    ),
    # ---- holds that were released ----
    "released": (
        [session(), charge("succeeded", **HELD), charge("expired", LATER, **RELEASED)],
        ("failed", None, at(LATER)),
        [OPENED_PROCESSING, ("order.failed", "expired_1")],
    ),
    "released_by_refund": (
        [session(), charge("succeeded", **HELD), charge("refunded", LATER, **RELEASED)],
        ("failed", None, at(LATER)),
        [OPENED_PROCESSING, ("order.failed", "refunded_1")],
    ),
    "releasing_refund": (
        [session(), charge("succeeded", **HELD), RELEASING_REFUND],
        ("failed", None, at(LATER)),
        [OPENED_PROCESSING, ("order.failed", "refund")],
    ),
    "canceled": (
        [session(), CANCELED],
        ("failed", None, at(LATER)),
        [OPENED_PROCESSING, ("order.failed", "canceled")],
    ),
    # The moment is when Stripe canceled it, or made the refund, not when Stripe created the event.
    "canceled_before_its_event": (
        [session(), reported_late(CANCELED)],
        ("failed", None, at(LATER)),
        [OPENED_PROCESSING, ("order.failed", "canceled")],
    ),
    "refunded_before_its_event": (
        [session(), charge("succeeded", **HELD), reported_late(RELEASING_REFUND)],
        ("failed", None, at(LATER)),
        [OPENED_PROCESSING, ("order.failed", "refund")],
    ),
    # Until the last of several holds is released, money is still held.
    "two_holds": (
        [
            session(),
            charge("succeeded", **HELD),
            charge("succeeded", number=2, **HELD),
            charge("expired", LATER, **RELEASED),
            charge("expired", LATEST, number=2, **RELEASED),
        ],
        ("failed", None, at(LATEST)),
        [OPENED_PROCESSING, ("order.failed", "expired_2")],
    ),
    "one_still_held": (
        [session(), charge("succeeded", number=2, **HELD), charge("expired", LATER, **RELEASED)],
        PROCESSING,
        [OPENED_PROCESSING],
    ),
    "one_still_pending": (
        [charge("pending", number=2, **PENDING), charge("expired", LATER, **RELEASED), session()],
        PROCESSING,
        [OPENED_PROCESSING],
    ),
    "released_then_paid": (
        [charge("expired", LATER, **RELEASED), charge("succeeded", LATEST, number=2), session()],
        ("paid", at(LATEST), None),
        [("order.paid", "succeeded_2")],
    ),
    # ---- orders that a charge does not change ----
    "reported_paid": (
        [session(payment_status="paid"), charge("expired", LATER, **RELEASED)],
        ("paid", at(DONE), None),
        [("order.paid", "completed")],
    ),
    "of_another": ([session(), charge("captured", payment_intent="pi_0#")], PROCESSING, [OPENED_PROCESSING]),
    "expired": (
        [session("expired", status="expired"), charge("captured", LATER)],
        ("expired", None, None),
        [("order.expired", "expired")],
    ),
    # ---- 2019: the session never reported whether it is paid ----
    "of_2019": (
        [session(without=OF_2019), charge("succeeded", LATER)],
        ("paid", at(LATER), None),
        [("order.paid", "succeeded_1")],
    ),
    "held_in_2019": ([session(without=OF_2019), charge("succeeded", **HELD)], (None, None, None), []),
}
ANOMALIES = {("cs_held_in_2019", "unknown_status")}


def test_charges_decide_an_order(engine: Engine) -> None:
    """The charges set the order's status and moments, and its changes name the charge's event."""
    for name, (steps, *_) in HISTORIES.items():
        take_in(engine, *(body.replace(b"#", name.encode()) for body in steps))

    orders = rows(engine, "SELECT id, status, paid_at, failed_at FROM orders")
    found = {row["id"].removeprefix("cs_"): (row["status"], row["paid_at"], row["failed_at"]) for row in orders}
    assert found == {name: outcome for name, (_, outcome, _) in HISTORIES.items()}
    assert {name: changes(engine, name) for name in HISTORIES} == {
        name: steps for name, (*_, steps) in HISTORIES.items()
    }
    assert noted(engine) == ANOMALIES


def test_a_charge_that_was_captured_and_released(engine: Engine) -> None:
    """Captured beats released, and the contradiction is an anomaly of the charge."""
    steps = [session(), charge("succeeded", **HELD), charge("expired", LATER, **RELEASED), charge("captured", LATEST)]
    take_in(engine, *(body.replace(b"#", b"1") for body in steps))

    [row] = rows(engine, "SELECT status, paid_at FROM orders")
    assert row == {"status": "paid", "paid_at": at(LATEST)}
    assert noted(engine) == {("ch_1_1", "released_and_captured")}


@pytest.mark.parametrize("name", ["captured_and_failed", "captured_and_failed_and_again"])
def test_a_charge_that_was_captured_and_failed_later(engine: Engine, name: str) -> None:
    """A charge that failed no longer pays its order, in any order and any batches; its capture is still recorded."""
    steps, outcome, _ = HISTORIES[name]
    for batches in splits(steps):
        take_in_batches(engine, batches)

        [row] = rows(engine, "SELECT status, paid_at, failed_at FROM orders")
        assert tuple(row.values()) == outcome, batches
        [first, *_] = rows(engine, "SELECT status, captured_at FROM charges ORDER BY id")
        assert first == {"status": "failed", "captured_at": at(DONE)}, batches
        last = rows(engine, "SELECT after ->> 'status' AS status FROM changes ORDER BY seq DESC LIMIT 1")
        assert last == [{"status": outcome[0]}], batches


def changes(engine: Engine, name: str) -> list[tuple[str, str]]:
    """Return the kind of each change of an order, and which event it names."""
    statement = "SELECT kind, event_id FROM changes WHERE subject_id = :id ORDER BY seq"
    found = rows(engine, statement, id=f"cs_{name}")
    return [(row["kind"], row["event_id"].removeprefix(f"evt_{name}_")) for row in found]


def noted(engine: Engine) -> set[tuple[str, str]]:
    """Return the subject and the kind of each anomaly in force."""
    found = rows(engine, "SELECT subject_id, kind FROM anomalies WHERE resolved_at IS NULL")
    return {(row["subject_id"], row["kind"]) for row in found}
