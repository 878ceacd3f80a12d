"""A replay records the events that the inbox lacks, counts its entries, and is idempotent."""

import gzip
import hashlib
import multiprocessing
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import stripe
from msgspec.structs import replace
from sqlalchemy import Engine, select, text

from deploy import output
from deploy.sandbox.account import Account, Event
from deploy.sandbox.history import shop_history
from deploy.sandbox.rendering import render, twin
from deploy.sandbox.signing import sign
from schemas import database, inbox, tables
from schemas.inbox import RECORD_ROWS_MAX
from tests import ledger, test_parts_of_notes, test_settling, waiting
from tests.command import environment, payfold, started
from tests.histories import bodies_of
from worker import folds
from worker.folding import projection
from worker.logs import retry, writer
from worker.logs.compression import zstd
from worker.logs.dry_run import plan
from worker.logs.export import export
from worker.logs.replay import BACKLOG, follow, replay
from worker.logs.selection import Counts, LogFilters, Reading
from worker.proof.digest import digests

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
SHOP = shop_history(3, 20)
NOTHING = LogFilters()


def log(path: Path, events: Iterable[Event], *more: bytes) -> str:
    """Write *events* as NDJSON, with *more* lines after them."""
    path.write_bytes(b"".join(msgspec.json.format(line, indent=-1) + b"\n" for line in (e.body for e in events)))
    with path.open("ab") as file:
        file.writelines(line + b"\n" for line in more)
    return str(path)


def met(engine: Engine, *paths: str, filters: LogFilters = NOTHING, account: str = "", dry_run: bool = False) -> Counts:
    """Replay logs, check that the counts add up, and return those that are not zero."""
    logs = Reading(paths, NOW, filters, account)
    counts = +(plan(engine, logs).counts if dry_run else replay(engine, logs).counts)
    assert counts["seen"] == sum(
        counts[each] for each in ("filtered", "new", "newer", "mended", "duplicate", "refused")
    )
    assert counts["new"] + counts["newer"] + counts["mended"] == sum(
        counts[each] for each in ("folded", "ignored", "parked", "pending")
    )
    return counts


def rows(engine: Engine, table: str) -> list[tuple[Any, ...]]:
    """Return all rows of a table, sorted."""
    with database.transaction(engine) as connection:
        found = connection.execute(text(f"SELECT * FROM {table}"))  # noqa: S608 - our own names
        return sorted((tuple(row) for row in found), key=repr)


def odd(**changed: object) -> bytes:
    """Return an event of a folded type with *changed* fields."""
    return msgspec.json.encode(SHOP.events[0].payload() | {"id": "evt_odd"} | changed)


MIXED = [
    odd(id="evt_unknown", type="topup.created"),
    odd(id="evt_parked", data={"object": {"id": "plink_1", "object": "payment_link", "active": "maybe"}}),
    b"garbage",
    odd(id="evt_again"),
    odd(id="evt_again"),
]


def test_counts(engine: Engine, tmp_path: Path) -> None:
    """Each entry of a log is counted once by its kind, and each new event once by its outcome."""
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


def test_second_run_draws_no_number(engine: Engine, tmp_path: Path) -> None:
    """A second run only reads: it does not even draw a sequence number."""
    path = log(tmp_path / "log", SHOP.events)
    met(engine, path)

    met(engine, path)
    ledger.record(engine, [ledger.delivery(odd())])

    assert _of(engine, "SELECT max(seq) FROM inbox") == [(len(SHOP.events) + 1,)]


def test_a_killed_run(engine: Engine, tmp_path: Path) -> None:
    """The next run folds the events that a killed run recorded and did not fold, although all are duplicates."""
    ledger.record(engine, [ledger.delivery(event.body) for event in SHOP.events])

    assert met(engine, log(tmp_path / "log", SHOP.events)) == {
        "seen": len(SHOP.events),
        "duplicate": len(SHOP.events),
    }
    assert rows(engine, "pending") == []


def test_second_run(engine: Engine, tmp_path: Path) -> None:
    """A second run records nothing and changes nothing, and its counts show that."""
    path = log(tmp_path / "log", SHOP.events)
    met(engine, path)
    before = digests(engine), rows(engine, "inbox"), rows(engine, "changes"), rows(engine, "outcomes")

    assert met(engine, path) == {"seen": len(SHOP.events), "duplicate": len(SHOP.events)}
    assert (digests(engine), rows(engine, "inbox"), rows(engine, "changes"), rows(engine, "outcomes")) == before


def test_long_events_are_recorded_in_small_batches(tmp_path: Path) -> None:
    """A log is recorded in batches that fit into memory, however long its events are."""
    long = [odd(id=f"evt_{number}", note="x" * 3 * 1024**2) for number in range(20)]
    counts = Counts()

    taken = list(Reading([log(tmp_path / "log", [], *long)], NOW).chunks(counts))

    assert [len(each) for each in taken] == [6, 6, 6, 2]
    assert counts == {"seen": 20}


def test_many_files(engine: Engine, tmp_path: Path) -> None:
    """Several logs, overlapping and in any order, give the same as one log of all events."""
    events = SHOP.events
    half = len(events) // 2
    first, second = log(tmp_path / "1", events[: half + 5]), log(tmp_path / "2", reversed(events[half:]))

    counts = met(engine, second, first)

    assert (counts["new"], counts["duplicate"]) == (len(events), 5)
    held = {row[0]: row[1] for row in _of(engine, "SELECT id, status FROM orders")}
    assert held == {session: SHOP.expected_status(session) for session in held}


def test_folding_in_a_second_process(engine: Engine, another_database_url: str, tmp_path: Path) -> None:
    """With a backlog a second process folds during the recording; the tables are the same, and the process ends."""
    path = log(tmp_path / "log", shop_history(seed=8, orders=400, money=True).events, *MIXED)
    other = database.engine(another_database_url)
    alone = replay(other, Reading([path], NOW))

    at_work: list[int] = []
    logs = Reading([path], NOW, progress=lambda *_: at_work.append(len(fold_processes())))
    partner = replay(engine, logs, backlog=1)

    assert max(at_work) == 1
    assert partner.counts == alone.counts
    assert alone.counts["seen"] > RECORD_ROWS_MAX
    assert digests(engine) == digests(other)
    assert fold_processes() == []
    other.dispose()


def test_a_killed_command_goes_on_when_run_again(
    database_url: str, engine: Engine, another_database_url: str, tmp_path: Path
) -> None:
    """A command that is killed while its fold process folds loses nothing and announces nothing twice."""
    path = log(tmp_path / "log", shop_history(seed=8, orders=2_500, money=True).events)
    other = database.engine(another_database_url)
    whole = payfold("replay", path, "--format", "json", DATABASE_URL=another_database_url).json
    out, err = tmp_path / "out", tmp_path / "err"

    with started("replay", path, stdout=out, stderr=err, DATABASE_URL=database_url):
        waiting.until(lambda: _of(engine, "SELECT count(*) >= 1000 FROM outcomes") == [(True,)])
    left = whole["seen"] - _of(engine, "SELECT count(*) FROM outcomes")[0][0]
    again = payfold("replay", path, "--format", "json", DATABASE_URL=database_url).json

    assert whole["seen"] > BACKLOG
    assert left > 0
    assert again["new"] + again["duplicate"] == whole["new"] == whole["seen"]
    assert digests(engine) == digests(other)
    final = "SELECT subject_id, kind FROM changes WHERE kind IN ('order.paid', 'order.expired') ORDER BY 1, 2"
    assert _of(engine, final) == _of(other, final) != []
    other.dispose()


def test_a_replay_makes_room_for_payloads(engine: Engine, tmp_path: Path) -> None:
    """A replay without a clock makes the next partition as soon as it begins one."""
    path = log(tmp_path / "log", shop_history(seed=8, orders=400, money=True).events)
    with database.transaction(engine) as connection:
        connection.execute(text(f"ALTER TABLE inbox ALTER COLUMN seq RESTART WITH {inbox.PARTITION_EVENTS - 1}"))

    done = replay(engine, Reading([path], NOW))

    assert done.counts["seen"] > RECORD_ROWS_MAX
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        assert f"payloads_from_{2 * inbox.PARTITION_EVENTS}" in inbox.partitions(cursor)


def fold_processes() -> list[multiprocessing.process.BaseProcess]:
    """Return the fold processes of this process."""
    return [each for each in multiprocessing.active_children() if each.name == "fold process"]


def _of(engine: Engine, statement: str) -> list[tuple[Any, ...]]:
    with database.transaction(engine) as connection:
        return [tuple(row) for row in connection.execute(text(statement))]


def tables_at_rest(engine: Engine) -> list[list[tuple[Any, ...]]]:
    """Return all tables that a replay could have written."""
    names = ("inbox", "pending", "outcomes", "orders", "payment_links", "changes", "anomalies")
    return [rows(engine, name) for name in names]


def operators_observation(engine: Engine, tmp_path: Path) -> bytes:
    """Return an operator's observation that ignores evt_parked, exported from another inbox."""
    met(engine, log(tmp_path / "ignored", [], *MIXED[:2]))
    retry.ignore(engine, "evt_parked", reason="a test", now=NOW)
    *_, line = export(engine, filters=NOTHING)
    return line.rstrip()


@pytest.mark.parametrize("known", ["nothing", "some", "all"])
def test_dry_run(engine: Engine, another_database_url: str, tmp_path: Path, known: str) -> None:
    """A dry run writes nothing, and foresees the run's counts, with duplicates over a thousand lines apart too."""
    other = database.engine(another_database_url)
    word = operators_observation(other, tmp_path)
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
    assert (foreseen["newer"] > 0) == (known != "all")
    assert foreseen["ignored"] == 2


def test_dry_run_of_an_ignored_event(engine: Engine, another_database_url: str, tmp_path: Path) -> None:
    """An event that an operator's observation in the inbox ignores is foreseen as ignored."""
    other = database.engine(another_database_url)
    met(engine, log(tmp_path / "word", [], operators_observation(other, tmp_path)))
    other.dispose()
    path = log(tmp_path / "log", [], MIXED[1])

    foreseen = met(engine, path, dry_run=True)

    assert foreseen == met(engine, path) == {"seen": 1, "new": 1, "ignored": 1}


def test_filters(engine: Engine, tmp_path: Path) -> None:
    """Only events created from one time up to another, of a type that matches the pattern, are recorded."""
    path = log(tmp_path / "log", SHOP.events)
    times = sorted({event.created for event in SHOP.events})
    since, until = times[3], times[-3]
    filters = LogFilters(
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


def test_filters_by_world(engine: Engine, tmp_path: Path) -> None:
    """Only events of one account and one mode are recorded, with any label for the events without an account."""
    live = shop_history(4, 10, livemode=True)
    path = log(tmp_path / "log", [*SHOP.events, *live.events], odd(account="acct_2"))

    assert met(engine, path, filters=LogFilters(account="acct_2"), account="acct_1")["new"] == 1
    assert met(engine, path, filters=LogFilters(account="acct_1", livemode=True), account="acct_1")["new"] == len(
        live.events
    )
    found = _of(engine, "SELECT account, livemode, count(*) FROM inbox GROUP BY 1, 2 ORDER BY 1, 2")
    assert found == [("acct_1", True, len(live.events)), ("acct_2", False, 1)]


def test_account(engine: Engine, tmp_path: Path) -> None:
    """A log's label is given to events that name no account, so that two accounts' logs stay apart."""
    path = log(tmp_path / "log", SHOP.events)

    first, second = met(engine, path, account="acct_1"), met(engine, path, account="acct_2")

    assert first == second
    assert _of(engine, "SELECT DISTINCT account FROM orders ORDER BY account") == [("acct_1",), ("acct_2",)]


# ---- Dry runs ----

_PLANNED = [table for table in tables.PROJECTIONS if table.name in {shape.table for shape in folds.ROW_SPECS.values()}]
_PLANNED += [tables.metadata.tables[shape.child] for shape in folds.ROW_SPECS.values() if shape.child]


def at_rest(engine: Engine) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return every row of the tables, by table and key."""
    found = {}
    with database.transaction(engine) as connection:
        for table in _PLANNED:
            for row in connection.execute(select(table)).mappings():
                found[table.name, *(row[column.name] for column in table.primary_key)] = dict(row)
    return found


def moved(before: dict[tuple[Any, ...], Any], after: dict[tuple[Any, ...], Any]) -> tuple[Counter[Any], Counter[Any]]:
    """Return the numbers of new and changed rows, by table, and the growth of their money, by table and currency."""
    counted, money = Counter[Any](), Counter[Any]()
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if old != new:
            counted[key[0], "appear" if old is None else "disappear" if new is None else "change"] += 1
            for row, sign in ((old, -1), (new, 1)):
                if row is not None and row.get("currency"):
                    worth = next((row[n] for n in ("amount_total", "total", "amount") if row.get(n) is not None), 0)
                    money[key[0], row["currency"]] += sign * worth
    return counted, Counter({key: amount for key, amount in money.items() if amount})


def test_a_plan_comes_true(engine: Engine, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """For any history, partly known already, the plan foresees the rows that then appear and change."""
    seed = int(request.config.getoption("hypothesis_seed"))
    chance = random.Random(seed)
    path = tmp_path / "log"
    changed = Counter[Any]()
    for number in range(12):
        bodies = bodies_of(seed + number)
        known = chance.sample(bodies, chance.randint(0, len(bodies)))
        ledger.take_in(engine, *known, account=f"acct_{number}")
        path.write_bytes(b"".join(msgspec.json.format(body, indent=-1) + b"\n" for body in bodies))
        changed += came_true(engine, path, f"acct_{number}", f"seed {seed + number}")
    assert {would for _, would in changed} >= {"appear", "change"}


def came_true(engine: Engine, path: Path, account: str, name: str) -> Counter[Any]:
    """Replay a log, and return the rows that appeared and changed after they are found to be those of the plan."""
    before, inboxed = at_rest(engine), rows(engine, "inbox")
    logs = Reading([str(path)], NOW, account=account)

    foreseen = _grouped(plan(engine, logs).rows)

    assert rows(engine, "inbox") == inboxed, name
    replay(engine, logs)
    came = moved(before, at_rest(engine))
    assert foreseen == came, name
    return came[0]


def test_a_plan_reckons_with_what_settles(engine: Engine, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The plan of an order's charges, or of a note's refund, is right, whichever of both the database has already."""
    seed = int(request.config.getoption("hypothesis_seed"))
    chance = random.Random(seed)
    path = tmp_path / "log"
    changed = Counter[Any]()
    cases = {name: case.events for name, case in test_settling.CASES.items()}
    cases |= {name: case.events for name, case in test_parts_of_notes.CASES.items()}
    for number, (name, events) in enumerate(cases.items()):
        sent = test_settling.bodies(events, str(number))
        # By chance, and in halves. The halves have each kind of change, so the seed cannot make the test fail.
        for way, known in (
            ("chance", chance.sample(sent, chance.randint(0, len(sent)))),
            ("half", sent[: len(sent) // 2]),
        ):
            account = f"acct_{way}_{number}"
            ledger.take_in(engine, *known, account=account)
            path.write_bytes(b"\n".join(sent) + b"\n")
            changed += came_true(engine, path, account, f"{name}, {way}, seed {seed}")
    assert changed.keys() >= {("orders", "change"), ("credit_notes", "change"), ("orders", "appear")}


def test_a_plan_with_pending_events(engine: Engine, tmp_path: Path) -> None:
    """A replay folds pending events too, and so the plan includes them."""
    account = Account(seed=21)
    session = account.open_session()
    account.emit("payfold.checkout.session.observed", account.session(session))
    account.advance(60)
    account.complete(session)
    about = [event for event in account.events if event.object_id == session]
    paid = next(event for event in about if event.type == "checkout.session.completed")
    ledger.record(engine, [ledger.delivery(paid.body)])

    foreseen = plan(engine, Reading([log(tmp_path / "log", about)], NOW)).rows

    assert [(row["rows_would"], row["status"]) for row in foreseen if row["table"] == "orders"] == [("appear", "paid")]


def _grouped(groups: Iterable[dict[str, Any]]) -> tuple[Counter[Any], Counter[Any]]:
    counted, money = Counter[Any](), Counter[Any]()
    for group in groups:
        counted[group["table"], group["rows_would"]] += group["rows"]
        money[group["table"], group["currency"]] += group["amount"] or 0
    return +counted, Counter({key: amount for key, amount in money.items() if amount})


def test_a_plan_as_it_is_read(database_url: str, engine: Engine, tmp_path: Path) -> None:
    """The command prints the rows by table, status and currency, with their money, and writes nothing."""
    path = log(tmp_path / "log", SHOP.events)
    paid = [session for session in SHOP.session_ids() if SHOP.expected_status(session) == "paid"]

    as_json = payfold("replay", path, "--dry-run", "--format", "json", DATABASE_URL=database_url)
    table = payfold("replay", path, "--dry-run", DATABASE_URL=database_url)

    assert (as_json.code, table.code, rows(engine, "inbox")) == (0, 0, [])
    groups = [each for each in as_json.json["plan"] if each["table"] == "orders" and each["status"] == "paid"]
    assert sum(each["rows"] for each in groups) == len(paid)
    total = output.money(groups[0]["amount"], groups[0]["currency"])
    assert any(line.split()[:3] == ["orders", "appear", "paid"] and total in line for line in table.out.splitlines())


# ---- Rejects ----


def test_rejects_are_corrected_and_replayed(database_url: str, engine: Engine, tmp_path: Path) -> None:
    """Every unreadable line is written to a file, with its place, and can be corrected there and replayed."""
    bodies = [msgspec.json.format(event.body, indent=-1) for event in SHOP.events]
    spoilt = list(bodies)
    spoilt[2] = bodies[2].replace(b'"', b"'", 1)
    spoilt[4] = bodies[4].replace(b'"type":', b'"type":"twice","type":', 1)
    spoilt[6] = bodies[6].replace(b'"type":', b'"tipe":', 1)
    spoilt[8] = bodies[8].replace(b'"id":', b'"\xe9":1,"id":', 1)
    spoilt[-1] = bodies[-1][:-5]
    long = b'{"id":"evt_long","note":"' + b"x" * 50 * 1024**2 + b'"}'
    (tmp_path / "log.gz").write_bytes(gzip.compress(b"\n".join([*spoilt[:5], long, *spoilt[5:]]), 1))
    rejects = tmp_path / "rejects"

    ran = payfold("replay", str(tmp_path / "log.gz"), "--rejects", str(rejects), DATABASE_URL=database_url)

    assert ran.code == 1
    remarks = [line for line in rejects.read_bytes().split(b"\n") if line.startswith(b"# ")]
    expected = [3, 5, 6, 8, 10, len(bodies) + 1]
    assert [int(line.split(b"log.gz: line ")[1].split(b":")[0]) for line in remarks] == expected
    assert all(f"log.gz: line {number}: " in ran.err for number in expected)
    assert len(rows(engine, "inbox")) == len(bodies) - 5

    text_of = rejects.read_bytes()
    assert long in text_of
    for wrong, right in zip(spoilt, bodies, strict=True):
        text_of = text_of.replace(wrong, right) if wrong != right else text_of
    rejects.write_bytes(text_of.replace(long, b""))
    again = payfold("replay", str(rejects), "--rejects", str(rejects), DATABASE_URL=database_url)

    assert (again.code, again.err) == (0, "")
    assert sorted(row[0] for row in _of(engine, "SELECT id FROM inbox")) == sorted(e.id for e in SHOP.events)


def test_rejects_of_an_array_over_many_lines(database_url: str, engine: Engine, tmp_path: Path) -> None:
    """The rest of a broken array goes into the file of rejects as an array, which is read once it is put right."""
    events = [event.payload() for event in SHOP.events]
    array, after = (msgspec.json.format(msgspec.json.encode(each)) for each in (events[:5], events[5]))
    mark = f'"{events[2]["id"]}"'.encode()
    (tmp_path / "log").write_bytes(array.replace(mark, mark[1:]) + b"\n" + after)
    rejects = tmp_path / "rejects"

    ran = payfold("replay", str(tmp_path / "log"), "--rejects", str(rejects), DATABASE_URL=database_url)
    first = {row[0] for row in _of(engine, "SELECT id FROM inbox")}
    rejects.write_bytes(rejects.read_bytes().replace(mark[1:], mark))
    again = payfold("replay", str(rejects), DATABASE_URL=database_url)

    assert (ran.code, first) == (1, {events[at]["id"] for at in (0, 1, 5)})
    assert (again.code, again.err) == (0, "")
    assert {row[0] for row in _of(engine, "SELECT id FROM inbox")} == {event["id"] for event in events[:6]}


def test_rejects_that_are_still_wrong(database_url: str, tmp_path: Path) -> None:
    """A file of rejects may be replayed with itself as file of rejects: lines that are still wrong stay in it."""
    rejects = log(tmp_path / "rejects", SHOP.events[:2], b"{cut", b"42")

    ran = payfold("replay", rejects, "--rejects", rejects, DATABASE_URL=database_url)

    assert ran.code == 1
    assert [line for line in Path(rejects).read_bytes().splitlines() if not line.startswith(b"# ")] == [b"{cut", b"42"]


def test_rejects_without_a_name(database_url: str, tmp_path: Path) -> None:
    """Without a named file rejects are written to one in the working folder, and the command prints its name."""
    path = log(tmp_path / "log", SHOP.events[:2], b"{cut")
    command = [sys.executable, "-m", "deploy", "replay", path]

    ran = subprocess.run(
        command, cwd=tmp_path, env=environment({"DATABASE_URL": database_url}), capture_output=True, check=False
    )

    (rejects,) = tmp_path.glob("payfold-rejects-*.ndjson")
    assert ran.returncode == 1
    assert rejects.name in ran.stderr.decode()
    assert rejects.read_bytes().splitlines()[1:] == [b"{cut"]


def test_a_plan_writes_no_rejects(database_url: str, tmp_path: Path) -> None:
    """A plan counts the unreadable lines, and writes no file of rejects."""
    path = log(tmp_path / "log", SHOP.events[:2], b"{cut")

    ran = payfold("replay", path, "--dry-run", "--rejects", str(tmp_path / "rejects"), DATABASE_URL=database_url)

    assert (ran.code, (tmp_path / "rejects").exists()) == (1, False)
    assert f"{path}: line 3: " in ran.err


# ---- Not announced ----


def announced(engine: Engine) -> list[tuple[Any, ...]]:
    """Return the changes in the feed."""
    return _of(engine, "SELECT kind, subject_id, event_id FROM changes WHERE withheld IS NULL ORDER BY seq")


def test_no_announce(database_url: str, engine: Engine, another_database_url: str, tmp_path: Path) -> None:
    """A first import may withhold its changes from the feed; it counts them, and the tables are the same."""
    path = log(tmp_path / "log", SHOP.events, *MIXED[:2])
    other = database.engine(another_database_url)
    met(other, path)
    kinds = dict(_of(other, "SELECT kind, count(*) FROM changes GROUP BY kind"))

    ran = payfold("replay", path, "--no-announce", "--format", "json", DATABASE_URL=database_url)

    assert (ran.code, ran.json["withheld"], ran.json["parked"]) == (1, kinds, 1)
    assert announced(engine) == []
    assert digests(engine) == digests(other)
    other.dispose()


def test_a_silent_import_of_an_event_that_cannot_be_folded(
    engine: Engine, another_database_url: str, tmp_path: Path
) -> None:
    """A silent import parks only the event of a row that PostgreSQL refuses, and announces nothing."""
    other = database.engine(another_database_url)
    for one in (engine, other):
        with database.transaction(one) as connection:
            connection.execute(text("ALTER TABLE orders ADD CHECK (amount_total < 9000)"))
    logs = Reading([log(tmp_path / "log", SHOP.events)], NOW)

    silent, loud = replay(engine, logs, withhold=True), replay(other, logs)

    assert silent.counts == loud.counts
    assert silent.counts["parked"] > 0
    assert announced(engine) == []
    assert digests(engine) == digests(other)
    other.dispose()


def test_events_after_a_silent_import_are_announced(database_url: str, engine: Engine, tmp_path: Path) -> None:
    """Events after a silent import are announced, and then no replay can be a first import."""
    paid = next(e for e in SHOP.events if e.type == "checkout.session.completed")
    path = log(tmp_path / "log", [event for event in SHOP.events if event is not paid])
    payfold("replay", path, "--no-announce", DATABASE_URL=database_url)
    assert payfold("replay", path, "--no-announce", DATABASE_URL=database_url).code == 0

    ledger.take_in(engine, paid.body)

    assert {row[2] for row in announced(engine)} == {paid.id}
    again = payfold("replay", path, "--no-announce", DATABASE_URL=database_url)
    assert again.code == 1
    assert "no first import" in again.err


def test_a_delivery_during_a_silent_import_is_announced(engine: Engine, tmp_path: Path) -> None:
    """A delivery that waits while a silent import folds is announced, although the import folds it."""
    link = next(e for e in shop_history(7, 10).events if e.type == "payment_link.created")
    ledger.record(engine, [ledger.delivery(link.body)])

    done = replay(engine, Reading([log(tmp_path / "log", SHOP.events)], NOW), withhold=True)

    assert done.withheld["order.paid"] > 0
    assert [(kind, event) for kind, _, event in announced(engine)] == [("payment_link.activated", link.id)]


def test_a_reading_during_a_silent_import_is_announced(engine: Engine, tmp_path: Path) -> None:
    """A session that the clock finds during a silent import is announced; sessions observed in the log are not."""
    observed = {name: shop_history(seed, 1) for name, seed in (("then", 11), ("now", 12))}
    kind = "payfold.checkout.session.observed"
    opened = {name: shop.open_session() for name, shop in observed.items()}
    bodies = {name: shop.emit(kind, shop.session(opened[name])).body for name, shop in observed.items()}
    lines = [
        writer.line_of("", "observation", NOW, None, hashlib.sha256(bodies["then"]).hexdigest(), [], bodies["then"]),
    ]
    path = tmp_path / "log"
    path.write_bytes(b"".join(lines))
    ledger.record(engine, [ledger.delivery(bodies["now"], source="observation")])

    done = replay(engine, Reading([str(path)], NOW), withhold=True)

    assert done.withheld == {"order.opened": 1}
    assert [(kind, order) for kind, order, _ in announced(engine)] == [("order.opened", opened["now"])]


def test_a_fault_during_a_silent_import_announces_nothing(engine: Engine, tmp_path: Path) -> None:
    """A silent import parks a delivery that cannot be folded, and announces no event of the log."""
    other = shop_history(13, 1)
    poisonous = other.open_session(amount=9_999)
    other.complete(poisonous)
    with database.transaction(engine) as connection:
        connection.execute(text("ALTER TABLE orders ADD CHECK (amount_total <> 9999)"))
    ledger.record(engine, [ledger.delivery(e.body) for e in other.events if e.object_id == poisonous])

    done = replay(engine, Reading([log(tmp_path / "log", SHOP.events)], NOW), withhold=True)

    assert done.withheld["order.paid"] > 0
    assert announced(engine) == []
    assert {state for (state,) in _of(engine, "SELECT state FROM events WHERE source = 'webhook'")} == {"parked"}


# ---- Folded by others ----


def test_record_only(database_url: str, engine: Engine, another_database_url: str, tmp_path: Path) -> None:
    """With --record-only any number of workers fold, and the command ends when they are done, with their outcomes."""
    path = log(tmp_path / "log", SHOP.events, *MIXED[:2])
    other = database.engine(another_database_url)
    foreseen = met(other, path)
    output = tmp_path / "out"
    with started(
        "replay",
        path,
        "--record-only",
        "--format",
        "json",
        stdout=output,
        stderr=tmp_path / "err",
        DATABASE_URL=database_url,
    ) as process:
        while process.poll() is None:
            ledger.fold_with_workers(engine, 2, limit=7)

    assert process.returncode == 1  # one event ends parked
    counted = msgspec.json.decode(output.read_bytes())
    assert [each["example"] for each in counted.pop("parked_by_cause")] == ["evt_parked"]
    assert {name: count for name, count in counted.items() if count} == foreseen
    assert digests(engine) == digests(other)
    other.dispose()


def test_no_worker_folds(engine: Engine) -> None:
    """A replay that waits for workers reports their progress, wakes them, and gives up when they stop."""
    ledger.record(engine, [ledger.delivery(event.body) for event in SHOP.events[:10]])
    reported: list[tuple[int, int]] = []
    woken: list[None] = []

    def pause(_: float) -> None:
        if len(woken) <= 3:
            projection.run_once(engine, now=NOW, limit=2)

    left = follow(
        engine,
        wake=lambda: woken.append(None),
        progress=lambda done, total: reported.append((done, total)),
        patience_seconds=2,
        pause=pause,
    )

    assert left == 4
    assert reported[:4] == [(2, 10), (4, 10), (6, 10), (6, 10)]
    assert len(woken) == len(reported) == 3 + 4


# ---- Export ----


def lived_in(engine: Engine) -> None:
    """Fill an inbox with every kind of entry: signed, of accounts and modes, odd, and an operator's observation."""
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
    retry.ignore(engine, "evt_parked", reason="not ours", now=NOW)
    with database.transaction(engine) as connection:
        connection.execute(text("UPDATE inbox SET signature = 't=1,v1=' || id WHERE source = 'webhook'"))


KEPT = """
SELECT account, livemode, id, type, api_version, created, object_type, object_id, payload, redacted, payload_sha256,
    signature, received_at, state, reason
FROM events ORDER BY account, livemode, id
"""


@pytest.mark.parametrize("ending", ["ndjson", "gz", "zst", "log"])
def test_export_and_replay(
    engine: Engine, database_url: str, another_database_url: str, tmp_path: Path, ending: str
) -> None:
    """An export replayed into an empty database gives the same digest, and each event as it was recorded."""
    lived_in(engine)
    path = str(tmp_path / f"events.{ending}")

    exported = payfold("events", "export", "--output", path, DATABASE_URL=database_url)
    replayed = payfold("replay", path, "--format", "json", DATABASE_URL=another_database_url)

    other = database.engine(another_database_url)
    assert (exported.code, exported.out) == (0, "")
    assert (replayed.code, replayed.json["parked"]) == (1, 1)
    assert replayed.json["new"] == len(rows(engine, "inbox")) == replayed.json["seen"]
    assert digests(other) == digests(engine)
    assert _of(other, KEPT) == _of(engine, KEPT)
    assert sum(len(row[9]) for row in _of(other, KEPT)) > 0
    assert payfold("digest", DATABASE_URL=another_database_url).out == payfold("digest", DATABASE_URL=database_url).out
    other.dispose()


def test_hash_of_the_original(engine: Engine, tmp_path: Path) -> None:
    """The hash of a delivery covers its body with the credentials, which payload and export no longer have."""
    lived_in(engine)
    secret = b"a-long-secret"
    exported = list(export(engine, filters=NOTHING))

    assert not any(secret in line for line in exported)
    blanked = [row for row in _of(engine, KEPT) if "data.object.url" in row[9]]
    assert blanked
    assert all(hashlib.sha256(bytes(row[8])).hexdigest() != row[10] for row in blanked)


def test_export_through_pipes(database_url: str, engine: Engine, another_database_url: str) -> None:
    """An export to stdout can be compressed in a pipe and replayed from stdin."""
    lived_in(engine)
    exported = payfold("events", "export", "--plain", DATABASE_URL=database_url).out.encode()

    first = payfold("replay", "-", "--format", "json", stdin=gzip.compress(exported), DATABASE_URL=another_database_url)
    second = payfold(
        "replay", "-", "--format", "json", stdin=zstd.compress(exported), DATABASE_URL=another_database_url
    )

    assert (first.code, first.json["parked"], second.code) == (1, 1, 0)
    assert first.json["new"] == second.json["duplicate"] == exported.count(b"\n")


def test_export_is_compressed_and_stable(database_url: str, engine: Engine, tmp_path: Path) -> None:
    """An export is compressed by Zstandard unless another form is requested; two exports are equal byte for byte."""
    lived_in(engine)
    settings = environment({"DATABASE_URL": database_url})
    command = [sys.executable, "-m", "deploy", "events", "export"]

    piped, again = (subprocess.run(command, stdout=subprocess.PIPE, env=settings, check=True).stdout for _ in range(2))
    payfold("events", "export", "-o", str(tmp_path / "log"), DATABASE_URL=database_url)

    plain = payfold("events", "export", "--plain", DATABASE_URL=database_url).out.encode()
    assert piped == again
    for one in (piped, (tmp_path / "log").read_bytes()):
        assert one.startswith(b"\x28\xb5\x2f\xfd")
        assert zstd.decompress(one) == plain


def test_exported_signature(engine: Engine, another_database_url: str, tmp_path: Path) -> None:
    """The secret verifies a delivery by its line in an export, and in an export after a replay of the first."""
    event = next(e for e in SHOP.events if e.type == "payment_link.created")
    header = sign(event.body, "whsec_test", event.created)
    ledger.record(engine, [replace(ledger.delivery(event.body), signature=header)])
    (tmp_path / "log").write_bytes(b"".join(export(engine, filters=NOTHING)))
    other = database.engine(another_database_url)
    met(other, str(tmp_path / "log"))

    (line,) = map(msgspec.json.decode, export(other, filters=NOTHING))
    other.dispose()

    assert stripe.WebhookSignature.verify_header(line["payload"], line["signature"], "whsec_test", tolerance=None)


def test_export_of_a_span(database_url: str, engine: Engine) -> None:
    """An export may be limited to the events created from one time up to another."""
    lived_in(engine)
    times = sorted({event.created for event in SHOP.events})
    since, until = (f"{datetime.fromtimestamp(times[at], UTC):%Y-%m-%dT%H:%M:%S}" for at in (2, -2))

    span = ("--since", f"{since}+00:00", "--until", until)
    ran = payfold("events", "export", "--plain", *span, DATABASE_URL=database_url)

    ids = [msgspec.json.decode(msgspec.json.decode(line)["payload"])["id"] for line in ran.out.splitlines()]
    within = f"created >= '{since}Z' AND created < '{until}Z'"
    held = _of(engine, f"SELECT id FROM inbox WHERE {within} ORDER BY seq")  # noqa: S608 - our own times
    assert [(each,) for each in ids] == held
    assert 0 < len(held) < len(rows(engine, "inbox"))


# ---- The command ----


def test_command(database_url: str, engine: Engine, tmp_path: Path) -> None:
    """The command prints faults with file and line on stderr, counts on stdout, exits 1, and records the rest."""
    good, bad = log(tmp_path / "good", SHOP.events[:4]), log(tmp_path / "bad", SHOP.events[4:8], b"{cut", b"42")

    ran = payfold("replay", bad, good, "--rejects", str(tmp_path / "rejects"), DATABASE_URL=database_url)

    assert ran.code == 1
    faults = [line for line in ran.err.splitlines() if line.startswith(bad)]
    assert [line.removeprefix(bad)[:9] for line in faults] == [": line 5:", ": line 6:"]
    counts = dict(line.rsplit(maxsplit=1) for line in ran.out.splitlines())
    assert (counts["seen"], counts["new"], counts["refused"]) == ("10", "8", "2")
    assert len(rows(engine, "inbox")) == 8


def test_why_events_are_parked(database_url: str, engine: Engine, another_database_url: str, tmp_path: Path) -> None:
    """Parked events are listed by cause, with a count, an example and a command, also as JSON, with exit 1."""
    other = database.engine(another_database_url)
    for one in (engine, other):
        with database.transaction(one) as connection:
            connection.execute(text("ALTER TABLE payment_links ADD CHECK (url <> 'refused')"))
    link = {"id": "plink_1", "object": "payment_link", "active": "maybe"}
    parked = [odd(id=f"evt_parked_{number}", data={"object": link}) for number in range(2)]
    refused = {"id": "plink_2", "object": "payment_link", "active": True, "url": "refused"}
    path = log(tmp_path / "log", SHOP.events[:2], *parked, odd(id="evt_refused", data={"object": refused}))

    table = payfold("replay", path, DATABASE_URL=database_url)
    as_json = payfold("replay", path, "--format", "json", DATABASE_URL=another_database_url)

    rows_of = ledger.rows(
        engine,
        "SELECT cause, reason, count(*) AS events, min(id) AS example FROM events WHERE state = 'parked'"
        " GROUP BY 1, 2 ORDER BY 3 DESC",
    )
    assert (table.code, as_json.code, as_json.json["parked"]) == (1, 1, 3)
    assert as_json.json["parked_by_cause"] == rows_of
    assert [(each["events"], each["example"]) for each in rows_of] == [(2, "evt_parked_0"), (1, "evt_refused")]
    lines = table.out.splitlines()
    heads = next(number for number, line in enumerate(lines) if line.startswith("parked because"))
    assert [line.split()[:3] for line in lines[heads + 1 :]] == [
        [each["cause"], str(each["events"]), each["example"]] for each in rows_of
    ]
    assert "payfold events list --state parked" in table.err
    assert "payfold events retry EVENT" in table.err
    assert payfold("replay", path, DATABASE_URL=database_url).code == 0
    other.dispose()


def test_command_is_quiet(database_url: str, tmp_path: Path) -> None:
    """Without a fault the command prints only the counts."""
    ran = payfold("replay", log(tmp_path / "log", SHOP.events), DATABASE_URL=database_url)

    assert (ran.code, ran.err) == (0, "")


def test_options_that_exclude_each_other(database_url: str, tmp_path: Path) -> None:
    """Changes that workers fold cannot be withheld, so that --record-only and --no-announce are refused together."""
    path = log(tmp_path / "log", SHOP.events)

    ran = payfold("replay", path, "--record-only", "--no-announce", DATABASE_URL=database_url)

    assert (ran.code, ran.out) == (2, "")
    assert "--record-only" in ran.err


def test_patterns(database_url: str, engine: Engine, tmp_path: Path) -> None:
    """A pattern that no shell has expanded stands for the files that match it."""
    log(tmp_path / "1.ndjson", SHOP.events[:5])
    (tmp_path / "deep").mkdir()
    log(tmp_path / "deep" / "2.ndjson", SHOP.events[5:9])
    log(tmp_path / "other.txt", SHOP.events[9:])

    ran = payfold("replay", f"{tmp_path}/**/*.ndjson", "--format", "json", DATABASE_URL=database_url)

    assert (ran.code, ran.json["new"], len(rows(engine, "inbox"))) == (0, 9, 9)


@pytest.mark.parametrize("kind", ["missing", "folder", "time", "pattern"])
def test_command_refuses(database_url: str, engine: Engine, tmp_path: Path, kind: str) -> None:
    """An impossible option is refused with exit 2, before the first event is recorded."""
    good = log(tmp_path / "good", SHOP.events)
    more = {"missing": str(tmp_path / "missing"), "folder": str(tmp_path), "time": "--since=noon", "pattern": "*.none"}[
        kind
    ]

    ran = payfold("replay", good, more, DATABASE_URL=database_url)

    assert (ran.code, ran.out) == (2, "")
    assert more.removeprefix("--since=") in ran.err
    assert rows(engine, "inbox") == []


def test_a_page_that_is_not_the_last(database_url: str, tmp_path: Path) -> None:
    """The command warns of a list page that has more, on stderr and in the JSON, and exits 0."""
    page = {"object": "list", "has_more": True, "data": [SHOP.events[0].payload()]}
    path = tmp_path / "page.json"
    path.write_bytes(msgspec.json.encode(page))

    ran = payfold("replay", str(path), "--format", "json", DATABASE_URL=database_url)

    place = f"{path}: line 1: this page of a list says has_more: there are older events that it does not hold"
    assert (ran.code, ran.json["new"], ran.json["warnings"]) == (0, 1, [place])
    assert f"warning: {place}" in " ".join(ran.err.split())
