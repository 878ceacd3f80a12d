"""Celery's tasks: a message carries no data, and a task has a time limit."""

from collections.abc import Iterator

import pytest
import redis
from celery import Celery
from sqlalchemy import Engine
from structlog.testing import capture_logs

from deploy.sandbox.account import Account
from schemas import broker, database, inbox
from schemas.settings import Settings
from tests import ledger
from tests.waiting import until
from worker import app
from worker.folding import projection
from worker.folding.claim import claim


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    """Return settings for this test's own servers."""
    return Settings.load({"DATABASE_URL": database_url, "REDIS_URL": redis_url, "PAYFOLD_SWEEP_SECONDS": "3"})


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    """Return an engine on the empty database."""
    made = database.engine(settings.postgresql)
    yield made
    made.dispose()


@pytest.fixture
def celery(settings: Settings, engine: Engine) -> Celery:
    """Return the worker's application."""
    return app.create(settings, engine)


@pytest.fixture
def waiting(redis_url: str) -> Iterator["redis.Redis"]:
    """Return a client of the broker, to read the waiting messages."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


def with_links(engine: Engine, count: int) -> None:
    """Record the creation of *count* payment links."""
    account = Account(seed=41)
    for _ in range(count):
        account.create_payment_link()
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])


def test_a_fold_takes_every_pending_event(celery: Celery, engine: Engine) -> None:
    """One message folds any number of events, and an unknown argument is tolerated."""
    with_links(engine, 1_200)

    assert celery.tasks[broker.FOLD](a_word_of_a_newer_release=True) == 1_200
    assert celery.tasks[broker.FOLD]() == 0


def test_a_stopping_waker_sends_the_requested_message(settings: Settings, waiting: "redis.Redis") -> None:
    """A wake-up requested while the waker pauses between two messages is sent when the waker stops."""
    for _ in range(20):
        waker = broker.Waker(settings)
        waker.wake()
        until(lambda: waiting.llen(broker.FOLD_QUEUE), pause_seconds=0)  # within the waker's own pause
        waiting.delete(broker.FOLD_QUEUE)
        waker.wake()
        waker.stop()

        assert waiting.llen(broker.FOLD_QUEUE) == 1
        waiting.delete(broker.FOLD_QUEUE)


def test_a_fold_at_its_time_limit_wakes_its_successor(celery: Celery, engine: Engine, waiting: "redis.Redis") -> None:
    """A fold at its time limit ends with events left, and leaves a message for the next fold."""
    with_links(engine, projection.FOLD_BATCH_MAX + 1)

    assert app.fold_until_done(celery, engine, seconds_max=0) == projection.FOLD_BATCH_MAX
    assert waiting.llen(broker.FOLD_QUEUE) == 1


def test_a_finished_fold_leaves_no_message(celery: Celery, engine: Engine, waiting: "redis.Redis") -> None:
    """A fold without pending events at its end leaves no message."""
    with_links(engine, 3)

    app.fold_until_done(celery, engine)

    assert waiting.llen(broker.FOLD_QUEUE) == 0


def test_a_sweep_folds_events_without_a_wake_up(celery: Celery, engine: Engine) -> None:
    """The clock's sweep folds pending events and those that an older fold version folded."""
    with_links(engine, 2)
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        projection.project(cursor, claim(cursor, limit=1), now=ledger.NOW, fold_version=0)

    assert celery.tasks[broker.SWEEP]() == 2


@pytest.mark.parametrize("job", [broker.FOLD, broker.SWEEP])
def test_without_a_clock_there_is_room_for_the_next_payloads(celery: Celery, engine: Engine, job: str) -> None:
    """The next partition of payloads is made by a sweep, and by folding as well, since no sweep may ever come."""
    last = 2 * inbox.PARTITION_EVENTS - 1
    ledger.execute(engine, f"ALTER TABLE inbox ALTER COLUMN seq RESTART WITH {last}")
    with_links(engine, 1)

    celery.tasks[job]()
    with_links(engine, 2)

    assert ledger.rows(engine, "SELECT count(*) AS found FROM payloads_rest") == [{"found": 0}]
    assert ledger.rows(engine, "SELECT count(*) AS found FROM payloads") == [{"found": 2}]


def test_the_sweep_comes_as_often_as_it_is_set(celery: Celery) -> None:
    """The timetable follows the setting, and a message that is not received in time expires."""
    entry = celery.conf.beat_schedule["sweep"]

    assert (entry["task"], entry["schedule"], entry["options"]["expires"]) == (broker.SWEEP, 3, 3)


def test_a_reconciliation_each_night(database_url: str, redis_url: str, engine: Engine) -> None:
    """At the configured time the clock reconciles the tables; the run is kept, and drift is an error line."""
    at = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "PAYFOLD_RECONCILE_AT": "03:30"}
    nightly = app.create(Settings.load(at), engine)
    with_links(engine, 3)
    projection.run_once(engine, now=ledger.NOW)

    entry = nightly.conf.beat_schedule["reconcile"]
    with capture_logs() as quiet:
        right = nightly.tasks[entry["task"]]()
    ledger.execute(engine, "DELETE FROM payment_links WHERE id = (SELECT min(id) FROM payment_links)")
    with capture_logs() as loud:
        wrong = nightly.tasks[entry["task"]]()

    assert (entry["schedule"].hour, entry["schedule"].minute) == ({3}, {30})
    assert (right, wrong) == (0, 1)
    kept = ledger.rows(engine, "SELECT outcome, drift FROM reconciliations ORDER BY id")
    assert kept == [{"outcome": "ok", "drift": 0}, {"outcome": "drift", "drift": 1}]
    levels = [each["log_level"] for each in (*quiet, *loud) if each["event"] == "reconcile.done"]
    assert levels == ["info", "error"]


def test_no_reconciliation_unless_set(celery: Celery) -> None:
    """Without a configured time there is no reconciliation."""
    assert "reconcile" not in celery.conf.beat_schedule


def test_a_database_that_is_away_postpones_the_fold(redis_url: str) -> None:
    """A task without PostgreSQL ends without an error: pending events stay pending."""
    nowhere = database.engine("postgres://nobody:x@127.0.0.1:1/none")
    celery = app.create(Settings.load({"REDIS_URL": redis_url}), nowhere)

    assert celery.tasks[broker.FOLD]() == 0
    assert celery.tasks[broker.SWEEP]() == 0


def test_a_wake_up_is_coalesced(settings: Settings, waiting: "redis.Redis") -> None:
    """Any number of wake-ups leaves one message; after that is received the next wake-up leaves another."""
    waker = broker.Waker(settings)
    for _ in range(1_000):
        waker.wake()
    until_length(waiting, 1)
    waker.wake()
    waiting.delete(broker.FOLD_QUEUE)
    waker.wake()
    until_length(waiting, 1)
    waker.stop()

    assert waiting.llen(broker.FOLD_QUEUE) == 1


@pytest.mark.parametrize(
    ("shared", "seconds", "next_seconds"),
    [(0, 0.005, 0.005), (1, 0.005, 0.005), (5, 0.005, 0.025), (10, 0.005, 0.05), (50, 0.005, 0.05), (50, 0.05, 0.025)],
)
def test_wake_ups_are_rarer_in_a_busy_time(shared: int, seconds: float, next_seconds: float) -> None:
    """Up to 200 wake-ups a second the pause is 5 milliseconds, at 1,000 it is 25, and from 2,000 on 50."""
    assert broker.pause_after(shared, seconds) == pytest.approx(next_seconds)


def until_length(client: "redis.Redis", length: int) -> None:
    """Return once *length* messages wait."""
    until(lambda: client.llen(broker.FOLD_QUEUE) == length)


def test_a_sweep_folds_even_if_its_upkeep_fails(celery: Celery, engine: Engine) -> None:
    """If a table of the upkeep cannot be read, pending events are folded, and the failure is a log line."""
    with_links(engine, 3)
    ledger.execute(engine, "REVOKE SELECT ON portal_sessions FROM CURRENT_USER")

    with capture_logs() as lines:
        celery.tasks[broker.SWEEP]()

    assert len(ledger.rows(engine, "SELECT id FROM payment_links")) == 3
    (failed,) = [line for line in lines if line["event"] == "job.failed"]
    assert (failed["job"], failed["kind"]) == (broker.SWEEP, "InsufficientPrivilege")
