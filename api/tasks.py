"""Tasks of the event loop that run for good: one that fails is logged and runs again, and never ends unseen."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

RESTART_SECONDS: Final = 0.5
"""Between a failure and the next try, so that a task that fails at once does not fill the log."""

_log = structlog.get_logger()


def start(name: str, work: Callable[[], Awaitable[None]]) -> "asyncio.Task[None]":
    """Run *work* in a task called *name*, again whenever it raises, until it returns or the task is canceled."""

    async def run() -> None:
        while True:
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - in every case the task's work is still to be done
                _log.error("task.failed", task=name, kind=type(error).__name__)
                await asyncio.sleep(RESTART_SECONDS)
            else:
                return

    return asyncio.create_task(run(), name=name)
