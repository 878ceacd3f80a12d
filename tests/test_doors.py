"""A stranger's requests cost the web process a bounded amount of memory, time and log."""

import asyncio
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import psycopg
import pytest
import uvicorn

from api import app
from api.__main__ import server_options
from api.bodies import Overloaded, Room
from deploy.local.postgres import Postgres
from deploy.local.services import Services
from schemas.database import Bounds
from schemas.migrate import upgrade
from schemas.settings import Settings
from tests import faults
from tests.test_recorder import held, posted, status
from tests.waiting import until
from tests.web import (
    OPERATOR,
    PATH,
    READER,
    Raw,
    environment_of,
    event,
    migrated_database,
    serving,
    settings_of,
    signed,
)

MIB = 1024 * 1024
GROWTH_BYTES_MAX = 160 * MIB
"""The room of 64 MiB, the same again for copies of it, and the memory of connections and allocators."""
SENT_BYTES_MAX = 96 * MIB
SECONDS_MAX = 20
STOP_SECONDS_MAX = 30
START_SECONDS_MAX = 90
"""Long enough for three processes to start on a busy machine."""
BODY_SECONDS_MAX = 2.0
ANSWER_SECONDS_MAX = 2.0
READ = Bounds(statement=1, lock=1, whole=2)

WITHOUT_TOKEN: dict[str, str] = {}


def main() -> None:
    """Serve as the web process does, but with shorter timeouts."""
    settings = Settings.load()
    application = app.create(
        settings, body_seconds_max=BODY_SECONDS_MAX, answer_seconds_max=ANSWER_SECONDS_MAX, read_bounds=READ
    )
    uvicorn.run(application, **server_options(settings))


if __name__ == "__main__":
    main()


@dataclass(frozen=True)
class Process:
    """A web process of its own."""

    popen: subprocess.Popen[bytes]
    port: int
    client: httpx.Client

    def is_up(self) -> bool:
        """Return whether the process accepts deliveries."""
        try:
            return self.client.get("/health/live").is_success
        except httpx.TransportError:
            return False

    def peak(self) -> int:
        """Return the peak memory of the process, in bytes."""
        (found,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.popen.pid}/status").read_text())
        return int(found) * 1024

    def deliver(self, body: bytes) -> int:
        """Deliver *body* and return the status."""
        return self.client.post(PATH, content=body, headers=signed(body)).status_code

    def send(self, *parts: bytes) -> Raw:
        """Open a connection and send *parts* over it."""
        raw = Raw(socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS_MAX))
        for part in parts:
            raw.connection.sendall(part)
        return raw

    def stop(self) -> float:
        """Stop the process by SIGTERM, and return the seconds that it took."""
        asked_at = time.monotonic()
        self.popen.terminate()
        self.popen.wait(STOP_SECONDS_MAX)
        return time.monotonic() - asked_at


@contextmanager
def running(
    environment: Mapping[str, str], stderr: int | Path = subprocess.DEVNULL, module: str = "tests.test_doors"
) -> Iterator[Process]:
    """Run a web process, and kill it at the end if it is still running."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    more = {"PORT": str(port), "PAYFOLD_HOST": "127.0.0.1"}
    with ExitStack() as opened:
        output = opened.enter_context(stderr.open("wb")) if isinstance(stderr, Path) else stderr
        popen = subprocess.Popen(
            [sys.executable, "-m", module], env=os.environ | dict(environment) | more, stdout=output, stderr=output
        )
        client = opened.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS_MAX))
        process = Process(popen, port, client)
        try:
            until(lambda: popen.poll() is not None or process.is_up(), START_SECONDS_MAX)
            yield process
        finally:
            popen.kill()
            popen.wait()


@pytest.fixture
def environment(database_url: str, redis_url: str) -> dict[str, str]:
    """Return the environment of a web process with a database of its own."""
    return environment_of(database_url, redis_url)


@pytest.fixture(scope="module")
def shared(services: Services) -> Iterator[Process]:
    """Return a web process for the tests that leave nothing behind."""
    with migrated_database(services) as url, running(environment_of(url, services.redis_url)) as process:
        yield process


# ---- Bytes and seconds of every route ----


def every_request() -> list[tuple[str, str]]:
    """Return method and address of each operation of the OpenAPI page, and of the other routes."""
    listed = app.create(settings_of("postgresql://nowhere/none", "redis://nowhere")).fastapi.openapi()["paths"]
    operations = [
        (method.upper(), re.sub(r"{\w+}", "x", path)) for path, methods in listed.items() for method in methods
    ]
    assert ("POST", "/v1/customers/x/portal-sessions") in operations
    others = [("GET", path) for path in ("/", "/docs", "/openapi.json", "/no/such")]
    return [*operations, *others, ("DELETE", "/v1/orders"), ("PUT", PATH), ("POST", "/health/live")]


def head(method: str, path: str, headers: Mapping[str, str], framing: str) -> bytes:
    """Return a request up to its body."""
    claim = {"Stripe-Signature": f"t={int(time.time())},v1={'0' * 64}"} if path == PATH else {}
    lines = [f"{method} {path} HTTP/1.1", "Host: payfold", "Content-Type: application/json", framing]
    lines += [f"{name}: {value}" for name, value in {**claim, **headers}.items()]
    return "\r\n".join([*lines, "", ""]).encode()


DECLARED = (f"Content-Length: {10 * SENT_BYTES_MAX}", b" " * MIB)
CHUNKED = ("Transfer-Encoding: chunked", b"100000\r\n" + b" " * MIB + b"\r\n")


@pytest.mark.parametrize("headers", [WITHOUT_TOKEN, OPERATOR], ids=["without a token", "with a token"])
@pytest.mark.parametrize(("framing", "chunk"), [DECLARED, CHUNKED], ids=["declared", "chunked"])
def test_large_bodies(shared: Process, framing: str, chunk: bytes, headers: dict[str, str]) -> None:
    """A body without end is cut off at every route, before it takes memory."""
    before = shared.peak()
    for method, path in every_request():
        raw = shared.send(head(method, path, headers, framing))
        assert is_cut_off(raw, chunk), f"{method} {path}"

    assert shared.peak() - before < GROWTH_BYTES_MAX


def is_cut_off(raw: Raw, chunk: bytes) -> bool:
    """Send *chunk* again and again, and return whether the server closed the connection soon."""
    with raw.connection:
        for _ in range(SENT_BYTES_MAX // MIB):
            try:
                raw.connection.sendall(chunk)
            except ConnectionError:
                return True
    return False


@pytest.mark.parametrize("headers", [WITHOUT_TOKEN, OPERATOR], ids=["without a token", "with a token"])
def test_slow_bodies(shared: Process, headers: dict[str, str]) -> None:
    """Every route answers in time, and closes the connection, if the body does not arrive."""
    raws = [
        (shared.send(head(method, path, headers, "Content-Length: 100"), b"{"), f"{method} {path}")
        for method, path in every_request()
    ]
    answers = {name: raw.answer().partition(b"\r\n\r\n")[0] for raw, name in raws}

    assert [name for name, answer in answers.items() if b"connection: close" not in answer] == []
    waited = {name for name, answer in answers.items() if b" 408 " in answer}
    reading = {f"POST {PATH}"}
    if headers:
        reading |= {"PUT /v1/orders/x", "POST /v1/customers/x/portal-sessions", "POST /v1/events/x/ignore"}
    assert waited == reading


def test_room(shared: Process) -> None:
    """Endless bodies of strangers use at most half of the room for bodies, while signed deliveries are accepted.

    After their timeout all of the room is free again.
    """
    before = shared.peak()
    framing = f"Content-Length: {2 * MIB}"
    small, large = event("small"), event("large", filling="x" * MIB)
    raws = [shared.send(head("POST", PATH, WITHOUT_TOKEN, framing)) for _ in range(150)]
    for raw in raws:
        try:
            raw.connection.sendall(b" " * (2 * MIB - 100))
        except ConnectionError:
            continue  # the server refused it
    taken, turned_away = shared.deliver(small), shared.deliver(large)
    answers = [raw.answer() for raw in raws]
    until(lambda: shared.deliver(large) == 200)

    assert taken == 200
    assert turned_away in {200, 503}
    # On a slow machine the first connections time out before the last are sent.
    assert {status(answer) for answer in answers if answer} <= {408, 503}
    assert all(b"retry-after: 5" in answer for answer in answers if b" 503 " in answer)
    assert shared.peak() - before < GROWTH_BYTES_MAX


def test_late_answer(database_url: str, redis_url: str) -> None:
    """A request that cannot be answered in time is answered 503 with a Retry-After."""
    with serving(settings_of(database_url, redis_url), request_seconds_max=0.3) as web:
        started = time.monotonic()
        late = web.get("/v1/changes?wait=25")

        assert time.monotonic() - started < 15
        assert (late.status_code, late.headers["retry-after"]) == (503, "5")
        assert late.headers["content-type"] == "application/problem+json"


def test_half_of_the_room() -> None:
    """Incomplete bodies share half of the room; a complete one may use the rest; all of it is freed."""
    room = Room(bytes_max=100, reading_bytes_max=50)
    part = {"type": "http.request", "body": b" " * 40, "more_body": True}

    async def run() -> None:
        rest: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
        slow = asyncio.create_task(room.read(lambda: rest, part, 1000))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await room.read(lambda: rest, part, 1000)
        room.take(60)
        with pytest.raises(Overloaded):
            room.take(1)
        room.give_back(60)
        slow.cancel()
        await asyncio.wait([slow])
        room.take(100)

    asyncio.run(run())


# ---- The log ----


def test_a_failure_is_one_line(database_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An unexpected error is logged with its type and place, without the driver's message."""
    with serving(settings_of(database_url, redis_url)) as web:
        web.query("ALTER TABLE orders RENAME COLUMN created TO of_a_buyer")
        assert web.get("/v1/orders").status_code == 500

    (line,) = (msgspec.json.decode(line) for line in capsys.readouterr().err.splitlines())
    assert (line["event"], line["kind"]) == ("request.failed", "ProgrammingError")
    assert line["at"].startswith("lookup:")


def test_refusals_do_not_fill_the_log(environment: dict[str, str], tmp_path: Path) -> None:
    """The metrics count every refused request; the log has only a few lines, which count the others."""
    log = tmp_path / "log"
    with running(environment, log) as process:
        for _ in range(200):
            assert process.client.post(PATH, content=b"{}").status_code == 400
        raws = [process.send(b"this is not HTTP\r\n\r\n") for _ in range(200)]
        assert {status(raw.answer()) for raw in raws} == {400}
        counted = process.client.get("/metrics", headers=READER).text

    assert 'payfold_deliveries_refused_total{reason="signature_missing"} 200.0' in counted
    assert 'payfold_connections_refused_total{reason="not_http"} 200.0' in counted
    lines = [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]
    refusals = [line for line in lines if line.get("reason") in {"signature_missing", "not_http"}]
    assert 2 <= len(lines) <= 60
    assert {line["reason"] for line in refusals} == {"signature_missing", "not_http"}
    assert all(line["left_out"] == 0 for line in refusals[:1])


def _pipe_without_reader() -> int:
    reads, writes = os.pipe()
    os.close(reads)
    return writes


@pytest.mark.parametrize(
    "unwritable", [lambda: os.open("/dev/full", os.O_WRONLY), _pipe_without_reader], ids=["full disk", "no reader"]
)
def test_unwritable_log(environment: dict[str, str], unwritable: Callable[[], int]) -> None:
    """While standard error cannot be written a delivery fails, and later ones are recorded."""
    stderr = unwritable()
    try:
        with running(environment, stderr) as process:
            assert process.deliver(event(1)) == 200
            poison(environment["DATABASE_URL"], "ADD CONSTRAINT poison CHECK (id <> 'evt_2')")
            assert process.deliver(event(2)) == 503
            poison(environment["DATABASE_URL"], "DROP CONSTRAINT poison")
            assert process.client.post(PATH, content=b"{}").status_code == 400
            assert [process.deliver(event(number)) for number in (2, 3)] == [200, 200]
    finally:
        os.close(stderr)


def poison(database_url: str, change: str) -> None:
    """Change the constraints of the inbox."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER TABLE inbox {change}".encode())


# ---- The end ----


def test_ends_with_a_long_poll(environment: dict[str, str]) -> None:
    """A stopping process answers waiting readers of the feed at once."""
    with running(environment, module="api") as process:
        raw = process.send(head("GET", "/v1/changes?wait=25", READER, "Connection: close"))
        until(lambda: waits_in(environment["DATABASE_URL"]))
        assert process.stop() < 15
        assert status(raw.answer()) == 200


def waits_in(database_url: str) -> bool:
    """Return whether the change feed was queried for a reader."""
    with psycopg.connect(database_url) as connection:
        looks = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND query NOT LIKE '%heartbeats%'"
        )
        return connection.execute(looks).fetchone() != (0,)


UNGRANTED = """
SELECT 1 FROM pg_locks JOIN pg_database AS d ON d.oid = database WHERE NOT granted AND datname = current_database()
"""


def test_ends_in_mid_delivery(environment: dict[str, str]) -> None:
    """A stopping process answers deliveries that wait for a lock or a body, and then ends."""
    with running(environment) as process, held(environment["DATABASE_URL"]) as blocker:
        raws = [process.send(posted(event(number))) for number in range(3)]
        raws.append(process.send(head("POST", PATH, WITHOUT_TOKEN, "Content-Length: 100"), b"{"))
        # Within a transaction pg_stat_activity does not change, so WAITS_FOR_A_LOCK would not do.
        until(lambda: blocker.execute(UNGRANTED).fetchone())
        assert process.stop() < STOP_SECONDS_MAX
        assert [status(raw.answer()) for raw in raws] == [503, 503, 503, 408]


@pytest.mark.parametrize(
    ("module", "reads"), [("tests.test_doors", 45), pytest.param("api", 120, marks=pytest.mark.long)]
)
def test_silent_postgres(own_postgres: Postgres, redis_url: str, module: str, reads: int) -> None:
    """Reads and deliveries that wait for a silent PostgreSQL are answered, and the next ones are served.

    The liveness route answers at any time, and SIGTERM ends the process in time.
    """
    upgrade(own_postgres.url)
    read = head("GET", "/v1/orders", READER, "Connection: close")
    with running(environment_of(own_postgres.url, redis_url), module=module) as process:
        assert process.client.get("/v1/orders", headers=READER).status_code == 200
        assert process.deliver(event(1)) == 200
        with faults.paused(own_postgres):
            raws = [process.send(read) for _ in range(reads)]
            raws.append(process.send(posted(event(2))))
            asked_at = time.monotonic()
            assert process.client.get("/health/live").status_code == 200
            assert process.client.head("/health/live").status_code == 200
            assert time.monotonic() - asked_at < 5
            until(lambda: answered(raws) >= 8, STOP_SECONDS_MAX)
        statuses = [status(raw.answer()) for raw in raws]
        assert set(statuses) <= {200, 503}
        assert statuses.count(503) >= 8
        until(lambda: process.client.get("/v1/orders", headers=READER).status_code == 200)
        until(lambda: process.deliver(event(2)) == 200)

        with faults.paused(own_postgres):
            raws = [process.send(read) for _ in range(8 if module != "api" else reads)]
            assert process.client.get("/health/live").status_code == 200
            assert process.stop() < STOP_SECONDS_MAX
        for raw in raws:
            raw.answer()


def answered(raws: list[Raw]) -> int:
    """Return the number of connections with unread data."""
    return len(select.select([raw.connection for raw in raws], [], [], 0)[0])


def test_children_end_with_their_parent(environment: dict[str, str]) -> None:
    """If the parent of several web processes is killed, none of them listens any more."""
    with running({**environment, "WEB_CONCURRENCY": "2"}, module="api") as process:
        assert process.deliver(event(1)) == 200
        process.popen.kill()
        process.popen.wait()
        until(lambda: not process.is_up())
