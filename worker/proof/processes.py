"""Divides tasks among processes of this command.

Note [Processes are forked where that is safe]
    A forked process has all modules and shares their memory, and starts a hundred times as quickly as one that imports
    them. But a thread of the parent may hold a lock, which no one would release in the child. So a process with other
    threads (a progress bar in a terminal has one) starts a server first, which has none, and which forks. The thread
    that watches connections does no harm: a fork finds it at rest. A child inherits connections and uses none of them:
    it opens its own, and ends without closing what it inherited.

Note [The collector of cycles rests]
    A task makes hundreds of thousands of objects, and none of them in a cycle. The collector would look through all of
    them each time that their number has grown by a quarter, which takes a third of the processor time. So it rests
    while a task runs. What a task has made is gone at its end, so memory stays bounded.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Final, TypeVar

from schemas import database
from schemas.errors import PayfoldError

PROCESSES_MAX: Final = 64
"""More would only wait for PostgreSQL, and each needs a connection."""
USUAL_MAX: Final = 8
"""As many as are begun unasked: the live processes need connections as well."""

Part = TypeVar("Part")
Result = TypeVar("Result")


class ProcessLost(PayfoldError):
    """A process that did a part of the work was killed, as if memory ran out. Nothing has changed: run it again."""


def cores() -> int:
    """Return how many processes are begun where no number is given: one for each core that this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(found, _quota(), USUAL_MAX))


def _quota() -> int:
    """Return how many cores a container may use, or more than there are."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return PROCESSES_MAX if quota == "max" else int(quota) // int(period)
    except (OSError, ValueError):
        return PROCESSES_MAX


class _Here(Executor):
    """An executor that runs each task immediately, in this process."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":  # noqa: ANN401 - as its parent
        done: Future[Any] = Future()
        done.set_result(work(*arguments, **named))
        return done


class Crew:
    """A number of processes, 1 being this one, that do what they are given."""

    def __init__(self, executor: Executor, count: int) -> None:
        self.count = count
        self._executor = executor

    def each(self, work: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
        """Yield the result of *work* for each of *parts*, in their order; only a few parts are begun in advance."""
        waiting: list[Future[Result]] = []
        for part in parts:
            waiting.append(self.begin(work, part))
            if len(waiting) > self.count + 1:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()

    def begin(self, work: Callable[[Part], Result], part: Part) -> "Future[Result]":
        """Begin *work* on *part*, after all that was begun before."""
        return self._executor.submit(_at_rest, work, part)


@contextmanager
def crew(count: int, begin: Callable[..., None], *arguments: object) -> Iterator[Crew]:
    """Yield *count* processes, each of which has called *begin* with *arguments*. They end with the block.

    Raises:
        ProcessLost: one of the processes has ended before.
    """
    if count == 1:
        begin(*arguments)
        yield Crew(_Here(), 1)
        return
    started, others = partial(_begin, begin, *arguments), set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, mp_context=_context(begin.__module__), initializer=started) as pool:
        try:
            yield Crew(pool, count)
        except BrokenProcessPool:
            raise ProcessLost from None
        except BaseException as error:
            if not isinstance(error, Exception):
                # Ctrl-C does not wait for an index. PostgreSQL finds out by itself that no one waits for it any more.
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _context(module: str) -> BaseContext:
    """See Note [Processes are forked where that is safe]. *module* is what the processes need."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    if database.may_fork():
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _begin(begin: Callable[..., None], *arguments: object) -> None:
    # Ctrl-C reaches the parent as well, which ends the work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what the parent had made lives as long as this process
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # type: ignore[func-returns-value]  # it ends
    begin(*arguments)


def _at_rest(work: Callable[..., Result], /, *arguments: Any, **named: Any) -> Result:  # noqa: ANN401 - those of any work
    """Do *work* while the collector of cycles rests."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return work(*arguments, **named)
    finally:
        if was_on:
            gc.enable()
