"""The Celery application: the tasks, each of which only opens the edges and calls what does the work."""

import time
from datetime import UTC, datetime
from typing import Final

import structlog
from celery import Celery
from sqlalchemy import Engine

from schemas import broker, database
from schemas.database import cursor, transaction
from schemas.errors import DatabaseAway
from schemas.settings import Settings
from worker import projection

FOLD_SECONDS_MAX: Final = 5.0
"""A fold task ends after this and wakes its successor, so that a worker asked to stop never takes long."""

_log = structlog.get_logger()


def create(settings: Settings) -> Celery:
    """Return the application with its tasks and its timetable."""
    app = broker.celery(settings)
    engine = database.engine(settings.postgresql, connections_max=2)

    @app.task(name=broker.FOLD)
    def fold(**_: object) -> int:
        """Fold what is pending and return how many events that was."""
        return _until_done(app, engine)

    @app.task(name=broker.SWEEP)
    def sweep(**_: object) -> int:
        """Queue what an older fold version folded, then fold what is pending."""
        try:
            with transaction(engine) as connection, cursor(connection) as opened:
                queued = projection.queue_outdated(opened)
        except DatabaseAway:
            _log.warning("events.fold_postponed", reason="PostgreSQL is away")
            return 0
        if queued:
            _log.info("events.queued_anew", events=queued)
        return _until_done(app, engine)

    every = settings.payfold_sweep_seconds
    app.conf.beat_schedule = {
        "sweep": {"task": broker.SWEEP, "schedule": every, "options": {"queue": broker.FOLD_QUEUE, "expires": every}}
    }
    return app


def _until_done(app: Celery, engine: Engine) -> int:
    """Fold batches until nothing is pending or the time is up, and return how many events that was."""
    started, folded = time.monotonic(), 0
    try:
        while batch := projection.run_once(engine, now=datetime.now(UTC)):
            folded += batch
            if time.monotonic() - started > FOLD_SECONDS_MAX:
                app.send_task(broker.FOLD, queue=broker.FOLD_QUEUE)
                break
    except DatabaseAway:
        _log.warning("events.fold_postponed", reason="PostgreSQL is away", events=folded)
        return folded
    if folded:
        _log.info("events.folded", events=folded, seconds=round(time.monotonic() - started, 3))
    return folded
