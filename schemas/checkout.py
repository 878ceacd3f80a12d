"""Reads a Checkout Session at Stripe in whole, and expires it: for the web process and for the worker.

Note [Decide by reading]
    An expire call that is declined, or that loses its answer, does not show the session's state: the buyer may
    have finished it in the same moment. So the session is read, and the state that was read is recorded. A paid
    order is never expired, no matter what the messages claim. Source:
    https://docs.stripe.com/api/checkout/sessions/expire.
"""

import uuid
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from schemas import observations
from schemas.budget import Lane
from schemas.errors import CallDeclined, MissingAtStripe
from schemas.inbox import Delivery
from schemas.observations import Answer, Object, World
from schemas.own_events import SESSION_MISSING, SESSION_OBSERVED
from schemas.stripe_api import StripeApi


class Ending(Enum):
    """What became of a session that was to be expired."""

    EXPIRED = "expired"
    OVER = "already over"
    MISSING = "missing"
    STILL_OPEN = "still open"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a session, the session as Stripe has it now, and the observations of it to be recorded."""

    ending: Ending
    session: Object | None
    deliveries: tuple[Delivery, ...]


def expire(api: StripeApi, world: World, session_id: str, *, read_first: bool, now: datetime) -> Outcome:
    """Expire one session at Stripe, and return what became of it.

    With *read_first* it is only expired if it is still open: an earlier attempt may have done it.

    Raises:
        KeyRefused, NotServed, Transient: as from ``StripeApi.call``; nothing is learnt.
    """
    try:
        if read_first:
            known = read(api, world, session_id, lane=Lane.EXPIRY)
            if known.body.get("status") != "open":
                return _over(known, world, now)
        return _expire_open(api, world, session_id, now)
    except MissingAtStripe:
        return Outcome(Ending.MISSING, None, (missing(world, session_id, now=now),))


def _expire_open(api: StripeApi, world: World, session_id: str, now: datetime) -> Outcome:
    # One key for this attempt: the SDK's tries share it, and a new attempt must not get the old answer again.
    key = f"payfold-expire-{uuid.uuid4()}"
    path = ("checkout", "sessions", session_id, "expire")
    try:
        answer = api.call(
            world, "post", *path, lane=Lane.EXPIRY, idempotency_key=key, expand=["line_items"]
        )  # fmt: skip
    except CallDeclined:
        known = read(api, world, session_id, lane=Lane.EXPIRY)
        return _over(known, world, now)
    return Outcome(Ending.EXPIRED, answer.body, (observed(answer, world, now=now),))


def _over(known: Answer, world: World, now: datetime) -> Outcome:
    ending = Ending.STILL_OPEN if known.body.get("status") == "open" else Ending.OVER
    return Outcome(ending, known.body, (observed(known, world, now=now),))


def read(api: StripeApi, world: World, session_id: str, *, lane: Lane) -> Answer:
    """Return a session with all its line items; raises as ``StripeApi.call`` does."""
    answer = api.call(world, "get", "checkout", "sessions", session_id, lane=lane, expand=["line_items"])
    return with_all_lines(api, world, answer, lane=lane)


def with_whole_lines_or_none(answer: Answer) -> Answer:
    """Return *answer*, of one session, without its line items if they are only a first page: a part is of no use."""
    lines = answer.body.get("line_items")
    if not isinstance(lines, dict) or not lines.get("has_more"):
        return answer
    return Answer({key: value for key, value in answer.body.items() if key != "line_items"}, answer.at)


def with_all_lines(api: StripeApi, world: World, answer: Answer, *, lane: Lane) -> Answer:
    """Return *answer*, of one session, with the line items that its first page lacks, if all of them can be read."""
    lines = answer.body.get("line_items")
    if not isinstance(lines, dict) or not lines.get("has_more"):
        return answer
    path = ("checkout", "sessions", str(answer.id), "line_items")
    data = api.whole(world, *path, lane=lane)
    if data is None:
        return answer
    return Answer({**answer.body, "line_items": {**lines, "data": data, "has_more": False}}, answer.at)


def observed(answer: Answer, world: World, *, now: datetime) -> Delivery:
    """Return the observation that a session was as Stripe answered."""
    return observations.of_answer(SESSION_OBSERVED, with_whole_lines_or_none(answer), world, now=now)


def missing(world: World, session_id: str, *, now: datetime) -> Delivery:
    """Return the observation that Stripe knows no such session."""
    return observations.observe(
        SESSION_MISSING,
        {"object": "checkout.session", "id": session_id},
        account=world.account,
        livemode=world.livemode,
        created=int(now.timestamp()),
        now=now,
    )
