"""Finds open sessions: Stripe sends no event when one opens, so it is asked for those that are.

Each round asks for what was created since the round before, and somewhat earlier, so that what Stripe lists a
little late is not missed. A session that closes in between tells of itself by an event.
"""

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from schemas import checkout
from schemas.budget import Lane
from schemas.inbox import Delivery
from schemas.observations import Answer, World
from worker import acting, calls
from worker.acting import Desk, Round, Slice
from worker.calls import Progress

JOB: Final = "poll_sessions"
OVERLAP: Final = timedelta(minutes=5)
LIFE_MAX: Final = timedelta(hours=24)
"""No session stays open for longer, so the first round asks for no older ones."""


def run_once(desk: Desk) -> Round:
    """Ask for the open sessions of every world that a key serves, and record those that are not known."""
    return acting.go_round(desk, JOB, lambda *step: _poll(desk, *step))


def _poll(desk: Desk, world: World, progress: Progress, found: Round, _: Slice) -> None:
    since = (progress.reached_at or desk.now() - LIFE_MAX) - OVERLAP
    wants_lines = desk.settings.payfold_open_session_lines != "off"
    expand = {"expand": ["data.line_items"]} if wants_lines else {}
    began: int | None = None
    pages = desk.api.pages(
        world,
        *("checkout", "sessions"),
        lane=Lane.DISCOVERY,
        status="open",
        created={"gte": int(since.timestamp())},
        **expand,
    )
    for page in pages:
        began = page.at if began is None else began
        seen = acting.observe_each(page, lambda answer: _seen(desk, world, answer), found, job=JOB, world=world)
        found.recorded += desk.within(partial(desk.record, deliveries=seen))
    if began is not None:
        at = datetime.fromtimestamp(began, UTC)
        desk.within(lambda opened: calls.reach(opened, world, JOB, at=at))


def _seen(desk: Desk, world: World, session: Answer) -> Delivery:
    is_wanted = desk.settings.payfold_open_session_lines == "all" or session.body.get("payment_link") is None
    if not is_wanted and not session.odd:
        session = Answer({key: value for key, value in session.body.items() if key != "line_items"}, session.at)
    return checkout.observed(session, world, now=desk.now())
