"""Deliveries that come in one read need no task of the server, and are answered as those that come in several."""

import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from api.__main__ import BoundedHttp
from tests.test_webhook import process
from tests.waiting import WAITS_FOR_A_LOCK, until
from tests.web import Raw, Web, environment_of, event, serving, settings_of, signed

RECEIVED = b'{"received":true}'
CLOSE = b"Connection: close"
LIVE = b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n"
REFUSE_POISON = """
CREATE FUNCTION refuse_poison() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
    IF NEW.id = 'evt_poison' THEN RAISE EXCEPTION 'poison' USING ERRCODE = 'check_violation'; END IF;
    RETURN NEW;
END$$;
CREATE TRIGGER poison BEFORE INSERT ON inbox FOR EACH ROW EXECUTE FUNCTION refuse_poison();
"""


@pytest.fixture
def tasks() -> list[str]:
    """Return the paths of the requests that were given to the application, in a task each."""
    return []


@pytest.fixture
def web(database_url: str, redis_url: str, tasks: list[str]) -> Iterator[Web]:
    """Return a running web process that refuses the event evt_poison."""

    class Watched(BoundedHttp):
        """Notes the tasks that are started."""

        def _start_asgi_task(self, cycle: Any, app: Any) -> None:  # noqa: ANN401 - uvicorn's own
            tasks.append(cycle.scope["path"])
            super()._start_asgi_task(cycle, app)

    with psycopg.connect(database_url) as connection:
        connection.execute(REFUSE_POISON)
    with serving(settings_of(database_url, redis_url), http=Watched) as running:
        yield running


def delivery(body: bytes, *more: bytes, header: bytes = b"") -> bytes:
    """Return the bytes of a delivery of *body* with *more* headers, signed now unless a *header* is given."""
    header = header or header_of(body)
    length = b"Content-Length: %d" % len(body)
    lines = [b"POST /webhooks/stripe HTTP/1.1", b"Host: payfold", b"Stripe-Signature: " + header, length]
    return b"\r\n".join([*lines, *more, b"", b""]) + body


def header_of(body: bytes) -> bytes:
    """Return the signature of *body*, made now."""
    return signed(body)["Stripe-Signature"].encode()


def in_several(web: Web, request: bytes) -> bytes:
    """Return the answer to *request* if its body is sent only after the server has asked for it."""
    head, _, body = request.partition(b"\r\n\r\n")
    raw = web.send_raw(head + b"\r\nExpect: 100-continue\r\n\r\n")
    raw.answer_until(b"HTTP/1.1 100 Continue\r\n\r\n")
    raw.connection.sendall(body)
    return raw.answer()


KINDS: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "taken": (lambda: delivery(event(), CLOSE), 200, "duplicate"),
    "poison": (lambda: delivery(event("poison"), CLOSE), 503, "postponed"),
    "no event": (lambda: delivery(b"[]", CLOSE), 400, "not_an_event"),
    "of another body": (lambda: delivery(event(), CLOSE, header=header_of(b"[]")), 400, "signature_mismatch"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_read_or_several(web: Web, tasks: list[str], kind: str) -> None:
    """A delivery in one read is answered byte for byte as the same one in several, and counted so, without a task."""
    make, status, counted = KINDS[kind]
    request = make()
    several = in_several(web, request)
    assert tasks == ["/webhooks/stripe"]
    before = web.counters().get(counted, 0)
    tasks.clear()
    whole = web.send_raw(request).answer()

    assert tasks == []
    assert whole == several
    assert whole.startswith(b"HTTP/1.1 %d " % status)
    assert whole.count(b"connection: close") == 1
    assert web.counters()[counted] == before + 1


def test_chunks_in_one_read(web: Web, tasks: list[str]) -> None:
    """A chunked body that comes in one read is recorded without a task as well."""
    body = event()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:9], body[9:])) + b"0\r\n\r\n"
    head = delivery(b"", CLOSE, b"Transfer-Encoding: chunked", header=header_of(body))
    answer = web.send_raw(head.replace(b"Content-Length: 0\r\n", b"") + chunks).answer()

    assert answer.endswith(RECEIVED)
    assert tasks == []
    assert web.query("SELECT payload FROM payloads") == [(body,)]


def test_refused_by_its_header(web: Web) -> None:
    """A delivery with a bad header is answered before its body is read, and counted once."""
    before = web.counters().get("signature_malformed", 0)
    answer = web.send_raw(delivery(event(), header=b"hello")).answer()

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"connection: close") == 1
    assert web.counters()["signature_malformed"] == before + 1


def test_one_connection(web: Web) -> None:
    """A connection that is kept open takes one delivery after the other, refused ones as well."""
    raw = web.send_raw()
    for number in range(3):
        raw.connection.sendall(delivery(event(number)))
        assert raw.answer_until(RECEIVED).startswith(b"HTTP/1.1 200 OK\r\n")
        raw.connection.sendall(delivery(b"[]"))
        assert raw.answer_until(b"}").startswith(b"HTTP/1.1 400 Bad Request\r\n")
    raw.connection.sendall(LIVE)

    assert raw.answer().startswith(b"HTTP/1.1 200 ")
    assert web.inbox() == ["evt_0", "evt_1", "evt_2"]


def test_pipelined(web: Web) -> None:
    """Requests that come in one read with a delivery are answered after it, in their order."""
    first, odd, second = delivery(event(1)), delivery(b"[]"), delivery(event(2))
    answer = web.send_raw(first + odd + second + LIVE).answer()

    answers = answer.split(b"HTTP/1.1 ")[1:]
    assert [each[:3] for each in answers] == [b"200", b"400", b"200", b"200"]
    assert answers[3].endswith(b'{"status":"alive"}')
    assert web.inbox() == ["evt_1", "evt_2"]


def test_broken_behind_a_delivery(web: Web) -> None:
    """What is no request behind a whole delivery ends the connection, and the delivery is recorded."""
    assert b" 400 " not in web.send_raw(delivery(event()) + b"\0\r\n\r\n").answer()
    until(lambda: web.inbox() == ["evt_1"])


def test_broken_chunk(web: Web, tasks: list[str]) -> None:
    """A body that breaks off with a fault in the same read is given to the application, which counts it."""
    before = web.counters().get("body_too_slow", 0)
    head = delivery(b"", b"Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    web.send_raw(head + b"1\r\n{\r\nno chunk\r\n").answer()

    until(lambda: web.counters().get("body_too_slow", 0) == before + 1)
    assert "/webhooks/stripe" in tasks


@contextmanager
def held(web: Web) -> Iterator[None]:
    """Hold a lock that every recording waits for."""
    with psycopg.connect(web.settings.libpq) as blocker:
        blocker.execute("LOCK TABLE inbox IN ACCESS EXCLUSIVE MODE")
        yield
        blocker.rollback()


def test_gone(web: Web) -> None:
    """A delivery is recorded also if its client is gone before the answer, and the next client is served."""
    with held(web):
        raw = web.send_raw(delivery(event(1)))
        until(lambda: web.query(WAITS_FOR_A_LOCK))
        raw.connection.close()
        assert web.get("/health/live").status_code == 200
    assert web.send_raw(delivery(event(2), CLOSE)).answer().endswith(RECEIVED)

    assert web.inbox() == ["evt_1", "evt_2"]


def test_answered_in_time(database_url: str, redis_url: str) -> None:
    """A delivery that cannot be recorded in time is postponed, and the next one is recorded."""
    with serving(settings_of(database_url, redis_url), answer_seconds_max=0.5) as web:
        with held(web):
            answer = web.send_raw(delivery(event(1), CLOSE)).answer()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: " in answer
        assert web.counters()["postponed"] == 1
        until(lambda: web.send_raw(delivery(event(2), CLOSE)).answer().endswith(RECEIVED))


def test_stopped(database_url: str, redis_url: str, tmp_path: Path) -> None:
    """After SIGTERM the process still answers a delivery that waits for its commit, with `connection: close`."""
    libpq = settings_of(database_url, redis_url).libpq
    with closing(psycopg.connect(libpq)) as blocker, closing(psycopg.connect(libpq, autocommit=True)) as observer:
        with process(environment_of(database_url, redis_url), tmp_path / "log") as base_url:
            blocker.execute("LOCK TABLE inbox IN ACCESS EXCLUSIVE MODE")
            raw = Raw(socket.create_connection(("127.0.0.1", urlsplit(base_url).port or 0), timeout=20))
            raw.connection.sendall(delivery(event()))
            until(lambda: observer.execute(WAITS_FOR_A_LOCK).fetchall())
            # PostgreSQL ends the session that holds the lock, some time after the signal.
            blocker.execute("SET idle_in_transaction_session_timeout = '3s'")
        answer = raw.answer()

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(RECEIVED)
    assert b"\r\nconnection: close\r\n" in answer
