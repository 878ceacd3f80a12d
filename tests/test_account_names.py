"""An account is recorded under its newest name, whoever records it, and a rename leaves one world."""

from datetime import UTC, datetime
from typing import Final

import msgspec
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from deploy.sandbox.history import tangle
from schemas import tables
from schemas.inbox import Recorded
from tests import ledger
from worker import renaming
from worker.rebuild import rebuilt
from worker.swap import prove

NOW: Final = datetime(2026, 11, 22, 12, tzinfo=UTC)
NAMED: Final = "INSERT INTO account_names (old, new, renamed_at, finished_at) VALUES (:old, :new, now(), now())"


def body(event_id: str, *, api_version: str = "2026-10-28.endive", **more: object) -> bytes:
    """Return an event that nothing is folded from."""
    about = {"object": "coupon", "id": f"of_{event_id}"}
    told = {"id": event_id, "type": "coupon.created", "created": 1_790_000_000, "api_version": api_version}
    return msgspec.json.encode(told | {"data": {"object": about}} | more)


def accounts(engine: Engine) -> list[tuple[str, str, str]]:
    """Return account, id and version of all that is recorded."""
    found = ledger.rows(engine, "SELECT account, id, api_version FROM inbox ORDER BY id, account")
    return [(row["account"], row["id"], row["api_version"]) for row in found]


def test_recording_under_the_new_name(engine: Engine) -> None:
    """What arrives under an old name is recorded under the new one, and each delivery has its own receipt."""
    ledger.execute(engine, NAMED, old="", new="acct_1")
    under_old, under_other = ledger.delivery(body("evt_1")), ledger.delivery(body("evt_1"), account="acct_2")

    receipts = ledger.record(engine, [under_old, under_other])

    assert [each.recorded for each in receipts] == [Recorded.NEW, Recorded.NEW]
    assert [row[:2] for row in accounts(engine)] == [("acct_1", "evt_1"), ("acct_2", "evt_1")]
    assert [each.recorded for each in ledger.record(engine, [under_old])] == [Recorded.DUPLICATE]


def test_one_event_under_two_names_in_one_statement(engine: Engine) -> None:
    """Two deliveries that a rename makes one event are recorded once, in the newer rendering."""
    ledger.execute(engine, NAMED, old="", new="acct_1")
    older = ledger.delivery(body("evt_1", api_version="2024-06-20"), account="acct_1")
    newer = ledger.delivery(body("evt_1"))

    receipts = ledger.record(engine, [older, newer])

    assert [each.recorded for each in receipts] == [Recorded.DUPLICATE, Recorded.NEW]
    assert accounts(engine) == [("acct_1", "evt_1", "2026-10-28.endive")]


def test_the_account_that_the_context_names(engine: Engine) -> None:
    """A snapshot of an organization's destination is of the account that its context leads to, as a thin event is."""
    ledger.record(engine, [ledger.delivery(body("evt_1", context="org_1/acct_7"), account="label")])

    assert accounts(engine) == [("acct_7", "evt_1", "2026-10-28.endive")]


# ---- Renaming ----


def sold(seed: int = 3) -> Account:
    """Return an account that has sold, been paid, refunded and given credit."""
    return tangle(seed, money=True)


def world(engine: Engine) -> set[str]:
    """Return the accounts that any row of any table names."""
    named = [table for table in tables.metadata.sorted_tables if "account" in table.c]
    union = " UNION ".join(f"SELECT account FROM {table.name}" for table in named)  # noqa: S608 - our own names
    return {row["account"] for row in ledger.rows(engine, union)}


def announced(engine: Engine) -> list[tuple[str, str]]:
    """Return subject and kind of each change that is told once and in the feed, in order."""
    found = ledger.rows(engine, "SELECT subject_id, kind FROM changes WHERE withheld IS NULL ORDER BY subject_id, kind")
    return [(row["subject_id"], row["kind"]) for row in found if row["kind"] in tables.ONE_SHOT_KINDS]


def recorded_in(engine: Engine, bodies: list[bytes], account: str) -> str:
    """Record and fold *bodies* in an empty database as *account*'s, and return the digest."""
    ledger.clear(engine)
    ledger.execute(engine, "DELETE FROM account_names")
    ledger.record(engine, [ledger.delivery(each, account=account) for each in bodies])
    ledger.fold(engine)
    return ledger.digest_of(engine)


def test_a_history_in_two_halves(engine: Engine) -> None:
    """Objects of which both names have events are one again, exactly as if there had been one name."""
    bodies = [event.body for event in sold().events]
    ledger.take_in(engine, *bodies[::2])
    ledger.take_in(engine, *bodies[1::2], account="acct_1")

    done = renaming.rename(engine, "", "acct_1", now=NOW)

    assert (done.events, done.joined) == (len(bodies[::2]), 0)
    assert world(engine) == {"acct_1"}
    assert len(set(announced(engine))) == len(announced(engine))
    with rebuilt(engine) as made:
        assert prove(made).holds
    digest = ledger.digest_of(engine)
    assert digest == recorded_in(engine, bodies, "acct_1")
