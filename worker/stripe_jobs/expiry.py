"""Expires sessions that have been open for too long: at Stripe where a key serves them, else by our clock.

An open session holds the shop's stock. The stale sessions are found in the orders alone. Only Stripe decides whether a
session is expired, so only its answer is recorded.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

import structlog

from schemas import checkout, inbox, observations, session_ends, tables
from schemas.budget import Lane
from schemas.checkout import Ending
from schemas.database import Cursor
from schemas.errors import CallDeclined, DatabaseAway, MissingAtStripe, NotAnObject
from schemas.inbox import Delivery
from schemas.observations import World
from schemas.own_events import SESSION_CLOCK_EXPIRED
from schemas.settings import Settings
from worker.stripe_jobs import queue, rounds
from worker.stripe_jobs.queue import Call, CallRequest, JobProgress
from worker.stripe_jobs.rounds import CallResult, JobContext, JobResult, TimeBudget

JOB: Final = "expire_sessions"
BATCH_MAX: Final = 200
LISTED_MAX: Final = 10_000
EXPIRE: Final = "expire"
READ: Final = "session"

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Stale:
    """An open session to end, and why. *purpose* is to expire it, or to read it if its own end has passed."""

    world: World
    id: str
    purpose: str
    created: datetime | None
    expires_at: datetime | None
    minutes_allowed: int | None

    def reason(self, now: datetime) -> str:
        """Return why the session is to end."""
        if self.purpose == READ:
            return f"its own end, {self.expires_at:%Y-%m-%d %H:%M:%S} UTC, has passed: read what became of it"
        minutes = (now - self.created).total_seconds() / 60 if self.created else 0
        return f"open for {minutes:,.0f} minutes, of {self.minutes_allowed} allowed"


_STALE: Final = f"""
SELECT o.id, o.created, o.expires_at, allowed.minutes, o.expires_at <= %(now)s - %(grace)s AS has_ended
FROM orders AS o
{session_ends.ALLOWED}
WHERE (o.account, o.livemode, o.status) = (%(account)s, %(livemode)s, 'open')
    AND (o.created <= %(now)s - make_interval(mins => allowed.minutes) OR o.expires_at <= %(now)s - %(grace)s)
    AND NOT EXISTS (
        SELECT FROM stripe_calls AS c
        WHERE (c.account, c.livemode, c.object_id) = (o.account, o.livemode, o.id)
            AND c.purpose IN ('expire', 'session')
            -- The lines of one that is to be expired may be asked for too, and of one that has ended less urgently.
            AND (c.purpose = 'expire' OR o.expires_at <= %(now)s - %(grace)s
                AND (c.lane = %(lane)s OR c.given_up IS NOT NULL))
    )
    -- What is recorded of it, and not yet folded, may be its end.
    AND NOT EXISTS (
        SELECT FROM inbox AS i JOIN pending AS p USING (seq)
        WHERE {tables.of_object("i", "o.account", "o.livemode", "o.id")}
    )
ORDER BY o.created LIMIT %(limit)s
"""


def stale(cursor: Cursor, world: World, settings: Settings, *, now: datetime, limit: int = BATCH_MAX) -> list[Stale]:
    """Return up to *limit* stale open sessions of *world*, oldest first.

    Sessions that a call is queued for, or that have an event that is not folded yet, are left out.
    """
    cursor.execute(
        _STALE,
        {
            "account": world.account,
            "livemode": world.livemode,
            "now": now,
            "grace": timedelta(minutes=settings.payfold_expiry_grace_minutes),
            **session_ends.rule(settings),
            "lane": int(Lane.EXPIRY),
            "limit": limit,
        },
    )
    return [
        Stale(world, row[0], READ if row[4] else EXPIRE, created=row[1], expires_at=row[2], minutes_allowed=row[3])
        for row in cursor.fetchall()
    ]


def run_once(context: JobContext) -> JobResult:
    """Expire the stale sessions of every world, and return the results."""
    found = rounds.run_job(context, JOB, lambda *step: _expire(context, *step))
    for world in rounds.unserved(context):
        try:
            _expire_unserved(context, world, found)
        except DatabaseAway:
            raise
        except Exception as error:  # noqa: BLE001 - it is kept, and the other worlds go on
            rounds.fail(context, JOB, world, error, found)
        else:
            context.within(partial(queue.pause, world=world, job=JOB))
    return found


def _expire_unserved(context: JobContext, world: World, found: JobResult) -> None:
    found.recorded += _expire_by_clock(context, world, found)
    if not context.api.is_idle:
        left = context.within(
            partial(stale, world=world, settings=context.settings, now=context.now(), limit=LISTED_MAX)
        )
        found.count("not_served", len(left))
        if left:
            _log.info("sessions.not_served", sessions=len(left), account=world.account, livemode=world.livemode)


def _expire(context: JobContext, world: World, _: JobProgress, found: JobResult, time_left: TimeBudget) -> None:
    while True:
        asked = context.within(lambda opened: _ask(opened, context, world))
        rounds.work_off(context, world, (EXPIRE, READ), lambda call: _make(context, call), found, time_left)
        if time_left.is_over and (asked == BATCH_MAX or found.is_more):
            found.is_more = True
            return
        if asked < BATCH_MAX:
            return


def _ask(cursor: Cursor, context: JobContext, world: World) -> int:
    found = stale(cursor, world, context.settings, now=context.now())
    wanted = [CallRequest(each.purpose, each.id, "checkout.session", Lane.EXPIRY, each.created) for each in found]
    return queue.want(cursor, world, wanted, now=context.now()) if wanted else 0


def _make(context: JobContext, call: Call) -> CallResult:
    try:
        return _end(context, call) if call.purpose == EXPIRE else read(context, call)
    except CallDeclined as error:
        return CallResult(counted="declined", given_up=str(error))
    except NotAnObject as error:
        return CallResult(counted="unreadable", given_up=str(error))


def _end(context: JobContext, call: Call) -> CallResult:
    outcome = checkout.expire(context.api, call.world, call.object_id, read_first=call.attempts > 0, now=context.now())
    if outcome.ending is Ending.MISSING:
        return _missing(outcome.deliveries)
    if outcome.ending is Ending.STILL_OPEN:
        given_up = "Stripe leaves it open" if call.attempts + 1 >= rounds.ATTEMPTS_MAX else ""
        return CallResult(outcome.deliveries, "left_open", is_to_be_repeated=True, given_up=given_up)
    return CallResult(outcome.deliveries, "expired" if outcome.ending is Ending.EXPIRED else "was_over")


def read(context: JobContext, call: Call) -> CallResult:
    """Read the session's current state, with all its lines."""
    try:
        answer = checkout.read(context.api, call.world, call.object_id, lane=call.lane)
    except MissingAtStripe:
        return _missing((checkout.missing(call.world, call.object_id, now=context.now()),))
    # Past the session's own end Stripe's timer is only late, so the session is read again later.
    ends = answer.body.get("expires_at")
    is_late = answer.body.get("status") == "open" and isinstance(ends, int) and ends < answer.at
    return CallResult(
        (checkout.observed(answer, call.world, now=context.now()),), "sessions", is_to_be_repeated=is_late
    )


def _missing(deliveries: tuple[Delivery, ...]) -> CallResult:
    return CallResult(deliveries, "missing", given_up="Stripe knows no such session", is_news=True)


_ENDED: Final = """
SELECT id, expires_at FROM orders
WHERE (account, livemode, status) = (%s, %s, 'open') AND expires_at <= %s ORDER BY created LIMIT %s
"""


def _expire_by_clock(context: JobContext, world: World, found: JobResult) -> int:
    """Record that sessions have ended by our clock, where no key can ask Stripe; anything from Stripe outranks it."""
    grace = timedelta(minutes=context.settings.payfold_expiry_grace_minutes)

    def expire(cursor: Cursor) -> int:
        cursor.execute(_ENDED, (world.account, world.livemode, context.now() - grace, BATCH_MAX))
        ended = [
            observations.observe(
                SESSION_CLOCK_EXPIRED,
                {"object": "checkout.session", "id": session},
                account=world.account,
                livemode=world.livemode,
                # The time at which the session ended, not the time of this round, so that two rounds record the same.
                created=int((expires_at + grace).timestamp()),
                now=context.now(),
            )
            for session, expires_at in cursor.fetchall()
        ]
        if ended:
            inbox.record(cursor, ended)
        return len(ended)

    times = context.within(expire)
    if times:
        found.count("expired_by_clock", times)
        _log.info("sessions.expired_by_clock", sessions=times, account=world.account, livemode=world.livemode)
    found.is_more = found.is_more or times == BATCH_MAX
    return times


LISTED: Final = ("account", "livemode", "id", "created", "expires_at", "action", "why")


def listed(context: JobContext) -> list[dict[str, Any]]:
    """Return what a round would do now, and why, oldest first in each world; nothing is done."""
    now = context.now()
    found = []
    for world in rounds.known_worlds(context):
        is_served = context.api.serves(world)
        for each in context.within(partial(stale, world=world, settings=context.settings, now=now, limit=LISTED_MAX)):
            action = _ACTIONS[is_served, each.purpose]
            values = (world.account, world.livemode, each.id, each.created, each.expires_at, action, each.reason(now))
            found.append(dict(zip(LISTED, values, strict=True)))
    return found


_ACTIONS: Final = {
    (True, EXPIRE): "expire at Stripe",
    (True, READ): "read from Stripe",
    (False, EXPIRE): "none: no key serves it",
    (False, READ): "expire by our clock",
}
