"""PgBouncer in transaction mode, in front of PostgreSQL: many connections share a few sessions, and all works."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import psycopg
import pytest
from sqlalchemy import Engine

from deploy.bench import events
from deploy.doctor import engines, postgres
from deploy.doctor.findings import Unread
from deploy.local.ports import LOOPBACK, free_port
from deploy.local.postgres import RUN_AS_WAYS
from schemas import database
from schemas.settings import Settings
from tests import ledger
from tests.command import payfold
from tests.waiting import until
from tests.web import event, serving, settings_of

PGBOUNCER: Final = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
POOL: Final = 3
EVENTS: Final = 1_200
SEED: Final = 11

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="no pgbouncer: Debian has a package of that name")


@dataclass(frozen=True)
class Pooled:
    """A database, by PgBouncer and directly."""

    url: str
    direct: str


@contextmanager
def pooler(direct: str, folder: Path, *, mode: str = "transaction") -> Iterator[Pooled]:
    """Run PgBouncer in front of the database *direct*, with ``POOL`` sessions."""
    at, port = urlsplit(direct), free_port()
    folder.mkdir()
    (folder / "users").write_text(f'"{at.username}" "{at.password}"\n')
    (folder / "pgbouncer.ini").write_text(
        f"""
        [databases]
        * = host={at.hostname} port={at.port}
        [pgbouncer]
        listen_addr = {LOOPBACK}
        listen_port = {port}
        unix_socket_dir =
        auth_type = scram-sha-256
        auth_file = {folder / "users"}
        pool_mode = {mode}
        default_pool_size = {POOL}
        """
    )
    # PgBouncer does not run as root.
    as_user = RUN_AS_WAYS[0].prefix if os.geteuid() == 0 else ()
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([*as_user, str(PGBOUNCER), str(folder / "pgbouncer.ini")], stderr=log) as process,
    ):
        try:
            until(lambda: process.poll() is not None or answers(port))
            assert process.returncode is None, (folder / "log").read_text()
            yield Pooled(at._replace(netloc=f"{at.netloc.rpartition(':')[0]}:{port}").geturl(), direct)
        finally:
            process.terminate()


def answers(port: int) -> bool:
    """Return whether something listens on *port*."""
    with socket.socket() as client:
        return client.connect_ex((LOOPBACK, port)) == 0


@pytest.fixture
def pooled(database_url: str, tmp_path: Path) -> Iterator[Pooled]:
    """Return a migrated database behind PgBouncer in transaction mode."""
    with pooler(database_url, tmp_path / "pgbouncer") as made:
        yield made


@pytest.fixture
def by_pooler(pooled: Pooled) -> Iterator[Engine]:
    """Return an engine that reaches the database by PgBouncer."""
    made = database.engine(pooled.url)
    yield made
    made.dispose()


def test_transaction_mode_is_enough(pooled: Pooled, by_pooler: Engine, redis_url: str) -> None:
    """Delivering, folding by four at once, rebuilding and migrating work with three sessions."""
    events.record(by_pooler, events.take(events.history(SEED, payments=True), EVENTS))
    ledger.fold_with_workers(by_pooler, 4, limit=100)
    with serving(settings_of(pooled.url, redis_url)) as web:
        assert [web.deliver(event(number)).status_code for number in range(3)] == [200] * 3
        assert web.get("/v1/orders").status_code == 200
        assert web.get("/health/ready").status_code == 200
    ledger.fold(by_pooler)
    rebuilt = payfold("rebuild", DATABASE_URL=pooled.url)
    migrated = payfold("migrate", "up", DATABASE_URL=pooled.url)

    assert (rebuilt.code, migrated.code) == (0, 0), rebuilt.err + migrated.err
    assert ledger.rows(by_pooler, "SELECT count(*)::int AS n FROM outcomes") == [{"n": EVENTS + 3}]
    assert ledger.rows(by_pooler, "SELECT name FROM pg_prepared_statements") == []
    with psycopg.connect(pooled.direct, autocommit=True) as connection:
        held = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone()
    assert held is not None
    assert 1 <= held[0] <= POOL


def test_the_doctor_names_what_a_pooler_refuses(database_url: str, pooled: Pooled, tmp_path: Path) -> None:
    """Behind PgBouncer connections are not counted; statement mode and `options` are refused, each with its fix."""
    found = seen(pooled.url)
    assert isinstance(found, postgres.Server)
    assert found.is_pooled

    with pooler(database_url, tmp_path / "statements", mode="statement") as by_statement:
        statements = seen(by_statement.url)
    options = seen(f"{pooled.url}?options=-csearch_path%3Dpublic")

    assert isinstance(statements, Unread)
    assert "pool_mode = transaction" in engines.database_away(statements.reason).fix
    assert isinstance(options, Unread)
    assert "ALTER ROLE … SET search_path" in engines.database_away(options.reason).fix


def seen(url: str) -> postgres.Server | Unread:
    """Return what the doctor reads of the server at *url*."""
    found = postgres.Postgres()
    postgres.fill(Settings.load({"DATABASE_URL": url}), found)
    return found.server
