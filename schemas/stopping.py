"""Ends this process in time: after the request to stop, even if a thread is blocked, and after its parent's end."""

import ctypes
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import structlog

from schemas import background, database

SHUT_DOWN_SECONDS: Final = 20.0
"""After the request to stop, every connection to PostgreSQL that is in use is shut down."""
END_SECONDS: Final = 28.0
"""After the request to stop, the process ends: it would be killed two seconds later."""
LINE_SECONDS_MAX: Final = 0.5
"""How long a log line may take: the reader of our log may have stopped reading."""
PARENT_SECONDS: Final = 1.0
_PR_SET_PDEATHSIG: Final = 1
_Handler = Callable[[int, FrameType | None], Any]

_log = structlog.get_logger()
_requests = itertools.count()
_is_asked = False


def has_begun() -> bool:
    """Return whether this process was asked to stop."""
    return _is_asked


def begin(*, shut_down_seconds: float = SHUT_DOWN_SECONDS, end_seconds: float = END_SECONDS) -> None:
    """Bound the time that this process takes to stop, from now on; a second call changes nothing.

    The connections in use are shut down after *shut_down_seconds*, so that a thread that waits for one gets
    ``DatabaseAway`` and can finish. A process that still runs after *end_seconds* ends at once, with 1 and one line.
    May be called from a signal handler.
    """
    global _is_asked  # noqa: PLW0603 - a process is asked once
    # A lock might be held by the very code that the signal interrupts; a count needs none.
    if next(_requests) > 0:
        return
    _is_asked = True
    asked_at = time.monotonic()

    def bound() -> None:
        _sleep_until(asked_at + shut_down_seconds)
        if connections := database.shut_down_connections():
            _write("process.connections_shut_down", connections=connections)
        _sleep_until(asked_at + end_seconds)
        _write("process.stop_overdue", seconds=end_seconds)
        os._exit(1)

    background.start("stopping", bound)


def begin_at_sigterm(*, shut_down_seconds: float = SHUT_DOWN_SECONDS, end_seconds: float = END_SECONDS) -> None:
    """Call `begin` at SIGTERM and SIGINT, before their present handlers; to be called from the main thread.

    A signal without a handler of Python's ends the process anyway, and stays as it is.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        present = signal.getsignal(number)
        if not callable(present):
            continue

        def handle(signum: int, frame: FrameType | None, present: _Handler = present) -> None:
            begin(shut_down_seconds=shut_down_seconds, end_seconds=end_seconds)
            present(signum, frame)

        signal.signal(number, handle)


def begin_with_end_of(parent: int, *, by: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal when *parent*, the process that started it, has ended in any way.

    Linux sends the signal itself, at the death of the thread that started this process; elsewhere a thread looks.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(by))
        # Before the call above nothing would have been sent.
        if os.getppid() != parent:
            os.kill(os.getpid(), by)
    else:
        background.start("parent", lambda: _wait_for_end_of(parent, by))


def _wait_for_end_of(parent: int, by: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), by)


def _sleep_until(moment: float) -> None:
    while (seconds := moment - time.monotonic()) > 0:
        time.sleep(seconds)


def _write(event: str, **facts: object) -> None:
    """Log a line, or give up after a moment."""
    line = threading.Thread(target=_log.error, args=(event,), kwargs=facts, daemon=True)
    line.start()
    line.join(LINE_SECONDS_MAX)


def _forget_requests() -> None:
    global _requests, _is_asked
    _requests, _is_asked = itertools.count(), False


os.register_at_fork(after_in_child=_forget_requests)
