"""Opens the files of event logs, and decompresses them by what they begin with."""

import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Final

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["CHUNK_BYTES", "DAMAGED", "NOT_READ", "STANDARD_INPUT", "opened", "reason_of", "zstd"]

CHUNK_BYTES: Final = 64 * 1024
STANDARD_INPUT: Final = "-"
DAMAGED: Final = (EOFError, OSError, zlib.error, zstd.ZstdError)


def reason_of(error: BaseException) -> str:
    """Return why a file could not be read, in the words of the system or of the library."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextmanager
def opened(path: str, progress: Callable[[int], None]) -> Iterator[io.BufferedIOBase]:
    """Open the file at *path*, or standard input, and yield its plain bytes; *progress* is called as by ``read``."""
    with ExitStack() as stack:
        file = io.FileIO(sys.stdin.fileno(), closefd=False) if path == STANDARD_INPUT else io.FileIO(path)
        yield _decompressed(_Counted(stack.enter_context(file), progress))


class _Counted(io.RawIOBase):
    """A file that reports how many bytes each step read of it."""

    def __init__(self, file: io.RawIOBase, progress: Callable[[int], None]) -> None:
        self._file = file
        self._progress = progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # what BufferedReader gives
        size = self._file.readinto(buffer) or 0
        self._progress(size)
        return size


_GZIP: Final = b"\x1f\x8b"
_ZSTANDARD: Final = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or one to be skipped
# The greatest window that the format has: 2 GiB, which only a frame that asks for it takes.
_READING: Final[Mapping[int, int]] = {zstd.DecompressionParameter.window_log_max: 31}
NOT_READ: Final[Mapping[bytes, str]] = {
    b"BZh": "it is compressed by bzip2, and only gzip and Zstandard are read",
    b"\xfd7zX": "it is compressed by xz, and only gzip and Zstandard are read",
    b"PK\x03\x04": "it is a zip archive, and only gzip and Zstandard are read",
    b"\xff\xfe": "it is UTF-16, as PowerShell writes, and only UTF-8 is read",
    b"\xfe\xff": "it is UTF-16, and only UTF-8 is read",
}


def _decompressed(stream: io.RawIOBase) -> io.BufferedIOBase:
    """Return the plain bytes of *stream*, by what it begins with rather than by its name."""
    buffered = io.BufferedReader(stream, 1024 * 1024)
    start = buffered.peek(4)[:4]
    if start.startswith(_GZIP):
        return gzip.GzipFile(fileobj=buffered)
    if _ZSTANDARD.match(start):
        return zstd.ZstdFile(buffered, options=_READING)
    return buffered
