"""Tests of a deployment as a platform runs it: a fresh clone, only requirements.txt installed, the Procfile's lines.

`.ci/deployed` makes the folder that PAYFOLD_DEPLOYED names, with the clone in `checkout` and the environment in `env`,
and runs this file; everywhere else it is skipped. The file itself runs in the development environment and plays the
outside world: it starts PostgreSQL and Redis, serves the sandbox Stripe, asks over HTTP as the shop does, and runs
`python -m deploy …` as an operator does. Tests run in the order of the file: later ones read what earlier ones record.
"""

import hashlib
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest

from deploy.local.leash import leashed
from deploy.local.postgres import Postgres
from deploy.local.signals import stop_on_signal
from deploy.local.valkey import Valkey
from deploy.sandbox.account import Account
from deploy.sandbox.http_api import StripeApi
from deploy.sandbox.server import serving
from deploy.sandbox.signing import sign
from tests.command import Ran
from tests.waiting import until

FOLDER = os.environ.get("PAYFOLD_DEPLOYED")
if FOLDER is None:
    pytest.skip("PAYFOLD_DEPLOYED is not set: .ci/deployed makes what it names, and runs this", allow_module_level=True)
pytestmark = pytest.mark.deployed

KEY = "sk_test_of_the_shop"
SECRET = "whsec_of_the_shop"
TOKEN = "pf_of_the_shop"
HOUR = 3_600
STOP_SECONDS_MAX = 30
"""The seconds that a platform gives a process between SIGTERM and SIGKILL."""
LINES_SHOWN = 25
SOON = {f"PAYFOLD_{job}_SECONDS": "1" for job in ("SWEEP", "EXPIRE", "FETCH", "POLL")}


@dataclass(frozen=True, repr=False)
class Deployed:
    """A deployed Payfold, on servers of this machine, and a shop at the sandbox Stripe."""

    folder: Path
    settings: Mapping[str, str]
    account: Account
    stripe: StripeApi
    abandoned: str
    """A session that its buyer left two hours ago."""
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def checkout(self) -> Path:
        """The clone, which is the working folder of every process."""
        return self.folder / "checkout"

    @property
    def procfile(self) -> dict[str, str]:
        """The lines of the Procfile by name."""
        lines = (self.checkout / "Procfile").read_text().splitlines()
        return {name: command for name, _, command in (line.partition(": ") for line in lines)}

    def environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a process: *settings*, and a path with the deployed `python`."""
        path = f"{self.folder / 'env' / 'bin'}{os.pathsep}{os.defpath}"
        return {"PATH": path, "HOME": str(self.folder), "LANG": "C.UTF-8", **settings}

    def python(self, *arguments: str, settings: Mapping[str, str]) -> Ran:
        """Run the deployed python to its end."""
        done = subprocess.run(
            leashed(["python", *arguments], signal.SIGTERM),
            cwd=self.checkout,
            env=self.environment(settings),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        ran = Ran(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in ran.err, ran.err
        return ran

    def payfold(self, *arguments: str, settings: Mapping[str, str] | None = None) -> Ran:
        """Run `python -m deploy …`, by default with the settings of the deployment."""
        return self.python("-m", "deploy", *arguments, settings=self.settings if settings is None else settings)

    def start(self, name: str) -> "subprocess.Popen[bytes]":
        """Start a line of the Procfile as a platform does."""
        with self.log(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                leashed(["/bin/sh", "-c", f"exec {self.procfile[name]}"], signal.SIGTERM),
                cwd=self.checkout,
                env=self.environment(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.processes[name]

    def log(self, name: str) -> Path:
        """Return the log file of a process."""
        return self.folder / f"{name}.log"

    def end(self) -> None:
        """Stop every process."""
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def until(self, holds: Callable[[], object], seconds: float = 60.0) -> None:
        """Wait until *holds* is true; fail with the processes' last lines after a timeout or if a process has ended."""

        def holds_while_all_run() -> object:
            ended = {name: process.returncode for name, process in self.processes.items() if process.poll() is not None}
            assert not ended, f"ended by itself: {ended}\n{self.last_lines()}"
            return holds()

        until(holds_while_all_run, seconds, why_not=lambda: f"it did not come to pass\n{self.last_lines()}")

    def last_lines(self) -> str:
        """Return the last lines of each process."""
        logs = {name: self.log(name).read_text().splitlines()[-LINES_SHOWN:] for name in self.processes}
        return "\n".join(f"{name} | {line}" for name, lines in logs.items() for line in lines)

    def get(self, path: str) -> httpx.Response:
        """Request over HTTP as the shop does; 599 if no server answers."""
        url = f"http://127.0.0.1:{self.settings['PORT']}{path}"
        try:
            return httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
        except httpx.TransportError:
            return httpx.Response(599)

    def deliver(self, body: bytes) -> int:
        """Send an event as Stripe does, and return the status of the answer."""
        url = f"http://127.0.0.1:{self.settings['PORT']}/webhooks/stripe"
        headers = {"Stripe-Signature": sign(body, SECRET, int(time.time()))}
        return httpx.post(url, content=body, headers=headers, timeout=10).status_code

    def status_of(self, session: str) -> str | None:
        """Return the status of an order as the shop reads it."""
        answer = self.get(f"/v1/orders/{session}")
        return str(answer.json()["status"]) if answer.is_success else None


def free_port() -> int:
    """Return a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """Run the system's PostgreSQL and Redis, and yield the settings that name them."""
    postgres_bin, redis_bin = (Path(os.environ[f"PAYFOLD_TEST_{name}_BIN"]) for name in ("POSTGRES", "VALKEY"))
    postgres = Postgres(folder / "postgres", postgres_bin=postgres_bin)
    with postgres, Valkey(folder / "redis", valkey_bin=redis_bin) as redis:
        yield {"DATABASE_URL": postgres.url, "REDIS_URL": redis.url}


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployed]:
    """Return a deployed Payfold: released, started and ready."""
    folder = Path(FOLDER or "")
    account = Account(seed=12, payments=True, start=int(time.time()) - 2 * HOUR)
    abandoned = account.open_session(recoverable=True)
    stripe = StripeApi({KEY: account}, clock=lambda: int(time.time()))
    # Everything is ended in reverse order, also when a signal ends the run.
    with ExitStack() as running:
        running.enter_context(stop_on_signal())
        settings = running.enter_context(servers(folder / "servers")) | SOON
        settings |= {
            "STRIPE_API_KEY": KEY,
            "STRIPE_API_BASE": running.enter_context(serving(stripe)),
            "STRIPE_WEBHOOK_SECRETS": SECRET,
            "PAYFOLD_TOKENS": f"shop:read:{hashlib.sha256(TOKEN.encode()).hexdigest()}",
            "PORT": str(free_port()),
            "PAYFOLD_HOST": "127.0.0.1",
        }
        made = Deployed(folder, settings, account, stripe, abandoned)
        running.callback(made.end)
        released = made.start("release")
        assert released.wait(60) == 0, made.last_lines()
        del made.processes["release"]
        for name in made.procfile.keys() - {"release"}:
            made.start(name)
        made.until(lambda: made.get("/health/ready").status_code == 200)
        yield made


@pytest.fixture(scope="module")
def another_database(deployed: Deployed) -> dict[str, str]:
    """Return the settings of an empty database, without Redis and Stripe."""
    name = f"payfold_{secrets.token_hex(4)}"
    with psycopg.connect(deployed.settings["DATABASE_URL"], autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
    return {"DATABASE_URL": urlsplit(deployed.settings["DATABASE_URL"])._replace(path=f"/{name}").geturl()}


# ---- The environment ----


def test_nothing_but_what_is_locked(deployed: Deployed) -> None:
    """requirements.txt names every installed package; the fast HTTP parser, event loop and driver are installed."""
    locked = re.findall(r"^([a-z0-9-]+)==", (deployed.checkout / "requirements.txt").read_text(), re.MULTILINE)
    listing = "import importlib.metadata as m; print(*(d.metadata['Name'] for d in m.distributions()))"
    listed = deployed.python("-c", listing, settings={}).out.lower().replace("_", "-").replace(".", "-").split()
    assert set(listed) <= set(locked)

    quick = deployed.python("-c", "import httptools, uvloop, psycopg; print(psycopg.pq.__impl__)", settings={})
    assert (quick.code, quick.out) == (0, "binary\n")


def test_without_settings(deployed: Deployed) -> None:
    """Without settings every line of the Procfile exits with 2 and names the missing setting."""
    for command in deployed.procfile.values():
        ran = deployed.python(*command.split()[1:], settings={})
        assert (ran.code, "DATABASE_URL" in ran.err) == (2, True)


# ---- From outside ----


def test_a_delivery_becomes_an_order(deployed: Deployed) -> None:
    """A signed delivery of a payment becomes a paid order that the shop can read."""
    with deployed.stripe.lock:
        order = deployed.account.open_session(client_reference_id="1001")
        deployed.account.complete(order)
        events = list(deployed.account.events)

    assert [deployed.deliver(event.body) for event in events] == [200] * len(events)

    deployed.until(lambda: deployed.status_of(order) == "paid")
    assert deployed.get(f"/v1/orders/{order}").json()["client_reference_id"] == "1001"


def test_a_stale_session_is_expired(deployed: Deployed) -> None:
    """Clock and worker find an abandoned session and expire it at Stripe, and the shop can read that."""
    deployed.until(lambda: deployed.status_of(deployed.abandoned) == "expired")

    assert deployed.account.session(deployed.abandoned)["status"] == "expired"
    changes = deployed.get("/v1/changes?after=0&limit=100").json()["data"]
    kinds = [each["kind"] for each in changes if each["subject_id"] == deployed.abandoned]
    assert kinds.count("order.expired") == 1


@pytest.mark.parametrize("path", ["/health/live", "/docs", "/openapi.json", "/metrics", "/v1/events", "/v1/anomalies"])
def test_pages(deployed: Deployed, path: str) -> None:
    """Pages made by other packages are served too: the API's documentation, the metrics."""
    assert deployed.get(path).status_code == 200


# ---- The command ----


def test_status(deployed: Deployed) -> None:
    """`status` exits with 0: database, broker, processes and the jobs at Stripe are fine."""
    ran = deployed.payfold("status", "--format", "json")

    assert ran.code == 0, ran.err
    found = ran.json
    assert (found["database"], found["broker"]["state"], found["stripe"]["state"]) == ("ok", "ok", "ok")


def test_the_tables_are_right(deployed: Deployed, tmp_path: Path) -> None:
    """A rebuild, money's rules and Stripe find nothing wrong while everything runs, and the report can be written."""
    assert deployed.payfold("rebuild").code == 0

    report = tmp_path / "report.html"
    ran = deployed.payfold("reconcile", "--stripe", "--report", str(report))
    assert ran.code == 0, ran.out + ran.err
    assert "<style>" in report.read_text()


def test_up(deployed: Deployed, another_database: dict[str, str], tmp_path: Path) -> None:
    """`up` runs the processes on configured servers, without the extra that installs servers, until it is stopped."""
    redis_url = urlsplit(deployed.settings["REDIS_URL"])._replace(path="/1").geturl()
    more = {"REDIS_URL": redis_url, "PORT": str(free_port()), "PAYFOLD_DATA_DIR": str(tmp_path / "data")}
    log = tmp_path / "log"
    with log.open("wb") as file:
        up = subprocess.Popen(
            leashed(["python", "-m", "deploy", "up"], signal.SIGTERM),
            cwd=deployed.checkout,
            env=deployed.environment(another_database | more),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deployed.until(lambda: "runs here until Ctrl-C" in log.read_text() or up.poll() is not None)
        up.terminate()
        assert up.wait(STOP_SECONDS_MAX) == 0, log.read_text()
    finally:
        up.kill()
        up.wait()


# ---- The end ----


def test_all_ends_when_asked(deployed: Deployed) -> None:
    """After SIGTERM each process ends by itself within the 30 seconds that a platform gives it, and leaves no child."""
    asked_at = time.monotonic()
    for process in deployed.processes.values():
        process.terminate()
    ended = {
        name: process.wait(max(0.0, asked_at + STOP_SECONDS_MAX - time.monotonic()))
        for name, process in deployed.processes.items()
    }

    # uvicorn shuts down in good order, and then ends itself by the signal that it received.
    assert ended.pop("web") in {0, -signal.SIGTERM}, deployed.last_lines()
    assert ended == {"worker": 0, "clock": 0}, deployed.last_lines()
    assert "Traceback" not in deployed.last_lines()
    for process in deployed.processes.values():
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def test_the_log_replays(deployed: Deployed, another_database: dict[str, str], tmp_path: Path) -> None:
    """A log of one deployment's events, replayed into an empty database, gives the same tables."""
    log = str(tmp_path / "events.zst")
    exported = deployed.payfold("events", "export", "--output", log)
    assert exported.code == 0, exported.err
    assert deployed.payfold("migrate", "up", settings=another_database).code == 0

    replayed = deployed.payfold("replay", log, settings=another_database)

    assert replayed.code == 0, replayed.err
    digests = [deployed.payfold("digest", settings=of) for of in (deployed.settings, another_database)]
    assert [digest.code for digest in digests] == [0, 0]
    assert digests[0].out == digests[1].out


def test_drift_is_found_and_repaired(deployed: Deployed, another_database: dict[str, str]) -> None:
    """Rebuild and reconcile exit with 3 if a row was edited by hand, until it is repaired."""
    with psycopg.connect(another_database["DATABASE_URL"]) as connection:
        connection.execute("UPDATE orders SET amount_total = amount_total + 1 WHERE status = 'paid'")

    assert deployed.payfold("rebuild", settings=another_database).code == 3
    assert deployed.payfold("reconcile", settings=another_database).code == 3
    assert deployed.payfold("reconcile", "--repair", settings=another_database).code == 0
    assert deployed.payfold("rebuild", settings=another_database).code == 0


def test_an_empty_database(deployed: Deployed) -> None:
    """A command exits with 4 on a database that was never migrated, and with 1 if there is none."""
    url = urlsplit(deployed.settings["DATABASE_URL"])._replace(path="/template1").geturl()
    assert deployed.payfold("status", settings={"DATABASE_URL": url}).code == 4
    nowhere = f"postgresql://payfold@127.0.0.1:{free_port()}/payfold"
    assert deployed.payfold("status", settings={"DATABASE_URL": nowhere}).code == 1
