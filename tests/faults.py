"""A worker, and faults of its servers, for the tests that show that it survives them."""

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import redis
from sqlalchemy import Engine

from deploy.local.leftovers import processes_in
from deploy.local.postgres import Postgres
from deploy.local.valkey import Valkey
from deploy.sandbox.account import Account
from schemas import broker
from tests import command, ledger
from tests.waiting import until

STOP_SECONDS_MAX = 40


@dataclass(frozen=True)
class Started:
    """A process of Payfold with its log."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """Return its log lines: all of them, or those of one *event*."""
        lines = (line for line in self.log.read_bytes().splitlines() if line.startswith(b"{") and line.endswith(b"}"))
        found = [msgspec.json.decode(line) for line in lines]
        return [each for each in found if event in {"", each["event"]}]

    def children(self) -> list[int]:
        """Return the processes that it forked, in the order of forking."""
        pid = self.process.pid
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def stop(self) -> int:
        """Stop it by SIGTERM and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS_MAX)


@contextmanager
def started(log: Path, module: str, *arguments: str, **settings: str) -> Iterator[Started]:
    """Run ``python -m`` *module* in a process, and kill it at the end if it is still running."""
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=command.environment(settings),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            yield Started(process, log)
        finally:
            process.kill()
            process.wait()


@contextmanager
def paused(server: Postgres | Valkey) -> Iterator[None]:
    """Suspend all of a server's processes: its connections stay open, and no request is answered."""
    found = processes_in(server._working_folder, server.binary.name)
    assert found
    _signal(found, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(found, signal.SIGCONT)


def _signal(processes: list[int], number: signal.Signals) -> None:
    for each in processes:
        with suppress(ProcessLookupError):
            os.kill(each, number)


def flush(url: str) -> None:
    """Delete every message of the broker."""
    with redis.Redis.from_url(url) as client:
        client.flushall()


def cut(url: str) -> None:
    """Close every connection but our own, from the server's side."""
    with redis.Redis.from_url(url) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def waiting(url: str, queue: str = broker.FOLD_QUEUE) -> int:
    """Return how many messages wait in *queue*."""
    with redis.Redis.from_url(url) as client:
        return int(client.llen(queue))


def put(url: str, task: str, queue: str) -> None:
    """Send a message over a connection of its own."""
    app = broker.celery(settings_of(url))
    app.send_task(task, queue=queue)
    app.close()


def settings_of(redis_url: str) -> Any:  # noqa: ANN401 - settings
    """Return settings that name a broker."""
    from schemas.settings import Settings  # noqa: PLC0415 - for this alone

    return Settings.load({"REDIS_URL": redis_url})


class Shop:
    """A shop with events that are recorded a few at a time, without a wake-up message."""

    def __init__(self, engine: Engine, *, seed: int = 41) -> None:
        self._engine, self._account, self._recorded = engine, Account(seed=seed), 0

    def record(self, count: int = 20) -> None:
        """Record the creation of *count* payment links."""
        for _ in range(count):
            self._account.create_payment_link()
        events = self._account.events[self._recorded :]
        ledger.record(self._engine, [ledger.delivery(event.body) for event in events])
        self._recorded += len(events)

    def pending(self) -> int:
        """Return the number of pending events."""
        (row,) = ledger.rows(self._engine, "SELECT count(*) AS found FROM pending")
        return int(row["found"])

    def until_folded(self, seconds: float = 40.0) -> None:
        """Return once nothing is pending."""
        until(lambda: self.pending() == 0, seconds)


class Proxy:
    """A proxy that can fall silent: it accepts bytes, as TCP does, and forwards none of them."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._listening = socket.create_server(("127.0.0.1", 0))
        port = self._listening.getsockname()[1]
        credentials = parts.netloc.rpartition("@")[0]
        self.url = parts._replace(netloc=f"{credentials}@127.0.0.1:{port}").geturl()
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._silent: set[socket.socket] = set()
        self.silences_new = False
        """Whether new connections are taken, and get no answer."""
        self.silences_once_ready = False
        """Whether a new connection gets no further answer once the server is ready for its first statement."""
        self.makes_up_backends = False
        """Whether it names a server process of its own making to who connects, as a pooler does."""
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def fall_silent(self) -> int:
        """Stop forwarding on the connections that are open now, and return their number; new connections work."""
        with self._lock:
            self._silent |= set(self._peers)
            return len(self._silent) // 2

    def ports(self) -> list[int]:
        """Return the local ports of its connections to the server."""
        with self._lock:
            return [each.getsockname()[1] for each in self._peers if each.getpeername()[1] == self._server[1]]

    def close(self) -> None:
        """Close the proxy and every connection."""
        self._over.set()
        self._thread.join()
        for each in (self._listening, *self._peers):
            each.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._over.is_set():
            for key, _ in self._selector.select(timeout=0.2):
                assert isinstance(key.fileobj, socket.socket)
                with self._lock:
                    self._accept() if key.fileobj is self._listening else self._pass_on(key.fileobj)

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        server = socket.create_connection(self._server)
        self._peers |= {client: server, server: client}
        if self.silences_new:
            self._silent |= {client, server}
        for each in (client, server):
            self._selector.register(each, selectors.EVENT_READ)

    def _pass_on(self, source: socket.socket) -> None:
        target = self._peers.get(source)
        if target is None:  # its peer was the one before
            return
        received = b""
        with suppress(OSError):
            received = source.recv(65_536)
        if not received:
            self._forget(source, target)
        elif source not in self._silent:
            if self.makes_up_backends:
                received = _KEY_DATA.sub(lambda found: found[1] + b"\0\0\0\x01" + found[2], received)
            with suppress(OSError):
                target.sendall(received)
            if self.silences_once_ready and received.endswith(b"Z\0\0\0\x05I"):
                self._silent |= {source, target}

    def _forget(self, *both: socket.socket) -> None:
        for each in both:
            self._selector.unregister(each)
            del self._peers[each]
            self._silent.discard(each)
            each.close()


# PostgreSQL's BackendKeyData: its length, the number of the server process, and a secret.
_KEY_DATA: Final = re.compile(rb"(K\0\0\0\x0c).{4}(.{4}Z\0\0\0\x05I)", re.DOTALL)


def environment(database_url: str, redis_url: str, **more: str) -> Mapping[str, str]:
    """Return the settings of a worker that sweeps each second, if anything triggers a sweep."""
    return {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "PAYFOLD_SWEEP_SECONDS": "1", **more}
