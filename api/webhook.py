"""``POST /webhooks/stripe``: verify, record, commit, wake, answer.

A bare ASGI application, since each delivery would pay for request machinery that it does not use.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from api import metrics, problems, signature
from api.deadlines import Deadlines
from api.recorder import Recorder
from schemas import events
from schemas.errors import BodyTooLarge, BodyTooSlow, Refused, Transient
from schemas.inbox import Delivery, Recorded
from schemas.settings import SigningSecret

PATH: Final = "/webhooks/stripe"
BODY_BYTES_MAX: Final = 2 * 1024 * 1024
BODY_SECONDS_MAX: Final = 10

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_RECEIVED: Final = b'{"received":true}'
_JSON: Final = b"application/json"
_PROBLEM: Final = problems.MEDIA_TYPE.encode()
_RETRY_AFTER: Final = str(problems.RETRY_AFTER_SECONDS).encode()
# Looked up once: finding a labelled counter takes longer than raising it.
_OUTCOMES: Final = {recorded: metrics.DELIVERIES.labels(recorded.name.lower()) for recorded in Recorded}
_POSTPONED: Final = metrics.DELIVERIES.labels("postponed")
_FAILED: Final = metrics.DELIVERIES.labels("failed")

_log = structlog.get_logger()


class Webhook:
    """The endpoint as an ASGI application."""

    def __init__(
        self,
        secrets: tuple[SigningSecret, ...],
        recorder: Recorder,
        wake: Callable[[], None],
        *,
        body_seconds_max: float = BODY_SECONDS_MAX,
    ) -> None:
        self._secrets = secrets
        self._recorder = recorder
        self._wake = wake
        self._body_seconds_max = body_seconds_max
        self._reading = Deadlines["asyncio.Task[Any]"](body_seconds_max, self._stop_reading)
        self._too_slow: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["method"] != "POST":
            body = problems.document(405, "Deliveries are sent by POST.")
            await _answer(send, 405, body, _PROBLEM, (b"allow", b"POST"))
            return
        try:
            await self._take(scope, receive)
        except Refused as refusal:
            _count_refusal(refusal)
            body = problems.document(refusal.status, str(refusal), reason=refusal.reason)
            # What is left of the body is not read, so the connection cannot be used again.
            closing = ((b"connection", b"close"),) if refusal.status in (408, 413) else ()
            await _answer(send, refusal.status, body, _PROBLEM, *closing)
        except Transient as postponed:
            _POSTPONED.inc()
            body = problems.document(503, str(postponed))
            await _answer(send, 503, body, _PROBLEM, (b"retry-after", _RETRY_AFTER))
        except Exception as error:  # noqa: BLE001 - the sender learns nothing of us, and comes again
            _FAILED.inc()
            _log.error("delivery.failed", kind=type(error).__name__)
            await _answer(send, 500, problems.document(500, problems.UNEXPECTED), _PROBLEM)
        else:
            await _answer(send, 200, _RECEIVED, _JSON)

    async def _take(self, scope: Scope, receive: Receive) -> None:
        headers = dict(scope["headers"])
        body = await self._read(headers, receive)
        header = headers.get(b"stripe-signature")
        now = time.time()
        signer = signature.verify(header, body, self._secrets, now=now)
        envelope = events.read(body)
        delivery = Delivery(
            envelope=envelope,
            account=envelope.account or signer.account,
            sha256=hashlib.sha256(body).digest(),
            signature=header.decode() if header else None,
            source="webhook",
            received_at=datetime.fromtimestamp(now, UTC),
        )
        receipt = await self._recorder.record(delivery)
        _OUTCOMES[receipt.recorded].inc()
        # Duplicates wake as well: the first delivery's wake-up may be what was lost.
        self._wake()

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Return the request's body.

        Raises:
            BodyTooLarge, BodyTooSlow: and stops reading there.
        """
        task = asyncio.current_task()
        assert task is not None, "a request is a task"  # noqa: S101 - for the types alone
        self._reading.begin(task)
        try:
            return await _body(headers, receive)
        except asyncio.CancelledError:
            if task not in self._too_slow:
                raise
            task.uncancel()
            raise BodyTooSlow(f"The body did not arrive within {self._body_seconds_max:g} seconds.") from None
        finally:
            self._reading.end(task)
            self._too_slow.discard(task)

    def _stop_reading(self, task: "asyncio.Task[Any]") -> None:
        self._too_slow.add(task)
        task.cancel()


def _count_refusal(refusal: Refused) -> None:
    metrics.REFUSED.labels(refusal.reason).inc()
    # A body over the limit would come again for three days: somebody has to look at it.
    log = _log.error if isinstance(refusal, BodyTooLarge) else _log.warning
    log("delivery.refused", reason=refusal.reason)


async def _body(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced[:20]) > BODY_BYTES_MAX:
        raise _too_large()
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BodyTooSlow("The connection was closed before the body was complete.")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > BODY_BYTES_MAX:
            raise _too_large()
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {BODY_BYTES_MAX} bytes.")


async def _answer(send: Send, status: int, body: bytes, media_type: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", media_type), (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


OPERATION: Final[dict[str, Any]] = {
    "post": {
        "tags": ["webhook"],
        "summary": "Take a delivery from Stripe",
        "description": (
            "Verifies the signature over the raw body, records the event, and answers once it is committed. "
            "A second delivery of an event is answered as the first. "
            "503 means that nothing was recorded: send it again."
        ),
        "operationId": "take_delivery",
        "parameters": [
            {
                "name": "Stripe-Signature",
                "in": "header",
                "required": True,
                "schema": {"type": "string"},
                "description": "t=<unix seconds>,v1=<hexadecimal HMAC-SHA256>, as Stripe signs.",
            }
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
        "responses": {
            "200": {
                "description": "Recorded, now or before.",
                "content": {
                    "application/json": {
                        "schema": {"type": "object", "properties": {"received": {"type": "boolean"}}},
                    }
                },
            },
            **{
                status: {"description": text, "content": {problems.MEDIA_TYPE: {"schema": {"type": "object"}}}}
                for status, text in {
                    "400": "Not signed with a configured secret, or not an event.",
                    "408": "The body did not arrive in time.",
                    "413": f"The body is larger than {BODY_BYTES_MAX} bytes.",
                    "503": "Not recorded: send it again.",
                }.items()
            },
        },
    }
}
