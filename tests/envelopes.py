"""Stripe's Event around an object that a test wrote out by hand (docs.stripe.com/api/events/object)."""

import json
from collections.abc import Mapping
from typing import Any

NEWEST = "2026-10-28.endive"

Json = Mapping[str, Any]


def event(
    id_: str,
    type_: str,
    created: int,
    object_: Json,
    *,
    version: str | None = NEWEST,
    before: Json | None = None,
    account: str | None = None,
    livemode: bool = False,
) -> bytes:
    """Return the bytes of event *id_* as Stripe delivers it, its ``data.object`` rendered by API *version*.

    *before* is its ``previous_attributes``. An observation has no *version*.
    """
    data: dict[str, Any] = {"object": dict(object_)}
    if before is not None:
        data["previous_attributes"] = dict(before)
    envelope = {
        "id": id_,
        "object": "event",
        "api_version": version,
        "created": created,
        "data": data,
        "livemode": livemode,
        "pending_webhooks": 1,
        "request": {"id": None, "idempotency_key": None},
        "type": type_,
    }
    return json.dumps(envelope if account is None else {**envelope, "account": account}).encode()
