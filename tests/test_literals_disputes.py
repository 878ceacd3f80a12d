"""A dispute's row, its changes and an order's disputed amount, by docs.stripe.com/api/disputes/object.

Statuses are those of the SDK 16.1.0. docs.stripe.com/api/events/types: `charge.dispute.closed` "occurs when a dispute
is closed and the dispute status changes to `lost`, `warning_closed`, or `won`". An inquiry (`warning_*`) moves no money
(docs.stripe.com/disputes/how-disputes-work), and neither does a prevented dispute, which is "resolved before it is
raised to a formal chargeback" (docs.stripe.com/changelog, 2025-08-27). An appeal follows a lost dispute
(stripe-facts section 11).
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.local.services import Services
from tests import ledger
from tests.literals import assert_rows, at
from tests.stripe_payments import (
    T,
    arrived_in_every_order,
    arrived_in_every_way,
    charge,
    dispute,
    event,
    session,
    suffix,
    suffixes,
    ways,
)
from worker.proof import rebuild, shadow, swap

NEWEST: dict[str, Any] = {
    "id": "du_newest",
    "object": "dispute",
    "amount": 1001,
    "balance_transactions": [
        {"id": "txn_1", "object": "balance_transaction", "amount": -1002, "fee": 1500, "net": -2502, "currency": "eur"}
    ],
    "charge": "ch_newest",
    "created": T + 60,
    "currency": "usd",
    "enhanced_eligibility_types": ["visa_compelling_evidence_3"],
    "evidence": {"customer_email_address": None, "cancellation_rebuttal": None},
    "evidence_details": {"due_by": T + 900, "has_evidence": False, "past_due": False, "submission_count": 0},
    "intended_submission_method": "manual",
    "is_charge_refundable": False,
    "livemode": False,
    "metadata": {"order": "7"},
    "network_reason_code": "10.4",
    "payment_intent": "pi_newest",
    "payment_method_details": {
        "card": {"brand": "visa", "case_type": "chargeback", "network_reason_code": "10.5"},
        "type": "card",
    },
    "reason": "product_not_received",
    "status": "under_review",
}
# The recorded charge.dispute.closed of API 2020-03-02, in which no kept field is null.
RECORDED: dict[str, Any] = {
    "id": "dp_recorded",
    "object": "dispute",
    "amount": 1000,
    "balance_transactions": [],
    "charge": "ch_recorded",
    "created": T + 61,
    "currency": "cad",
    "evidence": {"refund_policy": None},
    "evidence_details": {"due_by": T + 901, "has_evidence": False, "past_due": False, "submission_count": 0},
    "is_charge_refundable": True,
    "livemode": False,
    "metadata": {},
    "payment_intent": "pi_recorded",
    "reason": "general",
    "status": "warning_needs_response",
}
ROW_SPECS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "newest": (
        event("evt_newest", "charge.dispute.updated", 70, NEWEST),
        {
            "id": "du_newest",
            "charge": "ch_newest",
            "payment_intent": "pi_newest",
            "status": "under_review",
            "reason": "product_not_received",
            "currency": "usd",
            "amount": 1001,
            "event_id": "evt_newest",
            "as_of": at(T + 70),
        },
    ),
    "recorded": (
        event("evt_recorded", "charge.dispute.closed", 71, RECORDED, version="2020-03-02"),
        {
            "id": "dp_recorded",
            "charge": "ch_recorded",
            "payment_intent": "pi_recorded",
            "status": "warning_needs_response",
            "reason": "general",
            "currency": "cad",
            "amount": 1000,
            "event_id": "evt_recorded",
            "as_of": at(T + 71),
        },
    ),
    # API 2018-11-08 has no payment_intent; the charge is expanded, and names an intent of its own.
    "of_2018": (
        event(
            "evt_old",
            "charge.dispute.funds_withdrawn",
            72,
            {
                **{name: value for name, value in NEWEST.items() if name != "payment_intent"},
                "id": "dp_old",
                "charge": {"id": "ch_old", "object": "charge", "amount": 1003, "payment_intent": "pi_not_named"},
                "reason": "unrecognized",
                "status": "lost",
            },
            version="2018-11-08",
        ),
        {
            "id": "dp_old",
            "charge": "ch_old",
            "payment_intent": None,
            "status": "lost",
            "reason": "unrecognized",
            "currency": "usd",
            "amount": 1001,
            "event_id": "evt_old",
            "as_of": at(T + 72),
        },
    ),
    "expanded": (
        event(
            "evt_expanded",
            "charge.dispute.funds_reinstated",
            73,
            {
                **NEWEST,
                "id": "du_expanded",
                "payment_intent": {"id": "pi_expanded", "object": "payment_intent", "amount": 1004},
                "status": "won",
            },
        ),
        {
            "id": "du_expanded",
            "charge": "ch_newest",
            "payment_intent": "pi_expanded",
            "status": "won",
            "reason": "product_not_received",
            "currency": "usd",
            "amount": 1001,
            "event_id": "evt_expanded",
            "as_of": at(T + 73),
        },
    ),
}


@pytest.mark.parametrize("shape", ROW_SPECS)
def test_every_column(engine: Engine, shape: str) -> None:
    """A dispute's row holds its fields as Stripe's API reference defines them."""
    body, row = ROW_SPECS[shape]

    ledger.take_in(engine, body)

    assert_rows(engine, {"disputes": [row]})


PAID = event("evt_cs@", "checkout.session.completed", 10, session())
CREATED, UPDATED, CLOSED = (f"charge.dispute.{kind}" for kind in ("created", "updated", "closed"))
WITHDRAWN, REINSTATED = (f"charge.dispute.funds_{kind}" for kind in ("withdrawn", "reinstated"))


def reported(id_: str, type_: str, created: int, status: str, /, **fields: object) -> bytes:
    """Return an event of the dispute, *created* seconds after ``T``."""
    return event(id_, type_, created, dispute(status=status, **fields))


# Each status alone: the event that reports it, the order's disputed amount, and the last kind of change.
STATUSES: dict[str, tuple[str, int, str | None]] = {
    "warning_needs_response": (CREATED, 0, None),
    "warning_under_review": (UPDATED, 0, None),
    "warning_closed": (CLOSED, 0, "dispute.closed"),
    "needs_response": (CREATED, 1000, "dispute.opened"),
    "under_review": (UPDATED, 1000, "dispute.opened"),
    "lost": (CLOSED, 1000, "dispute.closed"),
    "won": (CLOSED, 0, "dispute.closed"),
    "appeal_needs_response": (UPDATED, 1000, "dispute.opened"),
    "appeal_under_review": (UPDATED, 1000, "dispute.opened"),
    "prevented": (CREATED, 0, "not documented"),
}


@pytest.fixture(scope="module")
def by_status(services: Services) -> Iterator[Engine]:
    """Return a database with a paid order and a dispute for each status, in both orders."""
    histories = {status: [PAID, reported("evt_du@", row[0], 2000, status)] for status, row in STATUSES.items()}
    with arrived_in_every_order(services, histories) as engine:
        yield engine


@pytest.mark.parametrize("status", STATUSES)
def test_the_disputed_amount_of_each_status(by_status: Engine, status: str) -> None:
    """A dispute counts while its money is or may be gone; an inquiry, a prevented and a won dispute do not."""
    disputed = STATUSES[status][1]
    for end in (suffix(status, 0), suffix(status, 1)):
        (row,) = ledger.rows(by_status, "SELECT * FROM disputes WHERE id = :id", id=f"du{end}")
        (order,) = ledger.rows(by_status, "SELECT * FROM order_book WHERE id = :id", id=f"cs{end}")
        found = ledger.rows(by_status, "SELECT kind FROM anomalies WHERE subject_id = :id", id=f"du{end}")

        assert (row["status"], row["amount"], row["reason"]) == (status, 1000, "fraudulent")
        assert (order["status"], order["disputed_amount"], order["refunded_amount"]) == ("paid", disputed, 0)
        assert found == []


@pytest.mark.parametrize("status", [status for status in STATUSES if status != "prevented"])
def test_the_change_of_each_status(by_status: Engine, status: str) -> None:
    """An inquiry records no opening; the statuses that Stripe's `charge.dispute.closed` names record a closing."""
    kind = STATUSES[status][2]
    for end in (suffix(status, 0), suffix(status, 1)):
        kinds = ledger.kinds(by_status, f"du{end}")
        assert kinds[-1:] == [kind] * (kind is not None)
        assert len(kinds) == len(set(kinds))


def test_an_unknown_status_counts(engine: Engine) -> None:
    """A status that is not in Stripe's list is kept; the money may be gone, so it counts."""
    ledger.take_in(engine, PAID, reported("evt_du@", UPDATED, 2000, "arbitration"))

    assert ledger.rows(engine, "SELECT status FROM disputes") == [{"status": "arbitration"}]
    assert ledger.rows(engine, "SELECT disputed_amount FROM order_book") == [{"disputed_amount": 1000}]


def test_an_unknown_status_is_an_anomaly(engine: Engine) -> None:
    """Stripe's enumerations are open (stripe-facts, general enum rule): an unknown status is always noted."""
    ledger.take_in(engine, reported("evt_du@", UPDATED, 2000, "arbitration"))

    assert ledger.anomalies(engine) == ["unknown_status"]


# Lives of a dispute: its events, its last status, the order's disputed amount, and its kinds as it happened.
LIVES: dict[str, tuple[list[bytes], str, int, list[str]]] = {
    "inquiry_closed": (
        [
            reported("evt_1@", CREATED, 2000, "warning_needs_response"),
            reported("evt_2@", UPDATED, 3000, "warning_under_review"),
            reported("evt_3@", CLOSED, 4000, "warning_closed"),
        ],
        "warning_closed",
        0,
        ["dispute.closed"],
    ),
    "inquiry_that_became_a_dispute": (
        [
            reported("evt_1@", CREATED, 2000, "warning_needs_response"),
            reported("evt_2@", UPDATED, 3000, "needs_response"),
            reported("evt_3@", WITHDRAWN, 3001, "needs_response"),
        ],
        "needs_response",
        1000,
        ["dispute.opened"],
    ),
    "won": (
        [
            reported("evt_1@", CREATED, 2000, "needs_response"),
            reported("evt_2@", UPDATED, 3000, "under_review"),
            reported("evt_3@", CLOSED, 4000, "won"),
            reported("evt_4@", REINSTATED, 4001, "won"),
        ],
        "won",
        0,
        ["dispute.opened", "dispute.closed"],
    ),
    "lost": (
        [reported("evt_1@", CREATED, 2000, "needs_response"), reported("evt_2@", CLOSED, 4000, "lost")],
        "lost",
        1000,
        ["dispute.opened", "dispute.closed"],
    ),
    "lost_appealed_and_won": (
        [
            reported("evt_0@", CREATED, 2000, "needs_response"),
            reported("evt_1@", CLOSED, 4000, "lost"),
            reported("evt_2@", UPDATED, 5000, "appeal_needs_response"),
            reported("evt_3@", UPDATED, 6000, "appeal_under_review"),
            reported("evt_4@", CLOSED, 7000, "won"),
        ],
        "won",
        0,
        ["dispute.opened", "dispute.closed", "dispute.closed"],
    ),
    "lost_appealed_and_lost": (
        [
            reported("evt_0@", CREATED, 2000, "needs_response"),
            reported("evt_1@", CLOSED, 4000, "lost"),
            reported("evt_2@", UPDATED, 6000, "appeal_under_review"),
            reported("evt_3@", CLOSED, 7000, "lost"),
        ],
        "lost",
        1000,
        ["dispute.opened", "dispute.closed"],
    ),
    "another_amount": (
        [
            reported("evt_1@", CREATED, 2000, "needs_response", amount=700),
            reported("evt_2@", WITHDRAWN, 2001, "needs_response", amount=1000),
        ],
        "needs_response",
        1000,
        ["dispute.opened"],
    ),
}


@pytest.fixture(scope="module")
def lives(services: Services) -> Iterator[Engine]:
    """Return a database that took in each history in every order."""
    with arrived_in_every_order(services, {name: life[0] for name, life in LIVES.items()}, PAID) as engine:
        yield engine


@pytest.mark.parametrize("name", LIVES)
def test_lives_in_every_order(lives: Engine, name: str) -> None:
    """A dispute has no ranks: its last event decides; it is opened once, and closed once with each closing status."""
    bodies, status, disputed, kinds = LIVES[name]
    for end in suffixes(name, bodies):
        (row,) = ledger.rows(lives, "SELECT status, amount FROM disputes WHERE id = :id", id=f"du{end}")
        (order,) = ledger.rows(lives, "SELECT disputed_amount FROM order_book WHERE id = :id", id=f"cs{end}")
        changes = ledger.rows(
            lives, "SELECT kind, after FROM changes WHERE subject_id = :id ORDER BY seq", id=f"du{end}"
        )

        assert (row, order) == ({"status": status, "amount": 1000}, {"disputed_amount": disputed}), end
        assert [each["kind"] for each in changes].count("dispute.opened") <= kinds.count("dispute.opened"), end
        closings = [each["after"]["status"] for each in changes if each["kind"] == "dispute.closed"]
        assert len(closings) == len(set(closings)), end
        if kinds[-1] == "dispute.closed":
            assert status in closings, end
    assert ledger.kinds(lives, f"du{suffix(name)}") == kinds


Step = tuple[str, str]
"""A change of a dispute: its kind and the status after it."""

OPENING, CLOSED_LOST, CLOSED_WON = (
    ("dispute.opened", "needs_response"),
    ("dispute.closed", "lost"),
    ("dispute.closed", "won"),
)
OPENED = reported("evt_a@", CREATED, 2000, "needs_response")
LOST = reported("evt_b@", CLOSED, 4000, "lost")
REVIEWED = reported("evt_c@", UPDATED, 5000, "under_review")
WON = reported("evt_d@", CLOSED, 7000, "won")
# A dispute's events, and its changes when they are folded one by one as they happen: an appeal closes a
# dispute again with another status, and does not open it again.
APPEALS: dict[str, tuple[list[bytes], list[Step]]] = {
    "won_at_once": ([OPENED, LOST, WON], [OPENING, CLOSED_LOST, CLOSED_WON]),
    "reviewed": ([OPENED, LOST, REVIEWED], [OPENING, CLOSED_LOST]),
    "reviewed_and_not_known_before": ([LOST, REVIEWED], [CLOSED_LOST]),
    "reviewed_and_won": ([OPENED, LOST, REVIEWED, WON], [OPENING, CLOSED_LOST, CLOSED_WON]),
    "reviewed_and_lost": (
        [OPENED, LOST, REVIEWED, reported("evt_d@", CLOSED, 7000, "lost")],
        [OPENING, CLOSED_LOST],
    ),
    "inquired_again": (
        [reported("evt_a@", CLOSED, 2000, "warning_closed"), reported("evt_b@", UPDATED, 3000, "needs_response")],
        [("dispute.closed", "warning_closed"), OPENING],
    ),
}


@pytest.fixture(scope="module")
def appealed(services: Services) -> Iterator[Engine]:
    """Return a database into which each appeal came in every order and in all batches."""
    with arrived_in_every_way(services, {name: bodies for name, (bodies, _) in APPEALS.items()}) as engine:
        yield engine


@pytest.mark.parametrize("name", APPEALS)
def test_appeals_in_every_arrival(appealed: Engine, name: str) -> None:
    """The last change is the same in every arrival, each is announced once, and no other is announced."""
    bodies, happened = APPEALS[name]
    for end, batches in ways(name, bodies):
        changes = ledger.rows(
            appealed,
            "SELECT kind, after ->> 'status' AS status FROM changes WHERE subject_id = :id ORDER BY seq",
            id=f"du{end}",
        )
        steps = [(change["kind"], change["status"]) for change in changes]
        # The first known status of a dispute opens it, whichever status that is.
        found = [(kind, None if kind == "dispute.opened" else status) for kind, status in steps]
        known = [(kind, None if kind == "dispute.opened" else status) for kind, status in happened]

        assert found[-1] == known[-1], batches
        assert len(set(found)) == len(found), batches
        assert set(found) <= {("dispute.opened", None), *known}, batches
        if batches == [[body] for body in bodies]:
            assert steps == happened


def test_a_rebuild_of_appeals(appealed: Engine) -> None:
    """A rebuild gives the same rows, and a swap to it announces no change."""
    before = ledger.rows(appealed, "SELECT count(*) FROM changes")
    with shadow.shadow(appealed) as made:
        rebuild.rebuild(made)
        found, appended = swap.swap(made)

    assert (found.drift, appended) == (0, 0)
    assert ledger.rows(appealed, "SELECT count(*) FROM changes") == before


def test_the_last_event_decides_every_column(engine: Engine) -> None:
    """The values of a later event replace amount, currency and reason; an older one that comes late changes nothing."""
    late = dispute("du_1", amount=900, currency="eur", reason="duplicate", status="under_review")
    last = dispute("du_1", amount=1100, currency="usd", reason="general", status="needs_response")
    ledger.take_in(engine, event("evt_b", UPDATED, 20, last), event("evt_a", UPDATED, 10, late))

    assert ledger.rows(engine, "SELECT amount, currency, reason, status, event_id FROM disputes") == [
        {"amount": 1100, "currency": "usd", "reason": "general", "status": "needs_response", "event_id": "evt_b"}
    ]


def test_a_closing_in_the_second_of_an_update(engine: Engine) -> None:
    """Of two events of one second without previous attributes, the closing is the later: it ends a dispute."""
    for one, other in (("a", "b"), ("b", "a")):
        id_ = f"du_{one}"
        ledger.take_in(
            engine,
            event(f"evt_{id_}_{one}", CLOSED, 20, dispute(id_, status="won")),
            event(f"evt_{id_}_{other}", UPDATED, 20, dispute(id_, status="under_review")),
        )

    assert ledger.rows(engine, "SELECT id, status FROM disputes ORDER BY id") == [
        {"id": "du_a", "status": "won"},
        {"id": "du_b", "status": "won"},
    ]


# How a dispute finds its order, and when it does not: (fields of the dispute, account, livemode, disputed amount).
FOUND: dict[str, tuple[dict[str, object], str, bool, int | None]] = {
    "by_both": ({}, "", False, 1000),
    "by_intent": ({"charge": None}, "", False, 1000),
    "by_charge": ({"payment_intent": None}, "", False, 1000),
    "of_another_intent": ({"payment_intent": "pi_x", "charge": "ch_x"}, "", False, 0),
    "of_another_account": ({}, "acct_2", False, 0),
    "of_the_other_mode": ({}, "", True, 0),
    "in_another_currency": ({"currency": "cad"}, "", False, None),
    "inquiry_in_another_currency": ({"currency": "cad", "status": "warning_needs_response"}, "", False, 0),
    "won_in_another_currency": ({"currency": "cad", "status": "won"}, "", False, 0),
}


@pytest.fixture(scope="module")
def found(services: Services) -> Iterator[Engine]:
    """Return a database with an order, its charge and a dispute for each way, in every order."""
    histories = {
        name: [
            PAID,
            event("evt_ch@", "charge.succeeded", 9, charge()),
            event("evt_du@", CREATED, 2000, dispute(**fields), account=account or None, livemode=livemode),
        ]
        for name, (fields, account, livemode, _) in FOUND.items()
    }
    with arrived_in_every_order(services, histories) as engine:
        yield engine


@pytest.mark.parametrize("name", FOUND)
def test_a_dispute_finds_its_order(found: Engine, name: str) -> None:
    """A dispute's order is found by its or its charge's intent, in its world; another currency gives null (rule 10)."""
    for end in suffixes(name, [PAID] * 3):
        (order,) = ledger.rows(found, "SELECT disputed_amount FROM order_book WHERE id = :id", id=f"cs{end}")
        assert order["disputed_amount"] == FOUND[name][3], end


def test_several_disputes_of_one_order(engine: Engine) -> None:
    """The amounts that are or may be gone are added up, over all charges of the order's intent."""
    ledger.take_in(
        engine,
        PAID,
        event("evt_ch1", "charge.succeeded", 8, charge("ch_1")),
        event("evt_ch2", "charge.succeeded", 9, charge("ch_2")),
        event("evt_du1", CREATED, 2000, dispute("du_1", charge="ch_1", amount=300)),
        event("evt_du2", CLOSED, 2001, dispute("du_2", charge="ch_2", amount=50, status="lost")),
        event("evt_du3", CLOSED, 2002, dispute("du_3", charge="ch_2", amount=7, status="won")),
        event("evt_du4", CREATED, 2003, dispute("du_4", charge="ch_2", payment_intent=None, amount=1)),
    )

    assert ledger.rows(engine, "SELECT disputed_amount FROM order_book") == [{"disputed_amount": 351}]


def test_every_status_of_the_reference_is_known(engine: Engine) -> None:
    """None of the statuses of docs.stripe.com/api/disputes/object is an anomaly, in a reading as in an event."""
    for number, status in enumerate(STATUSES):
        about = dispute(f"du_{number}", status=status)
        ledger.take_in(engine, event(f"obs_{number}", "payfold.dispute.observed", 2000 + number, about))

    found = ledger.rows(engine, "SELECT status FROM disputes")
    assert sorted(row["status"] for row in found) == sorted(STATUSES)
    assert ledger.anomalies(engine) == []
