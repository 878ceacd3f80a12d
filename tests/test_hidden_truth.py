"""The tables hold what a small simulated Stripe account did.

The account (tests/hidden) is written from Stripe's documentation, and its truth is what it did, never what its events
add up to. Many accounts live in one database at once; their events arrive in any order, some of them twice, and several
workers fold them. Every row and every change that an account knows is compared; a row that is wrong with no anomaly
in force is wrong in silence.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from sqlalchemy import Engine

from schemas import database
from tests import ledger
from tests.conftest import SEED_OPTION
from tests.hidden import judge, shop
from tests.hidden.account import Account
from tests.hidden.judge import Report

SHORT = 60


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Return an engine for several workers on an empty database."""
    made = database.engine(database_url, connections_max=9)
    yield made
    made.dispose()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return the seed of this run, which a failure prints."""
    chosen = random.Random(str(request.config.getoption(SEED_OPTION))).randrange(10**9)
    print(f"the account's seed is {chosen}")  # noqa: T201 - repeats a failure
    return chosen


def assert_true(report: Report) -> None:
    """Assert that no row is silently wrong, lost, doubled or untrue, and that rebuild and rules find no fault."""
    print(report)  # noqa: T201 - the figures
    faults = (report.wrong, report.lost, report.doubled, report.untrue)
    assert [dict(counter) for counter in faults] == [{}, {}, {}, {}]
    assert (report.drift, report.broken, report.unfolded) == (0, 0, 0)


@pytest.mark.parametrize("twins", [0.0, 0.04])
def test_tables_are_true(engine: Engine, seed: int, twins: float) -> None:
    """A few histories, with and without two events of one change."""
    report = judge.run(engine, seed, SHORT, twins=twins)

    assert_true(report)
    assert report.flagged_plain == 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("histories", "twins", "flagged_max"), [pytest.param(3000, 0.0, 0.0005), pytest.param(1000, 0.04, 0.01)]
)
def test_tables_are_true_for_long(engine: Engine, seed: int, histories: int, twins: float, flagged_max: float) -> None:
    """Many histories: hardly a row is in doubt, and each row in doubt has a reason."""
    report = judge.run(engine, seed, histories, twins=twins)

    assert_true(report)
    assert report.flagged_plain == 0
    assert report.flagged_share <= flagged_max


# ---- The comparison can fail ----


class Edit(NamedTuple):
    """The edit of one row of a *table*, and the faults that must then be counted: counter, name, number."""

    table: str
    statement: str
    counter: str
    name: str
    number: int = 1
    where: str = ""


FIRST = "ctid = (SELECT min(ctid) FROM {})"
COLUMNS = "account, livemode, subject, subject_id, kind, event_id, source, at, before, after"
PAID = "ctid = (SELECT min(ctid) FROM changes WHERE kind = 'order.paid')"
LAST = "NOT EXISTS (SELECT FROM changes AS d WHERE d.seq > c.seq AND d.subject_id = c.subject_id)"
ON = f"seq = (SELECT max(seq) FROM changes AS c WHERE kind = 'payment_link.activated' AND {LAST})"  # noqa: S608 - our own
COPY = "INSERT INTO changes ({0}) SELECT {0} FROM changes".format(COLUMNS)  # noqa: S608, UP032 - our own names
EDITS = (
    Edit("charges", "UPDATE charges SET amount = amount + 1", "wrong", "charges"),
    Edit("orders", "UPDATE orders SET created = created + interval '1 s'", "wrong", "orders"),
    Edit("refunds", "DELETE FROM refunds", "wrong", "refunds"),
    Edit("customers", "UPDATE customers SET account = 'acct_2'", "wrong", "customers", 2),
    Edit("balance_changes", "UPDATE balance_changes SET amount = amount - 1", "wrong", "balance_changes", 2),
    Edit("changes", "DELETE FROM changes", "lost", "order.paid", where=PAID),
    Edit("changes", "UPDATE changes SET withheld = 'import'", "lost", "order.paid", where=PAID),
    Edit("changes", "UPDATE changes SET subject_id = 'cs_no'", "untrue", "order.paid", where=PAID),
    Edit("changes", COPY, "doubled", "order.paid", where=PAID),
    Edit("changes", COPY, "doubled", "payment_link", where=ON),
)


def test_the_comparison_notices(engine: Engine, seed: int) -> None:
    """A wrong cent, a row that is gone or in another world, a change lost, doubled or invented: each is counted."""
    accounts = [shop.live(f"{seed}.{number}", number, twins=0.0) for number in range(SHORT)]
    judge.take_in(engine, accounts, random.Random(seed))
    ledger.execute(engine, "DROP INDEX changes_one_shot")
    before = judged(engine, accounts)
    for edit in EDITS:
        with edited(engine, edit):
            after = judged(engine, accounts)
        counted = getattr(after, edit.counter)[edit.name] - getattr(before, edit.counter)[edit.name]
        assert (edit, counted) == (edit, edit.number)
    assert str(judged(engine, accounts)) == str(before)


def judged(engine: Engine, accounts: Sequence[Account]) -> Report:
    """Return the report on the tables as they are now."""
    report = Report()
    judge.judge(engine, accounts, report)
    return report


@contextmanager
def edited(engine: Engine, edit: Edit) -> Iterator[None]:
    """Edit the first row of a table, or the row that the edit names, and restore the table afterwards."""
    ledger.execute(engine, f"CREATE TABLE kept AS TABLE {edit.table}")
    ledger.execute(engine, f"{edit.statement} WHERE {edit.where or FIRST.format(edit.table)}")
    yield
    ledger.execute(engine, f"TRUNCATE {edit.table}")
    ledger.execute(engine, f"INSERT INTO {edit.table} OVERRIDING SYSTEM VALUE TABLE kept")
    ledger.execute(engine, "DROP TABLE kept")
