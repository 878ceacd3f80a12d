"""Deadlines for many tasks, at the cost of one timer for all of them."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

_abandoned: Final[set["asyncio.Task[Any]"]] = set()


async def within(seconds: float, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what *work* returns, or raise TimeoutError after *seconds*.

    `asyncio.timeout` waits until *work* is canceled, and the driver of PostgreSQL takes ten seconds for that where the
    server is silent. Here it is left to itself, so *work* has to release what it holds.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if task.done():
            return task.result()
        raise TimeoutError
    finally:
        if not task.done():
            _abandon(task)


def _abandon(task: "asyncio.Task[Any]") -> None:
    _abandoned.add(task)
    task.add_done_callback(_forget)
    task.cancel()


def _forget(task: "asyncio.Task[Any]") -> None:
    _abandoned.discard(task)
    if not task.cancelled():
        task.exception()  # looked at, so that asyncio does not log it


class Deadlines(Generic[Key]):
    """Calls *late* with each key that was begun and has not ended after *seconds*.

    All have the same time, so they are due in the order in which they began, and one timer waits for the first alone:
    a timer for each would cost a delivery as much as verifying it.
    """

    def __init__(self, seconds: float, late: Callable[[Key], None]) -> None:
        self._seconds = seconds
        self._late = late
        self._loop = asyncio.get_running_loop()
        self._due: dict[Key, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, key: Key) -> None:
        """Give *key* its time."""
        due = self._loop.time() + self._seconds
        self._due[key] = due
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._look)

    def end(self, key: Key) -> None:
        """Drop the deadline of *key*."""
        self._due.pop(key, None)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._due:
            key, due = next(iter(self._due.items()))
            if due > now:
                self._timer = self._loop.call_at(due, self._look)
                return
            del self._due[key]
            self._late(key)
