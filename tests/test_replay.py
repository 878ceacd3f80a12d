"""A replay records what the inbox lacks, says what it met, and leaves the same tables however often it runs."""

import gzip
import hashlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Engine, text

from deploy.sandbox.account import Account, Event
from deploy.sandbox.history import shop_history
from deploy.sandbox.rendering import render, twin
from schemas import database
from tests import ledger
from tests.command import payfold
from worker import operator
from worker.digest import digests
from worker.plan import plan
from worker.replay import Counts, Filters, Reading, export, follow, replay

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
SHOP = shop_history(3, 20)
NOTHING = Filters()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Return an engine on a database without an event."""
    opened = database.engine(database_url)
    yield opened
    opened.dispose()


@pytest.fixture
def other_url(database_url: str) -> Iterator[str]:
    """Return the URL of another database without an event."""
    name = conninfo_to_dict(database_url)["dbname"]
    opened = database.engine(database_url.replace(f"/{name}", "/postgres"))
    with opened.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"CREATE DATABASE {name}_other TEMPLATE {name}"))
        yield database_url.replace(f"/{name}", f"/{name}_other")
        connection.execute(text(f"DROP DATABASE {name}_other WITH (FORCE)"))
    opened.dispose()


def log(path: Path, events: Iterable[Event], *more: bytes) -> str:
    """Write *events* as NDJSON, with *more* lines after them."""
    path.write_bytes(b"".join(msgspec.json.format(line, indent=-1) + b"\n" for line in (e.body for e in events)))
    with path.open("ab") as file:
        file.writelines(line + b"\n" for line in more)
    return str(path)


def met(engine: Engine, *paths: str, filters: Filters = NOTHING, account: str = "", dry_run: bool = False) -> Counts:
    """Replay logs and return the counts that are not zero, which add up."""
    logs = Reading(paths, NOW, filters, account)
    counts = +(plan(engine, logs).counts if dry_run else replay(engine, logs).counts)
    assert counts["seen"] == sum(
        counts[each] for each in ("filtered", "new", "newer rendering", "duplicate", "refused")
    )
    assert counts["new"] + counts["newer rendering"] == sum(
        counts[each] for each in ("folded", "ignored", "parked", "pending")
    )
    return counts


def rows(engine: Engine, table: str) -> list[tuple[Any, ...]]:
    """Return all of a table, in order."""
    with database.transaction(engine) as connection:
        found = connection.execute(text(f"SELECT * FROM {table}"))  # noqa: S608 - our own names
        return sorted((tuple(row) for row in found), key=repr)


def odd(**changed: object) -> bytes:
    """Return an event of a type that is folded, changed."""
    return msgspec.json.encode(SHOP.events[0].payload() | {"id": "evt_odd"} | changed)


MIXED = [
    odd(id="evt_unknown", type="topup.created"),
    odd(id="evt_parked", data={"object": {"id": "plink_1", "object": "payment_link", "active": "maybe"}}),
    b"garbage",
    odd(id="evt_again"),
    odd(id="evt_again"),
]


def test_counts(engine: Engine, tmp_path: Path) -> None:
    """Each entry of a log is counted once by what it was, and each new event once by what became of it."""
    counts = met(engine, log(tmp_path / "log", SHOP.events, *MIXED))

    shop = len(SHOP.events)
    assert counts == {
        "seen": shop + 5,
        "new": shop + 3,
        "duplicate": 1,
        "refused": 1,
        "folded": shop + 1,
        "ignored": 1,
        "parked": 1,
    }


def test_second_run(engine: Engine, tmp_path: Path) -> None:
    """A second run records nothing, changes nothing, and says so."""
    path = log(tmp_path / "log", SHOP.events)
    met(engine, path)
    before = digests(engine), rows(engine, "inbox"), rows(engine, "changes"), rows(engine, "outcomes")

    assert met(engine, path) == {"seen": len(SHOP.events), "duplicate": len(SHOP.events)}
    assert (digests(engine), rows(engine, "inbox"), rows(engine, "changes"), rows(engine, "outcomes")) == before


def test_many_files(engine: Engine, tmp_path: Path) -> None:
    """Several logs, overlapping and in any order, come to what one of all events comes to."""
    events = SHOP.events
    half = len(events) // 2
    first, second = log(tmp_path / "1", events[: half + 5]), log(tmp_path / "2", reversed(events[half:]))

    counts = met(engine, second, first)

    assert (counts["new"], counts["duplicate"]) == (len(events), 5)
    held = {row[0]: row[1] for row in _of(engine, "SELECT id, status FROM orders")}
    assert held == {session: SHOP.expected_status(session) for session in held}


def _of(engine: Engine, statement: str) -> list[tuple[Any, ...]]:
    with database.transaction(engine) as connection:
        return [tuple(row) for row in connection.execute(text(statement))]


def tables_at_rest(engine: Engine) -> list[list[tuple[Any, ...]]]:
    """Return everything that a replay could have written."""
    names = ("inbox", "pending", "outcomes", "orders", "payment_links", "changes", "anomalies")
    return [rows(engine, name) for name in names]


def words_of_an_operator(engine: Engine, tmp_path: Path) -> bytes:
    """Return the observation by which an operator sets evt_parked aside, taken out of another inbox."""
    met(engine, log(tmp_path / "aside", [], *MIXED[:2]))
    operator.ignore(engine, "evt_parked", reason="a test", now=NOW)
    *_, line = export(engine, filters=NOTHING)
    return line.rstrip()


@pytest.mark.parametrize("known", ["nothing", "some", "all"])
def test_dry_run(engine: Engine, other_url: str, tmp_path: Path, known: str) -> None:
    """A dry run writes nothing, and foresees what the run then counts: duplicates over a thousand lines apart too."""
    other = database.engine(other_url)
    word = words_of_an_operator(other, tmp_path)
    other.dispose()
    events = shop_history(5, 1000).events[::-1]
    later = [render(event, "2024-06-20") for event in events[-40:]]
    twins = [twin(event) for event in events[:10]]
    if known != "nothing":
        met(engine, log(tmp_path / "before", later[:20] + events[-60 : -30 if known == "some" else None]))
    path = log(tmp_path / "log", [*later, *events, *twins, *events[:30], *later[::-1]], *MIXED, word)
    before = tables_at_rest(engine)

    foreseen = met(engine, path, dry_run=True)

    assert tables_at_rest(engine) == before
    assert met(engine, path) == foreseen
    assert (foreseen["newer rendering"] > 0) == (known != "all")
    assert foreseen["ignored"] == 2


def test_dry_run_of_what_is_set_aside(engine: Engine, other_url: str, tmp_path: Path) -> None:
    """An event that the inbox has an operator's word on is foreseen as ignored."""
    other = database.engine(other_url)
    met(engine, log(tmp_path / "word", [], words_of_an_operator(other, tmp_path)))
    other.dispose()
    path = log(tmp_path / "log", [], MIXED[1])

    foreseen = met(engine, path, dry_run=True)

    assert foreseen == met(engine, path) == {"seen": 1, "new": 1, "ignored": 1}


def test_filters(engine: Engine, tmp_path: Path) -> None:
    """Only events created from one time up to another, of a type like the one asked for, are taken."""
    path = log(tmp_path / "log", SHOP.events)
    times = sorted({event.created for event in SHOP.events})
    since, until = times[3], times[-3]
    filters = Filters(
        since=datetime.fromtimestamp(since, UTC), until=datetime.fromtimestamp(until, UTC), type="checkout.*.completed"
    )
    wanted = [
        event.id
        for event in SHOP.events
        if since <= event.created < until and event.type == "checkout.session.completed"
    ]

    counts = met(engine, path, filters=filters)

    assert counts["filtered"] == len(SHOP.events) - len(wanted)
    assert sorted(row[0] for row in _of(engine, "SELECT id FROM inbox")) == sorted(wanted)
    assert any(event.created == since for event in SHOP.events)


def test_account(engine: Engine, tmp_path: Path) -> None:
    """A log's label goes to the events that name no account, so that two accounts' logs do not meet."""
    path = log(tmp_path / "log", SHOP.events)

    first, second = met(engine, path, account="acct_1"), met(engine, path, account="acct_2")

    assert first == second
    assert _of(engine, "SELECT DISTINCT account FROM orders ORDER BY account") == [("acct_1",), ("acct_2",)]


# ---- Export ----


def lived_in(engine: Engine) -> None:
    """Fill an inbox with all that it may hold: signed deliveries, accounts, modes, odd ones, an operator's words."""
    webhooks = [
        *(ledger.delivery(event.body, account="acct_1") for event in SHOP.events),
        *(ledger.delivery(event.body) for event in shop_history(4, 10, livemode=True).events),
        ledger.delivery(MIXED[0]),
        ledger.delivery(MIXED[1]),
        ledger.delivery(
            odd(id="evt_nul", data={"object": {"id": "a\u0000b", "object": "payment_link", "é": "\u0000"}})
        ),
        ledger.delivery(b'{"id":"evt_twice","type":"x","type":"y","created":1,"data":{"object":{"a":1,"a":2}}}'),
    ]
    account = Account(seed=9)
    account.open_session()
    session = account.session(account.session_ids()[0]) | {
        "url": "https://checkout.stripe.com/c/pay/cs_1#a-long-secret"
    }
    webhooks.append(ledger.delivery(account.emit("checkout.session.expired", session | {"status": "expired"}).body))
    ledger.record(engine, webhooks)
    ledger.fold(engine)
    operator.ignore(engine, "evt_parked", reason="not ours", now=NOW)
    with database.transaction(engine) as connection:
        connection.execute(text("UPDATE inbox SET signature = 't=1,v1=' || id WHERE source = 'webhook'"))


KEPT = """
SELECT account, livemode, id, type, api_version, created, object_type, object_id, payload, redacted, payload_sha256,
    signature, received_at, state, reason
FROM events ORDER BY account, livemode, id
"""


@pytest.mark.parametrize("ending", ["ndjson", "gz", "zst"])
def test_export_and_replay(engine: Engine, database_url: str, other_url: str, tmp_path: Path, ending: str) -> None:
    """An export replayed into an empty database gives the same digest, and every event as it was recorded."""
    lived_in(engine)
    path = str(tmp_path / f"events.{ending}")

    exported = payfold("events", "export", "--output", path, DATABASE_URL=database_url)
    replayed = payfold("replay", path, "--format", "json", DATABASE_URL=other_url)

    other = database.engine(other_url)
    assert (exported.code, exported.out) == (0, "")
    assert replayed.code == 0
    assert replayed.json["new"] == len(rows(engine, "inbox")) == replayed.json["seen"]
    assert digests(other) == digests(engine)
    assert _of(other, KEPT) == _of(engine, KEPT)
    assert sum(len(row[9]) for row in _of(other, KEPT)) > 0
    assert payfold("digest", DATABASE_URL=other_url).out == payfold("digest", DATABASE_URL=database_url).out
    other.dispose()


def test_hash_of_the_original(engine: Engine, tmp_path: Path) -> None:
    """The hash of a delivery is that of its body with its credentials, which are gone from payload and export."""
    lived_in(engine)
    secret = b"a-long-secret"
    exported = list(export(engine, filters=NOTHING))

    assert not any(secret in line for line in exported)
    blanked = [row for row in _of(engine, KEPT) if "data.object.url" in row[9]]
    assert blanked
    assert all(hashlib.sha256(bytes(row[8])).hexdigest() != row[10] for row in blanked)


def test_export_through_pipes(database_url: str, engine: Engine, other_url: str) -> None:
    """An export to stdout is a log that can be compressed on the way and replayed from stdin."""
    lived_in(engine)
    exported = payfold("events", "export", "--plain", DATABASE_URL=database_url).out.encode()

    first = payfold("replay", "-", "--format", "json", stdin=gzip.compress(exported), DATABASE_URL=other_url)
    second = payfold("replay", "-", "--format", "json", stdin=zstandard.compress(exported), DATABASE_URL=other_url)

    assert (first.code, second.code) == (0, 0)
    assert first.json["new"] == second.json["duplicate"] == exported.count(b"\n")


def test_export_of_a_span(database_url: str, engine: Engine) -> None:
    """An export may be of the events created from one time up to another."""
    lived_in(engine)
    times = sorted({event.created for event in SHOP.events})
    since, until = (f"{datetime.fromtimestamp(times[at], UTC):%Y-%m-%dT%H:%M:%S}" for at in (2, -2))

    ran = payfold("events", "export", "--plain", "--since", f"{since}+00:00", "--until", until, DATABASE_URL=database_url)

    ids = [msgspec.json.decode(msgspec.json.decode(line)["payload"])["id"] for line in ran.out.splitlines()]
    span = f"created >= '{since}Z' AND created < '{until}Z'"
    held = _of(engine, f"SELECT id FROM inbox WHERE {span} ORDER BY seq")  # noqa: S608 - our own times
    assert [(each,) for each in ids] == held
    assert 0 < len(held) < len(rows(engine, "inbox"))


# ---- The command ----


def test_command(database_url: str, engine: Engine, tmp_path: Path) -> None:
    """The command tells each fault with file and line on stderr, the counts on stdout, and exits 1; the rest is in."""
    good, bad = log(tmp_path / "good", SHOP.events[:4]), log(tmp_path / "bad", SHOP.events[4:8], b"{cut", b"42")

    ran = payfold("replay", bad, good, "--rejects", str(tmp_path / "rejects"), DATABASE_URL=database_url)

    assert ran.code == 1
    told = [line for line in ran.err.splitlines() if line.startswith(bad)]
    assert [line.removeprefix(bad)[:9] for line in told] == [": line 5:", ": line 6:"]
    counts = dict(line.rsplit(maxsplit=1) for line in ran.out.splitlines())
    assert (counts["seen"], counts["new"], counts["refused"]) == ("10", "8", "2")
    assert len(rows(engine, "inbox")) == 8


def test_command_is_quiet(database_url: str, tmp_path: Path) -> None:
    """Without a fault nothing is said but the counts."""
    ran = payfold("replay", log(tmp_path / "log", SHOP.events), DATABASE_URL=database_url)

    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize("kind", ["missing", "folder", "time"])
def test_command_refuses(database_url: str, engine: Engine, tmp_path: Path, kind: str) -> None:
    """What cannot be meant is told with exit 2, before the first event is recorded."""
    good = log(tmp_path / "good", SHOP.events)
    more = {"missing": str(tmp_path / "missing"), "folder": str(tmp_path), "time": "--since=noon"}[kind]

    ran = payfold("replay", good, more, DATABASE_URL=database_url)

    assert (ran.code, ran.out) == (2, "")
    assert more.removeprefix("--since=") in ran.err
    assert rows(engine, "inbox") == []
