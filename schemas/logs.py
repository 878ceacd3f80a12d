"""One structured line per unit of work, on standard error.

A line holds names, counts and reasons; never a payload, a secret or anything about a buyer.

Note [Logging never stops work]
    A disk fills, a reader of the log goes away or stops reading, a program closes standard error. None of that is the
    fault of the work that is logged, so no log call raises, and none waits for long: a line that cannot be written is
    counted, and the count is logged once lines can be written again.
"""

import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TextIO

import structlog

from schemas import tracebacks
from schemas.settings import Settings, unknown

WRITE_SECONDS_MAX: Final = 1.0
"""How long a line waits for a reader that is slow. After one that did not come back in time no line waits."""
SELDOM_SECONDS: Final = 1.0

_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Seldom:
    """Lets one line a second of each kind through, for lines that a stranger can cause as often as he likes."""

    def __init__(self, seconds: float = SELDOM_SECONDS, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._now = now
        self._next: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def left_out(self, kind: str) -> int | None:
        """Return how many lines of *kind* were left out since the last one; None where this one is left out too."""
        now = self._now()
        if now < self._next.get(kind, now):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return None
        self._next[kind] = now + self._seconds
        return self._left_out.pop(kind, 0)

    def warning(self, event: str, **facts: str | int) -> None:
        """Log a warning, or leave it out; *facts* are part of its kind, so they must be few."""
        left_out = self.left_out(f"{event} {facts}")
        if left_out is not None:
            structlog.get_logger().warning(event, **facts, left_out=left_out)

    def error(self, event: str, **facts: str | int) -> None:
        """Log an error, or leave it out, likewise."""
        left_out = self.left_out(f"{event} {facts}")
        if left_out is not None:
            structlog.get_logger().error(event, **facts, left_out=left_out)


class _StandardError:
    """Standard error as a place for lines, which takes them or loses them, and never raises."""

    def __init__(self) -> None:
        # A signal may interrupt the thread that writes, and its handler may log.
        self._lock = threading.RLock()
        self._lost = 0
        self._is_torn = False
        self._seconds = WRITE_SECONDS_MAX

    def write(self, line: str) -> None:
        """Write *line* and its end, if that is possible soon."""
        if not self._lock.acquire(timeout=WRITE_SECONDS_MAX):
            self._lost += 1
            return
        lost = 0
        try:
            # Looked up at each line: a test may replace it.
            self._put(sys.stderr, f"\n{line}\n" if self._is_torn else f"{line}\n")
            lost, self._lost = self._lost, 0
        except Exception:  # noqa: BLE001 - there is no place left to report it to, see Note [Logging never stops work]
            self._lost += 1
        finally:
            self._lock.release()
        if lost:
            structlog.get_logger().error("log.lines_lost", lines=lost)

    debug = info = warning = error = critical = exception = write

    def _put(self, stream: TextIO, text: str) -> None:
        try:
            descriptor = stream.fileno()
        except OSError:
            stream.write(text)  # to memory
            return
        # Past the stream's buffer, which would keep what cannot be written, and fail again at the process's end.
        left = text.encode(stream.encoding, "backslashreplace")
        while left:
            self._wait_for_room(descriptor)
            # A pipe that has room takes up to PIPE_BUF bytes without waiting.
            left = left[os.write(descriptor, left[: select.PIPE_BUF]) :]
            self._is_torn = bool(left)

    def _wait_for_room(self, descriptor: int) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if not poll.poll(self._seconds * 1000):
            self._seconds = 0.0
            raise TimeoutError
        self._seconds = WRITE_SECONDS_MAX


_standard_error = _StandardError()
# A forked process has none of the threads that might hold the lock.
os.register_at_fork(after_in_child=_standard_error.__init__)  # type: ignore[misc]  # it begins afresh


class _Handler(logging.Handler):
    """Writes the lines of the libraries where ours go."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - a record that cannot be formatted is its library's fault
            line = f"a line of {record.name} could not be formatted"
        _standard_error.write(line)


def _bound_logger(level: int) -> type[Any]:
    """Return the class of our loggers: it leaves out what is less severe than *level*, and never raises."""
    filtering: Any = structlog.make_filtering_bound_logger(level)

    class Logger(filtering):  # type: ignore[misc]  # structlog makes the class at run time
        def _proxy_to_logger(self, *args: Any, **facts: Any) -> Any:  # noqa: ANN401 - as in structlog
            try:
                return super()._proxy_to_logger(*args, **facts)
            except Exception:  # noqa: BLE001 - a value that cannot be rendered is not worth the work that is logged
                _standard_error.write("a line could not be rendered")

    return Logger


_SHARED: Final[list[structlog.typing.Processor]] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def _configure_ours(renderer: structlog.typing.Processor, level: int) -> None:
    structlog.configure(
        processors=[*_SHARED, tracebacks.format_exception, renderer],
        wrapper_class=_bound_logger(level),
        logger_factory=lambda *_: _standard_error,
        cache_logger_on_first_use=False,
    )


def _is_terminal() -> bool:
    with suppress(AttributeError, ValueError):
        return sys.stderr.isatty()
    return False


def report_unknown() -> None:
    """Log the names that look like settings and are none: one error line, since an older release must still start."""
    if found := unknown():
        structlog.get_logger().error("settings.unknown", faults=found)


def configure(settings: Settings) -> None:
    """Send our lines, and those of the libraries, through one set of processors."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.payfold_log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=_is_terminal())
    )
    level = _LEVELS[settings.payfold_log_level]
    _configure_ours(renderer, level)
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*_SHARED, structlog.stdlib.add_logger_name],
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
    # Of the libraries' own lines only warnings and errors concern an operator of Payfold.
    root.setLevel(max(level, logging.WARNING))


# Lines before `configure`, and handlers that are not ours, must not raise either.
_configure_ours(structlog.processors.JSONRenderer(), logging.INFO)
logging.raiseExceptions = False
logging.lastResort = _Handler()
