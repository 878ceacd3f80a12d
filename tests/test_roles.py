"""A role for reports reads the tables, writes nothing, and sees personal data only if that was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine

from deploy.local.postgres import Postgres
from deploy.sandbox.account import Account
from schemas import database
from schemas.migrate import upgrade
from tests import ledger
from tests.command import Ran, payfold
from tests.test_scopes import PERSONAL

pytestmark = pytest.mark.integration


class MakingRoles(Postgres):
    """A server of our own, since roles are the server's, on which our role may make others."""

    def _roles(self) -> str:
        return f"{super()._roles()}ALTER ROLE payfold CREATEROLE\n"


@pytest.fixture
def own(tmp_path: Path, postgres_bin: Path | None) -> Iterator[tuple[str, Engine]]:
    """Return the address of a migrated database on that server, and its engine."""
    with MakingRoles(tmp_path, durable=False, postgres_bin=postgres_bin) as server:
        upgrade(server.url)
        engine = database.engine(server.url, connections_max=2)
        yield server.url, engine
        engine.dispose()


def created(url: str, *options: str) -> tuple[Ran, dict[str, str]]:
    """Make a role, and return what was printed."""
    ran = payfold("roles", "create", "reports", *options, DATABASE_URL=url)
    return ran, dict(line.split(maxsplit=1) for line in ran.out.splitlines())


@contextmanager
def reading(url: str, engine: Engine) -> "Iterator[psycopg.Connection[tuple[object, ...]]]":
    """Act as the new role; by itself it may not connect to a server of the tests, which admits our role alone."""
    ledger.execute(engine, "GRANT reports TO payfold")
    with psycopg.connect(url, autocommit=True, options="-crole=reports") as reader:
        yield reader


def refused(reader: "psycopg.Connection[tuple[object, ...]]", statement: bytes) -> bool:
    """Return whether PostgreSQL refuses *statement* for want of a right."""
    try:
        reader.execute(statement)
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction):
        return True
    return False


def test_a_role_for_reports(own: tuple[str, Engine]) -> None:
    """It reads every table and view but payloads and personal columns; with --personal these too; it never writes."""
    url, engine = own
    account = Account(seed=1)
    session = account.open_session(metadata={"cart": "7"})
    account.complete(session)
    ledger.take_in(engine, *(each.body for each in account.events))

    ran, printed = created(url)
    assert (ran.code, printed["role"]) == (0, "reports")
    with reading(url, engine) as reader:
        assert reader.execute("SELECT id, status FROM order_book").fetchall() == [(session, "paid")]
        assert reader.execute("SELECT type, state FROM events").fetchall() != []
        for table, columns in PERSONAL.items():
            assert all(refused(reader, f"SELECT {name} FROM {table}".encode()) for name in columns), table  # noqa: S608 - our own names
        assert refused(reader, b"SELECT payload FROM events")
        assert refused(reader, b"SELECT * FROM payloads")
        assert refused(reader, b"SELECT * FROM inbox")
        for statement in (b"DELETE FROM orders", b"INSERT INTO pending (seq) VALUES (1)", b"CREATE TABLE mine ()"):
            assert refused(reader, statement), statement

    again, kept = created(url, "--personal")
    assert (again.code, kept["password"]) == (0, "unchanged")
    with reading(url, engine) as reader:
        assert reader.execute("SELECT metadata FROM orders").fetchall() == [({"cart": "7"},)]
        assert refused(reader, b"SELECT payload FROM events")
    created(url)
    with reading(url, engine) as reader:
        assert refused(reader, b"SELECT metadata FROM orders")


def test_a_role_of_another(own: tuple[str, Engine]) -> None:
    """A role that is there for something else is left alone, and a name that is none is refused with an example."""
    url, engine = own
    ledger.execute(engine, "CREATE ROLE reports LOGIN")

    ran, _ = created(url)

    assert (ran.code, "choose another name" in ran.err) == (1, True)
    assert payfold("roles", "create", "No Name", DATABASE_URL=url).code == 2
