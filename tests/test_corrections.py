"""The feed's last change of an order is right: steps back and other amounts are corrected."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from deploy.sandbox.account import Event as Sent
from deploy.sandbox.rendering import render
from deploy.sandbox.samples import sample
from schemas import database, observations
from schemas.own_events import EVENT_IGNORED
from schemas.tables import ONE_SHOT_KINDS
from tests import ledger
from tests.test_orders import seen
from worker.folding import order_refunds
from worker.folds.checkout_session import kind_of_step

STEP = ("status", "amount_total", "currency")
ANNOUNCED = "SELECT kind, before, after, at, event_id FROM changes WHERE subject = 'order' ORDER BY seq"


@pytest.fixture
def account() -> Account:
    """Return an empty account of a shop."""
    return Account(seed=41)


@pytest.fixture
def paying() -> Account:
    """Return an account that also has charges, refunds and disputes."""
    return Account(seed=41, payments=True)


def ignoring(event: Sent) -> bytes:
    """Return the observation by which an operator ignores *event*."""
    about = {"object": "event", "id": event.id, "reason": "not sent by Stripe"}
    word = observations.observe(EVENT_IGNORED, about, account="", livemode=False, created=event.created, now=ledger.NOW)
    return word.envelope.payload


def delayed(account: Account) -> tuple[str, list[Sent]]:
    """Return an order that is opened, completed unpaid, and then paid, a minute apart, with its events."""
    session = account.open_session(amount=2_000)
    account.advance(60)
    account.complete(session, payment_status="unpaid")
    account.advance(60)
    account.async_payment_succeeded(session)
    return session, list(account.events)


def announced(engine: Engine) -> list[tuple[str, str | None, int | None]]:
    """Return kind, status and total of each change of an order, in the feed's order."""
    found = ledger.rows(engine, ANNOUNCED)
    return [(row["kind"], row["after"]["status"], row["after"]["amount_total"]) for row in found]


def assert_the_last_word_is_the_row(engine: Engine) -> None:
    """Check that the last change of each order equals its row, and that no one-shot is repeated."""
    changes = ledger.rows(engine, "SELECT * FROM changes WHERE subject = 'order' ORDER BY seq")
    last = {row["subject_id"]: row["after"] for row in changes if row["kind"] != "order.refund_changed"}
    held = {row["id"]: row for row in ledger.rows(engine, "SELECT id, status, amount_total, currency FROM orders")}
    # An unknown status is not announced.
    assert {order for order, row in held.items() if row["status"] is not None} <= last.keys()
    for order in held.keys() & last.keys():
        assert [last[order][name] for name in STEP] == [held[order][name] for name in STEP]
    once = Counter((row["subject_id"], row["kind"]) for row in changes if row["kind"] in ONE_SHOT_KINDS)
    assert set(once.values()) <= {1}


def test_a_step_back_is_corrected(engine: Engine, account: Account) -> None:
    """If the event that paid an order is ignored later, the order is corrected to the status of its other events."""
    session, events = delayed(account)
    ledger.take_in(engine, *(event.body for event in events), ignoring(events[-1]))

    assert announced(engine) == [
        ("order.processing", "processing", 2_000),
        ("order.paid", "paid", 2_000),
        ("order.corrected", "processing", 2_000),
    ]
    _, paid, corrected = ledger.rows(engine, ANNOUNCED)
    assert corrected["before"] == {name: value for name, value in paid["after"].items() if name != "lines"}
    assert corrected["before"].keys() == corrected["after"].keys()
    assert (corrected["event_id"], corrected["at"]) == (
        events[0].id,
        datetime.fromtimestamp(account.now - 60, UTC),
    )
    assert ledger.rows(engine, "SELECT id, status FROM orders") == [{"id": session, "status": "processing"}]


def test_every_arrival_of_a_step_back(engine: Engine, account: Account) -> None:
    """In any order of arrival the last change equals the row, and no one-shot is repeated."""
    session, events = delayed(account)
    opened = seen(account, session, status="open", payment_status="unpaid")
    bodies = [opened, *(event.body for event in events), ignoring(events[-1])]

    last = set()
    for batches in random.Random(41).sample(list(ledger.splits(bodies)), 60):
        ledger.take_in_batches(engine, batches)
        assert_the_last_word_is_the_row(engine)
        last.add(announced(engine)[-1][1:])
    assert last == {("processing", 2_000)}


def test_a_step_back_is_never_a_one_shot(engine: Engine, account: Account) -> None:
    """A step back is a correction even to a status that was never announced, also when amounts change later."""
    session, events = delayed(account)
    ledger.take_in(engine, events[-1].body)
    ledger.record(engine, map(ledger.delivery, (events[0].body, ignoring(events[-1]))))
    ledger.fold(engine)
    assert announced(engine) == [("order.paid", "paid", 2_000), ("order.corrected", "processing", 2_000)]

    account.advance(5)
    moved = {**account.session(session), "payment_status": "unpaid", "amount_total": 1_500}
    ledger.take_in(engine, account.emit("checkout.session.completed", moved).body)
    assert announced(engine)[2:] == [("order.corrected", "processing", 1_500)]
    account.advance(5)
    again = {**account.session(session), "amount_total": 1_500}
    ledger.take_in(engine, account.emit("checkout.session.async_payment_succeeded", again).body)
    # A second payment is a correction, since order.paid is announced only once.
    assert announced(engine)[3:] == [("order.corrected", "paid", 1_500)]
    assert_the_last_word_is_the_row(engine)


@pytest.mark.parametrize(
    ("fields", "after"),
    [
        ({"amount_total": 1_500}, ("paid", 1_500, "usd")),
        ({"currency": "eur"}, ("paid", 2_000, "eur")),
        ({"client_reference_id": "cart-2", "amount_subtotal": 2_100}, None),
    ],
)
def test_another_amount_is_corrected(
    engine: Engine, account: Account, fields: Mapping[str, Any], after: tuple[str, int, str] | None
) -> None:
    """A newer rendering with another total or currency corrects a paid order; other fields do not."""
    session = account.open_session(amount=2_000)
    account.complete(session)
    (newer,) = account.events
    older = render(newer, "2025-03-31.basil")
    other = msgspec.json.decode(newer.body)
    other["data"]["object"] |= fields
    bodies = [older.body, msgspec.json.encode(other)]

    for batches in ledger.splits(bodies):
        ledger.take_in_batches(engine, batches)
        assert_the_last_word_is_the_row(engine)
        assert ledger.kinds(engine, session).count("order.paid") == 1
    ledger.take_in_batches(engine, [bodies[:1], bodies[1:]])
    found = ledger.rows(engine, ANNOUNCED)
    if after is None:
        assert [row["kind"] for row in found] == ["order.paid"]
        return
    assert [row["kind"] for row in found] == ["order.paid", "order.corrected"]
    assert tuple(found[1]["before"][name] for name in STEP) == ("paid", 2_000, "usd")
    assert tuple(found[1]["after"][name] for name in STEP) == after


def test_an_amount_that_moves_with_a_step_is_no_correction(engine: Engine, account: Account) -> None:
    """A one-shot carries a changed amount; without a step the changed amount is a correction."""
    session = account.open_session(amount=2_000)
    bodies = [seen(account, session)]
    account.advance(60)
    bodies.append(seen(account, session, amount_total=1_800))
    account.advance(60)
    account.peek("checkout.session", session)["amount_total"] = 1_500
    account.complete(session)
    ledger.take_in(engine, *bodies, account.events[-1].body)

    assert announced(engine) == [
        ("order.opened", "open", 2_000),
        ("order.corrected", "open", 1_800),
        ("order.paid", "paid", 1_500),
    ]


def test_an_order_that_was_away_comes_back_otherwise(engine: Engine) -> None:
    """An order without a row is not announced; when it is back, it is compared with its last announcement."""
    body = sample("checkout.session.completed", {}, now=1).payload()
    for version, amount in (("2025-01-01", 2_000), ("2025-02-01", "twenty"), ("2025-03-01", 1_500)):
        body["api_version"], body["data"]["object"]["amount_total"] = version, amount
        ledger.take_in(engine, msgspec.json.encode(body))

    assert announced(engine) == [("order.paid", "paid", 2_000), ("order.corrected", "paid", 1_500)]
    assert_the_last_word_is_the_row(engine)


@pytest.mark.parametrize(
    ("before", "after", "kinds", "kind"),
    [
        (None, "paid", (), "order.paid"),
        (None, None, (), None),
        ("open", "paid", ("order.opened",), "order.paid"),
        ("open", "open", ("order.opened",), None),
        ("processing", "failed", ("order.processing",), "order.failed"),
        ("failed", "paid", ("order.failed",), "order.paid"),
        ("expired", "paid", ("order.expired",), "order.paid"),
        ("paid", "complete", ("order.paid",), "order.completed"),
        ("paid", "processing", ("order.paid",), "order.corrected"),
        ("paid", "expired", ("order.paid",), "order.corrected"),
        ("failed", "open", ("order.failed",), "order.corrected"),
        ("paid", None, ("order.paid",), "order.corrected"),
        ("processing", "paid", ("order.paid",), "order.corrected"),
        (None, "open", ("order.paid",), "order.opened"),
    ],
)
def test_kinds_of_steps(before: str | None, after: str | None, kinds: Sequence[str], kind: str | None) -> None:
    """A step onward is announced once, a step back is a correction, and an equal status is no change."""
    money = {"amount_total": 500, "currency": "usd"}
    known = None if before is None else {"status": before, **money}

    assert kind_of_step(known, {"status": after, **money}, kinds) == kind


def test_a_dispute_that_is_won_on_appeal(engine: Engine, paying: Account) -> None:
    """A dispute is closed once by each closing status, in any order of arrival."""
    session = paying.open_session(amount=2_000)
    paying.complete(session)
    intents = paying.order_intents(session)
    assert intents
    dispute = paying.open_dispute(intents[0])
    paying.advance(60)
    paying.close_dispute(dispute, "lost")
    lost = paying.events[-1]
    paying.advance(60)
    won = paying.emit("charge.dispute.closed", {**paying.object("dispute", dispute), "status": "won"})
    paying.advance(60)
    again = paying.emit("charge.dispute.updated", {**paying.object("dispute", dispute), "status": "won"})
    bodies = [lost.body, won.body, again.body]
    statuses = "SELECT after ->> 'status' AS status FROM changes WHERE kind = 'dispute.closed' ORDER BY seq"

    for batches in ledger.splits(bodies):
        ledger.take_in_batches(engine, batches)
        closed = [row["status"] for row in ledger.rows(engine, statuses)]
        assert closed[-1] == "won"
        assert len(closed) == len(set(closed))
    ledger.take_in_batches(engine, [[body] for body in bodies])
    assert [row["status"] for row in ledger.rows(engine, statuses)] == ["lost", "won"]
    ledger.execute(engine, "INSERT INTO pending (seq, again) SELECT seq, true FROM inbox")
    ledger.fold(engine)
    assert len(ledger.rows(engine, statuses)) == 2


def test_a_sum_that_is_not_known_any_more(engine: Engine, paying: Account) -> None:
    """An order has a change if the sum of its refunds becomes unknown, but not if it was never known."""
    known, unknown = (paying.open_session(amount=2_000) for _ in range(2))
    for session in (known, unknown):
        paying.complete(session)
    intents = paying.order_intents(known)
    assert intents
    paying.refund(intents[0], 500)
    bodies = [msgspec.json.decode(event.body) for event in paying.events]
    for body in bodies:
        if body["data"]["object"]["id"] == unknown:
            body["data"]["object"]["payment_intent"] = None
    ledger.take_in(engine, *map(msgspec.json.encode, bodies))
    ledger.execute(engine, "UPDATE orders SET payment_intent = NULL")

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("SELECT current_schema()")
        ((schema,),) = cursor.fetchall()
        found = order_refunds.unannounced(cursor, announced_in=schema)
    assert [(row["subject_id"], row["kind"]) for row in found] == [(known, "order.refund_changed")]
    before, after = found[0]["before"], found[0]["after"]
    assert before is not None
    assert (before["refunded_amount"], after["refunded_amount"]) == (500, None)
