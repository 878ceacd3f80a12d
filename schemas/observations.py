"""What Payfold learns or decides by other ways than a delivery, put into the shape of an event.

Note [Whatever is known came through the inbox]
    An operator's word, a poll's answer, our clock: each is recorded as an observation, so that replaying the
    inbox gives the same tables, whoever decided what and when.
"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from schemas import events
from schemas.inbox import Delivery

ID_PREFIX: Final = "obs_"


def observe(
    kind: str, about: Mapping[str, Any], *, account: str, livemode: bool, created: int, now: datetime
) -> Delivery:
    """Return the observation of the type *kind* that the object *about*, with its object and id, was so.

    *created* is in Unix seconds: a time at which it was surely known. The id follows from the content, so the
    same observation is the same event.
    """
    content = msgspec.json.encode(about, order="sorted")
    identity = msgspec.json.encode([account, livemode, about.get("id"), kind, created, content.decode()])
    event = {
        "id": ID_PREFIX + hashlib.sha256(identity).hexdigest()[:40],
        "object": "event",
        "type": kind,
        "created": created,
        "livemode": livemode,
        "data": {"object": about},
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
