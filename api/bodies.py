"""The bodies of requests: bounded in bytes and seconds each, and in bytes together.

Note [Bodies share one room]
    A body counts from its first byte until its request is answered, so bodies that are being read and bodies that wait
    for their commit are bounded together. Bodies that are being read may fill half of the room at most, since their
    senders have proven nothing yet. A body that arrived with its head, as Stripe's do, is verified without waiting and
    finds the other half. Only bytes that have arrived count, not announced ones, so a slow sender holds no more than it
    sent.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final

from schemas.errors import BodyTooLarge, BodyTooSlow, Transient

ROOM_BYTES_MAX: Final = 64 * 1024 * 1024
"""Bytes of the bodies in memory; more are turned away, and come again."""
READING_BYTES_MAX: Final = ROOM_BYTES_MAX // 2
"""Bytes of the bodies among them that have not arrived whole."""
BODY_SECONDS_MAX: Final = 10

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CLOSE: Final = (b"connection", b"close")


class Overloaded(Transient):
    """More is arriving than can be taken: send it again."""


class Room:
    """The memory that the bodies of one process may take."""

    def __init__(self, bytes_max: int = ROOM_BYTES_MAX, reading_bytes_max: int = READING_BYTES_MAX) -> None:
        self._left = bytes_max
        self._reading_left = reading_bytes_max

    def take(self, size: int) -> None:
        """Count *size* bytes of a whole body, until they are given back.

        Raises:
            Overloaded: and counts nothing.
        """
        if size > self._left:
            raise Overloaded
        self._left -= size

    def give_back(self, size: int) -> None:
        """Count *size* bytes no more."""
        self._left += size

    async def read(self, receive: Receive, first: MutableMapping[str, Any], bytes_max: int) -> bytes:
        """Return the rest of a body that began with the message *first*; the caller gives back its length.

        Raises:
            BodyTooLarge, BodyTooSlow, Overloaded: and counts nothing.
        """
        chunks: list[bytes] = []
        size, message = 0, first
        try:
            while True:
                chunk = _chunk(message)
                _check_size(size + len(chunk), bytes_max)
                self._take_part(len(chunk))
                size += len(chunk)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
                message = await receive()
        except BaseException:
            self.give_back(size)
            raise
        finally:
            self._reading_left += size

    def _take_part(self, size: int) -> None:
        if size > self._reading_left:
            raise Overloaded
        self.take(size)
        self._reading_left -= size


def _check_size(size: int, bytes_max: int) -> None:
    if size > bytes_max:
        raise BodyTooLarge(f"The body is larger than {bytes_max} bytes.")


def _chunk(message: MutableMapping[str, Any]) -> bytes:
    if message["type"] == "http.disconnect":
        raise BodyTooSlow("The connection was closed before the body was complete.")
    chunk: bytes = message.get("body", b"")
    return chunk


async def read(headers: Mapping[bytes, bytes], receive: Receive, room: Room, bytes_max: int) -> bytes:
    """Return a request's body, which counts in *room* until the caller gives its length back.

    Raises:
        BodyTooLarge, BodyTooSlow, Overloaded: and stops reading there.
    """
    announced = headers.get(b"content-length", b"")
    if announced.isdigit():
        _check_size(int(announced[:20]), bytes_max)
    first = await receive()
    if first["type"] == "http.disconnect" or first.get("more_body", False):
        return await room.read(receive, first, bytes_max)
    body: bytes = first.get("body", b"")
    take_whole(body, room, bytes_max)
    return body


def take_whole(body: bytes, room: Room, bytes_max: int) -> None:
    """Count a *body* that arrived whole, until the caller gives its length back.

    Raises:
        BodyTooLarge, Overloaded: and counts nothing.
    """
    _check_size(len(body), bytes_max)
    room.take(len(body))


def too_slow(seconds_max: float) -> BodyTooSlow:
    """Return the refusal of a body that took more than *seconds_max*."""
    return BodyTooSlow(f"The body did not arrive within {seconds_max:g} seconds.")


def is_announced(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a request with these *headers* has a body."""
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


@asynccontextmanager
async def taken(
    scope: Scope, receive: Receive, room: Room, *, bytes_max: int, seconds_max: float
) -> AsyncIterator[bytes]:
    """Read a request's body and hold it in *room* until the end.

    Raises:
        BodyTooLarge, BodyTooSlow, Overloaded: and stops reading there.
    """
    try:
        async with asyncio.timeout(seconds_max):
            body = await read(dict(scope["headers"]), receive, room, bytes_max)
    except TimeoutError:
        raise too_slow(seconds_max) from None
    try:
        yield body
    finally:
        room.give_back(len(body))
