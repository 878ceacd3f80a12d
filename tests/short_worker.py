"""The worker or the clock with short intervals, and with injected faults: ``python -m tests.short_worker``.

It keeps the tests of the watchdogs short, which would otherwise take minutes.
"""

import argparse
import sys
import threading
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, Final

from celery.schedules import schedule

from schemas import broker
from schemas.heartbeats import BEAT_SECONDS
from schemas.watchdog import Limits
from worker import __main__ as worker
from worker import clock
from worker.process import Parts, run

LIMITS: Final = Limits(look=0.2, deaf=3.0, intervals=1.0)


class DeafChannel(broker.Channel):
    """A channel that soon stops reading from Redis: the read is dropped, and the process continues."""

    asks_max: ClassVar[int] = 2
    deaf_max: ClassVar[int] = 1
    deaf: ClassVar[list[object]] = []
    asked: ClassVar[dict[object, int]] = {}

    def _brpop_start(self, timeout: int | None = None) -> None:
        if self not in self.deaf and len(self.deaf) < self.deaf_max:
            self.deaf.append(self)
        if self in self.deaf:
            self.asked[self] = self.asked.get(self, 0) + 1
            if self.asked[self] > self.asks_max:
                return
        super()._brpop_start(timeout)  # type: ignore[misc]  # private, and so not in the stubs


class DeafTransport(broker.Transport):
    """A transport that makes its first channels deaf."""

    Channel = DeafChannel


class Stuck(schedule):
    """A schedule that never returns when asked for the next time."""

    def is_due(self, _: Any) -> Any:  # noqa: ANN401 - Celery's own
        """Return never."""
        threading.Event().wait()


def _start_worker(parts: Parts, asked: argparse.Namespace) -> int:
    if asked.deaf:
        DeafChannel.deaf_max, DeafChannel.asks_max = asked.deaf, asked.asks
        parts.app.conf.broker_transport = DeafTransport
    return worker.start(parts, LIMITS._replace(shut_down=asked.shut_down, end=asked.end, beat=asked.beat))


def _start_clock(parts: Parts, asked: argparse.Namespace) -> int:
    parts.app.conf.broker_transport_options = parts.app.conf.broker_transport_options | {"socket_timeout": 1.0}
    if not asked.stuck:
        return clock.start(parts, beat_seconds=asked.beat)
    parts.app.conf.beat_schedule["stuck"] = {"task": "stuck", "schedule": Stuck(timedelta(seconds=1)), "options": {}}
    return clock.start(parts, still_seconds_max=2.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("process", choices=["worker", "clock"])
    parser.add_argument("--deaf", type=int, default=0, help="So many consumers of each process go deaf.")
    parser.add_argument("--asks", type=int, default=2, help="How often each of them asks before.")
    parser.add_argument("--stuck", action="store_true", help="The clock stands still.")
    parser.add_argument("--shut-down", type=float, default=20.0)
    parser.add_argument("--end", type=float, default=28.0)
    parser.add_argument("--beat", type=float, default=BEAT_SECONDS, help="Between two heartbeats.")
    asked = parser.parse_args(sys.argv[1:])
    run(partial({"worker": _start_worker, "clock": _start_clock}[asked.process], asked=asked))
