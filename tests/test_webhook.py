"""Deliveries over HTTP: good ones are recorded and answered, bad ones are refused with a reason and not recorded."""

import asyncio
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from api.__main__ import HEAD_BYTES_MAX, HEADERS_MAX, PIPELINED_MAX, URL_BYTES_MAX, BoundedHttp
from api.webhook import BODY_BYTES_MAX
from deploy.local.services import Services
from deploy.local.valkey import Valkey
from deploy.sandbox.account import Account
from deploy.sandbox.delivery import PERFECT, deliver, plan
from deploy.sandbox.rendering import render
from deploy.sandbox.samples import sample
from tests.waiting import WAITS_FOR_A_LOCK, until
from tests.web import (
    PATH,
    READER,
    SECRET,
    Raw,
    Web,
    environment_of,
    event,
    serving,
    serving_many,
    settings_of,
    signed,
)

Headers = Mapping[str, Any]  # one is no text
BYTES_BETWEEN_MAX = 16 * 1024 * 1024
"""The most that loopback's two buffers hold."""


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


@pytest.fixture(scope="module")
def shared(services: Services) -> Iterator[Web]:
    """Return a running web process for the tests that change no data."""
    with serving_many(services) as running:
        yield running


def is_problem(response: httpx.Response, status: int, reason: str) -> bool:
    """Return whether the answer is a problem document that names the fault and reveals no internals."""
    problem = response.json()
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == status
    assert problem["title"]
    assert len(problem["detail"]) > 15
    assert problem["type"] == f"urn:payfold:problem:{reason}"
    return not reveals_internals(response)


def reveals_internals(response: httpx.Response) -> bool:
    """Return whether an answer has a stack trace, a path, a version or the name of a library."""
    content = str(response.headers) + response.text
    return bool(
        re.search(r"Traceback|File \"|\.py|/api/|uvicorn|python|fastapi|psycopg|whsec|'server'", content, re.IGNORECASE)
    )


# ---- Recorded ----


def test_recorded(web: Web) -> None:
    """A signed event is in the inbox when it is answered, with all of its columns, and a worker is woken."""
    sent = sample("checkout.session.completed", {}, now=int(time.time()))
    response = web.deliver(sent.body)

    assert (response.status_code, response.json()) == (200, {"received": True})
    rows = web.query(
        "SELECT account, livemode, id, type, extract(epoch FROM created)::bigint, api_version, object_type, object_id,"
        " payload, redacted, payload_sha256, source, state, attempts FROM events"
    )
    expected = ("", False, sent.id, sent.type, sent.created, sent.api_version, "checkout.session", sent.object_id)
    digest = hashlib.sha256(sent.body).hexdigest()
    assert rows == [(*expected, sent.body, [], digest, "webhook", "pending", 0)]
    until(lambda: web.fold_messages() == 1)


@pytest.mark.parametrize("number", range(4))
def test_odd_events(web: Web, number: int) -> None:
    """An event that cannot be folded is recorded too, byte for byte, and answered like any other."""
    deep = event(data={"object": {"id": "x"}}, deep=1).replace(b'"deep":1', b'"deep":' + b"[" * 10_000 + b"]" * 10_000)
    thin = event(object="v2.core.event", created="2026-11-01T00:00:00.000Z", data=None)
    body = (event(name="a\0b", amount=10**400, livemode="yes", account=7), deep, thin, event(name="?"))[number]
    body = body.replace(b'"?"', b'"\\ud800"')

    assert web.deliver(body).status_code == 200
    (payload, digest), *more = web.query("SELECT payload, payload_sha256 FROM inbox JOIN payloads USING (seq)")
    assert not more
    assert (payload, digest) == (body, hashlib.sha256(body).digest())


def test_accounts(database_url: str, redis_url: str) -> None:
    """A delivery belongs to the account that it names, else to the account of its secret; worlds are separate."""
    secrets = f"{SECRET},acct_1=whsec_one,acct_2=whsec_two"
    with serving(settings_of(database_url, redis_url, STRIPE_WEBHOOK_SECRETS=secrets)) as web:
        for body, secret in [
            (event(), SECRET),
            (event(), "whsec_one"),
            (event(), "whsec_two"),
            (event(account="acct_9"), "whsec_two"),
            (event(livemode=True), "whsec_two"),
        ]:
            assert web.deliver(body, **signed(body, secret=secret)).status_code == 200

        assert sorted(web.query("SELECT account, livemode FROM inbox")) == [
            ("", False),
            ("acct_1", False),
            ("acct_2", False),
            ("acct_2", True),
            ("acct_9", False),
        ]


def test_duplicates(web: Web) -> None:
    """The same delivery again is answered as the first, kept once, and counted."""
    before = web.counters()
    body = event()
    header = signed(body)

    assert [web.deliver(body, **header).status_code for _ in range(3)] == [200] * 3
    assert web.inbox() == ["evt_1"]
    counted = web.counters()
    assert counted["new"] == before["new"] + 1
    assert counted["duplicate"] == before["duplicate"] + 2


@pytest.mark.parametrize("chunks", [[b"", b" "], [b" "] * 5])
def test_chunked(web: Web, chunks: list[bytes]) -> None:
    """A chunked body without a length is recorded."""
    body = event()
    pieces = [body[:1], *chunks, body[1:]]
    sent = b"".join(pieces)

    assert web.client.post(PATH, content=iter(pieces), headers=signed(sent)).status_code == 200
    assert web.inbox() == ["evt_1"]


def test_largest(web: Web) -> None:
    """A body of just the limit is kept."""
    body = event(filling="x" * BODY_BYTES_MAX)
    body = body.replace(b"x" * (len(body) - BODY_BYTES_MAX), b"", 1)

    assert len(body) == BODY_BYTES_MAX
    assert web.deliver(body).status_code == 200


# ---- Refused ----


def swapped(body: bytes) -> dict[str, str]:
    """Return the header that Stripe would send for *body* to an endpoint with another secret."""
    return signed(body, secret="whsec_other")


BODY = event()
# Signed when the test runs: a signature holds for five minutes, and the whole suite takes longer.
BAD_HEADERS: dict[str, tuple[Callable[[], Headers], str]] = {
    "missing": (dict, "signature_missing"),
    "empty": (lambda: {"Stripe-Signature": ""}, "signature_missing"),
    "64 KiB": (lambda: {"Stripe-Signature": "t=1," + "v1=0," * 13_107}, "signature_malformed"),
    "malformed": (lambda: {"Stripe-Signature": "hello"}, "signature_malformed"),
    "only v0": (
        lambda: {"Stripe-Signature": signed(BODY)["Stripe-Signature"].replace("v1", "v0")},
        "signature_malformed",
    ),
    "not ASCII": (lambda: {"Stripe-Signature": b"t=1,v1=\xe9"}, "signature_malformed"),
    "another secret": (lambda: swapped(BODY), "signature_mismatch"),
    "another body": (lambda: signed(BODY + b" "), "signature_mismatch"),
    "too old": (lambda: signed(BODY, age=86_400), "signature_expired"),
    "in the future": (lambda: signed(BODY, age=-86_400), "signature_expired"),
}


@pytest.mark.parametrize(("headers", "reason"), BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_bad_headers(shared: Web, headers: Callable[[], Headers], reason: str) -> None:
    """A delivery without a valid current signature is refused with its reason, counted, and not recorded."""
    before = shared.counters().get(reason, 0)

    assert is_problem(shared.client.post(PATH, content=BODY, headers=headers()), 400, reason)
    assert shared.counters()[reason] == before + 1
    assert shared.inbox() == []


BAD_BODIES = {
    "empty": (b"", "body_empty"),
    "not UTF-8": (b'{"id":"\xff"}', "body_not_utf8"),
    "gzip": (bytes.fromhex("1f8b0800000000000003abae0500"), "body_not_utf8"),
    "not JSON": (b"id=evt_1", "body_not_json"),
    "[]": (b"[]", "not_an_event"),
    "null": (b"null", "not_an_event"),
    "{}": (b"{}", "not_an_event"),
    "id of 10,000 characters": (event("x" * 10_000), "not_an_event"),
    "created a text": (event(created="now"), "not_an_event"),
    "type null": (event(type=None), "not_an_event"),
}


@pytest.mark.parametrize(("body", "reason"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_bodies(shared: Web, body: bytes, reason: str) -> None:
    """A signed body that is no event is refused with its reason, counted, and not recorded."""
    before = shared.counters().get(reason, 0)

    assert is_problem(shared.deliver(body), 400, reason)
    assert shared.counters()[reason] == before + 1
    assert shared.inbox() == []


def test_no_secret(database_url: str, redis_url: str) -> None:
    """Without a configured secret every delivery is refused."""
    with serving(settings_of(database_url, redis_url, STRIPE_WEBHOOK_SECRETS="")) as web:
        assert is_problem(web.deliver(BODY), 400, "signature_mismatch")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_wrong_method(shared: Web, method: str) -> None:
    """Any method but POST is refused, and the answer names POST."""
    response = shared.client.request(method, PATH)

    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert not reveals_internals(response)
    if method != "HEAD":
        assert response.json()["status"] == 405


def head(*more: bytes) -> bytes:
    """Return the head of a POST with *more* headers and a signature that may be right."""
    return b"\r\n".join([b"POST /webhooks/stripe HTTP/1.1", b"Host: payfold", claim(), *more, b"", b""])


def claim() -> bytes:
    """Return a signature of now that matches no body."""
    return b"Stripe-Signature: t=%d,v1=%b" % (time.time(), b"0" * 64)


def test_announced_too_large(shared: Web) -> None:
    """A body with a too large Content-Length is not awaited: 413, and the connection is closed."""
    before = shared.counters().get("body_too_large", 0)
    answer = shared.send_raw(head(b"Content-Length: 5242880", b"Expect: 100-continue")).answer()

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "urn:payfold:problem:body_too_large"
    assert shared.counters()["body_too_large"] == before + 1


@pytest.mark.parametrize("length", [b"Content-Length: 5242880", b"Content-Length: " + b"9" * 19])
def test_too_large_while_sending(shared: Web, length: bytes) -> None:
    """A client that sends its too large body anyway can still read the 413."""
    assert shared.send_raw(head(length) + b" " * 65_536).answer().startswith(b"HTTP/1.1 413 ")


def send_without_end(raw: Raw, chunk: bytes, bytes_max: int) -> None:
    """Send *chunk* again and again until the server closes the connection, which it does by *bytes_max*."""
    sent = 0
    with raw.connection:
        while sent < bytes_max:
            try:
                raw.connection.sendall(chunk)
            except ConnectionError:
                return
            sent += len(chunk)
    pytest.fail("the server did not close the connection")


def test_endless_chunks(shared: Web) -> None:
    """A body without a length is read up to the limit and no further: 413, and the connection is closed."""
    before = shared.counters().get("body_too_large", 0)
    chunk = b"%x\r\n%b\r\n" % (65_536, b" " * 65_536)
    send_without_end(shared.send_raw(head(b"Transfer-Encoding: chunked")), chunk, BODY_BYTES_MAX + BYTES_BETWEEN_MAX)

    until(lambda: shared.counters().get("body_too_large", 0) == before + 1)
    assert shared.inbox() == []


def test_slow_body(database_url: str, redis_url: str) -> None:
    """A body that does not arrive in time is refused: 408, and the connection is closed."""
    with serving(settings_of(database_url, redis_url), body_seconds_max=0.1) as web:
        before = web.counters().get("body_too_slow", 0)
        answer = web.send_raw(head(b"Content-Length: 100"), b"{").answer()

        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"urn:payfold:problem:body_too_slow"' in answer
        assert web.counters()["body_too_slow"] == before + 1


def test_broken_off(web: Web) -> None:
    """A client that disconnects in the middle of its body leaves no event, and the next client is served."""
    before = web.counters().get("body_too_slow", 0)
    web.send_raw(head(b"Content-Length: 100"), BODY[:50]).connection.close()

    until(lambda: web.counters().get("body_too_slow", 0) == before + 1)
    assert web.deliver(BODY).status_code == 200


class HastyHttp(BoundedHttp):
    """Waits a tenth of a second for the head of a request."""

    head_seconds_max = 0.1


@pytest.mark.parametrize("sent", [b"", b"POST /webhooks/stripe HTTP/1.1\r\nHost: pay"])
def test_slow_head(database_url: str, redis_url: str, sent: bytes) -> None:
    """A client that does not finish its headers in time gets a 408, and so does a silent one."""
    with serving(settings_of(database_url, redis_url), http=HastyHttp) as web:
        assert web.send_raw(sent).answer().startswith(b"HTTP/1.1 408 ")


def test_hasty_only_with_heads(database_url: str, redis_url: str) -> None:
    """The time limit for headers applies neither to the body nor between two requests."""
    with serving(settings_of(database_url, redis_url), http=HastyHttp, body_seconds_max=0.3) as web:
        assert web.send_raw(head(b"Content-Length: 9")).answer().startswith(b"HTTP/1.1 408 ")
        answer = web.send_raw(head(b"Content-Length: 0"), head(b"Content-Length: 0", b"Connection: close")).answer()
        assert answer.count(b"HTTP/1.1 400 ") == 2
        assert b" 408 " not in answer


def test_endless_headers(shared: Web) -> None:
    """Endless headers are read up to a limit and no further."""
    before = shared.counters().get("head_too_large", 0)
    line = b"X-More: " + b"x" * 65_536 + b"\r\n"
    send_without_end(shared.send_raw(head()[:-2]), line, HEAD_BYTES_MAX + BYTES_BETWEEN_MAX)

    until(lambda: shared.counters().get("head_too_large", 0) == before + 1)


@pytest.mark.parametrize("path", ["/webhooks", "/webhooks/stripe/x", "/webhooks/stripe//", "/webhooks//stripe"])
def test_elsewhere(shared: Web, path: str) -> None:
    """A delivery to another path is a 404 with a problem document."""
    response = shared.client.post(path, content=BODY, headers=signed(BODY))

    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


def test_a_slash_at_the_end(web: Web) -> None:
    """An endpoint with a slash at its end works like the one without, refusals included."""
    taken = web.client.post(f"{PATH}/", content=BODY, headers=signed(BODY))
    refused = web.client.get(f"{PATH}/")

    assert (taken.status_code, taken.json()) == (200, {"received": True})
    assert len(web.inbox()) == 1
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert web.client.post(f"{PATH}/", content=BODY).status_code == 400


# ---- Together ----


def test_a_copy_with_other_bytes(web: Web) -> None:
    """A copy with other bytes is answered like a duplicate, and kept once until the fold compares it."""
    newer = sample("checkout.session.completed", {}, now=int(time.time()))
    older = render(newer, "2024-06-20")
    for each in (older, newer, older, newer):
        assert web.deliver(each.body).status_code == 200

    assert web.query("SELECT payload, state, signature IS NOT NULL FROM events") == [(older.body, "pending", True)]
    kept = web.query("SELECT payload, content_sha256, signature IS NOT NULL FROM renderings")
    assert kept == [(newer.body, None, True)]


def test_two_endpoints_at_once(web: Web) -> None:
    """Two endpoints of different versions that deliver the same events at once lose none."""
    now = int(time.time())
    newer = [sample("checkout.session.completed", {}, now=now + number) for number in range(20)]
    bodies = [each.body for event_ in newer for each in (event_, render(event_, "2024-06-20"))]

    assert together(web, bodies) == [200] * 40
    kept = web.query("SELECT payload FROM inbox JOIN payloads USING (seq) UNION ALL SELECT payload FROM renderings")
    assert sorted(kept) == sorted((each,) for each in bodies)


COUNT_STATEMENTS = """
CREATE TABLE counted (events int);
CREATE FUNCTION count_statement() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO counted SELECT count(*) FROM given; RETURN NULL; END';
CREATE TRIGGER count_statement AFTER INSERT ON inbox REFERENCING NEW TABLE AS given
    FOR EACH STATEMENT EXECUTE FUNCTION count_statement();
"""
REFUSE_POISON = """
CREATE FUNCTION refuse_poison() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
    IF NEW.id = 'evt_poison' THEN RAISE EXCEPTION 'poison of a buyer' USING ERRCODE = 'check_violation'; END IF;
    RETURN NEW;
END$$;
"""
REFUSE_AT_ONCE = "CREATE TRIGGER poison BEFORE INSERT ON inbox FOR EACH ROW EXECUTE FUNCTION refuse_poison();"
REFUSE_AT_COMMIT = """CREATE CONSTRAINT TRIGGER poison AFTER INSERT ON inbox DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION refuse_poison();"""


def together(web: Web, bodies: list[bytes]) -> list[int]:
    """Deliver *bodies* at one moment, each on a connection of its own, and return the statuses.

    The first delivery waits for a lock of this function, and the others queue behind it.
    """
    with psycopg.connect(web.settings.libpq) as blocker:
        blocker.execute("LOCK TABLE inbox IN ROW EXCLUSIVE MODE")
        blocker.execute("LOCK TABLE pending IN ACCESS EXCLUSIVE MODE")
        raws = [web.send_raw(posted(event("first")))]
        until(lambda: web.query(WAITS_FOR_A_LOCK))
        raws += [web.send_raw(posted(body)) for body in bodies]
        # The server reads the earlier deliveries before it answers this one.
        assert web.get("/health/live").status_code == 200
        blocker.rollback()
    answers = [raw.answer() for raw in raws]
    web.query("DELETE FROM inbox WHERE id = 'evt_first'")
    return [int(answer.split()[1]) for answer in answers[1:]]


def posted(body: bytes) -> bytes:
    """Return the bytes of a delivery with `Connection: close`."""
    signature = signed(body)["Stripe-Signature"].encode()
    length = b"Content-Length: %d" % len(body)
    lines = [b"POST /webhooks/stripe HTTP/1.1", b"Host: payfold", b"Stripe-Signature: " + signature, length]
    return b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body


def test_one_statement(web: Web) -> None:
    """Deliveries that are in flight together share one statement and one commit."""
    web.query(COUNT_STATEMENTS)

    assert together(web, [event(number) for number in range(100)]) == [200] * 100
    counted = [row[0] for row in web.query("SELECT events FROM counted")]
    assert sum(counted) == 101
    assert len(counted) <= 3


@pytest.mark.parametrize("trigger", [REFUSE_AT_ONCE, REFUSE_AT_COMMIT], ids=["row", "commit"])
def test_poison(web: Web, trigger: str) -> None:
    """One delivery that PostgreSQL refuses affects none of the 63 in flight with it.

    It gets no 2xx either if only the commit fails.
    """
    web.query(REFUSE_POISON)
    with psycopg.connect(web.settings.libpq) as connection:
        connection.execute(trigger.encode())
    bodies = [event(number) for number in range(63)]
    statuses = together(web, [*bodies[:31], event("poison"), *bodies[31:]])

    assert statuses == [200] * 31 + [503] + [200] * 32
    assert web.inbox() == sorted(f"evt_{number}" for number in range(63))


def test_poison_reveals_nothing(web: Web) -> None:
    """The answer to a delivery that PostgreSQL refuses asks for a retry, and does not show PostgreSQL's message."""
    web.query(REFUSE_POISON + REFUSE_AT_ONCE)
    response = web.deliver(event("poison"))

    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.headers["content-type"] == "application/problem+json"
    assert "buyer" not in response.text
    assert not reveals_internals(response)


def test_coalesced(web: Web) -> None:
    """A thousand deliveries send a worker one or two messages."""
    account = Account(seed=1)
    for _ in range(1000):
        account.create_payment_link()
    attempts = plan(account.events, seed=1, distortions=PERFECT)
    report = asyncio.run(deliver(attempts, url=f"{web.client.base_url}{PATH}", secret=SECRET))

    assert report.accepted == 1000
    assert len(web.inbox()) == 1000
    until(web.fold_messages)
    assert web.fold_messages() <= 2


def test_redelivery_wakes(web: Web) -> None:
    """A redelivery of an event that is not folded wakes the worker again, although the inbox has it."""
    assert web.deliver(BODY).status_code == 200
    until(lambda: web.fold_messages() == 1)
    web.forget_messages()

    assert web.deliver(BODY).status_code == 200
    until(lambda: web.fold_messages() == 1)


def test_broker_away(database_url: str, own_valkey: Valkey) -> None:
    """While Redis is away deliveries are recorded without waiting for it, and once it is back a worker is woken."""
    with serving(settings_of(database_url, own_valkey.url)) as web:
        own_valkey.stop()
        started = time.monotonic()
        assert [web.deliver(event(number)).status_code for number in range(20)] == [200] * 20
        assert time.monotonic() - started < 5
        assert len(web.inbox()) == 20

        own_valkey.start()
        until(lambda: web.fold_messages() == 1)


# ---- Nothing leaks ----


def test_credentials_go_nowhere(database_url: str, redis_url: str, tmp_path: Path) -> None:
    """No credential, secret or buyer reaches a table, an answer or a line of the log of the real process."""
    secret = "https://checkout.stripe.com/c/pay/cs_test_a1b2c3"
    marks = [secret, "cs_secret_d4e5f6", SECRET, "buyer@example.com", "a-reader"]
    body = event(
        type="checkout.session.completed",
        data={
            "object": {
                "object": "checkout.session",
                "id": "cs_1",
                "url": secret,
                "client_secret": "cs_secret_d4e5f6",
                "customer_details": {"email": "buyer@example.com"},
            },
            "previous_attributes": {"url": secret},
        },
    )
    with psycopg.connect(database_url) as connection:
        connection.execute(REFUSE_POISON + REFUSE_AT_ONCE)
    log = tmp_path / "log"
    with process(environment_of(database_url, redis_url), log) as base_url, httpx.Client(base_url=base_url) as client:
        answers = [
            client.post(PATH, content=body, headers=signed(body)),
            client.post(PATH, content=body, headers=swapped(body)),
            client.post(PATH, content=body + b"}", headers=signed(body + b"}")),
            client.post(PATH, content=poison(body), headers=signed(poison(body))),
            client.get("/v1/events/evt_1", headers={"Authorization": "Bearer an-owner"}),
            client.get("/v1/events/evt_1", headers={"Authorization": "Bearer a-reader"}),
            client.get("/v1/orders", headers={"Authorization": "Bearer a-reader"}),
        ]
    assert [answer.status_code for answer in answers] == [200, 400, 400, 503, 200, 200, 200]
    logged = log.read_text()
    assert "delivery.refused" in logged
    assert "deliveries.not_recorded" in logged
    assert [mark for mark in marks if mark in logged] == []
    assert [mark for mark in marks[:3] if any(mark in answer.text for answer in answers)] == []
    assert marks[3] in answers[4].text
    assert marks[3] not in answers[5].text
    assert answers[4].json()["redacted"] == [
        "data.object.client_secret",
        "data.object.url",
        "data.previous_attributes.url",
    ]
    with psycopg.connect(database_url) as connection:
        (kept,) = connection.execute(
            "SELECT inbox::text, encode(payload, 'escape') FROM inbox JOIN payloads USING (seq)"
        ).fetchall()
    assert [mark for mark in marks[:3] if mark in str(kept)] == []


def test_several_processes(database_url: str, redis_url: str, tmp_path: Path) -> None:
    """Several web processes share the port, each with the limits of one, and each shows the counters of all."""
    environment = environment_of(database_url, redis_url) | {"WEB_CONCURRENCY": "2"}
    with process(environment, tmp_path / "log") as base_url, httpx.Client(base_url=base_url) as client:
        assert client.post(PATH, content=BODY, headers=signed(BODY)).status_code == 200
        refused = client.post(PATH, headers={"X-More": "x" * 4 * HEAD_BYTES_MAX})
        assert is_problem(refused, 431, "head_too_large")
        assert (refused.headers["cache-control"], refused.headers["x-content-type-options"]) == ("no-store", "nosniff")
        shown: dict[str, set[str]] = {}

        def show_the_same() -> bool:
            # Either process may accept a connection.
            text = httpx.get(f"{base_url}/metrics", headers=READER).text
            (instance,) = set(re.findall('instance="(.+?)"', text))
            shown[instance] = set(re.findall(r'_total{.+="(?:new|head_too_large)"} \S+', text))
            return list(shown.values()) == [{'_total{outcome="new"} 1.0', '_total{reason="head_too_large"} 1.0'}] * 2

        until(show_the_same, 60)


@contextmanager
def process(environment: Mapping[str, str], log: Path) -> Iterator[str]:
    """Run the web process itself, with its log lines in *log*, and return its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    more = {"PORT": str(port), "PAYFOLD_HOST": "127.0.0.1", "PAYFOLD_LOG_LEVEL": "debug"}
    with log.open("wb") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", "api"], env=os.environ | environment | more, stdout=output, stderr=output
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        # Several processes import all modules, on a machine that may be busy.
        until(lambda: running.poll() is not None or is_up(base_url), 90)
        yield base_url
    finally:
        running.terminate()
        assert running.wait(30) in (0, -signal.SIGTERM), log.read_text()


def is_up(base_url: str) -> bool:
    """Return whether a server answers at *base_url*."""
    try:
        return httpx.get(f"{base_url}/health/live").is_success
    except httpx.TransportError:
        return False


def poison(body: bytes) -> bytes:
    """Return *body* under the id that PostgreSQL refuses."""
    return body.replace(b"evt_1", b"evt_poison")


# ---- Every connection ends ----


def test_head_in_one_read(shared: Web) -> None:
    """A head of 200,000 bytes is refused even if it comes in one read."""
    answer = shared.send_raw(head(*[b"X-More: " + b"x" * 20_000] * 10, b"Content-Length: 0")).answer()

    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"urn:payfold:problem:head_too_large" in answer


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (head(*[b"X: y"] * (HEADERS_MAX + 1)), b"431 Refused.*head_too_large"),
        (b"GET /v1/orders?%b HTTP/1.1\r\nHost: payfold\r\n\r\n" % (b"x" * URL_BYTES_MAX), b"414 Refused.*url_too_long"),
        (b"GET /health/live HTTP/1.1\r\nHost: payfold\r\nbad header\r\n\r\n", b"400 Refused.*not_http"),
    ],
    ids=["many headers", "long address", "not HTTP"],
)
def test_odd_heads(shared: Web, sent: bytes, reason: bytes) -> None:
    """A head with too many headers, a too long address or a malformed line is refused with its reason."""
    answer = shared.send_raw(sent).answer()

    assert re.search(reason, answer, re.DOTALL)
    assert b"connection: close" in answer


def test_endless_trailers(shared: Web) -> None:
    """The trailers after the last chunk of a body have the limits of the head."""
    chunked = b"POST /health/live HTTP/1.1\r\nHost: payfold\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    raw = shared.send_raw(chunked)

    send_without_end(raw, b"X-More: y\r\n" * 1000, HEAD_BYTES_MAX + BYTES_BETWEEN_MAX)


def test_many_pipelined(shared: Web) -> None:
    """A client that sends requests without reading answers cannot fill the memory."""
    many = b"GET /v1/orders HTTP/1.1\r\nHost: payfold\r\n\r\n" * 5000
    answers = shared.send_raw(many).answer()

    assert answers.count(b"HTTP/1.1 ") <= PIPELINED_MAX + 2


class ImpatientHttp(HastyHttp):
    """Also waits a tenth of a second for a client to read its answer, and accepts two connections."""

    send_seconds_max = 0.1
    connections_max = 2


def test_blank_lines_between_requests(database_url: str, redis_url: str) -> None:
    """A client that sends blank lines between two requests is disconnected."""
    with serving(settings_of(database_url, redis_url), http=HastyHttp) as web:
        raw = web.send_raw(b"GET /health/live HTTP/1.1\r\nHost: payfold\r\n\r\n")
        # The answer's head and body may arrive apart.
        assert raw.answer_until(b'{"status":"alive"}').startswith(b"HTTP/1.1 200 ")
        raw.connection.sendall(b"\r\n")
        assert raw.answer().startswith(b"HTTP/1.1 408 ")


def test_unread_answers(database_url: str, redis_url: str) -> None:
    """A client that does not read its answers is disconnected."""
    with serving(settings_of(database_url, redis_url), http=ImpatientHttp) as web:
        raw = web.send_raw()
        page = b"GET /openapi.json HTTP/1.1\r\nHost: payfold\r\n\r\n"
        send_without_end(raw, page, BYTES_BETWEEN_MAX)


def test_many_connections(database_url: str, redis_url: str) -> None:
    """A connection beyond the limit is refused, and accepted again once another has ended."""
    with serving(settings_of(database_url, redis_url), http=ImpatientHttp) as web:
        web.client.close()
        first, second = web.send_raw(head()[:10]), web.send_raw(head()[:10])
        third = web.send_raw()
        assert third.answer().startswith(b"HTTP/1.1 503 ")
        assert [raw.answer()[:13] for raw in (first, second)] == [b"HTTP/1.1 408 "] * 2
        until(lambda: web.send_raw(head(b"Content-Length: 0", b"Connection: close")).answer()[9:12] == b"400")
