"""Cuts a JSON text that holds several items into those items, each as the bytes that it was written in.

Note [An odd item costs no other]
    Stripe answers with pages of a hundred objects. Decoded whole, one of them that a decoder refuses (half of a
    surrogate pair, a number without end, ten thousand levels of nesting) would take the other ninety-nine with it,
    now and each time that the page is asked for. So a page is cut where its items begin and end, and each of them is
    then read for itself.
"""

from dataclasses import dataclass

import msgspec
from msgspec import Raw, Struct

from schemas import events
from schemas.errors import BodyNotJson


@dataclass(frozen=True, slots=True)
class Page:
    """The *items* of a list, and whether the list *has_more* of them after this page."""

    items: list[bytes]
    has_more: bool = False


class _Page(Struct):
    name: object = msgspec.field(name="object", default=None)
    data: Raw = Raw(b"null")
    has_more: bool = False


UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a decoder raises: for bytes that are not UTF-8 it raises Python's own error."""

_decode_page = msgspec.json.Decoder(_Page).decode
_decode_items = msgspec.json.Decoder(list[Raw]).decode


def cut(text: bytes) -> Page | None:
    """Return the elements of an array, or the ``data`` of one of Stripe's list pages; None where *text* is neither."""
    try:
        if text.lstrip()[:1] == b"[":
            return Page([bytes(each) for each in _decode_items(text)])
        page = _decode_page(text)
        data = bytes(page.data)
        if page.name not in (None, "list") or data[:1] != b"[":
            return None
        return Page([bytes(each) for each in _decode_items(data)], page.has_more)
    except UNREADABLE:
        return _cut_slowly(text)


def is_one_item(text: bytes) -> bool:
    """Return whether *text* is JSON of one object, and that is no list page. False where only ``cut`` can find out."""
    try:
        page = _decode_page(text)
    except UNREADABLE:
        return False
    return page.name not in (None, "list")


def _cut_slowly(text: bytes) -> Page | None:
    """Cut a text that the decoder refuses: by its brackets, and without recursion."""
    try:
        start, is_page = (text.index(b"["), False) if text.lstrip()[:1] == b"[" else (_start_of_data(text), True)
        if start is None:
            return None
        items = [text[begins:ends] for begins, ends in _elements(text, start)]
    except BodyNotJson:
        return None
    return Page(items, is_page and events.value_at(text, "has_more") is True)


def _start_of_data(text: bytes) -> int | None:
    """Return where the array of a list page begins."""
    if events.value_at(text, "object") not in (None, "list"):
        return None
    span = events.span_of(text, "data")
    return span[0] if span is not None and text[span[0] : span[0] + 1] == b"[" else None


def _elements(text: bytes, start: int) -> list[tuple[int, int]]:
    """Return where each element of the array at *start* begins and ends."""
    found: list[tuple[int, int]] = []
    depth, begins = 0, 0
    for mark, at, end in events.tokens(text, start):
        if mark in (b"{", b"["):
            depth += 1
            begins = at if depth == 2 else begins  # noqa: PLR2004 - an element of the array itself
        elif mark in (b"}", b"]"):
            depth -= 1
            if depth == 0:
                return found
            if depth == 1:
                found.append((begins, end))
        elif depth == 1 and mark != b",":
            found.append((at, end))
    raise BodyNotJson
