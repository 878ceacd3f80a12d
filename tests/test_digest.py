"""A digest depends on the content of the tables alone; a rebuild gives the same digest and leaves nothing behind."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import CheckConstraint, Column, Engine, Table, text

from deploy.sandbox.history import shop_history, tangle
from schemas import database, tables
from tests import ledger
from tests.command import payfold
from worker.proof.digest import ALL, Digest, digests
from worker.proof.rebuild import refolded
from worker.proof.shadow import SCHEMA_HOURS_MAX, SCHEMA_PREFIX

SHOP = shop_history(3, 60)
COLUMNS = [column for table in tables.PROJECTIONS for column in table.columns]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Return an engine on a database with a shop's orders."""
    opened = database.engine(database_url)
    ledger.record(opened, [ledger.delivery(event.body) for event in SHOP.events])
    ledger.fold(opened)
    yield opened
    opened.dispose()


def run(engine: Engine, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement and return its rows."""
    with database.transaction(engine) as connection:
        done = connection.execute(text(statement))
        return [tuple(row) for row in done] if done.returns_rows else []


def schemas(engine: Engine) -> list[str]:
    """Return the schemas that a rebuild has made."""
    return [name for (name,) in run(engine, "SELECT nspname FROM pg_namespace") if name.startswith(SCHEMA_PREFIX)]


VALUES = {"TEXT": "'y'", "BIGINT": "0", "BOOLEAN": "true", "DATETIME": "'2026-01-01Z'", "JSONB": "'{}'::jsonb"}
"""A value of each type that a projection's column has."""
OTHER_VALUES = {
    "TEXT": "{0} || 'x'",
    "BIGINT": "{0} + 1",
    "BOOLEAN": "NOT {0}",
    "DATETIME": "{0} + interval '1 microsecond'",
    "JSONB": "jsonb_build_object('was', {0})",
}


def other_value(column: Column[Any]) -> str:
    """Return an expression for another value than a column has, also for null."""
    for check in column.table.constraints:
        if isinstance(check, CheckConstraint) and check.name == f"{column.name}_is_known":
            first, second = str(check.sqltext).split("'")[1:4:2]
            return f"CASE {column.name} WHEN '{first}' THEN '{second}' ELSE '{first}' END"
    kind = str(column.type)
    return f"coalesce({OTHER_VALUES[kind].format(column.name)}, {VALUES[kind]})"


def one_row_at_least(engine: Engine, table: Table) -> None:
    """Insert a row into an empty table."""
    needed = [column for column in table.columns if not column.nullable]
    names = ", ".join(column.name for column in needed)
    values = ", ".join(VALUES[str(column.type)] for column in needed)
    run(engine, f"INSERT INTO {table.name} ({names}) SELECT {values} WHERE NOT EXISTS (SELECT FROM {table.name})")  # noqa: S608


def test_one_cell(engine: Engine) -> None:
    """A change of one cell, of any column, changes the hash of its table and the digest, and no other table's hash."""
    for table in tables.PROJECTIONS:
        one_row_at_least(engine, table)
    before = digests(engine)

    for column in COLUMNS:
        name = column.table.name
        change = f"UPDATE {name} SET {column.name} = {other_value(column)}"  # noqa: S608 - our own names
        changed_rows = run(engine, f"{change} WHERE ctid = (SELECT min(ctid) FROM {name}) RETURNING 1")  # noqa: S608
        assert len(changed_rows) == 1
        after = digests(engine)
        changed = {new.table for old, new in zip(before, after, strict=True) if old.sha256 != new.sha256}
        assert changed == {name, ALL}, column
        before = after


def of_orders(engine: Engine) -> Digest:
    """Return the digest of the orders."""
    return next(each for each in digests(engine) if each.table == "orders")


@pytest.mark.parametrize("change", ["DELETE FROM orders WHERE ctid = (SELECT min(ctid) FROM orders)", "null"])
def test_one_row(engine: Engine, change: str) -> None:
    """A missing row changes the hash, and so does a null instead of an empty text."""
    run(engine, "UPDATE orders SET customer = ''")
    before = of_orders(engine)
    run(engine, "UPDATE orders SET customer = NULL" if change == "null" else change)

    after = of_orders(engine)

    assert before.sha256 != after.sha256
    assert after.rows == before.rows - (change != "null")


def test_order_of_rows(engine: Engine) -> None:
    """The digest does not depend on the order of the rows on disk."""
    before = digests(engine)
    for table in ("orders", "payment_links"):
        run(engine, f"CREATE TABLE kept AS SELECT * FROM {table} ORDER BY md5(id)")  # noqa: S608 - our own name
        run(engine, f"DELETE FROM {table}; INSERT INTO {table} SELECT * FROM kept; DROP TABLE kept")  # noqa: S608

    assert digests(engine) == before


@pytest.mark.parametrize("setting", ["timezone = 'Asia/Kathmandu'", "datestyle = 'German, DMY'"])
def test_settings_of_the_server(engine: Engine, database_url: str, setting: str) -> None:
    """The digest does not depend on the server's settings for times."""
    before = digests(engine)
    (name,) = run(engine, "SELECT current_database()")[0]
    run(engine, f"ALTER DATABASE {name} SET {setting}")
    again = database.engine(database_url)

    shown = run(again, f"SELECT current_setting('{setting.split(maxsplit=1)[0]}')")
    assert (shown[0][0] in setting, digests(again)) == (True, before)
    again.dispose()


def test_order_of_folding(engine: Engine) -> None:
    """A rebuild folds the same events in another order, and gives the same digest."""
    for account in (tangle(seed) for seed in range(8)):
        ledger.record(engine, [ledger.delivery(event.body, account=f"acct_{id(account)}") for event in account.events])
    ledger.fold(engine)
    live = digests(engine)

    for seed in (1, 2):
        with refolded(engine, seed=seed) as made:
            assert digests(engine, schema=made.schema) == live


def test_command(engine: Engine, database_url: str) -> None:
    """`digest` prints a line for each table and one for all, with the hash last, and the same in JSON."""
    found = [(each.table, each.rows, each.sha256) for each in digests(engine)]

    lines = payfold("digest", DATABASE_URL=database_url)
    rows = payfold("digest", "--format", "ndjson", DATABASE_URL=database_url)
    one = payfold("digest", "--table", "orders", DATABASE_URL=database_url)
    none = payfold("digest", "--table", "events", DATABASE_URL=database_url)

    assert (lines.err, rows.err, one.err) == ("", "", "")
    assert [name for name, _, _ in found] == [*sorted(table.name for table in tables.PROJECTIONS), "all"]
    assert [tuple(line.split()) for line in lines.out.splitlines()] == [(n, str(r), sha) for n, r, sha in found]
    assert [row.count('"sha256":"') for row in rows.out.splitlines()] == [1] * len(found)
    assert one.out in lines.out
    assert one.out.startswith("orders ")
    assert (none.code, none.out) == (2, "")
    assert "--table is one of " in none.err


# ---- The rebuild ----


def test_rebuild_leaves_nothing(engine: Engine) -> None:
    """A rebuild changes no row of the live tables, and leaves no schema behind."""
    names = ("inbox", "pending", "outcomes", "orders", "payment_links", "changes", "anomalies")
    before = [run(engine, f"SELECT ctid::text, xmin::text, * FROM {name}") for name in names]  # noqa: S608 - our own

    with refolded(engine, seed=1) as made:
        assert schemas(engine) == [made.schema]

    assert [run(engine, f"SELECT ctid::text, xmin::text, * FROM {name}") for name in names] == before  # noqa: S608
    assert schemas(engine) == []


def test_rebuild_after_an_exception(engine: Engine) -> None:
    """A rebuild that ends with an exception leaves no schema behind."""

    def use() -> None:
        with refolded(engine, seed=1):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        use()

    assert schemas(engine) == []


def test_two_rebuilds_at_once(engine: Engine) -> None:
    """Two simultaneous rebuilds give the same digest."""
    live, found, barrier = digests(engine), [], threading.Barrier(2, timeout=30)

    def rebuild(seed: int) -> None:
        barrier.wait()
        with refolded(engine, seed=seed) as made:
            barrier.wait()
            found.append(digests(engine, schema=made.schema))
            barrier.wait()

    threads = [threading.Thread(target=rebuild, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [live, live]
    assert schemas(engine) == []


def test_rebuild_left_behind(engine: Engine) -> None:
    """A later rebuild removes the schema of a killed one, but not that of one that may still run."""
    now = int(datetime.now(UTC).timestamp())
    old, young = (f"{SCHEMA_PREFIX}{now - age}_ab" for age in (SCHEMA_HOURS_MAX * 3600 + 60, 60))
    run(engine, f"CREATE SCHEMA {old}; CREATE TABLE {old}.orders (); CREATE SCHEMA {young}")

    with refolded(engine, seed=1):
        pass

    assert schemas(engine) == [young]


def test_rebuild_with_a_row_that_postgresql_refuses(engine: Engine) -> None:
    """If PostgreSQL refuses the row of an event, a rebuild parks the event as before, and folds the others."""
    run(engine, "DELETE FROM orders; DELETE FROM outcomes; ALTER TABLE orders ADD CHECK (amount_total < 9000)")
    run(engine, "INSERT INTO pending SELECT seq, true FROM inbox")
    ledger.fold(engine)
    live = digests(engine)
    assert 0 < run(engine, "SELECT count(*) FROM events WHERE state = 'parked'")[0][0] < len(SHOP.events)

    with refolded(engine, seed=1) as made:
        assert digests(engine, schema=made.schema) == live
