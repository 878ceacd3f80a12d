"""From the inbox to the tables: the same set of events gives the same digest in any arrival."""

import random
import re
import threading
from itertools import permutations
from pathlib import Path
from typing import Literal, cast

import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from deploy.sandbox.account import Account
from deploy.sandbox.history import shop_history
from deploy.sandbox.rendering import render
from deploy.sandbox.samples import sample
from schemas import database, tables
from tests import histories, ledger, reference
from tests.test_corrections import assert_the_last_word_is_the_row
from tests.waiting import until_locked
from worker import folds
from worker.folding import projection
from worker.folding.claim import claim, queue_outdated
from worker.proof.rebuild import refolded

ONE_SHOT = {"order.opened", "order.processing", "order.paid", "order.completed", "order.failed", "order.expired"}
KIND_OF_STATUS = {
    "open": "order.opened",
    "processing": "order.processing",
    "paid": "order.paid",
    "complete": "order.completed",
    "failed": "order.failed",
    "expired": "order.expired",
}
WORKERS_MAX = 3

seeds = st.integers(0, 2**32)


def assert_changes_keep_their_promise(engine: Engine) -> None:
    """Assert that one-shot kinds come once, the final state's among them, and that the last change is the row."""
    assert_the_last_word_is_the_row(engine)
    kinds = [(row["subject_id"], row["kind"]) for row in ledger.rows(engine, "SELECT subject_id, kind FROM changes")]
    once = [each for each in kinds if each[1] in ONE_SHOT]
    assert len(once) == len(set(once))
    for order in ledger.rows(engine, "SELECT id, status FROM orders WHERE status IS NOT NULL"):
        assert kinds.count((order["id"], KIND_OF_STATUS[order["status"]])) == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=seeds, workers=st.integers(1, WORKERS_MAX), limit=st.sampled_from([1, 2, 3, 500]), chance=st.randoms())
def test_any_delivery_gives_the_reference_digest(
    engine: Engine, seed: int, workers: int, limit: int, chance: random.Random
) -> None:
    """Permuted, duplicated, redelivered after folding, split at will, by any number of workers: the digest is one."""
    ledger.clear(engine)
    bodies = histories.bodies_of(seed)
    try:
        expected = ledger.digest_of_reference(engine, reference.tables_of(bodies))
    except reference.TooMany:
        reject()
    deliveries = [ledger.delivery(body) for body in bodies]
    deliveries += chance.sample(deliveries, chance.randint(0, len(deliveries)))
    chance.shuffle(deliveries)

    for batch in ledger.batches(deliveries, iter(lambda: chance.randint(1, 6), 0)):
        ledger.record(engine, batch)
        if chance.random() < 0.6:
            ledger.fold_with_workers(engine, workers, limit=limit)
    ledger.fold_with_workers(engine, workers, limit=limit)

    assert ledger.digest_of(engine) == expected
    assert_changes_keep_their_promise(engine)


@pytest.mark.parametrize("seed", range(3))
def test_every_permutation_one_by_one(engine: Engine, seed: int) -> None:
    """Every order of a link's busy second, one event a batch, gives the reference's digest."""
    account = Account(seed=seed)
    link = account.create_payment_link()
    for index in range(3):
        account.update_payment_link(link, active=bool(index % 2), metadata={"step": str(index)})
    bodies = [event.body for event in account.events]
    expected = ledger.digest_of_reference(engine, reference.tables_of(bodies))

    for order in permutations(bodies):
        ledger.clear(engine)
        ledger.take_in(engine, *order)
        assert ledger.digest_of(engine) == expected


def test_a_rebuild_in_another_order_is_the_same(engine: Engine) -> None:
    """Folding a shop's inbox again in random order gives the same tables, anomalies included."""
    events = shop_history(seed=3, orders=150).events
    for batch in ledger.batches([ledger.delivery(event.body) for event in events], iter(lambda: 64, 0)):
        ledger.record(engine, batch)
        ledger.fold(engine)

    with refolded(engine, seed=4) as made:
        again = ledger.digest_of(engine, made.schema)
        in_force = "SELECT account, livemode, id FROM {} WHERE resolved_at IS NULL ORDER BY 1, 2, 3"
        assert ledger.rows(engine, in_force.format(f"{made.schema}.anomalies")) == ledger.rows(
            engine, in_force.format("anomalies")
        )
    assert again == ledger.digest_of(engine)


def test_the_tables_agree_with_the_shops_books(engine: Engine) -> None:
    """Every order has the status that the simulated shop's own books give it."""
    account = shop_history(seed=5, orders=200)
    deliveries = [ledger.delivery(event.body) for event in account.events]
    random.Random(5).shuffle(deliveries)
    ledger.record(engine, deliveries)
    ledger.fold(engine)

    held = {row["id"]: row["status"] for row in ledger.rows(engine, "SELECT id, status FROM orders")}
    assert held == {session: account.expected_status(session) for session in held}
    assert len(held) > 150


def test_an_order_that_was_unreadable_is_not_paid_twice(engine: Engine) -> None:
    """An order whose event is unreadable in a second rendering, and readable in a third, is announced as paid once."""
    body = sample("checkout.session.completed", {}, now=1).payload()
    for version, amount in (("2025-01-01", 2_000), ("2025-02-01", "twenty"), ("2025-03-01", 2_000)):
        body["api_version"], body["data"]["object"]["amount_total"] = version, amount
        ledger.take_in(engine, msgspec.json.encode(body))

    changes = ledger.rows(engine, "SELECT kind FROM changes")
    assert [row["kind"] for row in changes] == ["order.paid"]
    assert ledger.rows(engine, "SELECT state FROM events") == [{"state": "folded"}]
    assert ledger.rows(engine, "SELECT status FROM orders") == [{"status": "paid"}]


def test_never_two_workers_on_one_object(engine: Engine) -> None:
    """A second worker that claims an event of an object waits until the first has committed it, and sees its row."""
    account = Account(seed=1)
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    account.advance(60)
    account.async_payment_succeeded(session)
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])
    second_has_claimed = threading.Event()

    def second() -> None:
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            claimed = claim(cursor, limit=1)
            second_has_claimed.set()
            projection.project(cursor, claimed, now=ledger.NOW)

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        projection.project(cursor, claim(cursor, limit=1), now=ledger.NOW)
        thread = threading.Thread(target=second)
        thread.start()
        assert second_has_claimed.wait(timeout=30)
        until_locked(engine)
    thread.join(timeout=30)

    assert ledger.rows(engine, "SELECT status FROM orders") == [{"status": "paid"}]
    assert ledger.kinds(engine, session) == ["order.processing", "order.paid"]


@pytest.mark.parametrize("mode", ["payment", "subscription"])
@pytest.mark.parametrize("first", ["order", "refund"])
def test_an_order_and_its_refund_at_once(engine: Engine, first: str, mode: Literal["payment", "subscription"]) -> None:
    """An order and its refund that two workers fold at once, in either order, give one announced refund.

    A payment's order names the refund's intent; a subscription's order is linked through its invoice.
    """
    account = Account(seed=15, payments=True)
    session = account.open_session(amount=2_000, mode=mode, customer=account.create_customer())
    account.complete(session)
    intents = account.order_intents(session)
    assert intents
    account.refund(intents[0])
    by_kind = {
        "order": [event.body for event in account.events if event.type == "checkout.session.completed"],
        "refund": [event.body for event in account.events if event.type == "refund.created"],
    }
    ledger.take_in(engine, *(event.body for event in account.events if event.type.startswith("invoice_payment.")))
    second = "refund" if first == "order" else "order"
    ledger.record(engine, [ledger.delivery(body) for body in by_kind[first]])

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        projection.project(cursor, claim(cursor, limit=9), now=ledger.NOW)
        # Neither worker sees what the other has not committed, so the second has to wait.
        ledger.record(engine, [ledger.delivery(body) for body in by_kind[second]])
        thread = threading.Thread(target=ledger.fold, args=[engine])
        thread.start()
        until_locked(engine)
    thread.join(timeout=30)

    changes = ledger.rows(engine, "SELECT subject_id, after FROM changes WHERE kind = 'order.refund_changed'")
    assert [(row["subject_id"], row["after"]["refund_status"]) for row in changes] == [(session, "full")]


def test_a_reader_with_a_cursor_misses_no_change(engine: Engine) -> None:
    """Between one worker's append and its commit no other change can get a later number and be read first."""
    account = Account(seed=2)
    first, other = account.create_payment_link(), account.create_payment_link()
    ledger.record(engine, [ledger.delivery(account.events[0].body)])

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        projection.project(cursor, claim(cursor, limit=1), now=ledger.NOW)
        # The first worker has appended and not committed. The second folds another object, and has to wait.
        ledger.record(engine, [ledger.delivery(account.events[1].body)])
        thread = threading.Thread(target=ledger.fold, args=[engine])
        thread.start()
        until_locked(engine)
        assert ledger.rows(engine, "SELECT seq FROM changes") == []
    thread.join(timeout=30)

    changes = ledger.rows(engine, "SELECT seq, subject_id FROM changes ORDER BY seq")
    assert [row["subject_id"] for row in changes] == [first, other]


def test_one_poisonous_event_is_parked_alone(engine: Engine) -> None:
    """An event that PostgreSQL refuses to save is parked with the reason; the rest of its batch is folded."""
    account = shop_history(seed=6, orders=20)
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])
    (victim,) = ledger.rows(engine, "SELECT object_id FROM inbox WHERE object_type = 'checkout.session' LIMIT 1")
    with database.transaction(engine) as connection:
        refusal = f"ALTER TABLE orders ADD CONSTRAINT poison CHECK (id <> '{victim['object_id']}')"
        connection.execute(text(refusal))

    ledger.fold(engine)

    states = {row["object_id"]: row for row in ledger.rows(engine, "SELECT object_id, state, reason FROM events")}
    poisoned = states.pop(victim["object_id"])
    assert poisoned["state"] == "parked"
    assert poisoned["reason"] == "PostgreSQL refused its row: CheckViolation"
    assert {row["state"] for row in states.values()} == {"folded"}


@pytest.mark.parametrize("limit", [1, 2])
def test_one_poisonous_event_leaves_its_objects_other_events(engine: Engine, limit: int) -> None:
    """An object's other events are folded, whether the refused event comes in their batch or later."""
    body = sample("credit_note.created", {}, now=1).payload()
    after = sample("credit_note.voided", {"id": body["data"]["object"]["id"]}, now=2)
    with database.transaction(engine) as connection:
        connection.execute(text("ALTER TABLE credit_notes ADD CHECK (status <> 'void')"))
    ledger.record(engine, [ledger.delivery(each) for each in (msgspec.json.encode(body), after.body)])

    ledger.fold(engine, limit=limit)

    states = ledger.rows(engine, "SELECT type, state FROM events ORDER BY seq")
    assert [row["state"] for row in states] == ["folded", "parked"]
    assert ledger.rows(engine, "SELECT status FROM credit_notes") == [{"status": "issued"}]


def test_a_newer_rendering_removes_an_older_ones_row(engine: Engine) -> None:
    """A balance that only an older rendering of a customer's event reported has no row."""
    body = sample("customer.updated", {}, now=1).payload()
    body["api_version"], customer = "2025-01-01", body["data"]["object"]
    customer |= {"balance": -500, "currency": "eur"}
    body["data"]["previous_attributes"] = {"balance": 0}
    ledger.take_in(engine, msgspec.json.encode(body))
    held = ledger.rows(engine, "SELECT amount FROM balances"), ledger.rows(engine, "SELECT amount FROM balance_changes")
    body["api_version"], body["data"]["previous_attributes"] = "2025-02-01", {"name": None}
    del customer["balance"]

    ledger.take_in(engine, msgspec.json.encode(body))

    assert held == ([{"amount": -500}], [{"amount": -500}])
    assert ledger.rows(engine, "SELECT amount FROM balances") == []
    assert ledger.rows(engine, "SELECT amount FROM balance_changes") == []
    assert len(ledger.rows(engine, "SELECT id FROM customers")) == 1


@pytest.mark.parametrize(
    ("error", "cause", "parks"),
    [
        (psycopg.errors.NumericValueOutOfRange("12"), "row_refused", True),
        (psycopg.errors.CheckViolation("12"), "row_refused", True),
        (psycopg.errors.ProgramLimitExceeded("12"), "row_refused", True),
        (psycopg.DataError("of the driver, which gives no SQLSTATE"), "row_refused", True),
        (psycopg.ProgrammingError("likewise"), "row_refused", True),
        (TypeError("of a buyer's name"), "fold_failed", True),
        (psycopg.errors.DeadlockDetected("by another"), "database_busy", False),
        (psycopg.errors.LockNotAvailable("by another"), "database_busy", False),
        (psycopg.errors.QueryCanceled("in time"), "database_busy", False),
        (psycopg.errors.DiskFull("of all"), "database_busy", False),
        (psycopg.errors.InsufficientPrivilege("for orders"), "database_refused", False),
        (psycopg.errors.UndefinedColumn("of orders"), "database_refused", False),
        (MemoryError(), "machine_short", False),
    ],
)
def test_which_failures_park_an_event(error: Exception, cause: str, *, parks: bool) -> None:
    """Only a fault in the data parks an event; its code is a known one, and its text quotes no error message."""
    failure = projection.failure_of(error)

    assert (failure.cause, failure.is_of_data) == (cause, parks)
    assert cause in tables.CAUSES
    assert type(error).__name__ in failure.reason
    assert not str(error) or str(error) not in failure.reason


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("amount_total", "a lot", "Expected `int | null`, got `str` - at `$.data.object.amount_total`"),
        ("amount_total", 2**80, "Expected `int` <= 9223372036854775807"),
        ("expires_at", 10**15, "Expected `int` <= 253402300799"),
        ("metadata", {"nested": {"too": "deep"}}, "Expected `str`, got `object`"),
        ("client_reference_id", "NUL \0", "NUL"),
        ("customer", ["a list"], "at `$.data.object.customer`"),
    ],
)
def test_an_unreadable_event_is_parked_with_the_place(engine: Engine, field: str, value: object, reason: str) -> None:
    """An unreadable field parks its event: the reason names the place and the kind of the fault, never the value."""
    account = Account(seed=7)
    session = account.open_session()
    account.complete(session)
    about = {**account.session(session), field: value}

    ledger.take_in(engine, account.emit("checkout.session.completed", about).body)

    (event,) = ledger.rows(engine, "SELECT state, reason FROM events")
    assert event["state"] == "parked"
    assert reason in event["reason"]
    assert ledger.rows(engine, "SELECT FROM orders") == []


def test_a_nul_that_no_column_keeps_is_no_obstacle(engine: Engine) -> None:
    """A NUL in the buyer's name, which an order does not keep, does not park the order."""
    account = Account(seed=8)
    session = account.open_session()
    account.complete(session)
    about = account.session(session)
    about["customer_details"] = {"name": "NUL \0", "email": "buyer@example.com"}

    ledger.take_in(engine, account.emit("checkout.session.completed", about).body)

    assert ledger.rows(engine, "SELECT status, customer_email FROM orders") == [
        {"status": "paid", "customer_email": "buyer@example.com"}
    ]


def test_ten_thousand_levels_are_parked(engine: Engine) -> None:
    """An event nested too deeply to be read is kept, and parked with that reason."""
    body = Account(seed=9)
    link = body.create_payment_link()
    deep = b"[" * 10_000 + b"]" * 10_000
    odd = body.events[0].body.replace(b'"currency": "usd"', b'"currency": "usd", "deep": ' + deep, 1)
    assert deep in odd

    ledger.take_in(engine, odd)

    assert ledger.rows(engine, "SELECT object_id, state, reason FROM events") == [
        {"object_id": link, "state": "parked", "reason": "The event is nested too deeply to be read."}
    ]


def test_an_event_without_a_fold_is_ignored(engine: Engine) -> None:
    """An event of a type without a fold is kept and ignored with that reason; it changes no table."""
    account = Account(seed=10)
    event = account.emit("product.created", {"id": "prod_1", "object": "product"})

    ledger.take_in(engine, event.body)

    assert ledger.rows(engine, "SELECT state, reason FROM events") == [
        {"state": "ignored", "reason": "no fold wants the type product.created"}
    ]


def test_an_older_fold_version_is_folded_again(engine: Engine) -> None:
    """The clock queues events that an older release folded or ignored, and this release folds them."""
    account = Account(seed=11)
    session = account.open_session()
    account.complete(session)
    account.emit("product.created", {"id": "prod_1", "object": "product"})
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        projection.project(cursor, claim(cursor, limit=9), now=ledger.NOW, fold_version=0)
    with database.transaction(engine) as connection:
        connection.execute(text("UPDATE orders SET amount_total = 1, currency = 'old'"))

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        assert queue_outdated(cursor) == 2
    assert ledger.fold(engine) == 2

    assert ledger.rows(engine, "SELECT DISTINCT fold_version FROM events") == [{"fold_version": folds.FOLD_VERSION}]
    expected = reference.tables_of(event.body for event in account.events)
    assert ledger.digest_of(engine) == ledger.digest_of_reference(engine, expected)
    assert ledger.kinds(engine, session) == ["order.paid"]


def test_the_newer_rendering_decides(engine: Engine) -> None:
    """Of two renderings of one event the newer API version's decides, in either order of arrival."""
    account = Account(seed=12)
    session = account.open_session(presentment=("sek", 22_000))
    account.complete(session)
    newer = account.events[-1]
    older = render(newer, "2024-06-20")

    digests = set()
    for order in ([newer, older], [older, newer]):
        ledger.clear(engine)
        ledger.take_in(engine, *(event.body for event in order))
        digests.add(ledger.digest_of(engine))
        (event,) = ledger.rows(engine, "SELECT api_version, state FROM events")
        assert event == {"api_version": newer.api_version, "state": "folded"}

    assert digests == {ledger.digest_of_reference(engine, reference.tables_of([newer.body]))}


def test_a_newer_copy_that_cannot_be_read_changes_nothing(engine: Engine) -> None:
    """An unreadable copy never replaces one that has made a row, however new its version is."""
    account = Account(seed=14, api_version="2025-09-30.clover")
    session = account.open_session()
    account.complete(session)
    (completed,) = account.events
    odd = completed.body.replace(b"2025-09-30.clover", b"2026-10-28.endive")
    odd = odd.replace(b'"amount_total": 2000', b'"amount_total": "many"')
    assert odd.count(b'"many"') == 1
    ledger.take_in(engine, completed.body)
    assert ledger.rows(engine, "SELECT id FROM orders") == [{"id": session}]

    ledger.take_in(engine, odd)

    assert ledger.rows(engine, "SELECT id FROM orders") == [{"id": session}]
    assert ledger.rows(engine, "SELECT state FROM events") == [{"state": "folded"}]


def test_two_worlds_never_meet(engine: Engine) -> None:
    """Test mode, live mode and two accounts have separate rows for the same object ids."""
    worlds: list[tuple[str | None, bool]] = [(None, False), (None, True), ("acct_1", False), ("acct_2", False)]
    for account, livemode in worlds:
        shop = Account(seed=13, livemode=livemode, account=account)
        link = {**shop.payment_link(shop.create_payment_link()), "id": "plink_same"}
        session = shop.open_session()
        shop.complete(session)
        order = {**shop.session(session), "id": "cs_same"}
        ledger.take_in(
            engine,
            shop.emit("payment_link.created", link).body,
            shop.emit("checkout.session.completed", order).body,
        )

    for query in (
        "SELECT account, livemode FROM payment_links WHERE id = 'plink_same' ORDER BY 1, 2",
        "SELECT account, livemode FROM orders WHERE id = 'cs_same' ORDER BY 1, 2",
    ):
        found = [(row["account"], row["livemode"]) for row in ledger.rows(engine, query)]
        assert found == [(account or "", livemode) for account, livemode in worlds]


@pytest.mark.parametrize(("orders", "requests"), [(99, 0), (100, 1)])
def test_a_large_batch_waits_for_the_disk_before_the_lock(
    database_url: str, tmp_path: Path, orders: int, requests: int
) -> None:
    """The log of many rows is written before the lock to append is taken; few rows wait for the disk at the end alone.

    The statements are read from what is sent to PostgreSQL.
    """
    engine = database.engine(database_url, connections_max=1)
    account = Account(seed=1)
    for _ in range(orders):
        account.complete(account.open_session())
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])
    trace = tmp_path / "trace"
    with database.transaction(engine) as connection:
        driver = cast("psycopg.Connection", connection.connection.driver_connection)
        knows_how = driver.info.server_version >= 170_000

    with trace.open("w") as sent:
        driver.pgconn.trace(sent.fileno())
        folded = ledger.fold(engine)
        driver.pgconn.untrace()

    statements = trace.read_text()
    engine.dispose()
    assert folded == orders
    in_order = re.findall(r"SELECT pg_logical_emit_message|\|\| ' changes'", statements)
    assert in_order == ["SELECT pg_logical_emit_message"] * (requests if knows_how else 0) + ["|| ' changes'"]
