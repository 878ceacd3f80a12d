"""Counts of deliveries by outcome: added up in memory, and every few seconds in PostgreSQL for all processes.

A write that may or may not have been committed is repeated, so after a lost connection a count may be too high.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import psycopg

from api import tasks
from api.deadlines import within
from schemas import database
from schemas.database import integer_array, text_array
from schemas.logs import Seldom

WRITE_SECONDS: Final = 5.0
"""Between two writes: the counts of this time are lost if a process is killed."""
USE_SECONDS_MAX: Final = 1.0
"""For one use of PostgreSQL, the connection included."""
OUTCOMES: Final = ("new", "copy", "duplicate", "postponed", "failed")
"""The outcomes of deliveries, without those that are refused."""
REFUSED: Final = "refused"
CONNECTION: Final = "connection"
"""The outcome of a request that was refused before it was known to be a delivery: most come from strangers."""

Kind = tuple[str, str]
"""An outcome, and the reason of a refused delivery or connection, else an empty text."""

_seldom: Final = Seldom(60)
"""While PostgreSQL is away each write fails, and the deliveries' own lines are logged anyway."""
_BOUNDS: Final = f"SET LOCAL statement_timeout = {round(USE_SECONDS_MAX * 900)}".encode()
# In the order of the keys, since other processes write the same rows.
_ADD: Final = """
INSERT INTO delivery_counts AS known (outcome, reason, count, since, last_at)
SELECT outcome, reason, count, since, last_at
FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::timestamptz[], %s::timestamptz[])
    AS t (outcome, reason, count, since, last_at)
ORDER BY outcome, reason
ON CONFLICT (outcome, reason) DO UPDATE SET
    count = known.count + excluded.count,
    since = least(known.since, excluded.since),
    last_at = greatest(known.last_at, excluded.last_at)
"""
_READ: Final = "SELECT outcome, reason, count FROM delivery_counts"


@dataclass
class _Waiting:
    """A count that is not written yet, and when the first and the last of it were noted."""

    count: int
    since: datetime
    last_at: datetime


class DeliveryCounts:
    """The counts of this process that wait to be written, and a task that writes them."""

    def __init__(self, database_url: str, *, write_seconds: float = WRITE_SECONDS) -> None:
        self._url = database_url
        self._write_seconds = write_seconds
        self._fresh: Counter[Kind] = Counter()
        self._waiting: dict[Kind, _Waiting] = {}
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def add(self, outcome: str, reason: str = "") -> None:
        """Count a delivery."""
        self._fresh[outcome, reason] += 1

    def start(self) -> None:
        """Write from now on."""
        self._task = tasks.start("delivery-counts", self._work)

    async def stop(self) -> None:
        """Write a last time."""
        if self._task is not None:
            # Not in the middle of a write, which would be repeated.
            async with self._turn:
                self._task.cancel()
        await self.write()

    @property
    def unwritten(self) -> int:
        """How many deliveries were counted and are not in PostgreSQL yet."""
        return self._fresh.total() + sum(each.count for each in self._waiting.values())

    async def write(self) -> str:
        """Add the counts since the last time to the table; if that fails, they are kept for the next time.

        Returns ok, or the obstacle.
        """
        async with self._turn:
            self._note()
            if not self._waiting:
                return "ok"
            try:
                await within(USE_SECONDS_MAX, self._add(self._waiting))
            except (TimeoutError, psycopg.Error) as error:
                obstacle = database.obstacle(error)
                _seldom.warning("deliveries.counts_not_written", reason=obstacle)
                return obstacle
            self._waiting = {}
            return "ok"

    async def totals(self) -> dict[Kind, int] | None:
        """Return the counts of every process, with this one's up to now; None where PostgreSQL does not answer."""
        if await self.write() in database.SPEECHLESS:
            return None
        try:
            return await within(USE_SECONDS_MAX, self._read())
        except (TimeoutError, psycopg.Error):
            return None

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(self._write_seconds)
            await self.write()

    def _note(self) -> None:
        """Add the new counts to the waiting ones, with the time."""
        now = datetime.fromtimestamp(time.time(), UTC)
        for kind, count in self._fresh.items():
            waiting = self._waiting.setdefault(kind, _Waiting(0, now, now))
            waiting.count += count
            waiting.last_at = now
        self._fresh.clear()

    async def _add(self, counted: Mapping[Kind, _Waiting]) -> None:
        rows = counted.values()
        columns = (
            text_array([outcome for outcome, _ in counted]),
            text_array([reason for _, reason in counted]),
            integer_array(row.count for row in rows),
            text_array([row.since.isoformat() for row in rows]),
            text_array([row.last_at.isoformat() for row in rows]),
        )
        async with await self._connect() as connection:
            await connection.execute(_BOUNDS)
            await connection.execute(_ADD, columns)

    async def _read(self) -> dict[Kind, int]:
        async with await self._connect() as connection:
            await connection.execute(_BOUNDS)
            rows = await (await connection.execute(_READ)).fetchall()
        return {(outcome, reason): count for outcome, reason, count in rows}

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(self._url, **database.connect_options())
