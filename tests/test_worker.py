"""The Celery side: a message carries no work, and a task never takes long."""

from collections.abc import Iterator

import pytest
import redis
from celery import Celery
from sqlalchemy import Engine
from structlog.testing import capture_logs

from deploy.sandbox.account import Account
from schemas import broker, database
from schemas.settings import Settings
from tests import ledger
from tests.waiting import until
from worker import app
from worker.folding import projection
from worker.folding.claim import claim


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    """Return settings on servers of this test's own."""
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
    """Return a client of the broker, to see which messages wait."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


def with_links(engine: Engine, count: int) -> None:
    """Record the creation of *count* payment links."""
    account = Account(seed=41)
    for _ in range(count):
        account.create_payment_link()
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])


def test_a_fold_takes_all_that_is_pending(celery: Celery, engine: Engine) -> None:
    """One message is enough for any number of events, and tolerates words that an older worker does not know."""
    with_links(engine, 1_200)

    assert celery.tasks[broker.FOLD](a_word_of_a_newer_release=True) == 1_200
    assert celery.tasks[broker.FOLD]() == 0


def test_a_waker_that_stops_sends_what_was_asked(settings: Settings, waiting: "redis.Redis") -> None:
    """What is asked for while the waker pauses between two messages is sent at its end."""
    for _ in range(20):
        waker = broker.Waker(settings)
        waker.wake()
        until(lambda: waiting.llen(broker.FOLD_QUEUE), pause_seconds=0)  # within the waker's own pause
        waiting.delete(broker.FOLD_QUEUE)
        waker.wake()
        waker.stop()

        assert waiting.llen(broker.FOLD_QUEUE) == 1
        waiting.delete(broker.FOLD_QUEUE)


def test_a_fold_whose_time_is_up_wakes_its_successor(celery: Celery, engine: Engine, waiting: "redis.Redis") -> None:
    """After its time a fold ends with work left, and a message waits for whoever goes on."""
    with_links(engine, projection.FOLD_BATCH_MAX + 1)

    assert app.fold_until_done(celery, engine, seconds_max=0) == projection.FOLD_BATCH_MAX
    assert waiting.llen(broker.FOLD_QUEUE) == 1


def test_a_fold_that_is_done_wakes_nobody(celery: Celery, engine: Engine, waiting: "redis.Redis") -> None:
    """When nothing is pending no message is left behind."""
    with_links(engine, 3)

    app.fold_until_done(celery, engine)

    assert waiting.llen(broker.FOLD_QUEUE) == 0


def test_a_sweep_finds_what_nobody_woke_for(celery: Celery, engine: Engine) -> None:
    """The clock's sweep folds what is pending and what an older fold version folded."""
    with_links(engine, 2)
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        projection.project(cursor, claim(cursor, limit=1), now=ledger.NOW, fold_version=0)

    assert celery.tasks[broker.SWEEP]() == 2


def test_the_sweep_comes_as_often_as_it_is_set(celery: Celery) -> None:
    """The timetable follows the setting, and a message that nobody took in time expires."""
    entry = celery.conf.beat_schedule["sweep"]

    assert (entry["task"], entry["schedule"], entry["options"]["expires"]) == (broker.SWEEP, 3, 3)


def test_a_reconciliation_each_night(database_url: str, redis_url: str, engine: Engine) -> None:
    """At the time that is set the clock lets the tables be reconciled; the run is kept, and drift is an error."""
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
    """Without a time there is none."""
    assert "reconcile" not in celery.conf.beat_schedule


def test_a_database_that_is_away_postpones_the_fold(redis_url: str) -> None:
    """A task that finds no PostgreSQL ends quietly: what is pending stays pending."""
    nowhere = database.engine("postgres://nobody:x@127.0.0.1:1/none")
    celery = app.create(Settings.load({"REDIS_URL": redis_url}), nowhere)

    assert celery.tasks[broker.FOLD]() == 0
    assert celery.tasks[broker.SWEEP]() == 0


def test_a_wake_up_is_coalesced(settings: Settings, waiting: "redis.Redis") -> None:
    """However often it is asked, the waker leaves one message; once that is gone, asking leaves another."""
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


def until_length(client: "redis.Redis", length: int) -> None:
    """Return once *length* messages wait."""
    until(lambda: client.llen(broker.FOLD_QUEUE) == length)


def test_a_sweep_that_fails_at_the_rest_folds_all_the_same(celery: Celery, engine: Engine) -> None:
    """Where a table that is looked after cannot be read, what is pending is folded, and the failure is a line."""
    with_links(engine, 3)
    ledger.execute(engine, "REVOKE SELECT ON portal_sessions FROM CURRENT_USER")

    with capture_logs() as lines:
        celery.tasks[broker.SWEEP]()

    assert len(ledger.rows(engine, "SELECT id FROM payment_links")) == 3
    (failed,) = [line for line in lines if line["event"] == "job.failed"]
    assert (failed["job"], failed["kind"]) == (broker.SWEEP, "InsufficientPrivilege")
