"""An order's refunds are announced and shown alike in any order of arrival."""

import random
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import permutations
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from sqlalchemy import Engine

from schemas import database, observations
from tests import ledger
from tests.command import payfold
from worker.folding import order_refunds
from worker.folds import ROW_SPECS
from worker.folds.facts import Row, Subject
from worker.proof.explain import explain

Body = bytes
START = 1_700_000_000
WORLDS_MAX = 120


def event(number: int, kind: str, at: int, about: Mapping[str, Any], previous: Mapping[str, Any] | None = None) -> Body:
    """Return an event *at* so many seconds after the start, as Stripe sends it."""
    data = {"object": about} | ({} if previous is None else {"previous_attributes": previous})
    return msgspec.json.encode(
        {
            "id": f"evt_{number}",
            "object": "event",
            "api_version": "2024-06-20",
            "created": START + at,
            "type": kind,
            "livemode": False,
            "data": data,
        }
    )


ORDER: Mapping[str, Any] = {
    "id": "cs_1",
    "object": "checkout.session",
    "amount_subtotal": 1500,
    "amount_total": 1500,
    "created": START,
    "currency": "usd",
    "mode": "payment",
    "payment_intent": "pi_1",
    "invoice": None,
    "payment_status": "paid",
    "status": "complete",
    "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
}


def session(**fields: object) -> Body:
    """Return a session of 1500 usd that is complete and paid."""
    return event(1, "checkout.session.completed", 10, {**ORDER, **fields})


def charge(number: int, at: int, kind: str = "charge.refunded", **fields: object) -> Body:
    """Return an event of a charge of 1500 usd, which is captured whole."""
    about = {
        "id": "ch_1",
        "object": "charge",
        "amount": 1500,
        "amount_captured": 1500,
        "amount_refunded": 0,
        "captured": True,
        "created": START + 10,
        "currency": "usd",
        "disputed": False,
        "payment_intent": "pi_1",
        "refunded": False,
        "status": "succeeded",
    }
    return event(number, kind, at, about | fields)


def refund(number: int, at: int, amount: int, kind: str = "refund.created", **fields: object) -> Body:
    """Return an event of a refund of *amount*, made at 1000, that names charge and intent."""
    about = {
        "id": "re_1",
        "object": "refund",
        "amount": amount,
        "charge": "ch_1",
        "created": START + 1000,
        "currency": "usd",
        "payment_intent": "pi_1",
        "reason": "requested_by_customer",
        "status": "succeeded",
    }
    return event(number, kind, at, about | fields)


def payment(number: int, **way: object) -> Body:
    """Return the event of a payment of the invoice by *way*."""
    about = {
        "id": "inpay_1",
        "object": "invoice_payment",
        "amount_paid": 1500,
        "currency": "usd",
        "invoice": "in_1",
        "payment": {"type": "payment_intent", **way},
        "status": "paid",
    }
    return event(number, "invoice_payment.paid", 10, about)


BY_INVOICE: Mapping[str, Any] = {"mode": "subscription", "payment_intent": None, "invoice": "in_1"}
PAID = charge(2, 10, "charge.succeeded")
UNCAPTURED: Mapping[str, Any] = {"captured": False, "amount_captured": 0}
LATE: Mapping[str, Any] = {"created": START + 1200}

HISTORIES: Mapping[str, tuple[Sequence[Body], int | None, str | None]] = {
    "the charge alone reports it": ([session(), PAID, charge(3, 1000, amount_refunded=500)], 500, "partial"),
    "a refund that names its charge alone": (
        [session(), PAID, refund(3, 1000, 1500, payment_intent=None)],
        1500,
        "full",
    ),
    "a refund that names its intent alone": (
        [session(), charge(2, 1000, amount_refunded=500), refund(3, 1000, 500, charge=None)],
        500,
        "partial",
    ),
    "the charge reports more than the refunds that are known": (
        [
            session(),
            charge(2, 1000, amount_refunded=1000),
            charge(3, 3000, amount_refunded=1500, refunded=True),
            refund(4, 3000, 500, created=START + 3000),
        ],
        1500,
        "full",
    ),
    "a refund that is newer than the charge's report": (
        [session(), charge(2, 1000, amount_refunded=500), refund(3, 1200, 300, created=START + 1200)],
        800,
        "partial",
    ),
    "through an invoice payment with an intent": (
        [
            session(**BY_INVOICE),
            payment(2, payment_intent="pi_1"),
            PAID.replace(b'"evt_2"', b'"evt_3"'),
            refund(4, 1000, 900, payment_intent=None),
        ],
        900,
        "partial",
    ),
    "through an invoice payment with a charge": (
        [
            session(**BY_INVOICE),
            payment(2, charge="ch_1"),
            PAID.replace(b'"evt_2"', b'"evt_3"'),
            refund(4, 1000, 900, charge=None),
        ],
        900,
        "partial",
    ),
    "through an invoice payment, by the charge's report": (
        [session(**BY_INVOICE), payment(2, payment_intent="pi_1"), charge(3, 1000, amount_refunded=1500)],
        1500,
        "full",
    ),
    "through a charge that names its invoice": (
        [
            session(**BY_INVOICE),
            charge(2, 10, "charge.succeeded", invoice="in_1"),
            charge(3, 2000, amount_refunded=1500, refunded=True, invoice="in_1"),
            refund(4, 2000, 1500, charge=None),
        ],
        1500,
        "full",
    ),
    "a refund that fails after the charge's report": (
        [
            session(),
            charge(2, 1000, amount_refunded=500),
            refund(3, 1000, 500),
            refund(4, 2000, 500, "refund.failed", status="failed"),
        ],
        0,
        "none",
    ),
    "a refund that failed, and another that the charge alone reports": (
        [
            session(),
            charge(2, 3000, amount_refunded=200),
            refund(3, 1000, 500),
            refund(4, 2000, 500, "refund.failed", status="failed"),
        ],
        200,
        "partial",
    ),
    "a hold that was released": (
        [
            session(payment_status="unpaid"),
            charge(2, 10, "charge.succeeded", **UNCAPTURED),
            charge(3, 2000, "charge.expired", **UNCAPTURED, amount_refunded=1500, refunded=True),
            refund(4, 2000, 1500, reason="expired_uncaptured_charge"),
        ],
        0,
        "none",
    ),
    "captured in part, and the rest reported as refunded": (
        [
            session(),
            charge(2, 10, "charge.succeeded", **UNCAPTURED),
            charge(3, 500, "charge.captured", amount_captured=1000, amount_refunded=500),
            charge(4, 1000, amount_captured=1000, amount_refunded=1500, refunded=True),
            refund(5, 1000, 1000),
        ],
        1000,
        "full",
    ),
    "captured in part, and no more than the rest is reported": (
        [
            session(),
            charge(2, 10, "charge.succeeded", **UNCAPTURED),
            charge(3, 500, "charge.captured", amount_captured=1000, amount_refunded=500),
        ],
        0,
        "none",
    ),
    "captured in part, of which all was refunded": (
        [session(), refund(2, 1000, 500), charge(3, 2000, "charge.captured", amount_captured=500, amount_refunded=500)],
        500,
        "full",
    ),
    "captured in part, as reported before the refund": (
        [session(), charge(2, 500, "charge.captured", amount_captured=500), refund(3, 1000, 500, charge=None)],
        500,
        "full",
    ),
    "the order's total is corrected": (
        [session(), event(2, "checkout.session.completed", 20, {**ORDER, "amount_total": 500}), refund(3, 1000, 500)],
        500,
        "full",
    ),
    "captured in part, and it is not known what was refunded": (
        [
            session(),
            charge(2, 10, "charge.succeeded", **UNCAPTURED),
            charge(3, 500, "charge.captured", amount_captured=1000, amount_refunded=700),
        ],
        None,
        None,
    ),
    "it is not known how much was captured": (
        [session(), charge(2, 1000, amount_captured=None, amount_refunded=500)],
        None,
        None,
    ),
    "in the buyer's currency": (
        [
            session(
                currency="cad",
                amount_subtotal=2055,
                amount_total=2055,
                currency_conversion={"amount_subtotal": 1500, "amount_total": 1500, "source_currency": "usd"},
            ),
            charge(2, 10, "charge.succeeded", currency="cad", amount=2055, amount_captured=2055),
            charge(3, 1000, currency="cad", amount=2055, amount_captured=2055, amount_refunded=2055),
            refund(4, 1000, 2055, currency="cad"),
        ],
        None,
        "full",
    ),
    "an invoice that nothing is known of": ([session(**BY_INVOICE), PAID, refund(3, 1000, 500)], None, None),
    "a second charge pays": (
        [
            charge(2, 5, "charge.failed", id="ch_0", status="failed", captured=False, amount_captured=0),
            PAID.replace(b'"evt_2"', b'"evt_3"'),
            session(),
            refund(4, 1000, 1500, payment_intent=None),
        ],
        1500,
        "full",
    ),
}


UNKNOWN = (
    "captured in part, and it is not known what was refunded",
    "it is not known how much was captured",
    "in the buyer's currency",
)
"""Histories with a refund whose sum is unknown, which is announced."""


def worlds(bodies: Sequence[Body], name: str) -> dict[str, list[Body]]:
    """Return *bodies* in every order, or as many as matter, each in an account of its own."""
    orders = list(permutations(bodies))
    chosen = random.Random(name).sample(orders, min(len(orders), WORLDS_MAX))
    return {f"acct_{name}_{number}": list(order) for number, order in enumerate(chosen)}


@pytest.mark.parametrize("split", [False, True], ids=["one by one", "in batches"])
def test_every_order_of_arrival(engine: Engine, split: bool) -> None:  # noqa: FBT001 - pytest passes by name
    """In every order of arrival, one by one or in batches, the row and the last announced change are the same."""
    chance = random.Random(11)
    waiting: dict[str, list[Body]] = {}
    for name, (bodies, _, _) in HISTORIES.items():
        waiting |= worlds(bodies, name)
    while any(waiting.values()):
        arriving = []
        for label, bodies in waiting.items():
            count = chance.randint(0, len(bodies)) if split else 1
            arriving += [ledger.delivery(body, account=label) for body in bodies[:count]]
            waiting[label] = bodies[count:]
        if arriving:
            ledger.record(engine, arriving)
            ledger.fold(engine)

    assert ledger.rows(engine, "SELECT id, reason FROM events WHERE state = 'parked'") == []
    for name, (_, amount, status) in HISTORIES.items():
        of_name = {"of": f"acct_{name}_%"}
        books = ledger.rows(engine, "SELECT * FROM order_book WHERE account LIKE :of", **of_name)
        assert {(row["refunded_amount"], row["refund_status"]) for row in books} == {(amount, status)}, name
        changes = ledger.rows(engine, _LAST_CHANGES, **of_name)
        last = {row["account"]: (row["amount"], row["status"]) for row in changes}
        assert set(last.values()) <= {(amount, status)}, name
        if amount or name in UNKNOWN:
            assert len(last) == len(books), name


_LAST_CHANGES = """
SELECT DISTINCT ON (account) account, (after ->> 'refunded_amount')::bigint AS amount,
    after ->> 'refund_status' AS status
FROM changes WHERE kind = 'order.refund_changed' AND account LIKE :of ORDER BY account, seq DESC
"""


# Disputes.


def dispute(number: int, at: int, status: str, kind: str = "charge.dispute.updated") -> Body:
    """Return an event of a dispute of 1500 usd."""
    about = {
        "id": "dp_1",
        "object": "dispute",
        "amount": 1500,
        "charge": "ch_1",
        "currency": "usd",
        "payment_intent": "pi_1",
        "reason": "fraudulent",
        "status": status,
    }
    return event(number, kind, at, about)


@pytest.mark.parametrize(
    ("statuses", "kinds", "amount"),
    [
        (["warning_needs_response"], [], 0),
        (["warning_needs_response", "warning_under_review", "warning_closed"], ["dispute.closed"], 0),
        (["warning_needs_response", "needs_response"], ["dispute.opened"], 1500),
        (["warning_closed", "needs_response", "under_review"], ["dispute.closed", "dispute.opened"], 1500),
        (["needs_response", "under_review", "won"], ["dispute.opened", "dispute.closed"], 0),
        (["needs_response", "lost"], ["dispute.opened", "dispute.closed"], 1500),
        (["needs_response", "prevented"], ["dispute.opened", "dispute.closed"], 0),
        (["lost"], ["dispute.closed"], 1500),
        (["needs_response", "lost", "appeal_needs_response"], ["dispute.opened", "dispute.closed"], 1500),
        ([None], [], 1500),
    ],
    ids=str,
)
def test_an_inquiry_is_no_dispute(engine: Engine, statuses: list[str], kinds: list[str], amount: int) -> None:
    """A dispute opens at its first status but an inquiry, closes by status, and counts while money may be gone."""
    ledger.take_in(
        engine,
        session(),
        PAID,
        *(dispute(number, 1000 + number, status) for number, status in enumerate(statuses, 10)),
    )

    assert ledger.kinds(engine, "dp_1") == kinds
    assert ledger.rows(engine, "SELECT disputed_amount FROM order_book") == [{"disputed_amount": amount}]


def test_a_dispute_s_status_that_stripe_has_yet_to_invent(engine: Engine) -> None:
    """An unknown status is kept, and is an anomaly until a known one follows; known statuses are none."""
    ledger.take_in(engine, dispute(1, 1000, "pondered"))
    first = ledger.anomalies(engine)
    for number, status in enumerate(("warning_closed", "appeal_under_review", "won"), 2):
        ledger.take_in(engine, dispute(number, 1000 + number, status))

    assert (first, ledger.anomalies(engine)) == (["unknown_status"], [])


def test_a_dispute_that_closes_twice() -> None:
    """A dispute that was lost, appealed and won has a change for each end, and none for the appeal."""
    statuses = ("needs_response", "lost", "appeal_needs_response", "won")
    rows: list[Row] = [{**ROW_SPECS["disputes"].empty, "status": status} for status in statuses]

    steps = [ROW_SPECS["disputes"].changes(before, after) for before, after in zip([None, *rows], rows, strict=False)]

    assert [[(each.kind, each.after["status"]) for each in step] for step in steps] == [
        [("dispute.opened", "needs_response")],
        [("dispute.closed", "lost")],
        [],
        [("dispute.closed", "won")],
    ]


@pytest.mark.parametrize(("currency", "amount", "shown"), [("cad", 2055, None), ("cad", 0, 0), ("usd", 900, 900)])
def test_a_credit_in_another_currency(engine: Engine, currency: str, amount: int, shown: int | None) -> None:
    """A credit in another currency than the order's makes the credited amount null, not zero."""
    note = {
        "id": "cn_1",
        "object": "credit_note",
        "amount": amount,
        "currency": currency,
        "invoice": "in_1",
        "status": "issued",
        "created": START,
    }

    ledger.take_in(engine, session(**BY_INVOICE), event(2, "credit_note.created", 20, note))

    assert ledger.rows(engine, "SELECT credited_amount FROM order_book") == [{"credited_amount": shown}]


def test_an_order_without_a_currency(engine: Engine) -> None:
    """A session of 2019 has no currency, and so a refunded amount only if its charge shows that it is zero."""
    old = {"id": "cs_1", "object": "checkout.session", "mode": "payment", "payment_intent": "pi_1"}

    ledger.take_in(engine, event(1, "checkout.session.completed", 10, old), PAID)

    (row,) = ledger.rows(engine, "SELECT refunded_amount, disputed_amount, refund_status FROM order_book")
    assert row == {"refunded_amount": None, "disputed_amount": 0, "refund_status": "none"}


def test_a_refund_that_is_ignored(engine: Engine) -> None:
    """After an operator ignores an order's refund the refunded amount is zero, and the change is announced."""
    ledger.take_in(engine, session(), PAID, refund(3, 1000, 1500))
    about = {"object": "event", "id": "evt_3", "reason": "a test"}
    at = int(ledger.NOW.timestamp())
    word = observations.observe("payfold.event.ignored", about, account="", livemode=False, created=at, now=ledger.NOW)

    ledger.record(engine, [word])
    ledger.fold(engine)

    changes = ledger.rows(engine, "SELECT after FROM changes WHERE kind = 'order.refund_changed' ORDER BY seq")
    assert [row["after"]["refunded_amount"] for row in changes] == [1500, 0]


def test_a_rename_and_a_swap_find_an_unannounced_refund(engine: Engine) -> None:
    """A rename and a swap find an unannounced refund that only the charge reports."""
    ledger.take_in(engine, session(), charge(3, 1000, amount_refunded=500))
    ledger.execute(engine, "DELETE FROM changes WHERE kind = 'order.refund_changed'")

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        found = [order_refunds.unannounced(cursor, announced_in="public"), order_refunds.unannounced_of(cursor, "")]

    assert [[(row["subject_id"], row["after"]["refunded_amount"]) for row in rows] for rows in found] == [
        [("cs_1", 500)],
        [("cs_1", 500)],
    ]


# Explanations.


def test_an_explanation_shows_contradictions(engine: Engine, database_url: str) -> None:
    """An explanation lists the charges and refunds known at its time, and a charge that reports more than its refunds.

    A charge that reports 500 refunded without a known refund is shown so, now and as of that time.
    """
    at = ledger.NOW
    for body in (session(), PAID, charge(3, 1000, amount_refunded=500), refund(4, 1000, 500)):
        at += timedelta(minutes=1)
        ledger.record(engine, [replace(ledger.delivery(body), received_at=at)])
        ledger.fold(engine)
    order = Subject("orders", "", False, "cs_1")  # noqa: FBT003 - the mode

    def shown(minutes: int | None) -> list[tuple[object, ...]]:
        as_of = None if minutes is None else ledger.NOW + timedelta(minutes=minutes)
        names = ("id", "amount", "amount_refunded", "amount_by_refunds", "verdict")
        return [tuple(row.get(name) for name in names) for row in explain(engine, order, as_of=as_of).money]

    agrees = "its refunds come to what it reports"
    contradicts = "it reports 500 refunded, which is more than its refunds, 0"
    assert shown(1) == []
    assert shown(2) == [("ch_1", 1500, 0, 0, agrees)]
    assert shown(3) == [("ch_1", 1500, 500, 0, contradicts)]
    assert shown(4) == shown(None) == [("ch_1", 1500, 500, 500, agrees), ("re_1", 500, None, None, "it counts")]
    printed = payfold("orders", "explain", "cs_1", DATABASE_URL=database_url)
    assert "The charges and refunds behind refunded_amount" in printed.out
    assert "5.00 USD" in printed.out


@pytest.mark.parametrize(
    ("bodies", "verdicts"),
    [
        (HISTORIES["a hold that was released"][0], {"ch_1": "a hold that was released", "re_1": "it does not count"}),
        (HISTORIES["in the buyer's currency"][0], {"ch_1": "its refunds", "re_1": "it counts, in another currency"}),
        (HISTORIES["through a charge that names its invoice"][0], {"ch_1": "its refunds", "re_1": "it counts"}),
        (HISTORIES["through an invoice payment with a charge"][0], {"ch_1": "it reports 0", "re_1": "it counts"}),
    ],
)
def test_the_verdicts_of_an_explanation(engine: Engine, bodies: Sequence[Body], verdicts: dict[str, str]) -> None:
    """Each charge and refund has its verdict, whichever way it is linked to the order."""
    ledger.take_in(engine, *bodies)
    order = Subject("orders", "", False, "cs_1")  # noqa: FBT003 - the mode

    for as_of in (None, ledger.NOW + timedelta(days=1)):
        found = {row["id"]: row["verdict"] for row in explain(engine, order, as_of=as_of).money}
        assert found.keys() == verdicts.keys()
        assert all(found[id_].startswith(words) for id_, words in verdicts.items()), found


# By history: the sum of the refunds of the charge ch_1, and the verdicts.
VERDICTS: Mapping[str, tuple[Sequence[Body], int | None, Mapping[str, str]]] = {
    "refunds in two currencies": (
        [
            session(),
            charge(2, 3000, amount_refunded=1200),
            refund(3, 1000, 500),
            refund(4, 1000, 700, id="re_2", currency="cad"),
        ],
        None,
        {
            "ch_1": "it reports 1200 refunded, and its refunds are in another currency, or of an unknown amount",
            "re_1": "it counts",
            "re_2": "it counts, in another currency than the order",
        },
    ),
    "a refund that failed is in another currency": (
        [
            session(),
            charge(2, 3000, amount_refunded=500),
            refund(3, 1000, 500),
            refund(4, 2000, 700, "refund.failed", id="re_2", currency="cad", status="failed"),
        ],
        500,
        {
            "ch_1": "its refunds come to what it reports",
            "re_1": "it counts",
            "re_2": "it does not count: it failed",
        },
    ),
    "captured in part, the rest reported as refunded": (
        HISTORIES["captured in part, and the rest reported as refunded"][0],
        1000,
        {"ch_1": "its refunds come to what it reports, less the 500 that was released", "re_1": "it counts"},
    ),
    "captured in part, and no refund": (
        HISTORIES["captured in part, and no more than the rest is reported"][0],
        0,
        {"ch_1": "its refunds come to what it reports, less the 500 that was released"},
    ),
    "captured in part, the refund is newer": (
        [*HISTORIES["captured in part, and no more than the rest is reported"][0], refund(4, 1000, 200)],
        200,
        {"ch_1": "it reports 500 refunded: its refunds are newer", "re_1": "it counts"},
    ),
    "captured in part, and nothing explains it": (
        HISTORIES["captured in part, and it is not known what was refunded"][0],
        0,
        {"ch_1": "it reports 700 refunded, or 200 without what was released, and its refunds come to 0"},
    ),
    "a refund is newer": (
        [session(), PAID, refund(3, 1000, 500)],
        500,
        {"ch_1": "it reports 0 refunded: its refunds are newer", "re_1": "it counts"},
    ),
    "one refund of two is newer": (
        [
            session(),
            charge(2, 1000, amount_refunded=500),
            refund(3, 1000, 500),
            refund(4, 1200, 300, id="re_2", **LATE),
        ],
        800,
        {"ch_1": "it reports 500 refunded: some of its refunds are newer", "re_1": "it counts", "re_2": "it counts"},
    ),
    "a refund is newer, and another is not known": (
        [session(), charge(2, 1000, amount_refunded=500), refund(3, 1200, 300, **LATE)],
        300,
        {
            "ch_1": "it reports 500 refunded, which is more than its refunds by then, 0: its refunds are newer",
            "re_1": "it counts",
        },
    ),
    "a refund failed since": (
        HISTORIES["a refund that fails after the charge's report"][0],
        0,
        {
            "ch_1": "it reports 500 refunded: some of its refunds failed or were canceled since",
            "re_1": "it does not count: it failed",
        },
    ),
    "a refund was canceled since": (
        [
            session(),
            charge(2, 1000, amount_refunded=500),
            refund(3, 1000, 500),
            refund(4, 2000, 500, "refund.updated", status="canceled"),
        ],
        0,
        {
            "ch_1": "it reports 500 refunded: some of its refunds failed or were canceled since",
            "re_1": "it does not count: it was canceled",
        },
    ),
    # At 2500 the charge does not count the refund that failed at 2000: 300 is the other's amount.
    "a refund failed before, and another counts": (
        [
            session(),
            refund(2, 1000, 500),
            refund(3, 2000, 500, "refund.failed", status="failed"),
            refund(4, 2400, 300, id="re_2", created=START + 2400),
            charge(5, 2500, amount_refunded=300),
        ],
        300,
        {
            "ch_1": "its refunds come to what it reports",
            "re_1": "it does not count: it failed",
            "re_2": "it counts",
        },
    ),
    # The charge reports only a refund that failed since; the other is newer.
    "a refund failed since, and another is newer": (
        [
            session(),
            charge(2, 1000, amount_refunded=500),
            refund(3, 1000, 500),
            refund(4, 2000, 500, "refund.failed", status="failed"),
            refund(5, 2400, 300, id="re_2", created=START + 2400),
        ],
        300,
        {
            "ch_1": "it reports 500 refunded: its refunds are newer",
            "re_1": "it does not count: it failed",
            "re_2": "it counts",
        },
    ),
    "less is reported than is known": (
        [session(), charge(2, 3000, amount_refunded=200), refund(3, 1000, 500)],
        500,
        {"ch_1": "it reports 200 refunded, which is less than its refunds, 500", "re_1": "it counts"},
    ),
    "a released hold, and a refund that names only its intent": (
        [
            session(payment_status="unpaid"),
            charge(2, 2000, "charge.expired", **UNCAPTURED, amount_refunded=1500, refunded=True),
            refund(3, 2000, 1500, charge=None),
        ],
        0,
        {
            "ch_1": "a hold that was released: nothing came, and nothing came back",
            "re_1": "it does not count: it releases a hold",
        },
    ),
    "a released hold before a captured charge, and a refund that names only their intent": (
        [
            session(),
            charge(2, 500, "charge.expired", **UNCAPTURED, id="ch_0", amount_refunded=1500, refunded=True),
            charge(3, 2000, amount_refunded=1500, refunded=True),
            refund(4, 2000, 1500, charge=None),
        ],
        1500,
        {
            "ch_0": "a hold that was released: nothing came, and nothing came back",
            "ch_1": "its refunds come to what it reports",
            "re_1": "it counts",
        },
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_an_explanation_of_a_charge_s_refunds(engine: Engine, name: str) -> None:
    """A charge's refunds are summed in its currency, and contradict it only if they are older than its last event."""
    bodies, amount, verdicts = VERDICTS[name]
    ledger.take_in(engine, *bodies)
    order = Subject("orders", "", False, "cs_1")  # noqa: FBT003 - the mode

    for as_of in (None, ledger.NOW + timedelta(days=1)):
        money = {row["id"]: row for row in explain(engine, order, as_of=as_of).money}
        assert {id_: row["verdict"] for id_, row in money.items()} == verdicts
        assert money["ch_1"]["amount_by_refunds"] == amount
