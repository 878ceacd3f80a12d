"""The loggers of our modules. structlog is loaded by the first line that is logged, since most commands log none."""

import logging
from collections.abc import Callable
from typing import Any, Final


class _Logger:
    """What ``structlog.get_logger()`` returns, got when a line is logged."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a method of structlog's logger
        _settle()
        import structlog

        return getattr(structlog.get_logger(), name)


log: Final[Any] = _Logger()
"""Has the methods ``debug``, ``info``, ``warning`` and ``error``, each with an event and its facts."""


class _Awaiting(logging.Handler):
    """Has logging set up at the first line of a library, and passes that line on."""

    def __init__(self, configure: Callable[[], None]) -> None:
        super().__init__()
        self.configure = configure

    def emit(self, record: logging.LogRecord) -> None:
        self.configure()
        root = logging.getLogger()
        if root.isEnabledFor(record.levelno):
            root.handle(record)


def configure_later(configure: Callable[[], None]) -> None:
    """Have *configure*, which replaces the root logger's handlers, called before the first line is logged."""
    logging.getLogger().handlers[:] = [_Awaiting(configure)]


def _settle() -> None:
    for each in logging.getLogger().handlers:
        if isinstance(each, _Awaiting):
            each.configure()
            return
