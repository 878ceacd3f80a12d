"""Fetches events that never came, from the list that Stripe keeps for 30 days.

Each account and mode has a checkpoint: all events before it are in the inbox. A round lists the events that the folds
use, from somewhat before the checkpoint to a minute ago, since Stripe may list the newest events late. It records
those that the inbox lacks. Source: https://docs.stripe.com/api/events/list.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import structlog

from schemas import events, inbox
from schemas.budget import Lane
from schemas.database import Cursor, boolean_array, text_array
from schemas.errors import Refused
from schemas.inbox import Delivery, Recorded
from schemas.observations import World
from schemas.stripe_api import Page
from worker import folds
from worker.stripe_jobs import queue, rounds
from worker.stripe_jobs.queue import JobProgress
from worker.stripe_jobs.rounds import JobContext, JobResult, TimeBudget

JOB: Final = "fill_gaps"
TYPES_MAX: Final = 20
"""Event types that Stripe accepts in one request."""
OVERLAP: Final = timedelta(minutes=5)
SETTLED: Final = timedelta(minutes=1)
WINDOW_MAX: Final = timedelta(hours=6)
"""A long gap is filled in windows of this width; each one filled is kept: see Note [A window fits into a slice]."""
KEPT: Final = timedelta(days=30)
"""Stripe lists no older events."""
CLIFF: Final = timedelta(days=25)
"""A checkpoint older than this is soon out of Stripe's reach."""

_log = structlog.get_logger()


def wanted_types() -> list[str]:
    """Return the event types of Stripe that the folds use."""
    return list(folds.STRIPE_TYPES)


def run_once(context: JobContext, *, since: datetime | None = None) -> JobResult:
    """Fill the gaps of every world that a key serves, from *since* if it is given, else from its checkpoint."""
    return rounds.run_job(context, JOB, lambda *step: _fill(context, since, *step))


def _fill(
    context: JobContext,
    since: datetime | None,
    world: World,
    progress: JobProgress,
    found: JobResult,
    time_left: TimeBudget,
) -> None:
    oldest = context.now() - KEPT
    checkpoint = _checkpoint(context, world, progress)
    start = max(checkpoint if since is None else since, oldest)
    # A start after the checkpoint leaves a gap between the two, so the checkpoint has to stay.
    moves_checkpoint = start <= max(checkpoint, oldest)
    until = context.now() - SETTLED
    while start < until:
        width = context.width(JOB, world, WINDOW_MAX)
        end = min(start + width, until)
        # A person who gives *since* waits until all of it is done.
        may_leave = since is None and width > rounds.WINDOW_MIN
        if not _fill_window(context, world, start, end, found, time_left if may_leave else None):
            context.narrow(JOB, world, width)
            found.is_more = True
            return
        context.widen(JOB, world, width)
        reached = max(end, progress.reached_at or end) if moves_checkpoint else None
        context.within(partial(queue.reach, world=world, job=JOB, at=reached))
        start = end
        if time_left.is_over and start < until and since is None:
            found.is_more = True
            return


def _checkpoint(context: JobContext, world: World, progress: JobProgress) -> datetime:
    """Return the time before which no event is missing, less the overlap."""
    if progress.reached_at is None:
        return (context.within(lambda opened: _first_received(opened, world)) or context.now() - SETTLED) - OVERLAP
    if progress.reached_at < context.now() - CLIFF:
        _log.warning(
            "stripe.checkpoint_is_old",
            account=world.account,
            livemode=world.livemode,
            checkpoint=progress.reached_at.isoformat(),
            reason="Stripe lists events of the last 30 days only: what is older is lost to this job",
        )
    return progress.reached_at - OVERLAP


def _first_received(cursor: Cursor, world: World) -> datetime | None:
    """Return when the first webhook was recorded: since then the inbox is meant to be complete."""
    cursor.execute(
        "SELECT received_at FROM inbox WHERE (account, livemode) = (%s, %s) AND source = 'webhook'"
        " ORDER BY seq LIMIT 1",
        (world.account, world.livemode),
    )
    row = cursor.fetchone()
    return row[0] if row else None


def _fill_window(
    context: JobContext, world: World, start: datetime, end: datetime, found: JobResult, time_left: TimeBudget | None
) -> bool:
    """Record the events of a window that the inbox lacks; False if the slice ended before all pages were listed."""
    types = wanted_types()
    created = {"gte": int(start.timestamp()), "lte": int(end.timestamp())}
    for first in range(0, len(types), TYPES_MAX):
        asked = types[first : first + TYPES_MAX]
        for page in context.api.pages(world, "events", lane=Lane.BACKFILL, types=asked, created=created):
            listed = _deliveries(page, world, found, now=context.now())
            if new := context.within(partial(_record, world=world, listed=listed)):
                found.count("events_that_never_came", new, recorded=new)
            if time_left is not None and time_left.is_over and page.has_more:
                return False
    return True


def _deliveries(page: Page, world: World, found: JobResult, *, now: datetime) -> list[Delivery]:
    """Return the events of a *page*, however odd; count and log items without a readable id, type and created."""
    listed: list[Delivery] = []
    for item in page.items:
        with suppress(Refused):
            listed.append(event_of(item, world, now=now))
    rounds.note_unreadable(len(page.items) - len(listed), found, job=JOB, world=world)
    return listed


def _record(cursor: Cursor, world: World, listed: list[Delivery]) -> int:
    lacking = _lacking(cursor, listed)
    if not lacking:
        return 0
    new = sum(receipt.recorded is Recorded.NEW for receipt in inbox.record(cursor, lacking))
    if new:
        queue.reach(cursor, world, JOB, found=new)
    return new


def _lacking(cursor: Cursor, listed: Sequence[Delivery]) -> list[Delivery]:
    """Return those of *listed* that the inbox does not have, or has parked, or in an older API version.

    The others are left out, since the list is read again and again, and each copy would be kept and compared each time.
    """
    keys = [
        text_array([each.account for each in listed]),
        boolean_array(each.envelope.livemode for each in listed),
        text_array([each.envelope.id for each in listed]),
    ]
    cursor.execute(_FOLDED, keys)
    known: dict[str, str] = dict(cursor.fetchall())
    return [
        each
        for each in listed
        if each.envelope.id not in known or (each.envelope.api_version or "")[:10] > known[each.envelope.id]
    ]


# The list is of one world, but its account may have been renamed.
_FOLDED: Final = """
SELECT i.id, coalesce(left(i.api_version, 10), '')
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
LEFT JOIN account_names AS n ON n.old = k.account
JOIN inbox AS i ON (i.account, i.livemode, i.id) = (coalesce(n.new, k.account), k.livemode, k.id)
LEFT JOIN outcomes AS o USING (seq) WHERE o.state IS DISTINCT FROM 'parked'
"""


def event_of(body: bytes, world: World, *, now: datetime) -> Delivery:
    """Return the delivery of an event as Stripe listed it, byte for byte, as the inbox takes it.

    Raises:
        Refused: it has no id, type or created, which recording needs.
    """
    return Delivery(
        envelope=events.read(body),
        # A connected account's own list does not name the account.
        account=world.account,
        sha256=hashlib.sha256(body).digest(),
        signature=None,
        source="gap",
        received_at=now,
    )
