"""Events in Stripe's envelope around objects that a test writes out by hand.

The keys of the envelope are those of https://docs.stripe.com/api/events/object.
"""

import json
from collections.abc import Mapping
from typing import Any

NEWEST = "2026-10-28.endive"


def event(
    event_id: str,
    kind: str,
    created: int,
    about: Mapping[str, Any],
    *,
    before: Mapping[str, Any] | None = None,
    version: str | None = NEWEST,
) -> bytes:
    """Return the event of the type *kind* that the object *about* was so at *created*, in Unix seconds.

    *before* is what the event lists as ``previous_attributes``. An observation has no *version*.
    """
    data = {"object": about} if before is None else {"object": about, "previous_attributes": before}
    envelope = {
        "id": event_id,
        "object": "event",
        "api_version": version,
        "created": created,
        "data": data,
        "livemode": False,
        "pending_webhooks": 1,
        "request": {"id": None, "idempotency_key": None},
        "type": kind,
    }
    return json.dumps(envelope).encode()
