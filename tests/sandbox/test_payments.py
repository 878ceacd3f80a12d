"""Payments, refunds and disputes: their events, and the expected amounts of an order."""

import pytest

from deploy.sandbox import Account, ParameterError, TransitionError


@pytest.fixture
def shop() -> Account:
    """Return an account that makes payments."""
    return Account(seed=1, payments=True)


def sell(shop: Account, *, by_debit: bool = False) -> tuple[str, str]:
    """Return a session that was paid, and its payment intent; drop the events so far."""
    session = shop.open_session()
    if by_debit:
        shop.complete(session, payment_status="unpaid")
        shop.async_payment_succeeded(session)
    else:
        shop.complete(session)
    shop.take_events()
    return session, shop.session(session)["payment_intent"]


def test_sessions_pay_only_when_asked() -> None:
    """Without payments a session only names its intent; with payments the intent and its charge exist."""
    named, made = Account(seed=1), Account(seed=1, payments=True)

    for account in (named, made):
        account.complete(account.open_session())

    assert [event.type for event in named.events] == ["checkout.session.completed"]
    assert [event.type for event in made.events] == [
        *("charge.succeeded", "payment_intent.succeeded", "checkout.session.completed")
    ]
    session = made.session(made.session_ids()[0])
    charge = made.charge_of(session["payment_intent"])
    assert (charge["amount"], charge["status"], charge["payment_intent"]) == (
        session["amount_total"],
        "succeeded",
        session["payment_intent"],
    )
    assert "invoice" not in charge


@pytest.mark.parametrize(
    ("clears", "types"),
    [
        (True, ["charge.succeeded", "payment_intent.succeeded", "checkout.session.async_payment_succeeded"]),
        (False, ["charge.failed", "payment_intent.payment_failed", "checkout.session.async_payment_failed"]),
    ],
)
def test_delayed_payment(shop: Account, clears: bool, types: list[str]) -> None:  # noqa: FBT001 (pytest passes by name)
    """A delayed payment is pending, and then clears or fails; all its events are of one charge."""
    session = shop.open_session()
    shop.complete(session, payment_status="unpaid")
    pending = [event.type for event in shop.take_events()]

    (shop.async_payment_succeeded if clears else shop.async_payment_failed)(session)

    assert pending == ["charge.pending", "payment_intent.processing", "checkout.session.completed"]
    assert [event.type for event in shop.events] == types
    assert len(shop.object_ids("charge")) == 1


def test_refunds_add_up(shop: Account) -> None:
    """Refunds in one second carry the previous refunded amount; the last one makes the charge refunded in full."""
    session, intent = sell(shop)

    shop.refund(intent, 500)
    shop.refund(intent)

    refunded = [event.payload()["data"] for event in shop.events if event.type == "charge.refunded"]
    assert [(data["object"]["amount_refunded"], data["previous_attributes"]) for data in refunded] == [
        (500, {"amount_refunded": 0}),
        (2_000, {"amount_refunded": 500, "refunded": False}),
    ]
    assert shop.expected_refunded(session) == 2_000
    assert "livemode" not in shop.refunds_of(intent)[0]
    with pytest.raises(ParameterError, match="has 0 left to refund"):
        shop.refund(intent, 1)


@pytest.mark.parametrize(("falls", "left"), [(True, 0), (False, 500)])
def test_refund_that_fails_after_success(shop: Account, falls: bool, left: int) -> None:  # noqa: FBT001 (by name)
    """The money returns to the shop whether or not the charge's refunded amount falls; the refund has the reason."""
    session, intent = sell(shop)
    refund = shop.refund(intent, 500)
    assert shop.object("refund", refund)["status"] == "succeeded"
    shop.take_events()

    shop.fail_refund(refund, charge_falls=falls)

    types = [event.type for event in shop.events]
    assert types == ["refund.updated", "refund.failed", *(["charge.updated"] if falls else [])]
    before = shop.events[0].payload()["data"]["previous_attributes"]
    assert before == {"failure_balance_transaction": None, "failure_reason": None, "status": "succeeded"}
    assert shop.object("refund", refund)["failure_reason"] == "lost_or_stolen_card"
    assert shop.expected_refunded(session) == 0
    assert shop.charge_of(intent)["amount_refunded"] == left
    with pytest.raises(TransitionError, match="is failed"):
        shop.succeed_refund(refund)


def test_refund_by_debit(shop: Account) -> None:
    """A refund to a bank account is pending at first, and each update of it has a twin of the old event type."""
    session, intent = sell(shop, by_debit=True)

    refund = shop.refund(intent, 700)
    waiting = shop.object("refund", refund)
    shop.succeed_refund(refund)

    assert refund.startswith("pyr_")
    assert (waiting["status"], waiting["pending_reason"]) == ("pending", "processing")
    updated, twin = shop.events[-2:]
    assert (updated.type, twin.type) == ("refund.updated", "charge.refund.updated")
    assert updated.payload()["data"] == twin.payload()["data"]
    assert shop.expected_refunded(session) == 700


def test_canceled_refund(shop: Account) -> None:
    """A refund that waits for the buyer may be canceled, and then does not count."""
    session, intent = sell(shop)
    refund = shop.refund(intent, status="requires_action")
    assert shop.expected_refunded(session) == 2_000

    shop.cancel_refund(refund)

    assert shop.expected_refunded(session) == 0
    assert (shop.charge_of(intent)["amount_refunded"], shop.charge_of(intent)["refunded"]) == (0, False)


@pytest.mark.parametrize(("end", "at_risk"), [("won", 0), ("lost", 2_000)])
def test_dispute(shop: Account, end: str, at_risk: int) -> None:
    """A dispute withdraws the money at once and reinstates it if it is won."""
    session, intent = sell(shop)

    dispute = shop.open_dispute(intent)
    assert shop.expected_disputed(session) == 2_000
    with pytest.raises(TransitionError, match="disputed and cannot be refunded"):
        shop.refund(intent)
    shop.submit_evidence(dispute)
    shop.close_dispute(dispute, "won" if end == "won" else "lost")

    assert [event.type for event in shop.events] == [
        *("charge.dispute.created", "charge.updated", "charge.dispute.funds_withdrawn"),
        *("charge.dispute.updated", "charge.dispute.closed"),
        *(["charge.dispute.funds_reinstated"] if end == "won" else []),
    ]
    assert shop.events[1].payload()["data"]["previous_attributes"] == {"disputed": False}
    ended = shop.object("dispute", dispute)
    assert (ended["status"], sum(each["amount"] for each in ended["balance_transactions"])) == (end, -at_risk)
    assert shop.expected_disputed(session) == at_risk
    assert shop.session(session)["payment_status"] == "paid"


def test_inquiry(shop: Account) -> None:
    """An inquiry takes no money, ends as warning_closed, and leaves the charge refundable."""
    session, intent = sell(shop)

    dispute = shop.open_dispute(intent, 800, inquiry=True)
    assert shop.expected_disputed(session) == 0
    shop.refund(intent, 100)
    with pytest.raises(TransitionError, match="cannot end as won"):
        shop.close_dispute(dispute, "won")
    shop.close_dispute(dispute, "warning_closed")

    assert shop.object("dispute", dispute)["balance_transactions"] == []
    assert shop.expected_disputed(session) == 0
    with pytest.raises(TransitionError, match="wants no response"):
        shop.submit_evidence(dispute)


def test_unknown_money(shop: Account) -> None:
    """The amounts of an order without a payment are unknown: null and not 0."""
    opened, free = shop.open_session(), shop.open_session(amount=500, discount=500)
    shop.complete(free)

    for session in (opened, free):
        assert shop.order_intents(session) is None
        assert shop.expected_refunded(session) is None
        assert shop.expected_disputed(session) is None
        assert shop.expected_credited(session) is None


def test_nothing_to_refund(shop: Account) -> None:
    """A payment that was not made, or was given back already, cannot be refunded or disputed."""
    session = shop.open_session()
    shop.complete(session, payment_status="unpaid")
    intent = shop.session(session)["payment_intent"]

    with pytest.raises(TransitionError, match="is pending and cannot be refunded"):
        shop.refund(intent)
    with pytest.raises(TransitionError, match="is pending and cannot be disputed"):
        shop.open_dispute(intent)
