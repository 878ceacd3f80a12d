"""The common part of all jobs at Stripe: a round through the worlds that a key serves, in slices of time.

A round of a job is leased for one world, so that two clocks, or two workers, never do it at once. An error that ends a
round is kept with the job, and stops no other world and no other job: see Note [What ended a job is kept].

Note [A window fits into a slice]
    Stripe lists the newest first, so a job that lists knows how far it has come only at the end of a window of time.
    One that does not end within the slice of its job is left between two pages, so that more urgent jobs get a turn.
    What it listed is recorded, and the next window is narrower. Windows that end in time grow again. The narrowest is
    wider than the overlap of two rounds, and is listed to its end, so that each round comes further.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final, TypeVar

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from schemas import accounts, inbox, observations
from schemas.database import BATCH, Cursor, DriverError, condition, cursor, transaction
from schemas.errors import DatabaseAway, KeyRefused, NotAnObject, NotServed, PayfoldError, StripeAway, Transient
from schemas.inbox import Delivery, Recorded
from schemas.observations import Answer, World
from schemas.settings import Settings
from schemas.stripe_api import Page, StripeApi
from worker.stripe_jobs import queue
from worker.stripe_jobs.queue import Call, JobProgress

JOB_SECONDS_MAX: Final = 5.0
"""A job ends after this and leaves the rest to its successor, so that more urgent ones get their turn."""
WINDOW_MIN: Final = timedelta(minutes=10)
THREADS: Final = 4
"""Calls to Stripe that one worker makes at once: an answer takes a quarter of a second or more."""
ATTEMPTS_MAX: Final = 12
"""After so many attempts that failed, or left a session open, a person has to look."""

Result = TypeVar("Result")

_log = structlog.get_logger()


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class JobContext:
    """The context of the jobs: the database, Stripe, the settings and the clock."""

    engine: Engine
    api: StripeApi
    settings: Settings
    now: Callable[[], datetime] = _utc_now
    threads: int = THREADS
    seconds_max: float = JOB_SECONDS_MAX
    step: Callable[[], None] = lambda: None
    """Called after each transaction, to show that the work goes on."""
    is_by_hand: bool = False
    """Whether a person started this. Then a job that Stripe has refused is tried, or the reason why not is reported."""
    _widths: "dict[tuple[str, World], timedelta]" = field(default_factory=dict, repr=False)

    def width(self, job: str, world: World, width_max: timedelta) -> timedelta:
        """Return how much time a window of *job* spans: see Note [A window fits into a slice]."""
        return min(self._widths.get((job, world), width_max), width_max)

    def narrow(self, job: str, world: World, width: timedelta) -> None:
        """Let the next window of *job* span a fourth of *width*."""
        self._widths[job, world] = max(width / 4, WINDOW_MIN)

    def widen(self, job: str, world: World, width: timedelta) -> None:
        """Let the next window of *job* span twice as much as *width*."""
        self._widths[job, world] = width * 2

    def within(self, work: Callable[[Cursor], Result]) -> Result:
        """Run *work* in one transaction and return its result; its time is limited, unless a person waits for it."""
        try:
            with (
                transaction(self.engine, None if self.is_by_hand else BATCH) as connection,
                cursor(connection) as opened,
            ):
                return work(opened)
        finally:
            self.step()

    def record(self, opened: Cursor, deliveries: Sequence[Delivery], *, all_of_them: bool = False) -> int:
        """Record the *deliveries* that are new, or *all_of_them*, and return how many events the inbox did not have."""
        fresh = deliveries if all_of_them or not deliveries else observations.news(opened, deliveries)
        return sum(receipt.recorded is Recorded.NEW for receipt in inbox.record(opened, fresh)) if fresh else 0


@dataclass(slots=True)
class JobResult:
    """The result of one round of a job, in all worlds."""

    recorded: int = 0
    failed: list[str] = field(default_factory=list)
    """The reasons for which it was stopped or put off, if any."""
    error: str = ""
    """The kind of the last error among these."""
    is_more: bool = False
    counted: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, what: str, times: int = 1, *, recorded: int = 0) -> None:
        """Count *what*, and the events that were recorded with it; several threads may."""
        with self._lock:
            self.recorded += recorded
            if what:
                self.counted[what] = self.counted.get(what, 0) + times


class TimeBudget:
    """A job's share of time."""

    def __init__(self, seconds_max: float) -> None:
        self._ends = time.monotonic() + seconds_max

    @property
    def is_over(self) -> bool:
        """Whether the job has used up its time, so that another job gets its turn."""
        return time.monotonic() > self._ends


@dataclass(frozen=True, slots=True)
class CallResult:
    """The result of a call: observations, what to count it as, and whether it is to be made again or given up."""

    deliveries: tuple[Delivery, ...] = ()
    counted: str = ""
    is_to_be_repeated: bool = False
    given_up: str = ""
    is_news: bool = False
    """Whether its observations are recorded even if their content is known, since the order of events was in doubt."""
    settling: tuple[Delivery, ...] = ()
    """Those of its observations that are recorded even if their content is known, where the others are not."""


Step = Callable[[World, JobProgress, JobResult, TimeBudget], None]


def run_job(context: JobContext, job: str, step: Step, *, worlds: Sequence[World] | None = None) -> JobResult:
    """Take *step* in each world that a key serves, and return the results."""
    found, time_left = JobResult(), TimeBudget(context.seconds_max)
    for world in served(context) if worlds is None else worlds:
        progress = _begun(context, job, world, found)
        if progress is None:
            if time_left.is_over:
                # This round waited for a lock in vain, and each of the other worlds would wait for it, too.
                break
            continue
        before, found.is_more = found.is_more, False
        try:
            _run(context, job, step, world, progress, found, time_left)
        except DatabaseAway:
            # If only this connection fell silent, the lease can still be given back by another one.
            with suppress(DatabaseAway):
                context.within(partial(queue.release, world=world, job=job))
            raise
        except Exception as error:  # noqa: BLE001 - it is kept, and the other worlds and jobs go on
            fail(context, job, world, error, found)
        found.is_more = found.is_more or before
    if found.counted or found.recorded:
        _log.info(f"stripe.{job}", recorded=found.recorded, **found.counted)
    return found


def _begun(context: JobContext, job: str, world: World, found: JobResult) -> JobProgress | None:
    """Lease a round of *job* in *world*; None if that is not possible now."""
    try:
        progress = context.within(
            partial(queue.begin, world=world, job=job, now=context.now(), though_stopped=context.is_by_hand)
        )
    except (DBAPIError, DriverError) as error:
        # The lease may be another worker's, so nothing is written about it.
        _note_failed(error, found)
        _log.error("stripe.failed", job=job, account=world.account, livemode=world.livemode, reason=reason_of(error))
        return None
    if progress is None and context.is_by_hand:
        found.failed.append(f"Another worker is doing this for {world}, or ended in the midst: try again later.")
    return progress


def _run(
    context: JobContext,
    job: str,
    step: Step,
    world: World,
    progress: JobProgress,
    found: JobResult,
    time_left: TimeBudget,
) -> None:
    try:
        step(world, progress, found, time_left)
    except (KeyRefused, NotServed) as error:
        reason = str(error)
        context.within(lambda opened: queue.stop(opened, world, job, reason, now=context.now()))
        _note_failed(error, found)
        _log.error("stripe.stopped", job=job, account=world.account, livemode=world.livemode, reason=reason)
    else:
        if found.is_more:
            context.within(lambda opened: queue.pause(opened, world, job))
        else:
            context.within(lambda opened: queue.end(opened, world, job, now=context.now()))


def fail(context: JobContext, job: str, world: World, error: Exception, found: JobResult) -> None:
    """Keep and log what ended a round of *job* in *world*."""
    reason, may_pass = reason_of(error), isinstance(error, Transient)
    _note_failed(error, found)
    if may_pass:
        _log.warning("stripe.postponed", job=job, account=world.account, livemode=world.livemode, reason=reason)
    else:
        _log.error("stripe.failed", job=job, account=world.account, livemode=world.livemode, reason=reason)
    # If PostgreSQL refuses this too, perhaps for the same reason as the round, only the log has the error.
    with suppress(DBAPIError, DriverError):
        context.within(lambda opened: queue.fail(opened, world, job, reason, now=context.now(), may_pass=may_pass))


def _note_failed(error: Exception, found: JobResult) -> None:
    found.failed.append(reason_of(error))
    found.error = condition(error)


def reason_of(error: Exception) -> str:
    """Return why something failed: our own words, else the kind of error alone, since its words could quote data."""
    return str(error) if isinstance(error, PayfoldError) else f"It failed with {condition(error)}."


def observe_each(
    page: Page, observe: Callable[[Answer], Delivery], found: JobResult, *, job: str, world: World
) -> list[Delivery]:
    """Return the result of *observe* for each object of a *page*; count and log objects that cannot be recorded."""
    seen: list[Delivery] = []
    for answer in page.objects:
        with suppress(NotAnObject):
            seen.append(observe(answer))
    note_unreadable(len(page.items) - len(seen), found, job=job, world=world)
    return seen


def note_unreadable(times: int, found: JobResult, *, job: str, world: World) -> None:
    """Count and log how many items of a page lack an id, or another value that recording needs."""
    if times:
        found.count("unreadable", times)
        _log.warning("stripe.unreadable", job=job, account=world.account, livemode=world.livemode, items=times)


def served(context: JobContext) -> list[World]:
    """Return the worlds that a key serves: those of the keys themselves, and connected accounts that are known."""
    if context.api.is_idle:
        return []
    known = known_worlds(context)
    return sorted({*context.api.own_worlds(), *(world for world in known if context.api.serves(world))}, key=str)


def known_worlds(context: JobContext) -> list[World]:
    """Return the worlds of the inbox, and load the newest names of their accounts."""
    known, names = context.within(lambda opened: (queue.worlds(opened), accounts.names(opened)))
    context.api.learn(names)
    return known


def unserved(context: JobContext) -> list[World]:
    """Return the worlds of the inbox that no key serves."""
    return [world for world in known_worlds(context) if not context.api.serves(world)]


def work_off(
    context: JobContext,
    world: World,
    purposes: Sequence[str],
    make: Callable[[Call], CallResult],
    found: JobResult,
    time_left: TimeBudget,
) -> None:
    """Make the calls of *purposes* that are due, several at once, until none is left or the slice is over.

    The result of a call is recorded, and the call removed from the queue, in one transaction.

    Raises:
        KeyRefused, NotServed, Transient: the first that a call met; this call, and those not begun, are made later.
    """
    faults: list[Exception] = []

    def work() -> None:
        while not faults:
            taken = context.within(lambda opened: queue.lease(opened, world, purposes, limit=1, now=context.now()))
            if not taken:
                return
            try:
                _make_or_put_off(context, taken[0], make, found)
            except Exception as error:  # noqa: BLE001 - raised again once all threads have ended
                faults.append(error)
            if time_left.is_over:
                found.is_more = True
                return

    if context.threads == 1:
        work()
    else:
        with ThreadPoolExecutor(context.threads, thread_name_prefix="stripe") as pool:
            for future in [pool.submit(work) for _ in range(context.threads)]:
                future.result()
    if faults:
        raise faults[0]


def _make_or_put_off(context: JobContext, call: Call, make: Callable[[Call], CallResult], found: JobResult) -> None:
    """Make a *call*; if it fails by a fault of ours it is tried again later, and holds up no other call."""
    try:
        _make(context, call, make, found)
    except (KeyRefused, NotServed, Transient):
        raise
    except Exception as error:  # noqa: BLE001 - one call's, which is logged and kept with it
        reason = reason_of(error)
        _log.error("stripe.call_failed", purpose=call.purpose, object_id=call.object_id, reason=reason)
        given_up = reason if call.attempts + 1 >= ATTEMPTS_MAX else ""
        _conclude(context, call, CallResult(counted="failed", is_to_be_repeated=True, given_up=given_up), found)


def _make(context: JobContext, call: Call, make: Callable[[Call], CallResult], found: JobResult) -> None:
    try:
        made = make(call)
    except StripeAway as error:
        _log.warning("stripe.call_postponed", purpose=call.purpose, object_id=call.object_id, reason=str(error))
        found.count("postponed")
        context.within(lambda opened: queue.put_off(opened, call, now=context.now(), is_known=False))
        return
    except (KeyRefused, NotServed, Transient):
        context.within(lambda opened: queue.put_off(opened, call, now=context.now(), is_known=True))
        raise
    _conclude(context, call, made, found)


def _conclude(context: JobContext, call: Call, made: CallResult, found: JobResult) -> None:
    """Record the result of a call, and remove the call, put it off or give it up."""

    def conclude(opened: Cursor) -> int:
        recorded = context.record(opened, made.settling, all_of_them=True)
        recorded += context.record(opened, made.deliveries, all_of_them=made.is_news)
        if made.given_up:
            queue.give_up(opened, call, made.given_up)
        elif made.is_to_be_repeated:
            queue.put_off(opened, call, now=context.now(), is_known=False)
        else:
            queue.done(opened, call)
        return recorded

    found.count(made.counted, recorded=context.within(conclude))
