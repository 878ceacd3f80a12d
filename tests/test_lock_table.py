"""PostgreSQL's lock table may be full: batches become smaller, events wait, and none is parked."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from structlog.testing import capture_logs

from deploy.bench import events
from deploy.local.postgres import Postgres
from schemas import database, migrate
from schemas.errors import DatabaseAway
from tests import ledger
from tests.command import payfold
from worker.folding import projection

SEED = 7
BATCH = 400
ROOM_FOR_HALF = 300
"""More locks than half of a batch takes, and fewer than all of it takes."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, postgres_bin: Path | None) -> Iterator[str]:
    """Return the URL of a migrated database on a server with a small lock table."""
    server = Postgres(tmp_path_factory.mktemp("small") / "postgres", durable=False, postgres_bin=postgres_bin)
    with server:
        pass
    with (server.folder / "cluster" / "postgresql.conf").open("a") as file:
        file.write("max_locks_per_transaction = 10\n")
    with server:
        migrate.upgrade(database.sqlalchemy_url(server.url))
        yield server.url


@pytest.fixture
def small(server: str) -> Iterator[Engine]:
    """Return an engine on that database, with nothing recorded in it."""
    made = database.engine(server)
    ledger.clear(made)
    yield made
    made.dispose()


class Others:
    """A session that holds locks which nothing else takes."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self._held = 0

    def fill(self) -> None:
        """Take locks until the table is full."""
        with suppress(psycopg.errors.OutOfMemory):
            while True:
                self._connection.execute("SELECT pg_advisory_lock(1, %s)", (self._held,))
                self._held += 1

    def release(self, count: int) -> int:
        """Release up to *count* of them, and return how many."""
        released = min(count, self._held)
        for _ in range(released):
            self._held -= 1
            self._connection.execute("SELECT pg_advisory_unlock(1, %s)", (self._held,))
        return released

    def close(self) -> None:
        """Release all."""
        self._connection.close()


def url_of(engine: Engine) -> str:
    """Return the address of *engine*'s database, as a setting has it."""
    return engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def others(engine: Engine) -> Iterator[Others]:
    """Yield another session on the server of *engine*."""
    made = Others(url_of(engine))
    try:
        yield made
    finally:
        made.close()


def states(engine: Engine) -> dict[str, int]:
    """Return how many events have each state."""
    found = ledger.rows(engine, "SELECT state, count(*)::int AS events FROM events GROUP BY state")
    return {row["state"]: row["events"] for row in found}


def test_a_batch_with_too_many_locks_is_divided(small: Engine) -> None:
    """A batch that does not fit into the lock table is folded in parts, and the log names the setting to raise."""
    events.record(small, events.take(events.history(SEED, payments=False), BATCH))
    with others(small) as session:
        session.fill()
        session.release(ROOM_FOR_HALF)
        with capture_logs() as lines:
            ledger.fold(small)

    assert states(small) == {"folded": BATCH}
    assert [line["event"] for line in lines] == ["batch.divided"]
    assert "raise max_locks_per_transaction" in lines[0]["reason"]
    assert ledger.rows(small, "SELECT DISTINCT attempts FROM outcomes") == [{"attempts": 1}]


def test_a_full_lock_table_parks_no_event(small: Engine) -> None:
    """While there is room for nothing, events stay pending; they are folded when locks are free again."""
    events.record(small, events.take(events.history(SEED, payments=False), 3))
    seqs = [row["seq"] for row in ledger.rows(small, "SELECT seq FROM inbox")]
    with others(small) as session:
        session.fill()
        seen = set[str]()
        while session.release(3):
            for seq in seqs:
                try:
                    projection.run_one(small, seq, now=ledger.NOW)
                except (DatabaseAway, database.DriverError, DBAPIError) as error:
                    seen.add(database.condition(error))
        assert seen

    assert states(small) == {"folded": 3}


def test_a_command_names_the_setting(small: Engine) -> None:
    """A command for which there is no lock left names the setting to raise."""
    with others(small) as session:
        session.fill()
        # Room for a connection, and not for the locks of a whole schema.
        session.release(20)
        ran = payfold("rebuild", DATABASE_URL=url_of(small))

    assert (ran.code, ran.out) == (1, "")
    assert "max_locks_per_transaction" in ran.err
