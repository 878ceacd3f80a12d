"""Hands out the text of a log by lines, and by the pieces of lines that are too long."""

import io
from collections.abc import Callable, Generator, Iterator
from typing import Final

from worker.logs.compression import CHUNK_BYTES, DAMAGED
from worker.logs.writer import REMARK

LINE_BYTES_MAX: Final = 16 * 1024 * 1024


class Lines:
    """The lines of a log; ``number`` is that of the last line taken. Text that was read too far can be given back.

    A damaged file ends where it is damaged, and ``damage`` is the error. ``pages_with_more`` are the lines in which
    those list pages begin after which Stripe has more.
    """

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self._back = io.BytesIO()
        self._is_inside = False
        self.number = 0
        self.damage: BaseException | None = None
        self.pages_with_more: list[int] = []

    def take(self, bytes_max: int = LINE_BYTES_MAX) -> bytes:
        """Return the next line, or the next *bytes_max* bytes of it; nothing at the end."""
        line = self._back.readline(bytes_max)
        if not line.endswith(b"\n") and len(line) < bytes_max:
            line += self._or_damage(lambda: self._stream.readline(bytes_max - len(line)))
        self.number += bool(line) and not self._is_inside
        self._is_inside = bool(line) and not line.endswith(b"\n")
        return line

    def take_more(self) -> bytes:
        """Return some bytes from where the last line ended; nothing at the end."""
        # At most one read of the file beneath, so that damage further on takes nothing along.
        return self._back.read(CHUNK_BYTES) or self._or_damage(lambda: self._stream.read1(CHUNK_BYTES))

    def rest_of_line(self, piece: bytes) -> Iterator[bytes]:
        """Yield *piece*, which was taken last, and the rest of its line, in pieces."""
        while piece:
            yield piece
            piece = self.take(CHUNK_BYTES) if self._is_inside else b""

    def rest_of_value(self, closing: bytes) -> Generator[bytes, None, bool]:
        """Yield the rest of a broken value, in pieces, and return whether it ends before a line that begins with {.

        See Note [How a log is read] in logs/layout.py; *closing* is the bracket that closes the value.
        """
        piece, is_closed = self.take(CHUNK_BYTES), False
        while piece:
            yield piece
            ends_line = not self._is_inside
            if ends_line and is_closed:
                break
            piece = self.take(CHUNK_BYTES)
            if ends_line and piece.startswith((b"{", b"[", REMARK)):
                self.give_back(piece, self.number)
                return piece.startswith(b"{")
            is_closed = piece.startswith(closing) if ends_line else is_closed
        return False

    def give_back(self, rest: bytes, number: int) -> None:
        """Put back *rest*, which was read last and begins in line *number*, to be read next."""
        if len(self._back.getbuffer()) > self._back.tell():  # then no more than what was put back has been read
            self._back.seek(-len(rest), io.SEEK_CUR)
        else:
            self._back = io.BytesIO(rest)
        self.number, self._is_inside = number - 1, False

    def _or_damage(self, read: Callable[[], bytes]) -> bytes:
        if self.damage is None:
            try:
                return read()
            except DAMAGED as error:
                self.damage = error
        return b""
