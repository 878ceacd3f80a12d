"""What the worker's and the clock's process have in common: settings, logs, and a schema to work on."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from celery import Celery
from celery.signals import setup_logging
from sqlalchemy import Engine

from schemas import database, logs
from schemas.errors import ConfigurationError
from schemas.settings import Settings
from schemas.turns import Turns
from worker import app
from worker.folding import parallel
from worker.folding.parallel import Lane


@dataclass(frozen=True, slots=True)
class Made:
    """What a process works with; nothing of it is opened yet."""

    app: Celery
    settings: Settings
    engine: Engine
    lane: Lane
    turns: Turns


def run(start: Callable[[Made], int]) -> NoReturn:
    """Make the application, hand it to *start*, and exit with what that returns.

    A setting that cannot be used ends the process with 2.
    """
    # A process that is asked to stop before Celery listens has nothing to finish.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        made = _make()
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)

    @setup_logging.connect(weak=False)
    def _keep_ours(**_: object) -> None:
        """Celery sets up logging of its own unless a receiver of this signal does."""

    parallel.settle_down()
    try:
        code = start(made)
    finally:
        made.engine.dispose()
    sys.exit(code)


def _make() -> Made:
    settings = Settings.load()
    logs.configure(settings)
    logs.report_unknown()
    engine = database.engine(settings.postgresql, connections_max=app.DATABASE_CONNECTIONS_MAX)
    lane, turns = Lane(settings.postgresql), Turns()
    return Made(app.create(settings, engine, lane, turns), settings, engine, lane, turns)
