"""A fault of the broker or the database leaves no process deaf, hanging or dead: each fault once.

The worker runs without a clock, so that it finds pending events by itself. `--long` has many of each.
"""

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
import redis
from celery import Celery
from sqlalchemy import Engine

from deploy.local.postgres import Postgres
from deploy.local.valkey import Valkey
from schemas import broker
from schemas.migrate import upgrade
from schemas.settings import Settings
from schemas.turns import Periodic, Turns
from schemas.watchdog import DEAF_EXIT, Timer
from tests import faults, ledger, short_worker
from tests.faults import Shop, Started, environment, started
from tests.waiting import WAITS_FOR_A_LOCK, until
from worker import app, clock

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

SECONDS_MAX = 40.0


@pytest.fixture
def shop(engine: Engine) -> Shop:
    """Return a shop with pending events."""
    return Shop(engine)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Return the log file of a process."""
    return tmp_path / "log"


def until_hears(worker: Started, redis_url: str) -> None:
    """Wait until the worker's consumer has received and handled a message."""
    with ExitStack() as stack:
        client = stack.enter_context(redis.Redis.from_url(redis_url))
        until(lambda: client.llen(broker.FOLD_QUEUE) == 0, SECONDS_MAX)
        faults.put(redis_url, broker.FOLD, broker.FOLD_QUEUE)
        until(lambda: client.llen(broker.FOLD_QUEUE) == 0 and client.hlen("unacked") == 0, SECONDS_MAX)
    assert worker.process.poll() is None


# ---- The transport ----


def test_kombu_answers_through_the_method_that_we_watch(redis_url: str) -> None:
    """Every answer to a BRPOP, nil or a message, still passes kombu's private `_brpop_read`, which we watch."""
    celery = broker.celery(faults.settings_of(redis_url))
    with celery.connection_for_read() as connection, connection.SimpleQueue("watched") as watched:
        broker.ear.answered_at = 0
        with pytest.raises(queue.Empty):
            watched.get(timeout=1.5)
        by_nil = broker.ear.answered_at
        broker.ear.answered_at = 0
        watched.put("a message")
        watched.get(timeout=5)

    assert by_nil > 0
    assert broker.ear.answered_at >= by_nil


def test_a_failed_acknowledgement_costs_no_credit(redis_url: str) -> None:
    """A consumer that could not acknowledge its message still requests the next one, and does not go deaf."""
    celery = broker.celery(faults.settings_of(redis_url))
    with celery.connection_for_read() as connection, connection.SimpleQueue("watched") as watched:
        watched.consumer.qos(prefetch_count=1)
        for text in ("first", "second"):
            watched.put(text)
        message = watched.get(timeout=5)
        with redis.Redis.from_url(redis_url) as client:
            # Writes to the key of unacknowledged messages fail, since it has another type now.
            client.delete("unacked_index")
            client.set("unacked_index", "no sorted set")
            with pytest.raises(redis.ResponseError):
                message.ack()
            client.delete("unacked_index")
        assert watched.get(timeout=5).payload == "second"


def test_a_message_that_cannot_be_sent_is_no_failure(redis_url: str, own_valkey: Valkey) -> None:
    """Sending to a broker that is down or silent returns within seconds, without an error."""
    celery = broker.celery(faults.settings_of(own_valkey.url))
    assert broker.send(celery, broker.FOLD, queue=broker.FOLD_QUEUE)
    with faults.paused(own_valkey):
        began = time.monotonic()
        assert not broker.send(celery, broker.FOLD, queue=broker.FOLD_QUEUE)
        assert time.monotonic() - began < 20
    own_valkey.stop()
    assert not broker.send(celery, broker.FOLD, queue=broker.FOLD_QUEUE)
    celery.close()


# ---- Turns and the timer ----


def test_the_timer_and_a_message_take_turns() -> None:
    """While a job runs, the timer does not start it again, and a message for it waits."""
    turns, begun, over = Turns(), threading.Event(), threading.Event()
    together: list[int] = []
    at_once = 0

    def work() -> int:
        nonlocal at_once
        at_once += 1
        together.append(at_once)
        begun.set()
        over.wait(SECONDS_MAX)
        at_once -= 1
        return 1

    turns.add("job", work)
    first = threading.Thread(target=turns.by_timer, args=("job",))
    first.start()
    assert begun.wait(SECONDS_MAX)
    assert turns.by_timer("job") == 0
    second = threading.Thread(target=turns.by_message, args=("job",))
    second.start()
    until(lambda: turns.has_task)
    over.set()
    first.join()
    second.join()

    assert together == [1, 1]
    assert not turns.has_task


def test_the_timer_works_when_no_message_comes() -> None:
    """The timer runs each job at its own interval, and stops when a message has arrived."""
    turns = Turns()
    done: list[str] = []
    for job in ("often", "seldom"):
        turns.add(job, lambda job=job: len(done.append(job) or done))  # type: ignore[misc,func-returns-value]  # its default
    timer = Timer(turns, [Periodic("often", 0.0), Periodic("seldom", 3600.0)], silent_seconds=3.0)

    timer.look()
    assert done == []
    turns.heard_at -= 3.0
    for _ in range(3):
        timer.look()
    assert done == ["often", "seldom", "often", "often"]
    turns.by_message("often")
    timer.look()
    assert done == ["often", "seldom", "often", "often", "often"]


def test_the_slots_know_their_most_frequent_message(celery_at_stripe: Celery) -> None:
    """The fold slot's timer runs the sweep; the Stripe slot's timer runs five jobs, the most frequent one first."""
    assert app.periodic(celery_at_stripe, broker.FOLD_QUEUE) == [(broker.SWEEP, 5.0)]
    assert app.periodic(celery_at_stripe, broker.STRIPE_QUEUE)[0] == (broker.FETCH, 10.0)
    assert len(app.periodic(celery_at_stripe, broker.STRIPE_QUEUE)) == 5


@pytest.fixture
def celery_at_stripe(engine: Engine, redis_url: str) -> Celery:
    """Return the Celery application of a worker with a Stripe key."""
    return app.create(Settings.load({"REDIS_URL": redis_url, "STRIPE_API_KEY": "sk_test_a"}), engine)


# ---- Faults of the broker ----


def kill(server: Valkey, _: Callable[[], None]) -> None:
    """Kill the broker and restart it, empty."""
    server.kill()
    server.start()


def pause(server: Valkey, until_noticed: Callable[[], None]) -> None:
    """Suspend the broker until a process has noticed it."""
    with faults.paused(server):
        until_noticed()


def flush(server: Valkey, _: Callable[[], None]) -> None:
    """Delete every message of the broker."""
    faults.flush(server.url)


def cut(server: Valkey, _: Callable[[], None]) -> None:
    """Close every connection to the broker."""
    faults.cut(server.url)


broker_faults = pytest.mark.parametrize("fault", [kill, pause, flush, cut], ids=lambda fault: fault.__name__)


@broker_faults
def test_a_lone_worker_outlasts_its_broker(
    database_url: str,
    own_valkey: Valkey,
    shop: Shop,
    log: Path,
    fault: Callable[[Valkey, Callable[[], None]], None],
) -> None:
    """Events are folded without a message, and after the fault the same process receives messages again."""

    def until_folded_by_the_timer() -> None:
        shop.record()
        shop.until_folded()

    with started(log, "tests.short_worker", "worker", **environment(database_url, own_valkey.url)) as worker:
        until_hears(worker, own_valkey.url)
        slots = worker.children()
        fault(own_valkey, until_folded_by_the_timer)
        until_folded_by_the_timer()
        until_hears(worker, own_valkey.url)

        assert worker.children() == slots
        assert worker.stop() == 0


def test_a_consumer_that_goes_deaf_connects_again(
    database_url: str, own_valkey: Valkey, shop: Shop, log: Path
) -> None:  # fmt: skip
    """A consumer that stops asking for messages is noticed each time, and reconnects in the same process."""
    settings = environment(database_url, own_valkey.url)
    with started(log, "tests.short_worker", "worker", "--deaf", "2", **settings) as worker:
        until(lambda: len(worker.lines("consumer.deaf")) == 2, SECONDS_MAX)
        slots = worker.children()
        shop.record()
        shop.until_folded()
        until_hears(worker, own_valkey.url)

        assert worker.lines("worker.slot_ended") == []
        assert worker.children() == slots
        assert worker.stop() == 0


def test_a_consumer_that_stays_deaf_ends_its_process(database_url: str, own_valkey: Valkey, log: Path) -> None:
    """If reconnecting does not help, the process ends with a log line and an exit code of its own, and is replaced."""
    settings = environment(database_url, own_valkey.url)
    with started(log, "tests.short_worker", "worker", "--deaf", "99", "--asks", "0", **settings) as worker:
        until(lambda: bool(worker.children()), SECONDS_MAX)
        first = set(worker.children())
        until(lambda: bool(worker.lines("worker.slot_ended")), SECONDS_MAX)
        until(lambda: bool(set(worker.children()) - first))
        worker.stop()

    assert worker.lines("consumer.deaf_for_good")[0]["exit"] == DEAF_EXIT
    assert worker.lines("worker.slot_ended")[0]["ended"] == f"with exit {DEAF_EXIT}"


def test_a_long_task_is_not_deafness(
    database_url: str, own_valkey: Valkey, engine: Engine, shop: Shop, log: Path
) -> None:  # fmt: skip
    """While a task runs, here waiting for a lock, the watchdog does not disconnect the consumer."""
    settings = environment(database_url, own_valkey.url)
    with started(log, "tests.short_worker", "worker", **settings) as worker:
        until_hears(worker, own_valkey.url)
        with psycopg.connect(libpq(database_url)) as connection:
            connection.execute("LOCK TABLE payment_links IN ACCESS EXCLUSIVE MODE")
            shop.record()
            faults.put(own_valkey.url, broker.FOLD, broker.FOLD_QUEUE)
            until(lambda: ledger.rows(engine, WAITS_FOR_A_LOCK) != [])
            # Longer than the limit for deafness.
            waits_until = time.monotonic() + 1.5 * short_worker.LIMITS.deaf
            until(lambda: time.monotonic() > waits_until)
        shop.until_folded()

        assert worker.lines("consumer.deaf") == []
        assert worker.stop() == 0


# ---- Faults of the database ----


def libpq(url: str) -> str:
    """Return an address in the driver's form."""
    return url.replace("postgresql+psycopg://", "postgresql://", 1)


@contextmanager
def read_only(engine: Engine) -> Iterator[None]:
    """Make each session that begins within the block read-only."""
    name = engine.url.database
    ledger.execute(engine, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    try:
        yield
    finally:
        # A session that began before.
        with psycopg.connect(libpq(engine.url.render_as_string(hide_password=False)), autocommit=True) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'.encode())


def test_a_read_only_minute_leaves_nothing_behind(
    database_url: str, redis_url: str, engine: Engine, shop: Shop, log: Path
) -> None:  # fmt: skip
    """A session that was opened while the database was read-only is closed, and the log has one line about it."""
    with started(log, "tests.short_worker", "worker", **environment(database_url, redis_url)) as worker:
        until_hears(worker, redis_url)
        shop.record()
        shop.until_folded()
        with read_only(engine):
            ledger.execute(engine, END_OTHER_SESSIONS)
            shop.record()
            until(lambda: bool(worker.lines("database.away")), SECONDS_MAX)
            for _ in range(3):
                faults.put(redis_url, broker.FOLD, broker.FOLD_QUEUE)
                until(lambda: faults.waiting(redis_url) == 0)
            assert shop.pending() > 0
        shop.until_folded()
        assert worker.stop() == 0

    assert len(worker.lines("database.away")) <= 2
    assert b"Traceback" not in log.read_bytes()


END_OTHER_SESSIONS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
)

ROW = "a-buyer@example.com"


def test_no_row_in_the_log(database_url: str, redis_url: str, log: Path) -> None:
    """A failing statement in a task is logged by its condition, without its message, which quotes a row."""
    with psycopg.connect(libpq(database_url), autocommit=True) as connection:
        # An expired portal session, so that the sweep records its end.
        connection.execute(
            "INSERT INTO portal_sessions (account, livemode, id, event_id, as_of, created)"
            " VALUES ('', false, 'bps_old', 'evt_old', now() - interval '1 year', now() - interval '1 year')"
        )
        connection.execute(
            "CREATE FUNCTION quote() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" RAISE EXCEPTION 'the row {ROW}' USING ERRCODE = 'P0001', DETAIL = 'again {ROW}'; END $$".encode()
        )
        connection.execute("CREATE TRIGGER quote BEFORE INSERT ON inbox FOR EACH STATEMENT EXECUTE FUNCTION quote()")
    with started(log, "tests.short_worker", "worker", **environment(database_url, redis_url)) as worker:
        for _ in range(2):
            faults.put(redis_url, broker.SWEEP, broker.FOLD_QUEUE)
        until(lambda: bool(worker.lines("job.failed")), SECONDS_MAX)
        until(lambda: faults.waiting(redis_url) == 0)
        assert worker.stop() == 0

    (line,) = worker.lines("job.failed")
    assert (line["job"], line["kind"]) == (broker.SWEEP, "RaiseException")
    assert line["where"].startswith("schemas.inbox:")
    assert ROW.encode() not in log.read_bytes()
    assert b"Traceback" not in log.read_bytes()


# ---- The end ----


@pytest.mark.parametrize("state", ["silent_database", "silent_broker", "broker_away", "dying_slots"])
def test_a_worker_that_is_asked_to_stop_ends(
    own_postgres: Postgres, own_valkey: Valkey, log: Path, state: str
) -> None:  # fmt: skip
    """SIGTERM ends the worker and all its processes in any state; here within 5 seconds instead of 28."""
    upgrade(own_postgres.url)
    settings = environment(own_postgres.url, own_valkey.url)
    with ExitStack() as stack:
        if state == "broker_away":
            own_valkey.stop()
        bounds = ("--shut-down", "2", "--end", "5")
        worker = stack.enter_context(started(log, "tests.short_worker", "worker", *bounds, **settings))
        if state == "broker_away":
            until(lambda: b"Cannot connect" in log.read_bytes(), SECONDS_MAX)
        else:
            until_hears(worker, own_valkey.url)
        slots = worker.children()
        family = [*slots, *(each for slot in slots for each in children(slot))]
        if state == "silent_database":
            stack.enter_context(faults.paused(own_postgres))
            faults.put(own_valkey.url, broker.FOLD, broker.FOLD_QUEUE)
        elif state == "silent_broker":
            stack.enter_context(faults.paused(own_valkey))
        elif state == "dying_slots":
            os.kill(slots[0], signal.SIGKILL)

        asked_at = time.monotonic()
        worker.stop()

        assert time.monotonic() - asked_at < 25
        until(lambda: not any(map(is_running, family)))


def children(pid: int) -> list[int]:
    """Return the child processes of a process's main thread."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


# ---- The clock ----


@broker_faults
def test_the_clock_outlasts_its_broker(
    own_valkey: Valkey, database_url: str, log: Path, fault: Callable[[Valkey, Callable[[], None]], None]
) -> None:  # fmt: skip
    """After each fault of the broker the clock sends messages again, and has logged a line without a traceback."""
    with started(log, "tests.short_worker", "clock", **environment(database_url, own_valkey.url)) as process:
        until(lambda: faults.waiting(own_valkey.url) > 0, SECONDS_MAX)
        fault(own_valkey, lambda: until(lambda: bool(process.lines("broker.away")), SECONDS_MAX))
        with redis.Redis.from_url(own_valkey.url) as client:
            client.delete(broker.FOLD_QUEUE)
        until(lambda: faults.waiting(own_valkey.url) > 0, SECONDS_MAX)
        assert process.stop() == 0

    assert b"Traceback" not in log.read_bytes()


def test_a_daily_message_is_sent_when_the_broker_is_back(own_valkey: Valkey, engine: Engine) -> None:
    """A daily message that met no broker is sent later, once; frequent ones are sent at their next time."""
    seldom = dict.fromkeys(("PAYFOLD_SWEEP_SECONDS", "PAYFOLD_EXPIRE_SECONDS"), "3600")
    settings = Settings.load({"REDIS_URL": own_valkey.url, "PAYFOLD_RECONCILE_AT": "03:30", **seldom})
    celery = app.create(settings, engine)
    timetable = clock.Timetable(celery)
    own_valkey.stop()
    timetable.apply_entry(timetable.schedule["reconcile"])
    timetable.apply_entry(timetable.schedule["sweep"])
    own_valkey.start()
    for _ in range(3):
        timetable.tick()
    celery.close()

    waiting = {queue: faults.waiting(own_valkey.url, queue) for queue in (broker.FOLD_QUEUE, broker.STRIPE_QUEUE)}
    assert waiting == {broker.FOLD_QUEUE: 0, broker.STRIPE_QUEUE: 1}


def test_a_clock_without_a_broker_stops(own_valkey: Valkey, database_url: str, log: Path) -> None:
    """SIGTERM ends a clock with a silent broker, or with one that was down from the start."""
    settings = environment(database_url, own_valkey.url)
    with started(log, "tests.short_worker", "clock", **settings) as process:
        until(lambda: faults.waiting(own_valkey.url) > 0, SECONDS_MAX)
        with faults.paused(own_valkey):
            until(lambda: bool(process.lines("broker.away")), SECONDS_MAX)
            assert process.stop() == 0
    own_valkey.stop()
    with started(log, "tests.short_worker", "clock", **settings) as process:
        until(lambda: bool(process.lines("broker.away")), SECONDS_MAX)
        assert process.stop() == 0


def test_a_clock_that_stands_still_ends(own_valkey: Valkey, database_url: str, log: Path) -> None:
    """A clock that stops checking its schedule ends with one log line, so that it is restarted."""
    settings = environment(database_url, own_valkey.url)
    with started(log, "tests.short_worker", "clock", "--stuck", **settings) as process:
        assert process.process.wait(SECONDS_MAX) == DEAF_EXIT

    (line,) = process.lines("clock.stands_still")
    assert line["exit"] == DEAF_EXIT
