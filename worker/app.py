"""The Celery application: the tasks, each of which only opens the edges and calls what does the work."""

import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

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
from worker.folding.parallel import Lane
from worker.folding.projection import Apart
from worker.proof import reconcile as reconciling
from worker.proof.rebuild import IN_ONE_PROCESS
from worker.stripe_jobs import discovery, expiry, fetches, gaps
from worker.stripe_jobs.rounds import THREADS, Desk, Round

FOLD_SECONDS_MAX: Final = 5.0
"""A fold task ends after this and wakes its successor, so that a worker asked to stop never takes long."""

DATABASE_CONNECTIONS_MAX: Final = THREADS + 2
"""Of the calls to Stripe at once, the job that makes them, and the heartbeats."""

_log = structlog.get_logger()


def create(settings: Settings, engine: Engine, beside: Lane | None = None, turns: Turns | None = None) -> Celery:
    """Return the application with its tasks, which work on the database of *engine*, and its timetable.

    A backlog is folded by the lane *beside* as well. The jobs are added to *turns*.
    """
    app = broker.celery(settings)
    turns = turns or Turns()
    apart: Apart = deque()
    portal_session = timedelta(minutes=settings.payfold_portal_session_minutes)

    def fold() -> int:
        """Fold what is pending and return how many events that was."""
        return fold_until_done(app, engine, beside, apart, step=turns.step)

    def sweep() -> int:
        """Make room, queue what an older fold version folded and what the time has ended, then fold what is pending."""
        try:
            inbox.make_room(engine)
            with transaction(engine, BATCH) as connection, cursor(connection) as opened:
                queued = queue_outdated(opened)
                portal_clock.end_portal_sessions(opened, now=datetime.now(UTC), after=portal_session)
            if queued:
                _log.info("events.queued_anew", events=queued)
        finally:
            # Also where one of these fails, which is then logged: none of it is in the way of what is pending.
            folded = fold_until_done(app, engine, beside, apart, step=turns.step)
        return folded

    _add(app, turns, broker.FOLD, fold)
    _add(app, turns, broker.SWEEP, sweep)
    api = StripeApi(settings, broker.redis(settings), step=turns.step)
    desk = Desk(engine, api, settings, step=turns.step)
    for name, run_once in _STRIPE_JOBS.items():
        _add(app, turns, name, partial(_act, app, turns, name, run_once, desk))
    # Acknowledged at once: the broker would give a message that is worked at for so long to somebody else too.
    _add(app, turns, broker.RECONCILE, partial(_reconcile, engine, turns), acks_late=False)
    app.conf.beat_schedule = _timetable(settings)
    return app


def _add(app: Celery, turns: Turns, job: str, work: Callable[[], int], *, acks_late: bool = True) -> None:
    """Let the messages called *job* do *work*, one at a time with all else that this process does."""
    turns.add(job, work)

    @app.task(name=job, shared=False, acks_late=acks_late)
    def run(**_: object) -> int:
        return turns.by_message(job)


_STRIPE_JOBS: Final[dict[str, Callable[[Desk], Round]]] = {
    broker.EXPIRE_SESSIONS: expiry.run_once,
    broker.POLL_SESSIONS: discovery.run_once,
    broker.FETCH: fetches.run_once,
    broker.FILL_GAPS: gaps.run_once,
}


def _act(app: Celery, turns: Turns, job: str, run_once: Callable[[Desk], Round], desk: Desk) -> int:
    """Do one slice of *job*, wake the worker that folds what it recorded, and leave the rest to a successor."""
    found = run_once(desk)
    if found.error:
        turns.fail(found.error)
    if found.recorded:
        broker.send(app, broker.FOLD, queue=broker.FOLD_QUEUE)
    if found.is_more:
        broker.send(app, job, queue=broker.STRIPE_QUEUE)
    return found.recorded


def _reconcile(engine: Engine, turns: Turns) -> int:
    """Hold the tables against money's rules and a rebuild, keep what came of it, and say so loudly on drift."""
    try:
        result = reconciling.run(
            engine,
            (reconciling.RULES, reconciling.REBUILD),
            reconciling.Wanted(sizes=IN_ONE_PROCESS, progress=lambda *_: turns.step()),
        )
    except ConflictError as error:
        _log.warning("reconcile.postponed", reason=str(error))
        turns.fail(condition(error))
        return 0
    drift, left_out = int(result["drift_total"]), result.get("left_out", {"objects": 0})["objects"]
    (_log.error if drift else _log.info)(
        "reconcile.done", run=result["run"]["id"], drift=drift, objects_left_out=left_out
    )
    return drift


def periodic(app: Celery, *queues: str) -> list[Periodic]:
    """Return the jobs that come in *queues* again and again, the most frequent first."""
    found = [
        Periodic(entry["task"], float(entry["schedule"]))
        for entry in app.conf.beat_schedule.values()
        if entry["options"]["queue"] in queues and isinstance(entry["schedule"], int)
    ]
    return sorted(found, key=lambda each: each.every)


def _timetable(settings: Settings) -> dict[str, dict[str, object]]:
    """Return what the clock sends, and how often; a message that nobody took until the next one is void."""

    def entry(task: str, every: int, queue: str) -> dict[str, object]:
        return {"task": task, "schedule": every, "options": {"queue": queue, "expires": every}}

    found = {
        "sweep": entry(broker.SWEEP, settings.payfold_sweep_seconds, broker.FOLD_QUEUE),
        # Without a key it is our clock that says what has expired.
        "expire": entry(broker.EXPIRE_SESSIONS, settings.payfold_expire_seconds, broker.STRIPE_QUEUE),
    }
    if settings.api_keys:
        found["fetch"] = entry(broker.FETCH, settings.payfold_fetch_seconds, broker.STRIPE_QUEUE)
        found["poll"] = entry(broker.POLL_SESSIONS, settings.payfold_poll_seconds, broker.STRIPE_QUEUE)
        found["gaps"] = entry(broker.FILL_GAPS, settings.payfold_gap_seconds, broker.STRIPE_QUEUE)
    if settings.payfold_reconcile_at is not None:
        hour, minute = settings.payfold_reconcile_at.split(":")
        # Not among what is folded, which it would hold up.
        found["reconcile"] = {
            "task": broker.RECONCILE,
            "schedule": crontab(hour=hour, minute=minute),
            "options": {"queue": broker.STRIPE_QUEUE, "expires": 3600},
        }
    return found


def fold_until_done(
    app: Celery,
    engine: Engine,
    beside: Lane | None = None,
    apart: Apart | None = None,
    *,
    seconds_max: float = FOLD_SECONDS_MAX,
    step: Callable[[], None] = lambda: None,
) -> int:
    """Fold batches until nothing is pending or the time is up, and return how many events that was.

    *step* is called after each batch.

    When the time is up, a successor is woken: it takes its turn behind other messages, or in another worker.

    Raises:
        Transient: what is folded until then is saved.
    """
    started = time.monotonic()
    until = started + seconds_max
    folded = parallel.fold(engine, until=until, beside=beside, apart=apart, bounds=BATCH, step=step)
    if time.monotonic() > until:
        broker.send(app, broker.FOLD, queue=broker.FOLD_QUEUE)
    if folded:
        _log.info("events.folded", events=folded, seconds=round(time.monotonic() - started, 3))
    return folded
