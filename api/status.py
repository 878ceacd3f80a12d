"""The status of everything for the routes, read in a thread of its own, since reads may keep the pool's busy."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from redis import Redis
from sqlalchemy.exc import SQLAlchemyError

from schemas import database, status
from schemas.database import transaction
from schemas.errors import DatabaseAway
from schemas.settings import Settings
from schemas.status import Status
from worker.folds import FOLD_VERSION

ANSWER_SECONDS_MAX: Final = 10.0
"""After this a caller is answered, in every state of PostgreSQL and Redis."""
KEPT_SECONDS_MAX: Final = 60.0
"""For so long the last status stands in for one that takes longer than the caller waits."""


class StatusReader:
    """Reads the status, one after the other for all who ask."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self._settings = settings
        self._redis = redis
        self._engine = database.engine(settings.postgresql, connections_max=1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="status")
        self._reading: asyncio.Future[Status] | None = None
        self._last: Status | None = None
        self._read_at = 0.0

    async def now(self) -> Status:
        """Return the status, read after this was called; where that takes too long, that PostgreSQL is away."""
        reading = self._begin()
        await asyncio.wait([reading], timeout=ANSWER_SECONDS_MAX)
        return reading.result() if reading.done() else status.away(status.Broker(state="away"))

    async def latest(self, *, age_max: float, wait_max: float) -> Status | None:
        """Return a status that is at most *age_max* seconds old, which is waited for for *wait_max* seconds.

        After that an older one is returned, up to a minute old, else None.
        """
        if self._is_younger(age_max) and self._last is not None and self._last.database != "away":
            return self._last
        if self._reading is None or self._reading.done():
            self._reading = self._begin()
        await asyncio.wait([self._reading], timeout=wait_max)
        return self._last if self._is_younger(KEPT_SECONDS_MAX) else None

    def stop(self) -> None:
        """Close the connection, after the reads that are under way, which end within their bounds."""
        self._thread.submit(self._engine.dispose)
        self._thread.shutdown(wait=False)

    def _is_younger(self, seconds: float) -> bool:
        return self._last is not None and asyncio.get_running_loop().time() - self._read_at <= seconds

    def _begin(self) -> "asyncio.Future[Status]":
        reading = asyncio.get_running_loop().run_in_executor(self._thread, self._read)
        reading.add_done_callback(self._keep)
        return reading

    def _keep(self, reading: "asyncio.Future[Status]") -> None:
        if not reading.cancelled() and reading.exception() is None:
            self._last, self._read_at = reading.result(), reading.get_loop().time()

    def _read(self) -> Status:
        broker = status.broker_state(self._redis)
        try:
            with transaction(self._engine, status.READ) as connection:
                return status.read(connection, self._settings, broker=broker, fold_version=FOLD_VERSION)
        except (DatabaseAway, SQLAlchemyError):
            return status.away(broker)
