"""`payfold bench` counts its requests, keeps finished measurements, and judges ratios alone."""

import asyncio
import io
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psycopg
import pytest
from rich.console import Console
from sqlalchemy import Engine

from deploy.bench import apart, backlog, events, figures, growth, limits, load, report, run
from deploy.bench.load import Loaded
from deploy.bench.report import Figure, Run, Target
from deploy.sandbox.history import shop_history
from schemas import database, locks
from schemas.errors import ConfigurationError, ConflictError
from schemas.settings import Settings
from tests import ledger
from tests.command import environment, payfold
from worker import folds
from worker.proof import shadow

SECRET = "whsec_bench"
REQUESTS = 50
REFUSED_EACH = 5


class _Server(asyncio.Protocol):
    """Answers each fifth delivery with 503, the others with 200, and any other request with 405."""

    seen = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, _, body = self._buffer.partition(b"\r\n\r\n")
        length = int(head.partition(b"Content-Length: ")[2] or 0)
        if b"\r\n\r\n" not in self._buffer or len(body) < length:
            return
        self._buffer = b""
        status = 405
        if head.startswith(b"POST"):
            _Server.seen += 1
            status = 503 if _Server.seen % REFUSED_EACH == 0 else 200
        answer = b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\n{}" % status
        assert isinstance(self._transport, asyncio.WriteTransport)
        self._transport.write(answer)


@contextmanager
def serving() -> Iterator[int]:
    """Run such a server and yield its port."""
    loop = asyncio.new_event_loop()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = loop.run_until_complete(loop.create_server(_Server, sock=listener))
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Return a file of signed requests."""
    path = tmp_path / "requests"
    events.write_requests(path, events.take(events.history(1, payments=True), REQUESTS), secret=SECRET)
    return path


@pytest.mark.parametrize("client", ["own", "wrk"])
def test_answers_are_counted(prepared: Path, client: str) -> None:
    """Both clients send each request once, wait for every answer, and count refused and accepted ones separately."""
    if client == "wrk" and shutil.which("wrk") is None:
        pytest.skip("there is no wrk on this machine")
    _Server.seen = 0
    with serving() as port:
        found = load.saturate(port, prepared, REQUESTS, client=client)

    assert _Server.seen == REQUESTS
    assert (found.accepted, found.refused, found.client) == (40, 10, client)
    assert found.rate > 0


def test_paced_load_keeps_its_pace(prepared: Path) -> None:
    """A paced load records the due time of each request, and sends none before it."""
    _Server.seen = 0
    with serving() as port:
        found = load.paced(port, prepared, rate=500)

    assert [each.status for each in found].count(503) == REQUESTS // REFUSED_EACH
    assert all(each.due <= each.sent <= each.answered for each in found)
    assert found[-1].due - found[0].due == pytest.approx((REQUESTS - 1) / 500)


def test_requests_come_back_as_written(prepared: Path) -> None:
    """Prepared files hold complete requests, each with its signature."""
    requests = list(events.read_requests(prepared))

    assert len(requests) == REQUESTS
    assert all(b"\r\nStripe-Signature: t=" in each and each.endswith(b"}") for each in requests)


def figure(
    *, measured: float = 10, limit: float = 20, plain: float | None = None, fault: str = "", floor: float | None = None
) -> Figure:
    """Return a figure of one run, with a target of 0.4 of its limit and 20 times the plain alternative."""
    return Figure(
        name="fold",
        title="fold rate",
        unit="/s",
        runs=(Run(measured, limit, plain),),
        limit_name="merging",
        target=Target(0.4, floor=floor),
        plain_target=Target(20),
        fault=fault,
    )


def test_ratios_are_taken_pair_by_pair() -> None:
    """The ratio is the median of the pairs' ratios, so the machine's speed may change between pairs."""
    found = Figure(
        name="fold",
        title="fold rate",
        unit="/s",
        runs=(Run(10, 20), Run(1, 2), Run(30, 40)),
        limit_name="merging",
        target=Target(0.4),
    )

    assert (found.measured, found.limit, found.ratio, found.met) == (10, 20, 0.5, True)


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (figure(), None),
        (figure(measured=5), None),  # misses its target, but within noise
        (figure(measured=3), "fold: 0.15 of merging, where ≥ 0.4 is the target"),
        (figure(plain=2), "fold: 5.00 of the plain alternative, where ≥ 20 is the target"),
        (figure(measured=2, floor=0.05), None),  # far from its target, but known to be
        (figure(measured=0.5, floor=0.05), "fold: 0.03 of merging, where ≥ 0.4 is the target"),
        (figure(fault="a delivery was lost"), "fold: a delivery was lost"),
        (Figure(name="latency", title="", unit="ms", runs=(Run(9_000),), target=Target(5, at_least=False)), None),
        (
            Figure(
                name="growth_rebuild_memory",
                title="",
                unit="MB",
                runs=(Run(40, 10),),
                limit_name="with a short history",
                target=Target(1.5, at_least=False),
            ),
            "growth_rebuild_memory: 4.00 of with a short history, where ≤ 1.5 is the target",
        ),
    ],
)
def test_only_ratios_beyond_noise_are_complained_of(found: Figure, complaint: str | None) -> None:
    """A ratio under half its target, or a fault, is a complaint; an absolute figure never is."""
    assert report.below_floor([found]) == ([] if complaint is None else [complaint])


def test_a_missing_measurement_is_named() -> None:
    """Without the plain alternative the table is still printed, and names the missing measurement."""
    console = Console(file=io.StringIO(), width=200)
    report.show([figure()], {"cores": 2}, console)

    assert isinstance(console.file, io.StringIO)
    assert "not measured" in console.file.getvalue()
    assert "cores 2" in console.file.getvalue()


def test_a_disk_too_small_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """A full run names the disk space that it needs, and an alternative, if there is less."""
    with pytest.raises(ConflictError, match=r"1,000,000 events need about 7\.2 GB .* and 1\.0 GB are there: .* --keep"):
        run.require_disk(tmp_path, 1_000_000, free=lambda _: 10**9)

    assert "7.2 GB" in run.require_disk(tmp_path, 1_000_000, free=lambda _: 10**11)


def test_finished_steps_are_not_done_again(tmp_path: Path) -> None:
    """A resumed run keeps finished measurements, and makes the others."""
    path = tmp_path / "steps.ndjson"
    measured = [figure()]
    first = run.Steps.kept_in(path, mode="full", count=5_000)
    first.figures("fold", lambda: measured)
    first.count("shop 0", lambda: 17)
    with path.open("ab") as file:
        file.write(b'{"step":"acks","fig')  # killed while writing

    again = run.Steps.kept_in(path, mode="full", count=5_000)

    assert again.figures("fold", pytest.fail) == measured
    assert again.count("shop 0", pytest.fail) == 17
    assert again.figures("acks", list) == []
    with pytest.raises(ConfigurationError, match="another run"):
        run.Steps.kept_in(path, mode="full", count=6_000)
    assert run.Steps.kept_in(path, mode="full", count=5_000).count("shop 0", pytest.fail) == 17


def test_growth_compares_rates_and_passes() -> None:
    """The cost of a long history is the ratio to a short one, of rates and of pass times, turn by turn."""

    def turn(rate: float, passing: float) -> list[Figure]:
        return [figure(measured=rate), Figure(name="sweep", title="", unit="ms", runs=(Run(passing),))]

    shorts, longs = [turn(100, 2), turn(50, 4), turn(200, 1)], [turn(90, 2.2), turn(40, 4), turn(190, 1.2)]

    found = {each.name: each for each in run.compared(shorts, longs)}

    assert found["growth_fold"].ratio == pytest.approx(0.9)
    assert found["growth_sweep"].ratio == pytest.approx(1.1)
    assert all(each.met for each in found.values())


def test_a_long_measurement_is_held_against_those_before_and_after_it() -> None:
    """A single measurement with a long history is compared with the short ones before and after it."""
    shorts = [[figure(measured=100)], [figure(measured=50)]]

    (found,) = run.compared(shorts, [[figure(measured=60)]])

    assert [each.limit for each in found.runs] == [100, 50]
    assert found.ratio == pytest.approx(0.9)


def test_loaded_has_one_shape() -> None:
    """A rate counts accepted requests only."""
    assert Loaded(accepted=30, refused=10, seconds=2, client="own").rate == 15


def test_the_locks_of_a_batch_are_seen(engine: Engine) -> None:
    """A batch in progress is one holder of the lock to append, and has an entry for each lock."""
    seen = backlog.Seen()
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as other:
        backlog.look(other, seen)
        assert seen == backlog.Seen()
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            locks.share_folding(cursor)
            locks.lock_objects(cursor, [("", False, f"cs_{number}") for number in range(30)])
            backlog.look(other, seen)
            locks.keep_others_from_appending(cursor)
            backlog.look(other, seen)

    assert (seen.batches, seen.held, seen.waits_to_append, seen.waits_for_objects) == (2, 1, 0, 0)
    # The lock that folding shares, 30 objects, and the lock to append.
    assert seen.entries == 32


def test_shares_of_a_batchs_time() -> None:
    """What two workers wait for is a share of all their batches, next to that of one worker."""
    one, two = (backlog.Folded(rate, backlog.Seen()) for rate in (100.0, 120.0))
    one.seen.add(2, 1, 0, 0, 500)
    two.seen.add(4, 1, 2, 1, 400)
    two.seen.add(4, 1, 0, 0, 503)

    found = {each.name: (each.limit, each.measured) for each in backlog.figures_of([one], [two])}

    assert found == {
        "backlog": (100, 120),
        "backlog_append": (50, 25),
        "backlog_append_waits": (0, 25),
        "backlog_object_waits": (0, 12.5),
        "backlog_entries": (500, 503),
    }


@pytest.mark.integration
def test_one_figure_is_compared_with_its_limit(tmp_path: Path) -> None:
    """The command prints one document with the figure, its limit and the ratio, and leaves nothing behind."""
    ran = payfold("bench", "--quick", "--only", "fold", "--json", PAYFOLD_DATA_DIR=str(tmp_path))

    assert ran.code == 0, ran.err
    fold, mixed, commit = ran.json["figures"]
    assert (fold["name"], mixed["name"], commit["name"]) == ("fold", "fold_mixed", "commit")
    assert fold["ratio"] == pytest.approx(fold["measured"] / fold["limit"])
    assert fold["plain_ratio"] == pytest.approx(fold["measured"] / fold["plain"])
    assert fold["target"] == {"at_least": 0.45, "aim": 0.5}
    # Mixed events may cost 1.3 times as much as those of sessions, as many of them in the same run.
    assert mixed["limit"] == fold["measured"]
    assert mixed["target"]["at_least"] == pytest.approx(1 / 1.3)
    assert len(fold["runs"]) == 1
    assert ran.json["machine"]["PostgreSQL"]
    assert "fold rate" in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rate", "complaints"), [(6_000, 0), (1_500, 0), (900, 1)])
def test_a_replay_is_held_against_a_rebuild(rate: float, complaints: int) -> None:
    """A replay reaches its target at 0.6 of the rebuild's rate, and is complained of below a tenth."""
    found = Figure(
        name="replay", title="", unit="/s", runs=(Run(rate, 10_000),), limit_name="rebuilding", target=figures.REPLAY
    )

    assert found.met is (rate == 6_000)
    assert len(report.below_floor([found])) == complaints


def test_credit_notes_come_alone() -> None:
    """The events of credit notes are of nothing else; of each eight notes two are voided."""
    chosen = [msgspec.json.decode(body) for body in events.take(events.credit_notes(1), 20)]

    assert Counter(each["type"] for each in chosen) == {"credit_note.created": 16, "credit_note.voided": 4}
    assert len({each["data"]["object"]["id"] for each in chosen}) == 16
    assert len({each["id"] for each in chosen}) == 20


def count_of(engine: Engine, table: str) -> int:
    """Return how many rows *table* has."""
    return len(ledger.rows(engine, f"SELECT FROM {table}"))


def test_the_limit_of_a_rebuild(database_url: str, tmp_path: Path) -> None:
    """The limit decodes every object that a fold reads, loads the rows of a rebuild, and leaves nothing behind."""
    engine = database.engine(database_url)
    ledger.take_in(engine, *(event.body for event in shop_history(3, 40, money=True).events))

    rows = limits.export_rows(Settings.load({"DATABASE_URL": database_url}).libpq, tmp_path)
    taken = apart.decoded_and_loaded(environment({"DATABASE_URL": database_url}), tmp_path)

    assert {wanted for wanted, _ in folds.FOLDS.values()} <= limits.READERS.keys()
    assert rows == sum(count_of(engine, table.name) for table in shadow.REPLACED)
    assert taken.inside.seconds > 0
    assert ledger.rows(engine, "SELECT FROM pg_namespace WHERE starts_with(nspname, 'payfold_rebuild_')") == []
    engine.dispose()


def test_wrong_options_are_named() -> None:
    """An unknown measurement is refused, with the known ones."""
    assert "acks" in payfold("bench", "--only", "nonsense").err
    assert payfold("bench", "--quick", "--full").code == 2
    assert payfold("bench", "--events", "5000").code == 2
    assert payfold("bench", "--thin").code == 2


def test_the_picture_of_growth_shows_the_stored_runs() -> None:
    """The picture of growth has the curves of the stored runs."""
    folder = Path(growth.__file__).parent
    documents = [msgspec.json.decode((folder / "growth-10m.json").read_bytes())]

    assert (folder / "growth.svg").read_text() == f"{growth.drawn(documents)}\n"


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "held = bytearray(64 * 2**20); print('ready', flush=True); input()"])
child.wait()
"""


@pytest.mark.skipif(not apart.IS_LINUX, reason="only Linux shares out the memory that processes have in common")
def test_a_process_and_its_children_are_measured_together() -> None:
    """The memory of a child counts with its parent's, and what has ended counts nothing."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = apart.family(process.pid)
        sizes = apart.rss_bytes(found)

        assert (len(found), found[0]) == (2, process.pid)
        assert sizes[found[0]] < 64 * 2**20 < sizes[found[1]]
        assert 64 * 2**20 < apart.pss_bytes(found) < sum(sizes.values())
        assert apart.processor_seconds(found) > 0

        process.communicate("\n")

    assert apart.family(process.pid) == [process.pid]
    assert (apart.pss_bytes(found), apart.processor_seconds(found), apart.rss_bytes(found)) == (0, 0, {})
