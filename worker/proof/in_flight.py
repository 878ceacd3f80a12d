"""Finds the objects with an event that is on its way, or not folded yet. Such an event explains any difference.

Note [What has just changed is on its way]
    Stripe lists a refund at once, but its webhook comes about a second later. So where objects differ, Stripe is also
    asked for its events since a minute before the objects were listed. If such an event is of an object, or names it as
    its charge or its payment, the object is treated like one that was just created: it is not compared, and a repair
    does not record it. The next audit compares it. If a busy shop has more events than are asked for, or a restricted
    key may not list events, the differences are reported.
"""

from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from itertools import islice
from typing import Final

from schemas import tables
from schemas.budget import Lane
from schemas.database import Cursor
from schemas.errors import CallDeclined, KeyRefused, MissingAtStripe, Refused
from schemas.events import Key
from schemas.inbox import Delivery
from schemas.observations import Answer, World
from worker import folds
from worker.folding.claim import event_of_delivery
from worker.stripe_jobs import gaps
from worker.stripe_jobs.rounds import JobContext

SETTLED: Final = timedelta(minutes=1)
"""The webhook of a younger object may be on its way."""


EVENT_PAGES_MAX: Final = 20
"""Where objects differ, up to so many pages of the newest events are asked for, of a hundred events each."""


def is_young(answer: Answer, context: JobContext) -> bool:
    """Return whether the object was created so shortly before Stripe answered that its webhook may be on its way.

    An open session has no event: the poll finds it, so it counts as young for a poll's time longer.
    """
    created = answer.body.get("created")
    if not isinstance(created, int):
        return False
    is_polled = answer.body.get("object") == "checkout.session" and answer.body.get("status") == "open"
    young = SETTLED + timedelta(seconds=context.settings.payfold_poll_seconds if is_polled else 0)
    # ``answer.at`` is when the call began, so an object created during the call is from shortly after that. Objects of
    # a test clock may be created far in the future.
    return -SETTLED.total_seconds() < answer.at - created < young.total_seconds()


def moved(context: JobContext, world: World, at: int) -> set[str]:
    """Return the ids in the events since a minute before *at*: see Note [What has just changed is on its way]."""
    since = at - int(SETTLED.total_seconds())
    found: set[str] = set()
    try:
        pages = context.api.pages(world, "events", lane=Lane.BACKFILL, created={"gte": since})
        for page in islice(pages, EVENT_PAGES_MAX):
            for item in page.items:
                with suppress(Refused):
                    found |= _spoken_of(gaps.event_of(item, world, now=context.now()))
    except (CallDeclined, MissingAtStripe):
        pass
    except KeyRefused as error:
        if not error.is_forbidden:
            raise
    return found


def _spoken_of(delivery: Delivery) -> set[str]:
    """Return the ids of the objects that an event is of, and of the charge and the payment that it names."""
    found: set[str] = set()
    for one in folds.judge(event_of_delivery(delivery)).facts:
        named = (one.references.get("charge"), one.references.get("payment_intent"))
        found.update(each for each in (one.subject.id, one.subject.source, *named) if each is not None)
    return found


def names_of(answer: Answer) -> set[str]:
    """Return the ids by which an event may name an object: a session also by its payment, which moves it."""
    is_session = answer.body.get("object") == "checkout.session"
    named = (answer.body.get("id"), answer.body.get("payment_intent") if is_session else None)
    return {each for each in named if isinstance(each, str)}


def on_the_way(cursor: Cursor, objects: Iterable[Key]) -> set[Key]:
    """Return the objects that have an event that is not folded yet: their next rows are not known."""
    wanted = sorted(set(objects))
    cursor.execute(
        f"""
        SELECT DISTINCT k.account, k.livemode, k.object_id
        FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, object_id)
        JOIN inbox AS i ON {tables.of_object("i", "k.account", "k.livemode", "k.object_id")} JOIN pending USING (seq)
        """,
        [list(column) for column in zip(*wanted, strict=True)] or [[], [], []],
    )
    return {(account, livemode, object_id) for account, livemode, object_id in cursor.fetchall()}
