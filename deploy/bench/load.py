"""Load from a process of its own, by a client that is faster than what it measures.

``saturate`` keeps some connections busy, by wrk where the machine has it and else by the client here; both send each
prepared request once and wait for every answer. ``paced`` sends at a steady rate and does not slow down for slow
answers. The time of each answer runs from when its request was due, so that a slow answer is counted in full.
"""

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from string import Template
from typing import Final

import msgspec
import uvloop
from msgspec import Struct

from deploy.bench.apart import hand_over
from deploy.bench.errors import LoadError
from deploy.bench.events import PATH, read_requests
from deploy.local.leash import leashed
from deploy.local.ports import LOOPBACK

CONNECTIONS: Final = 64
SECONDS_MAX: Final = 300
LEAD_SECONDS: Final = 0.05
_LOST: Final = 0
"""Stands for the status of an answer that never came."""


class Loaded(Struct, frozen=True):
    """The answers to a saturating load; *refused* counts every answer but a 200."""

    accepted: int
    refused: int
    seconds: float
    client: str

    @property
    def rate(self) -> float:
        """Answers of 200 in a second."""
        return self.accepted / self.seconds


class Answered(Struct, frozen=True, array_like=True):
    """One request of a paced load, in seconds of the machine's monotonic clock."""

    due: float
    sent: float
    answered: float
    status: int


# ---- For the measuring process ----


def saturate(
    port: int, requests: Path, count: int, *, connections: int = CONNECTIONS, client: str | None = None
) -> Loaded:
    """Send the *count* prepared *requests* as fast as they are answered, over so many *connections*.

    *client* is ``wrk`` or ``own``; None takes the first that is there.

    Raises:
        LoadError: the client failed, or did not end in time.
    """
    chosen = client or ("wrk" if shutil.which("wrk") else "own")
    if chosen == "own":
        return msgspec.json.decode(_run(_own("saturate", port, requests, connections)), type=Loaded)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        template = Template((Path(__file__).parent / "wrk.lua").read_text())
        script.write(template.substitute(count=count, path=PATH, requests=requests))
        script.flush()
        url = f"http://{LOOPBACK}:{port}"
        flags = ["-t1", f"-c{connections}", f"-d{SECONDS_MAX}s", "--timeout", "60s", "-s", script.name]
        return msgspec.json.decode(_run(["wrk", *flags, url]), type=Loaded)


def paced(port: int, requests: Path, rate: float) -> list[Answered]:
    """Send the prepared *requests* at *rate* in a second, and return what became of each, in their order.

    Raises:
        LoadError: as above.
    """
    return msgspec.json.decode(_run(_own("paced", port, requests, rate)), type=list[Answered])


def _own(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "deploy.bench.load", *map(str, arguments)]


def _run(command: Sequence[str]) -> bytes:
    try:
        done = subprocess.run(  # noqa: S603 - our own command
            leashed(command, signal.SIGTERM),
            cwd=Path(__file__).parent.parent.parent,
            capture_output=True,
            timeout=SECONDS_MAX + 10,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LoadError(f"{command[0]} sent load for {SECONDS_MAX} seconds without an end.") from None
    # wrk prints lines of its own before that.
    last = done.stdout.rstrip().rpartition(b"\n")[2]
    if done.returncode or not last.startswith((b"{", b"[")):
        words = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise LoadError(f"The load could not be sent: {words or f'the client ended with {done.returncode}'}")
    return last


# ---- The client ----

_LENGTH: Final = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)
_END_OF_HEAD: Final = b"\r\n\r\n"
_STATUS: Final = slice(9, 12)


class _Connection(asyncio.Protocol):
    """One connection, with at most one request on its way; it calls *announce* with the status of the answer."""

    def __init__(self, announce: Callable[["_Connection", int], None]) -> None:
        self._announce = announce
        self._buffer = b""
        self._transport: asyncio.WriteTransport | None = None
        self.is_waiting = False

    @property
    def is_open(self) -> bool:
        """Whether the connection takes a request."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes) -> None:
        """Send *request*."""
        self.is_waiting = True
        assert self._transport is not None  # noqa: S101 - it is sent on open ones alone
        self._transport.write(request)

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, so that requests can be sent."""
        self._transport = transport  # type: ignore[assignment]  # a socket's is one for both ways

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the request that is on its way as lost."""
        del exc
        self._transport = None
        if self.is_waiting:
            self.is_waiting = False
            self._announce(self, _LOST)

    def data_received(self, data: bytes) -> None:
        """Report the answer once all of it has arrived."""
        self._buffer += data
        end = self._buffer.find(_END_OF_HEAD)
        if end < 0:
            return
        length = _LENGTH.search(self._buffer, 0, end)
        if len(self._buffer) < end + len(_END_OF_HEAD) + (int(length[1]) if length else 0):
            return
        status, self._buffer = int(self._buffer[_STATUS]), b""
        self.is_waiting = False
        self._announce(self, status)


async def _connect(port: int, announce: Callable[[_Connection, int], None]) -> _Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: _Connection(announce), LOOPBACK, port)
    return connection


async def saturating(port: int, requests: Sequence[bytes], connections: int) -> Loaded:
    """Send each of *requests* once, on *connections* that are never idle, and return what came of it."""
    statuses: list[int] = []
    waiting = iter(requests)
    done = asyncio.get_running_loop().create_future()
    again: set[asyncio.Task[None]] = set()

    def go_on(connection: _Connection) -> None:
        request = next(waiting, None)
        if request is not None:
            connection.send(request)

    async def reconnect() -> None:
        try:
            go_on(await _connect(port, announce))
        except OSError as error:
            done.set_exception(error)

    def announce(connection: _Connection, status: int) -> None:
        statuses.append(status)
        if len(statuses) == len(requests):
            done.set_result(None)
        elif connection.is_open:
            go_on(connection)
        else:
            again.add(asyncio.create_task(reconnect()))

    opened = [await _connect(port, announce) for _ in range(min(connections, len(requests)))]
    started = time.monotonic()
    for connection in opened:
        go_on(connection)
    await done
    seconds = time.monotonic() - started
    for connection in opened:
        connection.close()
    accepted = statuses.count(200)
    return Loaded(accepted, len(statuses) - accepted, seconds, "own")


async def pacing(port: int, requests: Sequence[bytes], rate: float) -> list[Answered]:
    """Send *requests* at *rate* in a second, and return what became of each, in their order."""
    pacer = _Pacer(requests)
    pacer.idle.extend([await _connect(port, pacer.announce) for _ in range(CONNECTIONS)])
    started = time.monotonic() + LEAD_SECONDS
    for number in range(len(requests)):
        due = started + number / rate
        await asyncio.sleep(0)  # even if requests are late, answers have to be received
        while (early := due - time.monotonic()) > 0:  # noqa: ASYNC110 - there is nothing to wait for but the time
            # The loop's timers count whole milliseconds, and may be early.
            await asyncio.sleep(ceil(early * 1000) / 1000)
        pacer.send(number, due)
    await pacer.done
    return [each for each in pacer.found if each is not None]


class _Pacer:
    """Sends each request that is due on an idle connection; requests that are late for want of one go out first."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self.idle: deque[_Connection] = deque()
        self.found: list[Answered | None] = [None] * len(requests)
        self.done = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._left = len(requests)
        self._late: deque[tuple[int, float]] = deque()
        self._on_way: dict[_Connection, tuple[int, float, float]] = {}

    def send(self, number: int, due: float) -> None:
        """Send a request that is due, as soon as there is a connection for it."""
        self._late.append((number, due))
        self._send_late()

    def announce(self, connection: _Connection, status: int) -> None:
        """Note an answer, and use its connection again."""
        number, due, sent = self._on_way.pop(connection)
        self.found[number] = Answered(due, sent, time.monotonic(), status)
        self._left -= 1
        if connection.is_open:
            self.idle.append(connection)
            self._send_late()
        elif self._left and not self.done.done():
            self.done.set_exception(ConnectionError("the server closed a connection"))
        if not self._left and not self.done.done():
            self.done.set_result(None)

    def _send_late(self) -> None:
        while self._late and self.idle:
            connection, (number, due) = self.idle.popleft(), self._late.popleft()
            self._on_way[connection] = (number, due, time.monotonic())
            connection.send(self._requests[number])


def main(kind: str, port: str, requests: str, much: str) -> None:
    """Send load, on so *much* connections or at so *much* a second, and print what came of it as JSON."""
    prepared = list(read_requests(Path(requests)))
    if kind == "saturate":
        found: Loaded | list[Answered] = uvloop.run(saturating(int(port), prepared, int(much)))
    else:
        found = uvloop.run(pacing(int(port), prepared, float(much)))
    hand_over(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
