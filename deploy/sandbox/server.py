"""Puts the sandbox's Stripe API onto a port, and lets it misbehave as Stripe and the network may.

api = StripeApi({"sk_test_1": account})
faults = Faults()
with serving(api, faults) as address:          # http://127.0.0.1:…
    faults.add(Fault.DROP_AFTER, "*/expire")   # the next expire call acts, and its answer is lost
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deploy.sandbox.http_api import Answer, Call, RecordedCall, StripeApi

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

START_SECONDS_MAX: Final = 20


class Fault(Enum):
    """A fault that may happen to one call, by its HTTP status or in words."""

    RATE_LIMITED = "global-rate"
    ENDPOINT_LIMITED = "endpoint-rate"
    LOCKED = "lock_timeout"
    DECLINED = "400"
    MISSING = "404"
    CONFLICT = "409"
    FAILED = "500"
    FAILED_AFTER = "500, having acted"
    UNAVAILABLE = "503"
    TIMED_OUT = "no answer, having acted"
    DROP_BEFORE = "connection lost before it acted"
    DROP_AFTER = "connection lost after it acted"
    CUT_SHORT = "connection lost within the answer"


_ACTS: Final = {None, Fault.FAILED_AFTER, Fault.TIMED_OUT, Fault.DROP_AFTER, Fault.CUT_SHORT}
_SILENT: Final = {Fault.TIMED_OUT, Fault.DROP_BEFORE, Fault.DROP_AFTER}


def _error(status: int, kind: str, message: str, code: str | None = None, **headers: str) -> Answer:
    told = {"type": kind, "message": message, **({"code": code} if code else {})}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, msgspec.json.encode({"error": told}), named)


_LIMITED: Final = "Request rate limit exceeded."
_ANSWERS: Final = {
    Fault.RATE_LIMITED: _error(
        429, "invalid_request_error", _LIMITED, "rate_limit", Stripe_Rate_Limited_Reason="global-rate"
    ),
    Fault.ENDPOINT_LIMITED: _error(
        429, "invalid_request_error", _LIMITED, "rate_limit", Stripe_Rate_Limited_Reason="endpoint-rate"
    ),
    Fault.LOCKED: _error(429, "invalid_request_error", "This object cannot be accessed right now.", "lock_timeout"),
    Fault.DECLINED: _error(400, "invalid_request_error", "This cannot be done."),
    Fault.MISSING: _error(404, "invalid_request_error", "No such object.", "resource_missing"),
    Fault.CONFLICT: _error(409, "idempotency_error", "There is currently another in-progress request."),
    Fault.FAILED: _error(500, "api_error", "An unknown error occurred."),
    Fault.FAILED_AFTER: _error(500, "api_error", "An unknown error occurred."),
    Fault.UNAVAILABLE: _error(503, "api_error", "Try again later.", Stripe_Should_Retry="false"),
}


@dataclass(slots=True)
class _Rule:
    fault: Fault | None
    path: str
    method: str
    times: int
    before: Callable[[], object]
    after: Callable[[], object]
    rewrite: Callable[[bytes], bytes]
    trickle_seconds: float


def _nothing() -> None:
    pass


def _as_it_is(body: bytes) -> bytes:
    return body


class Faults:
    """The faults that are to happen, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()

    def add(
        self,
        fault: Fault | None,
        path: str = "*",
        *,
        method: str = "*",
        times: int = 1,
        before: Callable[[], object] = _nothing,
        after: Callable[[], object] = _nothing,
        rewrite: Callable[[bytes], bytes] = _as_it_is,
        trickle_seconds: float = 0,
    ) -> None:
        """Let *fault* happen to the next *times* calls of a path, in which * stands for anything.

        *before* and *after* are called just before and after the call acts; without a fault it then goes well.
        *rewrite* is given the body of the answer and returns the one that is sent; with *trickle_seconds* that comes
        byte by byte, with so long a pause before each.
        """
        with self._lock:
            self._rules.append(_Rule(fault, path, method, times, before, after, rewrite, trickle_seconds))

    def take(self, call: Call) -> _Rule | None:
        """Return the rule that applies to *call*, and count its use."""
        with self._lock:
            for rule in self._rules:
                if rule.times > 0 and fnmatchcase(call.path, rule.path) and fnmatchcase(call.method, rule.method):
                    rule.times -= 1
                    return rule
        return None


class _Protocol(HttpToolsProtocol):
    """HTTP with an application that may drop the connection."""

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.scope["payfold.transport"] = self.transport  # type: ignore[typeddict-unknown-key]  # ours


class _Application:
    """The API as an ASGI application."""

    def __init__(self, api: StripeApi, faults: Faults) -> None:
        self._api = api
        self._faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _call_of(scope, await _body(receive))
        rule = self._faults.take(call)
        fault = rule.fault if rule is not None else None
        answer: Answer | None = None
        # A change from another thread happens wholly before or after a call, and never during one.
        with self._api.lock:
            if rule is not None:
                rule.before()
            if fault in _ACTS:
                answer = self._api.answer(call)
            if rule is not None:
                rule.after()
        answer = _ANSWERS.get(fault, answer) if fault is not None else answer
        is_lost = fault in _SILENT
        self._note(call, None if is_lost or answer is None else answer.status)
        if is_lost or answer is None:
            if fault is not Fault.TIMED_OUT:
                scope["payfold.transport"].abort()
            await _gone(receive)
            return
        headers = {"Content-Type": "application/json", **answer.headers}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        body = answer.body if rule is None else rule.rewrite(answer.body)
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        if fault is Fault.CUT_SHORT:
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            scope["payfold.transport"].abort()
            await _gone(receive)
            return
        if rule is not None and rule.trickle_seconds:
            for byte in body:
                await asyncio.sleep(rule.trickle_seconds)
                await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
            body = b""
        await send({"type": "http.response.body", "body": body})

    def _note(self, call: Call, status: int | None) -> None:
        key, account = call.headers.get("idempotency-key"), call.headers.get("stripe-account")
        self._api.calls.append(RecordedCall(call.method, call.path, call.params, key, account, status))


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return body


async def _gone(receive: Receive) -> None:
    """Return once the caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _call_of(scope: Scope, body: bytes) -> Call:
    given = scope["query_string"] if scope["method"] == "GET" else body
    return Call(
        scope["method"],
        scope["path"],
        _nested(parse_qsl(given.decode(), keep_blank_values=True)),
        {name.decode().lower(): value.decode() for name, value in scope["headers"]},
    )


def _nested(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return parameters with their brackets resolved; an array's empty brackets are numbered."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        first, *rest = name.replace("]", "").split("[")
        place, key = found, first
        for each in rest:
            place = place.setdefault(key, {})
            key = each or str(len(place))
        place[key] = value
    return found


@contextmanager
def serving(api: StripeApi, faults: Faults | None = None) -> Iterator[str]:
    """Serve *api* on a free port of this machine, in a thread, and yield its address."""
    config = uvicorn.Config(
        _Application(api, faults or Faults()),
        http=_Protocol,
        lifespan="off",
        log_config=None,
        date_header=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="stripe", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            with contextlib.suppress(RuntimeError):
                thread.join(START_SECONDS_MAX)
