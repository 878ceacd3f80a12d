"""Reads event logs: files of Stripe's events that others wrote, and our own.

A log is JSON, however it is laid out: events, arrays of them, Stripe's list pages and lines of our own (see
logs/writer.py), each on a line of its own (NDJSON), spread over many lines, or one after the other; plain, gzip or
Zstandard.

Note [A fault costs one entry]
    A line that cannot be read is reported with its number, and reading goes on with the next line. JSON that is
    spread over many lines has no such border. After a broken item reading therefore goes on at the next line that
    begins as the broken item did.

Note [What cannot be read can be put right and read again]
    An entry with a fault carries the text that could not be read, in pieces, since it may be long. Such texts can be
    written to a file, each below a remark that gives its place and its fault (``remark``). The reader skips these
    remarks, so once the texts are corrected, the file can be read like any other log.
"""

import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Final

import msgspec
import zstandard
from msgspec import Raw, Struct

from schemas import events, listing, own_events, signature
from schemas.errors import BodyNotJson, BodyNotText, NotAnEvent, Refused
from schemas.inbox import Delivery
from schemas.progress import do_nothing
from schemas.settings import SigningSecret
from worker.logs.writer import OWN_LINE, REMARK, OwnLine

HAS_MORE: Final = "this page of a list says has_more: there are older events that it does not hold"
LINE_BYTES_MAX: Final = 16 * 1024 * 1024
CHUNK_BYTES: Final = 64 * 1024
STANDARD_INPUT: Final = "-"
NO_NAMES: Final[Mapping[str, str]] = {}


class _Signers:
    """The secrets that may have made the signatures in a log; accounts are compared by their newest *names*."""

    def __init__(self, secrets: Sequence[SigningSecret], names: Mapping[str, str]) -> None:
        self._secrets = secrets
        self._names = names

    def of(self, own: str | None, account: str) -> list[SigningSecret]:
        """Return the secrets that may have signed an event recorded under *account*.

        *own* is the account that the event itself names, or None. A secret without a label may be of any account. If
        it gets a label later, the events that it signed before are recorded without an account.
        """
        return [each for each in self._secrets if self._newest(own or each.account or account) == self._newest(account)]

    def _newest(self, account: str) -> str:
        return self._names.get(account, account)


class _Kind(Struct):
    name: object = msgspec.field(name="object", default=None)


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of a log, or why it cannot be read; ``place`` is the file and the line, from 1.

    ``text`` is the text that cannot be read, in pieces. They can be read until the next entry is asked for.
    """

    place: str
    delivery: Delivery | None
    fault: str | None = None
    text: Iterable[bytes] = ()


# ---- Reading ----


def read(
    path: str,
    *,
    account: str,
    now: datetime,
    progress: Callable[[int], None] = do_nothing,
    warn: Callable[[str], None] = do_nothing,
    secrets: Sequence[SigningSecret] = (),
    names: Mapping[str, str] = NO_NAMES,
) -> Iterator[Entry]:
    """Yield the entries of the log at *path*, one by one; ``-`` is standard input.

    *account* stands for events that name none. *now* is when events are received, unless the log has that time. If the
    file breaks off or cannot be opened, the last entry reports this as its fault. *progress* is called with the number
    of bytes that each step read of the file, compressed as it is. *warn* is called with the place of each list page
    that has more. A signature in the log counts where the payload is the one that was signed, and one of *secrets*, of
    the line's account, verifies it. *names* maps each old name of an account to its newest.
    """
    by_whom = _Signers(secrets, names)
    name = "standard input" if path == STANDARD_INPUT else path
    with ExitStack() as opened:
        try:
            lines = _Lines(opened.enter_context(_opened(path, progress)))
        except OSError as error:
            yield Entry(name, None, f"it cannot be read: {_words(error)}")
            return
        for item in _items(lines):
            place = f"{name}: line {item.number}"
            if item.fault is None:
                yield _entry(item.text, place, account, now, by_whom)
            else:
                yield Entry(place, None, item.fault, chain((item.text,), item.rest))
        for number in lines.pages_with_more:
            warn(f"{name}: line {number}: {HAS_MORE}")
        if lines.damage is not None:
            yield Entry(f"{name}: line {lines.number + 1}", None, f"the file breaks off: {_words(lines.damage)}")


_DAMAGED: Final = (EOFError, OSError, zlib.error, zstandard.ZstdError)


def _words(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextmanager
def _opened(path: str, progress: Callable[[int], None]) -> Iterator[io.BufferedIOBase]:
    with ExitStack() as opened:
        file = io.FileIO(sys.stdin.fileno(), closefd=False) if path == STANDARD_INPUT else io.FileIO(path)
        yield _decompressed(_Counted(opened.enter_context(file), progress))


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
_NOT_READ: Final[Mapping[bytes, str]] = {
    b"BZh": "it is compressed by bzip2, and only gzip and Zstandard are read",
    b"\xfd7zX": "it is compressed by xz, and only gzip and Zstandard are read",
    b"PK\x03\x04": "it is a zip archive, and only gzip and Zstandard are read",
    b"\xff\xfe": "it is UTF-16, as PowerShell writes, and only UTF-8 is read",
    b"\xfe\xff": "it is UTF-16, and only UTF-8 is read",
}
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


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


class _Lines:
    """The lines of a log; ``number`` is that of the last line taken. Text that was read too far can be given back.

    A damaged file ends where it is damaged, and ``damage`` is the error. ``pages_with_more`` are the lines in which
    those list pages begin after which Stripe has more.
    """

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self._back = io.BytesIO()
        self.number = 0
        self.damage: BaseException | None = None
        self.pages_with_more: list[int] = []

    def take(self) -> bytes:
        """Return the next line, or as much of it as a line may have; nothing at the end."""
        line = self._back.readline()
        if not line.endswith(b"\n"):
            line += self._or_damage(lambda: self._stream.readline(LINE_BYTES_MAX - len(line)))
        self.number += bool(line)
        return line

    def take_more(self) -> bytes:
        """Return some bytes from where the last line ended; nothing at the end."""
        # At most one read of the file beneath, so that damage further on takes nothing along.
        return self._back.read(CHUNK_BYTES) or self._or_damage(lambda: self._stream.read1(CHUNK_BYTES))

    def rest_of(self, line: bytes) -> Iterator[bytes]:
        """Yield the rest of the line that begins with *line*, in pieces."""
        while line and not line.endswith(b"\n"):
            line = self._or_damage(lambda: self._stream.readline(CHUNK_BYTES))
            yield line

    def give_back(self, rest: bytes, number: int) -> None:
        """Put back *rest*, which begins in line *number*, to be read next."""
        self._back = io.BytesIO(rest + self._back.read())
        self.number = number - 1

    def _or_damage(self, read: Callable[[], bytes]) -> bytes:
        if self.damage is None:
            try:
                return read()
            except _DAMAGED as error:
                self.damage = error
        return b""


@dataclass(frozen=True, slots=True)
class _Item:
    """The *text* of an event, from line *number*; or text with a *fault*, and *rest* is the text that follows it."""

    number: int
    text: bytes
    fault: str | None = None
    rest: Iterable[bytes] = ()


def _items(lines: _Lines) -> Iterator[_Item]:
    line = lines.take()
    for start, fault in _NOT_READ.items():
        if line.startswith(start):
            yield _Item(1, b"", fault)
            return
    line = line.removeprefix(_BYTE_ORDER_MARK)
    while line:
        text = line.strip()
        if not text or text.startswith(REMARK):
            pass
        elif len(line) < LINE_BYTES_MAX and _is_json(text):
            page = listing.cut(text)
            if page is not None and page.has_more:
                lines.pages_with_more.append(lines.number)
            for item in (text,) if page is None else page.items:
                yield _Item(lines.number, item)
        elif text[:1] in (b"{", b"["):
            yield from _Spread(lines, line).items()
        else:
            rest = lines.rest_of(line)
            yield _Item(lines.number, line, _fault_of(line), rest)
            for _ in rest:  # as much as the caller left unread
                pass
        line = lines.take()


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=Raw)
    except RecursionError:
        return True
    except msgspec.DecodeError:
        return False
    return True


def _fault_of(line: bytes) -> str:
    if len(line.strip()) >= LINE_BYTES_MAX:
        return _TOO_LONG
    text = line.decode(_CODE)
    words, position = "Extra data", len(text) - len(text.lstrip())
    try:
        _, position = _decode_value(text, position)
    except json.JSONDecodeError as error:
        words, position = error.msg, error.pos
    position += len(text[position:]) - len(text[position:].lstrip())
    if position == len(text):
        return "it is not an event"
    return f"it is not JSON: {words} (column {_characters(text[:position]) + 1})"


_TOO_LONG: Final = f"it is longer than {LINE_BYTES_MAX // 1024**2} MiB"


class _Broken(Exception):
    """The text is not JSON, and reading more cannot change that; the fault is *at* a line and a column, from 1."""

    def __init__(self, words: str = "", at: tuple[int, int] | None = None) -> None:
        super().__init__(words)
        self.at = at


class _CutOff(_Broken):
    """The file ends first."""

    def __str__(self) -> str:
        return "the file ends before the JSON that begins here does"


class _Over(Exception):
    """Nothing more of this value can be read, and its fault has been reported."""


# Latin-1 shows each byte as one character, so a text can be cut anywhere and be turned back into its bytes. Characters
# outside of ASCII can only stand inside of strings, and their values do not matter here.
_CODE: Final = "latin-1"
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_LITERAL_CHARACTERS_MAX: Final = 5
_NO_VALUE: Final = " is no value"
_STRING_OR_CONSTANT: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|NaN|-?Infinity', re.DOTALL)


class _Constant(Exception):
    """A constant that Python reads and JSON does not have: NaN, Infinity or -Infinity."""


def _refuse_constant(name: str) -> object:
    raise _Constant(name)


# Numbers are not converted, since a number may have more digits than Python converts.
_decoder: Final = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=_refuse_constant)


def _decode_value(text: str, at: int) -> tuple[object, int]:
    """Return the JSON value that begins *at* a position, and where it ends.

    Raises:
        JSONDecodeError, RecursionError: there is none, or it is nested too deeply.
    """
    try:
        return _decoder.raw_decode(text, at)
    except _Constant as constant:
        found = (each.start() for each in _STRING_OR_CONSTANT.finditer(text, at) if each[0][0] != '"')
        raise json.JSONDecodeError(f"{constant}{_NO_VALUE}", text, next(found, at)) from None


_LINE_ENDS: Final = "the line ends before the JSON that begins in it does"


def _characters(text: str) -> int:
    """Return how many characters *text*, of which each stands for a byte, has as UTF-8."""
    return len(text.encode(_CODE).decode(errors="replace"))


class _Spread:
    """One JSON value that does not end with its first line: an event, an array or a list page, however long."""

    def __init__(self, lines: _Lines, first: bytes) -> None:
        self._lines = lines
        self._number = lines.number
        self._column = 1
        self._text = first.decode(_CODE)
        self._at = 0
        # Offset in the text of the first character that was read and not yet yielded. Earlier ones are in _passed.
        self._from = 0
        self._passed = ""
        self._has_elements = False
        # True for JSON as printers lay it out over lines. Otherwise a value that does not end in its line is broken.
        self._is_laid_out = first.endswith(b"\n") and first.rstrip().endswith((b"{", b"[", b",", b":"))

    def items(self) -> Iterator[_Item]:
        """Yield the items of the value, and leave the lines at the text after it."""
        number = self._number
        try:
            if self._next() == "[":
                yield from self._elements()
            else:
                yield from self._of_object()
        except _Over:
            pass
        except _Broken as fault:
            if self._is_laid_out:
                # No item was yielded from a broken event, so the lines that were tried as its parts are read again.
                self._at = len(self._text[: self._at].rstrip()) if self._has_elements else self._text.find("\n")
                self._find_next_like("")
                yield from self._told(number, fault)
            else:
                self._at = self._from
                yield from self._told(number, fault, self._rest_of_line())
        rest = self._text[self._at :]
        self._lines.give_back(rest.encode(_CODE), self._number_at(self._at))

    def _told(self, number: int, fault: _Broken | str, rest: Iterable[bytes] = (), end: str = "") -> Iterator[_Item]:
        # Where the file breaks off, ``read`` reports that.
        if self._lines.damage is None or not isinstance(fault, _CutOff):
            yield _Item(number, self._unread(end), self._described(fault, number), rest)
        for _ in rest:  # as much as the caller left unread
            pass

    def _described(self, fault: _Broken | str, number: int) -> str:
        """Return *fault* with its place: in line *number*, which the entry names, the column is enough."""
        if isinstance(fault, str) or fault.at is None:
            return str(fault)
        line, column = fault.at
        if line == number:
            return f"{fault} (column {column})"
        if self._is_laid_out or self._has_elements:
            return f"{fault} (line {line}, column {column})"
        return f"it is not JSON: {_LINE_ENDS}"

    def _unread(self, end: str) -> bytes:
        """Return the text that was read and not yielded, until *end*, without commas and spaces around it."""
        text = (self._passed + self._text[self._from : self._at]).strip(" \t\r\n,")
        self._from, self._passed = self._at, ""
        return (re.split(end, text, maxsplit=1)[0] if end else text).encode(_CODE)

    def _of_object(self) -> Iterator[_Item]:
        start, kind, is_page, is_first, has_more = self._at, None, False, True, False
        number = self._number_at(start)
        self._at += 1
        while self._next() != "}":
            if not is_first:
                self._pass(",")
            is_first = False
            key = self._key()
            self._pass(":")
            if key == "data" and self._next() == "[" and kind in (None, "list"):
                is_page = True
                yield from self._elements()
            elif key == "object":
                kind = self._value()
            elif self._value() is True and key == "has_more":
                has_more = True
        self._at += 1
        if is_page and has_more:
            self._lines.pages_with_more.append(number)
        if not is_page:
            yield _Item(self._number_at(start), self._text[start : self._at].encode(_CODE))

    def _elements(self) -> Iterator[_Item]:
        self._has_elements = True
        self._at += 1
        self._from = self._at
        while (mark := self._next()) != "]":
            if mark == ",":
                self._at += 1
                continue
            start = self._at
            number = self._number_at(start)
            try:
                self._value()
            except _CutOff:
                raise
            except _Broken as fault:
                before = self._text[self._text.rfind("\n", 0, start) + 1 : start]
                self._at += 1
                skipped = f"{self._described(fault, number)}, and what follows it in the array was skipped"
                if before.strip():
                    yield from self._told(number, skipped, self._rest_of_line())
                elif self._find_next_like(before):
                    yield from self._told(number, fault)
                    continue
                else:
                    yield from self._told(number, skipped, end=rf"\n {{0,{max(len(before) - 1, 0)}}}\]")
                raise _Over from None
            else:
                yield _Item(number, self._text[start : self._at].encode(_CODE))
                self._from = self._at
            self._forget()
        self._at += 1

    def _pass(self, mark: str) -> None:
        if self._next() != mark:
            raise self._broken(f"{mark} is missing", self._at)
        self._at += 1

    def _key(self) -> str:
        if self._next() != '"':
            raise self._broken("a key is missing", self._at)
        return str(self._value())

    def _next(self) -> str:
        """Return the next character that is no space, without moving past it."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                raise _CutOff

    def _value(self) -> object:
        """Move past one value, and return it."""
        self._next()
        # A value that ends with the text may be the beginning of a longer number.
        while (found := self._decoded()) is None or found[1] == len(self._text):
            if len(self._text) - self._at >= LINE_BYTES_MAX - CHUNK_BYTES:
                raise _Broken(_TOO_LONG)
            if not self._grow():
                break
        if found is None:
            raise _CutOff
        value, end = found
        if end - self._at > LINE_BYTES_MAX:
            raise _Broken(_TOO_LONG)
        self._at = end
        return value

    def _decoded(self) -> tuple[object, int] | None:
        """Return the value here and where it ends, None where the text ends first."""
        try:
            value, end = _decode_value(self._text, self._at)
        except json.JSONDecodeError as error:
            if self._may_go_on(error):
                return None
            raise self._broken(error.msg.removesuffix(" at"), error.pos) from None
        except RecursionError:
            raise _Broken("it is nested too deeply") from None
        return value, end

    def _broken(self, words: str, position: int) -> _Broken:
        """Return the fault *words* at *position* of the text."""
        mark = self._text[position : position + 1]
        # An object that begins where a line does is the next one of the log: the line before it was cut.
        is_next = mark == "{" and self._text[position - 1 : position] == "\n" and not self._has_elements
        if is_next or (mark in ("\n", "\r") and not self._is_laid_out):
            return _Broken(f"it is not JSON: {_LINE_ENDS}")
        begin = self._text.rfind("\n", 0, position) + 1
        column = _characters(self._text[begin:position]) + (self._column if begin == 0 else 1)
        return _Broken(f"it is not JSON: {words}", (self._number_at(position), column))

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Return whether the text is right as far as it was read, so that more of it may complete the value."""
        if error.msg.startswith("Unterminated string"):
            return True
        if error.msg.endswith(_NO_VALUE):
            return False
        rest = self._text[error.pos :].strip()
        return len(rest) < _LITERAL_CHARACTERS_MAX and not error.msg.startswith("Invalid control character")

    def _grow(self) -> bool:
        wanted, more = max(CHUNK_BYTES, len(self._text) - self._at), []
        while wanted > 0 and (chunk := self._lines.take_more()):
            more.append(chunk)
            wanted -= len(chunk)
        self._text += b"".join(more).decode(_CODE)
        return bool(more)

    def _forget(self) -> None:
        """Free the text that has been read."""
        if self._at > CHUNK_BYTES:
            self._let_go()

    def _let_go(self) -> None:
        if len(self._passed) < LINE_BYTES_MAX:
            self._passed += self._text[self._from : self._at]
        self._number = self._number_at(self._at)
        begin = self._text.rfind("\n", 0, self._at) + 1
        self._column = _characters(self._text[begin : self._at]) + (self._column if begin == 0 else 1)
        self._text, self._at, self._from = self._text[self._at :], 0, 0

    def _number_at(self, position: int) -> int:
        return self._number + self._text.count("\n", 0, position)

    def _rest_of_line(self) -> Iterator[bytes]:
        """Move to the beginning of the next line, and yield the text on the way."""
        while (end := self._text.find("\n", self._at)) < 0:
            yield self._text[self._at :].encode(_CODE)
            self._number, self._text, self._at, self._from = self._number_at(self._at), "", 0, 0
            if not self._grow():
                return
        yield self._text[self._at : end + 1].encode(_CODE)
        self._at = self._from = end + 1

    def _find_next_like(self, indentation: str) -> bool:
        """Go to the next line that begins with an object at *indentation*; False where there is none."""
        begins = re.compile(rf"\n{indentation}(?={{)")
        while (found := begins.search(self._text, self._at)) is None:
            # Such a line may begin at the end of the text.
            self._at = max(self._at, len(self._text) - len(indentation) - 1)
            self._forget()
            if not self._grow():
                self._at = len(self._text)
                return False
        self._at = found.end()
        return True


def _entry(item: bytes, place: str, account: str, now: datetime, signers: _Signers) -> Entry:
    try:
        return Entry(place, _delivery(item, account, now, signers))
    except Refused as refusal:
        return Entry(place, None, _words_of(refusal, item), (item,))


def _words_of(refusal: Refused, item: bytes) -> str:
    if isinstance(refusal, BodyNotText):
        return "it is not UTF-8"
    if not isinstance(refusal, BodyNotJson):
        return str(refusal)
    text = item.decode(_CODE)
    try:
        _decode_value(text, 0)
    except RecursionError:
        return f"it is not JSON: {_LINE_ENDS}" if _is_cut(text) else _TOO_DEEP
    except json.JSONDecodeError:
        pass
    return "it is not JSON"


_TOO_DEEP: Final = "it is not JSON, and nested too deeply for the place to be found"
_STRING_OR_BRACKET: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


def _is_cut(text: str) -> bool:
    """Return whether *text* opens more brackets than it closes."""
    brackets = [each[0] for each in _STRING_OR_BRACKET.finditer(text) if each[0][0] != '"']
    return sum(1 if each in "[{" else -1 for each in brackets) > 0


def _delivery(item: bytes, account: str, now: datetime, signers: _Signers) -> Delivery:
    if OWN_LINE.encode() in item and _kind(item) == OWN_LINE:
        return _own(item, signers)
    envelope = events.read(item)
    if "." not in envelope.type:
        _require_event(item)
    _require_single_keys(item)
    return Delivery(
        envelope=envelope,
        account=envelope.account or account,
        sha256=hashlib.sha256(item).digest(),
        signature=None,
        # Other programs' logs hold what Stripe sent, so it counts as replayed. An observation remains an observation.
        source="observation" if own_events.is_own(envelope.type) else "replay",
        received_at=now,
    )


def _kind(item: bytes) -> object:
    try:
        return msgspec.json.decode(item, type=_Kind).name
    except (msgspec.DecodeError, RecursionError):
        return None


def _require_event(item: bytes) -> None:
    """Raise NotAnEvent where an object that has a type of its own, as a credit note has, stands without its event."""
    kind = _kind(item)
    if isinstance(kind, str) and kind != "event":
        raise NotAnEvent(events.OBJECT_ALONE)


def _require_single_keys(item: bytes) -> None:
    """Raise NotAnEvent where an object has a key twice: it is then not known which of the values is meant."""
    try:
        # Each key is followed by one such pair, so counting them is cheap. Only a quotation mark that is written as
        # \u0022 can mislead the count.
        again = msgspec.json.encode(msgspec.json.decode(item))
        if msgspec.json.format(item, indent=-1).count(b'":') != again.count(b'":'):
            json.loads(item, object_pairs_hook=_unique)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return  # the fold judges it


def _unique(pairs: list[tuple[str, object]]) -> None:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise NotAnEvent(f"it has the key {key[:40]!r} twice")


def _own(item: bytes, signers: _Signers) -> Delivery:
    try:
        line = msgspec.json.decode(item, type=OwnLine)
        sha256 = bytes.fromhex(line.payload_sha256)
    except (msgspec.DecodeError, ValueError) as error:
        raise NotAnEvent(f"it is no line of our log: {error}") from None
    payload = line.payload.encode()
    if not line.redacted and hashlib.sha256(payload).digest() != sha256:
        raise NotAnEvent("its payload is not the one that was exported: the hash differs")
    envelope = events.read(payload)
    return Delivery(
        envelope=msgspec.structs.replace(envelope, redacted=tuple(dict.fromkeys((*line.redacted, *envelope.redacted)))),
        account=line.account,
        sha256=sha256,
        signature=line.signature,
        source="observation" if line.source == "observation" else "replay",
        received_at=line.received_at,
        verified=_is_verified(line, payload, signers.of(envelope.account, line.account)),
    )


def _is_verified(line: OwnLine, payload: bytes, secrets: Sequence[SigningSecret]) -> bool:
    """Return whether one of *secrets* signed *payload*, of which no credential is blanked."""
    return line.signature is not None and not line.redacted and signature.is_by_any(line.signature, payload, secrets)
