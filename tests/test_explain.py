"""An explanation gives the stored row, and for each column the event that set it."""

import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from deploy.sandbox.rendering import twin
from tests import histories, ledger
from tests.command import payfold
from worker import folds
from worker.folds.facts import Subject
from worker.proof import explain
from worker.proof.explain import Explanation

TABLES = ("orders", "credit_notes", "payment_links", "customers", "balances")
SEEDS = 60


def test_it_loads_nothing_that_writes() -> None:
    """The web process may load it: with it come the rooms that read, and neither Celery nor the writer."""
    loaded = "import sys, worker.proof.explain; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, timeout=60)
    names = set(ran.stdout.split())

    assert {name for name in names if name.startswith("worker.folding.")} == {
        "worker.folding.rows",
        "worker.folding.settling",
    }
    assert not names & {"celery", "redis", "schemas.inbox", "schemas.locks", "worker.logs", "worker.stripe_jobs"}


def subjects(engine: Engine) -> list[tuple[Subject, dict[str, Any]]]:
    """Return every explainable row, with its subject."""
    found = []
    for table in TABLES:
        for row in ledger.rows(engine, f"SELECT * FROM {table}"):  # noqa: S608 - our own names
            is_balance = table == "balances"
            id_, currency = (row["customer"], row["currency"]) if is_balance else (row["id"], "")
            found.append((Subject(table, row["account"], row["livemode"], id_, currency=currency), row))
    return found


def assert_it_is_true(explained: Explanation) -> None:
    """Check that each column has the value of the event that is named for it, and that each event has a verdict."""
    assert explained.row is not None
    events = {each["event_id"]: each for each in explained.timeline}
    assert len(events) == len(explained.timeline)
    assert all(each["verdict"] for each in explained.timeline)
    empty = folds.ROW_SPECS[explained.table].empty
    for column in explained.columns:
        name, by = column["column"], column["event_id"]
        assert column["value"] == explained.row[name]
        assert (by is not None) == (column["how"] == "reported")
        if by is not None:
            assert name in events[by]["sets"]
        elif column["how"] == "no event reports it":
            assert explained.row[name] == empty[name]
    decided = [each for each in explained.timeline if each["verdict"].startswith("it decides")]
    assert [each["event_id"] for each in decided] == [explained.row["event_id"]]


def test_every_row_is_explained(engine: Engine, request: pytest.FixtureRequest) -> None:
    """For tangled histories, in any order, each explanation gives the stored row."""
    first = random.Random(request.node.nodeid).randrange(10**6)
    print(f"seeds from {first}")  # noqa: T201 - repeats a failure
    for seed in range(first, first + SEEDS):
        bodies = histories.bodies_of(seed)
        random.Random(seed).shuffle(bodies)
        ledger.record(engine, [ledger.delivery(body, account=f"acct_{seed}") for body in bodies])
    ledger.fold(engine)
    known = subjects(engine)
    assert len(known) > SEEDS

    for subject, row in known:
        explained = explain.explain(engine, subject)
        assert explained.row == row
        assert_it_is_true(explained)


def test_a_column_names_the_event_that_carries_it(engine: Engine) -> None:
    """Each column of an order is explained by the event that carries its value."""
    account = Account(seed=3, payments=True)
    session = account.open_session(amount=4_000, client_reference_id="cart-7")
    account.advance(60)
    account.complete(session, payment_status="unpaid")
    account.advance(3_600)
    account.async_payment_succeeded(session)
    ledger.take_in(engine, *(event.body for event in reversed(account.events)))
    completed, paid = (
        next(event for event in account.events if event.type == f"checkout.session.{kind}")
        for kind in ("completed", "async_payment_succeeded")
    )

    explained = explain.explain(engine, Subject("orders", "", False, session))  # noqa: FBT003 - the mode
    by_column = {each["column"]: each for each in explained.columns}

    assert by_column["amount_total"]["event_id"] == paid.id
    assert by_column["completed_at"]["event_id"] == completed.id
    assert by_column["paid_at"]["event_id"] == paid.id
    assert by_column["status"]["how"] == "inferred from the other columns"
    assert by_column["expired_at"]["how"] == "no event reports it"
    assert [(each["event_id"], each["verdict"]) for each in explained.timeline] == [
        (completed.id, "it still stands, in part"),
        (paid.id, "it decides"),
    ]


def test_why_an_event_lost(engine: Engine) -> None:
    """A twin, an older state and a pending event each have a verdict with the reason."""
    account = Account(seed=4)
    link = account.create_payment_link()
    account.advance(5)
    account.update_payment_link(link, active=False)
    account.advance(5)
    account.update_payment_link(link, active=True)
    again = twin(account.events[1], seed=1)
    ledger.take_in(engine, *(event.body for event in (*account.events, again)))
    account.advance(5)
    account.update_payment_link(link, metadata={"late": "1"})
    ledger.record(engine, [ledger.delivery(account.events[-1].body)])

    explained = explain.explain(engine, Subject("payment_links", "", False, link))  # noqa: FBT003 - the mode
    verdicts = {each["event_id"]: each["verdict"] for each in explained.timeline}

    assert verdicts[account.events[2].id] == "it decides"
    assert verdicts[account.events[3].id] == "pending"
    twins = {account.events[1].id, again.id}
    assert any("a duplicate: " in verdicts[each] for each in twins)
    assert any("overtaken by" in verdicts[each] for each in twins)


def test_a_tie(engine: Engine) -> None:
    """Of two events of one second the verdict of the earlier one names the later one."""
    account = Account(seed=4)
    link = account.create_payment_link()
    account.advance(5)
    account.update_payment_link(link, active=False)
    account.update_payment_link(link, active=True)
    off, on = account.events[-2:]
    ledger.take_in(engine, *(event.body for event in reversed(account.events)))

    explained = explain.explain(engine, Subject("payment_links", "", False, link))  # noqa: FBT003 - the mode
    verdicts = {each["event_id"]: each["verdict"] for each in explained.timeline}

    assert off.created == on.created
    assert (verdicts[off.id], verdicts[on.id]) == (
        f"a tie in one second, in which {on.id} comes after it",
        "it decides",
    )


def test_as_of(engine: Engine, request: pytest.FixtureRequest) -> None:
    """An explanation as of a time gives the row of that time, in any order of arrival."""
    first = random.Random(request.node.nodeid).randrange(10**6)
    print(f"seeds from {first}")  # noqa: T201 - repeats a failure
    for seed in range(first, first + 8):
        label, at = f"acct_{seed}", ledger.NOW
        bodies = histories.bodies_of(seed)
        random.Random(seed).shuffle(bodies)
        known: list[tuple[datetime, list[tuple[Subject, dict[str, Any]]]]] = []
        for body in bodies:
            at += timedelta(minutes=1)
            ledger.record(engine, [replace(ledger.delivery(body, account=label), received_at=at)])
            ledger.fold(engine)
            known.append((at, [each for each in subjects(engine) if each[0].account == label]))
        for then, rows in known:
            for subject, row in rows:
                explained = explain.explain(engine, subject, as_of=then)
                assert explained.row == row
                assert all(each["received_at"] <= then for each in explained.timeline)


def test_the_commands(engine: Engine, database_url: str) -> None:
    """Each object has an explain command, as a table and as JSON; a missing object is reported with exit 1."""
    account = Account(seed=9, payments=True)
    customer = account.create_customer()
    account.adjust_balance(customer, -500, currency="usd")
    link = account.create_payment_link()
    session = account.open_session(payment_link=link, customer=customer)
    account.complete(session)
    intents = account.order_intents(session)
    assert intents
    account.refund(intents[0], 500)
    ledger.take_in(engine, *(event.body for event in account.events))

    explained = payfold("orders", "explain", session, "--format", "json", DATABASE_URL=database_url)
    table = payfold("orders", "explain", session, DATABASE_URL=database_url)
    before = (ledger.NOW - timedelta(seconds=1)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")

    assert (explained.code, explained.json["table"], explained.json["row"]["status"]) == (0, "orders", "paid")
    assert explained.json["dashboard"].startswith("https://dashboard.stripe.com/test/payments/pi_")
    assert table.code == 0
    assert "Timeline" in table.out
    assert "it decides" in table.out
    assert "20.00 USD" in table.out
    refund = next(line for line in table.out.splitlines() if line.startswith("refund"))
    assert ("5.00 USD" in refund, "it counts" in refund) == (True, True)
    for group, id_ in (("payment-links", link), ("customers", customer)):
        ran = payfold(group, "explain", id_, "--format", "json", DATABASE_URL=database_url)
        assert (ran.code, ran.json["id"]) == (0, id_)
    balance = payfold(
        "customers", "explain", customer, "--currency", "usd", "--format", "json", DATABASE_URL=database_url
    )
    assert (balance.json["table"], balance.json["row"]["amount"]) == ("balances", -500)
    for wrong, words in (
        (("orders", "explain", "cs_test_none"), "There is no cs_test_none here."),
        (("orders", "explain", session, "--as-of", before), "none had been received by"),
    ):
        ran = payfold(*wrong, DATABASE_URL=database_url)
        assert "Traceback" not in ran.err
        assert words in ran.err + ran.out
