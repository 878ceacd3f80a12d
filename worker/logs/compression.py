"""Opens the files of event logs, and decompresses them by what they begin with."""

import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Final

import zstandard

CHUNK_BYTES: Final = 64 * 1024
STANDARD_INPUT: Final = "-"
DAMAGED: Final = (EOFError, OSError, zlib.error, zstandard.ZstdError)


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
        return io.BufferedReader(_Zstandard(buffered), 1024 * 1024)
    return buffered


class _Zstandard(io.RawIOBase):
    """The plain bytes of Zstandard frames. The library's own reader takes a cut frame for the end of the file."""

    def __init__(self, compressed: io.BufferedIOBase) -> None:
        self._compressed = compressed
        self._library = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._library.decompressobj()
        self._is_inside = False
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # what BufferedReader gives
        while not self._plain:
            compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_inside = self._library.decompressobj(), False
            compressed = compressed or self._compressed.read(CHUNK_BYTES)
            if not compressed:
                if self._is_inside:
                    raise EOFError("a Zstandard frame has no end")
                return 0
            self._is_inside = True
            self._plain = memoryview(self._frame.decompress(compressed))
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size
