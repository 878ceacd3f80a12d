"""A worker without a clock survives many faults of broker and database, and folds the backlog after each by itself.

About 18 minutes with `--long`; in parts with `-k`, as in `-k "pauses and 3"`. All faults of a run happen to one worker
with the intervals of production, while messages arrive as from a web process. No clock runs, so that the worker itself
has to find events that a deaf consumer misses. With `-n 0 -s` a table at the end shows the duration of each.
"""

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
import redis
from sqlalchemy import Engine

from deploy.local.postgres import Postgres
from deploy.local.valkey import Valkey
from schemas import broker, database
from schemas.migrate import upgrade
from tests import faults
from tests.faults import Proxy, Shop, Started, started
from tests.waiting import until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

FOLDED_SECONDS_MAX = 60.0
HEARS_SECONDS_MAX = 120.0
"""The watchdog acts 30 seconds after Redis is back, and once more 30 seconds later."""


@dataclass(frozen=True)
class Figure:
    """The result of a fault: seconds from its end until nothing was pending, and until a message was received."""

    fault: str
    lasted: float
    folded: float
    hears: float
    reconnects: int
    exits: int

    def __str__(self) -> str:
        return (
            f"{self.fault:<22}{self.lasted:>8.1f} s {self.folded:>10.1f} s {self.hears:>10.1f} s"
            f"{self.reconnects:>12}{self.exits:>8}"
        )


@dataclass
class Stand:
    """A worker without a clock on servers of its own, with a proxy before the database."""

    postgres: Postgres
    valkey: Valkey
    proxy: Proxy
    worker: Started
    engine: Engine
    shop: Shop
    figures: list[Figure] = field(default_factory=list)

    def outlasts(self, name: str, fault: Callable[[], None]) -> Figure:
        """Run *fault*, which returns at its end, while events and messages arrive; return the result."""
        deaf, lost = (len(self.worker.lines(event)) for event in ("consumer.deaf", "consumer.deaf_for_good"))
        ended = len(self.worker.lines("worker.slot_ended"))
        began = time.monotonic()
        with self._busy():
            fault()
        back = time.monotonic()
        self.shop.until_folded(FOLDED_SECONDS_MAX)
        folded = time.monotonic()
        self._until_hears()
        assert self.worker.process.poll() is None
        # Any other end of a process than by the watchdog is a bug.
        exits = len(self.worker.lines("consumer.deaf_for_good")) - lost
        assert len(self.worker.lines("worker.slot_ended")) - ended == exits
        figure = Figure(
            fault=name,
            lasted=back - began,
            folded=folded - back,
            hears=time.monotonic() - back,
            reconnects=len(self.worker.lines("consumer.deaf")) - deaf,
            exits=exits,
        )
        self.figures.append(figure)
        return figure

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Record events, and send messages if the broker accepts them, until the block ends."""
        over = threading.Event()

        def record() -> None:
            while not over.wait(0.1):
                self.shop.record(5)

        def send() -> None:
            with redis.Redis.from_url(self.valkey.url, socket_timeout=1, socket_connect_timeout=1) as client:
                while not over.wait(0.05):
                    try:
                        is_wanted = client.llen(broker.FOLD_QUEUE) == 0
                    except redis.RedisError:
                        continue
                    if is_wanted:
                        broker.send(app, broker.FOLD, queue=broker.FOLD_QUEUE)

        app = broker.celery(faults.settings_of(self.valkey.url))
        threads = [threading.Thread(target=each) for each in (record, send)]
        for each in threads:
            each.start()
        try:
            # So that the fault meets a busy worker.
            begun = time.monotonic() + 1
            until(lambda: time.monotonic() > begun)
            yield
        finally:
            over.set()
            for each in threads:
                each.join()
            app.close()

    def _until_hears(self) -> None:
        with redis.Redis.from_url(self.valkey.url) as client:
            client.delete(broker.FOLD_QUEUE)
            faults.put(self.valkey.url, broker.FOLD, broker.FOLD_QUEUE)
            until(lambda: client.llen(broker.FOLD_QUEUE) == 0, HEARS_SECONDS_MAX)


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """Return a running worker, and print the figures at the end."""
    folder = tmp_path_factory.mktemp("faults")
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres(folder / "postgres", durable=False))
        valkey = stack.enter_context(Valkey(folder / "valkey"))
        upgrade(postgres.url)
        proxy = Proxy(postgres.url)
        stack.callback(proxy.close)
        engine = database.engine(postgres.url, connections_max=2)
        stack.callback(engine.dispose)
        settings = {"DATABASE_URL": proxy.url, "REDIS_URL": valkey.url}
        worker = stack.enter_context(started(folder / "log", "worker", **settings))
        made = Stand(postgres, valkey, proxy, worker, engine, Shop(engine))
        made._until_hears()
        yield made
        assert worker.stop() == 0
        _print(made.figures, folder / "log")


def _print(figures: list[Figure], log: Path) -> None:
    head = f"{'fault':<22}{'lasted':>10} {'folded':>12} {'hears':>12}{'reconnects':>12}{'exits':>8}"
    lines = ["", head, *map(str, figures)]
    if figures:
        lines.append(f"longest: folded after {max(each.folded for each in figures):.1f} s")
    lines.append(f"lines in the worker's log: {len(log.read_bytes().splitlines())}")
    sys.__stderr__.write("\n".join(lines) + "\n")  # type: ignore[union-attr]  # a test has one


def seconds(request: pytest.FixtureRequest, number: int, least: float, most: float) -> float:
    """Return the duration of the fault with this *number*, drawn by the run's seed, which is in its header."""
    seed = request.config.getoption("hypothesis_seed")
    return random.Random(f"{seed} {request.node.name} {number}").uniform(least, most)


def last(length: float) -> None:
    """Wait for *length* seconds of a fault."""
    over = time.monotonic() + length
    until(lambda: time.monotonic() > over, length + 20)


@pytest.mark.parametrize("number", range(20))
def test_pauses(stand: Stand, request: pytest.FixtureRequest, number: int) -> None:
    """The worker survives a broker that is suspended for 5 to 40 seconds."""

    def pause() -> None:
        with faults.paused(stand.valkey):
            last(seconds(request, number, 5, 40))

    stand.outlasts("pause", pause)


@pytest.mark.parametrize("number", range(7))
def test_kills(stand: Stand, request: pytest.FixtureRequest, number: int) -> None:
    """The worker survives a broker that is killed and restarts after up to 20 seconds."""

    def kill() -> None:
        stand.valkey.kill()
        last(seconds(request, number, 0, 20))
        stand.valkey.start()

    stand.outlasts("kill", kill)


@pytest.mark.parametrize("number", range(6))
def test_flushes(stand: Stand, number: int) -> None:
    """The worker survives a broker that loses everything, several times in a second."""

    def flush() -> None:
        for _ in range(5):
            faults.flush(stand.valkey.url)
            last(0.2)

    stand.outlasts("flush", flush)


@pytest.mark.parametrize("number", range(7))
def test_cuts(stand: Stand, number: int) -> None:
    """The worker survives a broker that closes every connection, several times in a second."""

    def cut() -> None:
        for _ in range(5):
            faults.cut(stand.valkey.url)
            last(0.2)

    stand.outlasts("cut connections", cut)


@pytest.mark.parametrize("number", range(10))
def test_silences(stand: Stand, request: pytest.FixtureRequest, number: int) -> None:
    """The worker survives connections to PostgreSQL that fall silent for good, while TCP still acknowledges."""

    def silence() -> None:
        assert stand.proxy.fall_silent() > 0
        last(seconds(request, number, 1, 10))

    stand.outlasts("silent PostgreSQL", silence)


@pytest.mark.parametrize("number", range(5))
def test_read_only_spells(stand: Stand, number: int) -> None:
    """The worker survives 30 seconds in which PostgreSQL ends its sessions and makes new ones read-only."""

    def spell() -> None:
        name = stand.engine.url.database
        with psycopg.connect(stand.postgres.url, autocommit=True) as connection:
            connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'.encode())
            connection.execute("SET default_transaction_read_only = off")
            try:
                # The worker's connections, which use the proxy.
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND client_port = ANY (%s)",
                    (stand.proxy.ports(),),
                )
                last(30)
            finally:
                connection.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'.encode())

    before = stand.worker.log.stat().st_size
    stand.outlasts("read-only spell", spell)
    logged = stand.worker.log.read_bytes()[before:]
    assert logged.count(b'"database.away"') <= 4
    assert b"Traceback" not in logged
