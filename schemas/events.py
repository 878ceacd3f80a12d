"""An event as it is delivered: reading its envelope, and blanking the credentials it carries.

Note [A readable event is recorded]
    Stripe signs what it sends, so a delivery that verifies is genuine. If it is turned away, it comes back for
    three days and is then lost. So an event is refused only when it has no id, type or created to keep it by.
    Any other oddity (a field of another type, a number without end, ten thousand levels of nesting) is left for
    the fold to judge: the bytes are kept, and parked if no fold can read them.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

import msgspec
from msgspec import Struct

from schemas.errors import BodyEmpty, BodyNotJson, BodyNotText, NotAnEvent

THIN_EVENT = "v2.core.event"
TEXT_CHARACTERS_MAX = 255
"""Stripe's ids are up to 255 characters long; no key of ours is longer."""
OBSERVED = "obs_"
"""How the id of an observation begins; no event of Stripe's does."""
Key: TypeAlias = tuple[str, bool, str]
"""An account, a mode, and the id of an event or of an object there."""

CREATED_MAX = 253_402_300_799
"""The last second of the year 9999, in Unix time."""

CREDENTIALS: dict[str, tuple[str, ...]] = {
    "billing_portal.session": ("url",),
    "checkout.session": ("client_secret", "url"),
    "credit_note": ("pdf",),
    "invoice": ("hosted_invoice_url", "invoice_pdf"),
}
"""By object type, the keys of its credentials. Their values never reach a table, a log or an answer."""

BLANK = b'""'
_PLACES = ("data.object", "data.previous_attributes")
# A shorter value could stand elsewhere in the payload by accident, so only its place is blanked.
_UNMISTAKABLE_BYTES = 16


class Envelope(Struct, frozen=True):
    """The fields by which the inbox keys and lists an event.

    ``account`` is the event's own, else the last that its ``context`` names, as of an organization's destination; None
    where the event names none. ``created`` is in Unix seconds; ``object_type`` and ``object_id`` are None where the
    payload does not name them. ``payload`` is the body with credentials blanked, at their places and everywhere else
    that the same text stands, and ``redacted`` names the places, as ``data.object.url``.
    """

    id: str
    type: str
    created: int
    livemode: bool
    account: str | None
    api_version: str | None
    object_type: str | None
    object_id: str | None
    payload: bytes
    redacted: tuple[str, ...]


class _Met(str):
    """A text that the decoder has met. It counts them, so that none is missed of several under one key."""

    __slots__ = ()


class _Kind(_Met):
    """An object's type, or a text under a key that the slow way takes for a path, such as ``data.object``."""

    __slots__ = ()


class _Secret(_Met):
    """A text under the key of a credential, of whatever object."""

    __slots__ = ()


class _Credentials(Struct):
    client_secret: _Secret | None = None
    hosted_invoice_url: _Secret | None = None
    invoice_pdf: _Secret | None = None
    pdf: _Secret | None = None
    url: _Secret | None = None


class _Object(_Credentials):
    object: _Kind | None = None
    id: str | None = None


class _Data(Struct):
    object: _Object
    previous_attributes: _Credentials | None = None


class _Event(Struct):
    """An event as Stripe has always shaped it: the quick way in."""

    id: str
    type: str
    created: int
    data: _Data
    livemode: bool = False
    account: str | None = None
    api_version: str | None = None
    context: str | None = None


def _wary(of: type[Struct], paths: Iterable[str], **instead: type[Struct]) -> Any:  # noqa: ANN401 - a made type
    """Return the shape *of* with a field under each of *paths*, so that the decoder meets a key with dots in it."""
    fields = [
        (f"at_{number}", _Kind | None, msgspec.field(default=None, name=path)) for number, path in enumerate(paths)
    ]
    return msgspec.defstruct(of.__name__, [*instead.items(), *fields], bases=(of,), kw_only=True)


def _paths(place: str) -> list[str]:
    members = [*_Object.__struct_fields__] if place.endswith("object") else [*_Credentials.__struct_fields__]
    return [f"{place}.{member}" for member in members if member != "id"]


_WARY_DATA: Final = _wary(_Data, (path for name in _Data.__struct_fields__ for path in _paths(name)))
_WARY_EVENT: Final = _wary(_Event, (*_PLACES, *(path for name in _PLACES for path in _paths(name))), data=_WARY_DATA)


class _Decoder(threading.local):
    """The decoder of one thread, and the types of the texts that it met in the last body."""

    def __init__(self) -> None:
        self.met: list[type[_Met]] = []
        self._decode: Callable[[bytes], _Event] = msgspec.json.Decoder(_WARY_EVENT, dec_hook=self._meet).decode

    def decode(self, body: bytes) -> _Event:
        """Return the event in *body*; raises as msgspec does, also where something else than a text is met."""
        self.met.clear()
        return self._decode(body)

    def _meet(self, kind: type[_Met], value: object) -> _Met:
        if type(value) is not str:
            raise TypeError
        self.met.append(kind)
        return kind(value)


_decoder: Final = _Decoder()


def read(body: bytes) -> Envelope:
    """Return the envelope of the event in *body*, which is UTF-8 JSON.

    Raises:
        BodyEmpty, BodyNotText, BodyNotJson, NotAnEvent: when there is nothing to keep the event by.
    """
    if not body:
        raise BodyEmpty
    _require_text(body)
    try:
        event = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return _read_odd(body)
    account = event.account or _account_in(event.context)
    about = event.data.object
    if not _are_short_texts(event.id, event.type, account, event.api_version, about.object, about.id):
        return _read_odd(body)
    payload, redacted = _blank(body, event.data)
    return Envelope(
        id=event.id,
        type=event.type,
        created=_require_created(event.created),
        livemode=event.livemode,
        account=account,
        api_version=event.api_version,
        object_type=None if about.object is None else str(about.object),
        object_id=about.id,
        payload=payload,
        redacted=redacted,
    )


def _require_text(body: bytes) -> None:
    if body.isascii():
        return
    try:
        body.decode()
    except UnicodeDecodeError:
        raise BodyNotText from None


def _are_short_texts(*values: str | None) -> bool:
    # In a loop of its own: a generator costs as much again.
    for value in values:
        if value is not None and not (0 < len(value) <= TEXT_CHARACTERS_MAX and value.isprintable()):
            return False
    return True


def _require_created(created: object) -> int:
    if isinstance(created, float) and created.is_integer():
        created = int(created)  # as other languages write whole numbers
    if isinstance(created, int) and not isinstance(created, bool) and 0 <= created <= CREATED_MAX:
        return created
    raise NotAnEvent("The event's created is not a time in Unix seconds.")


def _blank(body: bytes, data: _Data) -> tuple[bytes, tuple[str, ...]]:
    """Return *body* without the credentials of its object, and their paths; *data* is what was just decoded.

    The decoder counts each kind and each text under a credential's key, through escapes and under keys given twice.
    What it counted and did not return was under such a key, and is left to the slow way.
    """
    met, kind = _decoder.met, data.object.object
    if met.count(_Kind) != (kind is not None):
        return _Parts(body).blanked()
    keys = CREDENTIALS.get(kind or "")
    if not keys or len(met) == 1:
        return body, ()
    found = _texts(data, keys)
    if len(found) != met.count(_Secret):
        return _Parts(body).blanked()
    payload = body
    for text in found.values():
        value = b'"%b"' % text.encode()
        if text and not _is_unmistakable(value):
            return _Parts(body).blanked()
        payload = payload.replace(value, BLANK)
    if b"\\" in body and not _is_blank(payload, keys):
        return _Parts(body).blanked()  # a text written with escapes stands in the body in another form
    return payload, tuple(sorted(path for path, text in found.items() if text))


def _texts(data: _Data, keys: tuple[str, ...]) -> dict[str, _Secret]:
    """Return the texts under *keys* by their paths."""
    texts = {}
    for place, holder in zip(_PLACES, (data.object, data.previous_attributes), strict=True):
        for key in keys:
            text = getattr(holder, key, None)
            if text is not None:
                texts[f"{place}.{key}"] = text
    return texts


def _is_blank(payload: bytes, keys: tuple[str, ...]) -> bool:
    try:
        return not any(_texts(_decoder.decode(payload).data, keys).values())
    except msgspec.DecodeError:
        return False


def _is_unmistakable(value: bytes) -> bool:
    return len(value) >= _UNMISTAKABLE_BYTES and value[:1] == b'"'


_NOTHING = (b"", b"null", BLANK)

# What follows reads the events that the quick way cannot: slowly, part by part, and without recursion.


def _read_odd(body: bytes) -> Envelope:
    _require_json(body)
    try:
        return _envelope_of(body)
    except NotAnEvent as refusal:
        raise NotAnEvent(" ".join([str(refusal), *_advice(body)])) from None


OBJECT_ALONE = "It is an object without its event, as the Dashboard's event data shows it: pass on the whole event."


def _advice(body: bytes) -> Iterator[str]:
    """Yield advice on what to send instead of *body*, where that can be found out."""
    try:
        found = json.loads(body, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        return
    places = _events_within(found)
    if len(places) == 1:
        yield f"An event stands in it at {places[0]}: pass on that alone."
    elif places:
        yield f"{len(places)} events stand in it, the first at {places[0]}: pass on each of them alone."
    elif isinstance(found, dict) and isinstance(found.get("object"), str) and found["object"] not in _WHOLE:
        yield OBJECT_ALONE


_WHOLE = ("event", "list", THIN_EVENT)
_WRAPPINGS_MAX = 8


def _events_within(value: object) -> list[str]:
    """Return the dotted paths of the events that tools have wrapped into *value*, perhaps as text."""
    layer = [("", value)]
    for _ in range(_WRAPPINGS_MAX):
        layer = [inner for path, outer in layer for inner in _within(path, outer)]
        found = [path for path, each in layer if _is_event(each)]
        if found:
            return found
    return []


def _within(path: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [(f"{path}.{_shown(key)}".lstrip("."), each) for key, each in value.items()]
    if isinstance(value, list):
        return [(f"{path}[{number}]", each) for number, each in enumerate(value)]
    if isinstance(value, str) and value.lstrip().startswith(("{", "[", '"')):
        try:
            return [(f"{path} (JSON as text)".lstrip(), json.loads(value, parse_int=len, parse_float=len))]
        except (ValueError, RecursionError):
            return []
    return []


_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")


def _shown(key: str) -> str:
    """Return *key* as a message may show it: an unknown key may be anything, even the address of a person."""
    return key if _PLAIN_NAME.fullmatch(key) else "?"


def _is_event(value: object) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("id", "type")):
        return False
    return value.get("object") in ("event", THIN_EVENT) or (isinstance(value.get("data"), dict) and "created" in value)


def _envelope_of(body: bytes) -> Envelope:
    parts = _Parts(body)
    thin = parts.value("object") == THIN_EVENT
    kind, place = ("related_object.type", "related_object.id") if thin else ("data.object.object", "data.object.id")
    object_type = parts.text(kind)
    created = parts.value("created")
    payload, redacted = parts.blanked()
    return Envelope(
        id=_require_name("id", parts.text("id")),
        type=_require_name("type", parts.text("type")),
        created=_require_created(_from_iso(created) if thin else created),
        livemode=parts.value("livemode") is True,
        account=parts.text("account") or _account_in(parts.text("context")),
        api_version=parts.text("api_version"),
        object_type=object_type,
        object_id=parts.text(place),
        payload=payload,
        redacted=redacted,
    )


def _account_in(context: str | None) -> str | None:
    """Return the account of an event by its routing *context*: the last account in it."""
    named = [part for part in (context or "").split("/") if part.startswith("acct_")]
    return named[-1] if named else None


def twin_of(payload: bytes) -> str | None:
    """Return the id of the snapshot event that the thin event in *payload* names; None where it names none."""
    return _Parts(payload).text("snapshot_event")


def value_at(text: bytes, path: str) -> object:
    """Return the value at the dotted *path* of any JSON text, None where there is none, or it is a container.

    Raises:
        BodyNotJson: when the brackets do not match.
    """
    return _Parts(text).value(path)


def span_of(text: bytes, path: str) -> tuple[int, int] | None:
    """Return where the last value at the dotted *path* of any JSON text begins and ends; raises as ``value_at``."""
    return _Parts(text).span(path)


def plain_values(text: bytes) -> dict[str, object]:
    """Return the scalars of the JSON object in *text* by their keys, however odd the rest; raises as ``value_at``."""
    return _Parts(text).plain()


def _require_json(body: bytes) -> None:
    # The standard library takes what the quick decoder does not, and JSON allows: half of a surrogate pair.
    # A number is not read, since it may have more digits than Python converts.
    try:
        json.loads(body.decode(), parse_int=len, parse_float=len, parse_constant=_refuse_constant)
    except RecursionError:
        pass  # Too deep to be decoded; the parts still have to balance.
    except ValueError:
        raise BodyNotJson from None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _require_name(key: str, value: str | None) -> str:
    if value is None:
        raise NotAnEvent(f"The event has no {key} that is a text of 1 to {TEXT_CHARACTERS_MAX} characters.")
    return value


def _from_iso(created: object) -> int | None:
    """Return Unix seconds from the time of a thin event: ISO 8601, in UTC and to the millisecond."""
    try:
        moment = datetime.fromisoformat(str(created)).replace(microsecond=0)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        return None


_TOKEN = re.compile(rb'\s*("(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+)\s*', re.DOTALL)
_PARTNER = {b"}": b"{", b"]": b"["}
_DEPTH_OF_INTEREST = 3


class _Parts:
    """Where the values of a JSON text stand, by dotted path, down to three keys."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._spans = list(_spans(body))

    def value(self, path: str) -> object:
        """Return the last value at *path*, None where there is none or it is a container or unreadable."""
        for span in reversed(self._spans):
            if span[0] == path and self._body[span[1] : span[1] + 1] not in (b"{", b"["):
                return self._scalar(span)
        return None

    def text(self, path: str) -> str | None:
        """Return the text at *path*, None where it is no text that a key can be made of."""
        value = self.value(path)
        usable = isinstance(value, str) and 0 < len(value) <= TEXT_CHARACTERS_MAX and _is_storable(value)
        return value if usable and isinstance(value, str) else None

    def span(self, path: str) -> tuple[int, int] | None:
        """Return where the last value at *path* begins and ends."""
        return next(((start, end) for name, start, end in reversed(self._spans) if name == path), None)

    def plain(self) -> dict[str, object]:
        """Return the scalars under one key that can be read, by that key."""
        found = ((name, self._scalar((name, start, end))) for name, start, end in self._spans if "." not in name)
        return {name: value for name, value in found if value is not None}

    def blanked(self) -> tuple[bytes, tuple[str, ...]]:
        """Return the text with its object's credentials blanked, and the paths of those.

        Where a key is there twice, all its values count: as an object's type, and as a credential.
        """
        kinds = {self._scalar(span) for span in self._spans if span[0] == "data.object.object"}
        wanted = {f"{place}.{key}" for kind in kinds for key in CREDENTIALS.get(str(kind), ()) for place in _PLACES}
        found = [span for span in self._spans if span[0] in wanted and self._body[span[1] : span[2]] not in _NOTHING]
        payload = self._body
        for _, start, end in sorted(found, key=lambda span: span[1], reverse=True):
            payload = payload[:start] + BLANK + payload[end:]
        for value in {self._body[start:end] for _, start, end in found}:
            if _is_unmistakable(value):
                payload = payload.replace(value, BLANK)
        return payload, tuple(sorted({path for path, _, _ in found}))

    def _scalar(self, span: tuple[str, int, int]) -> object:
        _, start, end = span
        return None if self._body[start : start + 1] in (b"{", b"[") else _scalar(self._body[start:end])


def tokens(text: bytes, position: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Yield each bracket, mark, text and other scalar of a JSON text from *position* on, and where it stands.

    Raises:
        BodyNotJson: when a text does not end.
    """
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise BodyNotJson
        yield token[1], *token.span(1)
        position = token.end()


def _spans(body: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield (path, start, end) of every value that stands under one to three keys.

    Raises:
        BodyNotJson: when the brackets do not match or a text does not end.
    """
    opened: list[tuple[bytes, int]] = []
    keys: list[str] = []
    waiting, previous = False, (0, 0)
    for mark, start, end in tokens(body):
        if mark in (b"{", b"["):
            opened.append((mark, start))
            keys.append("")
            waiting = False
        elif mark in _PARTNER:
            if not opened or opened[-1][0] != _PARTNER[mark]:
                raise BodyNotJson
            keys.pop()
            yield from _span(keys, opened.pop()[1], end)
        elif mark == b":":
            if keys:
                keys[-1] = str(_scalar(body[slice(*previous)]))
            waiting = True
        elif mark == b",":
            waiting = False
        elif waiting:
            yield from _span(keys, start, end)
            waiting = False
        previous = (start, end)
    if opened:
        raise BodyNotJson


def _span(keys: list[str], start: int, end: int) -> Iterator[tuple[str, int, int]]:
    if 0 < len(keys) <= _DEPTH_OF_INTEREST:
        yield ".".join(keys), start, end


def _scalar(text: bytes) -> object:
    # The standard library's decoder takes lone surrogates, which a text may hold and a key may not.
    try:
        return json.loads(text)
    except ValueError:
        return None


def _is_storable(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
