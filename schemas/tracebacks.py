"""Exceptions as they are logged: a driver's error without its message, which quotes the row that it failed at."""

import logging
import sys
import traceback

import structlog

# Their errors quote the row that a statement failed at.
_DRIVERS = {"psycopg", "sqlalchemy"}


def format_exception(
    _logger: object, _method: str, line: structlog.typing.EventDict
) -> structlog.typing.EventDict:  # fmt: skip
    """Write an exception out; where the driver has a part in it, without messages."""
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


def name_driver_errors(record: logging.LogRecord) -> bool:
    """Let a library that logs an error of the driver log the error's name only."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            type(each).__name__ if isinstance(each, BaseException) and _is_of_driver(each) else each
            for each in record.args
        )
    return True
