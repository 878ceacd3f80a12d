"""The hash of an event's content, however its JSON is written. Two copies of one event are compared by it."""

import hashlib
import json
from typing import Any, Final

import msgspec

from schemas import events

_CARRIED: Final = ("type", "created", "api_version", "related_object")
_DEPTH_MAX: Final = 200
"""Levels of nesting that are compared. A deeper object is compared by its bytes, so that a hash never depends on how
much of the stack is left. No object of Stripe's has 20."""


def hash_of(payload: bytes) -> bytes:
    """Return the SHA-256 of the content of the event in *payload*.

    The content is the event's type, created and API version, its object and previous attributes. These make no
    difference: a credential, spacing, the order of keys, keys that change from one delivery to the next
    (``pending_webhooks``, ``request``), and other languages' ways to write the same JSON: ``[]`` for ``{}`` (PHP has
    one type for both), and 1500.0 for 1500. A payload that is no JSON, or is nested too deeply, is compared by its
    bytes: there is always a hash.
    """
    event = _decoded(payload)
    content = None if event is None else _encoded(_content(event))
    return _hash_of_bytes(payload) if content is None else hashlib.sha256(content).digest()


def _hash_of_bytes(payload: bytes) -> bytes:
    return hashlib.sha256(b"bytes " + payload).digest()


class Hashes:
    """The hashes of copies of one event, of which those that differ by spacing alone are hashed once."""

    def __init__(self) -> None:
        self._known: dict[bytes, bytes] = {}

    def of(self, payload: bytes) -> bytes:
        """Return ``hash_of`` *payload*."""
        written = _unspaced(payload)
        found = self._known.get(written) or hash_of(payload)
        # A payload that is compared by its bytes differs from one with other spacing.
        if found != _hash_of_bytes(payload):
            self._known[written] = found
        return found


def _unspaced(payload: bytes) -> bytes:
    try:
        return msgspec.json.format(payload, indent=-1)
    except (msgspec.DecodeError, RecursionError):
        return payload


def _decoded(payload: bytes) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = _decoded_slowly(payload)
    return found if isinstance(found, dict) else None


def _decoded_slowly(payload: bytes) -> object:
    # The standard library takes half of a surrogate pair, which JSON allows and the quick decoder does not.
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        return None


def _content(event: dict[str, Any]) -> dict[str, Any]:
    carried = {key: event.get(key) for key in _CARRIED}
    data = event.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("object"), dict):
        return {**carried, "data": data}
    kind = data["object"].get("object")
    secret = events.CREDENTIALS.get(kind, ()) if isinstance(kind, str) else ()
    return {
        **carried,
        "object": _without(data["object"], secret),
        "previous_attributes": _without(data.get("previous_attributes"), secret) or None,
    }


def _without(holder: object, keys: tuple[str, ...]) -> object:
    return {key: value for key, value in holder.items() if key not in keys} if isinstance(holder, dict) else holder


def _encoded(content: dict[str, Any]) -> bytes | None:
    """Return *content* as it is hashed; None where it is nested too deeply, or a number is too long to be written."""
    try:
        return json.dumps(_plain(content, _DEPTH_MAX), sort_keys=True, separators=(",", ":")).encode()
    except (RecursionError, ValueError):
        return None


_PLAIN: Final = frozenset((bool, int, str, type(None)))


def _plain(value: Any, levels: int) -> Any:  # noqa: ANN401 - any JSON
    """Return *value*, nested no deeper than *levels*, with one spelling for values that have several."""
    if isinstance(value, (dict, list)) and not levels:
        raise RecursionError
    # Most values of an object are plain, and get no call of their own, since a replay compares every event it finds.
    if isinstance(value, dict):
        return {key: each if type(each) in _PLAIN else _plain(each, levels - 1) for key, each in value.items()}
    if isinstance(value, list):
        return [each if type(each) in _PLAIN else _plain(each, levels - 1) for each in value] or {}
    return whole(value)


def whole(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Return *value*, as an integer where it is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
