"""Looks after a slot's consumer: a timer works when no message comes, and a watchdog finds a deaf consumer.

Note [The watchdog sees answers, not turns]
    A consumer that no longer asks Redis for messages looks healthy: its process runs, and its event loop turns. It is
    deaf when no task runs and Redis has not answered its BRPOP for long, although Redis answers the watchdog. First
    Celery is made to connect again. If that does not help, the process ends, and the worker's parent forks another.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, NoReturn

import structlog
from kombu.asynchronous import Hub
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from schemas import background, broker
from schemas.broker import Ear
from schemas.heartbeats import BEAT_SECONDS, Beat
from schemas.stopping import END_SECONDS, SHUT_DOWN_SECONDS
from schemas.turns import Periodic, Turns

DEAF_EXIT: Final = 75
"""The exit code with which the watchdog ends a process, so that such ends can be counted separately."""

_log = structlog.get_logger()


class Limits(NamedTuple):
    """How long the timer and the watchdog of a process wait, in seconds."""

    look: float = 1.0
    deaf: float = 30.0
    """Without an answer to a BRPOP; after twice this the process ends."""
    intervals: float = 3.0
    """This many intervals of the slot's most frequent message may pass before the timer works."""
    shut_down: float = SHUT_DOWN_SECONDS
    """After the request to stop, until its connections to PostgreSQL are shut down."""
    end: float = END_SECONDS
    """After the request to stop, until the process is ended."""
    beat: float = BEAT_SECONDS
    """Between two heartbeats."""


class Timer:
    """Does the jobs of a slot when no message has come for long."""

    def __init__(self, turns: Turns, jobs: Sequence[Periodic], *, silent_seconds: float) -> None:
        self._turns, self._jobs, self._silent_seconds = turns, jobs, silent_seconds
        self._works = False

    def look(self) -> None:
        """Do what is due, unless a message came lately."""
        silent = time.monotonic() - self._turns.heard_at
        works = silent >= self._silent_seconds
        if works != self._works:
            self._works = works
            _log.warning("timer.works", seconds=round(silent)) if works else _log.info("timer.rests")
        if works:
            for each in self._jobs:
                if time.monotonic() - self._turns.began_at(each.job) >= each.every:
                    self._turns.by_timer(each.job)


class Watchdog:
    """Finds out that the consumer of this process is deaf. See Note [The watchdog sees answers, not turns]."""

    def __init__(self, turns: Turns, ear: Ear, redis: Redis, *, deaf_seconds: float) -> None:
        self._turns, self._ear, self._redis, self._deaf_seconds = turns, ear, redis, deaf_seconds
        self._heard_at = self._began_at = time.monotonic()
        self._excused_at = float("-inf")
        self._redis_back_at: float | None = None
        self._has_reconnected = False
        self._hub: Hub | None = None

    def look(self) -> None:
        """Let a deaf consumer connect again, and end the process of one that stays deaf."""
        now = time.monotonic()
        heard_at = now if self._turns.has_task else max(self._ear.answered_at, self._turns.heard_at)
        if heard_at > self._heard_at:
            self._heard_at = heard_at
            if self._has_reconnected:
                _log.info("consumer.hears")
            self._has_reconnected = False
        # BRPOP is answered each second: Redis is asked only where something is amiss.
        if now - self._heard_at < self._deaf_seconds / 4:
            self._redis_back_at = None
            return
        if not self._is_redis_there():
            self._redis_back_at = None
            self._excused_at = time.monotonic()
            return
        if self._redis_back_at is None:
            self._redis_back_at = now
        silent = now - max(self._heard_at, self._redis_back_at)
        if silent >= 2 * self._deaf_seconds:
            self._end(silent)
        if silent >= self._deaf_seconds and not self._has_reconnected:
            self._has_reconnected = True
            _log.warning("consumer.deaf", seconds=round(silent), act="connects again")
            self._reconnect()

    def beats(self, queues: Sequence[str]) -> Iterator[Beat]:
        """Return the heartbeat of the consumer of *queues*, and that of folding.

        The consumer counts as alive when a BRPOP was answered, when its task makes progress, and while Redis is away. A
        job that the timer does at that time has to make progress too.
        """
        turns = self._turns
        excused_at = min(self._excused_at, turns.stepped_at) if turns.is_at_work else self._excused_at
        heard_at = max(self._ear.answered_at, turns.heard_at, excused_at)
        seen_at = max(heard_at, turns.stepped_at) if turns.has_task else heard_at
        if seen_at > self._began_at:
            yield from (Beat("consumer", queue, seen_at) for queue in queues)
        folded_at = turns.seen_at(broker.FOLD, broker.SWEEP)
        if folded_at > self._began_at:
            yield Beat("fold", "", folded_at)

    def attend(self, sender: Any, **_: object) -> None:  # noqa: ANN401 - Celery's consumer, once it is ready
        """Remember the consumer: its event loop stays the same however often it connects."""
        self._hub = sender.hub

    def _reconnect(self) -> None:
        # Without a loop the consumer has not connected yet, and is trying to.
        if self._hub is not None:
            self._hub.call_soon(_lose_connection)

    def _is_redis_there(self) -> bool:
        try:
            return bool(self._redis.ping())
        except (RedisError, OSError):
            return False

    def _end(self, silent: float) -> NoReturn:
        _log.error("consumer.deaf_for_good", seconds=round(silent), act="ends its process", exit=DEAF_EXIT)
        os._exit(DEAF_EXIT)


def _lose_connection() -> NoReturn:
    raise RedisConnectionError("The consumer is deaf.")


def start(name: str, look: Callable[[], None], *, every: float) -> None:
    """Let a thread called *name* look *every* so many seconds, for good."""
    pause = threading.Event()

    def run() -> None:
        while not pause.wait(every):
            look()

    background.start(name, run)
