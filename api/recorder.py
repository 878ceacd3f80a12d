"""Records deliveries: those in flight together share one statement and one commit.

Note [An acknowledgement follows its commit]
    ``record`` returns after the row is committed, or raises. Nothing else may answer a delivery with a 2xx.
    A commit with an unknown outcome is answered as a failure: Stripe sends again, and the inbox knows the event.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import psycopg

from api import tasks
from api.deadlines import Deadlines
from schemas import database, inbox
from schemas.errors import DatabaseAway, Transient
from schemas.inbox import Delivery, Receipt
from schemas.logs import Seldom

SHARED_ROWS_MAX: Final = 256
"""Deliveries in one statement."""
SHARED_BYTES_MAX: Final = 8 * 1024 * 1024
"""Bytes of their bodies, after which no further delivery is added: the driver makes copies of them."""
ANSWER_SECONDS_MAX: Final = 10
"""After this a delivery is answered, even if PostgreSQL has not."""

_seldom: Final = Seldom()


class RowRefused(Transient):
    """PostgreSQL refused this delivery's row: it is not recorded, send it again."""


@dataclass(slots=True)
class _Waiting:
    delivery: Delivery
    done: "asyncio.Future[Receipt]"


def _give_up(done: "asyncio.Future[Receipt]") -> None:
    if not done.done():
        done.set_exception(DatabaseAway())


class Attempt(NamedTuple):
    """How the last attempt to record ended, and when by the event loop's clock; *database* is ok or the obstacle."""

    ended_at: float
    database: str


class Recorder:
    """One task on one connection that records all waiting deliveries, whenever there are some."""

    last: Attempt | None = None
    """The last attempt that wrote a row or failed; an attempt with only duplicates or refused data does not count."""

    def __init__(self, database_url: str, *, answer_seconds_max: float = ANSWER_SECONDS_MAX) -> None:
        self._url = database_url
        self._answer_seconds_max = answer_seconds_max
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Waiting] = deque()
        self._recording: list[_Waiting] = []
        self._something_waits = asyncio.Event()
        self._deadlines = Deadlines(answer_seconds_max, _give_up)
        self._task = tasks.start("recorder", self._work)

    async def record(self, delivery: Delivery) -> Receipt:
        """Return what recording *delivery* did, once it is committed.

        Raises:
            DatabaseAway, RowRefused: it is not known to be recorded.
        """
        return await self.begin(delivery)

    def begin(self, delivery: Delivery) -> "asyncio.Future[Receipt]":
        """Return at once what will be the result, or the error, of ``record``."""
        done = self._loop.create_future()
        self._waiting.append(_Waiting(delivery, done))
        self._something_waits.set()
        self._deadlines.begin(done)
        return done

    @property
    def in_flight(self) -> int:
        """How many deliveries wait for their commit."""
        return len(self._waiting) + sum(not each.done.done() for each in self._recording)

    @property
    def is_connected(self) -> bool:
        """Whether the next delivery has a connection: the first one opens it, and so does the one after an error."""
        return self._connection is not None and not self._connection.closed

    async def stop(self) -> None:
        """Record the waiting deliveries, then close."""
        while unanswered := [each.done for each in (*self._recording, *self._waiting) if not each.done.done()]:
            await asyncio.wait(unanswered)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._disconnect()

    async def _work(self) -> None:
        try:
            while True:
                await self._something_waits.wait()
                self._take_batch()
                if self._recording:
                    await self._record_together(self._recording)
        except Exception:
            # This error is not foreseen, so it is not known which deliveries were recorded.
            await self._disconnect()
            for each in self._recording:
                _give_up(each.done)
            raise

    def _take_batch(self) -> None:
        self._recording = []
        size = 0
        while self._waiting and len(self._recording) < SHARED_ROWS_MAX and size < SHARED_BYTES_MAX:
            waiting = self._waiting.popleft()
            # A delivery that waited too long was answered: its sender comes again.
            if not waiting.done.done():
                self._recording.append(waiting)
                size += len(waiting.delivery.envelope.payload)
        if not self._waiting:
            self._something_waits.clear()

    async def _record_together(self, batch: Sequence[_Waiting]) -> None:
        try:
            results = await self._execute([each.delivery for each in batch])
        except Exception as error:  # noqa: BLE001 - nothing is recorded, and the next batch must go on
            await self._divide(batch, error)
        else:
            if any(result.seq is not None for result in results):
                self._note("ok")
            for each, result in zip(batch, results, strict=True):
                self._deadlines.end(each.done)
                if not each.done.done():
                    each.done.set_result(result)

    async def _divide(self, batch: Sequence[_Waiting], error: Exception) -> None:
        """Find out which of *batch* is at fault, since the others must not pay for it."""
        is_row = isinstance(error, psycopg.Error) and database.is_fault_of_data(error)
        if not is_row:
            self._note(database.obstacle(error))
            # Its session may be in any state, so the next delivery begins with a new one.
            await self._disconnect()
        if len(batch) == 1 or isinstance(error, TimeoutError) or database.is_away(error):
            self._fail(batch, error, RowRefused if is_row else DatabaseAway)
            return
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            if unanswered := [each for each in part if not each.done.done()]:
                await self._record_together(unanswered)

    def _note(self, outcome: str) -> None:
        self.last = Attempt(self._loop.time(), outcome)

    async def _execute(self, deliveries: Sequence[Delivery]) -> list[Receipt]:
        async with asyncio.timeout(self._answer_seconds_max):
            if self._connection is None or self._connection.closed:
                self._connection = await psycopg.AsyncConnection.connect(
                    self._url,
                    # The one statement is its own transaction: its answer comes after the commit.
                    autocommit=True,
                    **database.connect_options(),
                )
                await database.prepare_where_direct(self._connection)
            return await inbox.record_async(self._connection, deliveries)

    def _fail(self, batch: Sequence[_Waiting], error: Exception, answer: type[Transient]) -> None:
        _seldom.error("deliveries.not_recorded", deliveries=len(batch), reason=database.condition(error))
        for each in batch:
            self._deadlines.end(each.done)
            if not each.done.done():
                each.done.set_exception(answer())

    async def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(Exception):
                await connection.close()
