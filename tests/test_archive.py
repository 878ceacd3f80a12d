"""Old payloads are moved into logs that can be replayed, without loss, and archived events can still be read."""

import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, text

from deploy.sandbox.account import Account, Event
from deploy.sandbox.history import shop_history
from deploy.sandbox.rendering import render
from deploy.sandbox.samples import sample
from schemas import database
from schemas.errors import ConfigurationError, ConflictError
from schemas.locks import keep_others_from_folding
from schemas.progress import do_nothing
from tests import command, ledger
from tests.test_replay import lived_in
from tests.waiting import until, until_locked
from worker.folding.claim import queue_outdated
from worker.logs import archive, retry
from worker.logs.archive import Done
from worker.logs.compression import zstd
from worker.proof import rebuild, swap
from worker.proof.archived import with_archived
from worker.proof.digest import digests
from worker.proof.rebuild import Sizes

SHOP = shop_history(31, 120, money=True)
TIMES = sorted(event.created for event in SHOP.events)
HALF = datetime.fromtimestamp(TIMES[len(TIMES) // 2], UTC)
LATER = datetime(2099, 1, 1, tzinfo=UTC)
MANY_PROCESSES = Sizes(per_part=100, per_task=150, alone_max=0)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Return an engine on the empty database."""
    made = database.engine(database_url, connections_max=9)
    yield made
    made.dispose()


@pytest.fixture
def another(another_database_url: str) -> Iterator[Engine]:
    """Return an engine on another empty database."""
    made = database.engine(another_database_url)
    yield made
    made.dispose()


@pytest.fixture
def shop(engine: Engine) -> Engine:
    """Return an engine on a database with a shop's events, folded."""
    ledger.record(engine, [ledger.delivery(event.body) for event in SHOP.events])
    ledger.fold(engine)
    return engine


@pytest.fixture
def folder(pytestconfig: pytest.Config) -> Iterator[Path]:
    """Return a folder that the command accepts as permanent if the temporary files are elsewhere."""
    # The cache is in the checkout, and so on disk.
    with tempfile.TemporaryDirectory(dir=pytestconfig.cache.mkdir("archive")) as made:
        yield Path(made)


@pytest.fixture
def run(database_url: str, tmp_path: Path) -> Callable[..., command.Ran]:
    """Return a function that runs the command on the database."""

    def ran(*arguments: object, **settings: str) -> command.Ran:
        named = {"DATABASE_URL": database_url, "TMPDIR": str(tmp_path), **settings}
        done = command.python("deploy", *map(str, arguments), settings=named)
        assert "Traceback" not in done.err, done.err
        return done

    return ran


def archived(engine: Engine, folder: Path, before: datetime = LATER) -> list[Done]:
    """Archive the events that were created before *before*."""
    return [archive.archive(engine, part, before=before, folder=folder) for part in archive.plan(engine, before=before)]


def count(engine: Engine, rest: str) -> int:
    """Return the number of rows that *rest* selects."""
    (row,) = ledger.rows(engine, f"SELECT count(*) AS found FROM {rest}")  # noqa: S608 - our own statements
    found: int = row["found"]
    return found


def size_of(engine: Engine, partition: str = "payloads_from_0") -> int:
    """Return the size of a partition in bytes."""
    (row,) = ledger.rows(engine, "SELECT pg_total_relation_size(CAST(:name AS regclass)) AS bytes", name=partition)
    size: int = row["bytes"]
    return size


def at_rest(engine: Engine) -> list[Any]:
    """Return all data that archiving must not change."""
    names = ("inbox", "pending", "outcomes", "mentions", "changes", "anomalies")
    return [digests(engine), *(ledger.rows(engine, f"SELECT * FROM {name} AS t ORDER BY t") for name in names)]  # noqa: S608


def payloads(engine: Engine) -> dict[int, bytes]:
    """Return the payloads that are not archived, by the numbers of their events."""
    return {row["seq"]: bytes(row["payload"]) for row in ledger.rows(engine, "SELECT * FROM payloads")}


def link(at: int, link_id: str = "plink_1", **fields: Any) -> Event:  # noqa: ANN401 - a link's own
    """Return an event of a payment link, created *at*."""
    return sample("payment_link.updated", {"id": link_id, **fields}, now=at)


# ---- Archiving ----


def test_only_payloads_are_deleted(shop: Engine, folder: Path) -> None:
    """Archiving changes no table but the payloads, which are deleted, and their partition frees its space."""
    before, held, size = at_rest(shop), payloads(shop), size_of(shop)

    (done,) = archived(shop, folder)

    assert at_rest(shop) == before
    assert (done.dropped, done.stayed, done.part.events) == (len(held), 0, len(held))
    assert payloads(shop) == {}
    assert size_of(shop) < size / 10
    assert [path.name for path in folder.iterdir()] == [f"payfold-events-{min(held)}-{max(held)}.ndjson.zst"]
    assert archive.plan(shop, before=LATER) == []


def test_only_old_events_are_archived(shop: Engine, folder: Path) -> None:
    """Events created later keep their payloads; in a shared partition the old ones are deleted one by one."""
    held = payloads(shop)
    old = {row["seq"] for row in ledger.rows(shop, "SELECT seq FROM inbox WHERE created < :half", half=HALF)}

    (done,) = archived(shop, folder, HALF)

    assert 0 < done.dropped == len(old) < len(held)
    assert payloads(shop) == {seq: payload for seq, payload in held.items() if seq not in old}


def test_parked_and_pending_events_keep_their_payloads(shop: Engine, folder: Path) -> None:
    """Parked and pending events keep their payloads, in a partition that is otherwise emptied."""
    odd = Account(seed=1).emit("refund.created", {"object": "charge", "id": "ch_odd"})
    ledger.record(shop, [ledger.delivery(odd.body)])
    ledger.fold(shop)
    ledger.record(shop, [ledger.delivery(link(5).body)])
    size = size_of(shop)

    (done,) = archived(shop, folder)

    assert (done.dropped, done.stayed) == (len(SHOP.events), 0)
    assert {row["state"] for row in ledger.rows(shop, "SELECT state FROM events JOIN payloads USING (seq)")} == {
        "parked",
        "pending",
    }
    assert size_of(shop) < size / 10
    assert ledger.fold(shop) == 1


def test_replayed(shop: Engine, another: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """The logs, replayed into an empty database, give the same tables and the same recorded events."""
    before = digests(shop)
    archived(shop, folder, HALF)
    archived(shop, folder)
    url = another.url.render_as_string(hide_password=False)

    ran = run("replay", *folder.iterdir(), "--format", "json", DATABASE_URL=url)

    assert (ran.code, ran.json["new"], ran.json["refused"]) == (0, len(SHOP.events), 0)
    assert digests(another) == before == digests(shop)
    kept = "SELECT account, livemode, id, created, redacted, payload_sha256, signature, received_at FROM events"
    assert ledger.rows(another, f"{kept} ORDER BY id") == ledger.rows(shop, f"{kept} ORDER BY id")


def test_every_content_of_an_inbox(engine: Engine, folder: Path) -> None:
    """Accounts, modes, blanked credentials, odd bodies and operators' decisions are kept to the byte."""
    lived_in(engine)
    words = "SELECT id, state, reason FROM events ORDER BY id"
    before, held, outcomes = at_rest(engine), payloads(engine), ledger.rows(engine, words)
    (parked,) = (row["seq"] for row in ledger.rows(engine, "SELECT seq FROM outcomes WHERE state = 'parked'"))
    (done,) = archived(engine, folder)
    assert (done.dropped, payloads(engine)) == (len(held) - 1, {parked: held.pop(parked)})
    assert at_rest(engine) == before

    with with_archived(engine, folder, progress=do_nothing) as made:
        rebuild.rebuild(made)
        assert digests(engine, schema=made.schema) == before[0]
        kept = ledger.rows(engine, f"SELECT * FROM {made.schema}.archived")  # noqa: S608 - our own name
        assert {row["seq"]: bytes(row["payload"]) for row in kept} == held
        assert swap.swap(made)[0].drift == 0

    assert ledger.rows(engine, words) == outcomes


def test_a_duplicate_of_an_archived_event(shop: Engine, folder: Path) -> None:
    """Another delivery of an archived event is a duplicate, and adds no payload."""
    archived(shop, folder)
    receipts = ledger.record(shop, [ledger.delivery(event.body) for event in SHOP.events[:50]])

    assert {receipt.recorded.value for receipt in receipts} == {"duplicate"}
    assert payloads(shop) == {}


def test_several_partitions(shop: Engine, folder: Path) -> None:
    """Each partition has a log of its own."""
    ledger.execute(shop, "ALTER TABLE inbox ALTER COLUMN seq RESTART WITH 1000000")
    ledger.take_in(shop, link(5).body, link(6).body)

    done = archived(shop, folder)

    assert [(each.part.partition, each.dropped) for each in done] == [
        ("payloads_from_0", len(SHOP.events)),
        ("payloads_from_1000000", 2),
    ]
    assert sorted(path.name for path in folder.iterdir())[1] == "payfold-events-1000000-1000001.ndjson.zst"


# ---- Rebuilds ----


@pytest.mark.parametrize("sizes", [Sizes(), MANY_PROCESSES], ids=["one process", "many processes"])
@pytest.mark.parametrize("before", [HALF, LATER], ids=["half", "all"])
def test_a_rebuild_with_the_archive(shop: Engine, folder: Path, sizes: Sizes, before: datetime) -> None:
    """A rebuild with the archive gives the tables from before archiving, outcomes and mentions included."""
    archived(shop, folder, before)

    with with_archived(shop, folder, progress=do_nothing) as made:
        rebuild.rebuild(made, sizes=sizes)
        found = swap.compare(made, on_difference=do_nothing)

        assert digests(shop, schema=made.schema) == digests(shop)
        assert (found.drift, found.events_left_out) == (0, 0)
        for name in ("mentions", "outcomes"):
            held, rebuilt = f"SELECT * FROM public.{name}", f"SELECT * FROM {made.schema}.{name}"  # noqa: S608
            assert count(shop, f"({held} EXCEPT {rebuilt}) AS missing") == 0
            assert count(shop, f"({rebuilt} EXCEPT {held}) AS extra") == 0


def test_a_rebuild_without_it(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """A rebuild without the archive compares all objects but those with archived events, and reports these."""
    archived(shop, folder, HALF)
    (of_order,) = ledger.rows(
        shop,
        "SELECT (SELECT max(id) FROM orders) AS at_hand, (SELECT min(object_id) FROM events"
        " WHERE payload IS NULL AND object_type = 'checkout.session') AS archived",
    )

    clean = run("rebuild", "--format", "json")
    ledger.execute(shop, "UPDATE orders SET amount_total = amount_total + 1 WHERE id = :id", id=of_order["archived"])
    of_archived = run("rebuild", "--format", "json")
    (order,) = ledger.rows(
        shop,
        "SELECT id FROM orders AS o WHERE amount_total IS NOT NULL AND NOT EXISTS"
        " (SELECT FROM events AS e WHERE e.object_id = o.id AND e.payload IS NULL) LIMIT 1",
    )
    ledger.execute(shop, "UPDATE orders SET amount_total = amount_total + 1 WHERE id = :id", id=order["id"])
    of_both = run("rebuild", "--format", "json")
    with_it = run("rebuild", "--archive", folder)

    objects = count(
        shop, "(SELECT DISTINCT object_id FROM events WHERE payload IS NULL AND object_id IS NOT NULL) AS x"
    )
    events = count(shop, "events WHERE payload IS NULL")
    assert (clean.code, clean.json["drift"]) == (0, 0)
    assert clean.json["left_out"]["events"] == events
    assert clean.json["left_out"]["objects"] >= objects
    assert sum(each["live"] for each in clean.json["tables"]) > 0
    assert (of_archived.code, of_archived.json["drift"]) == (0, 0)
    assert (of_both.code, [each["id"] for each in of_both.json["differences"]]) == (3, [order["id"]])
    assert with_it.code == 3
    assert "2 rows are not what the events say" in with_it.err
    assert "Left out: " in run("rebuild").err


def test_a_swap(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """With archived events a swap without the archive is refused and changes nothing; with it the swap repairs all."""
    before = digests(shop)
    archived(shop, folder, HALF)
    ledger.execute(shop, "UPDATE orders SET amount_total = amount_total + 1")
    wrong = digests(shop)

    refused = run("rebuild", "--swap")
    assert (refused.code, digests(shop)) == (1, wrong)
    assert "--archive DIR" in refused.err
    assert f"{count(shop, 'events WHERE payload IS NULL'):,} events of" in refused.err

    assert run("rebuild", "--swap", "--archive", folder).code == 0
    assert digests(shop) == before
    assert run("rebuild", "--archive", folder).code == 0


def test_reconcile(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """Reconciliation covers events with a payload, or all with the archive; it repairs only if it covers all."""
    archived(shop, folder, HALF)

    without, with_it = run("reconcile", "--format", "json"), run("reconcile", "--format", "json", "--archive", folder)
    assert (without.code, without.json["drift_total"]) == (0, 0)
    assert without.json["left_out"]["events"] == count(shop, "events WHERE payload IS NULL")
    assert (with_it.code, with_it.json["drift_total"], "left_out" in with_it.json) == (0, 0, False)
    rebuilt = {each["table"]: each["rebuilt"] for each in with_it.json["tables"]}
    assert rebuilt["orders"] == count(shop, "orders")

    ledger.execute(shop, "UPDATE orders SET amount_total = amount_total + 1")
    refused = run("reconcile", "--repair")
    assert (refused.code, "--archive DIR" in refused.err) == (1, True)
    repaired = run("reconcile", "--repair", "--archive", folder, "--format", "json")
    assert (repaired.code, repaired.json["drift_total"]) == (0, 0)
    page = folder / "report.html"
    run("reconcile", "--report", page)
    assert "archived events." in page.read_text()


def test_against_a_log(shop: Engine, folder: Path, tmp_path: Path, run: Callable[..., command.Ran]) -> None:
    """An archived event is compared with a log by its hash, and with the archive by its content."""
    path, other = tmp_path / "all.zst", tmp_path / "other.ndjson"
    assert run("events", "export", "-o", path).code == 0
    events = [event.payload() for event in SHOP.events]
    changed = next(event for event in events if event["type"] == "checkout.session.completed")
    changed["data"]["object"]["amount_total"] += 1
    other.write_bytes(b"\n".join(msgspec.json.encode(event) for event in events))
    archived(shop, folder)

    ours = run("reconcile", "--log", path, "--format", "json")
    theirs = run("reconcile", "--log", other, "--format", "json")
    with_it = run("reconcile", "--log", other, "--archive", folder, "--format", "json")

    assert (ours.code, "archived" in ours.json["logs"]) == (0, False)
    assert (theirs.code, theirs.json["logs"]["different"]) == (0, 0)
    assert theirs.json["logs"]["archived"] > 0
    assert (with_it.code, with_it.json["logs"]["different"]) == (3, 1)
    assert [each["id"] for each in with_it.json["drift"]] == [changed["id"]]


def test_events_during_a_rebuild(shop: Engine, folder: Path) -> None:
    """Events that arrive during a rebuild are no difference, even of objects with archived events."""
    archived(shop, folder, HALF)
    sold = Account(seed=77)
    sold.complete(sold.open_session(amount=500))
    customer = next(event for event in SHOP.events if event.type == "customer.created")
    created = customer.payload()
    again = sample("customer.updated", created["data"]["object"], now=TIMES[-1] + 100)

    with with_archived(shop, None, progress=do_nothing) as made:
        rebuild.rebuild(made)
        ledger.record(shop, [ledger.delivery(event.body) for event in (*sold.events, again)])
        ledger.fold(shop)
        assert swap.compare(made, on_difference=do_nothing).drift == 0

    with with_archived(shop, folder, progress=do_nothing) as made:
        rebuild.rebuild(made)
        ledger.record(shop, [ledger.delivery(link(TIMES[-1]).body)])
        ledger.fold(shop)
        assert swap.compare(made, on_difference=do_nothing).drift == 0


# ---- An archive at fault ----


def test_an_incomplete_archive(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """A missing log, a damaged log and a missing folder are each reported, and nothing is compared."""
    archived(shop, folder, HALF)
    archived(shop, folder)
    first, second = sorted(folder.iterdir())
    whole = first.read_bytes()

    first.unlink()
    missing = run("rebuild", "--archive", folder)
    first.write_bytes(whole[:-9])
    cut = run("reconcile", "--archive", folder)
    middle = len(whole) // 2
    first.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    flipped = run("rebuild", "--archive", folder)
    second.unlink()
    first.unlink()

    assert (missing.code, "lacks the payloads of" in missing.err) == (1, True)
    assert (cut.code, f"{first}: line" in cut.err) == (1, True)
    assert (flipped.code, f"{first}: line" in flipped.err) == (1, True)
    assert run("rebuild", "--archive", folder).code == 2
    assert run("rebuild", "--archive", folder / "none").code == 2


def test_another_rendering_is_not_taken(shop: Engine, folder: Path) -> None:
    """A payload in the archive with another hash than the inbox's is not used."""
    archived(shop, folder)
    ledger.execute(shop, "UPDATE inbox SET payload_sha256 = sha256('x') WHERE seq = (SELECT min(seq) FROM inbox)")

    with (
        pytest.raises(ConflictError, match="lacks the payloads of 1 events"),
        with_archived(shop, folder, progress=do_nothing),
    ):
        pass


# ---- Kills ----


@pytest.fixture
def started(database_url: str, folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Return the command, running in a process of its own."""
    arguments = ("events", "archive", "--before", "2099-01-01", "--to", str(folder), "--yes")
    with command.started(
        *arguments,
        stdout=tmp_path / "out",
        stderr=tmp_path / "err",
        DATABASE_URL=database_url,
        TMPDIR=str(tmp_path),
    ) as process:
        yield process


HERE = "(SELECT oid FROM pg_database WHERE datname = current_database())"


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the command at once."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def let_go(engine: Engine) -> None:
    """Wait until the server has noticed the end of the killed command and rolled its transaction back."""
    until(lambda: not count(engine, f"pg_locks WHERE pid <> pg_backend_pid() AND database = {HERE}"))


def whole(engine: Engine, folder: Path, before: list[Any]) -> None:
    """Check that a second run archives all events, and that nothing was lost."""
    archived(engine, folder)
    assert payloads(engine) == {}
    assert at_rest(engine) == before
    with with_archived(engine, folder, progress=do_nothing) as made:
        rebuild.rebuild(made)
        assert digests(engine, schema=made.schema) == before[0]


def test_killed_between_file_and_drop(shop: Engine, folder: Path, request: pytest.FixtureRequest) -> None:
    """After a kill between the renaming of the log and the deletion of payloads, the next run recognises the log."""
    before, held = at_rest(shop), payloads(shop)
    with database.transaction(shop) as connection, database.cursor(connection) as cursor:
        keep_others_from_folding(cursor)
        process = request.getfixturevalue("started")
        until_locked(shop)
        kill(process)
    (log,) = folder.iterdir()
    written = log.read_bytes()
    let_go(shop)

    assert payloads(shop) == held
    whole(shop, folder, before)
    assert [path.read_bytes() for path in folder.iterdir()] == [written]


def test_killed_between_partitions(shop: Engine, folder: Path, request: pytest.FixtureRequest) -> None:
    """After a kill between two partitions the next run archives the second one."""
    ledger.execute(shop, "ALTER TABLE inbox ALTER COLUMN seq RESTART WITH 1000000")
    ledger.take_in(shop, link(5).body, link(6).body)
    before = at_rest(shop)
    with database.transaction(shop) as connection:
        connection.execute(text("SELECT FROM payloads_from_1000000"))  # which keeps it from being emptied
        process = request.getfixturevalue("started")
        until_locked(shop, kind="relation")
        kill(process)
    let_go(shop)

    assert sorted(payloads(shop)) == [1_000_000, 1_000_001]
    assert len(list(folder.iterdir())) == 2
    whole(shop, folder, before)
    assert len(list(folder.iterdir())) == 2


def test_files_of_a_killed_run(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """An unfinished log is ignored, and a log of other events with the same name is not overwritten."""
    before, held = at_rest(shop), payloads(shop)
    name = f"payfold-events-{min(held)}-{max(held)}"
    (folder / f"{name}.ndjson.zst.part").write_bytes(b"half a lo")
    (folder / f"{name}.ndjson.zst").write_bytes(zstd.compress(b""))

    assert run("events", "archive", "--before", "2099-01-01", "--to", folder, "--yes").code == 0

    whole(shop, folder, before)
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}-2.ndjson.zst", f"{name}.ndjson.zst"]
    assert (folder / f"{name}.ndjson.zst").read_bytes() == zstd.compress(b"")


# ---- Changes during archiving ----


def archive_during(engine: Engine, folder: Path, work: Callable[[], None]) -> Done:
    """Archive everything in a thread, do *work* when the log is written, and return the result of archiving."""
    found: list[Done] = []
    thread = threading.Thread(target=lambda: found.extend(archived(engine, folder)))
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        keep_others_from_folding(cursor)
        thread.start()
        until_locked(engine)
        work()
    thread.join()
    (done,) = found
    return done


def test_a_newer_rendering_during_archiving(engine: Engine, folder: Path) -> None:
    """A copy that arrives while its event is archived is compared with the event, and folded if it is newer."""
    events = [render(event, "2024-06-20") for event in SHOP.events[:40]]
    ledger.record(engine, [ledger.delivery(event.body) for event in events])
    ledger.fold(engine)
    newer = next(event for event in SHOP.events[:40] if event.type == "checkout.session.completed")

    def record() -> None:
        ledger.record(engine, [ledger.delivery(newer.body)])

    done = archive_during(engine, folder, record)

    assert (done.dropped, done.stayed) == (40, 0)
    ledger.fold(engine)
    assert list(payloads(engine).values()) == [newer.body]
    (event,) = ledger.rows(engine, "SELECT api_version FROM events WHERE id = :id", id=newer.id)
    assert event == {"api_version": newer.api_version}


def test_events_during_archiving(shop: Engine, folder: Path) -> None:
    """An event keeps its payload if it is queued for folding or recorded while archiving runs."""
    queued = SHOP.events[7].id

    def work() -> None:
        ledger.execute(shop, "INSERT INTO pending SELECT seq, true FROM inbox WHERE id = :id", id=queued)
        ledger.record(shop, [ledger.delivery(link(5).body)])

    done = archive_during(shop, folder, work)

    assert (done.dropped, done.stayed) == (len(SHOP.events) - 1, 1)
    assert count(shop, "payloads") == count(shop, "payloads JOIN pending USING (seq)") == 2


def test_two_at_once(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """Only one command archives into a folder at a time; two into different folders both write all events."""
    with archive.alone(folder):
        ran = run("events", "archive", "--before", "2099-01-01", "--to", folder, "--yes")

    assert (ran.code, list(folder.iterdir())) == (1, [])
    assert "archived already" in ran.err

    first, second = folder / "first", folder / "second"
    first.mkdir()
    second.mkdir()
    (part,) = archive.plan(shop, before=LATER)
    held, path = archive._written(shop, part, LATER, second, do_nothing)
    earlier = archive.archive(shop, part, before=LATER, folder=first)
    later = archive._concluded(shop, part, held, path, is_known=False)

    assert (earlier.dropped, earlier.gone) == (later.gone, later.dropped) == (len(SHOP.events), 0)
    assert later.stayed == 0


def test_a_rebuild_that_goes_on(shop: Engine, folder: Path) -> None:
    """Archiving waits for a rebuild that has begun to read, and the rebuild misses no event."""
    done: list[Done] = []
    thread = threading.Thread(target=lambda: done.extend(archived(shop, folder)))
    steps: list[str] = []

    def progress(step: str, at: int, _: int) -> None:
        if not steps:
            thread.start()
            until_locked(shop, kind="relation")
        steps.append(step)

    with with_archived(shop, None, progress=do_nothing) as made:
        rebuild.rebuild(made, progress=progress)
        assert digests(shop, schema=made.schema) == digests(shop)
    thread.join()
    assert (steps[0], done[0].stayed, payloads(shop)) == ("Reading events", 0, {})


# ---- Refolds ----


def of_one_link(engine: Engine, folder: Path) -> None:
    """Fold a link's events, archive them, and record two older events of the link, which are parked."""
    ledger.take_in(engine, link(10, active=True).body, link(20, active=False).body)
    archived(engine, folder)
    ledger.take_in(engine, link(15, active=True, url="https://a.example/15").body)
    ledger.take_in(engine, link(16, active=True, url="https://a.example/16").body)


def states(engine: Engine) -> list[tuple[str, bool]]:
    """Return the state of each event, and whether it has a payload."""
    found = ledger.rows(engine, "SELECT state, payload IS NOT NULL AS at_hand FROM events ORDER BY seq")
    return [(row["state"], row["at_hand"]) for row in found]


def test_retry(engine: Engine, folder: Path, another: Engine, run: Callable[..., command.Ran]) -> None:
    """An event that is parked for lack of archived payloads is folded with the archive, as are others like it."""
    of_one_link(engine, folder)
    (late,) = ledger.rows(engine, "SELECT id FROM events WHERE created = to_timestamp(15)")
    (old,) = ledger.rows(engine, "SELECT id FROM events WHERE created = to_timestamp(10)")
    before = at_rest(engine)
    assert states(engine) == [("folded", False), ("folded", False), ("parked", True), ("parked", True)]

    refused = [run("events", "retry", each["id"]) for each in (late, old)]
    assert [(each.code, "--archive DIR" in each.err) for each in refused] == [(1, True), (1, True)]
    assert "it stays parked" in refused[0].err
    assert "it stays folded" in refused[1].err
    assert at_rest(engine) == before

    ran = run("events", "retry", late["id"], "--archive", folder)
    assert (ran.code, ran.err) == (0, f"{late['id']} is folded.\n")
    assert states(engine) == [("folded", True)] * 4
    folded_first = [event.body for event in (link(10, active=True), link(20, active=False))]
    more = [link(at, active=True, url=f"https://a.example/{at}").body for at in (15, 16)]
    ledger.take_in(another, *folded_first, *more)
    names = "SELECT active, url, as_of FROM payment_links"
    assert ledger.rows(engine, names) == ledger.rows(another, names)


def test_retry_with_an_archive_at_fault(engine: Engine, folder: Path) -> None:
    """A retry with an archive that lacks the payloads leaves the event as it is."""
    of_one_link(engine, folder)
    (log,) = folder.iterdir()
    (late,) = ledger.rows(engine, "SELECT id FROM events WHERE created = to_timestamp(15)")
    log.write_bytes(zstd.compress(b""))
    before = at_rest(engine)

    with pytest.raises(ConflictError, match="lacks the payloads of 2 events"):
        retry.retry(engine, late["id"], now=ledger.NOW, archive=folder)

    assert at_rest(engine) == before
    assert len(payloads(engine)) == 2


def test_a_swap_folds_parked_events(engine: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """A swap with the archive folds the events that were parked for lack of archived payloads."""
    of_one_link(engine, folder)

    assert run("rebuild", "--archive", folder, "--swap").code == 0
    assert [state for state, _ in states(engine)] == ["folded"] * 4
    assert run("rebuild", "--archive", folder).code == 0


def test_an_archived_event_that_is_pending(engine: Engine, folder: Path) -> None:
    """An archived event that is queued for folding delays no other event, and its outcome does not change."""
    ledger.take_in(engine, link(10).body, link(20, "plink_2").body)
    archived(engine, folder)
    before = at_rest(engine)
    ledger.execute(engine, "INSERT INTO pending SELECT seq, true FROM inbox")

    assert ledger.fold(engine) == 0
    assert at_rest(engine) == before
    ledger.execute(engine, "INSERT INTO pending SELECT seq, true FROM inbox")
    ledger.take_in(engine, link(30).body)
    assert [state for state, _ in states(engine)] == ["folded"] * 3
    assert count(engine, "pending") == 0


def test_an_older_fold_version(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """Events folded by an older fold version are folded again if they have payloads; `status` counts the others."""
    ledger.execute(shop, "UPDATE outcomes SET fold_version = 1 + seq % 2")
    archived(shop, folder, HALF)
    at_hand, gone = count(shop, "payloads"), count(shop, "events WHERE payload IS NULL")

    with database.transaction(shop) as connection, database.cursor(connection) as cursor:
        queued = [queue_outdated(cursor, limit=50) for _ in range(at_hand // 50 + 2)]
    ledger.execute(shop, "DELETE FROM pending")
    status, row = run("status"), run("status", "--format", "json").json
    assert run("rebuild", "--archive", folder, "--swap").code == 0

    assert (queued[0], sum(queued), queued[-1]) == (50, at_hand, 0)
    assert (row["to_fold_anew"], row["to_fold_anew_archived"]) == (at_hand + gone, gone)
    assert (
        f"{at_hand + gone:,} to fold anew, {gone:,} of them archived: payfold rebuild --archive DIR --swap"
        in status.out
    )
    assert run("status", "--format", "json").json["to_fold_anew"] == 0


# ---- Commands about archived events ----


def test_shown(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """`events show` and `explain` mark archived events."""
    (order,) = ledger.rows(shop, "SELECT id, amount_total, event_id FROM orders WHERE status = 'paid' LIMIT 1")
    whole = run("orders", "explain", order["id"], "--format", "json").json
    archived(shop, folder)

    event = run("events", "show", order["event_id"], "--format", "json").json
    explained = run("orders", "explain", order["id"], "--format", "json").json
    earlier = run("orders", "explain", order["id"], "--as-of", "2099-01-01", "--format", "json").json
    shown = run("orders", "explain", order["id"])

    assert (event["payload"], event["archived"], event["state"]) == (None, True, "folded")
    assert explained["row"] == whole["row"]
    assert {each["event_id"] for each in explained["timeline"]} == {each["event_id"] for each in whole["timeline"]}
    assert all(each["verdict"].endswith("archived") for each in explained["timeline"])
    assert earlier["row"] is None
    assert (shown.code, "it decides; archived" in shown.out) == (0, True)
    assert "archived" in run("events", "show", order["event_id"]).err


def test_exported(shop: Engine, folder: Path, tmp_path: Path, run: Callable[..., command.Ran]) -> None:
    """An export counts the events that it leaves out; with the archive it equals the export from before archiving."""
    run("events", "export", "-o", tmp_path / "before.ndjson")
    archived(shop, folder, HALF)

    part = run("events", "export", "-o", tmp_path / "part.ndjson")
    all_of_it = run("events", "export", "-o", tmp_path / "all.ndjson", "--archive", folder)

    left = count(shop, "events WHERE payload IS NULL")
    assert (part.code, f"Left out: {left:,} events" in part.err) == (1, True)
    assert len((tmp_path / "part.ndjson").read_bytes().splitlines()) == len(SHOP.events) - left
    assert all_of_it.code == 0
    assert (tmp_path / "all.ndjson").read_bytes() == (tmp_path / "before.ndjson").read_bytes()


# ---- The command ----


def test_the_command(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """Without --yes the command lists its work and changes nothing; with --yes it archives and prints the result."""
    arguments = ("events", "archive", "--before", "2099-01-01", "--to", folder, "--format", "json")
    held = payloads(shop)

    would = run(*arguments)
    assert (would.code, list(folder.iterdir()), payloads(shop)) == (2, [], held)
    assert [(each["partition"], each["events"]) for each in would.json] == [("payloads_from_0", len(held))]
    assert would.json[0]["megabytes"] == round(sum(map(len, held.values())) / 1e6, 1)
    assert f"{len(held):,} events" in would.err

    did = run(*arguments, "--yes")
    (log,) = folder.iterdir()
    assert did.code == 0
    assert did.json == [{"partition": "payloads_from_0", "file": str(log), "dropped": len(held), "stayed": 0}]
    assert payloads(shop) == {}
    for again in (run(*arguments), run(*arguments, "--yes")):
        assert (again.code, again.json, again.err) == (0, [], "")
    nothing = run(*arguments[:-2])
    assert (nothing.code, nothing.out, nothing.err) == (0, "", "There is nothing to archive.\n")
    assert log.stat().st_mode & 0o077 == 0


REFUSED = {
    "no folder": ("no/such/folder", {}, "there is no folder"),
    "a file": (__file__, {}, "there is no folder"),
    "memory": ("/dev/shm", {}, "is in memory (tmpfs)"),  # noqa: S108 - to be refused
    "not to be written": ("/proc", {}, "cannot be written to"),
    "a dyno": ("", {"DYNO": "run.1"}, "a dyno loses its disk"),
    "temporary": ("", {"TMPDIR": ""}, "among the temporary files"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(shop: Engine, folder: Path, run: Callable[..., command.Ran], kind: str) -> None:
    """A folder that cannot hold an archive, or would lose it, is refused with a reason, even with --yes."""
    name, settings, words = REFUSED[kind]
    named = {key: value or str(folder) for key, value in settings.items()}
    arguments = ("events", "archive", "--before", "2099-01-01", "--to", name or folder, "--yes")

    ran = run(*arguments, **named)

    assert (ran.code, ran.out, words in ran.err) == (2, "", True), ran.err
    assert count(shop, "events WHERE payload IS NULL") == 0


def test_no_room(shop: Engine, folder: Path, tmp_path: Path, database_url: str) -> None:
    """If a log does not fit on the disk, no part of it is left, and no payload is deleted."""
    command_line = 'ulimit -f 20; exec "$0" -m deploy events archive --before 2099-01-01 --yes --to "$1"'
    settings = command.environment({"DATABASE_URL": database_url, "TMPDIR": str(tmp_path)})
    ran = subprocess.run(
        ["/bin/sh", "-c", command_line, sys.executable, folder], env=settings, capture_output=True, check=False
    )

    assert (ran.returncode, ran.stdout, list(folder.iterdir())) == (2, b"", [])
    assert b"Cannot write" in ran.stderr
    assert count(shop, "events WHERE payload IS NULL") == 0
    (part,) = archive.plan(shop, before=LATER)
    with pytest.raises(ConfigurationError, match="bytes left"):
        archive.require_room([part] * 10**7, folder)
