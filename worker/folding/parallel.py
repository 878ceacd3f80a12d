"""Folds in two processes at once if there is more to fold than one batch.

Note [Each fold process has objects of its own]
    A session is opened and paid within minutes, so two batches in a row have events of the same objects, and the second
    would wait for the locks of the first. So pending events are divided by their objects. Threads would not do: two of
    them would wait for each other's turn of the interpreter, which takes half of the time of a batch.

Note [A silent fold process is replaced]
    A fold process reports each batch, and the time of a batch is bounded. So one that reports nothing for longer
    hangs: it is killed, and the next backlog starts another. Its claimed events are pending again, because its
    transaction ends with the process.
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
from schemas.progress import do_nothing
from schemas.settings import Settings
from worker.folding import projection
from worker.folding.claim import Shard
from worker.folding.projection import Apart

FOLD_PROCESSES: Final = 2
"""Batches that are folded at once. Two processors have no use for more."""
YOUNG_OBJECTS_MAX: Final = 250_000
"""New objects after which the collector looks for cycles. A batch has a fifth of that, and none of them in a cycle."""

REPORT_SECONDS_MAX: Final = 30.0
"""Seconds to wait for a fold process's report. A batch takes less, even on a database that does not answer."""
CLOSE_SECONDS_MAX: Final = 5.0
"""Seconds for which a fold process may go on with its batch when its parent ends. Then it is killed."""

Start = Literal["fork", "spawn"]
"""How a process begins. A fork shares memory with its parent: see ``database.may_fork``."""

_log = structlog.get_logger()


def settle_down() -> None:
    """Exempt all objects that this process has loaded from the collection of cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, 20, 20)


class FoldRequest(Struct, frozen=True):
    """A task: fold one *shard* or all, *until* a time of the monotonic clock, each batch within *bounds*.

    *now* replaces the current time in folding, if it is given.
    """

    shard: Shard | None = None
    until: float = math.inf
    now: datetime | None = None
    bounds: Bounds | None = None


class Report(Struct, frozen=True):
    """The number of events folded since the last report, and whether the fold process *is_done* with its request."""

    folded: int
    is_done: bool


def fold(
    engine: Engine,
    *,
    until: float = math.inf,
    now: datetime | None = None,
    partner: "FoldProcess | None" = None,
    apart: Apart | None = None,
    bounds: Bounds | None = None,
    step: Callable[[], None] = lambda: None,
) -> int:
    """Fold batches until nothing is pending, or *until* a time of the monotonic clock; return the number of events.

    A backlog is shared with the fold process *partner*, and the events that it folds are counted as well. The rest of
    a failed batch is kept in *apart*, for the next call in this process. *step* is called after each batch of either.

    Raises:
        Transient: PostgreSQL does not answer, or not within *bounds*. Events that were folded before stay folded.
    """
    parts: Apart = deque() if apart is None else apart
    folded = projection.run_once(engine, now=now or datetime.now(UTC), apart=parts, bounds=bounds)
    is_shared = partner is not None and (partner.is_folding or folded == projection.FOLD_BATCH_MAX)
    if partner is not None and is_shared:
        # One batch is enough for a few events. Only a full batch shows that more are pending.
        if folded == projection.FOLD_BATCH_MAX:
            partner.begin(FoldRequest(Shard(1, FOLD_PROCESSES), until, now, bounds))
        try:
            folded += _run(
                engine, FoldRequest(Shard(0, FOLD_PROCESSES), until, now, bounds), parts, step, partner.listen
            )
        except BaseException:
            partner.stop()
            raise
        folded += partner.end(step)
    # This run folds new events of both shards, and those that the fold process failed to fold.
    is_more = folded or is_shared or parts
    return folded + (_run(engine, FoldRequest(None, until, now, bounds), parts, step) if is_more else 0)


def _run(
    engine: Engine,
    request: FoldRequest,
    apart: Apart,
    step: Callable[[], None] = lambda: None,
    report: Callable[[int], None] = do_nothing,
    is_over: Callable[[], bool] = lambda: False,
) -> int:
    folded = 0
    while time.monotonic() < request.until and not is_over():
        batch = projection.run_once(
            engine, now=request.now or datetime.now(UTC), shard=request.shard, apart=apart, bounds=request.bounds
        )
        step()
        report(batch)
        if not batch and not apart:
            break
        folded += batch
    return folded


class FoldProcess:
    """Another process that folds on order, and ends with this one.

    It starts at ``start``, or at the first order. If it ends early, a new process takes its place, and the events that
    it had claimed are pending again.
    """

    def __init__(self, database_url: str, *, report_seconds_max: float = REPORT_SECONDS_MAX) -> None:
        self._url = database_url
        self._report_seconds_max = report_seconds_max
        self._process: multiprocessing.process.BaseProcess | None = None
        self._line: Connection[FoldRequest, Report] | None = None
        self._requests = 0
        self._folded = 0

    def start(self, how: Start = "spawn") -> None:
        """Start the process, unless it runs already."""
        if self._process is not None:
            return
        context: ForkContext | SpawnContext = (
            multiprocessing.get_context("fork") if how == "fork" else multiprocessing.get_context("spawn")
        )
        ours, theirs = context.Pipe()
        # It is no daemon process, which multiprocessing would stop in the middle of a batch. It ends with the line.
        inherited = ours if how == "fork" else None
        process = context.Process(target=_serve, args=(self._url, os.getpid(), theirs, inherited), name="fold process")
        process.start()
        theirs.close()
        self._process, self._line = process, ours

    def begin(self, request: FoldRequest) -> None:
        """Send *request*. The fold process drops an earlier request after its current batch.

        If no process can be started, nothing happens.
        """
        for _ in range(2):
            try:
                self.start()
                assert self._line is not None, "a process that runs has a line"  # noqa: S101 - for the types alone
                self._line.send(request)
            except OSError as error:
                self._lose(error)
            else:
                self._requests += 1
                return

    @property
    def is_folding(self) -> bool:
        """Whether it still has an order to work on."""
        self.listen()
        return self._requests > 0

    def listen(self, _: int = 0) -> None:
        """Take the reports that have arrived, without waiting. The line has room for some thousand reports."""
        while self._requests and self._line is not None and self._line.poll():
            self._hear()

    def end(self, step: Callable[[], None] = lambda: None) -> int:
        """Wait until it has done its orders, and return how many events it has folded since the last call.

        Events that it failed to fold are still pending, and fail again when this process folds them. *step* is called
        at each report.
        """
        while self._requests:
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
        self._requests -= report.is_done

    def stop(self) -> None:
        """Wait for the current batch, and let it fold no more."""
        if self.is_folding:
            self.begin(FoldRequest(until=-math.inf))
            self.end()

    def _lose(self, error: Exception) -> None:
        process = self._process
        if process is not None:
            process.kill()
        self.close()
        _log.error(
            "fold_process.ended", reason=type(error).__name__, exitcode=None if process is None else process.exitcode
        )

    def close(self) -> None:
        """Let the process end after its current batch, or kill it if that takes longer than ``CLOSE_SECONDS_MAX``."""
        if self._process is not None and self._line is not None:
            self._line.close()
            self._process.join(CLOSE_SECONDS_MAX)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process, self._line, self._requests = None, None, 0


def _serve(
    database_url: str,
    parent: int,
    line: "Connection[Report, FoldRequest]",
    inherited: "Connection[FoldRequest, Report] | None",
) -> None:
    """Carry out the orders from *line* until its other end is closed. A fork has *inherited* a copy of that end."""
    # The parent gets these signals as well, and closes the line.
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
            request = line.recv()
            try:
                # Another order, or the end of the line, ends this order early.
                _run(engine, request, apart, report=report, is_over=line.poll)
            except Exception as error:  # noqa: BLE001 - the parent meets it as well, and logs what it is
                _log.warning("fold_process.failed", kind=database.condition(error))
            # An idle connection may be dead by the next backlog, and takes up one of the few that some databases allow.
            engine.dispose()
            line.send(Report(0, is_done=True))
