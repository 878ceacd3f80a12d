"""The place of a measurement: embedded servers, databases of its own, and the real processes, started one by one."""

import hashlib
import http.client
import os
import secrets
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Final, TextIO
from urllib.parse import urlsplit

import httpx
import psycopg
from psycopg import sql
from sqlalchemy import Engine, text

from deploy.bench import apart
from deploy.bench.errors import BenchError
from deploy.local.databases import drop_database
from deploy.local.ports import LOOPBACK, free_port
from deploy.local.processes import RELEASE, Processes, read_procfile
from deploy.local.services import Services, embedded_services
from schemas import broker, database, envfile, migrate
from schemas.settings import Settings

ROOT: Final = Path(__file__).parent.parent.parent
PLAIN: Final = ROOT / "tests" / "benchmarks" / "plain.py"
TEMPLATE: Final = "payfold"
"""The database that the servers begin with is migrated and left empty: others are copied from it."""
PREFIX: Final = "bench_"
READY_SECONDS_MAX: Final = 60
FOLD_SECONDS_MAX: Final = 14_400
POLL_SECONDS: Final = 0.01
GRACE_SECONDS: Final = 10.0
SECOND_WORKER: Final = "worker-2"
"""A worker like that of the Procfile, next to it."""


@dataclass(frozen=True, slots=True)
class Site:
    """The servers, and the folder that holds their data and every other file that is written."""

    services: Services
    folder: Path
    log: TextIO
    _numbers: Iterator[int] = field(default_factory=lambda: cycle(range(1, 64)), repr=False)

    @contextmanager
    def stand(self, name: str = "", *, template: str = TEMPLATE, is_kept: bool = False) -> Iterator["Stand"]:
        """Make a database, a copy of *template*, yield what runs on it, and drop it unless it *is_kept*."""
        name = name or f"{PREFIX}{secrets.token_hex(4)}"
        with psycopg.connect(self.services.database_url, autocommit=True) as connection:
            known = connection.execute("SELECT FROM pg_database WHERE datname = %s", (name,)).fetchone()
            if known is None or not is_kept:
                connection.execute(
                    sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
                )
        if known is not None:
            # An interrupted run may have been of an older version.
            migrate.upgrade(database.sqlalchemy_url(_at(self.services.database_url, name)))
        try:
            made = Stand(self, _at(self.services.database_url, name), self._broker(), self._broker())
            try:
                yield made
            finally:
                made.close()
        finally:
            if not is_kept:
                with psycopg.connect(self.services.database_url, autocommit=True) as connection:
                    drop_database(connection, name)

    def _broker(self) -> str:
        """Return the URL of an empty broker."""
        url = _at(self.services.redis_url, str(next(self._numbers)))
        with broker.redis(Settings.load({"REDIS_URL": url})) as client:
            client.flushdb()
        return url


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Run servers in *folder*, migrated, until the block ends."""
    with embedded_services(folder) as found, (folder / "processes.log").open("a") as log:
        migrate.upgrade(database.sqlalchemy_url(found.database_url))
        _drop_leftovers(found.database_url)
        yield Site(found, folder, log)


def _drop_leftovers(database_url: str) -> None:
    """Drop what a killed bench left in a folder that is kept."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        left = connection.execute(
            "SELECT datname FROM pg_database WHERE starts_with(datname, %s)", (PREFIX,)
        ).fetchall()
        for (name,) in left:
            drop_database(connection, name)


def _at(url: str, path: str) -> str:
    return urlsplit(url)._replace(path=f"/{path}").geturl()


def _foreign(environment: Mapping[str, str]) -> dict[str, str]:
    """Return *environment* without settings of Payfold's, so that a user's own settings change no figure."""
    ours = {name.upper() for name in Settings.model_fields} | {envfile.ENV_FILE}
    return {name: value for name, value in environment.items() if name.upper().removesuffix("_FILE") not in ours}


class Stand:
    """One database, and the processes that work on it, none of which runs before it is asked for."""

    def __init__(self, at: Site, database_url: str, redis_url: str, plain_broker_url: str) -> None:
        self.folder = at.folder
        self.secret = f"whsec_{secrets.token_urlsafe(24)}"
        self.token = f"pf_{secrets.token_urlsafe(24)}"
        self.port, self.bare_port, self.plain_port = (free_port() for _ in range(3))
        self.environment = _foreign(os.environ) | {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "PORT": str(self.port),
            "PAYFOLD_HOST": LOOPBACK,
            # Else the processes would find the .env of this machine's user.
            "PAYFOLD_DATA_DIR": str(at.folder),
            "PAYFOLD_LOG_LEVEL": "warning",
            "STRIPE_WEBHOOK_SECRETS": self.secret,
            "PAYFOLD_TOKENS": f"bench:admin+personal:{hashlib.sha256(self.token.encode()).hexdigest()}",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            # The plain alternative has tables and queues of its own.
            "PLAIN_DATABASE_URL": database.sqlalchemy_url(database_url),
            "PLAIN_BROKER_URL": plain_broker_url,
            "TMPDIR": str(at.folder),
        }
        self.settings = Settings.load(self.environment)
        self.engine: Engine = database.engine(self.settings.postgresql, connections_max=4)
        self.celery = broker.celery(self.settings)
        self.redis = broker.redis(self.settings)
        self.plain_redis = broker.redis(Settings.load({"REDIS_URL": plain_broker_url}))
        self._processes = Processes(
            self.environment, procfile=self._procfile(), grace_seconds=GRACE_SECONDS, output=at.log
        )
        self._log = at.log
        self._starting: list[str] = []

    def _procfile(self) -> Path:
        """Write the Procfile's own lines, and add those of the limit and of the plain alternative."""
        lines = {name: command for name, command in read_procfile().items() if name != RELEASE}
        # The worker is to idle while events are recorded, and its own timer would begin to fold them.
        lines["worker"] = f"env PAYFOLD_SWEEP_SECONDS=3600 {lines['worker']}"
        lines[SECOND_WORKER] = lines["worker"]
        lines["bare"] = f"python -m deploy.bench.bare {self.bare_port}"
        lines["plain-web"] = (
            f"python -m uvicorn tests.benchmarks.plain:app --host {LOOPBACK} --port {self.plain_port} --http httptools"
            " --loop uvloop --no-access-log --log-level warning"
        )
        lines["plain-worker"] = (
            "python -m celery -A tests.benchmarks.plain:celery worker --concurrency 2 --loglevel WARNING"
            " --without-gossip --without-mingle --without-heartbeat"
        )
        # Not in the folder of the packages: processes run in the folder of their Procfile, and find the packages by
        # PYTHONPATH.
        path = self.folder / f"Procfile.{self.port}"
        path.write_text("".join(f"{name}: {command}\n" for name, command in lines.items()))
        return path

    # ---- Processes ----

    def run(self, *names: str) -> None:
        """Let exactly the processes *names* run, ready for work."""
        self.start(*names)
        while self._starting:
            self._await_ready(self._starting[0])
            self._starting.pop(0)

    def start(self, *names: str) -> None:
        """Start them as ``run`` does, without waiting until they are ready; a later ``run`` waits."""
        for name in self._processes.names:
            if self.runs(name) and name not in names:
                self._processes.kill(name)
        started = [name for name in names if not self.runs(name)]
        if "worker" in started:
            # The broker is a hint: messages that a killed worker held must not come back during a measurement.
            self.redis.flushdb()
        for name in started:
            self._processes.start_one(name)
        self._starting = [name for name in self._starting if name in names] + started

    def runs(self, name: str) -> bool:
        """Return whether the process *name* runs."""
        try:
            self._processes.pid(name)
        except KeyError:
            return False
        return self._processes.returncode(name) is None

    def pids(self, *names: str) -> list[int]:
        """Return the ids of the processes *names* and of their children."""
        return [pid for name in names for pid in apart.family(self._processes.pid(name))]

    def server_pids(self) -> list[int]:
        """Return the ids of the processes of both servers."""
        ours = {pid for name in self._processes.names if self.runs(name) for pid in self.pids(name)}
        return [pid for pid in apart.family(os.getpid()) if pid not in ours and pid != os.getpid()]

    def _await_ready(self, name: str) -> None:
        ready = {
            "web": lambda: self._answers(self.port, "/health/ready"),
            "bare": lambda: self._answers(self.bare_port, "/"),
            "plain-web": lambda: self._answers(self.plain_port, "/openapi.json"),
            "worker": self._wake_is_taken,
        }.get(name, lambda: True)
        if name == "worker":
            self.wake()
        deadline = time.monotonic() + READY_SECONDS_MAX
        while not ready():
            if not self.runs(name) or time.monotonic() > deadline:
                self._log.flush()
                raise BenchError(f"The {name} process did not start; {self._log.name} has its own words.")
            time.sleep(0.02)

    def _answers(self, port: int, path: str) -> bool:
        try:
            answer = httpx.get(f"http://{LOOPBACK}:{port}{path}", timeout=5)
        except httpx.TransportError:
            return False
        return answer.status_code != httpx.codes.SERVICE_UNAVAILABLE

    # ---- Work ----

    def wake(self) -> None:
        """Send the worker the one message that there is work."""
        self.celery.send_task(broker.FOLD, queue=broker.FOLD_QUEUE)

    def _wake_is_taken(self) -> bool:
        return self.redis.llen(broker.FOLD_QUEUE) == 0 and self.redis.hlen("unacked") == 0

    def seconds_to_fold(self) -> float:
        """Wake the worker, and return how long it takes until nothing is pending."""
        with psycopg.connect(self.settings.libpq, autocommit=True) as connection:
            # Where PostgreSQL believes the table to be empty, it would read all of it at each look.
            connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
            started = time.monotonic()
            self.wake()
            # To look from the beginning each time would pass over all that is deleted and not yet vacuumed away.
            oldest: Any = 0
            while (oldest := _first(connection, _PENDING, oldest) or _first(connection, _PENDING, 0)) is not None:
                if time.monotonic() - started > FOLD_SECONDS_MAX or not self.runs("worker"):
                    raise BenchError("The worker does not fold what is pending.")
                time.sleep(POLL_SECONDS)
            return time.monotonic() - started

    def one(self, statement: str) -> Any:  # noqa: ANN401 - a value of any type
        """Return the one value that *statement* selects."""
        with database.transaction(self.engine) as connection:
            return connection.execute(text(statement)).scalar_one()

    def column(self, statement: str) -> list[Any]:
        """Return the one column that *statement* selects."""
        with database.transaction(self.engine) as connection:
            return list(connection.execute(text(statement)).scalars())

    def analyze(self) -> None:
        """Update the planner's statistics of the tables."""
        with database.transaction(self.engine) as connection:
            connection.execute(text("ANALYZE"))

    def seconds_to_read(self, paths: Sequence[str], *, cookie: str = "") -> list[float]:
        """Return the seconds that each of *paths* took, one after the other on one connection."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=60)
        headers = {"Authorization": f"Bearer {self.token}", "Cookie": cookie}
        taken = []
        try:
            for path in paths:
                started = time.monotonic()
                connection.request("GET", path, headers=headers)
                answer = connection.getresponse()
                answer.read()
                taken.append(time.monotonic() - started)
                if answer.status != http.client.OK:
                    raise BenchError(f"{path} was answered with {answer.status}.")
        finally:
            connection.close()
        return taken

    def close(self) -> None:
        """Stop every process."""
        for name in self._processes.names:
            if self.runs(name):
                self._processes.kill(name)
        self._processes.stop()
        self.celery.close()
        self.redis.close()
        self.plain_redis.close()
        self.engine.dispose()


_PENDING: Final = "SELECT seq FROM pending WHERE seq >= %s ORDER BY seq LIMIT 1"


def _first(connection: "psycopg.Connection[tuple[Any, ...]]", statement: str, *parameters: object) -> object:
    row = connection.execute(statement, parameters).fetchone()
    return row[0] if row else None


# ---- The machine ----


def machine(at: Site) -> dict[str, object]:
    """Return the facts of the machine and its servers that a measurement depends on."""
    with psycopg.connect(at.services.database_url, autocommit=True) as connection:
        postgresql = str(_first(connection, "SHOW server_version")).split(" ")[0]
    with broker.redis(Settings.load({"REDIS_URL": at.services.redis_url})) as client:
        server: Mapping[str, Any] = client.info("server")
    name = "Valkey" if "valkey_version" in server else "Redis"
    return {
        "": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "RAM": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1024**3:.0f} GB",
        "Python": sys.version.split(" ")[0],
        "PostgreSQL": postgresql,
        name: server.get("valkey_version", server["redis_version"]),
    }


def _processor() -> str:
    try:
        lines: Collection[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = ()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return named[0] if named else os.uname().machine
