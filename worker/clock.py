"""The clock process: ``python -m worker.clock``. It sends messages on time and does no work itself.

Note [A clock that stands still ends]
    Each message is sent within seconds or is lost, and the next look at the timetable comes 5 seconds later at most.
    If the clock stands still all the same, a thread logs one line and ends the process. The supervisor that started the
    clock then starts it again.
"""

import os
import time
from collections.abc import Callable
from typing import Any, ClassVar, Final

import structlog
from celery import beat
from celery.schedules import crontab
from celery.signals import beat_init

from schemas import broker, stopping, watchdog
from schemas.heartbeats import BEAT_SECONDS, Heart, Mark
from worker.process import Parts, run

STILL_SECONDS_MAX: Final = 60.0
"""Seconds without a look at the timetable after which the process ends.

To send every message to a broker that does not answer takes less.
"""

_log = structlog.get_logger()


class Timetable(beat.Scheduler):
    """Celery's scheduler, except that it sends each message in bounded time, and notes when it last looked."""

    looked_at = time.monotonic()
    mark: ClassVar[Mark] = Mark("clock")

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Celery's own
        self._is_away = False
        self._unsent: dict[str, beat.ScheduleEntry] = {}
        super().__init__(*args, **kwargs)

    def tick(self, *args: Any, **kwargs: Any) -> float:  # noqa: ANN401 - Celery's own
        """Send the messages that are due, and return the seconds until the next look."""
        try:
            for entry in tuple(self._unsent.values()):
                self.apply_entry(entry)
            return super().tick(*args, **kwargs)
        finally:
            self._note()

    def _note(self) -> None:
        type(self).looked_at = time.monotonic()
        self.mark.note()

    @property
    def producer(self) -> None:  # type: ignore[override]
        """None, because messages use a pool of connections. Celery's producer would wait for the broker for ever."""

    def apply_entry(self, entry: beat.ScheduleEntry, producer: object = None) -> None:  # noqa: ARG002 - Celery's own
        """Send the message of *entry*.

        If the broker does not take it, it is dropped, and the next one is sent at its own time. A daily message is
        tried again at each look instead.
        """
        is_away = not broker.send(self.app, str(entry.task), **(entry.options or {}))
        # Noted after each message, because sending all of them to a broker that does not answer takes long.
        self._note()
        self._unsent.pop(str(entry.name), None)
        if is_away and isinstance(entry.schedule, crontab):
            self._unsent[str(entry.name)] = entry
        if is_away != self._is_away:
            self._is_away = is_away
            _log.warning("broker.away") if is_away else _log.info("broker.back")


def start(parts: Parts, still_seconds_max: float = STILL_SECONDS_MAX, beat_seconds: float = BEAT_SECONDS) -> int:
    """Send the timetable's messages until the process is asked to stop."""
    beat_init.connect(lambda **_: stopping.begin_at_sigterm(), weak=False)
    watchdog.start("clock", _end_if_still(still_seconds_max), every=1.0)
    Heart(parts.engine, Timetable.mark.beats, every=beat_seconds).start()
    # Past times are not saved, because each interval is short, and a dyno loses its disk anyway.
    # Celery gets the class itself. By its name, Celery would load this file a second time, with another class than the
    # one that the thread above looks at.
    scheduler: Any = Timetable
    parts.app.Beat(scheduler_cls=scheduler, loglevel="WARNING", quiet=True, redirect_stdouts=False).run()
    return 0


def _end_if_still(seconds_max: float) -> Callable[[], None]:
    Timetable.looked_at = time.monotonic()

    def look() -> None:
        still = time.monotonic() - Timetable.looked_at
        if still > seconds_max:
            _log.error("clock.stands_still", seconds=round(still), act="ends its process", exit=watchdog.DEAF_EXIT)
            os._exit(watchdog.DEAF_EXIT)

    return look


if __name__ == "__main__":
    run(start)
