"""Folding in two processes at once, where there is more to fold than one batch.

Note [Each lane has objects of its own]
    A session is opened and paid within minutes, so that two batches in a row speak of the same objects, and the second
    would wait for the locks of the first. So what is pending is dealt by its object. Lanes are processes: two threads
    would wait for each other's turn of the interpreter, which takes half of the time that a batch takes.

Note [A silent lane is replaced]
    A lane reports each batch, and a batch is bounded, so one that reports nothing for longer hangs: it is killed, and
    the next backlog starts another. What it had claimed is pending again, since its transaction ends with it.
"""

import gc
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from typing import Final, Literal

import structlog
from msgspec import Struct
from sqlalchemy import Engine

from schemas import database, logs, stopping
from schemas.database import Bounds
from schemas.settings import Settings
from worker.folding import projection
from worker.folding.claim import Share
from worker.folding.projection import Apart

LANES: Final = 2
"""Batches that are folded at once; two processors have no use for more."""
YOUNG_OBJECTS_MAX: Final = 50_000
"""New objects at which the collector looks for cycles; a batch makes about as many, and none of them is in one."""

REPORT_SECONDS_MAX: Final = 30.0
"""For so long a lane is waited for: a batch is over before, even on a database that is silent."""
CLOSE_SECONDS_MAX: Final = 5.0
"""For so long a lane may go on with its batch when its parent ends; then it is killed."""

Start = Literal["fork", "spawn"]
"""How a process begins: a fork shares memory with its parent, which may have no threads then."""

_log = structlog.get_logger()


def settle_down() -> None:
    """Leave what this process has loaded to no collector of cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, 20, 20)


class Order(Struct, frozen=True):
    """What a lane is to fold: of one *share* or all, until a time of the monotonic clock, each batch within *bounds*.

    It is *now* at the time of folding unless another time is given.
    """

    share: Share | None = None
    until: float = math.inf
    now: datetime | None = None
    bounds: Bounds | None = None


class Report(Struct, frozen=True):
    """What a lane folded since its last report, and whether it *is_done* with its order."""

    folded: int
    is_done: bool


def fold(
    engine: Engine,
    *,
    until: float = math.inf,
    now: datetime | None = None,
    beside: "Lane | None" = None,
    apart: Apart | None = None,
    bounds: Bounds | None = None,
    step: Callable[[], None] = lambda: None,
) -> int:
    """Fold batches until nothing is pending, or *until* a time of the monotonic clock; return how many events.

    A backlog is shared with the lane *beside*; what that does already counts as well. What is left of a batch that
    failed is kept in *apart*, for a process that folds again. *step* is called after each batch of either.

    Raises:
        Transient: PostgreSQL does not answer, or not within *bounds*; what is folded until then is saved.
    """
    parts: Apart = deque() if apart is None else apart
    folded = projection.run_once(engine, now=now or datetime.now(UTC), apart=parts, bounds=bounds)
    is_shared = beside is not None and (beside.is_folding or folded == projection.FOLD_BATCH_MAX)
    if beside is not None and is_shared:
        # A message for a few events is done after one batch; behind a full one there is more.
        if folded == projection.FOLD_BATCH_MAX:
            beside.begin(Order(Share(1, LANES), until, now, bounds))
        try:
            folded += _run(engine, Order(Share(0, LANES), until, now, bounds), parts, step, beside.listen)
        except BaseException:
            beside.stop()
            raise
        folded += beside.end(step)
    # Of both shares, and whatever the lane could not do.
    is_more = folded or is_shared or parts
    return folded + (_run(engine, Order(None, until, now, bounds), parts, step) if is_more else 0)


def _run(
    engine: Engine,
    order: Order,
    apart: Apart,
    step: Callable[[], None] = lambda: None,
    report: Callable[[int], None] = lambda _: None,
    is_over: Callable[[], bool] = lambda: False,
) -> int:
    folded = 0
    while time.monotonic() < order.until and not is_over():
        batch = projection.run_once(
            engine, now=order.now or datetime.now(UTC), share=order.share, apart=apart, bounds=order.bounds
        )
        step()
        report(batch)
        if not batch and not apart:
            break
        folded += batch
    return folded


class Lane:
    """Another process that folds when it is told to, and ends with this one.

    It begins when it is started, or when there is first something to do. Should it end before, a new one takes its
    place; what it had claimed is pending again.
    """

    def __init__(self, database_url: str, *, report_seconds_max: float = REPORT_SECONDS_MAX) -> None:
        self._url = database_url
        self._report_seconds_max = report_seconds_max
        self._process: multiprocessing.process.BaseProcess | None = None
        self._line: Connection[Order, Report] | None = None
        self._orders = 0
        self._folded = 0

    def start(self, how: Start = "spawn") -> None:
        """Begin the process, unless it is there."""
        if self._process is not None:
            return
        context: ForkContext | SpawnContext = (
            multiprocessing.get_context("fork") if how == "fork" else multiprocessing.get_context("spawn")
        )
        ours, theirs = context.Pipe()
        # Not a daemon's, which multiprocessing would stop in the midst of a batch; it ends as the line does.
        inherited = ours if how == "fork" else None
        process = context.Process(target=_serve, args=(self._url, os.getpid(), theirs, inherited), name="lane")
        process.start()
        theirs.close()
        self._process, self._line = process, ours

    def begin(self, order: Order) -> None:
        """Let it fold; what it was told before it does no more, after the batch at hand.

        Where no process can be had nothing is begun.
        """
        for _ in range(2):
            try:
                self.start()
                assert self._line is not None, "a process that runs has a line"  # noqa: S101 - for the types alone
                self._line.send(order)
            except OSError as error:
                self._lose(error)
            else:
                self._orders += 1
                return

    @property
    def is_folding(self) -> bool:
        """Whether it has something to do still."""
        self.listen()
        return self._orders > 0

    def listen(self, _: int = 0) -> None:
        """Take its reports, of which there is room for some thousand, without waiting for more."""
        while self._orders and self._line is not None and self._line.poll():
            self._hear()

    def end(self, step: Callable[[], None] = lambda: None) -> int:
        """Wait until it has done what it was told, and return how many events it has folded since the last time.

        What it failed at is pending still, and fails again when it is folded here. *step* is called at each report.
        """
        while self._orders:
            self._hear()
            step()
        folded, self._folded = self._folded, 0
        return folded

    def _hear(self) -> None:
        assert self._line is not None, "who has orders has a line"  # noqa: S101 - for the types alone
        try:
            if not self._line.poll(self._report_seconds_max):
                raise TimeoutError
            report = self._line.recv()
        except (EOFError, OSError) as error:
            self._lose(error)
            return
        self._folded += report.folded
        self._orders -= report.is_done

    def stop(self) -> None:
        """Wait for the batch at hand, and let it do no more."""
        if self.is_folding:
            self.begin(Order(until=-math.inf))
            self.end()

    def _lose(self, error: Exception) -> None:
        process = self._process
        if process is not None:
            process.kill()
        self.close()
        _log.error("lane.ended", reason=type(error).__name__, exitcode=None if process is None else process.exitcode)

    def close(self) -> None:
        """Let the process end after the batch at hand, or kill it if that takes long."""
        if self._process is not None and self._line is not None:
            self._line.close()
            self._process.join(CLOSE_SECONDS_MAX)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process, self._line, self._orders = None, None, 0


def _serve(
    database_url: str,
    parent: int,
    line: "Connection[Report, Order]",
    inherited: "Connection[Order, Report] | None",
) -> None:
    """Do what comes over *line*, until its other end is gone; a copy of that is *inherited* by a fork."""
    # The parent is asked to stop as well, and then closes the line.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    stopping.begin_with_end_of(parent, by=signal.SIGKILL)
    if inherited is None:
        logs.configure(Settings.load())
        settle_down()
    else:
        inherited.close()
    engine = database.engine(database_url, connections_max=1)
    apart: Apart = deque()

    def report(folded: int) -> None:
        line.send(Report(folded, is_done=False))

    with suppress(EOFError, OSError):
        while True:
            order = line.recv()
            try:
                # Another order, or the end of the line, comes before what is left of this one.
                _run(engine, order, apart, report=report, is_over=line.poll)
            except Exception as error:  # noqa: BLE001 - the parent meets it as well, and logs what it is
                _log.warning("lane.failed", kind=database.condition(error))
            # A connection that nobody uses may be gone by the next backlog, and counts where they are few.
            engine.dispose()
            line.send(Report(0, is_done=True))
