"""Decodes a JSON value at a place in a text, and describes why a text is none."""

import json
import re
from typing import Final

from schemas.errors import BodyNotJson, BodyNotText, Refused

# Latin-1 shows each byte as one character, so a text can be cut anywhere and be turned back into its bytes. Characters
# outside of ASCII can only stand inside of strings, and their values do not matter here.
CODE: Final = "latin-1"
LINE_ENDS: Final = "it is not JSON: the line ends before the JSON that begins in it does"
_TOO_DEEP: Final = "it is not JSON, and nested too deeply for the place to be found"
_NO_VALUE: Final = " is no value"
_LITERAL_CHARACTERS_MAX: Final = 5
_STRING_OR_CONSTANT: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|NaN|-?Infinity', re.DOTALL)
_STRING_OR_BRACKET: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class _Constant(Exception):
    """A constant that Python reads and JSON does not have: NaN, Infinity or -Infinity."""


def _refuse_constant(name: str) -> object:
    raise _Constant(name)


# Numbers are not converted, since a number may have more digits than Python converts.
_decoder: Final = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=_refuse_constant)


def decode(text: str, at: int) -> tuple[object, int]:
    """Return the JSON value that begins *at* a position, and where it ends.

    Raises:
        JSONDecodeError, RecursionError: there is none, or it is nested too deeply.
    """
    try:
        return _decoder.raw_decode(text, at)
    except _Constant as constant:
        found = (each.start() for each in _STRING_OR_CONSTANT.finditer(text, at) if each[0][0] != '"')
        raise json.JSONDecodeError(f"{constant}{_NO_VALUE}", text, next(found, at)) from None


def is_unfinished(text: str, error: json.JSONDecodeError) -> bool:
    """Return whether *text* is right as far as it goes, so that more of it may complete the value of *error*."""
    if error.msg.startswith("Unterminated string"):
        return True
    if error.msg.endswith(_NO_VALUE):
        return False
    rest = text[error.pos :].strip()
    return len(rest) < _LITERAL_CHARACTERS_MAX and not error.msg.startswith("Invalid control character")


def characters(text: str) -> int:
    """Return how many characters *text*, of which each stands for a byte, has as UTF-8."""
    return len(text.encode(CODE).decode(errors="replace"))


def fault_of_line(line: bytes) -> str:
    """Return why *line* is no JSON value, with the column."""
    text = line.decode(CODE)
    words, position = "Extra data", len(text) - len(text.lstrip())
    try:
        _, position = decode(text, position)
    except json.JSONDecodeError as error:
        words, position = error.msg, error.pos
    position += len(text[position:]) - len(text[position:].lstrip())
    if position == len(text):
        return "it is not an event"
    return f"it is not JSON: {words} (column {characters(text[:position]) + 1})"


def fault_of_item(item: bytes, refusal: Refused) -> str:
    """Return why *item*, which is refused by *refusal*, is no event."""
    if isinstance(refusal, BodyNotText):
        return "it is not UTF-8"
    if not isinstance(refusal, BodyNotJson):
        return str(refusal)
    text = item.decode(CODE)
    try:
        decode(text, 0)
    except RecursionError:
        return LINE_ENDS if _is_cut(text) else _TOO_DEEP
    except json.JSONDecodeError:
        pass
    return "it is not JSON"


def _is_cut(text: str) -> bool:
    """Return whether *text* opens more brackets than it closes."""
    brackets = [each[0] for each in _STRING_OR_BRACKET.finditer(text) if each[0][0] != '"']
    return sum(1 if each in "[{" else -1 for each in brackets) > 0
