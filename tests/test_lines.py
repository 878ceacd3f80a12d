"""An order's lines are complete if they were listed with the order's current totals."""

import random
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from schemas import database
from schemas.own_events import SESSION_REGISTERED
from tests import histories, ledger, reference
from tests.stage import HOUR, stage
from tests.test_at_stripe import fetch
from tests.test_join import SECOND, arrive, split
from tests.test_orders import item, listed, seen
from worker import folds
from worker.folds import join
from worker.folds.facts import Facts, Row, Subject
from worker.proof import money_rules

ONE = listed([item(1, amount_subtotal=1_500, amount_total=1_500)])
THREE = listed([item(1, quantity=3, amount_subtotal=4_500, amount_total=4_500)])
OTHER_TOTALS: Sequence[Mapping[str, Any]] = (
    {"amount_subtotal": 4_500, "amount_total": 4_500},
    {"amount_total": 1_200, "total_details": {"amount_discount": 300, "amount_shipping": 0, "amount_tax": 0}},
    {"currency": "eur"},
)
"""A quantity that the buyer raised, a promotion code, and another currency."""
SHIPPED: Mapping[str, Any] = {
    "amount_subtotal": 4_500,
    "amount_total": 5_100,
    "total_details": {"amount_discount": 0, "amount_shipping": 500, "amount_tax": 100},
}


@pytest.fixture
def account() -> Account:
    """Return an empty shop account."""
    return Account(seed=37)


def bought(account: Account, session: str, **fields: Any) -> bytes:  # noqa: ANN401 - JSON values
    """Let the buyer complete *session* after changing *fields*, and return the event."""
    account.peek("checkout.session", session).update(fields)
    account.complete(session)
    return account.events[-1].body


def shown(engine: Engine) -> tuple[Any, ...]:
    """Return whether the one order's lines are complete, its quantities, and the anomalies in force."""
    ((complete,),) = (tuple(row.values()) for row in ledger.rows(engine, "SELECT lines_complete FROM orders"))
    quantities = [row["quantity"] for row in ledger.rows(engine, "SELECT quantity FROM order_lines ORDER BY id")]
    return complete, quantities, ledger.anomalies(engine)


def state_of_rule(engine: Engine) -> str:
    """Return the verdict of the rule about lines for the one order."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        (tally,) = (tally for tally in money_rules.check(cursor)[0] if tally.rule == "order-lines")
    return next(state for state in ("holds", "broken", "not_provable") if getattr(tally, state))


@pytest.mark.parametrize("totals", OTHER_TOTALS)
def test_other_totals_than_the_lines_were_listed_with(
    engine: Engine, account: Account, totals: Mapping[str, Any]
) -> None:
    """After other totals the lines are incomplete and cannot be checked, in any arrival."""
    session = account.open_session(amount=1_500)
    registered = seen(account, session, SESSION_REGISTERED, line_items=ONE)
    account.advance(60)
    completed = bought(account, session, **totals)
    expected = ledger.digest_of_reference(engine, reference.tables_of([registered, completed]))

    for batches in ledger.splits([registered, completed]):
        ledger.take_in_batches(engine, batches)
        assert shown(engine) == (False, [1], [])
        assert ledger.digest_of(engine) == expected
        assert state_of_rule(engine) == "not_provable"
        (paid,) = ledger.rows(engine, "SELECT after FROM changes WHERE kind = 'order.paid'")
        assert paid["after"]["lines"] is None


def test_lines_that_are_listed_again_are_complete(engine: Engine, account: Account) -> None:
    """Lines that are listed again with new totals are complete; an event that repeats the totals changes nothing."""
    session = account.open_session(amount=1_500)
    registered = seen(account, session, SESSION_REGISTERED, line_items=ONE)
    account.advance(60)
    completed = bought(account, session, **OTHER_TOTALS[0])
    account.advance(60)
    read = seen(account, session, line_items=THREE)

    for batches in ledger.splits([registered, completed, read]):
        ledger.take_in_batches(engine, batches)
        assert shown(engine) == (True, [3], [])
    assert state_of_rule(engine) == "holds"
    account.advance(60)
    ledger.take_in(engine, seen(account, session))
    assert shown(engine) == (True, [3], [])


def test_totals_that_come_back_do_not_bring_the_lines_back(engine: Engine, account: Account) -> None:
    """Totals that change and change back leave the lines incomplete: the purchases in between are unknown."""
    session = account.open_session(amount=1_500)
    bodies = [seen(account, session, SESSION_REGISTERED, line_items=ONE)]
    account.advance(60)
    bodies.append(seen(account, session, **OTHER_TOTALS[0]))
    account.advance(60)
    bodies.append(bought(account, session))

    for batches in ledger.splits(bodies):
        ledger.take_in_batches(engine, batches)
        assert shown(engine) == (False, [1], [])


@pytest.mark.parametrize(
    ("lines", "totals", "anomalies"),
    [
        (ONE, OTHER_TOTALS[0], ["lines_differ"]),
        (ONE, OTHER_TOTALS[1], ["lines_differ"]),
        (ONE, OTHER_TOTALS[2], ["lines_differ"]),
        (THREE, OTHER_TOTALS[0], []),
        # Neither shipping nor its tax belongs to a line; and an unknown amount is no difference.
        (THREE, SHIPPED, []),
        (listed([item(1, amount_subtotal=None, amount_total=None)]), OTHER_TOTALS[0], []),
    ],
)
def test_lines_listed_again_that_still_differ(
    engine: Engine, account: Account, lines: dict[str, Any], totals: Mapping[str, Any], anomalies: list[str]
) -> None:
    """Lines that were listed again and do not add up to the totals are an anomaly, until they are listed once more."""
    session = account.open_session(amount=1_500)
    bodies = [seen(account, session, SESSION_REGISTERED, line_items=ONE)]
    account.advance(60)
    bodies.append(bought(account, session, **totals))
    account.advance(60)
    bodies.append(seen(account, session, line_items=lines))
    account.advance(60)
    right = {**totals, "amount_subtotal": 1_500, "amount_total": 1_500, "currency": "usd"}
    right["total_details"] = {"amount_shipping": 0, "amount_tax": 0, "amount_discount": 0}
    later = seen(account, session, **right)
    mended = seen(account, session, **right, line_items=ONE)

    for batches in ledger.splits(bodies):
        ledger.take_in_batches(engine, batches)
        assert ledger.anomalies(engine) == anomalies
    ledger.take_in(engine, later)
    assert shown(engine)[0] is False
    assert ledger.anomalies(engine) == []
    ledger.take_in(engine, mended)
    assert shown(engine) == (True, [1], [])


def test_equal_totals_need_no_other_event(account: Account) -> None:
    """The usual completion of a registered session advances its row without its history, also with other totals."""
    session = account.open_session(amount=1_500)
    (registered,) = facts_of(seen(account, session, SESSION_REGISTERED, line_items=ONE))
    whole = join.fold_all(folds.ROW_SPECS["orders"], [registered])
    assert whole is not None
    account.advance(60)
    completed = facts_of(bought(account, session))

    advanced = join.advance(folds.ROW_SPECS["orders"], whole.row, completed)
    assert advanced is not None
    assert (advanced.row["lines_complete"], advanced.row["status"]) == (True, "paid")


def facts_of(body: bytes) -> tuple[Facts, ...]:
    """Return the facts of the event in *body*."""
    return folds.judge(histories.event_of(body)).facts


def a_step(number: int, rng: random.Random) -> Facts:
    """Return the facts of an event that may list an order's lines, and carries some of its totals."""
    at = SECOND + timedelta(seconds=number)
    columns: dict[str, Any] = {"payment_status": "unpaid", "session_status": "open"}
    names = rng.sample(("amount_subtotal", "amount_total", "currency"), rng.randint(0, 3))
    columns |= {name: rng.choice(("usd", "eur") if name == "currency" else (500, 1_000, None)) for name in names}
    parts: tuple[Row, ...] | None = None
    if rng.random() < 0.4:
        columns["lines_complete"] = True
        line = {**item(1), "amount_subtotal": rng.choice((500, 1_000, None)), "currency": rng.choice(("usd", "eur"))}
        parts = (line,)
    return Facts(
        subject=Subject("orders", "", False, "cs_1"),  # noqa: FBT003 - test mode
        event_id=f"evt_{number}",
        source="webhook",
        created=at,
        rank=0,
        stamp=(at,),
        columns=columns,
        parts=parts,
    )


class Carried(NamedTuple):
    """The totals that a step carries, and whether it lists all lines."""

    after: Mapping[str, Any]
    is_whole: bool


@given(rng=st.randoms(use_true_random=False))
def test_complete_depends_on_the_set_of_events(rng: random.Random) -> None:
    """Advancing the row and folding all events give the same in any order and any batches (rule 11)."""
    steps = [a_step(number, rng) for number in range(rng.randint(1, 7))]
    arrived = rng.sample(steps, len(steps))

    row = arrive(split(arrived, rng)).row
    whole = join.fold_all(folds.ROW_SPECS["orders"], steps)
    assert whole is not None
    assert row == whole.row
    assert row["lines_complete"] is reference.lines_are_complete(
        [Carried(one.columns, one.parts is not None) for one in steps]
    )


def test_lines_are_read_again_once(database_url: str, redis_url: str) -> None:
    """With a key: after the buyer raises a quantity, the lines are read once more, and add up."""
    with stage(database_url, redis_url) as at:
        (session,) = at.open(ago=HOUR, amount=1_500)
        fetch(at)
        held = at.rows("SELECT sum(amount_subtotal) AS subtotal FROM order_lines")
        assert held == [{"subtotal": 1_500}]
        completed = bought(at.account, session, **OTHER_TOTALS[0])
        ledger.take_in(at.engine, completed)
        assert at.rows("SELECT lines_complete FROM orders") == [{"lines_complete": False}]

        assert fetch(at).counted == {"sessions": 1}
        assert at.rows("SELECT lines_complete FROM orders") == [{"lines_complete": True}]
        held = at.rows("SELECT sum(amount_subtotal) AS subtotal FROM order_lines WHERE order_id = :id", id=session)
        assert held == [{"subtotal": 4_500}]
        assert fetch(at).counted == {}
        assert ledger.anomalies(at.engine) == []
