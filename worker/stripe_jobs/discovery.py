"""Finds open sessions: Stripe sends no event when a session opens, so this asks Stripe for the open ones.

Each round asks for the sessions created since the round before, and somewhat earlier, so that sessions that Stripe
lists a little late are not missed. When a session closes between two rounds, Stripe sends an event of it.
"""

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from schemas import checkout
from schemas.budget import Lane
from schemas.inbox import Delivery
from schemas.observations import Answer, World
from worker.stripe_jobs import queue, rounds
from worker.stripe_jobs.queue import JobProgress
from worker.stripe_jobs.rounds import JobContext, JobResult, TimeBudget

JOB: Final = "poll_sessions"
OVERLAP: Final = timedelta(minutes=5)
LIFE_MAX: Final = timedelta(hours=24)
"""No session stays open longer than this, so the first round asks for no older ones."""
WINDOW_MAX: Final = LIFE_MAX + 2 * OVERLAP
"""Listed in one go, where that fits: see Note [A window fits into a slice]."""


def run_once(context: JobContext) -> JobResult:
    """Ask for the open sessions of every world that a key serves, and record those that are not known."""
    return rounds.run_job(context, JOB, lambda *step: _poll(context, *step))


def _poll(context: JobContext, world: World, progress: JobProgress, found: JobResult, time_left: TimeBudget) -> None:
    start, until = (progress.reached_at or context.now() - LIFE_MAX) - OVERLAP, context.now()
    while start < until:
        width = context.width(JOB, world, WINDOW_MAX)
        end = start + width if start + width < until else None
        listed_at = _poll_window(context, world, start, end, found, time_left if width > rounds.WINDOW_MIN else None)
        if listed_at is None:
            context.narrow(JOB, world, width)
            found.is_more = True
            return
        context.widen(JOB, world, width)
        start = end or until
        reached = listed_at if end is None else max(end, progress.reached_at or end)
        context.within(partial(queue.reach, world=world, job=JOB, at=reached))
        if time_left.is_over and start < until:
            found.is_more = True
            return


def _poll_window(
    context: JobContext,
    world: World,
    start: datetime,
    end: datetime | None,
    found: JobResult,
    time_left: TimeBudget | None,
) -> datetime | None:
    """Record the open sessions of a window, and return when they were listed; None if the slice ended before that."""
    created = {"gte": int(start.timestamp())} | ({} if end is None else {"lte": int(end.timestamp())})
    wants_lines = context.settings.payfold_open_session_lines != "off"
    expand = {"expand": ["data.line_items"]} if wants_lines else {}
    path = ("checkout", "sessions")
    began: int | None = None
    for page in context.api.pages(world, *path, lane=Lane.DISCOVERY, status="open", created=created, **expand):
        began = page.at if began is None else began
        seen = rounds.observe_each(page, lambda answer: _seen(context, world, answer), found, job=JOB, world=world)
        found.recorded += context.within(partial(context.record, deliveries=seen))
        if time_left is not None and time_left.is_over and page.has_more:
            return None
    return None if began is None else datetime.fromtimestamp(began, UTC)


def _seen(context: JobContext, world: World, session: Answer) -> Delivery:
    is_wanted = context.settings.payfold_open_session_lines == "all" or session.body.get("payment_link") is None
    if not is_wanted and not session.odd:
        session = Answer({key: value for key, value in session.body.items() if key != "line_items"}, session.at)
    return checkout.observed(session, world, now=context.now())
