"""`payfold up` and `payfold demo` run all of Payfold on one machine, prove its tables, and leave no process behind."""

import asyncio
import os
import re
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from sqlalchemy import text

from deploy.local.signals import STOP_SIGNALS, run_until_signal, stop_on_signal
from deploy.sandbox.account import Account
from deploy.sandbox.history import shop_history
from deploy.sandbox.samples import sample
from deploy.sandbox.signing import sign
from schemas import database, envfile
from tests import ledger
from tests.command import payfold, started
from tests.waiting import until

if TYPE_CHECKING:
    import subprocess

pytestmark = [pytest.mark.integration, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

STOP_SECONDS_MAX = 20
FINALIZED_SECONDS_MAX = 10
ORDERS = 30
SEED = 5


@dataclass(frozen=True)
class Command:
    """A running `payfold up` or `demo`, with its output so far and its own data folder."""

    process: "subprocess.Popen[bytes]"
    folder: Path

    @property
    def out(self) -> str:
        """Its standard output so far."""
        return self.folder.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        """Its standard error so far."""
        return self.folder.with_suffix(".err").read_text()

    def value_of(self, label: str) -> str:
        """Return the value that it prints after *label*, once it does."""
        pattern = re.compile(rf"^  {label} +(\S.*)\n", re.MULTILINE)
        until(lambda: pattern.search(self.err) is not None or self.process.poll() is not None)
        found = pattern.search(self.err)
        assert found is not None, self.err
        return found[1].strip()

    def stop(self, by: signal.Signals) -> int:
        """Send a signal and return the exit code, which must come within seconds."""
        self.process.send_signal(by)
        return self.process.wait(STOP_SECONDS_MAX)

    def child(self, *arguments: str) -> set[int]:
        """Return the child process with a command line that ends with *arguments*, if there is one."""
        pid = self.process.pid
        begun = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ends = "\0".join(arguments) + "\0"
        return {int(each) for each in begun if Path(f"/proc/{each}/cmdline").read_text().endswith(ends)}

    def process_ids(self) -> list[int]:
        """Return the ids of the processes that were started for this folder, the command itself included."""
        return [int(each.name) for each in Path("/proc").glob("[0-9]*") if str(self.folder) in _traces(each)]


def _traces(process: Path) -> str:
    """Return environment and working folder of a process, by which its owner is known; empty if it has ended."""
    try:
        if "\nState:\tZ" in (process / "status").read_text():
            return ""
        return f"{(process / 'environ').read_bytes()!r} {(process / 'cwd').readlink()}"
    except OSError:
        return ""


@contextmanager
def running(folder: Path, *arguments: str, **settings: str) -> Iterator[Command]:
    """Run the command with a data folder of its own."""
    files = {"stdout": folder.with_suffix(".out"), "stderr": folder.with_suffix(".err")}
    with started(*arguments, **files, PAYFOLD_DATA_DIR=str(folder), **settings) as process:  # type: ignore[arg-type]  # files are no settings
        yield Command(process, folder)


def free_port() -> int:
    """Return a port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Command]:
    """Return a running `payfold up`, past its introduction."""
    with running(tmp_path / "data", "up", PORT=str(free_port())) as command:
        command.value_of("signing secret")
        yield command
        if command.process.poll() is None:
            command.stop(signal.SIGTERM)


def deliver(command: Command, orders: int = 1) -> list[str]:
    """Deliver a paid order or several, signed with the secret that was printed, and return their ids."""
    shop = Account(seed=orders)
    for _ in range(orders):
        shop.complete(shop.open_session())
    for event in shop.events:
        signature = sign(event.body, command.value_of("signing secret"), int(time.time()))
        answer = httpx.post(command.value_of("webhook"), content=event.body, headers={"Stripe-Signature": signature})
        assert answer.status_code == 200
    return shop.session_ids()


def asked(command: Command, path: str) -> httpx.Response:
    """Request *path* from the API with the printed token, at the printed address."""
    address = command.value_of("API").removesuffix("/docs")
    return httpx.get(f"{address}{path}", headers={"Authorization": f"Bearer {command.value_of('bearer token')}"})


def is_listening(url: str) -> bool:
    """Return whether a server accepts connections at *url*."""
    with socket.socket() as client:
        return client.connect_ex((httpx.URL(url).host, httpx.URL(url).port or 0)) == 0


def assert_nothing_is_left(command: Command, url: str) -> None:
    """Assert that no process of the command is left, and that its port has no listener."""
    assert command.process_ids() == []
    assert not is_listening(url)


# ---- up ----


def test_up(up: Command) -> None:
    """The output of `up` is enough to deliver an order, to read it, and to query it from another process."""
    (session,) = deliver(up)
    until(lambda: asked(up, f"/v1/orders/{session}").status_code == 200)
    order = asked(up, f"/v1/orders/{session}").json()
    assert (order["status"], "customer_email" in order) == ("paid", True)

    status = payfold("status", "--format", "json", PAYFOLD_DATA_DIR=str(up.folder))
    digest = payfold("digest", PAYFOLD_DATA_DIR=str(up.folder))
    emitted = payfold("emit", "payment_link.created", PAYFOLD_DATA_DIR=str(up.folder))
    config = payfold("config", "--format", "json", PAYFOLD_DATA_DIR=str(up.folder))

    assert (status.code, status.json["database"], status.json["broker"]["state"]) == (0, "ok", "ok")
    assert status.json["parked"] == 0
    assert digest.code == 0
    assert "orders                             1  " in digest.out
    assert (emitted.code, emitted.err) == (0, "")
    assert f"sent_to  {up.value_of('webhook')}\n" in emitted.out
    sources = {row["setting"]: row["source"] for row in config.json}
    assert (sources["DATABASE_URL"], sources["REDIS_URL"]) == ("embedded server", "embedded server")
    assert sources["STRIPE_WEBHOOK_SECRETS"] == sources["PAYFOLD_TOKENS"] == str(up.folder / "up/credentials.json")
    assert up.out == ""
    assert "hidden" not in up.err


def test_the_output_of_up(up: Command) -> None:
    """The five lines that a user needs come without library output before them, and then the next command to type."""
    before, _, after = up.err.partition("Payfold runs here until Ctrl-C:\n")

    assert [line for line in before.splitlines() if line and "stripe.idle" not in line] == []
    labels = re.findall(r"^  ([a-zA-Z ]+?)  +\S+$", after, re.MULTILINE)
    assert labels == ["pages", "webhook", "API", "bearer token", "signing secret"]
    assert "  payfold emit checkout.session.completed\n" in after


def test_up_with_a_secret_of_its_own(tmp_path: Path) -> None:
    """A configured secret, here in a file that .env names, is used by every process, and never printed or stored."""
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").write_text("whsec_of_the_shop")
    (tmp_path / "data" / ".env").write_text(f"{envfile.MARKER}\nSTRIPE_WEBHOOK_SECRETS_FILE=../secret\n")
    with running(tmp_path / "data", "up", PORT=str(free_port())) as command:
        printed = command.value_of("signing secret")
        emitted = payfold("emit", "payment_link.created", PAYFOLD_DATA_DIR=str(command.folder))
        command.stop(signal.SIGTERM)

    assert printed == "as configured"
    assert emitted.code == 0, emitted.err
    kept = (tmp_path / "data" / "up" / "credentials.json").read_text()
    assert "whsec_" not in command.out + command.err + kept


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=lambda by: by.name)
def test_up_stops(up: Command, by: signal.Signals) -> None:
    """Ctrl-C and a supervisor's SIGTERM end every process within seconds, with exit 0."""
    url = up.value_of("API")
    assert len(up.process_ids()) > 6  # itself, three processes, two servers and PostgreSQL's own processes

    assert up.stop(by) == 0

    assert_nothing_is_left(up, url)
    assert "Traceback" not in up.err
    assert up.err.endswith("Stopped.\n")


def test_up_after_a_kill(up: Command) -> None:
    """After a kill -9 no process goes on, and the next `up` has the recorded events, and folds them."""
    sessions = deliver(up, orders=3)
    os.kill(up.process.pid, signal.SIGKILL)
    up.process.wait()
    until(lambda: up.process_ids() == [])

    with running(up.folder, "up", PORT=str(free_port())) as again:
        until(lambda: all(asked(again, f"/v1/orders/{session}").status_code == 200 for session in sessions))
        assert again.stop(signal.SIGTERM) == 0


def test_up_twice(up: Command) -> None:
    """A second `up` in the same folder names the first with exit 1, and does not touch it."""
    ran = payfold("up", PAYFOLD_DATA_DIR=str(up.folder))

    assert (ran.code, ran.out) == (1, "")
    assert f"is in use by process {up.process.pid}" in ran.err
    assert "Traceback" not in ran.err
    assert asked(up, "/v1/orders").status_code == 200


def test_up_on_a_port_that_is_taken(tmp_path: Path) -> None:
    """A taken port is an error that names --port, before any process but the servers starts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running(tmp_path / "data", "up", "--port", str(port)) as command:
            assert command.process.wait(60) == 1

    assert f"Port {port} is taken by another program on this machine." in command.err
    assert f"Example: --port {port + 1}" in command.err
    assert len(command.err.splitlines()) == 1
    assert command.process_ids() == []


def test_up_restarts_a_process(up: Command) -> None:
    """`up` restarts a process that ended, and shows its last lines; the third end within minutes ends `up`."""
    killed: set[int] = set()
    for times in (1, 2, 3):
        until(lambda: bool(up.child("-m", "worker.clock") - killed))
        (clock,) = up.child("-m", "worker.clock") - killed
        killed.add(clock)
        os.kill(clock, signal.SIGKILL)
        if times < 3:
            until(lambda times=times: up.err.count("It is started again.") == times)  # type: ignore[misc]  # its default
            assert asked(up, "/v1/orders").status_code == 200

    assert up.process.wait(STOP_SECONDS_MAX) == 1
    assert up.err.count("The clock process ended by SIGKILL") == 3
    assert "It ended 3 times in 10 minutes, so the others were stopped." in up.err
    assert up.process_ids() == []


# ---- demo ----

PARTS = (
    "Deliveries",
    "events that happened",
    "posts sent",
    "answered 200",
    "sent twice",
    "twins",
    "refused",
    "delivery to folded +p50 [0-9,]+ ms, p99 [0-9,]+ ms",
    "Orders",
    "paid +[0-9]+",
    "expired +[0-9]+",
    "Money of paid orders",
    r"usd +[0-9,.]+ USD",
    "After the sale",
    "Carts left behind",
    "open sessions found by asking Stripe +8 of 8",
    "expired at Stripe, being too old +5 of 5",
    "still open, being young +3 of 3",
    "items given back to the stock +[1-9]",
    "recovered by their buyers, and paid +3",
    "Payment links",
    "plink_",
    "Proof",
    "carts left behind that are not expired +0",
    "events left pending, calls left to make +0",
    "digest of the live tables",
    "digest of a rebuild in another order",
    "The tables are what the events say.",
)


def test_demos_during_up(up: Command, tmp_path: Path) -> None:
    """Two simultaneous demos during an `up` take free ports, prove their tables and leave no process behind.

    Both have one seed and sell the same, each at its own time of day, which its digest covers.
    """
    deliver(up)
    arguments = ("demo", "--exit", "--orders", str(ORDERS), "--seed", str(SEED))
    with running(tmp_path / "one", *arguments) as one, running(tmp_path / "two", *arguments) as two:
        demos: Sequence[Command] = (one, two)
        assert [demo.process.wait(120) for demo in demos] == [0, 0], one.err + two.err

    for demo in demos:
        assert [part for part in PARTS if not re.search(part, demo.out)] == []
        assert demo.process_ids() == []
        assert list(demo.folder.iterdir()) == []
        assert "Traceback" not in demo.err
    assert address(one) != address(two)
    assert sold(one) == sold(two)
    history = shop_history(SEED, ORDERS, money=True)
    statuses = [history.expected_status(session) for session in history.session_ids()]
    # Three buyers return to their abandoned carts.
    assert f"paid {statuses.count('paid') + 3}".split() in [line.split() for line in one.out.splitlines()]
    assert asked(up, "/v1/orders").status_code == 200


def address(demo: Command) -> str:
    """Return the address that a demo printed."""
    (url,) = re.findall(r"Payfold runs at (http://\S+?),", demo.err)
    return str(url)


def sold(demo: Command) -> list[str]:
    """Return a demo's lines about its shop, which depend on the seed: orders, money, carts and funnel."""
    _, _, after = demo.out.partition("Orders\n")
    return [line for line in after.splitlines() if not line.startswith(("digest of", "calls to Stripe"))]


def test_demo_to_look_around(tmp_path: Path) -> None:
    """Without --exit a demo keeps running: its token opens its orders at its address, until its terminal is closed."""
    with running(
        tmp_path / "data", "demo", "--orders", str(ORDERS), "--seed", str(SEED), PORT=str(free_port())
    ) as demo:
        orders = asked(demo, "/v1/orders?limit=100").json()
        url = demo.value_of("API")

        assert len(next(iter(orders.values()))) >= ORDERS
        assert payfold("digest", PAYFOLD_DATA_DIR=str(demo.folder)).code == 0
        assert "The tables are what the events say." in demo.out

        assert demo.stop(signal.SIGHUP) == 0

    assert_nothing_is_left(demo, url)
    assert list(demo.folder.iterdir()) == []


def test_demo_interrupted(tmp_path: Path) -> None:
    """A demo that is stopped before its proof fails, and leaves no process behind."""
    with running(tmp_path / "data", "demo", "--orders", "20000", PORT=str(free_port())) as demo:
        until(lambda: "Payfold runs at" in demo.err or demo.process.poll() is not None)
        url = address(demo)

        assert demo.stop(signal.SIGINT) == 1

    assert_nothing_is_left(demo, url)
    assert list(demo.folder.iterdir()) == []
    assert "Traceback" not in demo.err
    assert demo.out == ""


def test_demo_with_a_worker_that_ends(tmp_path: Path) -> None:
    """A demo fails when one of its processes ends, and shows the last lines of the process."""
    with running(tmp_path / "data", "demo", "--orders", "20000", PORT=str(free_port())) as demo:
        until(lambda: "Payfold runs at" in demo.err or demo.process.poll() is not None)
        (worker,) = demo.child("-m", "worker")
        os.kill(worker, signal.SIGKILL)

        assert demo.process.wait(STOP_SECONDS_MAX) == 1

    assert "The worker process ended by SIGKILL" in demo.err
    assert "So the demo was stopped." in demo.err
    assert "Traceback" not in demo.err
    assert demo.process_ids() == []


def test_a_signal_within_a_callback() -> None:
    """A signal stops an event loop even if it arrives within a transport's callback."""

    class _StoppedByData(asyncio.Protocol):
        def data_received(self, _: bytes) -> None:
            signal.raise_signal(signal.SIGTERM)

    async def wait_for_ever() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await asyncio.get_running_loop().create_connection(_StoppedByData, sock=ours)
            theirs.send(b"x")
            await asyncio.Event().wait()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        run_until_signal(wait_for_ever())

    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_within_a_finalizer() -> None:
    """A signal stops the block even if it arrives within a finalizer, which drops the handler's exception."""
    hook, left = sys.unraisablehook, threading.Event()
    for kind in STOP_SIGNALS:
        with pytest.raises(KeyboardInterrupt), stop_on_signal():
            stopped_within_a_finalizer(kind, left)

    assert sys.unraisablehook is hook


class _Finalized:
    pass


def stopped_within_a_finalizer(kind: signal.Signals, left: threading.Event) -> None:
    """Raise the signal *kind* within a finalizer, then wait for *left*, but not for ever."""
    gone = _Finalized()
    weakref.finalize(gone, signal.raise_signal, kind)
    del gone
    left.wait(FINALIZED_SECONDS_MAX)


def test_demo_among_others(database_url: str, tmp_path: Path) -> None:
    """A demo refuses a database with other events before it changes any row there."""
    engine = database.engine(database_url)
    ledger.record(engine, [ledger.delivery(sample("payment_link.created", {}, now=1).body)])
    with database.transaction(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    before = payfold("events", "list", "--format", "json", DATABASE_URL=database_url)

    ran = payfold("demo", "--exit", "--orders", "1", DATABASE_URL=database_url, PAYFOLD_DATA_DIR=str(tmp_path))

    assert (ran.code, ran.out) == (1, "")
    assert "holds events that no demo made" in ran.err
    assert payfold("events", "list", "--format", "json", DATABASE_URL=database_url) == before
    assert list(tmp_path.iterdir()) == []
    engine.dispose()
