"""What the rules of money cost: PostgreSQL reads a few rows for each row there is, however many there are."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest
from sqlalchemy import Engine, text

from deploy.sandbox.history import shop_history
from schemas import database, tables
from tests import ledger
from tests.test_rules import lines_of
from worker.proof import money_rules

pytestmark = pytest.mark.integration

ORDERS: Final = 60
COPIES: Final = (16, 64)
GROWTH_MAX: Final = 2 * COPIES[1] / COPIES[0]
"""Rows read by a join of each with each would grow by the square of the copies, 16 times."""

Plan = Mapping[str, Any]


@pytest.fixture
def shop(engine: Engine) -> Engine:
    """Return an engine on the tables of a small shop whose lines and ledgers are known."""
    account = shop_history(17, ORDERS, money=True)
    ledger.record(engine, [ledger.delivery(each.body) for each in account.events])
    ledger.record(engine, lines_of(account))
    ledger.fold(engine)
    return engine


def copy(engine: Engine, first: int, last: int) -> None:
    """Copy all rows of the shop into accounts of the numbers *first* to *last*, and count them for the planner."""
    for table in (tables.inbox, *tables.PROJECTIONS):
        names = [column.name for column in table.columns if column.name not in ("account", "seq")]
        columns = ", ".join(f'"{name}"' for name in names)
        ledger.execute(
            engine,
            f"INSERT INTO {table.name} (account, {columns})"  # noqa: S608 - names of our own
            f" SELECT 'acct_' || copies.place, {columns}"
            f" FROM {table.name} CROSS JOIN generate_series({first}, {last}) AS copies (place) WHERE account = ''",
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))


def plans(engine: Engine) -> dict[str, Plan]:
    """Return the plan of each rule with the rows that it read."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        # Small tables cost less to read whole; so they are as large tables in memory are.
        cursor.execute("SET LOCAL random_page_cost = 1")
        found = {}
        for rule in money_rules.RULES:
            cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {rule.query}".encode())
            found[rule.name] = (cursor.fetchone() or [[]])[0][0]["Plan"]
        return found


def nodes(plan: Plan) -> Iterator[Plan]:
    """Yield every step of a plan."""
    yield plan
    for each in plan.get("Plans", ()):
        yield from nodes(each)


def rows_read(plan: Plan) -> float:
    """Return the number of rows of tables that a plan looked at, and of pairs of rows that a join refused."""
    found = 0.0
    for node in nodes(plan):
        seen = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) if "Relation Name" in node else 0
        found += node["Actual Loops"] * (seen + node.get("Rows Removed by Join Filter", 0))
    return found


def rows_there(engine: Engine, plan: Plan) -> int:
    """Return the number of rows of the tables that a plan names."""
    names = {node["Relation Name"] for node in nodes(plan) if "Relation Name" in node}
    return sum(ledger.rows(engine, f"SELECT count(*) FROM {name}")[0]["count"] for name in names)  # noqa: S608 - as above


def test_rows_read_grow_with_the_tables(shop: Engine) -> None:
    """With four times the rows no rule reads sixteen times as many, and none reads a table again for each row."""
    copy(shop, 1, COPIES[0] - 1)
    # Of few rows an index may leave out most, and of more a whole table is read, once: that is no worse growth.
    few = {name: max(rows_read(plan), rows_there(shop, plan)) for name, plan in plans(shop).items()}
    copy(shop, COPIES[0], COPIES[1] - 1)
    many = plans(shop)

    assert all(rows_read(plan) > 0 for plan in many.values())
    grown = {name: rows_read(plan) / few[name] for name, plan in many.items()}
    assert {name: round(times, 1) for name, times in grown.items() if times > GROWTH_MAX} == {}
    looped = {
        (name, node["Relation Name"])
        for name, plan in many.items()
        for node in nodes(plan)
        if node["Node Type"] == "Seq Scan" and node["Actual Loops"] > 10
    }
    assert looped == set()


def test_a_join_of_each_with_each_is_noticed(shop: Engine) -> None:
    """The measure is no empty one: by it a join of each order with each charge reads sixteen times as many rows."""
    read = []
    for first, last in ((1, COPIES[0] - 1), (COPIES[0], COPIES[1] - 1)):
        copy(shop, first, last)
        with database.transaction(shop) as connection, database.cursor(connection) as cursor:
            # By an index of amounts PostgreSQL would not look at the rows that do not match.
            cursor.execute("SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off")
            cursor.execute("SET LOCAL enable_bitmapscan = off")
            cursor.execute(
                "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON)"
                " SELECT count(*) FROM orders AS o JOIN charges AS c ON o.amount_total < c.amount"
            )
            read.append(rows_read((cursor.fetchone() or [[]])[0][0]["Plan"]))

    assert read[1] / read[0] > GROWTH_MAX
