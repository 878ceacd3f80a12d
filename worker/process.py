"""What the worker's and the clock's process have in common: settings, logs, and a schema to work on."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from celery import Celery
from celery.signals import setup_logging

from schemas import database, logs
from schemas.errors import ConfigurationError
from schemas.settings import Settings
from worker import app, lanes
from worker.lanes import Lane


def run(start: Callable[[Celery, Settings, Lane], object]) -> NoReturn:
    """Make the application and hand it to *start*; a setting that cannot be used ends the process with 2."""
    # Whoever is asked to stop before Celery listens has nothing to finish.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = Settings.load()
        logs.configure(settings)
        engine = database.engine(settings.postgresql, connections_max=app.DATABASE_CONNECTIONS_MAX)
        lane = Lane(settings.postgresql)
        application = app.create(settings, engine, lane)
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)

    lanes.settle_down()

    @setup_logging.connect(weak=False)
    def _keep_ours(**_: object) -> None:
        """Celery sets up logging of its own unless somebody else does."""

    try:
        start(application, settings, lane)
    finally:
        lane.close()
        engine.dispose()
    sys.exit(0)
