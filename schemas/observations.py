"""Observations: facts that Payfold learns or decides without a delivery, put into the shape of an event.

Note [Every fact enters through the inbox]
    A decision of an operator, the answer to a poll, a deadline by our clock: each is recorded as an observation.
    So replaying the inbox gives the same tables, no matter who decided what and when.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from schemas import events, inbox, own_events, tables
from schemas.database import Cursor
from schemas.errors import BodyNotJson, NotAnObject, Refused
from schemas.inbox import Delivery

Object = dict[str, Any]
"""One of Stripe's objects, decoded from its JSON."""


@dataclass(frozen=True, slots=True)
class World:
    """An account and a mode: rows of two worlds never mix."""

    account: str
    livemode: bool

    def __str__(self) -> str:
        return f"{self.account or 'default'} {'live' if self.livemode else 'test'}"


@dataclass(frozen=True, slots=True)
class Answer:
    """An object from Stripe's answer, and a time (Unix seconds, Stripe's clock) at which it surely was in this state.

    That time is the answer's ``Date`` less the duration of the call, so that it is before any change that happened
    while the call was on its way. For an object that our decoder refuses, *odd* has its very bytes, and *body* only
    those of its plain values that can be read.
    """

    body: Object
    at: int
    odd: bytes = b""

    @property
    def id(self) -> str | None:
        """The object's id, None where it has none that can be read."""
        found = self.body.get("id")
        return found if isinstance(found, str) and found else None


def answer_of(text: bytes, at: int) -> Answer:
    """Return the answer in *text*, the JSON of an object, at the time *at*.

    Raises:
        NotAnObject: *text* is no object at all.
    """
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _odd_answer(text, at)
    if not isinstance(found, dict):
        raise NotAnObject
    return Answer(found, at)


def _odd_answer(text: bytes, at: int) -> Answer:
    if text.lstrip()[:1] != b"{":
        raise NotAnObject
    try:
        return Answer(events.plain_values(text), at, odd=text)
    except BodyNotJson:
        raise NotAnObject from None


def observe(
    kind: str, about: Mapping[str, Any], *, account: str, livemode: bool, created: int, now: datetime
) -> Delivery:
    """Return the observation of the type *kind* that the object *about*, with its object and id, was so.

    *created* is in Unix seconds: a time at which it was surely known. The id follows from the content, so the
    same observation is the same event.
    """
    content = msgspec.json.encode(about, order="sorted")
    written = msgspec.Raw(msgspec.json.encode(about))
    return _observation(kind, about.get("id"), content, written, World(account, livemode), created, now)


def _observation(
    kind: str, object_id: object, content: bytes, written: msgspec.Raw, world: World, created: int, now: datetime
) -> Delivery:
    """Return the observation that an object was as it is *written*; its id follows from its *content*."""
    account, livemode = world.account, world.livemode
    identity = msgspec.json.encode([account, livemode, object_id, kind, created, content.decode()])
    event = {
        "id": events.OBSERVED + hashlib.sha256(identity).hexdigest()[:40],
        "object": "event",
        "type": kind,
        "created": created,
        "livemode": livemode,
        "data": {"object": written},
    }
    body = msgspec.json.encode(event)
    return Delivery(
        envelope=events.read(body),
        account=account,
        sha256=hashlib.sha256(body).digest(),
        signature=None,
        source="observation",
        received_at=now.astimezone(UTC),
    )


def of_answer(kind: str, answer: Answer, world: World, *, now: datetime) -> Delivery:
    """Return the observation of the type *kind* that Stripe answered so; an odd object is kept as Stripe wrote it.

    Raises:
        NotAnObject: it has no type or no id by which it could be known again.
    """
    try:
        if answer.odd:
            content = answer.odd
            found = _observation(kind, answer.id, content, msgspec.Raw(content), world, answer.at, now)
        else:
            found = observe(
                kind, answer.body, account=world.account, livemode=world.livemode, created=answer.at, now=now
            )
    except (Refused, UnicodeError):
        raise NotAnObject from None
    if found.envelope.object_type is None or found.envelope.object_id is None:
        raise NotAnObject
    return found


def kind_of(answer: Answer) -> str:
    """Return the type of the observation that an object was as Stripe *answered*."""
    return own_events.observed(str(answer.body.get("object")))


# The newest rendering is that of the latest second, and within one second the last received.
_LAST_RENDERINGS: Final = f"""
SELECT k.number, last.seq
FROM unnest(%s::int[], %s::text[], %s::boolean[], %s::text[], %s::text[])
    AS k (number, account, livemode, object_type, object_id)
CROSS JOIN LATERAL (
    SELECT i.seq FROM inbox AS i
    WHERE {tables.of_object("i", "k.account", "k.livemode", "k.object_id")}
        AND i.object_type = k.object_type
    ORDER BY i.created DESC, i.seq DESC LIMIT 1
) AS last
"""


def news(cursor: Cursor, deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Return those of *deliveries* in which the object differs from its last rendering in the inbox.

    So an object that is polled every minute, and does not change, is recorded once. A key that the last rendering
    does not have (line items, which no webhook carries) is news; a key that only the last rendering has is not.
    """
    envelopes = [delivery.envelope for delivery in deliveries]
    cursor.execute(
        _LAST_RENDERINGS,
        (
            list(range(len(deliveries))),
            [delivery.account for delivery in deliveries],
            [envelope.livemode for envelope in envelopes],
            [envelope.object_type for envelope in envelopes],
            [envelope.object_id for envelope in envelopes],
        ),
    )
    last: dict[int, int] = dict(cursor.fetchall())
    payloads = inbox.payloads_of(cursor, list(last.values()))
    # An archived rendering cannot be compared, so the delivery counts as news.
    known = {number: _object(payloads[seq]) for number, seq in last.items() if seq in payloads}
    return [
        delivery
        for number, delivery in enumerate(deliveries)
        if number not in known or not _holds_all(known[number], _object(delivery.envelope.payload))
    ]


def _holds_all(known: Mapping[str, Any] | bytes, new: Mapping[str, Any] | bytes) -> bool:
    if isinstance(known, bytes) or isinstance(new, bytes):
        return known == new
    return all(key in known and known[key] == value for key, value in new.items())


def _object(payload: bytes) -> Mapping[str, Any] | bytes:
    """Return the object that an event carries, as its bytes where our decoder refuses it."""
    try:
        found = msgspec.json.decode(payload)["data"]["object"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        span = events.span_of(payload, "data.object")
        return b"" if span is None else payload[slice(*span)]
    except (KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
