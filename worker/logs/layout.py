"""Finds the events in the text of a log, however the text is laid out.

Note [A fault costs one entry]
    A line that cannot be read is reported with its number, and reading goes on with the next line. JSON that is
    spread over many lines has no such border. After a broken item reading therefore goes on at the next line that
    begins as the broken item did.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
from msgspec import Raw

from schemas import listing
from schemas.errors import BodyNotJson, BodyNotText, Refused
from worker.logs.compression import CHUNK_BYTES, DAMAGED, NOT_READ
from worker.logs.writer import REMARK

LINE_BYTES_MAX: Final = 16 * 1024 * 1024
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class Lines:
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
            except DAMAGED as error:
                self.damage = error
        return b""


@dataclass(frozen=True, slots=True)
class Item:
    """The *text* of an event, from line *number*; or text with a *fault*, and *rest* is the text that follows it."""

    number: int
    text: bytes
    fault: str | None = None
    rest: Iterable[bytes] = ()


def items(lines: Lines) -> Iterator[Item]:
    """Yield the events of *lines*, and the texts that are none."""
    line = lines.take()
    for start, fault in NOT_READ.items():
        if line.startswith(start):
            yield Item(1, b"", fault)
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
                yield Item(lines.number, item)
        elif text[:1] in (b"{", b"["):
            yield from _Spread(lines, line).items()
        else:
            rest = lines.rest_of(line)
            yield Item(lines.number, line, _fault_of(line), rest)
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

    def __init__(self, lines: Lines, first: bytes) -> None:
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

    def items(self) -> Iterator[Item]:
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

    def _told(self, number: int, fault: _Broken | str, rest: Iterable[bytes] = (), end: str = "") -> Iterator[Item]:
        # Where the file breaks off, ``read`` reports that.
        if self._lines.damage is None or not isinstance(fault, _CutOff):
            yield Item(number, self._unread(end), self._described(fault, number), rest)
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

    def _of_object(self) -> Iterator[Item]:
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
            yield Item(self._number_at(start), self._text[start : self._at].encode(_CODE))

    def _elements(self) -> Iterator[Item]:
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
                yield Item(number, self._text[start : self._at].encode(_CODE))
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


def fault_of(refusal: Refused, item: bytes) -> str:
    """Return what is wrong with *item*, in which *refusal* found no event."""
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
