"""A new fold version's findings in old events are withheld from the feed, and changes by new events are not."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from deploy.sandbox.history import shop_history
from schemas import database, feed
from tests import ledger
from tests.test_orders import seen
from worker import folds
from worker.folding import projection
from worker.folding.claim import REFOLD_EVENTS_MAX, queue_outdated

OLDER = folds.FOLD_VERSION - 1

CONCLUDED = """
UPDATE outcomes AS o SET state = :state, cause = :cause FROM inbox AS i
WHERE i.seq = o.seq AND :name IN (i.object_type, i.object_id)
"""
ANNOUNCED = """
SELECT kind, withheld, before, after FROM changes WHERE subject_id = :id ORDER BY seq
"""


def fold_by(engine: Engine, version: int) -> None:
    """Fold what is pending, as a release of the fold *version* noted it."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        projection.project_pending(cursor, now=ledger.NOW, fold_version=version)


def conclude(engine: Engine, name: str, state: str, cause: str) -> None:
    """Give the events of an object, or of all objects of a type, the outcome that the older release recorded."""
    ledger.execute(engine, CONCLUDED, name=name, state=state, cause=cause)


def record(engine: Engine, *bodies: bytes) -> None:
    """Record *bodies*."""
    ledger.record(engine, map(ledger.delivery, bodies))


def queue(engine: Engine, limit: int = REFOLD_EVENTS_MAX) -> int:
    """Queue, as the clock does, the events that an older version folded, and return their number."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        return queue_outdated(cursor, limit=limit)


def shown(engine: Engine) -> list[dict[str, Any]]:
    """Return the changes that a reader of the feed sees."""
    with database.transaction(engine) as connection:
        return [dict(row) for row in feed.page(connection, 0, 100_000).rows]


def announced(engine: Engine, subject_id: str, name: str) -> list[tuple[str, str | None, object, object]]:
    """Return the changes of one object: kind, why withheld, and what *name* was before and after."""
    return [
        (row["kind"], row["withheld"], (row["before"] or {}).get(name), row["after"][name])
        for row in ledger.rows(engine, ANNOUNCED, id=subject_id)
    ]


def test_an_upgrade_announces_nothing(engine: Engine) -> None:
    """The feed shows no change that new folds find in a shop's history, and the tables are right."""
    shop = shop_history(seed=44, orders=60, money=True)
    record(engine, *(event.body for event in shop.events))
    fold_by(engine, OLDER)
    right = ledger.digest_of(engine)
    # An older release had no payments, refunds or charges, and computed balances differently.
    for statement in (
        "UPDATE orders SET status = 'processing', payment_status = 'unpaid', paid_at = NULL WHERE status = 'paid'",
        "UPDATE balances SET amount = amount + 7",
        "UPDATE refunds SET amount = 0",
        "DELETE FROM charges",
        "DELETE FROM changes WHERE kind IN ('order.paid', 'order.refund_changed', 'balance.changed')",
    ):
        ledger.execute(engine, statement)
    conclude(engine, "charge", "ignored", "type_unwanted")
    before = shown(engine)
    assert ledger.digest_of(engine) != right

    while queue(engine, limit=70):
        ledger.fold(engine, limit=23)

    assert shown(engine) == before
    assert ledger.digest_of(engine) == right
    withheld = ledger.rows(engine, "SELECT kind, withheld, subject_id FROM changes WHERE withheld IS NOT NULL")
    assert {row["withheld"] for row in withheld} == {"fold_version"}
    kinds = Counter(row["kind"] for row in withheld)
    assert kinds["balance.changed"]
    paid = {row["id"] for row in ledger.rows(engine, "SELECT id FROM orders WHERE status = 'paid'")}
    assert {row["subject_id"] for row in withheld if row["kind"] == "order.paid"} == paid
    refunded = ledger.rows(engine, "SELECT id FROM order_book WHERE refunded_amount > 0")
    assert len(refunded) == kinds["order.refund_changed"] > 0


Arrival = Callable[[Engine, bytes], None]


def alone(engine: Engine, new: bytes) -> None:
    """Take the new event in before the clock has queued anything."""
    record(engine, new)
    ledger.fold(engine)
    queue(engine)
    ledger.fold(engine)


def together(engine: Engine, new: bytes) -> None:
    """Fold the new event in one batch with the history."""
    queue(engine)
    record(engine, new)
    ledger.fold(engine)


def one_by_one(engine: Engine, new: bytes) -> None:
    """Fold the new event in a batch of its own, after a part of the history."""
    queue(engine, limit=1)
    record(engine, new)
    ledger.fold(engine, limit=1)
    queue(engine)
    ledger.fold(engine, limit=1)


def afterwards(engine: Engine, new: bytes) -> None:
    """Take the new event in after all of the history is folded again."""
    queue(engine)
    ledger.fold(engine)
    record(engine, new)
    ledger.fold(engine)


ARRIVALS = pytest.mark.parametrize("arrival", [alone, together, one_by_one, afterwards])


@ARRIVALS
def test_a_new_event_of_an_object_whose_history_waits(engine: Engine, arrival: Arrival) -> None:
    """Changes by the history are withheld and further changes by the event are not, whichever is folded first."""
    account = Account(seed=45)
    session, customer = account.open_session(amount=2_000), account.create_customer(currency="usd")
    account.adjust_balance(customer, -500)
    record(engine, seen(account, session), *(event.body for event in account.events))
    fold_by(engine, OLDER)
    # An older release read other amounts, and announced them.
    for statement in (
        "UPDATE orders SET amount_total = 15",
        "UPDATE balances SET amount = -100",
        "UPDATE changes SET after = jsonb_set(after, '{amount_total}', '15') WHERE kind = 'order.opened'",
        "UPDATE changes SET after = jsonb_set(after, '{amount}', '-100') WHERE kind = 'balance.changed'",
    ):
        ledger.execute(engine, statement)
    account.advance(60)
    account.complete(session)
    arrival(engine, account.events[-1].body)
    account.advance(60)
    account.adjust_balance(customer, -200)
    arrival(engine, account.events[-1].body)

    assert announced(engine, session, "amount_total") == [
        ("order.opened", None, None, 15),
        ("order.corrected", "fold_version", 15, 2_000),
        ("order.paid", None, 2_000, 2_000),
    ]
    assert announced(engine, customer, "amount") == [
        ("balance.changed", None, announced(engine, customer, "amount")[0][2], -100),
        ("balance.changed", "fold_version", -100, -500),
        ("balance.changed", None, -500, -700),
    ]
    assert queue(engine) == 0


@ARRIVALS
def test_a_new_refund_of_an_order_whose_history_waits(engine: Engine, arrival: Arrival) -> None:
    """A new refund corrects the refunds that an older release misread, and only the correction is withheld."""
    account = Account(seed=46, payments=True)
    session = account.open_session(amount=2_000)
    account.complete(session)
    intents = account.order_intents(session)
    assert intents
    account.advance(60)
    first = account.refund(intents[0], 500)
    record(engine, *(event.body for event in account.events if event.type != "charge.refunded"))
    fold_by(engine, OLDER)
    ledger.execute(engine, "UPDATE refunds SET amount = 15 WHERE id = :id", id=first)
    ledger.execute(
        engine,
        "UPDATE changes SET after = jsonb_set(after, '{refunded_amount}', '15') WHERE kind = 'order.refund_changed'",
    )
    known = len(account.events)
    account.advance(60)
    account.refund(intents[0], 300)
    (new,) = [event for event in account.events[known:] if event.type == "refund.created"]

    arrival(engine, new.body)

    refunds = [row for row in ledger.rows(engine, ANNOUNCED, id=session) if row["kind"] == "order.refund_changed"]
    assert [
        (row["withheld"], row["before"]["refunded_amount"], row["after"]["refunded_amount"]) for row in refunds
    ] == [
        (None, 0, 15),
        ("fold_version", 15, 500),
        (None, 500, 800),
    ]


@ARRIVALS
def test_a_parked_event_that_folds_is_announced(engine: Engine, arrival: Arrival) -> None:
    """An event that an older release could not read is announced when it folds; one that it ignored is not."""
    account = Account(seed=47)
    parked, ignored, new = (account.open_session(amount=2_000) for _ in range(3))
    for session in (parked, ignored, new):
        account.complete(session)
    *old, last = [event.body for event in account.events]
    record(engine, *old)
    fold_by(engine, OLDER)
    conclude(engine, parked, "parked", "payload_unreadable")
    conclude(engine, ignored, "ignored", "type_unwanted")
    ledger.execute(engine, "DELETE FROM orders")
    ledger.execute(engine, "DELETE FROM changes")

    arrival(engine, last)

    assert announced(engine, parked, "status") == [("order.paid", None, None, "paid")]
    assert announced(engine, ignored, "status") == [("order.paid", "fold_version", None, "paid")]
    assert announced(engine, new, "status") == [("order.paid", None, None, "paid")]


def test_any_arrival_announces_the_same(engine: Engine) -> None:
    """A shop in the middle of an upgrade: each object's last visible change is that of a shop that never upgraded."""
    shop = shop_history(seed=48, orders=25, money=True)
    bodies = [event.body for event in shop.events]
    half = len(bodies) // 2
    record(engine, *bodies[:half])
    ledger.fold(engine)
    record(engine, *bodies[half:])
    ledger.fold(engine)
    digest, expected = ledger.digest_of(engine), shown(engine)

    for seed in range(3):
        rng = random.Random(seed)
        ledger.clear(engine)
        record(engine, *bodies[:half])
        fold_by(engine, OLDER)
        for body in bodies[half:]:
            record(engine, body)
            if rng.random() < 0.3:
                queue(engine, limit=rng.randint(1, 40))
            if rng.random() < 0.5:
                ledger.fold(engine, limit=rng.choice((1, 7, 500)))
        while queue(engine):
            ledger.fold(engine)
        ledger.fold(engine)
        assert ledger.digest_of(engine) == digest
        assert last_changes(shown(engine)) == last_changes(expected)
        # Both releases of this test fold alike, so the history changes nothing.
        assert ledger.rows(engine, "SELECT kind FROM changes WHERE withheld IS NOT NULL") == []


def last_changes(changes: list[dict[str, Any]]) -> dict[str, tuple[str, bytes]]:
    """Return the last change announced of each order, credit note and dispute, except refunds, which come and go."""
    return {
        row["subject_id"]: (row["kind"], msgspec.json.encode(row["after"]))
        for row in changes
        if row["subject"] in ("order", "credit_note", "dispute") and row["kind"] != "order.refund_changed"
    }
