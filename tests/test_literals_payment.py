"""When an order is paid or failed by its charges alone (design.md rule 10), each history in every order of arrival.

Stripe reports a manual capture by the charge alone: the session completes `unpaid` and no session event follows
(stripe-facts section 11). A hold ends in `charge.expired` ("Occurs whenever an uncaptured charge expires"), in a charge
that is refunded without having been captured, in a refund with the reason `expired_uncaptured_charge`, or with its
payment intent ("For PaymentIntents with a `status` of `requires_capture`, the remaining `amount_capturable` is
automatically refunded", docs.stripe.com/api/payment_intents/cancel).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.local.services import Services
from schemas import observations
from schemas.own_events import SESSION_REGISTERED
from tests import ledger
from tests.literals import at
from tests.stripe_payments import (
    T,
    arrived_in_every_order,
    canceled_intent,
    charge,
    event,
    hold,
    named,
    refund,
    released,
    session,
    suffix,
    suffixes,
)

UNPAID = event("evt_cs@", "checkout.session.completed", 10, session(payment_status="unpaid"))
HELD = event("evt_h@", "charge.succeeded", 10, hold())
CAPTURED = event("evt_c@", "charge.captured", 90_000, charge(), previous={"amount_captured": 0, "captured": False})
PENDING = event("evt_p@", "charge.pending", 10, charge(status="pending", paid=False))
EXPIRED = event("evt_x@", "charge.expired", 80_000, released())
CANCELED = event("evt_pi@", "payment_intent.canceled", 80_000, canceled_intent(at=80_000))
RELEASING = event(
    "evt_re@", "refund.created", 80_000, refund(created=80_000, amount=5000, reason="expired_uncaptured_charge")
)
# A session as API 2019-05-16 reported it: no status, no payment_status, no amounts (stripe-facts section 11).
OF_2019 = event(
    "evt_cs@",
    "checkout.session.completed",
    10,
    {
        "id": "cs@",
        "object": "checkout.session",
        "client_reference_id": "cart@",
        "customer": "cus@",
        "customer_email": None,
        "display_items": [{"amount": 5000, "currency": "usd", "quantity": 1, "type": "custom"}],
        "livemode": False,
        "metadata": {},
        "mode": "payment",
        "payment_intent": "pi@",
        "setup_intent": None,
        "subscription": None,
    },
    version="2019-05-16",
)


@dataclass(frozen=True)
class Case:
    """A history, and its order after it in any order of arrival."""

    bodies: list[bytes]
    status: str | None
    paid_at: datetime | None = None
    failed_at: datetime | None = None
    payment_status: str | None = "unpaid"
    # The kinds in the order of events, and the event that the last kind names; None where several are right.
    kinds: tuple[str, ...] = ("order.processing",)
    by: str | None = "evt_cs@"
    anomalies: tuple[str, ...] = ()


PAYS = ("order.processing", "order.paid")
FAILS = ("order.processing", "order.failed")
CASES = {
    "unpaid_alone": Case([UNPAID], "processing"),
    "held": Case([UNPAID, HELD], "processing"),
    "captured_later": Case([UNPAID, HELD, CAPTURED], "paid", paid_at=at(T + 90_000), kinds=PAYS, by="evt_c@"),
    "captured_in_part": Case(
        [UNPAID, HELD, event("evt_c@", "charge.captured", 90_001, charge(amount_captured=3000))],
        "paid",
        paid_at=at(T + 90_001),
        kinds=PAYS,
        by="evt_c@",
    ),
    # A refund does not make the order unpaid, and the moment stays the capture's.
    "captured_then_refunded": Case(
        [UNPAID, CAPTURED, event("evt_r@", "charge.refunded", 95_000, charge(amount_refunded=5000, refunded=True))],
        "paid",
        paid_at=at(T + 90_000),
        kinds=PAYS,
        by=None,
    ),
    "pending_pays_nothing": Case([UNPAID, PENDING], "processing"),
    "delayed_method": Case(
        [
            UNPAID,
            PENDING,
            event("evt_s@", "charge.succeeded", 400_000, charge()),
            event("evt_a@", "checkout.session.async_payment_succeeded", 400_005, session()),
        ],
        "paid",
        payment_status="paid",
        paid_at=at(T + 400_005),
        kinds=PAYS,
        by=None,
    ),
    "delayed_method_by_its_charge": Case(
        [UNPAID, PENDING, event("evt_s@", "charge.succeeded", 400_000, charge())],
        "paid",
        paid_at=at(T + 400_000),
        kinds=PAYS,
        by="evt_s@",
    ),
    "expired_hold": Case([UNPAID, HELD, EXPIRED], "failed", failed_at=at(T + 80_000), kinds=FAILS, by="evt_x@"),
    "released_without_its_hold": Case([UNPAID, EXPIRED], "failed", failed_at=at(T + 80_000), kinds=FAILS, by="evt_x@"),
    "refunded_uncaptured": Case(
        [UNPAID, HELD, event("evt_r@", "charge.refunded", 80_001, released())],
        "failed",
        failed_at=at(T + 80_001),
        kinds=FAILS,
        by="evt_r@",
    ),
    "canceled_without_charge": Case([UNPAID, CANCELED], "failed", failed_at=at(T + 80_000), kinds=FAILS, by="evt_pi@"),
    "canceled_with_its_hold": Case(
        [UNPAID, HELD, CANCELED], "failed", failed_at=at(T + 80_000), kinds=FAILS, by="evt_pi@"
    ),
    "canceled_and_expired": Case(
        [UNPAID, HELD, CANCELED, EXPIRED], "failed", failed_at=at(T + 80_000), kinds=FAILS, by=None
    ),
    "released_by_a_refund": Case(
        [UNPAID, HELD, RELEASING], "failed", failed_at=at(T + 80_000), kinds=FAILS, by="evt_re@"
    ),
    # The refund names only the intent, as a refund may.
    "released_by_a_refund_of_the_intent": Case(
        [
            UNPAID,
            event(
                "evt_re@",
                "refund.created",
                80_000,
                refund(created=80_000, amount=5000, charge=None, reason="expired_uncaptured_charge"),
            ),
        ],
        "failed",
        failed_at=at(T + 80_000),
        kinds=FAILS,
        by="evt_re@",
    ),
    # A refund for another reason releases no hold.
    "refund_that_releases_nothing": Case(
        [UNPAID, HELD, event("evt_re@", "refund.created", 80_000, refund(created=80_000))], "processing"
    ),
    "declined_only": Case(
        [
            UNPAID,
            event(
                "evt_f@", "charge.failed", 11, charge(status="failed", captured=False, amount_captured=0, paid=False)
            ),
        ],
        "processing",
    ),
    "declined_then_captured": Case(
        [
            UNPAID,
            event("evt_f@", "charge.failed", 11, charge("ch_f@", status="failed", captured=False, amount_captured=0)),
            event("evt_s@", "charge.succeeded", 12, charge()),
        ],
        "paid",
        paid_at=at(T + 12),
        kinds=PAYS,
        by="evt_s@",
    ),
    "one_released_one_held": Case(
        [UNPAID, event("evt_h2@", "charge.succeeded", 11, hold("ch_2@")), EXPIRED], "processing"
    ),
    "one_released_one_pending": Case(
        [UNPAID, event("evt_p2@", "charge.pending", 11, charge("ch_2@", status="pending")), EXPIRED], "processing"
    ),
    "one_released_one_failed": Case(
        [UNPAID, event("evt_f2@", "charge.failed", 11, charge("ch_2@", status="failed", captured=False)), EXPIRED],
        "failed",
        failed_at=at(T + 80_000),
        kinds=FAILS,
        by="evt_x@",
    ),
    "one_released_one_captured": Case(
        [UNPAID, event("evt_s@", "charge.succeeded", 80_010, charge("ch_2@")), EXPIRED],
        "paid",
        paid_at=at(T + 80_010),
        kinds=("order.processing", "order.paid"),
        by="evt_s@",
    ),
    "two_captured": Case(
        [
            UNPAID,
            event("evt_1@", "charge.succeeded", 20, charge("ch_1@")),
            event("evt_2@", "charge.succeeded", 30, charge("ch_2@")),
        ],
        "paid",
        paid_at=at(T + 20),
        kinds=PAYS,
        by=None,
    ),
    "released_and_captured": Case(
        [UNPAID, EXPIRED, CAPTURED],
        "paid",
        paid_at=at(T + 90_000),
        failed_at=None,
        kinds=("order.processing", "order.failed", "order.paid"),
        by="evt_c@",
        anomalies=("released_and_captured",),
    ),
    # The session's own status outranks its charges.
    "reported_paid_and_released": Case(
        [event("evt_cs@", "checkout.session.completed", 10, session()), EXPIRED],
        "paid",
        payment_status="paid",
        paid_at=at(T + 10),
        kinds=("order.paid",),
    ),
    "nothing_to_pay_and_canceled": Case(
        [
            event("evt_cs@", "checkout.session.completed", 10, session(payment_status="no_payment_required")),
            CANCELED,
        ],
        "paid",
        payment_status="no_payment_required",
        paid_at=at(T + 10),
        kinds=("order.paid",),
    ),
    "unknown_word_and_captured": Case(
        [event("evt_cs@", "checkout.session.completed", 10, session(payment_status="partially_paid")), CAPTURED],
        None,
        payment_status="partially_paid",
        kinds=(),
        by=None,
        anomalies=("unknown_status",),
    ),
    "failed_then_captured": Case(
        [
            UNPAID,
            event("evt_a@", "checkout.session.async_payment_failed", 50_000, session(payment_status="unpaid")),
            CAPTURED,
        ],
        "paid",
        paid_at=at(T + 90_000),
        failed_at=at(T + 50_000),
        kinds=("order.processing", "order.failed", "order.paid"),
        by="evt_c@",
    ),
    "failed_by_the_session": Case(
        [
            UNPAID,
            event("evt_a@", "checkout.session.async_payment_failed", 50_000, session(payment_status="unpaid")),
            CANCELED,
        ],
        "failed",
        failed_at=at(T + 50_000),
        kinds=FAILS,
        by=None,
    ),
    # Stripe cancels the intent of a session that expires: that is no failure of a payment.
    "expired_session": Case(
        [
            event("evt_cs@", "checkout.session.expired", 86_400, session(status="expired", payment_status="unpaid")),
            CANCELED,
        ],
        "expired",
        kinds=("order.expired",),
    ),
    "expired_session_and_captured": Case(
        [
            event("evt_cs@", "checkout.session.expired", 86_400, session(status="expired", payment_status="unpaid")),
            CAPTURED,
        ],
        "expired",
        kinds=("order.expired",),
    ),
    "another_intent": Case(
        [UNPAID, event("evt_c@", "charge.captured", 90_000, charge(payment_intent="pi_other@"))], "processing"
    ),
    "charge_of_no_intent": Case(
        [UNPAID, event("evt_c@", "charge.captured", 90_000, charge(payment_intent=None))], "processing"
    ),
    "of_2019_alone": Case([OF_2019], None, payment_status=None, kinds=(), by=None, anomalies=("unknown_status",)),
    "of_2019_setup": Case(
        [
            event(
                "evt_cs@",
                "checkout.session.completed",
                10,
                {
                    "id": "cs@",
                    "object": "checkout.session",
                    "customer": "cus@",
                    "display_items": None,
                    "livemode": False,
                    "metadata": {},
                    "mode": "setup",
                    "payment_intent": None,
                    "setup_intent": "seti@",
                },
                version="2019-05-16",
            )
        ],
        "complete",
        payment_status=None,
        kinds=("order.completed",),
    ),
    "of_2019_captured": Case(
        [OF_2019, event("evt_s@", "charge.succeeded", 9, charge(), version="2019-05-16")],
        "paid",
        payment_status=None,
        paid_at=at(T + 9),
        kinds=("order.paid",),
        by="evt_s@",
    ),
    "of_2019_released": Case(
        [OF_2019, EXPIRED],
        "failed",
        payment_status=None,
        failed_at=at(T + 80_000),
        kinds=("order.failed",),
        by="evt_x@",
    ),
}
ONE_SHOT = {"order.processing", "order.paid", "order.completed", "order.failed", "order.expired"}


@pytest.fixture(scope="module")
def arrived(services: Services) -> Iterator[Engine]:
    """Return a database into which every history came in every order."""
    with arrived_in_every_order(services, {name: case.bodies for name, case in CASES.items()}) as engine:
        yield engine


def steps(engine: Engine, end: str) -> list[dict[str, Any]]:
    """Return the changes of the order's status."""
    query = """
        SELECT kind, event_id, after FROM changes
        WHERE subject_id = :id AND kind <> 'order.refund_changed' ORDER BY seq
    """
    return ledger.rows(engine, query, id=f"cs{end}")


@pytest.mark.parametrize("name", CASES)
def test_the_order_in_every_order(arrived: Engine, name: str) -> None:
    """Status, moments and anomalies are the same in every order; the session's own fields are kept."""
    case = CASES[name]
    for end in suffixes(name, case.bodies):
        (row,) = ledger.rows(
            arrived, "SELECT status, payment_status, paid_at, failed_at FROM orders WHERE id = :id", id=f"cs{end}"
        )
        anomalies = ledger.rows(
            arrived,
            "SELECT kind FROM anomalies WHERE resolved_at IS NULL AND subject_id IN (:order, :charge) ORDER BY kind",
            order=f"cs{end}",
            charge=f"ch{end}",
        )
        assert row == {
            "status": case.status,
            "payment_status": case.payment_status,
            "paid_at": case.paid_at,
            "failed_at": case.failed_at,
        }, end
        assert [each["kind"] for each in anomalies] == list(case.anomalies), end


@pytest.mark.parametrize("name", CASES)
def test_the_changes_in_every_order(arrived: Engine, name: str) -> None:
    """Each step is recorded in the order of events; any order records the last step once, with its deciding event."""
    case = CASES[name]
    assert tuple(change["kind"] for change in steps(arrived, suffix(name))) == case.kinds
    for end in suffixes(name, case.bodies):
        changes = steps(arrived, end)
        one_shots = [change["kind"] for change in changes if change["kind"] in ONE_SHOT]
        assert len(one_shots) == len(set(one_shots)), end
        assert [change["after"]["status"] for change in changes[-1:]] == [case.status] * bool(case.kinds), end
        if case.status in ("paid", "failed", "expired"):
            assert changes[-1]["kind"] == f"order.{case.status}", end
        if case.by is not None and case.status != "processing":
            assert changes[-1]["event_id"] == case.by.replace("@", end), end


def test_the_time_of_a_change(arrived: Engine) -> None:
    """`at` is "when Stripe created the event that decided": the capture, however late the session arrived."""
    for end in suffixes("captured_later", CASES["captured_later"].bodies):
        changes = ledger.rows(
            arrived, "SELECT at FROM changes WHERE subject_id = :id AND kind = 'order.paid'", id=f"cs{end}"
        )
        assert changes == [{"at": at(T + 90_000)}], end


@pytest.mark.parametrize(("account", "livemode"), [("acct_2", False), (None, True)])
def test_another_world_pays_nothing(engine: Engine, account: str | None, livemode: bool) -> None:  # noqa: FBT001 - a mode
    """A charge of the same intent's id in another account or mode is another charge (law 6)."""
    other = event("evt_c@", "charge.captured", 90_000, charge(), account=account, livemode=livemode)
    cancel = event(
        "evt_pi@", "payment_intent.canceled", 80_000, canceled_intent(at=80_000), account=account, livemode=livemode
    )
    ledger.take_in(engine, other, UNPAID, cancel)

    assert ledger.rows(engine, "SELECT status, paid_at, failed_at FROM orders") == [
        {"status": "processing", "paid_at": None, "failed_at": None}
    ]


@pytest.mark.parametrize("other", ["charge", "cancellation"])
def test_an_open_session_is_not_paid_by_a_charge(engine: Engine, other: str) -> None:
    """A charge decides only a complete order: its event may arrive before the session completes."""
    body = CAPTURED if other == "charge" else CANCELED
    opened = session(status="open", payment_status="unpaid")
    registered = observations.observe(SESSION_REGISTERED, opened, account="", livemode=False, created=T, now=ledger.NOW)
    ledger.take_in(engine, body)
    ledger.record(engine, [registered])
    ledger.fold(engine)

    assert ledger.rows(engine, "SELECT status, paid_at, failed_at FROM orders") == [
        {"status": "open", "paid_at": None, "failed_at": None}
    ]


def test_one_batch_is_like_many(engine: Engine) -> None:
    """Order, charge and cancellation give the same in one batch as one by one."""
    names = ("captured_later", "canceled_with_its_hold", "released_by_a_refund", "expired_hold", "of_2019_captured")
    ledger.record(engine, [ledger.delivery(named(body, name)) for name in names for body in CASES[name].bodies])
    ledger.fold(engine)

    found = {row["id"]: row["status"] for row in ledger.rows(engine, "SELECT id, status FROM orders")}
    assert found == {f"cs{suffix(name)}": CASES[name].status for name in names}
    for name in names:
        assert ledger.kinds(engine, f"cs{suffix(name)}")[-1] == f"order.{CASES[name].status}"
