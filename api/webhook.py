"""``POST /webhooks/stripe``: verify, record, commit, wake, answer.

A bare ASGI application, since each delivery would pay for request machinery that it does not use.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

from api import bodies, problems
from api.bodies import BODY_SECONDS_MAX, Receive, Room, Scope, Send
from api.counts import DeliveryCounts
from api.deadlines import Deadlines
from api.recorder import Recorder
from schemas import events, signature
from schemas.errors import BodyTooLarge, Refused, SignatureMismatch, Transient
from schemas.inbox import Delivery, Recorded
from schemas.logs import Seldom
from schemas.settings import SigningSecret
from schemas.signature import Claim

PATH: Final = "/webhooks/stripe"
PATHS: Final = frozenset((PATH, f"{PATH}/"))
BODY_BYTES_MAX: Final = 2 * 1024 * 1024

_RECEIVED: Final = b'{"received":true}'
_HEADERS: Final = ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(_RECEIVED)))
_ACCEPTED: Final[MutableMapping[str, Any]] = {"type": "http.response.start", "status": 200, "headers": _HEADERS}
_ACCEPTED_BODY: Final[MutableMapping[str, Any]] = {"type": "http.response.body", "body": _RECEIVED}
_PROBLEM: Final = problems.MEDIA_TYPE.encode()
_RETRY_AFTER: Final = str(problems.RETRY_AFTER_SECONDS).encode()
_OUTCOMES: Final = {recorded: recorded.name.lower() for recorded in Recorded}

_seldom: Final = Seldom()
"""A stranger can cause as many lines as he likes, and the metrics count them all."""


class Webhook:
    """The endpoint as an ASGI application."""

    def __init__(
        self,
        secrets: tuple[SigningSecret, ...],
        recorder: Recorder,
        wake: Callable[[], None],
        room: Room,
        counts: DeliveryCounts,
        *,
        body_seconds_max: float = BODY_SECONDS_MAX,
    ) -> None:
        self._secrets = secrets
        self._recorder = recorder
        self._wake = wake
        self._room = room
        self._counts = counts
        self._body_seconds_max = body_seconds_max
        self._reading = Deadlines["asyncio.Task[Any]"](body_seconds_max, self._stop_reading)
        self._too_slow: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        headers = dict(scope["headers"])
        # What is left of a body is not read, so its connection cannot be used again.
        closing = (bodies.CLOSE,) if bodies.is_announced(headers) else ()
        if scope["method"] != "POST":
            body = problems.document(405, "Deliveries are sent by POST.")
            await _answer(send, 405, body, _PROBLEM, (b"allow", b"POST"), *closing)
            return
        size = 0
        try:
            header = headers.get(b"stripe-signature")
            claim = self._claim(header)
            body = await self._read(headers, receive)
            closing, size = (), len(body)
            await self._take(body, claim, header)
        except Refused as refusal:
            self._counts.add("refused", refusal.reason)
            _log_refusal(refusal)
            body = problems.document(refusal.status, str(refusal), reason=refusal.reason)
            await _answer(send, refusal.status, body, _PROBLEM, *closing)
        except Transient as postponed:
            self._counts.add("postponed")
            body = problems.document(503, str(postponed))
            await _answer(send, 503, body, _PROBLEM, (b"retry-after", _RETRY_AFTER), *closing)
        except Exception as error:  # noqa: BLE001 - the sender learns nothing of us, and comes again
            self._counts.add("failed")
            _seldom.error("delivery.failed", kind=type(error).__name__)
            await _answer(send, 500, problems.document(500, problems.UNEXPECTED), _PROBLEM, *closing)
        else:
            await send(_ACCEPTED)
            await send(_ACCEPTED_BODY)
        finally:
            self._room.give_back(size)

    def _claim(self, header: bytes | None) -> Claim:
        claim = signature.read(header, now=time.time())
        if not self._secrets:
            raise SignatureMismatch
        return claim

    async def _take(self, body: bytes, claim: Claim, header: bytes | None) -> None:
        signer = signature.verify(claim, body, self._secrets)
        envelope = events.read(body)
        delivery = Delivery(
            envelope=envelope,
            account=envelope.account or signer.account,
            sha256=hashlib.sha256(body).digest(),
            signature=header.decode() if header else None,
            source="webhook",
            received_at=datetime.fromtimestamp(time.time(), UTC),
        )
        receipt = await self._recorder.record(delivery)
        self._counts.add(_OUTCOMES[receipt.recorded])
        # Duplicates wake as well: the first delivery's wake-up may be what was lost.
        self._wake()

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Return the request's body, which counts in the room from now on.

        Raises:
            BodyTooLarge, BodyTooSlow, Overloaded: and stops reading there.
        """
        task = asyncio.current_task()
        assert task is not None, "a request is a task"  # noqa: S101 - for the types alone
        self._reading.begin(task)
        try:
            return await bodies.read(headers, receive, self._room, BODY_BYTES_MAX)
        except asyncio.CancelledError:
            if task not in self._too_slow:
                raise
            task.uncancel()
            raise bodies.too_slow(self._body_seconds_max) from None
        finally:
            self._reading.end(task)
            self._too_slow.discard(task)

    def _stop_reading(self, task: "asyncio.Task[Any]") -> None:
        self._too_slow.add(task)
        task.cancel()


def _log_refusal(refusal: Refused) -> None:
    # A body over the limit would come again for three days: an operator has to look at it.
    log = _seldom.error if isinstance(refusal, BodyTooLarge) else _seldom.warning
    log("delivery.refused", reason=refusal.reason)


async def _answer(send: Send, status: int, body: bytes, media_type: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", media_type), (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_NAME: Final = {"type": "string", "minLength": 1, "maxLength": events.TEXT_CHARACTERS_MAX}

OPERATION: Final[dict[str, Any]] = {
    "post": {
        "tags": ["webhook"],
        "summary": "Take a delivery from Stripe",
        "description": (
            "Judges the signature's form and time, reads the body, verifies the signature over it, records the event, "
            "and answers once it is committed. An answer before the body was read closes the connection. "
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
        "requestBody": {
            "required": True,
            "description": "The event as Stripe sent it, byte for byte: with these fields it is recorded.",
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "id": _NAME,
                            "type": _NAME,
                            "created": {"type": "integer", "minimum": 0, "maximum": events.CREATED_MAX},
                        },
                        "required": ["id", "type", "created"],
                    }
                }
            },
        },
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
                status: problems.declaration(text)
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
