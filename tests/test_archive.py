"""Old payloads go into logs that replay, nothing is lost on the way, and what is archived is found again."""

import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from sqlalchemy import Engine, text

from deploy.sandbox.account import Account, Event
from deploy.sandbox.history import shop_history
from deploy.sandbox.rendering import render
from deploy.sandbox.samples import sample
from schemas import database
from schemas.errors import ConfigurationError, ConflictError
from tests import command, ledger
from tests.command import payfold
from worker import archive, eventlog, operator, projection, rebuild, replay, swap
from worker.archive import Done
from worker.digest import digests
from worker.rebuild import Sizes, nobody

SHOP = shop_history(31, 120, money=True)
TIMES = sorted(event.created for event in SHOP.events)
HALF = datetime.fromtimestamp(TIMES[len(TIMES) // 2], UTC)
LATER = datetime(2099, 1, 1, tzinfo=UTC)
MANY_PROCESSES = Sizes(per_file=100, per_task=150, alone_max=0)


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
    """Return an engine on the tables of a shop."""
    ledger.record(engine, [ledger.delivery(event.body) for event in SHOP.events])
    ledger.fold(engine)
    return engine


@pytest.fixture
def folder(pytestconfig: pytest.Config) -> Iterator[Path]:
    """Return a folder that the command takes for one that lasts, as long as temporary files are elsewhere."""
    # The cache is in the checkout, and so on a disk.
    with tempfile.TemporaryDirectory(dir=pytestconfig.cache.mkdir("archive")) as made:  # type: ignore[union-attr]  # there is a cache
        yield Path(made)


@pytest.fixture
def run(database_url: str, tmp_path: Path) -> Callable[..., command.Ran]:
    """Return what runs the command on the database."""

    def ran(*arguments: object, **settings: str) -> command.Ran:
        named = {"DATABASE_URL": database_url, "TMPDIR": str(tmp_path), **settings}
        done = payfold(*map(str, arguments), **named)
        assert "Traceback" not in done.err, done.err
        return done

    return ran


def archived(engine: Engine, folder: Path, before: datetime = LATER) -> list[Done]:
    """Archive the events created before *before*."""
    return [archive.archive(engine, part, before=before, folder=folder) for part in archive.plan(engine, before=before)]


def count(engine: Engine, rest: str) -> int:
    """Return how many rows *rest* finds."""
    (row,) = ledger.rows(engine, f"SELECT count(*) AS found FROM {rest}")  # noqa: S608 - our own statements
    found: int = row["found"]
    return found


def size_of(engine: Engine, partition: str = "payloads_from_0") -> int:
    """Return the bytes of a partition."""
    (row,) = ledger.rows(engine, "SELECT pg_total_relation_size(CAST(:name AS regclass)) AS bytes", name=partition)
    size: int = row["bytes"]
    return size


def at_rest(engine: Engine) -> list[Any]:
    """Return all that an archive must not touch."""
    names = ("inbox", "pending", "outcomes", "mentions", "changes", "anomalies")
    return [digests(engine), *(ledger.rows(engine, f"SELECT * FROM {name} AS t ORDER BY t") for name in names)]  # noqa: S608


def payloads(engine: Engine) -> dict[int, bytes]:
    """Return the payloads at hand."""
    return {row["seq"]: bytes(row["payload"]) for row in ledger.rows(engine, "SELECT * FROM payloads")}


def link(at: int, link_id: str = "plink_1", **fields: Any) -> Event:  # noqa: ANN401 - a link's own
    """Return an event of a payment link, created *at*."""
    return sample("payment_link.updated", {"id": link_id, **fields}, now=at)


# ---- Archiving ----


def test_nothing_but_payloads_goes(shop: Engine, folder: Path) -> None:
    """All the tables are what they were, the payloads are gone, and their partition gives its space back."""
    before, held, size = at_rest(shop), payloads(shop), size_of(shop)

    (done,) = archived(shop, folder)

    assert at_rest(shop) == before
    assert (done.dropped, done.stayed, done.part.events) == (len(held), 0, len(held))
    assert payloads(shop) == {}
    assert size_of(shop) < size / 10
    assert [path.name for path in folder.iterdir()] == [f"payfold-events-{min(held)}-{max(held)}.ndjson.zst"]
    assert archive.plan(shop, before=LATER) == []


def test_only_what_is_old(shop: Engine, folder: Path) -> None:
    """What was created later stays as it is, however many that are: the others are deleted one by one."""
    held = payloads(shop)
    old = {row["seq"] for row in ledger.rows(shop, "SELECT seq FROM inbox WHERE created < :half", half=HALF)}

    (done,) = archived(shop, folder, HALF)

    assert 0 < done.dropped == len(old) < len(held)
    assert payloads(shop) == {seq: payload for seq, payload in held.items() if seq not in old}


def test_what_stays_in_an_emptied_partition(shop: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is parked or pending stays, in a partition that is emptied for the rest of it."""
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
    """The logs, replayed into an empty database, give the same tables, and every event as it was recorded."""
    before = digests(shop)
    archived(shop, folder, HALF)
    archived(shop, folder)
    url = another.url.render_as_string(hide_password=False)

    ran = run("replay", *folder.iterdir(), "--format", "json", DATABASE_URL=url)

    assert (ran.code, ran.json["new"], ran.json["refused"]) == (0, len(SHOP.events), 0)
    assert digests(another) == before == digests(shop)
    kept = "SELECT account, livemode, id, created, redacted, payload_sha256, signature, received_at FROM events"
    assert ledger.rows(another, f"{kept} ORDER BY id") == ledger.rows(shop, f"{kept} ORDER BY id")


def test_a_duplicate_of_an_archived_event(shop: Engine, folder: Path) -> None:
    """A delivery of what is archived is a duplicate still, and brings no payload."""
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
    """It is what it was before archiving, outcomes and mentions included."""
    archived(shop, folder, before)

    with archive.beside(shop, folder, progress=nobody) as made:
        rebuild.rebuild(made, sizes=sizes)
        found = swap.compare(made, tell=lambda _: None)

        assert digests(shop, schema=made.schema) == digests(shop)
        assert (found.drift, found.events_left_out) == (0, 0)
        for name in ("mentions", "outcomes"):
            assert count(shop, f"(SELECT * FROM {made.schema}.{name} EXCEPT SELECT * FROM public.{name}) AS x") == 0
            assert count(shop, f"(SELECT * FROM public.{name} EXCEPT SELECT * FROM {made.schema}.{name}) AS x") == 0


def test_a_rebuild_without_it(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """Objects of which an event is archived are not compared, which is said; what is at hand is, to the cent."""
    archived(shop, folder, HALF)
    (of_order,) = ledger.rows(
        shop,
        "SELECT (SELECT max(id) FROM orders) AS at_hand, (SELECT min(object_id) FROM events"
        " WHERE payload IS NULL AND object_type = 'checkout.session') AS archived",
    )

    clean = run("rebuild", "--format", "json")
    ledger.execute(shop, "UPDATE orders SET amount_total = amount_total + 1 WHERE id = :id", id=of_order["archived"])
    of_archived = run("rebuild", "--format", "json")
    ids = "SELECT id FROM orders WHERE NOT id IN (SELECT object_id FROM events WHERE payload IS NULL AND object_id IS NOT NULL)"
    (order,) = ledger.rows(shop, f"{ids} AND amount_total IS NOT NULL LIMIT 1")  # noqa: S608
    ledger.execute(shop, "UPDATE orders SET amount_total = amount_total + 1 WHERE id = :id", id=order["id"])
    of_both = run("rebuild", "--format", "json")
    told = run("rebuild", "--archive", folder)

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
    assert told.code == 3
    assert "2 rows are not what the events say" in told.err
    assert "Left out: " in run("rebuild").err


def test_a_swap(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """A swap refuses while something is archived, and changes nothing; with the archive it puts all right."""
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
    """A reconciliation covers what is at hand, or all with the archive; it repairs only where it has all."""
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
    """What is archived is held against a log by its hash, and with the archive by what it says."""
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


def test_what_goes_on_meanwhile(shop: Engine, folder: Path) -> None:
    """Events that come while a rebuild runs are no difference, be their objects archived in part or not."""
    archived(shop, folder, HALF)
    sold = Account(seed=77)
    sold.complete(sold.open_session(amount=500))
    customer = next(event for event in SHOP.events if event.type == "customer.created")
    told = customer.payload()
    again = sample("customer.updated", told["data"]["object"], now=TIMES[-1] + 100)

    with archive.beside(shop, None, progress=nobody) as made:
        rebuild.rebuild(made)
        ledger.record(shop, [ledger.delivery(event.body) for event in (*sold.events, again)])
        ledger.fold(shop)
        assert swap.compare(made, tell=lambda _: None).drift == 0

    with archive.beside(shop, folder, progress=nobody) as made:
        rebuild.rebuild(made)
        ledger.record(shop, [ledger.delivery(link(TIMES[-1]).body)])
        ledger.fold(shop)
        assert swap.compare(made, tell=lambda _: None).drift == 0


# ---- An archive at fault ----


def test_an_archive_that_is_not_whole(shop: Engine, folder: Path, run: Callable[..., command.Ran]) -> None:
    """A missing log, a damaged one and a folder that is none are each told, and nothing is compared."""
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
    """A payload that the archive has under another hash is none of the inbox's."""
    archived(shop, folder)
    ledger.execute(shop, "UPDATE inbox SET payload_sha256 = sha256('x') WHERE seq = (SELECT min(seq) FROM inbox)")

    with (
        pytest.raises(ConflictError, match="lacks the payloads of 1 events"),
        archive.beside(shop, folder, progress=nobody),
    ):
        pass


# ---- Kills ----


@pytest.fixture
def started(database_url: str, folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Return a run of the command in a process of its own."""
    arguments = ("events", "archive", "--before", "2099-01-01", "--to", str(folder), "--yes")
    with command.started(
        *arguments,
        stdout=tmp_path / "out",
        stderr=tmp_path / "err",
        DATABASE_URL=database_url,
        TMPDIR=str(tmp_path),
    ) as process:
        yield process
