"""Background tasks of the web process run again after any error, and waiting requests are answered."""

import asyncio
from typing import Any

import msgspec
import psycopg
import pytest
import redis
from sqlalchemy import Engine

from api import tasks
from api.changes import FeedWatcher
from api.recorder import Recorder
from schemas import broker, logs
from schemas.broker import FOLD_QUEUE
from schemas.errors import DatabaseAway
from schemas.inbox import Recorded
from schemas.settings import Settings
from tests.test_recorder import delivery
from tests.waiting import until
from tests.web import settings_of


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    """Return settings, with logs set up as a process does."""
    made = settings_of(database_url, redis_url)
    logs.configure(made)
    return made


class Broken:
    """Fails at each of the first *times* uses with an unforeseen error, and then works."""

    def __init__(self, real: object, times: int = 1) -> None:
        self._real = real
        self._left = times

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as the real one has it
        if self._left:
            self._left -= 1
            raise ModuleNotFoundError("No module named 'packaging'")
        return getattr(self._real, name)


def test_task(capsys: pytest.CaptureFixture[str], settings: Settings) -> None:
    """A task that fails is logged by its name and runs again; a task that returns is not repeated."""
    ran: list[int] = []

    async def work() -> None:
        ran.append(len(ran))
        if len(ran) == 1:
            raise ZeroDivisionError

    async def run() -> None:
        await tasks.start("worker of a test", work)

    asyncio.run(run())
    assert ran == [0, 1]
    assert '"task": "worker of a test", "kind": "ZeroDivisionError"' in capsys.readouterr().err


def test_recorder(settings: Settings) -> None:
    """After an unforeseen error its delivery is answered, and the next ones are recorded."""
    sound = delivery(1, "2026-01-01")
    odd = msgspec.structs.replace(sound, envelope=Broken(sound.envelope, times=3))

    async def run() -> tuple[Recorded, Recorded]:
        recorder = Recorder(settings.libpq)
        try:
            with pytest.raises(DatabaseAway):
                await recorder.record(odd)
            after = await recorder.record(delivery(2, "2026-01-01"))
            return after.recorded, (await recorder.record(delivery(3, "2026-01-01"))).recorded
        finally:
            await recorder.stop()

    assert asyncio.run(run()) == (Recorded.NEW, Recorded.NEW)


@pytest.mark.parametrize(
    ("refuse", "allow"),
    [
        ("ALTER DATABASE {} SET default_transaction_read_only = on", "ALTER DATABASE {} RESET ALL"),
        ("ALTER DATABASE {} SET search_path = nowhere", "ALTER DATABASE {} RESET ALL"),
    ],
    ids=["read-only", "odd session"],
)
def test_recorder_keeps_no_odd_session(settings: Settings, refuse: str, allow: str) -> None:
    """A session opened while the server was read-only, or configured otherwise, is dropped after its error."""
    with psycopg.connect(settings.libpq, autocommit=True) as connection:
        name = connection.info.dbname

        async def run() -> Recorded:
            recorder = Recorder(settings.libpq)
            try:
                connection.execute(refuse.format(name).encode())
                answers = [recorder.record(delivery(number, "2026-01-01")) for number in range(5)]
                failed = await asyncio.gather(*answers, return_exceptions=True)
                assert {type(each) for each in failed} == {DatabaseAway}
                connection.execute(allow.format(name).encode())
                return (await recorder.record(delivery(1, "2026-01-01"))).recorded
            finally:
                await recorder.stop()

        assert asyncio.run(run()) is Recorded.NEW


def test_feed_watcher(engine: Engine, settings: Settings) -> None:
    """After an unforeseen error the change feed is read again."""

    async def run() -> None:
        feed_watcher = FeedWatcher(Broken(engine))  # type: ignore[arg-type]  # that is the fault
        try:
            with psycopg.connect(settings.libpq) as connection:
                connection.execute(
                    "INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at)"
                    " VALUES ('', false, 'order', 'cs_1', 'order.paid', 'evt_1', 'webhook', now())"
                )
            async with asyncio.timeout(20):
                await feed_watcher.wait(0, 3600)
        finally:
            await feed_watcher.stop()

    asyncio.run(run())


def test_waker(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """After an unforeseen error the requested message is still sent."""
    broken: Any = Broken(broker.celery(settings), times=2)
    waker = broker.Waker(settings, app=broken)
    try:
        waker.wake()
        with redis.Redis.from_url(settings.broker) as client:
            until(lambda: client.llen(FOLD_QUEUE) == 1)
    finally:
        waker.stop()
    assert '"thread": "waker", "kind": "ModuleNotFoundError"' in capsys.readouterr().err
