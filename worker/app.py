"""The Celery application and its tasks. Each task only opens the edges and calls the function that does the work."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import structlog
from celery import Celery
from celery.schedules import crontab
from sqlalchemy import Engine

from schemas import broker, inbox
from schemas.database import BATCH, condition, cursor, transaction
from schemas.errors import ConflictError
from schemas.settings import Settings
from schemas.stripe_api import StripeApi
from schemas.turns import Periodic, Turns
from worker.folding import parallel, portal_clock
from worker.folding.claim import queue_outdated
from worker.folding.parallel import FoldProcess
from worker.folding.projection import Apart
from worker.proof import asked
from worker.proof import reconcile as reconciling
from worker.proof.rebuild import IN_ONE_PROCESS
from worker.stripe_jobs import discovery, expiry, fetches, gaps
from worker.stripe_jobs.rounds import THREADS, JobContext, JobResult

FOLD_SECONDS_MAX: Final = 5.0
"""A fold task ends after this and wakes its successor, so that a worker stops soon when it is asked to."""
ROOM_SECONDS: Final = 30.0
"""In this time far fewer events come than the partitions that are made ahead have room for."""

DATABASE_CONNECTIONS_MAX: Final = THREADS + 2
"""One for each simultaneous call to Stripe, one for the job that makes them, and one for the heartbeats."""

_log = structlog.get_logger()


class Room:
    """The partitions that the next payloads will need.

    Without a clock no sweep comes as long as other messages do, so folding makes them as well.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._made_at = -math.inf

    def make(self) -> None:
        """Make them."""
        self._made_at = time.monotonic()
        inbox.make_room(self._engine)

    def make_if_due(self) -> None:
        """Make them, unless this process has lately."""
        if time.monotonic() - self._made_at >= ROOM_SECONDS:
            self.make()


def create(
    settings: Settings, engine: Engine, partner: FoldProcess | None = None, turns: Turns | None = None
) -> Celery:
    """Return the application with its tasks, which work on the database of *engine*, and its timetable.

    The fold process *partner* helps to fold a backlog. The jobs are added to *turns*.
    """
    app = broker.celery(settings)
    turns = turns or Turns()
    apart: Apart = deque()
    portal_session = timedelta(minutes=settings.payfold_portal_session_minutes)

    room = Room(engine)

    def fold() -> int:
        """Fold the pending events and return their number."""
        try:
            room.make_if_due()
        finally:
            folded = fold_until_done(app, engine, partner, apart, step=turns.step)
        return folded

    def sweep() -> int:
        """Make room, queue outdated events and the ends of portal sessions, then fold the pending events."""
        try:
            room.make()
            with transaction(engine, BATCH) as connection, cursor(connection) as opened:
                queued = queue_outdated(opened)
                portal_clock.end_portal_sessions(opened, now=datetime.now(UTC), after=portal_session)
            if queued:
                _log.info("events.queued_anew", events=queued)
        finally:
            # Also if one of these fails, which is then logged: no failure here should keep events from being folded.
            folded = fold_until_done(app, engine, partner, apart, step=turns.step)
        return folded

    _add(app, turns, broker.FOLD, fold)
    _add(app, turns, broker.SWEEP, sweep)
    api = StripeApi(settings, broker.redis(settings), step=turns.step)
    context = JobContext(engine, api, settings, step=turns.step)
    for name, run_once in _STRIPE_JOBS.items():
        _add(app, turns, name, partial(_act, app, turns, name, run_once, context))
    # Acknowledged at once, because the job is long and the broker would give the message to another worker as well.
    _add(app, turns, broker.RECONCILE, partial(_reconcile, engine, turns), acks_late=False)
    by_hand = replace(context, is_by_hand=True)
    _add(app, turns, broker.RECONCILE_ASKED, partial(_reconcile_asked, by_hand, turns), acks_late=False)
    app.conf.beat_schedule = _timetable(settings)
    return app


def _add(app: Celery, turns: Turns, job: str, work: Callable[[], int], *, acks_late: bool = True) -> None:
    """Let messages of the name *job* call *work*. This process does one job at a time."""
    turns.add(job, work)

    @app.task(name=job, shared=False, acks_late=acks_late)
    def run(**_: object) -> int:
        return turns.by_message(job)


_STRIPE_JOBS: Final[dict[str, Callable[[JobContext], JobResult]]] = {
    broker.EXPIRE_SESSIONS: expiry.run_once,
    broker.POLL_SESSIONS: discovery.run_once,
    broker.FETCH: fetches.run_once,
    broker.FILL_GAPS: gaps.run_once,
}


def _act(app: Celery, turns: Turns, job: str, run_once: Callable[[JobContext], JobResult], context: JobContext) -> int:
    """Do one slice of *job*, wake the worker that folds the recorded events, and leave the rest to a successor."""
    found = run_once(context)
    if found.error:
        turns.fail(found.error)
    if found.recorded:
        broker.send(app, broker.FOLD, queue=broker.FOLD_QUEUE)
    if found.is_more:
        broker.send(app, job, queue=broker.STRIPE_QUEUE)
    return found.recorded


def _reconcile(engine: Engine, turns: Turns) -> int:
    """Check the tables against the rules of money and a rebuild, save the result, and log an error on drift."""
    try:
        result = reconciling.run(
            engine,
            (reconciling.RULES, reconciling.REBUILD),
            reconciling.ReconcileRequest(sizes=IN_ONE_PROCESS, progress=lambda *_: turns.step()),
        )
    except ConflictError as error:
        _log.warning("reconcile.postponed", reason=str(error))
        turns.fail(condition(error))
        return 0
    return _report(result)


def _reconcile_asked(context: JobContext, turns: Turns) -> int:
    """Do the reconciliation that was asked for, if any."""
    try:
        result = asked.run_once(context, stepped_at=lambda: turns.stepped_at)
    except ConflictError as error:
        turns.fail(condition(error))
        return 0
    return 0 if result is None else _report(result)


def _report(result: dict[str, Any]) -> int:
    """Log the *result* of a reconciliation, as an error on drift, and return the number of differences."""
    drift, left_out = int(result["drift_total"]), result.get("left_out", {"objects": 0})["objects"]
    (_log.error if drift else _log.info)(
        "reconcile.done", run=result["run"]["id"], drift=drift, objects_left_out=left_out
    )
    return drift


def periodic(app: Celery, *queues: str) -> list[Periodic]:
    """Return the periodic jobs of *queues*, the most frequent first."""
    found = [
        Periodic(entry["task"], float(entry["schedule"]))
        for entry in app.conf.beat_schedule.values()
        if entry["options"]["queue"] in queues and isinstance(entry["schedule"], int)
    ]
    return sorted(found, key=lambda each: each.every)


def _timetable(settings: Settings) -> dict[str, dict[str, object]]:
    """Return the messages that the clock sends, and how often. A message expires when the next one is sent."""

    def entry(task: str, every: int, queue: str) -> dict[str, object]:
        return {"task": task, "schedule": every, "options": {"queue": queue, "expires": every}}

    found = {
        "sweep": entry(broker.SWEEP, settings.payfold_sweep_seconds, broker.FOLD_QUEUE),
        # Sent without a key as well: then our clock decides which sessions have expired.
        "expire": entry(broker.EXPIRE_SESSIONS, settings.payfold_expire_seconds, broker.STRIPE_QUEUE),
        # Finds a reconciliation that was asked for where the message of that was lost.
        "asked": entry(broker.RECONCILE_ASKED, settings.payfold_expire_seconds, broker.STRIPE_QUEUE),
    }
    if settings.api_keys:
        found["fetch"] = entry(broker.FETCH, settings.payfold_fetch_seconds, broker.STRIPE_QUEUE)
        found["poll"] = entry(broker.POLL_SESSIONS, settings.payfold_poll_seconds, broker.STRIPE_QUEUE)
        found["gaps"] = entry(broker.FILL_GAPS, settings.payfold_gap_seconds, broker.STRIPE_QUEUE)
    if settings.payfold_reconcile_at is not None:
        hour, minute = settings.payfold_reconcile_at.split(":")
        # Not in the queue of folding, which it would hold up.
        found["reconcile"] = {
            "task": broker.RECONCILE,
            "schedule": crontab(hour=hour, minute=minute),
            "options": {"queue": broker.STRIPE_QUEUE, "expires": 3600},
        }
    return found


def fold_until_done(
    app: Celery,
    engine: Engine,
    partner: FoldProcess | None = None,
    apart: Apart | None = None,
    *,
    seconds_max: float = FOLD_SECONDS_MAX,
    step: Callable[[], None] = lambda: None,
) -> int:
    """Fold batches until nothing is pending or the time is up, and return the number of events.

    *step* is called after each batch.

    When the time is up, a successor is woken. It runs after other messages that wait, or in another worker.

    Raises:
        Transient: PostgreSQL does not answer, or not in time. Events that were folded before stay folded.
    """
    started = time.monotonic()
    until = started + seconds_max
    folded = parallel.fold(engine, until=until, partner=partner, apart=apart, bounds=BATCH, step=step)
    if time.monotonic() > until:
        broker.send(app, broker.FOLD, queue=broker.FOLD_QUEUE)
    if folded:
        _log.info("events.folded", events=folded, seconds=round(time.monotonic() - started, 3))
    return folded
