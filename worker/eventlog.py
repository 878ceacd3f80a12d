"""Event logs as files: what others write of Stripe's events, and what we write of our inbox.

Read are NDJSON with an event, a Stripe list page or a line of our own on each line, and one JSON text that is
an event, an array or a list page; plain, gzip or Zstandard. Written is NDJSON, a line an event, with the
payload as the text that was delivered, so that the very bytes are kept::

    {"object": "payfold.delivery", "account": "", "source": "webhook", "received_at": "…", "signature": "…",
     "payload_sha256": "…", "payload": "{…}"}
"""

import gzip
import hashlib
import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Final, Literal

import msgspec
import zstandard
from msgspec import Raw, Struct

from schemas import events
from schemas.errors import BodyNotJson, ConfigurationError, NotAnEvent, Refused
from schemas.inbox import Delivery

OWN_LINE: Final = "payfold.delivery"
LINE_BYTES_MAX: Final = 16 * 1024 * 1024
STANDARD_INPUT: Final = "-"


class OwnLine(Struct, kw_only=True):
    """A line of our own log."""

    object: Literal["payfold.delivery"] = OWN_LINE
    account: str
    source: Literal["webhook", "replay", "gap", "observation"]
    received_at: datetime
    signature: str | None
    payload_sha256: str
    payload: str


class _Kind(Struct):
    object: object = None
    data: Raw = Raw(b"null")


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of a log, or why it cannot be read; ``place`` is the file and the line or item, from 1."""

    place: str
    delivery: Delivery | None
    fault: str | None = None


def read(path: str, *, account: str, now: datetime) -> Iterator[Entry]:
    """Yield what the log at *path* holds, one by one; ``-`` is standard input.

    *account* stands for events that name none; *now* is when they are received, unless the log tells.

    Raises:
        ConfigurationError: when the file cannot be opened.
    """
    with _opened(path) as stream:
        yield from _entries(stream, "standard input" if path == STANDARD_INPUT else path, account, now)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if path == STANDARD_INPUT:
        yield _decompressed(sys.stdin.buffer)
        return
    with ExitStack() as opened:
        try:
            file = opened.enter_context(Path(path).open("rb"))
        except OSError as error:
            raise ConfigurationError(f"Cannot read {path}: {error.strerror}.") from None
        yield _decompressed(file)


_GZIP: Final = b"\x1f\x8b"
_ZSTANDARD: Final = b"\x28\xb5\x2f\xfd"


def _decompressed(stream: BinaryIO) -> BinaryIO:
    """Return the plain bytes of *stream*, by what it begins with rather than by its name."""
    buffered = io.BufferedReader(stream, 1024 * 1024)  # type: ignore[type-var]  # any binary stream will do
    start = buffered.peek(4)[:4]
    if start.startswith(_GZIP):
        return gzip.open(buffered)  # type: ignore[return-value]  # a binary stream by another name
    if start.startswith(_ZSTANDARD):
        reader = zstandard.ZstdDecompressor().stream_reader(buffered, read_across_frames=True)
        return io.BufferedReader(reader, 1024 * 1024)
    return buffered


def _entries(stream: BinaryIO, name: str, account: str, now: datetime) -> Iterator[Entry]:
    first = stream.readline(LINE_BYTES_MAX)
    while first and not first.strip():
        first = stream.readline(LINE_BYTES_MAX)
    if _is_json(first):
        yield from _of_lines(first, stream, name, account, now)
        return
    # One text over many lines, or lines of which the first is broken.
    rest = stream.read()
    if _is_json(first + rest):
        for number, item in enumerate(_items(first + rest), 1):
            yield _entry(item, f"{name}: item {number}", account, now)
    else:
        yield from _of_lines(first, io.BytesIO(rest), name, account, now)


def _of_lines(first: bytes, stream: BinaryIO, name: str, account: str, now: datetime) -> Iterator[Entry]:
    number, line = 1, first
    while line:
        place = f"{name}: line {number}"
        if len(line) >= LINE_BYTES_MAX and not line.endswith(b"\n"):
            yield Entry(place, None, f"the line is longer than {LINE_BYTES_MAX} bytes")
            while line and not line.endswith(b"\n"):
                line = stream.readline(LINE_BYTES_MAX)
        elif text := line.strip():
            items = list(_items(text)) if _is_json(text) else [text]
            for index, item in enumerate(items, 1):
                yield _entry(item, place if len(items) == 1 else f"{place}, item {index}", account, now)
        number, line = number + 1, stream.readline(LINE_BYTES_MAX)


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=Raw)
    except RecursionError:
        return True
    except msgspec.DecodeError:
        return False
    return True


def _items(text: bytes) -> Iterator[bytes]:
    """Yield the events in a JSON text: itself, the elements of an array, or the data of a list page."""
    text = text.strip()
    if text.startswith(b"["):
        yield from map(bytes, msgspec.json.decode(text, type=list[Raw]))
        return
    try:
        kind = msgspec.json.decode(text, type=_Kind)
    except (msgspec.DecodeError, RecursionError):
        yield text
        return
    data = bytes(kind.data)
    if kind.object in (None, "list") and data.startswith(b"["):
        yield from map(bytes, msgspec.json.decode(data, type=list[Raw]))
    else:
        yield text


def _entry(item: bytes, place: str, account: str, now: datetime) -> Entry:
    try:
        return Entry(place, _delivery(item, account, now))
    except Refused as refusal:
        return Entry(place, None, str(refusal))


def _delivery(item: bytes, account: str, now: datetime) -> Delivery:
    if OWN_LINE.encode() in item[:64]:
        return _own(item)
    envelope = events.read(item)
    return Delivery(
        envelope=envelope,
        account=envelope.account or account,
        sha256=hashlib.sha256(item).digest(),
        signature=None,
        # Somebody else's log tells what Stripe sent, but an observation stays what it is.
        source="observation" if envelope.type.startswith("payfold.") else "replay",
        received_at=now,
    )


def _own(item: bytes) -> Delivery:
    try:
        line = msgspec.json.decode(item, type=OwnLine)
        sha256 = bytes.fromhex(line.payload_sha256)
    except msgspec.ValidationError as error:
        raise NotAnEvent(f"The line is no event of our log: {error}") from None
    except (msgspec.DecodeError, ValueError):
        raise BodyNotJson from None
    return Delivery(
        envelope=events.read(line.payload.encode()),
        account=line.account,
        sha256=sha256,
        signature=line.signature,
        source="observation" if line.source == "observation" else "replay",
        received_at=line.received_at,
    )


_encode_line = msgspec.json.Encoder().encode


def write(line: OwnLine) -> bytes:
    """Return *line* as it stands in a log, with its line break."""
    return _encode_line(line) + b"\n"
