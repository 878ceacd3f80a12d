"""One event harms no other: an event that fails alone is parked or tried again later, and all others are folded."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from deploy.sandbox import samples
from deploy.sandbox.account import Account
from deploy.sandbox.samples import sample
from schemas import database, tables
from schemas.database import Bounds
from schemas.errors import DatabaseAway
from tests import ledger
from tests.waiting import until_locked
from worker import folds
from worker.folding import parallel, projection
from worker.folding.batch import Claimed
from worker.folding.claim import claim
from worker.logs import retry

HASTY = Bounds(statement=10, lock=0.2, whole=30)
HASTY_STATEMENT = Bounds(statement=1, lock=10, whole=30)
"""On a busy machine a statement may well take half a second."""


def run(engine: Engine, bounds: Bounds = HASTY) -> None:
    """Fold due events as a worker does, until none is due."""
    parallel.fold(engine, now=ledger.NOW, bounds=bounds)


def make_due(engine: Engine) -> None:
    """Make every event that waits for its next try due now."""
    ledger.execute(engine, "UPDATE pending SET due_at = now() WHERE due_at IS NOT NULL")


def states(engine: Engine) -> dict[str, set[str]]:
    """Return the object types of the events in each state."""
    found: dict[str, set[str]] = {}
    for row in ledger.rows(engine, "SELECT state, object_type FROM events"):
        found.setdefault(row["state"], set()).add(row["object_type"])
    return found


def take_a_shop(engine: Engine) -> None:
    """Record orders, payment links and customers."""
    account = Account(seed=11)
    for _ in range(3):
        account.create_payment_link()
        account.create_customer()
        account.complete(account.open_session())
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])


def assert_all_folded(engine: Engine) -> None:
    """Assert that no event is parked or pending, and that every order has its row."""
    assert set(states(engine)) == {"folded"}
    assert len(ledger.rows(engine, "SELECT id FROM orders")) == 3


# ---- Four faults that are not in the data, and park nothing ----


def test_a_missing_grant(engine: Engine) -> None:
    """Events of a table without a grant stay pending with the cause, and all other events are folded."""
    take_a_shop(engine)
    ledger.execute(engine, "REVOKE INSERT, UPDATE ON orders FROM CURRENT_USER")

    run(engine)

    assert states(engine) == {"pending": {"checkout.session"}, "folded": {"payment_link", "customer"}}
    (waiting,) = ledger.rows(
        engine, "SELECT DISTINCT cause, reason, attempts > 0 AS tried FROM events WHERE state = 'pending'"
    )
    assert waiting == {
        "cause": "database_refused",
        "reason": "PostgreSQL did not fold it: InsufficientPrivilege",
        "tried": True,
    }
    ledger.execute(engine, "GRANT INSERT, UPDATE ON orders TO CURRENT_USER")
    ledger.execute(engine, "UPDATE pending SET due_at = now() + interval '1 hour'")
    run(engine)
    assert "pending" in states(engine)
    make_due(engine)
    run(engine)
    assert_all_folded(engine)


def test_a_lock_that_is_held(engine: Engine, database_url: str) -> None:
    """While a session locks a table, the events that need the table are tried again and again, and none is parked."""
    take_a_shop(engine)
    with psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
        for attempt in range(1, 4):
            run(engine)
            # On a busy machine the first is due again before the last has failed.
            found = ledger.rows(engine, "SELECT state, cause, attempts FROM events WHERE due_at IS NOT NULL")
            assert len(found) == 3
            assert {(row["state"], row["cause"]) for row in found} == {("pending", "database_busy")}
            assert min(row["attempts"] for row in found) >= attempt
            make_due(engine)
        assert "parked" not in states(engine)

    run(engine)
    assert_all_folded(engine)


def test_a_statement_that_takes_too_long(engine: Engine) -> None:
    """A row that takes PostgreSQL too long delays its own event and no other."""
    take_a_shop(engine)
    (slow, *_) = ledger.rows(engine, "SELECT id, object_id FROM inbox WHERE object_type = 'checkout.session'")
    ledger.execute(
        engine,
        f"""
        CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(30); RETURN NEW; END $$;
        CREATE TRIGGER linger BEFORE INSERT ON orders FOR EACH ROW WHEN (NEW.id = '{slow["object_id"]}')
            EXECUTE FUNCTION linger();
        """,
    )

    run(engine, HASTY_STATEMENT)

    waiting = ledger.rows(engine, "SELECT id, state, cause FROM events WHERE state <> 'folded'")
    assert waiting == [{"id": slow["id"], "state": "pending", "cause": "database_busy"}]
    ledger.execute(engine, "DROP TRIGGER linger ON orders")
    make_due(engine)
    run(engine)
    assert_all_folded(engine)


def test_a_read_only_minute(engine: Engine, database_url: str) -> None:
    """While the database is read-only no event is claimed, and the same engine folds afterwards."""
    take_a_shop(engine)
    name = database_url.rpartition("/")[2]
    hasty = database.engine(database_url)
    with psycopg.connect(database_url, autocommit=True) as operator_:
        operator_.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())
        with pytest.raises(DatabaseAway):
            run(hasty)
        operator_.execute("SET default_transaction_read_only = off")
        operator_.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only".encode())
    assert ledger.rows(engine, "SELECT DISTINCT state, attempts FROM events") == [{"state": "pending", "attempts": 0}]

    run(hasty)

    assert_all_folded(engine)
    hasty.dispose()


def test_the_delays_between_tries(engine: Engine) -> None:
    """The second try comes after one second, and each delay is twice the one before, up to five minutes."""
    take_a_shop(engine)
    ledger.execute(engine, "DELETE FROM pending WHERE seq > 1")
    (claimed,) = _claimed(engine)
    failure = projection.failure_of(psycopg.errors.LockNotAvailable())
    delays = []
    for attempt in range(12):
        (claimed,) = _claimed(engine, only=[1])
        assert claimed.attempts == attempt
        ledger.execute(engine, "UPDATE pending SET due_at = NULL")
        assert projection._conclude_alone(engine, claimed, failure, now=ledger.NOW, bounds=None) == 1
        (row,) = ledger.rows(engine, "SELECT due_at - now() AS delay FROM pending")
        delays.append(row["delay"])

    expected = [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    for delay, seconds in zip(delays, expected, strict=True):
        assert timedelta(seconds=seconds - 1) < delay <= timedelta(seconds=seconds)


def test_trouble_that_lasts_longer_than_the_batch_does(engine: Engine) -> None:
    """With half of a backlog refused for a lack of rights, the other half is folded."""
    account = Account(seed=12)
    for _ in range(40):
        account.create_payment_link()
        account.create_customer()
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])
    ledger.execute(engine, "REVOKE INSERT, UPDATE ON payment_links FROM CURRENT_USER")

    run(engine)

    assert states(engine) == {"pending": {"payment_link"}, "folded": {"customer"}}


# ---- Parking under the claim ----


def _claimed(engine: Engine, only: list[int] | None = None) -> list[Claimed]:
    """Return the events that a claim takes, and release them."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        claimed = claim(cursor, limit=500, only=only)
        connection.rollback()
    return claimed


def test_an_event_that_another_worker_folded_is_not_parked(engine: Engine) -> None:
    """An event that failed here, and was folded by another worker before it could be parked, stays folded."""
    account = Account(seed=13)
    account.complete(account.open_session())
    ledger.record(engine, [ledger.delivery(account.events[-1].body)])
    (claimed,) = _claimed(engine)
    ledger.fold(engine)

    failure = projection.failure_of(psycopg.errors.CheckViolation())
    assert projection._conclude_alone(engine, claimed, failure, now=ledger.NOW, bounds=None) == 0

    assert ledger.rows(engine, "SELECT state, attempts FROM events") == [{"state": "folded", "attempts": 1}]


def test_a_newer_rendering_keeps_its_turn(engine: Engine) -> None:
    """A second copy that is recorded before the first is parked is compared with the first, and folded in its place."""
    body = sample("checkout.session.completed", {}, now=1).payload()
    older, newer = ({**body, "api_version": version} for version in ("2025-01-01", "2025-02-01"))
    ledger.record(engine, [ledger.delivery(msgspec.json.encode(older))])
    (claimed,) = _claimed(engine)
    ledger.record(engine, [ledger.delivery(msgspec.json.encode(newer))])

    failure = projection.failure_of(psycopg.errors.LockNotAvailable())
    assert projection._conclude_alone(engine, claimed, failure, now=ledger.NOW, bounds=None) == 1
    failure = projection.failure_of(psycopg.errors.CheckViolation())
    (claimed,) = _claimed(engine, only=[ledger.rows(engine, "SELECT seq FROM inbox")[0]["seq"]])
    assert projection._conclude_alone(engine, claimed, failure, now=ledger.NOW, bounds=None) == 1

    assert ledger.rows(engine, "SELECT state FROM events") == [{"state": "parked"}]
    ledger.fold(engine)
    assert ledger.rows(engine, "SELECT state FROM events") == [{"state": "folded"}]


@contextmanager
def refused_when_asked(engine: Engine, database_url: str, order: str) -> Iterator[psycopg.Connection]:
    """Let PostgreSQL refuse the paid row of *order* as soon as the yielded connection ends its transaction."""
    ledger.execute(
        engine,
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_xact_lock(7); RAISE EXCEPTION USING ERRCODE = '23514'; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON orders FOR EACH ROW
            WHEN (NEW.id = '{order}' AND NEW.status = 'paid') EXECUTE FUNCTION refuse();
        """,
    )
    with psycopg.connect(database_url) as gate:
        gate.execute("SELECT pg_advisory_xact_lock(7)")
        yield gate


def test_a_newer_rendering_that_comes_while_the_older_fails(engine: Engine, database_url: str) -> None:
    """A newer rendering that is recorded while PostgreSQL refuses the older one is judged by itself."""
    body = sample("checkout.session.completed", {}, now=1).payload()
    order = body["data"]["object"]["id"]
    older = {**body, "api_version": "2025-01-01"}
    unpaid = {**body["data"]["object"], "payment_status": "unpaid"}
    newer = {**body, "api_version": "2025-02-01", "data": {"object": unpaid}}
    ledger.record(engine, [ledger.delivery(msgspec.json.encode(older))])
    with refused_when_asked(engine, database_url, order) as gate:
        folding = threading.Thread(target=run, args=[engine, Bounds(statement=30, lock=30, whole=60)])
        folding.start()
        until_locked(engine)
        recording = threading.Thread(target=ledger.record, args=[engine, [ledger.delivery(msgspec.json.encode(newer))]])
        recording.start()
        recording.join(timeout=60)
        gate.rollback()
    folding.join(timeout=60)
    ledger.execute(engine, "DROP TRIGGER refuse ON orders")
    run(engine)

    assert ledger.rows(engine, "SELECT state, cause FROM events") == [{"state": "folded", "cause": None}]


# ---- An operator's way out ----


def test_a_pending_event_can_be_ignored(engine: Engine) -> None:
    """A pending event can be ignored like a parked one, and no other event is touched."""
    take_a_shop(engine)
    (stuck, *_) = ledger.rows(engine, "SELECT id, object_id FROM inbox WHERE object_type = 'checkout.session'")
    ledger.execute(engine, "REVOKE INSERT, UPDATE ON orders FROM CURRENT_USER")
    run(engine)
    ledger.execute(engine, "GRANT INSERT, UPDATE ON orders TO CURRENT_USER")

    found = retry.ignore(engine, stuck["id"], reason="a test", now=ledger.NOW)

    assert found.state == "ignored"
    make_due(engine)
    run(engine)
    assert len(ledger.rows(engine, "SELECT id FROM orders")) == 2
    assert ledger.rows(engine, "SELECT cause FROM events WHERE state = 'ignored'") == [{"cause": "set_aside"}]


@pytest.mark.parametrize(
    "reason",
    [
        b'"NUL \\u0000"',
        b'"half a pair \\ud800"',
        b"5",
        b"[[]]",
        b"null",
        b'"a", "reason": "twice"',
        b"[" * 5_000 + b"]" * 5_000,
    ],
    ids=["NUL", "half a pair", "a number", "a list", "null", "twice", "deep"],
)
def test_an_odd_reason_of_an_operator_stops_nothing(engine: Engine, reason: bytes) -> None:
    """A replayed observation ignores its event for any reason, however odd, and all other events are folded."""
    take_a_shop(engine)
    (order, *_) = ledger.rows(engine, "SELECT id FROM inbox WHERE object_type = 'checkout.session'")
    word = (
        b'{"id": "obs_1", "object": "event", "type": "payfold.event.ignored", "created": 1, "livemode": false, "data":'
        b' {"object": {"object": "event", "id": "%s", "reason": %s}}}' % (order["id"].encode(), reason)
    )
    ledger.record(engine, [ledger.delivery(word, source="observation")])

    run(engine)

    found = ledger.rows(engine, "SELECT id, state FROM events WHERE state <> 'folded'")
    assert found == [{"id": order["id"], "state": "ignored"}]
    assert len(ledger.rows(engine, "SELECT id FROM orders")) == 2


def test_a_pending_event_can_be_tried_at_once(engine: Engine) -> None:
    """`events retry` does not wait until the event is due."""
    take_a_shop(engine)
    ledger.execute(engine, "REVOKE INSERT, UPDATE ON orders FROM CURRENT_USER")
    run(engine)
    ledger.execute(engine, "GRANT INSERT, UPDATE ON orders TO CURRENT_USER")
    (stuck, *_) = ledger.rows(engine, "SELECT id FROM events WHERE state = 'pending'")

    assert retry.retry(engine, stuck["id"], now=ledger.NOW).state == "folded"


# ---- One world per row ----


def test_anomalies_of_two_worlds(engine: Engine) -> None:
    """One session id under two accounts and in both modes has an anomaly in each, and each is resolved by itself."""
    account = Account(seed=14)
    session = account.open_session()
    account.expire(session)
    expired = msgspec.json.decode(account.events[-1].body)
    about = expired["data"]["object"] | {"status": "complete", "payment_status": "paid"}
    paid = expired | {"id": "evt_paid", "type": "checkout.session.completed", "data": {"object": about}}
    worlds = [("", False), ("acct_1", False), ("acct_1", True)]
    for body in (expired, paid):
        for label, livemode in worlds:
            rendered = msgspec.json.encode(body | {"livemode": livemode})
            ledger.record(engine, [ledger.delivery(rendered, account=label)])
    ledger.fold(engine)
    in_force = (
        "SELECT account, livemode FROM anomalies"
        " WHERE kind = 'expired_and_complete' AND resolved_at IS NULL ORDER BY 1, 2"
    )
    assert [(row["account"], row["livemode"]) for row in ledger.rows(engine, in_force)] == worlds

    of_another = {"object": about | {"id": "cs_another"}}
    newer = paid | {"api_version": "2999-01-01"}
    # In one batch the anomaly goes on under one account and is resolved under the other.
    both = [
        ledger.delivery(msgspec.json.encode(newer)),
        ledger.delivery(msgspec.json.encode(newer | {"livemode": True, "data": of_another}), account="acct_1"),
    ]
    ledger.record(engine, both)
    ledger.fold(engine)

    assert [(row["account"], row["livemode"]) for row in ledger.rows(engine, in_force)] == worlds[:2]


def test_a_parked_event_of_another_world_stays_out(engine: Engine) -> None:
    """Folding an event of one account does not release the parked event of the same id under another account."""
    account = Account(seed=15)
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    completed = msgspec.json.decode(account.events[-1].body)
    failed = msgspec.json.decode(account.emit("checkout.session.async_payment_failed", account.session(session)).body)
    later = msgspec.json.decode(account.emit("checkout.session.async_payment_succeeded", account.session(session)).body)
    for label in ("", "acct_1"):
        ledger.take_in(engine, msgspec.json.encode(completed), msgspec.json.encode(failed), account=label)
    # One account's event is parked, as by a release that could not fold it.
    ledger.execute(
        engine,
        "UPDATE outcomes SET state = 'parked' WHERE seq = (SELECT seq FROM inbox WHERE account = '' AND id = :id)",
        id=failed["id"],
    )
    both = [
        *(ledger.delivery(msgspec.json.encode(later), account=label) for label in ("", "acct_1")),
    ]
    ledger.execute(engine, "INSERT INTO pending (seq, again) SELECT seq, true FROM inbox WHERE account = 'acct_1'")
    ledger.record(engine, both)
    ledger.execute(engine, "UPDATE pending SET again = true")
    ledger.fold(engine)

    found = ledger.rows(engine, "SELECT account, failed_at IS NULL AS never_failed FROM orders ORDER BY account")
    assert found == [{"account": "", "never_failed": True}, {"account": "acct_1", "never_failed": False}]


def test_names_of_keys() -> None:
    """No two keys share a name, and the names of ordinary keys are readable."""
    assert tables.key_name(["cus a"]) == "cus a"
    assert tables.key_name(["cus_1", "usd"]) == "cus_1 usd"
    assert tables.key_name(["cus a", "usd"]) == "cus%20a usd"
    keys = [("a b", "c"), ("a", "b c"), ("a%20b", "c"), ("a", "b%20c")]
    assert len({tables.key_name(key) for key in keys}) == len(keys)


# ---- Any text that an id or a code may hold ----

CODES = frozenset(
    (
        *("id", "customer", "currency", "charge", "invoice", "payment_intent", "payment_link", "subscription", "price"),
        *("product", "client_reference_id", "number", "configuration", "presentment_currency", "balance_transaction"),
        *("credit_note", "invoice_line_item", "test_clock", "reason", "failure_reason", "customer_balance_transaction"),
    )
)
TYPES = sorted(samples._STORIES)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)


def with_codes(value: Any, odd: str) -> Any:  # noqa: ANN401 - JSON
    """Return a payload with *odd* put into each of its ids and codes; different ids stay different."""
    if isinstance(value, list):
        return [with_codes(each, odd) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: f"{odd}{each}"[:255] if name in CODES and isinstance(each, str) else with_codes(each, odd)
        for name, each in value.items()
    }


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(odd=texts)
@example(odd="cus a ")
@example(odd="us d")
@example(odd=" ")
@example(odd='{"a","b"}')
@example(odd="null")
@example(odd="\\N\t\\.")
@example(odd="\n\r\b\f\x1f\x7f\u2028")
@example(odd="'; --")
@example(odd="%20%s%(a)s")
@example(odd="\U0001f600")
def test_any_text_in_any_id_leaves_the_neighbours_folded(engine: Engine, odd: str) -> None:
    """With any text in each id, currency and code of every object, the others are folded, and so is the odd one."""
    ledger.clear(engine)
    healthy = [sample(kind, {}, now=now).payload() for now, kind in enumerate(TYPES, 1)]
    strange = [with_codes(payload, odd) for payload in healthy]
    bodies = [msgspec.json.encode(each) for pair in zip(strange, healthy, strict=True) for each in pair]
    ledger.record(engine, [ledger.delivery(body) for body in bodies])

    run(engine)

    found = ledger.rows(engine, "SELECT id, state, reason FROM events")
    wanted = {each["id"] for each in healthy if each["type"] in folds.FOLDS}
    assert {row["state"] for row in found if row["id"] in wanted} == {"folded"}
    assert not [row for row in found if row["state"] in ("pending", "parked")]
    assert ledger.rows(engine, "SELECT currency FROM balances WHERE currency = :odd", odd=f"{odd}usd"[:255])
