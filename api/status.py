"""The status of everything for the routes, read in a thread of its own, since reads may keep the pool's busy."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from redis import Redis
from sqlalchemy.exc import SQLAlchemyError

from schemas import database, status
from schemas.database import transaction
from schemas.errors import DatabaseAway, Transient
from schemas.settings import Settings
from schemas.status import Status
from worker.folds import FOLD_VERSION

ANSWER_SECONDS_MAX: Final = 10.0
"""After this a caller is answered, in every state of PostgreSQL and Redis."""
KEPT_SECONDS_MAX: Final = 60.0
"""The last status is answered for this long when a new one takes longer than the caller waits."""


class TooSlow(Transient):
    """The status took too long to read: ask again."""


class StatusReader:
    """Reads the status for all callers together: at most one read is under way, and one is to follow it.

    A caller gets the next read that begins, and shares it with all other callers until then.
    """

    def __init__(self, settings: Settings, redis: Redis, *, answer_seconds_max: float = ANSWER_SECONDS_MAX) -> None:
        self._settings = settings
        self._redis = redis
        self._answer_seconds_max = answer_seconds_max
        self._engine = database.engine(settings.postgresql, connections_max=1)
        self._memory = status.Memory()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="status")
        self._reading: asyncio.Task[Status] | None = None
        self._next: asyncio.Task[Status] | None = None
        self._last: Status | None = None
        self._read_at = 0.0

    async def now(self) -> Status:
        """Return the status, read after this was called.

        Raises:
            TooSlow: that takes too long.
        """
        reading = self._ask()
        await asyncio.wait([reading], timeout=self._answer_seconds_max)
        if not reading.done():
            raise TooSlow
        return reading.result()

    async def latest(self, *, age_max: float, wait_max: float, kept_max: float = KEPT_SECONDS_MAX) -> Status | None:
        """Return a status that is at most *age_max* seconds old, after waiting at most *wait_max* seconds.

        If none came by then, return an older one, up to *kept_max* seconds old, else None.
        """
        if self._is_younger(age_max) and self._last is not None and self._last.database != "away":
            return self._last
        await asyncio.wait([self._reading or self._ask()], timeout=wait_max)
        return self._last if self._is_younger(kept_max) else None

    def stop(self) -> None:
        """Close the connection after the read that is under way, which ends within its bounds, and begin no other."""
        if self._next is not None:
            self._next.cancel()
        self._thread.submit(self._engine.dispose)
        self._thread.shutdown(wait=False)

    def _is_younger(self, seconds: float) -> bool:
        return self._last is not None and asyncio.get_running_loop().time() - self._read_at <= seconds

    def _ask(self) -> "asyncio.Task[Status]":
        """Return the next read to begin."""
        if self._next is None:
            self._next = asyncio.create_task(self._read_after(self._reading), name="status")
        return self._next

    async def _read_after(self, before: "asyncio.Task[Status] | None") -> Status:
        if before is not None:
            await asyncio.wait([before])
        # A caller from here on gets a later read.
        self._reading, self._next = self._next, None
        try:
            self._last = await asyncio.get_running_loop().run_in_executor(self._thread, self._read)
        finally:
            self._reading = None
        self._read_at = asyncio.get_running_loop().time()
        return self._last

    def _read(self) -> Status:
        broker = status.broker_state(self._redis)
        try:
            with transaction(self._engine, status.READ) as connection:
                return status.read(
                    connection, self._settings, broker=broker, fold_version=FOLD_VERSION, memory=self._memory
                )
        except (DatabaseAway, SQLAlchemyError, database.DriverError):
            return status.away(broker)
