"""Finds the events in the text of a log, however the text is laid out.

Note [How a log is read]
    A log is a sequence of JSON values, each on a line of its own (NDJSON), spread over many lines, or one after the
    other. A value is an event, an array of events, or one of Stripe's list pages, which has the array in ``data``.
    Blank lines and remarks are skipped. An event may have 16 MiB, and arrays and pages may have any length.

    A line that begins no array and no object, and is no JSON, is refused by itself. A fault within an array or an
    object costs the rest of that value: from the first event that was not read, to the end of the value. Events before
    it stay read. The rest is one entry, with the line in which it begins, the fault and the text.

    A broken value has no certain end, so it is taken to end

    - with its line, where it stands in one line: where that line does not end with a bracket, comma or colon after
      which a printer would break it;
    - else with the next line that begins with its closing bracket, or before the next line that begins with { or [
      or a remark. Only the first column counts, since printers indent all that is inside of a value.

    Where the broken element itself begins in the first column, as in an array with an element a line, reading goes on
    with the next such element of the same array.

    The text of the rest has brackets around it: the opening one is put before it, and the closing one after it where
    the array goes on. So it is JSON once the fault in it is corrected, and can be read like any other log. Where the
    file ends within an event, the text is that event alone.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
from msgspec import Raw

from schemas import listing
from worker.logs.compression import CHUNK_BYTES, NOT_READ
from worker.logs.json_values import CODE, LINE_ENDS, characters, decode, fault_of_line, is_unfinished
from worker.logs.lines import LINE_BYTES_MAX, Lines
from worker.logs.writer import REMARK

_TOO_LONG: Final = f"it is longer than {LINE_BYTES_MAX // 1024**2} MiB"
_CUT_OFF: Final = "the file ends before the JSON that begins here does"
SKIPPED: Final = ", and what follows it in the array was skipped"
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_ARRAY: Final = (b"[", b"]")
_PAGE: Final = (b'{"data": [', b"]}")
_OBJECT: Final = (b"", b"}")


@dataclass(frozen=True, slots=True)
class Item:
    """The *text* of an event, from line *number*; or a *fault*, and the text that was *refused*, in pieces.

    The pieces can be read until the next item is asked for.
    """

    number: int
    text: bytes = b""
    fault: str | None = None
    refused: Iterable[bytes] = ()


def _refuse(number: int, fault: str, pieces: Iterator[bytes]) -> Iterator[Item]:
    yield Item(number, fault=fault, refused=pieces)
    for _ in pieces:  # as many as the caller left unread
        pass


def items(lines: Lines) -> Iterator[Item]:
    """Yield the events of *lines*, and the texts that are none."""
    line = lines.take()
    for start, fault in NOT_READ.items():
        if line.startswith(start):
            yield Item(1, fault=fault)
            return
    line = line.removeprefix(_BYTE_ORDER_MARK)
    while line:
        text = line.strip()
        if not text or text.startswith(REMARK):
            pass
        elif len(line) < LINE_BYTES_MAX and listing.is_one_item(text):
            yield Item(lines.number, text)
        elif len(line) < LINE_BYTES_MAX and _is_json(text):
            page = listing.cut(text)
            if page is not None and page.has_more:
                lines.pages_with_more.append(lines.number)
            for item in (text,) if page is None else page.items:
                yield Item(lines.number, item)
        elif text[:1] in (b"{", b"["):
            yield from _Value(lines, line).items()
        else:
            fault = _TOO_LONG if len(text) >= LINE_BYTES_MAX else fault_of_line(line)
            yield from _refuse(lines.number, fault, lines.rest_of_line(line))
        line = lines.take()


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=Raw)
    except RecursionError:
        return True
    except msgspec.DecodeError:
        return False
    return True


class _Broken(Exception):
    """The text is not JSON, and reading more cannot change that; the fault is *at* a line and a column, from 1."""

    def __init__(self, words: str = "", at: tuple[int, int] | None = None) -> None:
        super().__init__(words)
        self.at = at


class _CutOff(Exception):
    """The file ends before the value does."""


class _Over(Exception):
    """Nothing more of this value can be read, and its fault has been reported."""


_SPACE: Final = re.compile(r"[ \t\r\n]*")
_EVENT_LINE: Final = re.compile(r"\n(?=[{\[])")


class _Value:
    """One JSON value that does not end with its first line: an event, an array or a list page, however long."""

    def __init__(self, lines: Lines, first: bytes) -> None:
        self._lines = lines
        self._first = self._number = lines.number
        self._column = 1
        self._text = first.decode(CODE)
        self._at = 0
        self._from = 0
        """Offset in the text of the first character that was not yet yielded."""
        self._brackets = _OBJECT
        self._has_refused = self._is_over = False
        # True for JSON as printers lay it out over lines. Otherwise a value that does not end in its line is broken.
        self._is_laid_out = first.endswith(b"\n") and first.rstrip().endswith((b"{", b"[", b",", b":"))

    def items(self) -> Iterator[Item]:
        """Yield the items of the value, and leave the lines at the text after it."""
        try:
            try:
                yield from self._elements(_ARRAY) if self._next() == "[" else self._object()
            except _Broken as fault:
                yield from self._refuse_rest(fault, is_element=False)
        except _CutOff:
            yield from self._refuse_end()
        except _Over:
            pass
        self._lines.give_back(self._text[self._at :].encode(CODE), self._number_at(self._at))

    def _object(self) -> Iterator[Item]:
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
                yield from self._elements(_PAGE)
            elif key == "object":
                kind = self._value()
            elif self._value() is True and key == "has_more":
                has_more = True
            if self._at - self._from > LINE_BYTES_MAX:
                raise _Broken(_TOO_LONG)
        self._at += 1
        if is_page and has_more:
            self._lines.pages_with_more.append(number)
        if not is_page:
            yield Item(number, self._text[start : self._at].encode(CODE))

    def _elements(self, brackets: tuple[bytes, bytes]) -> Iterator[Item]:
        self._brackets = brackets
        self._at += 1
        while (mark := self._next()) != "]":
            if mark == ",":
                self._at += 1
                continue
            self._from = self._at
            try:
                value = self._value()
            except _Broken as fault:
                yield from self._refuse_rest(fault, is_element=True)
                continue
            if self._has_refused and isinstance(value, dict) and isinstance(value.get("data"), list):
                # The array was cut, and a list page follows it.
                self._at = self._from
                raise _Over
            yield Item(self._number_at(self._from), self._text[self._from : self._at].encode(CODE))
            self._forget()
        self._from = self._at
        self._at += 1

    # ---- What is refused ----

    def _refuse_end(self) -> Iterator[Item]:
        number = self._number_at(self._from) if self._has_refused else self._first
        text = self._text[self._from :].strip(" \t\r\n,")
        self._at = len(self._text)
        # Where the file breaks off, ``read`` reports that.
        if self._lines.damage is None and (text or not self._has_refused):
            yield Item(number, fault=_CUT_OFF, refused=(text.encode(CODE),))

    def _refuse_rest(self, fault: _Broken, *, is_element: bool) -> Iterator[Item]:
        """Refuse what is not yet yielded of the value, and go to the next element of the array.

        Raises:
            _Over: the value ends here.
        """
        number, column = self._place_of(self._from)
        is_line = not self._is_laid_out and number == self._first
        may_go_on = is_element and column == 1 and not is_line
        words = self._described(fault, number, is_line=is_line)
        if is_element and not may_go_on:
            words += SKIPPED
        self._lines.give_back(self._text[self._from :].encode(CODE), number)
        self._text, self._at, self._from, self._has_refused = "", 0, 0, True
        yield from _refuse(number, words, self._rest(is_line=is_line, may_go_on=may_go_on))
        self._number, self._column = self._lines.number + 1, 1
        if self._is_over:
            raise _Over

    def _rest(self, *, is_line: bool, may_go_on: bool) -> Iterator[bytes]:
        opening, closing = self._brackets
        if opening:
            yield opening if is_line else opening + b"\n"
        if is_line:
            yield from self._lines.rest_of_line(self._lines.take(CHUNK_BYTES))
        begins_event = not is_line and (yield from self._lines.rest_of_value(closing[-1:]))
        self._is_over = not (may_go_on and begins_event)
        if not self._is_over:
            yield closing + b"\n"

    def _described(self, fault: _Broken, number: int, *, is_line: bool) -> str:
        """Return *fault* with its place: in line *number*, which the entry names, the column is enough."""
        if fault.at is None:
            return str(fault)
        line, column = fault.at
        if line == number:
            return f"{fault} (column {column})"
        return LINE_ENDS if is_line else f"{fault} (line {line}, column {column})"

    # ---- One value ----

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
                raise self._cut_off()

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
            raise self._cut_off()
        value, end = found
        if end - self._at > LINE_BYTES_MAX:
            raise _Broken(_TOO_LONG)
        self._at = end
        return value

    def _decoded(self) -> tuple[object, int] | None:
        """Return the value here and where it ends, None where the text ends first."""
        try:
            return decode(self._text, self._at)
        except json.JSONDecodeError as error:
            if is_unfinished(self._text, error):
                return None
            raise self._broken(error.msg.removesuffix(" at"), error.pos) from None
        except RecursionError:
            raise _Broken("it is nested too deeply") from None

    def _broken(self, words: str, position: int) -> _Broken:
        """Return the fault *words* at *position* of the text."""
        mark = self._text[position : position + 1]
        # An object that begins where a line does is the next one of the log: the line before it was cut.
        is_next = mark == "{" and self._text[position - 1 : position] == "\n" and self._brackets is _OBJECT
        if is_next or (mark in ("\n", "\r") and not self._is_laid_out):
            return _Broken(LINE_ENDS)
        return _Broken(f"it is not JSON: {words}", self._place_of(position))

    def _cut_off(self) -> Exception:
        """Return the fault that the file ends first, after which another event may have begun."""
        return _Broken(_CUT_OFF) if _EVENT_LINE.search(self._text, self._from + 1) else _CutOff()

    # ---- The text ----

    def _grow(self) -> bool:
        wanted, more = max(CHUNK_BYTES, len(self._text) - self._at), []
        while wanted > 0 and (chunk := self._lines.take_more()):
            more.append(chunk)
            wanted -= len(chunk)
        self._text += b"".join(more).decode(CODE)
        return bool(more)

    def _forget(self) -> None:
        """Free the text that has been yielded, once it is long."""
        self._from = self._at
        if self._at > CHUNK_BYTES:
            self._number, self._column = self._place_of(self._at)
            self._text, self._at, self._from = self._text[self._at :], 0, 0

    def _place_of(self, position: int) -> tuple[int, int]:
        """Return the line and the column of *position*, both from 1."""
        begin = self._text.rfind("\n", 0, position) + 1
        column = characters(self._text[begin:position]) + (self._column if begin == 0 else 1)
        return self._number_at(position), column

    def _number_at(self, position: int) -> int:
        return self._number + self._text.count("\n", 0, position)
