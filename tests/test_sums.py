"""The sums follow the rows, whatever writes them: folds at once, a rename, another release, a swap, a person."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from sqlalchemy.exc import ProgrammingError

from deploy.local.postgres import Postgres
from schemas import database, migrate, tables
from tests import histories, ledger
from tests.command import payfold
from worker.folding.claim import queue_outdated
from worker.logs import renaming
from worker.proof import swap
from worker.proof.difference import Difference
from worker.proof.rebuild import rebuilt

pytestmark = pytest.mark.integration

NOW = datetime(2026, 11, 22, tzinfo=UTC)
# By table: the name of its rows in the sums, and the columns with their time and amount.
READ = {
    "orders": ("order", "created", "amount_total"),
    "refunds": ("refund", "created", "amount"),
    "disputes": ("dispute", "as_of", "amount"),
}
HOURLY = ("account", "livemode", "subject", "hour", "status", "currency")
LINKS = ("account", "livemode", "payment_link", "currency")

Key = tuple[Any, ...]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Return an engine on an empty database, with connections for several workers."""
    made = database.engine(database_url, connections_max=9)
    yield made
    made.dispose()


def hourly_of_rows(engine: Engine) -> Counter[Key]:
    """Return the hourly sums, counted row by row: a number for each key and name."""
    found = Counter[Key]()
    for table, (subject, time, amount) in READ.items():
        for row in ledger.rows(engine, f"SELECT * FROM {table}"):  # noqa: S608 - our own names
            at = row[time] and row[time].astimezone(UTC).replace(minute=0, second=0, microsecond=0)
            key = (row["account"], row["livemode"], subject, at, row["status"], row["currency"])
            is_known = row[amount] is not None and row["currency"] is not None
            found[*key, "counted"] += 1
            found[*key, "amount"] += row[amount] if is_known else 0
            found[*key, "without_amount"] += not is_known
    return +found


def hourly_sums(engine: Engine) -> Counter[Key]:
    """Return the hourly sums as they are kept."""
    return kept(engine, "hourly", HOURLY, ("counted", "amount", "without_amount"))


def link_sums(engine: Engine) -> Counter[Key]:
    """Return the funnel's sums as they are kept."""
    return kept(engine, "link", LINKS, ("opened", "completed", "paid", "expired", "amount_paid", "without_amount"))


def kept(engine: Engine, name: str, key: Key, numbers: tuple[str, ...]) -> Counter[Key]:
    """Return the sums and the deltas called *name* together."""
    found = Counter[Key]()
    for row in ledger.rows(engine, f"SELECT * FROM {name}_sums UNION ALL SELECT * FROM {name}_deltas"):  # noqa: S608
        for number in numbers:
            found[*(row[column] for column in key), number] += int(row[number])
    assert min(found.values(), default=0) >= 0
    return +found


def links_of_rows(engine: Engine) -> Counter[Key]:
    """Return the funnel of each link and currency, counted order by order."""
    found = Counter[Key]()
    for row in ledger.rows(engine, "SELECT * FROM orders WHERE payment_link IS NOT NULL"):
        key = tuple(row[name] for name in LINKS)
        found[*key, "opened"] += 1
        found[*key, "completed"] += row["completed_at"] is not None
        found[*key, row["status"]] += row["status"] in {"paid", "expired"}
        if row["status"] == "paid":
            found[*key, "amount_paid"] += row["amount_total"] or 0
            found[*key, "without_amount"] += row["amount_total"] is None
    return +found


def require_sums(engine: Engine) -> None:
    """Check that the sums are those of the rows."""
    assert hourly_sums(engine) == hourly_of_rows(engine)
    assert link_sums(engine) == links_of_rows(engine)


def merge(engine: Engine) -> None:
    """Add the deltas to the sums, which statements do now and then."""
    ledger.rows(engine, "SELECT merge_sums()")


def differences(engine: Engine) -> list[Difference]:
    """Return what a rebuild finds."""
    found: list[Difference] = []
    with rebuilt(engine) as made:
        swap.compare(made, on_difference=found.append)
    return found


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_the_sums_are_those_of_the_rows(engine: Engine, seed: int) -> None:
    """The sums are right in any arrival and batching, with two workers, after a rename, a release, and a swap."""
    chance = random.Random(seed)
    ledger.clear(engine)
    ledger.execute(engine, "DELETE FROM account_names")
    require_sums(engine)
    bodies = [body for number in range(3) for body in histories.bodies_of(seed + number)]
    chance.shuffle(bodies)
    for batch in ledger.batches([ledger.delivery(each) for each in bodies], iter(lambda: chance.randint(1, 40), 0)):
        ledger.record(engine, [each.named({"": chance.choice(("", "acct_1"))}) for each in batch])
        if chance.random() < 0.5:
            ledger.fold_with_workers(engine, 2, limit=chance.choice((1, 5, 500)))
        if chance.random() < 0.3:
            merge(engine)
    ledger.fold(engine)
    require_sums(engine)

    renaming.rename(engine, "", "acct_1", now=NOW)
    ledger.fold(engine)
    require_sums(engine)
    for table in ("hourly_sums", "hourly_deltas", "link_sums", "link_deltas"):
        assert ledger.rows(engine, f"SELECT FROM {table} WHERE account = ''") == []

    # As if an older release had folded some orders in another way.
    ledger.execute(engine, "UPDATE orders SET status = 'open', amount_total = NULL WHERE amount_total % 2 = 0")
    ledger.execute(engine, "UPDATE refunds SET currency = NULL, amount = amount + 1")
    ledger.execute(engine, "DELETE FROM disputes WHERE id < (SELECT max(id) FROM disputes)")
    require_sums(engine)
    ledger.execute(engine, "UPDATE outcomes SET fold_version = fold_version - 1")
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        assert queue_outdated(cursor) > 0
    ledger.fold_with_workers(engine, 2, limit=chance.choice((7, 500)))
    require_sums(engine)

    ledger.execute(engine, "UPDATE orders SET payment_link = NULL, created = NULL, currency = 'eur'")
    ledger.execute(engine, "TRUNCATE refunds")
    require_sums(engine)
    with rebuilt(engine) as made:
        swap.swap(made)
    require_sums(engine)
    assert differences(engine) == []


def test_wrong_sums_are_reported_and_corrected(engine: Engine, database_url: str) -> None:
    """A rebuild names every sum that is not that of the rows, by how much, and a swap corrects it."""
    order = (
        "INSERT INTO orders (account, livemode, id, status, currency, amount_total, payment_link, created, as_of,"
        " event_id) VALUES ('', true, 'cs_1', 'paid', 'usd', 500, 'plink_1', '2026-11-01 10:30Z',"
        " '2026-11-01 10:30Z', 'evt_1')"
    )
    ledger.execute(engine, order)
    merge(engine)
    ledger.execute(engine, "UPDATE hourly_sums SET amount = amount + 7, counted = counted + 1")
    ledger.execute(engine, "DELETE FROM link_sums")
    ledger.execute(
        engine,
        "INSERT INTO link_deltas (account, livemode, payment_link, opened, completed, paid, expired, amount_paid,"
        " without_amount) VALUES ('', true, 'plink_2', 1, 0, 0, 0, 0, 0)",
    )

    found = [
        (each.table, each.kind, each.id, each.column, each.held, each.expected, each.amount)
        for each in differences(engine)
        if each.table != "orders"
    ]
    ran = payfold("rebuild", "--format", "json", DATABASE_URL=database_url)
    hour = "order 2026-11-01T10:00:00+00:00 paid usd"
    assert sorted(found, key=repr) == [
        ("hourly_sums", "different", hour, "amount", 507, 500, 7),
        ("hourly_sums", "different", hour, "counted", 2, 1, None),
        ("link_sums", "extra", "plink_2 null", "opened", 1, None, None),
        ("link_sums", "missing", "plink_1 usd", "amount_paid", None, 500, -500),
        ("link_sums", "missing", "plink_1 usd", "opened", None, 1, None),
        ("link_sums", "missing", "plink_1 usd", "paid", None, 1, None),
    ]
    assert ran.code == 3
    tallies = {row["table"]: (row["live"], row["rebuilt"], row["different"]) for row in ran.json["tables"]}
    assert (tallies["hourly_sums"], tallies["link_sums"]) == ((1, 1, 1), (1, 1, 0))

    with rebuilt(engine) as made:
        swap.swap(made)

    require_sums(engine)
    # No event says that there is such an order.
    assert (hourly_sums(engine), link_sums(engine), differences(engine)) == ({}, {}, [])


def test_a_database_with_a_history(engine: Engine, database_url: str) -> None:
    """A release that brings the sums sums the rows that there are, and the release before it may go on writing rows."""
    ledger.downgrade(engine, "0015")
    ledger.take_in(engine, *histories.bodies_of(5), account="acct_1")
    assert migrate.upgrade(database_url)[0] == "0016"

    require_sums(engine)
    assert hourly_sums(engine)
    ledger.take_in(engine, *histories.bodies_of(6))
    require_sums(engine)


def test_a_sum_of_any_size(engine: Engine) -> None:
    """Amounts that add up to more than a bigint holds stop no row from being written."""
    greatest = 2**63 - 1
    for number in range(3):
        ledger.execute(
            engine,
            "INSERT INTO orders (account, livemode, id, status, currency, amount_total, payment_link, created, as_of,"
            " event_id) VALUES ('', true, :id, 'paid', 'usd', :amount, 'plink_1', '2026-11-01 10:30Z',"
            " '2026-11-01 10:30Z', 'evt_1')",
            id=f"cs_{number}",
            amount=greatest,
        )
    ledger.execute(engine, "UPDATE orders SET amount_total = -amount_total - 1 WHERE id = 'cs_2'")
    require_sums(engine)
    merge(engine)
    require_sums(engine)
    ledger.execute(engine, "DELETE FROM orders")
    require_sums(engine)


def test_who_adds_deltas_waits_for_no_one(engine: Engine) -> None:
    """While one transaction adds deltas to the sums, others write rows of the same hour and commit."""
    insert = (
        "INSERT INTO refunds (account, livemode, id, status, currency, amount, created, as_of, event_id)"
        " SELECT '', true, 're_' || n, 'succeeded', 'usd', 5, '2026-11-01 10:30Z', '2026-11-01 10:30Z', 'evt_1'"
        " FROM generate_series({}, {}) AS n"
    )
    ledger.execute(engine, insert.format(1, 10))
    with database.transaction(engine) as first, database.cursor(first) as cursor:
        cursor.execute(insert.format(11, 20).encode())
        # Held by the transaction that adds the deltas, so that no trigger of another one does.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || ' sums', 0)), merge_sums()")
        for number in range(100, 200):
            ledger.execute(engine, f"SET LOCAL lock_timeout = '5s'; {insert.format(number, number)}")
        ledger.execute(engine, "DELETE FROM refunds WHERE id = 're_100'")
    require_sums(engine)
    merge(engine)
    require_sums(engine)
    assert ledger.rows(engine, "SELECT counted, amount FROM hourly_sums") == [{"counted": 119, "amount": 595}]
    assert ledger.rows(engine, "SELECT FROM hourly_deltas") == []


class OwnedByAnother(Postgres):
    """A server where our role may act as ``clerk``, which owns nothing."""

    def _roles(self) -> str:
        return f"{super()._roles()}CREATE ROLE clerk\nGRANT clerk TO payfold\n"


def test_a_role_that_owns_no_table(tmp_path: Path, postgres_bin: Path | None) -> None:
    """A role with rights on the older tables alone goes on folding after the migration, and misuses no function."""
    with ExitStack() as stack:
        server = stack.enter_context(OwnedByAnother(tmp_path, durable=False, postgres_bin=postgres_bin))
        migrate.upgrade(server.url)
        owner, clerk = database.engine(server.url), database.engine(f"{server.url}?options=-crole%3Dclerk")
        stack.callback(owner.dispose)
        stack.callback(clerk.dispose)
        ledger.downgrade(owner, "0016")
        for right in ("SELECT, INSERT, UPDATE, DELETE ON ALL TABLES", "USAGE ON ALL SEQUENCES"):
            ledger.execute(owner, f"GRANT {right} IN SCHEMA public TO clerk")
        ledger.execute(owner, "GRANT CREATE ON SCHEMA public TO clerk")
        ledger.take_in(clerk, *histories.bodies_of(5))
        migrate.upgrade(server.url)

        ledger.take_in(clerk, *histories.bodies_of(6))
        # What a search path, or a better fit of arguments, would find before our tables and PostgreSQL's functions.
        for statement in (
            "CREATE FUNCTION hashtextextended(text, integer) RETURNS bigint LANGUAGE sql RETURN 1 / 0",
            "CREATE TEMPORARY TABLE hourly_deltas (n integer)",
            "DO $$ BEGIN FOR n IN 1..400 LOOP UPDATE orders SET amount_total = amount_total + 1; END LOOP; END $$",
        ):
            ledger.execute(clerk, statement)
        ledger.execute(clerk, "UPDATE orders SET payment_link = 'plink_7'")

        require_sums(owner)
        assert hourly_sums(owner)
        for statement in (
            "SELECT merge_sums()",
            "CREATE TABLE hoard (); CREATE TRIGGER t AFTER TRUNCATE ON hoard EXECUTE FUNCTION sum_orders()",
        ):
            with pytest.raises(ProgrammingError, match="permission denied for function"):
                ledger.execute(clerk, statement)


def test_published_tables(engine: Engine) -> None:
    """Where a publication has every table, rows are folded, summed, renamed and rebuilt as without it."""
    names = ", ".join(tables.metadata.tables)
    ledger.execute(engine, f"CREATE PUBLICATION published FOR TABLE {names}")

    for seed in (5, 6):
        ledger.take_in(engine, *histories.bodies_of(seed))
        merge(engine)
    renaming.rename(engine, "", "acct_1", now=NOW)
    ledger.fold(engine)
    merge(engine)
    ledger.execute(engine, "DELETE FROM orders; DELETE FROM refunds")
    merge(engine)
    with rebuilt(engine) as made:
        swap.swap(made)
    merge(engine)
    ledger.execute(engine, "TRUNCATE orders, refunds, disputes")

    require_sums(engine)
    for table in tables.metadata.tables:
        ledger.execute(engine, f"DELETE FROM {table}")  # noqa: S608 - our own names
