"""Writes logs of our own: NDJSON, one line for each event, with the payload as the text that was recorded.

The bytes of the payload are thus kept as they were::

    {"object": "payfold.delivery", "account": "", "source": "webhook", "received_at": "…", "signature": "…",
     "payload_sha256": "…", "redacted": [], "payload": "{…}"}
"""

import gzip
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final, Literal, TypeAlias

import msgspec
from msgspec import Struct

from schemas.errors import ConfigurationError
from schemas.progress import do_nothing
from worker.logs.compression import zstd

OWN_LINE: Final = "payfold.delivery"
REMARK: Final = b"# payfold: "
"""Begins a line that readers of a log skip."""

Source: TypeAlias = Literal["webhook", "replay", "gap", "observation"]


class OwnLine(Struct, kw_only=True):
    """A line of our own log; ``payload_sha256`` is of the body before credentials were blanked."""

    object: Literal["payfold.delivery"] = OWN_LINE
    account: str
    source: Source
    received_at: datetime
    signature: str | None
    payload_sha256: str
    redacted: list[str]
    payload: str


_encode_line = msgspec.json.Encoder().encode


def remark(place: str, fault: str | None) -> bytes:
    """Return a line that names the *place* of an entry and its *fault*, and that readers skip."""
    return REMARK + f"{place}: {fault}".replace("\n", " ").encode(errors="backslashreplace") + b"\n"


def write(line: OwnLine) -> bytes:
    """Return *line* as bytes of a log, with its line break."""
    return _encode_line(line) + b"\n"


Compression: TypeAlias = Literal["plain", "gzip", "Zstandard"]
_WRITING: Final[Mapping[int, int]] = {
    zstd.CompressionParameter.compression_level: 10,
    zstd.CompressionParameter.checksum_flag: 1,
}
PLAIN_ENDINGS: Final = (".ndjson", ".json", ".jsonl", ".txt")


def form_of(path: Path | None) -> Compression:
    """Return how a log at *path* is compressed: by its name's ending, and with Zstandard for any other ending."""
    ending = "" if path is None else path.suffix
    return "plain" if ending in PLAIN_ENDINGS else "gzip" if ending == ".gz" else "Zstandard"


def line_of(
    account: str,
    source: Source,
    received_at: datetime,
    signature: str | None,
    sha256: str,
    redacted: list[str],
    payload: bytes,
) -> bytes:
    """Return the line of an event from its values in the inbox; *sha256* is in hexadecimal."""
    return write(
        OwnLine(
            account=account,
            source=source,
            received_at=received_at.astimezone(UTC),
            signature=signature,
            payload_sha256=sha256,
            redacted=redacted,
            payload=payload.decode(),
        )
    )


@contextmanager
def writing(path: Path, form: Compression, *, check: Callable[[Path], None] = do_nothing) -> Iterator[IO[bytes]]:
    """Open a new log at *path*; it appears there when it is complete and on disk.

    *check* is called with the file before the file gets its name. If it raises, no file is left behind.

    Raises:
        ConfigurationError: the log cannot be written there.
    """
    draft = path.with_name(f"{path.name}.part")
    try:
        # A new file, since another process may have the old one open.
        draft.unlink(missing_ok=True)
        with open(draft, "xb", opener=_for_us_alone) as file:
            with compressed(file, form) as stream:
                yield stream
            file.flush()
            os.fsync(file.fileno())
        check(draft)
        draft.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ConfigurationError(f"Cannot write {path}: {error.strerror}.") from None
    finally:
        draft.unlink(missing_ok=True)


def _for_us_alone(path: str, flags: int) -> int:
    """Open a file that only its owner may read: it holds personal data."""
    return os.open(path, flags, 0o600)


def _sync_folder(folder: Path) -> None:
    """Force the names in *folder* to disk, so that they survive a loss of power."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def compressed(file: IO[bytes], form: Compression) -> Iterator[IO[bytes]]:
    """Yield a stream that writes a log into *file*, in the given form."""
    if form == "Zstandard":
        with zstd.ZstdFile(file, "w", options=_WRITING) as stream:
            yield stream  # type: ignore[misc]  # it is one in all but name
    elif form == "gzip":
        with gzip.GzipFile(fileobj=file, mode="wb") as stream:
            yield stream  # type: ignore[misc]  # it is one in all but name
    else:
        yield file
