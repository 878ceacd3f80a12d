"""One structured line per unit of work, on standard error.

Whoever logs gives names, counts and reasons; never a payload, a secret or anything about a buyer.
"""

import logging
import sys
import traceback

import structlog

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
        processors=[*shared, _format_exception, renderer],
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
                _format_exception,
                renderer,
            ],
        )
    )
    handler.addFilter(_name_driver_errors)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries speak of their own affairs; only their warnings concern who runs Payfold.
    root.setLevel(max(level, logging.WARNING))


# Whose errors quote the row that a statement failed at.
_DRIVERS = {"psycopg", "sqlalchemy"}


def _format_exception(
    _logger: object, _method: str, line: structlog.typing.EventDict
) -> structlog.typing.EventDict:  # fmt: skip
    """Write an exception out; where the driver has a part in it, without anybody's words."""
    given = line.pop("exc_info", None)
    error = given[1] if isinstance(given, tuple) else given if isinstance(given, BaseException) else sys.exc_info()[1]
    if given and error is not None:
        line["exception"] = "".join(_described(error)).rstrip()
    return line


def _described(error: BaseException) -> list[str]:
    if not _is_of_driver(error):
        return traceback.format_exception(error)
    described = []
    for each in _chain(error):
        described += [*traceback.format_tb(each.__traceback__), f"{type(each).__module__}.{type(each).__qualname__}\n"]
    return described


def _chain(error: BaseException) -> list[BaseException]:
    """Return *error* and what it came of, the first first."""
    found: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in found:
        found.insert(0, each)
        each = each.__cause__ or each.__context__
    return found


def _is_of_driver(error: BaseException) -> bool:
    return any(
        type(each).__module__.partition(".")[0] in _DRIVERS
        or (isinstance(each, BaseExceptionGroup) and any(map(_is_of_driver, each.exceptions)))
        for each in _chain(error)
    )


def _name_driver_errors(record: logging.LogRecord) -> bool:
    """Let a library that logs an error of the driver log the error's name only."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            type(each).__name__ if isinstance(each, BaseException) and _is_of_driver(each) else each
            for each in record.args
        )
    return True
