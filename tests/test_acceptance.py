"""The Procfile's processes lose nothing when they or their real servers are killed, flushed or restarted."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest
import redis
from sqlalchemy import Engine

from deploy.local.ports import free_port
from deploy.local.postgres import Postgres
from deploy.local.processes import Processes
from deploy.local.running import wait_until_ready
from deploy.local.valkey import Valkey
from deploy.sandbox.account import Account
from deploy.sandbox.delivery import DeliveryReport, Distortions, Retries, deliver, plan
from deploy.sandbox.history import shop_history
from schemas import broker, database
from schemas.locks import keep_others_from_appending
from schemas.migrate import upgrade
from tests import ledger
from tests.waiting import until, until_locked
from worker.proof.rebuild import refolded

SECRET = "whsec_acceptance"


class Payfold:
    """Payfold as it runs in production, on servers that a test may stop or kill."""

    def __init__(self, postgres: Postgres, valkey: Valkey, processes: Processes, address: str) -> None:
        self.postgres = postgres
        self.valkey = valkey
        self.processes = processes
        self.address = address
        self.engine: Engine = database.engine(postgres.url)

    def deliver(self, account: Account, *, seed: int = 1, rate: float | None = None) -> DeliveryReport:
        """Send the events of *account* late, twice and out of order, until all are accepted."""
        attempts = plan(account.events, seed=seed, distortions=Distortions(events_per_second=2_000))
        retries = Retries(longest_seconds=1.0, tries_max=100)
        return asyncio.run(
            deliver(attempts, url=f"{self.address}/webhooks/stripe", secret=SECRET, rate=rate, retries=retries)
        )

    def count(self, table: str) -> int:
        """Return the number of rows in *table*."""
        return int(ledger.rows(self.engine, f"SELECT count(*) AS n FROM {table}")[0]["n"])  # noqa: S608 - a name from the test

    def assert_nothing_is_lost(self, account: Account) -> None:
        """Check that every accepted event is in the inbox and folded, and that the tables equal those of a rebuild."""
        until(lambda: self.count("pending") == 0)
        recorded = {row["id"] for row in ledger.rows(self.engine, "SELECT id FROM events WHERE state = 'folded'")}
        assert {event.id for event in account.events} <= recorded
        held = {row["id"]: row["status"] for row in ledger.rows(self.engine, "SELECT id, status FROM orders")}
        assert held == {session: account.expected_status(session) for session in held}
        assert held
        with refolded(self.engine, seed=1) as made:
            assert ledger.digest_of(self.engine, made.schema) == ledger.digest_of(self.engine)


@pytest.fixture
def payfold(own_postgres: Postgres, own_valkey: Valkey, tmp_path: Path) -> Iterator[Payfold]:
    """Return a running Payfold."""
    upgrade(own_postgres.url)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PAYFOLD_", "STRIPE_"))},
        "DATABASE_URL": own_postgres.url,
        "REDIS_URL": own_valkey.url,
        "STRIPE_WEBHOOK_SECRETS": SECRET,
        "PAYFOLD_HOST": "127.0.0.1",
        "PAYFOLD_DATA_DIR": str(tmp_path),
        "PAYFOLD_SWEEP_SECONDS": "1",
        "PORT": str(free_port()),
    }
    with (tmp_path / "log").open("w") as log, Processes(environment, output=log) as processes:
        address = f"http://127.0.0.1:{environment['PORT']}"
        wait_until_ready(address, processes)
        running = Payfold(own_postgres, own_valkey, processes, address)
        yield running
        running.engine.dispose()


@contextmanager
def appending_is_locked(payfold: Payfold) -> Iterator[None]:
    """Hold the lock of the change feed, so that a worker waits in the middle of its transaction."""
    with psycopg.connect(payfold.postgres.url) as connection, connection.cursor() as cursor:
        keep_others_from_appending(cursor)
        yield


def test_a_worker_killed_in_mid_batch_loses_nothing(payfold: Payfold) -> None:
    """The batch of a worker that is killed with -9 between its writes and its commit is folded by the next worker."""
    account = shop_history(seed=21, orders=300)
    with appending_is_locked(payfold):
        payfold.deliver(account)
        until_locked(payfold.engine)
        payfold.processes.kill("worker")
    assert payfold.count("orders") == 0

    payfold.processes.start_one("worker")

    payfold.assert_nothing_is_lost(account)


def test_a_flushed_broker_loses_nothing(payfold: Payfold) -> None:
    """The sweep finds events if the broker lost their wake-up messages."""
    account = shop_history(seed=22, orders=100)
    payfold.processes.kill("worker")
    payfold.processes.kill("clock")
    payfold.deliver(account)
    with redis.Redis.from_url(payfold.valkey.url) as client:
        until(lambda: client.llen(broker.FOLD_QUEUE) > 0)
        client.flushall()
    payfold.processes.start_one("worker")
    assert payfold.count("pending") > 0

    payfold.processes.start_one("clock")

    payfold.assert_nothing_is_lost(account)


def test_a_restarted_database_loses_nothing(payfold: Payfold) -> None:
    """Deliveries while PostgreSQL is down are not acknowledged, are sent again, and are all recorded in the end."""
    account = shop_history(seed=23, orders=600)
    reports: list[DeliveryReport] = []
    sender = threading.Thread(target=lambda: reports.append(payfold.deliver(account, rate=400)))
    sender.start()
    until(lambda: payfold.count("inbox") > 100)

    payfold.postgres.kill()
    with httpx.Client() as client:
        until(lambda: client.get(f"{payfold.address}/health/ready").status_code == 503)
    payfold.postgres.start()
    sender.join()

    (report,) = reports
    assert report.never_accepted == []
    assert report.refused[503] > 0
    payfold.assert_nothing_is_lost(account)


def test_a_killed_broker_delays_no_delivery(payfold: Payfold) -> None:
    """While Redis is killed every delivery is answered 200; it is folded once Redis is back."""
    account = shop_history(seed=24, orders=100)
    payfold.valkey.kill()

    report = payfold.deliver(account)

    assert (report.refused, report.connection_errors) == ({}, 0)
    payfold.valkey.start()
    payfold.assert_nothing_is_lost(account)


def test_asked_to_stop_every_process_ends_by_itself(payfold: Payfold) -> None:
    """After SIGTERM the processes end by themselves within the 30 seconds that a dyno has."""
    account = shop_history(seed=25, orders=100)
    payfold.deliver(account)

    payfold.processes.stop()

    assert {name: payfold.processes.returncode(name) for name in payfold.processes.names} == {
        # uvicorn shuts down in good order, and then ends itself by the signal that it received.
        "web": -15,
        "worker": 0,
        "clock": 0,
    }
