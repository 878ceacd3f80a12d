"""The clock process: ``python -m worker.clock``. It sends messages on time and does no work itself."""

from celery import Celery

from schemas.settings import Settings
from worker.lanes import Lane
from worker.process import run


def start(app: Celery, _settings: Settings, _lane: Lane) -> None:
    """Send the timetable's messages until told to stop."""
    # Nothing is kept of past times: each interval is short, and a dyno forgets its disk anyway.
    app.Beat(scheduler_cls="celery.beat.Scheduler", loglevel="WARNING", quiet=True, redirect_stdouts=False).run()


if __name__ == "__main__":
    run(start)
