"""Orders that their charges settle: captured later, released, canceled, and sessions of 2019.

Source: https://docs.stripe.com/payments/place-a-hold-on-a-payment-method for what a hold reports, and rule 10 of the
design for what it means.
"""

import json
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import permutations
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sqlalchemy import Engine

from schemas import database, observations
from schemas.inbox import Delivery
from schemas.own_events import EVENT_IGNORED
from schemas.progress import do_nothing
from tests import ledger, reference
from tests.literals import at
from tests.stage import stage
from tests.waiting import until_locked
from worker.folding import projection
from worker.folding.batch import Claimed
from worker.folding.claim import claim, lock_objects
from worker.folds.facts import Subject
from worker.logs import renaming
from worker.proof import against_stripe, explain, swap
from worker.proof.difference import Difference
from worker.proof.explain import Explanation
from worker.proof.rebuild import rebuilt
from worker.stripe_jobs import fetches

T: Final = 1_700_000_000
DAY: Final = 86_400

Field = str | int | None
Fields = dict[str, Field]
Json = dict[str, Any]
"""An event: its type, its time and its object. Ids have a placeholder for the history's number."""


def event(kind: str, when: int, /, **fields: Field) -> Json:
    """Return an event as Stripe renders it, without its id."""
    return {"object": "event", "type": kind, "created": when, "livemode": False, "data": {"object": fields}}


def session(kind: str = "completed", created: int = T, **fields: Field) -> Json:
    """Return an event of a Checkout Session that is complete, and unpaid by default."""
    usual: Fields = {"mode": "payment", "status": "complete", "payment_status": "unpaid", "payment_intent": "pi_#"}
    money: Fields = {"currency": "usd", "amount_total": 1500}
    return event(f"checkout.session.{kind}", created, id="cs_#", object="checkout.session", **money | usual | fields)


def charge(kind: str, created: int, id_: str = "ch_#", **fields: Field) -> Json:
    """Return an event of a charge of 1500, held by default."""
    usual: Fields = {
        "status": "succeeded",
        "captured": False,
        "refunded": False,
        "amount_captured": 0,
        "amount_refunded": 0,
    }
    money: Fields = {"currency": "usd", "amount": 1500, "payment_intent": "pi_#"}
    return event(f"charge.{kind}", created, id=id_, object="charge", **money | usual | fields)


def held(created: int = T, id_: str = "ch_#") -> Json:
    """Return the event of a charge that is authorized and not captured."""
    return charge("succeeded", created, id_)


def captured(created: int = T + DAY, id_: str = "ch_#", amount: int = 1500) -> Json:
    """Return the event of a charge that is captured, wholly or in part."""
    return charge("captured", created, id_, captured=True, amount_captured=amount, amount_refunded=1500 - amount)


def expired(created: int = T + 7 * DAY, id_: str = "ch_#") -> Json:
    """Return the event of a hold that ran out."""
    return charge("expired", created, id_, refunded=True, amount_refunded=1500)


def released(created: int = T + DAY, **fields: Field) -> Json:
    """Return the event of a refund that releases a hold."""
    usual: Fields = {"id": "re_#", "object": "refund", "amount": 1500, "currency": "usd", "status": "succeeded"}
    return event("refund.created", created, **usual, created=created, reason="expired_uncaptured_charge", **fields)


def canceled(created: int = T + DAY) -> Json:
    """Return the event of a canceled payment intent."""
    about: Fields = {"id": "pi_#", "object": "payment_intent", "status": "canceled", "canceled_at": created}
    return event("payment_intent.canceled", created, **about)


def failed(created: int = T, id_: str = "ch_a_#") -> Json:
    """Return the event of a charge that was declined."""
    return charge("failed", created, id_, status="failed")


def of_2019(kind: str = "completed", **fields: Field) -> Json:
    """Return the event of a session without status and payment status."""
    older = session(kind, T, **fields)
    for name in ("status", "payment_status", "amount_total", "currency"):
        del older["data"]["object"][name]
    return older


@dataclass(frozen=True)
class Case:
    """A history, its order at the end, and the type of the event that its last change names."""

    events: Sequence[Json]
    status: str | None
    paid_at: int | None = None
    failed_at: int | None = None
    by: str = "checkout.session.completed"
    anomalies: tuple[str, ...] = ()


CAPTURED: Final = "charge.captured"
PENDING: Final[dict[str, Any]] = {"status": "pending", "captured": True, "amount_captured": 1500}
CASES: Final = {
    "held": Case([session(), held()], "processing"),
    "captured later": Case([session(), held(), captured()], "paid", paid_at=T + DAY, by=CAPTURED),
    "captured in part": Case([session(), held(), captured(amount=600)], "paid", paid_at=T + DAY, by=CAPTURED),
    "captured, the order of its session's events in doubt": Case(
        [session(), session(amount_total=1600), captured()],
        "paid",
        paid_at=T + DAY,
        by=CAPTURED,
        anomalies=("ambiguous_order",),
    ),
    "captured at once, the session is late": Case(
        [session(), charge("succeeded", T - 1, captured=True, amount_captured=1500)],
        "paid",
        paid_at=T - 1,
        by="charge.succeeded",
    ),
    "captured, and then refunded": Case(
        [session(), captured(), charge("refunded", T + 2 * DAY, captured=True, refunded=True, amount_refunded=1500)],
        "paid",
        paid_at=T + DAY,
        by=CAPTURED,
    ),
    "released": Case([session(), held(), expired()], "failed", failed_at=T + 7 * DAY, by="charge.expired"),
    "refunded without having been captured": Case(
        [session(), held(), charge("refunded", T + DAY, refunded=True, amount_refunded=1500)],
        "failed",
        failed_at=T + DAY,
        by="charge.refunded",
    ),
    "released by a refund of its charge": Case(
        [session(), held(), released(charge="ch_#")], "failed", failed_at=T + DAY, by="refund.created"
    ),
    "released by a refund of its intent": Case(
        [session(), held(), released(payment_intent="pi_#")], "failed", failed_at=T + DAY, by="refund.created"
    ),
    "released, as only a refund shows": Case(
        [session(), released(charge="ch_#", payment_intent="pi_#")], "failed", failed_at=T + DAY, by="refund.created"
    ),
    "canceled": Case([session(), canceled()], "failed", failed_at=T + DAY, by="payment_intent.canceled"),
    "canceled while held": Case(
        [session(), held(), canceled()], "failed", failed_at=T + DAY, by="payment_intent.canceled"
    ),
    "canceled, and its charge is released": Case(
        [session(), held(), canceled(), charge("refunded", T + DAY, refunded=True, amount_refunded=1500)],
        "failed",
        failed_at=T + DAY,
        by="charge.refunded",
    ),
    "declined": Case([session(), failed()], "processing"),
    "declined, and then canceled": Case(
        [session(), failed(), canceled()], "failed", failed_at=T + DAY, by="payment_intent.canceled"
    ),
    "declined, then held": Case([session(), failed(T - 60), held()], "processing"),
    "declined, then held, then captured": Case(
        [session(), failed(T - 60), held(), captured()], "paid", paid_at=T + DAY, by=CAPTURED
    ),
    "one hold released, another captured": Case(
        [session(), expired(T + DAY, "ch_a_#"), captured(T + 2 * DAY)], "paid", paid_at=T + 2 * DAY, by=CAPTURED
    ),
    "released and captured": Case(
        [session(), captured(T + DAY), expired(T + 2 * DAY)],
        "paid",
        paid_at=T + DAY,
        by=CAPTURED,
        anomalies=("released_and_captured",),
    ),
    "a bank debit is pending": Case([session(), charge("pending", T, **PENDING)], "processing"),
    "a bank debit's charge succeeded": Case(
        [session(), charge("pending", T, **PENDING), charge("succeeded", T + DAY, captured=True)],
        "paid",
        paid_at=T + DAY,
        by="charge.succeeded",
    ),
    "a bank debit's charge failed": Case(
        [session(), charge("pending", T, **PENDING), charge("failed", T + DAY, status="failed", captured=True)],
        "processing",
    ),
    "a bank debit failed by its session": Case(
        [session(), charge("pending", T, **PENDING), session("async_payment_failed", T + DAY)],
        "failed",
        failed_at=T + DAY,
        by="checkout.session.async_payment_failed",
    ),
    "the session's own failure comes before a cancellation": Case(
        [session(), session("async_payment_failed", T + DAY), canceled(T + 2 * DAY)],
        "failed",
        failed_at=T + DAY,
        by="checkout.session.async_payment_failed",
    ),
    "failed, and captured after all": Case(
        [session(), session("async_payment_failed", T + DAY), captured(T + 2 * DAY)],
        "paid",
        paid_at=T + 2 * DAY,
        failed_at=T + DAY,
        by=CAPTURED,
    ),
    "the session is paid by its own event": Case(
        [session(), captured(T + DAY), session("async_payment_succeeded", T + 2 * DAY, payment_status="paid")],
        "paid",
        paid_at=T + 2 * DAY,
        by="checkout.session.async_payment_succeeded",
    ),
    "2019, paid": Case(
        [of_2019(), charge("succeeded", T - 1, captured=True)], "paid", paid_at=T - 1, by="charge.succeeded"
    ),
    "2019, held": Case([of_2019(), held()], None, anomalies=("unknown_status",)),
    "2019, released": Case([of_2019(), expired()], "failed", failed_at=T + 7 * DAY, by="charge.expired"),
    "2019, setup": Case([of_2019(mode="setup", payment_intent=None)], "complete"),
    "2019, nothing known": Case([of_2019()], None, anomalies=("unknown_status",)),
    "setup is not paid by anything": Case(
        [session(mode="setup", payment_status="no_payment_required", payment_intent=None)], "complete"
    ),
}
ANNOUNCED: Final = ("status", "amount_total", "currency")
KIND_OF_STATUS: Final = {
    "processing": "order.processing",
    "paid": "order.paid",
    "failed": "order.failed",
    "complete": "order.completed",
}


def body(about: Json, number: str, place: int) -> bytes:
    """Return the *place*-th event of the history *number*, with ids of its own."""
    return json.dumps({"id": f"evt_{place}_#", **about}).replace("#", number).encode()


def bodies(events: Sequence[Json], number: str) -> list[bytes]:
    """Return the bodies of the history *number*."""
    return [body(each, number, place) for place, each in enumerate(events)]


def splits(count: int) -> Iterator[list[int]]:
    """Yield, for each way to cut *count* events into batches, the batch number of each event."""
    for cuts in range(2 ** (count - 1)):
        yield [(cuts & (2**place - 1)).bit_count() for place in range(count)]


def take_in_all_ways(engine: Engine, events: Sequence[Json], name: str, workers: int = 1) -> list[str]:
    """Fold *events* in every order and every split, each as a history of its own; return their numbers.

    The batches of all histories are folded together.
    """
    batches: list[list[Delivery]] = [[] for _ in events]
    numbers = []
    for at_order, order in enumerate(permutations(range(len(events)))):
        for at_split, batch_of in enumerate(splits(len(events))):
            numbers.append(number := f"{name}_{at_order}_{at_split}")
            sent = bodies(events, number)
            for place, batch in zip(order, batch_of, strict=True):
                batches[batch].append(ledger.delivery(sent[place]))
    for deliveries in batches:
        ledger.record(engine, deliveries)
        ledger.fold_with_workers(engine, workers, limit=500)
    return numbers


def orders(engine: Engine) -> dict[str, dict[str, Any]]:
    """Return the orders by their ids."""
    return {row["id"]: row for row in ledger.rows(engine, "SELECT * FROM orders")}


def last_changes(engine: Engine) -> dict[str, dict[str, Any]]:
    """Return the last change of each order, refunds excepted."""
    found = ledger.rows(
        engine, "SELECT * FROM changes WHERE subject = 'order' AND kind <> 'order.refund_changed' ORDER BY seq"
    )
    return {row["subject_id"]: row for row in found}


def assert_announced(engine: Engine, order: dict[str, Any], status: str | None) -> None:
    """Assert that the last one-shot of *order* is of its *status*, and that the last change equals its row.

    Whether a correction follows depends on the arrival: only an order that was announced with another total gets one.
    """
    about = "SELECT kind, after FROM changes WHERE subject_id = :id AND kind <> 'order.refund_changed' ORDER BY seq"
    found = ledger.rows(engine, about, id=order["id"])
    one_shots = [row["kind"] for row in found if row["kind"] != "order.corrected"]
    assert one_shots[-1:] == ([] if status is None else [KIND_OF_STATUS[status]])
    if found:
        assert {name: order[name] for name in ANNOUNCED} == {name: found[-1]["after"][name] for name in ANNOUNCED}


def time(seconds: int | None) -> datetime | None:
    """Return *seconds* as the datetime of a column."""
    return None if seconds is None else at(seconds)


def reading(created: int, place: str = "a", **fields: Field) -> Json:
    """Return a reading of the session, which Stripe shows as paid."""
    read = session("completed", created, **{"payment_status": "paid", **fields})
    return {**read, "id": f"obs_{place}_#", "type": "payfold.checkout.session.observed"}


# What only a reading shows as paid was paid when its charge was captured, where that is known (rule 10: no event of the
# session says so); else when it was read.
READ: Final[dict[str, tuple[Sequence[Json], int]]] = {
    "captured by hand, and read a year later": ([session(), held(), captured(), reading(T + 365 * DAY)], T + DAY),
    "read twice": ([session(), captured(), reading(T + 2 * DAY), reading(T + 9 * DAY, "b")], T + DAY),
    "its completion was lost": ([captured(), reading(T + 2 * DAY)], T + DAY),
    "no charge is known": ([session(), reading(T + 2 * DAY)], T + 2 * DAY),
    "the charge is only held": ([session(), held(), reading(T + 2 * DAY)], T + 2 * DAY),
    "2019": ([of_2019(), charge("succeeded", T - 1, captured=True), reading(T + 2000 * DAY)], T - 1),
    "an event of the session says so": (
        [
            session(),
            captured(),
            session("async_payment_succeeded", T + 2 * DAY, payment_status="paid"),
            reading(T + 3 * DAY),
        ],
        T + 2 * DAY,
    ),
    # The event is dated long after what the reading saw, so that is no time of the payment either.
    "an event comes long after the reading": (
        [
            session(),
            captured(),
            reading(T + 2 * DAY),
            session("async_payment_succeeded", T + 9 * DAY, payment_status="paid"),
        ],
        T + DAY,
    ),
    # Five seconds are the most by which a reading is dated wrongly.
    "read at once": ([session(), captured(), reading(T + DAY + 5)], T + DAY + 5),
    "read six seconds later": ([session(), captured(), reading(T + DAY + 6)], T + DAY),
    "a charge that failed after all": (
        [
            session(),
            charge("succeeded", T + DAY, captured=True),
            charge("failed", T + 2 * DAY, status="failed", captured=True),
            reading(T + 3 * DAY),
        ],
        T + 3 * DAY,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_reading_shows_that_it_was_paid_and_not_when(engine: Engine, name: str) -> None:
    """In every order and every split the time of payment is that of the capture, and a rebuild makes it, too."""
    events, paid_at = READ[name]
    numbers = take_in_all_ways(engine, events, "r")

    found = orders(engine)
    assert len(found) == len(numbers)
    assert {(row["status"], row["paid_at"]) for row in found.values()} == {("paid", at(paid_at))}
    kinds = ledger.rows(engine, "SELECT subject_id, count(*) FROM changes WHERE kind = 'order.paid' GROUP BY 1")
    assert {row["count"] for row in kinds} == {1}
    explained = explain.explain(engine, Subject("orders", "", livemode=False, id=f"cs_{numbers[-1]}"))
    assert explained.row is not None
    assert explained.row["paid_at"] == at(paid_at)
    with rebuilt(engine) as made:
        assert ledger.digest_of(engine, made.schema) == ledger.digest_of(engine)


@pytest.mark.parametrize("name", CASES)
def test_every_arrival_of_a_history(engine: Engine, name: str) -> None:
    """In every order and every split the order is the same and announced once, and a rebuild gives the same."""
    case = CASES[name]
    numbers = take_in_all_ways(engine, case.events, "h")

    found, last = orders(engine), last_changes(engine)
    assert len(found) == len(numbers)
    for number in numbers:
        order = found[f"cs_{number}"]
        assert (order["status"], order["paid_at"], order["failed_at"]) == (
            case.status,
            time(case.paid_at),
            time(case.failed_at),
        )
        assert_announced(engine, order, case.status)
    if case.status is not None:
        named = last[f"cs_{numbers[0]}"]
        (by,) = ledger.rows(engine, "SELECT type, created, source FROM events WHERE id = :id", id=named["event_id"])
        assert (case.by, named["at"], named["source"]) == (by["type"], by["created"], by["source"])
    assert set(ledger.anomalies(engine)) == set(case.anomalies)
    assert len(ledger.anomalies(engine)) == len(case.anomalies) * len(numbers)
    one_shots = [
        (row["subject_id"], row["kind"]) for row in ledger.rows(engine, "SELECT subject_id, kind FROM changes")
    ]
    repeatable = ("order.refund_changed", "order.corrected")
    assert [each for each in one_shots if each[1] not in repeatable and one_shots.count(each) > 1] == []
    with rebuilt(engine) as made:
        assert ledger.digest_of(engine, made.schema) == ledger.digest_of(engine)
        in_force = "SELECT account, livemode, id FROM {} WHERE resolved_at IS NULL ORDER BY 1, 2, 3"
        assert ledger.rows(engine, in_force.format(f"{made.schema}.anomalies")) == ledger.rows(
            engine, in_force.format("anomalies")
        )


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_settle_together(engine: Engine, workers: int) -> None:
    """Histories that several workers fold at once in small batches end as each does alone."""
    rng = random.Random(workers)
    deliveries, wanted = [], {}
    for place, case in enumerate(CASES.values()):
        for copy in range(4):
            wanted[f"cs_{place}_{copy}"] = case
            deliveries += [ledger.delivery(each) for each in bodies(case.events, f"{place}_{copy}")]
    rng.shuffle(deliveries)
    for batch in ledger.batches(deliveries, iter(lambda: 150, 0)):
        ledger.record(engine, batch)
        ledger.fold_with_workers(engine, workers, limit=7)

    found = orders(engine)
    assert {id_: order["status"] for id_, order in found.items()} == {id_: c.status for id_, c in wanted.items()}
    with rebuilt(engine) as made:
        assert ledger.digest_of(engine, made.schema) == ledger.digest_of(engine)


def claim_one(cursor: database.Cursor, event_id: str) -> list[Claimed]:
    """Claim the one event *event_id*."""
    cursor.execute("SELECT seq FROM inbox WHERE id = %s", (event_id,))
    ((seq,),) = cursor.fetchall()
    return claim(cursor, limit=1, only=[seq])


@pytest.mark.parametrize("first", [0, 1])
def test_two_transactions_at_once(engine: Engine, first: int) -> None:
    """Of the batches of an order and of its charge the one that commits last settles the order."""
    sent = bodies([session(), captured()], "1")
    ledger.record(engine, [ledger.delivery(each) for each in sent])
    other = threading.Thread(target=lambda: projection.run_once(engine, now=ledger.NOW))

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        projection.project(cursor, claim_one(cursor, f"evt_{first}_1"), now=ledger.NOW)
        other.start()
        until_locked(engine)
    other.join()

    assert orders(engine)["cs_1"]["status"] == "paid"
    expected = ["order.processing", "order.paid"] if first == 0 else ["order.paid"]
    assert ledger.kinds(engine, "cs_1") == expected


@pytest.mark.parametrize("fails", [False, True])
def test_an_order_that_another_session_locks_is_settled(engine: Engine, *, fails: bool) -> None:
    """A charge's batch skips a locked order, which is settled whether the locking session commits or not."""
    ledger.take_in(engine, *bodies([session(), held()], "1"))
    ledger.record(engine, [ledger.delivery(body(captured(), "1", 2))])
    order = Subject("orders", "", False, "cs_1")  # noqa: FBT003 - the mode
    charged = threading.Thread(target=lambda: projection.run_once(engine, now=ledger.NOW))

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        lock_objects(cursor, [order], ())  # as a batch of the order holds it
        charged.start()
        until_locked(engine)
        folded = ledger.rows(engine, "SELECT state FROM events WHERE id = 'evt_2_1'")
        assert folded == [{"state": "folded"}]
        assert orders(engine)["cs_1"]["status"] == "processing"
        if fails:
            connection.rollback()
        else:
            ledger.record(engine, [ledger.delivery(body(session("async_payment_failed", T + 60), "1", 3))])
            projection.project(cursor, claim_one(cursor, "evt_3_1"), now=ledger.NOW)
            assert orders(engine)["cs_1"]["status"] == "processing"
    charged.join()

    assert orders(engine)["cs_1"]["status"] == "paid"
    assert ledger.kinds(engine, "cs_1") == ["order.processing", "order.paid"]


def test_a_skipped_order_is_settled_later(engine: Engine) -> None:
    """A skipped order is settled in a later run, though no event is pending."""
    ledger.take_in(engine, *bodies([session(), held()], "1"))
    order = Subject("orders", "", False, "cs_1")  # noqa: FBT003 - the mode
    ledger.record(engine, [ledger.delivery(body(captured(), "1", 2))])
    with database.transaction(engine) as other, database.cursor(other) as holding:
        lock_objects(holding, [order], ())
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            # The process ends after this commit.
            projection.project(cursor, claim(cursor, limit=9), now=ledger.NOW)
    assert orders(engine)["cs_1"]["status"] == "processing"

    assert projection.run_once(engine, now=ledger.NOW) == 0

    assert orders(engine)["cs_1"]["status"] == "paid"
    assert ledger.kinds(engine, "cs_1") == ["order.processing", "order.paid"]
    assert ledger.rows(engine, "SELECT FROM unsettled") == []


def test_a_rename_delays_only_its_own_orders(engine: Engine) -> None:
    """An order is settled at once unless its account is being renamed, and then afterwards."""
    of_world = {"1": "", "2": "acct_old"}
    for name, account in of_world.items():
        ledger.take_in(engine, *bodies([session(), held(), captured()], name), account=account)
    ledger.execute(engine, "UPDATE orders SET status = 'processing', paid_at = NULL")
    ledger.execute(engine, "INSERT INTO account_names VALUES ('acct_old', 'acct_new', now(), NULL)")
    ledger.execute(engine, "INSERT INTO unsettled SELECT account, livemode, id FROM orders")

    projection.run_once(engine, now=ledger.NOW)

    rows = ledger.rows(engine, "SELECT id, status FROM orders ORDER BY id")
    assert [tuple(row.values()) for row in rows] == [("cs_1", "paid"), ("cs_2", "processing")]
    assert ledger.rows(engine, "SELECT id FROM unsettled") == [{"id": "cs_2"}]


def test_a_thousand_orders_are_settled_at_once(engine: Engine) -> None:
    """A batch of a thousand captures settles a thousand stored orders, each announced once with its charge's event."""
    numbers = [str(number) for number in range(1_000)]
    opened, paid = session(), captured()
    ledger.record(engine, [ledger.delivery(body(opened, number, 0)) for number in numbers])
    projection.run_once(engine, now=ledger.NOW, limit=1_000)
    ledger.record(engine, [ledger.delivery(body(paid, number, 1)) for number in numbers])

    assert projection.run_once(engine, now=ledger.NOW, limit=1_000) == 1_000

    sent = ledger.rows(engine, "SELECT subject_id, event_id, at, source FROM changes WHERE kind = 'order.paid'")
    assert {row["subject_id"]: row["event_id"] for row in sent} == {f"cs_{n}": f"evt_1_{n}" for n in numbers}
    assert {(row["at"], row["source"]) for row in sent} == {(at(T + DAY), "webhook")}
    assert {row["status"] for row in orders(engine).values()} == {"paid"}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(sorted(CASES)), min_size=1, max_size=6), chance=st.randoms())
def test_arrival_changes_nothing(engine: Engine, names: list[str], chance: random.Random) -> None:
    """Any mixture of histories, permuted, duplicated and split, gives the reference's digest and the same anomalies."""
    ledger.clear(engine)
    sent = [each for place, name in enumerate(names) for each in bodies(CASES[name].events, str(place))]
    expected = ledger.digest_of_reference(engine, reference.tables_of(sent))
    deliveries = [ledger.delivery(each) for each in [*sent, *chance.sample(sent, len(sent) // 2)]]
    chance.shuffle(deliveries)

    for batch in ledger.batches(deliveries, iter(lambda: chance.randint(1, 4), 0)):
        ledger.record(engine, batch)
        ledger.fold_with_workers(engine, chance.randint(1, 2), limit=3)

    assert ledger.digest_of(engine) == expected
    assert sorted(ledger.anomalies(engine)) == sorted(kind for name in names for kind in CASES[name].anomalies)
    found = orders(engine)
    for place, name in enumerate(names):
        assert_announced(engine, found[f"cs_{place}"], CASES[name].status)


def explained(engine: Engine, *, as_of: datetime | None = None) -> tuple[Explanation, dict[str, dict[str, Any]]]:
    """Return the explanation of the order cs_1, and its columns by their names."""
    found = explain.explain(engine, Subject("orders", "", False, "cs_1"), as_of=as_of)  # noqa: FBT003 - the mode
    return found, {each["column"]: each for each in found.columns}


def test_an_explanation_names_the_charge(engine: Engine) -> None:
    """The charge's event set the order, now and as of any time since it was received, and not before."""
    known = []
    for hour, each in enumerate(bodies([session(), held(), captured(), captured(T + 2 * DAY)], "1")):
        received = ledger.NOW + timedelta(hours=hour)
        ledger.record(engine, [replace(ledger.delivery(each), received_at=received)])
        ledger.fold(engine)
        known.append((received, orders(engine)["cs_1"]))

    explanation, columns = explained(engine)
    assert explanation.row == orders(engine)["cs_1"]
    for name in ("status", "paid_at"):
        assert (columns[name]["how"], columns[name]["event_id"]) == ("by its charge", "evt_2_1")
    assert [(each["event_id"], each["sets"]) for each in explanation.timeline][1:] == [
        ("evt_2_1", ["paid_at", "status"])
    ]
    for received, row in known:
        explanation, columns = explained(engine, as_of=received)
        assert explanation.row == row
        assert columns["status"]["event_id"] == ("evt_2_1" if row["status"] == "paid" else None)


# Several events of one second report the charge's end; the place of the one that the explanation names.
OF_ONE_SECOND: Final = {
    "a release that an update reports too": (
        [charge("updated", T + DAY, refunded=True, amount_refunded=1500), expired(T + DAY)],
        1,
    ),
    "a refund, then an update, then the capture": (
        [
            charge("refunded", T + DAY, captured=True, amount_captured=1500, amount_refunded=500),
            charge("updated", T + DAY, captured=True, amount_captured=1500),
            captured(),
        ],
        2,
    ),
    "an update before the charge succeeds": (
        [
            charge("updated", T, captured=True, amount_captured=1500),
            charge("succeeded", T, captured=True, amount_captured=1500),
        ],
        1,
    ),
    "two of one type": ([captured(amount=600), captured(amount=700)], 0),
}


@pytest.mark.parametrize("name", OF_ONE_SECOND)
def test_an_explanation_names_the_same_charge_at_each_time(engine: Engine, name: str) -> None:
    """Of several events of one second the change and the explanation, now and as of now, name the same one."""
    events, place = OF_ONE_SECOND[name]
    ledger.take_in(engine, *bodies([session(), *events], "1"))

    for as_of in (None, ledger.NOW + timedelta(days=1)):
        _, columns = explained(engine, as_of=as_of)
        assert columns["status"]["event_id"] == f"evt_{place + 1}_1"


def test_a_session_is_read_again_when_its_charge_moves(database_url: str, redis_url: str) -> None:
    """With a key, a session with an open payment is read once after each new state of its charge."""
    with stage(database_url, redis_url) as shop:
        id_ = shop.account.open_session()
        shop.account.complete(id_, payment_status="unpaid")
        shop.deliver()
        intent = str(shop.account.session(id_)["payment_intent"])
        shop.account.advance(600)
        fetches.run_once(shop.context())
        shop.fold()

        for created, kind in ((600, "pending"), (DAY, "succeeded")):
            shop.account.advance(created)
            paid = kind == "succeeded"
            moved = charge(kind, shop.account.now, status=kind, captured=paid, payment_intent=intent)
            ledger.record(shop.engine, [replace(ledger.delivery(body(moved, "1", created)), received_at=shop.now)])
            shop.fold()
            for read in (1, 0, 0):
                shop.api.calls.clear()
                shop.account.advance(20)
                fetches.run_once(shop.context())
                shop.fold()
                assert [made.path for made in shop.api.calls if made.path.endswith(id_)] == [
                    f"/v1/checkout/sessions/{id_}"
                ] * read

        assert shop.status(id_) == "paid"
        assert shop.kinds(id_) == ["order.processing", "order.paid"]


def test_a_rename_joins_an_order_and_its_charge(engine: Engine) -> None:
    """After a rename the charge of one name settles the order of the other, and the changes are withheld."""
    opened, held_, captured_ = bodies([session(), held(), captured()], "1")
    ledger.record(engine, [ledger.delivery(each, account="shop") for each in (opened, held_)])
    ledger.record(engine, [ledger.delivery(captured_, account="acct_1")])
    ledger.fold(engine)

    renaming.rename(engine, "shop", "acct_1", now=ledger.NOW, is_one=True)

    assert [(row["account"], row["status"]) for row in orders(engine).values()] == [("acct_1", "paid")]
    found = ledger.rows(engine, "SELECT kind, withheld FROM changes ORDER BY seq")
    assert found == [{"kind": "order.processing", "withheld": None}, {"kind": "order.paid", "withheld": "rename"}]


def test_a_charge_that_is_ignored(engine: Engine) -> None:
    """After an operator ignores a capture its order is processing again, as if the capture had never come."""
    ledger.take_in(engine, *bodies([session(), held(), captured()], "1"))
    about = {"object": "event", "id": "evt_2_1", "reason": "a test"}
    word = observations.observe(EVENT_IGNORED, about, account="", livemode=False, created=T + 2 * DAY, now=ledger.NOW)
    ledger.record(engine, [word])
    ledger.fold(engine)

    order = orders(engine)["cs_1"]
    assert (order["status"], order["paid_at"]) == ("processing", None)
    with rebuilt(engine) as made:
        assert ledger.digest_of(engine, made.schema) == ledger.digest_of(engine)


def test_a_swap_settles(engine: Engine) -> None:
    """A swap writes the columns that charges set, and its change names the charge's event."""
    ledger.take_in(engine, *bodies([session(), held(), captured()], "1"))
    ledger.execute(engine, "UPDATE orders SET status = 'processing', paid_at = NULL")
    ledger.execute(engine, "DELETE FROM changes WHERE kind = 'order.paid'")

    with rebuilt(engine) as made:
        found, appended = swap.swap(made)

    assert (found.drift, appended) == (1, 1)
    assert orders(engine)["cs_1"]["paid_at"] == at(T + DAY)
    (change,) = ledger.rows(engine, "SELECT * FROM changes WHERE kind = 'order.paid'")
    assert (change["event_id"], change["at"]) == ("evt_2_1", at(T + DAY))


def test_an_audit_sees_no_difference(database_url: str, redis_url: str) -> None:
    """An audit accepts a session that Stripe lists as unpaid for an order that its charge has paid."""
    with stage(database_url, redis_url) as shop:
        id_ = shop.account.open_session()
        shop.account.complete(id_, payment_status="unpaid")
        shop.deliver()
        intent = str(shop.account.session(id_)["payment_intent"])
        paid = charge("captured", shop.account.now, captured=True, payment_intent=intent)
        ledger.record(shop.engine, [ledger.delivery(body(paid, "1", 1))])
        shop.fold()
        shop.account.advance(DAY)

        found = [each for each in against_stripe.audit(shop.context()) if isinstance(each, Difference)]

        assert shop.status(id_) == "paid"
        assert [each for each in found if each.table == "orders"] == []


def test_an_archived_charge_is_no_drift(engine: Engine) -> None:
    """An order is left out of a comparison, and is no drift, if its charge's payload is archived."""
    ledger.take_in(engine, *bodies([session(), held(), captured()], "1"))
    ledger.execute(engine, "DELETE FROM payloads WHERE seq IN (SELECT seq FROM inbox WHERE object_type = 'charge')")

    with rebuilt(engine) as made:
        found = swap.compare(made, on_difference=do_nothing)

    assert (found.drift, found.events_left_out) == (0, 2)
