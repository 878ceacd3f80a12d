"""``POST /webhooks/stripe``: verify, record, commit, wake, answer.

A bare ASGI application, since each delivery would pay for request machinery that it does not use.

Note [A delivery that came whole needs no task]
    Most deliveries arrive in one read, head and body. A third of what such a one costs this process would be the task,
    the messages and the deadline by which ASGI reads a body and sends an answer. So the server hands it to ``take``,
    which judges it at once, and answers when the recorder has committed it. Any other request for this path comes by
    ASGI: a body in several reads, a header that is refused before the body counts, a request behind another one on the
    connection. Both ways judge and answer by the same methods.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, NamedTuple

from api import bodies, problems
from api.bodies import BODY_SECONDS_MAX, Receive, Room, Scope, Send
from api.counts import DeliveryCounts
from api.deadlines import Deadlines
from api.headers import Header
from api.recorder import Recorder
from schemas import events, signature
from schemas.errors import BodyTooLarge, Refused, SignatureMismatch, Transient
from schemas.inbox import Delivery, Receipt, Recorded
from schemas.logs import Seldom
from schemas.settings import SigningSecret
from schemas.signature import Claim

PATH: Final = "/webhooks/stripe"
PATHS: Final = frozenset((PATH, f"{PATH}/"))
BODY_BYTES_MAX: Final = 2 * 1024 * 1024

_RETRY_AFTER: Final = (b"retry-after", str(problems.RETRY_AFTER_SECONDS).encode())
_OUTCOMES: Final = {recorded: recorded.name.lower() for recorded in Recorded}

_seldom: Final = Seldom()
"""A stranger can cause as many lines as he likes, and the metrics count them all."""


class Answer(NamedTuple):
    """An answer to a request for this path."""

    status: int
    headers: tuple[Header, ...]
    body: bytes


def _answer(status: int, media_type: str, body: bytes, *more: Header) -> Answer:
    headers = ((b"content-type", media_type.encode()), (b"content-length", b"%d" % len(body)), *more)
    return Answer(status, headers, body)


def _problem(status: int, detail: str, *more: Header, reason: str = "") -> Answer:
    return _answer(status, problems.MEDIA_TYPE, problems.document(status, detail, reason=reason), *more)


_ACCEPTED: Final = _answer(200, "application/json", b'{"received":true}')
_NOT_POSTED: Final = _problem(405, "Deliveries are sent by POST.", (b"allow", b"POST"))


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
            await _send(send, _NOT_POSTED, closing)
            return
        size = 0
        try:
            try:
                header = headers.get(b"stripe-signature")
                claim = self._claim(header)
                body = await self._read(headers, receive)
                closing, size = (), len(body)
                answer = self._accept(await self._recorder.record(self._judge(body, claim, header)))
            except Exception as error:  # noqa: BLE001 - each is answered
                answer = self._decline(error)
            await _send(send, answer, closing)
        finally:
            # Also when the task is cancelled while it waits.
            self._room.give_back(size)

    def take(self, header: bytes | None, body: bytes, answer: Callable[[Answer], None]) -> None:
        """Take the delivery in *body*, which arrived whole, and call *answer* once, later in the event loop.

        See Note [A delivery that came whole needs no task].

        Raises:
            SignatureMissing, SignatureMalformed, SignatureExpired, SignatureMismatch: by the *header* alone; nothing
            was taken or counted.
        """
        claim = self._claim(header)
        size = 0
        try:
            bodies.take_whole(body, self._room, BODY_BYTES_MAX)
            size = len(body)
            done = self._recorder.begin(self._judge(body, claim, header))
        except Exception as error:  # noqa: BLE001 - each is answered
            done = asyncio.get_running_loop().create_future()
            done.set_exception(error)
        done.add_done_callback(partial(self._end, size, answer))

    def _end(self, size: int, answer: Callable[[Answer], None], done: "asyncio.Future[Receipt]") -> None:
        try:
            found = self._accept(done.result())
        except Exception as error:  # noqa: BLE001 - each is answered
            found = self._decline(error)
        try:
            answer(found)
        finally:
            self._room.give_back(size)

    def _claim(self, header: bytes | None) -> Claim:
        claim = signature.read(header, now=time.time())
        if not self._secrets:
            raise SignatureMismatch
        return claim

    def _judge(self, body: bytes, claim: Claim, header: bytes | None) -> Delivery:
        signer = signature.verify(claim, body, self._secrets)
        envelope = events.read(body)
        return Delivery(
            envelope=envelope,
            account=envelope.account or signer.account,
            sha256=hashlib.sha256(body).digest(),
            signature=header.decode() if header else None,
            source="webhook",
            received_at=datetime.fromtimestamp(time.time(), UTC),
        )

    def _accept(self, receipt: Receipt) -> Answer:
        self._counts.add(_OUTCOMES[receipt.recorded])
        # Duplicates wake as well: the first delivery's wake-up may be what was lost.
        self._wake()
        return _ACCEPTED

    def _decline(self, error: Exception) -> Answer:
        if isinstance(error, Refused):
            self._counts.add("refused", error.reason)
            _log_refusal(error)
            return _problem(error.status, str(error), reason=error.reason)
        if isinstance(error, Transient):
            self._counts.add("postponed")
            return _problem(503, str(error), _RETRY_AFTER)
        # The sender learns nothing of us, and comes again.
        self._counts.add("failed")
        _seldom.error("delivery.failed", kind=type(error).__name__)
        return _problem(500, problems.UNEXPECTED)

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


async def _send(send: Send, answer: Answer, closing: tuple[Header, ...]) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, *closing]})
    await send({"type": "http.response.body", "body": answer.body})


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
