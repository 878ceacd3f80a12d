"""The rule of the credentials, read plainly: parse the whole event, walk it, and blank."""

import json
import re
from collections.abc import Iterator

Span = tuple[str, int, int]
"""A path of keys, and where its value begins and ends."""

KEYS = {
    "billing_portal.session": {"url"},
    "checkout.session": {"client_secret", "url"},
    "credit_note": {"pdf"},
    "invoice": {"hosted_invoice_url", "invoice_pdf"},
}
PLACES = ("data.object", "data.previous_attributes")
UNMISTAKABLE_BYTES = 16
"""So long is a text with its quotes that is blanked wherever it stands."""

_decode = json.JSONDecoder(strict=False).raw_decode


def blanked(body: bytes) -> tuple[bytes, set[str]]:
    """Return the event in *body* without its credentials, and their paths; of keys given twice each one counts."""
    text = body.decode()
    spans = list(_walk(text, _skip(text, 0)))
    kinds = {str(_decode(text, start)[0]) for path, start, _ in spans if path == "data.object.object"}
    wanted = {f"{place}.{key}" for place in PLACES for kind in kinds for key in KEYS.get(kind, ())}
    found = [span for span in spans if span[0] in wanted and text[span[1] : span[2]] not in ("null", '""')]
    blank = text
    for _, start, end in sorted(found, key=lambda span: span[1], reverse=True):
        blank = blank[:start] + '""' + blank[end:]
    for _, start, end in found:
        if text[start] == '"' and len(text[start:end].encode()) >= UNMISTAKABLE_BYTES:
            blank = blank.replace(text[start:end], '""')
    return blank.encode(), {path for path, _, _ in found}


def _walk(text: str, start: int, prefix: str = "") -> Iterator[Span]:
    """Yield each value below the object that begins at *start*; keys are joined by dots, also those with dots."""
    if text[start] != "{":
        return
    at = _skip(text, start + 1)
    while text[at] != "}":
        key, at = _decode(text, at)
        begins = _skip(text, _skip(text, at) + 1)
        _, ends = _decode(text, begins)
        yield (f"{prefix}{key}", begins, ends)
        yield from _walk(text, begins, f"{prefix}{key}.")
        at = _skip(text, ends)
        at = _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    space = re.compile(r"\s*").match(text, at)
    return space.end() if space else at
