"""An account is recorded under its newest name, whoever records it, and a rename leaves one world."""

from datetime import UTC, datetime
from typing import Final

import msgspec
from sqlalchemy import Engine

from schemas.inbox import Recorded
from tests import ledger

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
