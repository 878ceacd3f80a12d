"""The parent of the worker's processes: it forks them, hands signals on, and forks a new one for each that ended.

Note [The parent does nothing else]
    It has no thread, no connection and no consumer, so nothing can make it hang, and every fork begins as the first
    did. It only waits for signals, which are blocked at all other times. So no signal arrives between a fork and the
    moment at which the parent knows of the new process.
"""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

import structlog

ENDS_MAX: Final = 3
ENDS_SECONDS: Final = 600.0
"""A slot that ends ``ENDS_MAX`` times within this time ends the worker."""
STOP_SECONDS_MAX: Final = 29.0
"""Each slot ends by itself a second before this, and a platform kills a second after it."""
_STOPS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_AWAITED: Final = _STOPS | {signal.SIGCHLD, signal.SIGALRM}

_log = structlog.get_logger()


class Ends:
    """When a process that ought to run ended, within the last *seconds*."""

    def __init__(self, seconds: float = ENDS_SECONDS) -> None:
        self._seconds = seconds
        self._at: deque[float] = deque()

    def note(self) -> int:
        """Note an end now, and return how many there were lately."""
        now = time.monotonic()
        self._at.append(now)
        while self._at[0] < now - self._seconds:
            self._at.popleft()
        return len(self._at)


def ending(code: int) -> str:
    """Return how a process ended, in words; *code* is negative for a signal."""
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit {code}"


@dataclass(eq=False)
class _Slot:
    name: str
    serve: Callable[[], int]
    ends: Ends
    pid: int = 0


class Parent:
    """Keeps a process for each of *slots*, which return their exit code, until it is asked to stop."""

    def __init__(
        self,
        slots: Mapping[str, Callable[[], int]],
        *,
        ends_max: int = ENDS_MAX,
        ends_seconds: float = ENDS_SECONDS,
        stop_seconds_max: float = STOP_SECONDS_MAX,
    ) -> None:
        self._slots = [_Slot(name, serve, Ends(ends_seconds)) for name, serve in slots.items()]
        self._ends_max, self._ends_seconds, self._stop_seconds_max = ends_max, ends_seconds, stop_seconds_max
        self._is_stopping = False
        self._code = 0

    def run(self) -> int:
        """Return the worker's exit code when every slot has ended."""
        # A signal that nothing handles may be lost, though it is blocked.
        for number in (signal.SIGCHLD, signal.SIGALRM):
            signal.signal(number, lambda *_: None)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
        for slot in self._slots:
            self._fork(slot, before)
        while running := [slot for slot in self._slots if slot.pid]:
            received = signal.sigwait(_AWAITED)
            if received in _STOPS:
                self._stop()
            elif received == signal.SIGALRM:
                self._kill(running)
            for slot in running:
                self._reap(slot, before)
        return self._code

    def _fork(self, slot: _Slot, mask: set[int]) -> None:
        slot.pid = os.fork()
        if slot.pid == 0:
            _become(slot, mask)

    def _reap(self, slot: _Slot, mask: set[int]) -> None:
        found, status = os.waitpid(slot.pid, os.WNOHANG)
        if not found:
            return
        slot.pid = 0
        code = os.waitstatus_to_exitcode(status)
        if self._is_stopping:
            self._code = self._code or int(code != 0)
            return
        times = slot.ends.note()
        _log.error("worker.slot_ended", slot=slot.name, ended=ending(code), times=times)
        if times < self._ends_max:
            self._fork(slot, mask)
            return
        _log.error("worker.given_up", slot=slot.name, ends=times, within_seconds=self._ends_seconds)
        self._code = 1
        self._stop()

    def _stop(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            signal.setitimer(signal.ITIMER_REAL, self._stop_seconds_max)
        for slot in self._slots:
            if slot.pid:
                os.kill(slot.pid, signal.SIGTERM)

    def _kill(self, running: list[_Slot]) -> None:
        for slot in running:
            _log.error("worker.slot_killed", slot=slot.name, seconds=self._stop_seconds_max)
            os.kill(slot.pid, signal.SIGKILL)


def _become(slot: _Slot, mask: set[int]) -> NoReturn:
    code = 1
    try:
        for number in (signal.SIGCHLD, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        for number in _STOPS:
            signal.signal(number, lambda *_: os._exit(0))  # an exception could be dropped within a finalizer
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = slot.serve()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:  # noqa: BLE001 - the parent's frames are below, and none of them is to go on here
        _log.error("worker.slot_failed", slot=slot.name, kind=type(error).__name__)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
