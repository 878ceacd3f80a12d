"""One job at a time in a process, begun by a message or by the process's own timer.

Note [What a job raises is logged by its name]
    A driver's message quotes the row that it failed at, and Celery logs what a task raises with its message and its
    traceback. So no job raises: what went wrong is one line with the name of the error and the place in our code.
"""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import structlog

from schemas import database
from schemas.broker import short_name
from schemas.errors import DatabaseAway, Transient
from schemas.heartbeats import BEAT_SECONDS, OK, RUNNING, Beat

REPEAT_SECONDS: Final = 60.0
"""After which a job that goes on failing in the same way is logged again."""
_OURS: Final = ("api", "deploy", "schemas", "worker")

_log = structlog.get_logger()


class Periodic(NamedTuple):
    """A job and every how many seconds it is to be done."""

    job: str
    every: float


class Ended(NamedTuple):
    """When a job ended, by the monotonic clock, and its outcome: ok, or the kind of error."""

    at: float
    outcome: str


class Turns:
    """The jobs of a process and the one lock under which each of them works."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: dict[str, Callable[[], int]] = {}
        self._began_at: dict[str, float] = {}
        self._ends: dict[str, Ended] = {}
        self._at_work: str | None = None
        self._outcome = OK
        self._tasks = 0
        self._troubles = _Troubles()
        self.heard_at = self.stepped_at = time.monotonic()
        """When the last message came or its work ended, and when a job last came further, by the monotonic clock."""
        self.outcome_changed: Callable[[], None] = lambda: None
        """Called when a job ends otherwise than the time before."""

    def add(self, job: str, work: Callable[[], int]) -> None:
        """Let *job* be done by *work*, which returns how much it did."""
        self._works[job] = work

    @property
    def has_task(self) -> bool:
        """Whether a message is worked at, or waits for the timer's work."""
        return self._tasks > 0

    @property
    def is_at_work(self) -> bool:
        """Whether a job is being done, by a message or by the timer."""
        return self._at_work is not None

    def began_at(self, job: str) -> float:
        """Return when *job* last began, by the monotonic clock; long ago where it never did."""
        return self._began_at.get(job, float("-inf"))

    def step(self) -> None:
        """Note that the job at work comes further; its threads may call it as often as they like."""
        self.stepped_at = time.monotonic()

    def fail(self, outcome: str) -> None:
        """Let the job at work, which goes on and raises nothing, end with *outcome*."""
        self._outcome = outcome

    def seen_at(self, *jobs: str) -> float:
        """Return when one of *jobs* last ended, or came further, by the monotonic clock; long ago where none did."""
        ends = [ended.at for job in jobs if (ended := self._ends.get(job)) is not None]
        return max([*ends, self.stepped_at if self._at_work in jobs else float("-inf")])

    def beats(self) -> Iterator[Beat]:
        """Return the heartbeat of each job: how it last ended, or that it has been at work for some time."""
        running, stepped_at = self._at_work, self.stepped_at
        if running is not None and time.monotonic() - self.began_at(running) < BEAT_SECONDS:
            running = None
        if running is not None:
            yield Beat("job", short_name(running), stepped_at, RUNNING)
        for job, ended in tuple(self._ends.items()):
            if job != running:
                yield Beat("job", short_name(job), ended.at, ended.outcome)

    def by_message(self, job: str) -> int:
        """Do *job* because a message asks for it, and return how much it did: 0 where it failed."""
        self.heard_at = time.monotonic()
        self._tasks += 1
        try:
            with self._lock:
                return self._do(job)
        finally:
            self._tasks -= 1
            self.heard_at = time.monotonic()

    def by_timer(self, job: str) -> int:
        """Do *job* because no message asks for it, unless something is being done."""
        if not self._lock.acquire(blocking=False):
            return 0
        try:
            return self._do(job)
        finally:
            self._lock.release()

    def _do(self, job: str) -> int:
        self._began_at[job] = self.stepped_at = time.monotonic()
        self._at_work, self._outcome = job, OK
        try:
            done = self._works[job]()
        except Exception as error:  # noqa: BLE001 - see Note [What a job raises is logged by its name]
            self._troubles.note(job, error)
            self._end(job, database.condition(error))
            return 0
        self._troubles.forget(job)
        self._end(job, self._outcome)
        return done

    def _end(self, job: str, outcome: str) -> None:
        before = self._ends.get(job, Ended(0, OK)).outcome
        self._ends[job] = Ended(time.monotonic(), outcome)
        self._at_work = None
        if outcome != before:
            self.outcome_changed()


class _Troubles:
    """What is wrong with the jobs of a process: logged when it begins, each minute that it goes on, and at its end."""

    def __init__(self) -> None:
        self._is_away = False
        self._failing: dict[str, tuple[str, float, int]] = {}

    def note(self, job: str, error: Exception) -> None:
        if isinstance(error, DatabaseAway):
            if not self._is_away:
                self._is_away = True
                _log.warning("database.away", job=job, reason=database.condition(error.__cause__ or error))
            return
        kind, now = database.condition(error), time.monotonic()
        before, logged_at, times = self._failing.get(job, ("", float("-inf"), 0))
        if before != kind:
            logged_at, times = float("-inf"), 0
        times += 1
        if now - logged_at >= REPEAT_SECONDS:
            facts = {"job": job, "kind": kind, "where": _place(error), "times": times}
            # What another transaction holds, or what takes too long just now, is there at the next message.
            is_for_now = isinstance(error, Transient) or database.is_busy(error)
            _log.warning("job.postponed", **facts) if is_for_now else _log.error("job.failed", **facts)
            logged_at = now
        self._failing[job] = (kind, logged_at, times)

    def forget(self, job: str) -> None:
        if self._is_away:
            self._is_away = False
            _log.info("database.back", job=job)
        if self._failing.pop(job, None) is not None:
            _log.info("job.recovered", job=job)


def _place(error: Exception) -> str:
    """Return the line of ours where *error* was raised, or passed; that of the door to PostgreSQL says nothing."""
    frames = [(frame.f_globals.get("__name__", ""), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    passed = [(module, line) for module, line in frames if module.partition(".")[0] in _OURS]
    ours = [f"{module}:{line}" for module, line in passed if module != database.__name__]
    return ours[-1] if ours else "?"
