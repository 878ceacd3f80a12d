"""`payfold … explain` prints which event set which column, and what was known when, for small histories.

Each event is received a minute after the one before, from 12:00 on, not at its `created`.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import pytest
from msgspec.structs import replace

from deploy.local.services import Services
from schemas import database
from tests import ledger
from tests.command import Ran, payfold
from tests.literals import at
from tests.stripe_payments import Body, T, canceled_intent, charge, event, hold, released, session
from tests.web import migrated_database

# The order: completed and unpaid at 10; paid at 400, under two ids; and last comes an older completion.
ORDER: Body = session(
    "cs_e",
    amount_total=5004,
    amount_subtotal=5200,
    client_reference_id="cart_e",
    customer_details={"email": "buyer@example.com"},
    payment_intent="pi_e",
    payment_status="unpaid",
    total_details={"amount_discount": 250, "amount_shipping": 50, "amount_tax": 4},
)
# An older version without the reference key, and with an intent that is null.
PAID_LATER: Body = {
    **{name: value for name, value in ORDER.items() if name != "client_reference_id"},
    "amount_total": 4004,
    "payment_intent": None,
    "payment_status": "paid",
}
LINK: Body = {
    "id": "plink_e",
    "object": "payment_link",
    "active": True,
    "currency": "jpy",
    "livemode": False,
    "metadata": {"a": "1"},
    "url": "https://buy.stripe.com/test_1",
}
TANGLED: Body = {**LINK, "id": "plink_t"}
CUSTOMER: Body = {
    "id": "cus_e",
    "object": "customer",
    "balance": -500,
    "created": T,
    "currency": "usd",
    "delinquent": True,
    "email": "buyer@example.com",
    "livemode": False,
    "metadata": {},
    "name": "Buyer",
    "test_clock": "clock_1",
}
NOTE: Body = {
    "id": "cn_e",
    "object": "credit_note",
    "amount": 300,
    "created": T + 20,
    "currency": "usd",
    "customer": "cus_e",
    "customer_balance_transaction": "cbtxn_1",
    "effective_at": T + 19,
    "invoice": "in_e",
    "lines": {"object": "list", "data": [], "has_more": False},
    "livemode": False,
    "memo": "memo",
    "number": "R-1-CN-1",
    "out_of_band_amount": 20,
    "post_payment_amount": 210,
    "pre_payment_amount": 90,
    "reason": "order_change",
    "refunds": [{"amount_refunded": 110, "refund": "re_n", "type": "refund", "payment_record_refund": None}],
    "status": "issued",
    "type": "mixed",
    "voided_at": None,
}


def ended_by_charge(name: str, *bodies: bytes) -> list[bytes]:
    """Return a session that is complete and unpaid, and the *bodies* that end it."""
    unpaid = session(f"cs_{name}", payment_intent=f"pi_{name}", payment_status="unpaid")
    return [event(f"evt_{name}1", "checkout.session.completed", 10, unpaid), *bodies]


# Each received a minute after the one before it in its own list.
ARRIVALS: dict[str, list[bytes]] = {
    "cs_e": [
        event("evt_e1", "checkout.session.completed", 10, ORDER),
        event("evt_e3", "checkout.session.async_payment_succeeded", 400, {**PAID_LATER, "payment_intent": "pi_e"}),
        event("evt_e4", "checkout.session.async_payment_succeeded", 403, PAID_LATER),
        event("evt_e2", "checkout.session.completed", 5, {**ORDER, "amount_total": 4444}),
    ],
    "plink_e": [
        event("evt_l1", "payment_link.created", 2, LINK),
        event("evt_l2", "payment_link.updated", 3, {**LINK, "active": False}, previous={"active": True}),
    ],
    # One step under two ids, then two steps of one second that arrive the wrong way round.
    "plink_t": [
        event("evt_t1", "payment_link.created", 2, TANGLED),
        event("evt_t2", "payment_link.updated", 3, {**TANGLED, "active": False}, previous={"active": True}),
        event("evt_t3", "payment_link.updated", 3, {**TANGLED, "active": False}, previous={"active": True}),
        event("evt_t4", "payment_link.updated", 5, {**TANGLED, "active": False}, previous={"active": True}),
        event("evt_t5", "payment_link.updated", 5, TANGLED, previous={"active": False}),
    ],
    "cus_e": [
        event("evt_b1", "customer.created", 30, {**CUSTOMER, "balance": 0, "delinquent": False}),
        event("evt_b2", "customer.updated", 40, CUSTOMER, previous={"balance": 0, "delinquent": False}),
    ],
    "cn_e": [
        event("evt_n1", "credit_note.created", 20, NOTE),
        event("evt_n2", "credit_note.voided", 25, {**NOTE, "status": "void", "voided_at": T + 25}),
    ],
    "cs_c": ended_by_charge(
        "c",
        event("evt_c2", "charge.succeeded", 10, hold("ch_c", payment_intent="pi_c")),
        event("evt_c3", "charge.captured", 900, charge("ch_c", payment_intent="pi_c")),
    ),
    "cs_x": ended_by_charge(
        "x",
        event("evt_x2", "charge.succeeded", 10, hold("ch_x", payment_intent="pi_x")),
        event("evt_x3", "charge.expired", 800, released("ch_x", payment_intent="pi_x")),
    ),
    "cs_k": ended_by_charge("k", event("evt_k2", "payment_intent.canceled", 700, canceled_intent("pi_k", at=700))),
}


@pytest.fixture(scope="module")
def explained(services: Services) -> Iterator[str]:
    """Return the URL of a database into which the arrivals came, minute by minute."""
    with migrated_database(services) as database_url:
        engine = database.engine(database_url)
        for bodies in ARRIVALS.values():
            for minute, body in enumerate(bodies):
                received_at = ledger.NOW + timedelta(minutes=minute)
                ledger.record(engine, [replace(ledger.delivery(body), received_at=received_at)])
                ledger.fold(engine)
        engine.dispose()
        yield database_url


@cache
def explain(url: str, group: str, id_: str, *options: str) -> Any:  # noqa: ANN401 - what JSON holds
    """Return the explanation that the command prints as JSON."""
    ran = payfold(group, "explain", id_, *options, "--format", "json", DATABASE_URL=url)
    assert (ran.code, ran.err) == (0, ""), ran.err
    return ran.json


def set_by(found: Any) -> dict[str, str | None]:  # noqa: ANN401 - as above
    """Return the event that set each column; None of a column that no event set."""
    return {each["column"]: each["event_id"] for each in found["columns"]}


def moment(text: str | None) -> datetime | None:
    """Return the time that JSON holds."""
    return None if text is None else datetime.fromisoformat(text)


def test_an_order(explained: str) -> None:
    """The last event that carries a column sets it; for a reference the last not null, for a moment the first."""
    found = explain(explained, "orders", "cs_e")
    row, by = found["row"], set_by(found)

    assert (found["table"], found["id"], found["anomalies"]) == ("orders", "cs_e", [])
    assert (row["status"], row["amount_total"], row["event_id"]) == ("paid", 4004, "evt_e4")
    assert [each["event_id"] for each in found["timeline"]] == ["evt_e2", "evt_e1", "evt_e3", "evt_e4"]
    assert (by["amount_total"], by["amount_tax"], by["payment_status"]) == ("evt_e4", "evt_e4", "evt_e4")
    assert (row["client_reference_id"], by["client_reference_id"]) == ("cart_e", "evt_e1")
    assert (row["payment_intent"], by["payment_intent"]) == ("pi_e", "evt_e3")
    assert (moment(row["completed_at"]), by["completed_at"]) == (at(T + 5), "evt_e2")
    assert (moment(row["paid_at"]), by["paid_at"]) == (at(T + 400), "evt_e3")
    assert (row["expired_at"], by["expired_at"], by["failed_at"]) == (None, None, None)
    # No event sets a column that is inferred from others.
    assert by["status"] is None
    assert {each["column"]: each["value"] for each in found["columns"]} == {name: row[name] for name in by}


def test_the_columns_of_each_event(explained: str) -> None:
    """An event's `sets` are the columns that name it, and each event has a verdict and its times."""
    found = explain(explained, "orders", "cs_e")
    timeline = {each["event_id"]: each for each in found["timeline"]}

    assert "paid_at" in timeline["evt_e3"]["sets"]
    assert timeline["evt_e2"]["sets"] == ["completed_at"]
    assert "paid_at" not in timeline["evt_e4"]["sets"]
    assert {each: (moment(timeline[each]["created"]), moment(timeline[each]["received_at"])) for each in timeline} == {
        "evt_e1": (at(T + 10), ledger.NOW),
        "evt_e2": (at(T + 5), ledger.NOW + timedelta(minutes=3)),
        "evt_e3": (at(T + 400), ledger.NOW + timedelta(minutes=1)),
        "evt_e4": (at(T + 403), ledger.NOW + timedelta(minutes=2)),
    }
    assert timeline["evt_e3"]["type"] == "checkout.session.async_payment_succeeded"
    assert all(each["verdict"] and each["source"] == "webhook" for each in found["timeline"])


@pytest.mark.parametrize(
    ("as_of", "events", "status", "amount", "completed_at", "paid_at"),
    [
        ("2026-11-22T12:00:00", ["evt_e1"], "processing", 5004, 10, None),
        ("2026-11-22T12:01:30", ["evt_e1", "evt_e3"], "paid", 4004, 10, 400),
        ("2026-11-22T12:03:00", ["evt_e2", "evt_e1", "evt_e3", "evt_e4"], "paid", 4004, 5, 400),
    ],
)
def test_an_order_as_of(
    explained: str,
    as_of: str,
    events: list[str],
    status: str,
    amount: int,
    completed_at: int,
    paid_at: int | None,
) -> None:
    """With `--as-of` the row is from the events received up to that second, whenever they were created."""
    found = explain(explained, "orders", "cs_e", "--as-of", as_of)
    row = found["row"]

    assert [each["event_id"] for each in found["timeline"]] == events
    assert (row["status"], row["amount_total"], row["event_id"]) == (status, amount, events[-1])
    assert moment(row["completed_at"]) == at(T + completed_at)
    assert moment(row["paid_at"]) == (None if paid_at is None else at(T + paid_at))


def test_as_of_before_all(explained: str) -> None:
    """As of a time before the first event there is no row, which the command reports with exit 1 and no traceback."""
    ran = payfold("orders", "explain", "cs_e", "--as-of", "2026-11-22T11:59:59", DATABASE_URL=explained)

    assert ran.code == 1
    assert "none had been received by" in ran.out + ran.err
    assert "Traceback" not in ran.err


def test_a_payment_link(explained: str) -> None:
    """`created` is the created event's, the rest the last event's; as of 12:00 the link was active."""
    found = explain(explained, "payment-links", "plink_e")
    before = explain(explained, "payment-links", "plink_e", "--as-of", "2026-11-22T12:00:00")

    assert (found["table"], found["row"]["active"], found["row"]["event_id"]) == ("payment_links", False, "evt_l2")
    assert set_by(found) == {
        "id": None,
        "active": "evt_l2",
        "url": "evt_l2",
        "currency": "evt_l2",
        "metadata": "evt_l2",
        "created": "evt_l1",
    }
    assert (before["row"]["active"], before["row"]["event_id"]) == (True, "evt_l1")


def test_a_tie_and_a_twin(explained: str) -> None:
    """In one second the chain decides, not arrival or id; of equal steps the greatest id is kept (design.md rule 4)."""
    found = explain(explained, "payment-links", "plink_t")
    verdicts = {each["event_id"]: each["verdict"] for each in found["timeline"]}

    assert (found["row"]["active"], found["row"]["event_id"]) == (False, "evt_t4")
    assert [each for each in verdicts if each != "evt_t2"] == ["evt_t1", "evt_t3", "evt_t5", "evt_t4"]
    assert "decides" in verdicts["evt_t4"]
    assert "tie" in verdicts["evt_t5"]
    assert [each for each in verdicts if "duplicate" in verdicts[each]] == ["evt_t2"]
    assert set_by(found)["created"] == "evt_t1"


def test_a_customer_and_a_balance(explained: str) -> None:
    """A customer is explained by its id, and its balance with `--currency` in upper or lower case."""
    found = explain(explained, "customers", "cus_e")
    balance = explain(explained, "customers", "cus_e", "--currency", "USD")
    before = explain(explained, "customers", "cus_e", "--currency", "usd", "--as-of", "2026-11-22T12:00:59")

    assert (found["table"], found["row"]["test_clock"], found["row"]["delinquent"]) == ("customers", "clock_1", True)
    assert set_by(found)["delinquent"] == "evt_b2"
    assert (balance["table"], balance["row"]["amount"], set_by(balance)["amount"]) == ("balances", -500, "evt_b2")
    assert (before["row"]["amount"], set_by(before)["amount"]) == (0, "evt_b1")


def test_a_credit_note(explained: str) -> None:
    """`voided_at` is the voiding event's; no event reports the amount to the balance (210 - 110 - 20)."""
    found = explain(explained, "credit-notes", "cn_e")
    row, by = found["row"], set_by(found)

    assert (found["table"], row["status"], by["status"]) == ("credit_notes", "void", "evt_n2")
    assert (moment(row["voided_at"]), by["voided_at"]) == (at(T + 25), "evt_n2")
    assert (row["to_balance_amount"], by["to_balance_amount"]) == (80, None)
    before = explain(explained, "credit-notes", "cn_e", "--as-of", "2026-11-22T12:00:00")
    assert (before["row"]["status"], before["row"]["voided_at"]) == ("issued", None)


def test_the_table_for_people(explained: str) -> None:
    """The table shows money with its currency, the timeline with its events, and the time of `--as-of`."""
    ran: Ran = payfold("orders", "explain", "cs_e", "--as-of", "2026-11-22T12:00:00", DATABASE_URL=explained)

    assert ran.code == 0
    assert "50.04 USD" in ran.out
    assert "2.50 USD" in ran.out
    assert "evt_e1" in ran.out
    assert "evt_e3" not in ran.out
    assert "2026-11-22 12:00:00" in ran.err


# Ended by a charge or an intent: the order, its status, the moment, and the event that set it.
BY_CHARGE = [
    ("cs_c", "paid", "paid_at", 900, "evt_c3"),
    ("cs_x", "failed", "failed_at", 800, "evt_x3"),
    ("cs_k", "failed", "failed_at", 700, "evt_k2"),
]


@pytest.mark.parametrize(("order", "status", "column", "seconds", "event_id"), BY_CHARGE)
def test_ended_by_a_charge(explained: str, order: str, status: str, column: str, seconds: int, event_id: str) -> None:
    """The charge's event set the moment (rule 10), which `--as-of` an earlier time was not yet known."""
    found = explain(explained, "orders", order)
    before = explain(explained, "orders", order, "--as-of", "2026-11-22T12:00:00")

    assert found["row"]["status"] == status
    assert (moment(found["row"][column]), set_by(found)[column]) == (at(T + seconds), event_id)
    assert (before["row"]["status"], before["row"][column]) == ("processing", None)
