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
from worker.stripe_jobs.queue import Progress
from worker.stripe_jobs.rounds import Desk, Round, Slice

JOB: Final = "poll_sessions"
OVERLAP: Final = timedelta(minutes=5)
LIFE_MAX: Final = timedelta(hours=24)
"""No session stays open longer than this, so the first round asks for no older ones."""
WINDOW_MAX: Final = LIFE_MAX + 2 * OVERLAP
"""Listed in one go, where that fits: see Note [A window fits into a slice]."""


def run_once(desk: Desk) -> Round:
    """Ask for the open sessions of every world that a key serves, and record those that are not known."""
    return rounds.go_round(desk, JOB, lambda *step: _poll(desk, *step))


def _poll(desk: Desk, world: World, progress: Progress, found: Round, share: Slice) -> None:
    start, until = (progress.reached_at or desk.now() - LIFE_MAX) - OVERLAP, desk.now()
    while start < until:
        width = desk.width(JOB, world, WINDOW_MAX)
        end = start + width if start + width < until else None
        listed_at = _poll_window(desk, world, start, end, found, share if width > rounds.WINDOW_MIN else None)
        if listed_at is None:
            desk.narrow(JOB, world, width)
            found.is_more = True
            return
        desk.widen(JOB, world, width)
        start = end or until
        reached = listed_at if end is None else max(end, progress.reached_at or end)
        desk.within(partial(queue.reach, world=world, job=JOB, at=reached))
        if share.is_over and start < until:
            found.is_more = True
            return


def _poll_window(
    desk: Desk, world: World, start: datetime, end: datetime | None, found: Round, share: Slice | None
) -> datetime | None:
    """Record the open sessions of a window, and return when they were listed; None if the slice ended before that."""
    created = {"gte": int(start.timestamp())} | ({} if end is None else {"lte": int(end.timestamp())})
    wants_lines = desk.settings.payfold_open_session_lines != "off"
    expand = {"expand": ["data.line_items"]} if wants_lines else {}
    path = ("checkout", "sessions")
    began: int | None = None
    for page in desk.api.pages(world, *path, lane=Lane.DISCOVERY, status="open", created=created, **expand):
        began = page.at if began is None else began
        seen = rounds.observe_each(page, lambda answer: _seen(desk, world, answer), found, job=JOB, world=world)
        found.recorded += desk.within(partial(desk.record, deliveries=seen))
        if share is not None and share.is_over and page.has_more:
            return None
    return None if began is None else datetime.fromtimestamp(began, UTC)


def _seen(desk: Desk, world: World, session: Answer) -> Delivery:
    is_wanted = desk.settings.payfold_open_session_lines == "all" or session.body.get("payment_link") is None
    if not is_wanted and not session.odd:
        session = Answer({key: value for key, value in session.body.items() if key != "line_items"}, session.at)
    return checkout.observed(session, world, now=desk.now())
