"""The Celery application: the tasks, each of which only opens the edges and calls what does the work."""

import time
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from celery import Celery
from sqlalchemy import Engine

from schemas import broker
from schemas.database import cursor, transaction
from schemas.errors import DatabaseAway
from schemas.settings import Settings
from worker import projection, timekeeping

FOLD_SECONDS_MAX: Final = 5.0
"""A fold task ends after this and wakes its successor, so that a worker asked to stop never takes long."""

_log = structlog.get_logger()


def create(settings: Settings, engine: Engine) -> Celery:
    """Return the application with its tasks, which work on the database of *engine*, and its timetable."""
    app = broker.celery(settings)
    portal_session = timedelta(minutes=settings.payfold_portal_session_minutes)

    @app.task(name=broker.FOLD, shared=False)
    def fold(**_: object) -> int:
        """Fold what is pending and return how many events that was."""
        return fold_until_done(app, engine)

    @app.task(name=broker.SWEEP, shared=False)
    def sweep(**_: object) -> int:
        """Queue what an older fold version folded and what the time has ended, then fold what is pending."""
        try:
            with transaction(engine) as connection, cursor(connection) as opened:
                queued = projection.queue_outdated(opened)
                timekeeping.end_portal_sessions(opened, now=datetime.now(UTC), after=portal_session)
        except DatabaseAway:
            _log.warning("events.fold_postponed", reason="PostgreSQL is away")
            return 0
        if queued:
            _log.info("events.queued_anew", events=queued)
        return fold_until_done(app, engine)

    every = settings.payfold_sweep_seconds
    app.conf.beat_schedule = {
        "sweep": {"task": broker.SWEEP, "schedule": every, "options": {"queue": broker.FOLD_QUEUE, "expires": every}}
    }
    return app


def fold_until_done(app: Celery, engine: Engine, *, seconds_max: float = FOLD_SECONDS_MAX) -> int:
    """Fold batches until nothing is pending or the time is up, and return how many events that was.

    When the time is up, a successor is woken: it takes its turn behind other messages, or in another worker.
    """
    started, folded = time.monotonic(), 0
    try:
        while batch := projection.run_once(engine, now=datetime.now(UTC)):
            folded += batch
            if time.monotonic() - started > seconds_max:
                app.send_task(broker.FOLD, queue=broker.FOLD_QUEUE)
                break
    except DatabaseAway:
        _log.warning("events.fold_postponed", reason="PostgreSQL is away", events=folded)
        return folded
    if folded:
        _log.info("events.folded", events=folded, seconds=round(time.monotonic() - started, 3))
    return folded
