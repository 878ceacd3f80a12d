"""The common start of the worker's and the clock's process: settings, logs, engine and application."""

import os
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
from worker.folding.parallel import FoldProcess


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that a process works with. None of them has an open connection yet."""

    app: Celery
    settings: Settings
    engine: Engine
    fold_process: FoldProcess
    turns: Turns


def run(start: Callable[[Parts], int]) -> NoReturn:
    """Make the application, pass it to *start*, and exit with the code that *start* returns.

    A setting that cannot be used ends the process with code 2.
    """
    # Before Celery handles this signal there is nothing to finish. An exception could be dropped within a finalizer.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        parts = _make()
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)

    @setup_logging.connect(weak=False)
    def _keep_ours(**_: object) -> None:
        """Do nothing. Celery sets up its own logging unless this signal has a receiver."""

    parallel.settle_down()
    try:
        code = start(parts)
    finally:
        parts.engine.dispose()
    sys.exit(code)


def _make() -> Parts:
    settings = Settings.load()
    logs.configure(settings)
    logs.report_unknown()
    engine = database.engine(settings.postgresql, connections_max=app.DATABASE_CONNECTIONS_MAX)
    fold_process, turns = FoldProcess(settings.postgresql), Turns()
    return Parts(app.create(settings, engine, fold_process, turns), settings, engine, fold_process, turns)
