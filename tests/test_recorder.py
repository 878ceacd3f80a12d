"""A success is answered after the commit, and every answer comes in time."""

import hashlib
import os
import random
import select
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime

import psycopg
import pytest

from deploy.local.leftovers import processes_in
from deploy.local.postgres import Postgres
from schemas import events, inbox
from schemas.inbox import Delivery, Recorded
from schemas.migrate import upgrade
from tests.waiting import WAITS_FOR_A_LOCK, until
from tests.web import PATH, Web, event, serving, settings_of, signed


@pytest.fixture
def migrated(own_postgres: Postgres) -> Postgres:
    """Return a migrated PostgreSQL of the test's own."""
    upgrade(own_postgres.url)
    return own_postgres


@pytest.fixture
def hasty(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a web process that answers within half a second."""
    with serving(settings_of(database_url, redis_url), answer_seconds_max=0.5) as running:
        yield running


@contextmanager
def held(database_url: str) -> Iterator[psycopg.Connection]:
    """Hold a lock that every recording waits for; close the connection to release it."""
    with psycopg.connect(database_url) as blocker:
        blocker.execute("LOCK TABLE inbox IN ACCESS EXCLUSIVE MODE")
        yield blocker
        blocker.rollback()


def posted(body: bytes) -> bytes:
    """Return the bytes of a delivery with `Connection: close`."""
    lines = [f"POST {PATH} HTTP/1.1", "Host: payfold", f"Stripe-Signature: {signed(body)['Stripe-Signature']}"]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


def status(answer: bytes) -> int:
    """Return the status of a raw answer."""
    return int(answer.split()[1])


def waits_for_a_lock(web: Web) -> bool:
    """Return whether a statement is waiting for a lock."""
    return bool(web.query(WAITS_FOR_A_LOCK))


def test_away_and_back(migrated: Postgres, redis_url: str) -> None:
    """Without PostgreSQL deliveries are answered with a 503, and once it is back they are recorded.

    PostgreSQL may be away when the process starts, be stopped, or be killed between two deliveries.
    """
    migrated.stop()
    with serving(settings_of(migrated.url, redis_url)) as web:
        for number, end in enumerate([migrated.stop, migrated.kill]):
            response = web.deliver(event(number))
            assert (response.status_code, response.headers["retry-after"]) == (503, "5")
            assert response.json()["detail"].endswith("send it again.")
            assert response.headers["content-type"] == "application/problem+json"

            migrated.start()
            assert web.deliver(event(number)).status_code == 200
            end()
        migrated.start()
        # The connection is dead, and the recorder does not know yet.
        assert {web.deliver(event(3)).status_code, web.deliver(event(3)).status_code} <= {200, 503}
        assert web.deliver(event(4)).status_code == 200
        assert web.inbox() == ["evt_0", "evt_1", "evt_3", "evt_4"]


def test_hanging(hasty: Web) -> None:
    """While a lock is held every delivery is answered in time, however many there are.

    Their statements in PostgreSQL are canceled, and after the lock is released the next delivery is recorded.
    """
    bodies = [event(number) for number in range(300)]
    with held(hasty.settings.libpq):
        started = time.monotonic()
        raws = [hasty.send_raw(posted(body)) for body in bodies]
        assert {status(raw.answer()) for raw in raws} == {503}
        assert time.monotonic() - started < 10
        until(lambda: not waits_for_a_lock(hasty))

    assert hasty.deliver(event(1)).status_code == 200
    assert hasty.inbox() == ["evt_1"]


def test_frozen(migrated: Postgres, redis_url: str) -> None:
    """A silent PostgreSQL delays no answer either, and is used again when it wakes."""
    with serving(settings_of(migrated.url, redis_url), answer_seconds_max=0.5) as web:
        assert web.deliver(event(1)).status_code == 200
        processes = processes_in(migrated._working_folder, migrated.binary.name)
        assert processes
        signal_all(processes, signal.SIGSTOP)
        try:
            started = time.monotonic()
            assert [web.deliver(event(2)).status_code for _ in range(3)] == [503] * 3
            assert time.monotonic() - started < 10
        finally:
            signal_all(processes, signal.SIGCONT)

        until(lambda: web.deliver(event(3)).status_code == 200)


def signal_all(processes: list[int], number: signal.Signals) -> None:
    """Send *number* to each of the processes."""
    for process in processes:
        os.kill(process, number)


def test_overloaded(database_url: str, redis_url: str) -> None:
    """Deliveries beyond 64 MiB of waiting ones are refused at once; the waiting ones are recorded."""
    bodies = [event(number, filling="x" * 2_000_000) for number in range(34)]
    with serving(settings_of(database_url, redis_url)) as web:
        with held(database_url):
            raws = [web.send_raw(posted(body)) for body in bodies]
            ((refused,), _, _) = select.select([raw.connection for raw in raws], [], [], 20)
            (first,) = (raw for raw in raws if raw.connection is refused)
            answer = first.answer()
        assert status(answer) == 503
        assert b"retry-after: 5" in answer
        assert [status(raw.answer()) for raw in raws if raw is not first] == [200] * 33
        assert web.deliver(bodies[raws.index(first)]).status_code == 200
        assert len(web.inbox()) == 34


def test_stopped_in_mid_delivery(database_url: str, redis_url: str) -> None:
    """A process that is asked to stop records the deliveries that it has begun to receive."""
    with ExitStack() as running:
        web = running.enter_context(serving(settings_of(database_url, redis_url)))
        with held(database_url):
            first = web.send_raw(posted(event(1)))
            until(lambda: waits_for_a_lock(web))
            second = web.send_raw(posted(event(2)))
            assert web.get("/health/live").status_code == 200
            stopping = threading.Thread(target=running.pop_all().close)
            stopping.start()
            until(lambda: not is_listening(web))
        assert [status(raw.answer()) for raw in (first, second)] == [200, 200]
        stopping.join()
        assert web.inbox() == ["evt_1", "evt_2"]


def is_listening(web: Web) -> bool:
    """Return whether new connections are accepted."""
    try:
        web.send_raw().connection.close()
    except ConnectionError:
        return False
    return True


def delivery(number: int, api_version: str, livemode: bool = False) -> Delivery:  # noqa: FBT001, FBT002 - a field
    """Return a delivery of an event's rendering."""
    body = event(number, api_version=api_version, livemode=livemode)
    return Delivery(events.read(body), "", hashlib.sha256(body).digest(), None, "webhook", datetime.now(UTC))


def test_no_deadlock(database_url: str) -> None:
    """Recorders of the same events, in different orders and renderings, never wait for each other in a ring."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - repeats the run
    rounds = 30

    def record(recorder: int) -> int:
        chance = random.Random(seed + recorder)
        new = 0
        with psycopg.connect(database_url) as connection:
            for round_ in range(rounds):
                numbers = [*range(40), *range(round_ * 40, round_ * 40 + 40)]
                chance.shuffle(numbers)
                version = f"20{10 + round_}-01-01"
                receipts = inbox.record(connection.cursor(), [delivery(number, version) for number in numbers])
                connection.commit()
                new += sum(receipt.recorded is Recorded.NEW for receipt in receipts)
        return new

    with ThreadPoolExecutor(4) as recorders:
        # Each is new to exactly one recorder.
        assert sum(recorders.map(record, range(4))) == rounds * 40
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT id) FROM inbox").fetchall() == [(rounds * 40,) * 2]


def test_copies_in_one_batch(database_url: str) -> None:
    """Of two copies in one batch the first is recorded and the other kept, apart from copies of another world."""
    versions = ["2024-01-01", "2026-01-01.endive"]
    given = [delivery(1, version, livemode) for version in versions for livemode in (True, False)]
    with psycopg.connect(database_url) as connection:
        receipts = inbox.record(connection.cursor(), given)

        assert [receipt.recorded for receipt in receipts] == [Recorded.NEW] * 2 + [Recorded.COPY] * 2
        assert connection.execute("SELECT DISTINCT api_version FROM inbox").fetchall() == [("2024-01-01",)]
        assert connection.execute("SELECT DISTINCT api_version FROM renderings").fetchall() == [("2026-01-01.endive",)]
        assert connection.execute("SELECT count(*) FROM pending").fetchall() == [(2,)]
