"""An operator folds events again, or ignores one, over HTTP: one event, or all that match; and sees what is parked."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlencode

import httpx
import msgspec
import psycopg
import pytest
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from schemas import database, event_acts, parked
from schemas.errors import ConfigurationError
from schemas.event_filters import EventFilters
from tests import ledger
from tests.waiting import until, until_locked
from tests.web import CLERK, OPERATOR, Web, event, serving, settings_of
from worker.proof.digest import digests
from worker.proof.rebuild import refolded


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a web process on a database of its own."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


def post(web: Web, path: str, body: object = None, **query: object) -> httpx.Response:
    """Post as an operator."""
    address = path + (f"?{urlencode(query)}" if query else "")
    return web.client.post(address, headers=OPERATOR, json=body)


def odd(id_: str, kind: str = "invoice.paid", object_id: str = "in_1", **fields: object) -> bytes:
    """Return an event that is parked, since its object is not what its type has."""
    return event(type=kind, id=id_, livemode=True, data={"object": {"object": "odd", "id": object_id, **fields}})


def park(engine: Engine, *bodies: bytes, account: str = "") -> None:
    """Record and park events."""
    ledger.record(engine, [ledger.delivery(body, account=account) for body in bodies])
    ledger.fold(engine)


def states(engine: Engine) -> dict[str, str]:
    """Return the state of each event."""
    return {row["id"]: row["state"] for row in ledger.rows(engine, "SELECT id, state FROM events ORDER BY seq")}


def refused_for_its_amount(engine: Engine) -> str:
    """Park a good event by a constraint that refuses its row, and return its id."""
    ledger.execute(engine, "ALTER TABLE orders ADD CONSTRAINT cheap CHECK (amount_total < 100)")
    account = Account(seed=1)
    account.complete(account.open_session(amount=5_000))
    park(engine, account.events[-1].body)
    return account.events[-1].id


def test_retry(web: Web, engine: Engine) -> None:
    """A parked event is queued and the worker woken; once it is folded, a retry is refused with what to do."""
    id_ = refused_for_its_amount(engine)
    ledger.execute(engine, "ALTER TABLE orders DROP CONSTRAINT cheap")

    answer = post(web, f"/v1/events/{id_}/retry")

    assert (answer.status_code, answer.json()) == (
        202,
        {"account": "", "livemode": False, "id": id_, "state": "pending"},
    )
    until(lambda: web.fold_messages() == 1)
    assert post(web, f"/v1/events/{id_}/retry").status_code == 202
    ledger.fold(engine)
    assert ledger.rows(engine, "SELECT status FROM orders") == [{"status": "paid"}]
    again = post(web, f"/v1/events/{id_}/retry")
    assert (again.status_code, again.json()["type"]) == (409, "urn:payfold:problem:conflict")
    assert f"`payfold events retry {id_}`" in again.json()["detail"]
    assert post(web, "/v1/events/evt_none/retry").status_code == 404
    assert web.get("/v1/events/evt_none/retry").headers["allow"] == "POST"


def test_retry_with_an_archived_payload(web: Web, engine: Engine) -> None:
    """Where the fold would need archived payloads, nothing is queued, and the answer names the command."""
    park(engine, odd("evt_1"), odd("evt_2"))
    ledger.execute(engine, "DELETE FROM payloads WHERE seq = (SELECT seq FROM inbox WHERE id = 'evt_2')")

    answer = post(web, "/v1/events/evt_1/retry")

    assert answer.status_code == 409
    assert "`payfold events retry evt_1 --archive DIR`" in answer.json()["detail"]
    assert states(engine) == {"evt_1": "parked", "evt_2": "parked"}


def test_one_world(web: Web, engine: Engine) -> None:
    """An act on an id that two accounts have is refused, until one is chosen, and then touches no other."""
    for account in ("acct_1", "acct_2"):
        park(engine, odd("evt_1"), account=account)

    for act, body in (("retry", None), ("ignore", {"reason": "a test"})):
        assert post(web, f"/v1/events/evt_1/{act}", body).status_code == 409
        assert post(web, f"/v1/events/evt_1/{act}", body, account="acct_1", livemode=False).status_code == 404
        assert post(web, f"/v1/events/evt_1/{act}", body, account="acct_1").json()["account"] == "acct_1"
    ledger.fold(engine)

    found = ledger.rows(engine, "SELECT account, state FROM events WHERE type = 'invoice.paid' ORDER BY account")
    assert [(row["account"], row["state"]) for row in found] == [("acct_1", "ignored"), ("acct_2", "parked")]
    assert ledger.rows(engine, "SELECT attempts FROM events WHERE account = 'acct_2'") == [{"attempts": 1}]


def test_ignore(web: Web, engine: Engine) -> None:
    """An event is ignored by an observation of who and why, which replays; then neither act is possible again."""
    park(engine, odd("evt_1"), odd("evt_2", "customer.created", "cus_1"))

    answer = post(web, "/v1/events/evt_1/ignore", {"reason": "sent by a test"})

    assert (answer.status_code, answer.json()["state"]) == (202, "parked")
    ledger.fold(engine)
    shown = web.get("/v1/events/evt_1", CLERK).json()
    assert (shown["state"], shown["cause"]) == ("ignored", "set_aside")
    assert shown["reason"] == "set aside by the token admin: sent by a test"
    assert "reason" not in web.get("/v1/events/evt_1").json()
    word = web.get(f"/v1/events/{answer.json()['observation_id']}", CLERK).json()
    assert msgspec.json.decode(word["payload"])["data"]["object"] == {
        "object": "event",
        "id": "evt_1",
        "reason": "sent by a test",
        "by": "admin",
    }
    live = digests(engine)
    for seed in range(3):
        with refolded(engine, seed=seed) as made:
            assert digests(engine, schema=made.schema) == live
            kept = ledger.rows(engine, f"SELECT reason FROM {made.schema}.outcomes WHERE cause = 'set_aside'")  # noqa: S608 - our own name
            assert kept == [{"reason": shown["reason"]}]
    for act, body in (("retry", None), ("ignore", {"reason": "again"})):
        assert post(web, f"/v1/events/evt_1/{act}", body).status_code == 409


ACTS: Final = {"retry": None, "ignore": {"reason": "a test"}}
"""The acts on one event, and the body that each wants."""
LEFT_ALONE: Final = "SELECT (SELECT count(*) FROM pending) AS pending, (SELECT count(*) FROM inbox) AS inbox"


def test_a_folded_event_that_waits_again_is_not_ignored(web: Web, engine: Engine) -> None:
    """An event on which rows depend is pending again after a release, or for its copies, and cannot be ignored."""
    account = Account(seed=1)
    account.complete(account.open_session(amount=5_000))
    park(engine, account.events[-1].body)
    id_ = account.events[-1].id
    for queued in ("again", "copies"):
        ledger.execute(engine, f"INSERT INTO pending (seq, {queued}) SELECT seq, true FROM inbox")  # noqa: S608 - our own name

        refused = post(web, f"/v1/events/{id_}/ignore", ACTS["ignore"])

        assert (refused.status_code, refused.json()["type"]) == (409, "urn:payfold:problem:conflict")
        assert ledger.rows(engine, LEFT_ALONE) == [{"pending": 1, "inbox": 1}]
        ledger.fold(engine)
    assert ledger.rows(engine, "SELECT status FROM orders") == [{"status": "paid"}]
    assert states(engine) == {id_: "folded"}


@pytest.mark.parametrize("act", ACTS)
def test_an_event_that_is_being_folded(web: Web, engine: Engine, act: str) -> None:
    """While a worker has the event, neither act waits for it or does anything: it may be tried again afterwards."""
    ledger.record(engine, [ledger.delivery(odd("evt_1"))])

    with psycopg.connect(web.settings.libpq) as batch:
        batch.execute("SELECT FROM pending FOR UPDATE")
        refused = post(web, f"/v1/events/evt_1/{act}", ACTS[act])
        batch.rollback()

    assert (refused.status_code, refused.json()["type"]) == (409, "urn:payfold:problem:conflict")
    assert "evt_1 is being folded: try again" in refused.json()["detail"]
    assert ledger.rows(engine, LEFT_ALONE) == [{"pending": 1, "inbox": 1}]
    assert post(web, f"/v1/events/evt_1/{act}", ACTS[act]).status_code == 202
    ledger.fold(engine)
    assert states(engine)["evt_1"] == {"retry": "parked", "ignore": "ignored"}[act]


@contextmanager
def folded_by_another(web: Web, engine: Engine, take: str) -> Iterator[None]:
    """Let another transaction *take* the events before the act of the body, which waits for it, and fold them."""
    with psycopg.connect(web.settings.libpq) as batch, ThreadPoolExecutor(1) as threads:
        batch.execute(take.encode())

        def fold() -> None:
            until_locked(engine, kind="transactionid")
            batch.execute("UPDATE outcomes SET state = 'folded', cause = NULL, reason = NULL")
            batch.execute("DELETE FROM pending")
            batch.commit()

        folding = threads.submit(fold)
        yield
        folding.result(30)


QUEUED_BY_ANOTHER: Final = "INSERT INTO pending (seq, again) SELECT seq, true FROM inbox"
HELD: Final = "SELECT FROM pending ORDER BY seq FOR UPDATE"


@pytest.mark.parametrize("act", ACTS)
def test_a_parked_event_that_another_folds(web: Web, engine: Engine, act: str) -> None:
    """A parked event that is queued and folded between the look at it and the act is left as it then is."""
    park(engine, odd("evt_1"))

    with folded_by_another(web, engine, QUEUED_BY_ANOTHER):
        refused = post(web, f"/v1/events/evt_1/{act}", ACTS[act])

    assert (refused.status_code, refused.json()["type"]) == (409, "urn:payfold:problem:conflict")
    assert ledger.rows(engine, LEFT_ALONE) == [{"pending": 0, "inbox": 1}]


@pytest.mark.parametrize("state", ["parked", "pending"])
def test_matching_events_that_another_folds(web: Web, engine: Engine, state: str) -> None:
    """Events that are folded between their count and the act are none of those that were confirmed: none is queued."""
    park(engine, odd("evt_1"), odd("evt_2"))
    if state == "pending":
        ledger.execute(engine, QUEUED_BY_ANOTHER)

    with folded_by_another(web, engine, HELD if state == "pending" else QUEUED_BY_ANOTHER):
        refused = post(web, "/v1/events/retry", state=state, confirm=2, until=2)

    assert (refused.status_code, refused.json()["type"]) == (409, "urn:payfold:problem:count_differs")
    assert (refused.json()["count"], refused.json()["until"]) == (0, 2)
    assert ledger.rows(engine, LEFT_ALONE) == [{"pending": 0, "inbox": 2}]


@pytest.mark.parametrize(
    "body",
    [{}, {"reason": ""}, {"reason": "x" * 1_001}, {"reason": "\0"}, {"reason": 5}, {"reason": "a", "by": "b"}, []],
)
def test_a_reason_that_cannot_be_used(web: Web, body: object) -> None:
    """Ignoring wants a reason of a bounded length, and nothing else."""
    assert post(web, "/v1/events/evt_1/ignore", body).status_code == 422


# ---- All that match ----


def test_retry_all_that_match(web: Web, engine: Engine) -> None:
    """A filter is counted, and what was confirmed is queued, of one world and of those recorded by then."""
    park(engine, odd("evt_1"), odd("evt_2", "invoice.voided"), odd("evt_3", "customer.created"), account="acct_1")
    park(engine, odd("evt_4"), account="acct_2")
    wanted = {"type": "invoice.*", "account": "acct_1"}

    counted = post(web, "/v1/events/retry", **wanted)
    assert (counted.status_code, counted.json()) == (200, {"count": 2, "until": 4, "queued": None})
    assert set(states(engine).values()) == {"parked"}
    park(engine, odd("evt_5"), account="acct_1")

    for confirm, last in ((1, 4), (3, 4), (2, 5)):
        refused = post(web, "/v1/events/retry", **wanted, confirm=confirm, until=last)
        assert (refused.status_code, refused.json()["type"]) == (409, "urn:payfold:problem:count_differs")
        assert (refused.json()["count"], refused.json()["until"]) == (2 if last == 4 else 3, last)
    assert set(states(engine).values()) == {"parked"}
    done = post(web, "/v1/events/retry", **wanted, confirm=2, until=4)
    assert (done.status_code, done.json()) == (200, {"count": 2, "until": 4, "queued": 2})
    until(lambda: web.fold_messages() == 1)
    assert [id_ for id_, state in states(engine).items() if state == "pending"] == ["evt_1", "evt_2"]
    assert post(web, "/v1/events/retry", **wanted, confirm=2, until=4).json()["count"] == 0
    assert post(web, "/v1/events/retry", **wanted, state="pending").json()["count"] == 2

    ledger.fold(engine)
    found = ledger.rows(engine, "SELECT attempts FROM events ORDER BY seq")
    assert [row["attempts"] for row in found] == [2, 2, 1, 1, 1]


WRONG: Final = [
    {"state": "folded"},
    {"state": "ignored"},
    {"confirm": 1},
    {"until": 1},
    {"confirm": -1, "until": 1},
    {"confirm": 2**63, "until": 1},
    {"confirm": 1, "until": 2**63},
    {"type": "*" * 6},
    {"type": "x" * 256},
    {"type": "\0"},
    {"cause": "novel"},
    {"source": "novel"},
    {"received_from": "2026-11-01"},
    {"limit": 5},
]


@pytest.mark.parametrize("query", WRONG, ids=str)
def test_filters_that_cannot_be_used(web: Web, query: dict[str, Any]) -> None:
    """A value that cannot be used is refused by its name, also of a list."""
    refused = post(web, "/v1/events/retry", **query)

    assert refused.status_code == 422
    assert refused.json()["errors"]
    if not query.keys() & {"confirm", "until", "limit", "state"}:
        assert web.get(f"/v1/events?{urlencode(query)}").status_code == 422


def test_more_than_one_act_queues(web: Web, engine: Engine) -> None:
    """Where more events match than one act queues, nothing is done, and the filters are to be narrowed."""
    ledger.execute(engine, _MANY_PARKED, count=event_acts.RETRY_EVENTS_MAX + 1)

    for query in ({}, {"confirm": event_acts.RETRY_EVENTS_MAX + 1, "until": 200_000}):
        refused = post(web, "/v1/events/retry", **query)
        assert refused.status_code == 409
        assert "More than 100,000 events match" in refused.json()["detail"]
    assert ledger.rows(engine, "SELECT FROM pending LIMIT 1") == []
    done = post(web, "/v1/events/retry", confirm=event_acts.RETRY_EVENTS_MAX, until=event_acts.RETRY_EVENTS_MAX)
    assert done.json()["queued"] == event_acts.RETRY_EVENTS_MAX


_MANY_PARKED: Final = """
WITH recorded AS (
    INSERT INTO inbox (account, livemode, id, seq, type, created, redacted, payload_sha256, source, received_at)
    OVERRIDING SYSTEM VALUE
    SELECT '', true, 'evt_' || n, n, 'invoice.paid', now(), '{}', '', 'webhook', now()
    FROM generate_series(1, :count) AS n RETURNING seq
)
INSERT INTO outcomes (seq, state, cause, attempts, folded_at, fold_version)
SELECT seq, 'parked', 'fold_failed', 1, now(), 1 FROM recorded
"""


def test_only_what_no_row_depends_on(engine: Engine) -> None:
    """The act on many is of parked or pending events alone, for any caller."""
    for state in (None, "folded", "ignored"):
        with database.transaction(engine) as connection, pytest.raises(ConfigurationError, match="parked or pending"):
            event_acts.retry_matching(connection, EventFilters(state=state), confirm=0, until=0)


# ---- What is parked ----


def test_parked_groups(web: Web, engine: Engine) -> None:
    """Parked events are grouped, with the amount of each object once by its last event, and never across currencies."""
    park(
        engine,
        odd("evt_1", total=500, currency="eur"),
        odd("evt_2", total=700, currency="eur"),
        odd("evt_3", object_id="in_2", total=300, currency="eur"),
        odd("evt_4", object_id="in_3", total=900, currency="usd"),
        odd("evt_5", object_id="in_4", total=900),
        odd("evt_6", object_id="in_5", total="many", currency="usd"),
        odd("evt_7", "customer.created", "cus_1"),
    )
    park(engine, odd("evt_1", total=100, currency="eur"), account="acct_1")

    found = web.get("/v1/events/parked").json()

    at = "2026-11-22T12:00:00Z"
    same = {"livemode": True, "cause": "object_unexpected", "first_received_at": at, "last_received_at": at}
    euros = {"currency": "eur", "amount": 1_000, "objects": 2}
    dollars = {"currency": "usd", "amount": 900, "objects": 1}
    own = {"currency": "eur", "amount": 100, "objects": 1}
    assert found == {
        "data": [
            same | {"account": "", "type": "invoice.paid", "count": 6, "money": [euros, dollars], "unknown": 2},
            same | {"account": "", "type": "customer.created", "count": 1, "money": None, "unknown": 1},
            same | {"account": "acct_1", "type": "invoice.paid", "count": 1, "money": [own], "unknown": 0},
        ],
        "is_cut": False,
    }
    assert [group["account"] for group in web.get("/v1/events/parked?account=acct_1").json()["data"]] == ["acct_1"]
    assert web.get("/v1/events/parked?livemode=false").json()["data"] == []
    post(web, "/v1/events/evt_7/retry")
    assert len(web.get("/v1/events/parked").json()["data"]) == 2


def test_what_of_the_parked_is_looked_at(engine: Engine) -> None:
    """Groups, events and payloads that are looked at are bounded, and the answer reports where it is cut."""
    park(engine, *(odd(f"evt_{n}", object_id=f"in_{n}", total=100, currency="eur") for n in range(5)))
    park(engine, odd("evt_5", "customer.created"))

    def groups(
        *, groups_max: int = 9, events_max: int = 9, payloads_max: int = 9
    ) -> list[tuple[int, int | None, int]]:  # fmt: skip
        limits = {"groups_max": groups_max, "events_max": events_max, "payloads_max": payloads_max}
        with database.transaction(engine) as connection:
            found = parked.groups(connection, account=None, livemode=None, **limits)
        assert found.is_cut == (groups_max < 9 or events_max < 9)
        return [(each.count, each.money[0].amount if each.money else None, each.unknown) for each in found.groups]

    assert groups() == [(5, 500, 0), (1, None, 1)]
    assert groups(groups_max=1) == [(5, 500, 0)]
    assert groups(events_max=3) == [(2, 200, 0), (1, None, 1)]
    assert groups(payloads_max=4) == [(5, 300, 2), (1, None, 1)]
