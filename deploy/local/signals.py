"""Requests to stop, by SIGINT, SIGTERM or SIGHUP, of commands that run until they are stopped."""

import asyncio
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn, TypeVar

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DROPPED_SECONDS: Final = 0.01
"""After this a request to stop that was dropped within a finalizer is repeated."""

Result = TypeVar("Result")


@contextmanager
def stop_on_signal() -> Iterator[None]:
    """Raise KeyboardInterrupt here at the first SIGINT, SIGTERM or SIGHUP; later ones do not disturb the shutdown.

    Where Python drops what a signal handler raises, since it ran within a finalizer, it is raised again after that.
    """
    is_stopping = False

    def stop(*_: object) -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            raise KeyboardInterrupt

    def repeat_if_dropped(dropped: "sys.UnraisableHookArgs") -> None:
        nonlocal is_stopping
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            hook(dropped)
            return
        is_stopping = False
        signal.setitimer(signal.ITIMER_REAL, DROPPED_SECONDS)

    hook = sys.unraisablehook
    with _handlers_restored():
        for each in STOP_SIGNALS:
            signal.signal(each, stop)
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        sys.unraisablehook = repeat_if_dropped
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = hook


def end_in_peace() -> None:
    """Within ``stop_on_signal``, ignore signals from here on, so that the shutdown is not disturbed."""
    for each in STOP_SIGNALS:
        signal.signal(each, lambda *_: None)


def wait_for_signal() -> NoReturn:
    """Sleep until ``stop_on_signal`` raises KeyboardInterrupt."""
    while True:
        signal.pause()


def run_until_signal(work: Coroutine[Any, Any, Result]) -> Result:
    """Run *work* in an event loop of its own and return its result; ``stop_on_signal`` ends it too.

    Raises:
        KeyboardInterrupt: a signal asked for a stop, and *work* was cancelled.
    """
    import uvloop  # noqa: PLC0415 - a command without an event loop starts sooner without it

    async def cancellable() -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.create_task(work)
        for each in STOP_SIGNALS:
            loop.add_signal_handler(each, task.cancel)
        return await task

    # A handler that raises may run within a callback of a transport, where the loop swallows the error.
    with suppress(asyncio.CancelledError), _handlers_restored():
        return uvloop.run(cancellable())
    signal.raise_signal(signal.SIGINT)
    raise KeyboardInterrupt


@contextmanager
def _handlers_restored() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in (*STOP_SIGNALS, signal.SIGALRM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
