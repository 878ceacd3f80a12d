"""One structured line per unit of work, on standard error.

Whoever logs gives names, counts and reasons; never a payload, a secret or anything about a buyer.
"""

import logging
import sys

import structlog

from schemas import tracebacks
from schemas.settings import Settings

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(settings: Settings) -> None:
    """Send our lines, and those of the libraries, through one set of processors."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.payfold_log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    level = _LEVELS[settings.payfold_log_level]
    structlog.configure(
        processors=[*shared, tracebacks.format_exception, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Looked up at each line: whoever replaces stderr, as a test does, gets what is written from then on.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                tracebacks.format_exception,
                renderer,
            ],
        )
    )
    handler.addFilter(tracebacks.name_driver_errors)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries speak of their own affairs; only their warnings concern who runs Payfold.
    root.setLevel(max(level, logging.WARNING))
