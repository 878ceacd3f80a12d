"""What the worker's and the clock's process have in common: settings, logs, and a schema to work on."""

import sys
from collections.abc import Callable
from typing import NoReturn

from celery import Celery
from celery.signals import setup_logging

from schemas import logs
from schemas.errors import ConfigurationError
from schemas.settings import Settings
from worker import app


def run(start: Callable[[Celery, Settings], object]) -> NoReturn:
    """Make the application and hand it to *start*; a setting that cannot be used ends the process with 2."""
    try:
        settings = Settings.load()
        logs.configure(settings)
        application = app.create(settings)
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)

    @setup_logging.connect(weak=False)
    def _keep_ours(**_: object) -> None:
        """Celery sets up logging of its own unless somebody else does."""

    start(application, settings)
    sys.exit(0)
