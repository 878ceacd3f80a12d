"""Threads without a waiter: one that fails is logged and goes on, and never ends unseen."""

import threading
from collections.abc import Callable
from typing import Final

from schemas.lines import log

RESTART_SECONDS: Final = 1.0
"""Between a failure and the next try, so that a thread that fails at once does not fill the log."""


def start(name: str, work: Callable[[], None], *, restart_seconds: float = RESTART_SECONDS) -> threading.Thread:
    """Run *work* in a daemon thread called *name*, again whenever it raises, until it returns."""

    def run() -> None:
        pause = threading.Event()
        while True:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - for any error the thread's work is still to be done
                log.error("thread.failed", thread=name, kind=type(error).__name__)
                pause.wait(restart_seconds)
            else:
                return

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
