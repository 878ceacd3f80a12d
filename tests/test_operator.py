"""An operator can retry or ignore an event, and both hold when the inbox is replayed."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, text

from deploy.sandbox.account import Account
from schemas import database
from schemas.errors import ConflictError, NotFoundError
from tests import ledger
from tests.command import payfold
from worker.logs import retry
from worker.proof.digest import digests
from worker.proof.rebuild import refolded

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def run(engine: Engine, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement and return its rows."""
    with database.transaction(engine) as connection:
        done = connection.execute(text(statement))
        return [tuple(row) for row in done] if done.returns_rows else []


def parked_for_a_cause(engine: Engine) -> str:
    """Park a good event by a constraint that refuses its row, and return its id."""
    run(engine, "ALTER TABLE orders ADD CONSTRAINT cheap CHECK (amount_total < 100)")
    account = Account(seed=1)
    account.complete(account.open_session(amount=5_000))
    ledger.record(engine, [ledger.delivery(account.events[-1].body)])
    ledger.fold(engine)
    return account.events[-1].id


def parked_for_good(engine: Engine) -> str:
    """Park an event that no fold can read, among good ones, and return its id."""
    account = Account(seed=2)
    link = account.create_payment_link()
    odd = account.emit("payment_link.updated", account.payment_link(link) | {"active": "maybe"})
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])
    ledger.fold(engine)
    return odd.id


def state_of(engine: Engine, event: str) -> tuple[Any, ...]:
    """Return the state and the reason of an event."""
    return run(engine, f"SELECT state, reason FROM events WHERE id = '{event}'")[0]  # noqa: S608 - our own id


def test_retry_while_the_cause_lasts(engine: Engine, database_url: str) -> None:
    """An event tried again too early is parked again, and the command prints the reason and exits 1."""
    event = parked_for_a_cause(engine)

    ran = payfold("events", "retry", event, DATABASE_URL=database_url)

    assert (ran.code, ran.out) == (1, "")
    assert f"{event} is parked: PostgreSQL refused its row: CheckViolation" in ran.err
    assert run(engine, "SELECT attempts FROM events") == [(2,)]


def test_retry_after_the_cause(engine: Engine, database_url: str) -> None:
    """An event tried again after its cause is gone is folded into its row."""
    event = parked_for_a_cause(engine)
    run(engine, "ALTER TABLE orders DROP CONSTRAINT cheap")

    ran = payfold("events", "retry", event, DATABASE_URL=database_url)

    assert (ran.code, ran.out, ran.err) == (0, "", f"{event} is folded.\n")
    assert run(engine, "SELECT status, amount_total FROM orders") == [("paid", 5_000)]


def test_retry_a_folded_event(engine: Engine) -> None:
    """Trying a folded event again changes nothing."""
    account = Account(seed=1)
    account.create_payment_link()
    ledger.record(engine, [ledger.delivery(account.events[0].body)])
    ledger.fold(engine)
    before = digests(engine), run(engine, "SELECT * FROM changes")

    assert retry.retry(engine, account.events[0].id, now=NOW).state == "folded"
    assert (digests(engine), run(engine, "SELECT * FROM changes")) == before


def test_ignore(engine: Engine, database_url: str) -> None:
    """A parked event is ignored with the operator's reason, recorded as an observation."""
    event = parked_for_good(engine)

    ran = payfold("events", "ignore", event, "--reason", "a [bold] test", DATABASE_URL=database_url)

    assert (ran.code, ran.out) == (0, "")
    assert ran.err == f"{event} is ignored: set aside by an operator: a [bold] test\n"
    assert state_of(engine, event) == ("ignored", "set aside by an operator: a [bold] test")
    assert run(engine, "SELECT type, object_id, state FROM events WHERE source = 'observation'") == [
        ("payfold.event.ignored", event, "folded")
    ]


def test_ignored_in_a_rebuild(engine: Engine) -> None:
    """An ignored event is ignored in a rebuild too, in any order of events, and no event is left pending."""
    event = parked_for_good(engine)
    retry.ignore(engine, event, reason="a test", now=NOW)
    live = digests(engine)

    for seed in range(6):
        with refolded(engine, seed=seed) as made:
            assert digests(engine, schema=made.schema) == live
            states = run(engine, f"SELECT state, count(*) FROM {made.schema}.outcomes GROUP BY 1 ORDER BY 1")  # noqa: S608
            assert states == [("folded", 2), ("ignored", 1)]
            assert run(engine, f"SELECT * FROM {made.schema}.pending") == []  # noqa: S608 - the name is ours


def test_ignore_an_event_that_is_not_parked(engine: Engine, database_url: str) -> None:
    """Neither a folded nor an ignored event can be ignored; nothing is recorded."""
    account = Account(seed=1)
    account.create_payment_link()
    ledger.record(engine, [ledger.delivery(account.events[0].body)])
    ledger.fold(engine)
    ignored = parked_for_good(engine)
    retry.ignore(engine, ignored, reason="", now=NOW)
    with pytest.raises(ConflictError, match="is folded"):
        retry.ignore(engine, account.events[0].id, reason="", now=NOW)
    # Nor can one that waits to be folded again.
    ledger.execute(engine, "INSERT INTO pending (seq, again) SELECT seq, true FROM outcomes WHERE state = 'folded'")
    before = run(engine, "SELECT * FROM events")

    ran = payfold("events", "ignore", account.events[0].id, DATABASE_URL=database_url)
    with pytest.raises(ConflictError, match="is ignored"):
        retry.ignore(engine, ignored, reason="", now=NOW)

    assert (ran.code, ran.out) == (1, "")
    assert "Only a parked or pending event can be set aside, and" in ran.err
    assert run(engine, "SELECT * FROM events") == before


@pytest.mark.parametrize("command", ["retry", "ignore", "show"])
def test_no_such_event(database_url: str, command: str) -> None:
    """An unknown id is an error with exit 1."""
    ran = payfold("events", command, "evt_none", DATABASE_URL=database_url)

    assert (ran.code, ran.out) == (1, "")
    assert "evt_none" in ran.err
    assert len(ran.err.splitlines()) == 1


def test_one_of_several(engine: Engine) -> None:
    """An id that two accounts or modes have is refused until the operator names one."""
    body = msgspec.json.decode(Account(seed=1).emit("topup.created", {"object": "topup", "id": "tu_1"}).body)
    for mode in (False, True):
        for label in ("", "acct_1"):
            rendered = msgspec.json.encode(body | {"livemode": mode})
            ledger.record(engine, [ledger.delivery(rendered, account=label)])
    ledger.fold(engine)

    for account, livemode in ((None, None), ("", None), (None, True)):
        with pytest.raises(ConflictError, match="say which"):
            retry.retry(engine, body["id"], now=NOW, account=account, livemode=livemode)
    with pytest.raises(NotFoundError):
        retry.retry(engine, body["id"], now=NOW, account="acct_2", livemode=True)
    assert run(engine, "SELECT sum(attempts) FROM events") == [(4,)]

    found = retry.retry(engine, body["id"], now=NOW, account="acct_1", livemode=True)

    assert (found.account, found.livemode, found.state) == ("acct_1", True, "ignored")
    assert run(engine, "SELECT account, livemode FROM events WHERE attempts = 2") == [("acct_1", True)]
