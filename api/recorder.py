"""Records deliveries: those in flight together share one statement and one commit.

Note [An acknowledgement follows its commit]
    ``record`` returns after the row is committed, or raises. Nothing else may answer a delivery with a 2xx.
    A commit whose outcome is unknown is answered as a failure: Stripe sends again, and the inbox knows it.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
import structlog

from api.deadlines import Deadlines
from schemas import database, inbox
from schemas.errors import DatabaseAway, Transient
from schemas.inbox import Delivery, Receipt

SHARED_ROWS_MAX: Final = 256
"""Deliveries in one statement."""
WAITING_BYTES_MAX: Final = 64 * 1024 * 1024
"""Bodies held in memory while they wait for their commit; more are turned away and come back."""
ANSWER_SECONDS_MAX: Final = 10
"""After this a delivery is answered, whatever PostgreSQL does."""

_log = structlog.get_logger()


class Overloaded(Transient):
    """More is arriving than can be recorded: send it again."""


class RowRefused(Transient):
    """PostgreSQL refused this delivery's row: it is not recorded, send it again."""


@dataclass(slots=True)
class _Waiting:
    delivery: Delivery
    done: "asyncio.Future[Receipt]"


def _give_up(done: "asyncio.Future[Receipt]") -> None:
    if not done.done():
        done.set_exception(DatabaseAway())


class Recorder:
    """One task on one connection that records whatever waits, as often as there is something."""

    def __init__(self, database_url: str, *, answer_seconds_max: float = ANSWER_SECONDS_MAX) -> None:
        self._url = database_url
        self._answer_seconds_max = answer_seconds_max
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._waiting: list[_Waiting] = []
        self._recording: list[_Waiting] = []
        self._waiting_bytes = 0
        self._something_waits = asyncio.Event()
        self._deadlines = Deadlines(answer_seconds_max, _give_up)
        self._task = asyncio.create_task(self._run(), name="recorder")

    async def record(self, delivery: Delivery) -> Receipt:
        """Return what recording *delivery* did, once it is committed.

        Raises:
            DatabaseAway, Overloaded, RowRefused: it is not known to be recorded.
        """
        size = len(delivery.envelope.payload)
        if self._waiting_bytes + size > WAITING_BYTES_MAX:
            raise Overloaded
        waiting = _Waiting(delivery, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._waiting_bytes += size
        self._something_waits.set()
        self._deadlines.begin(waiting.done)
        try:
            return await waiting.done
        finally:
            self._deadlines.end(waiting.done)
            self._waiting_bytes -= size

    async def stop(self) -> None:
        """Record what waits, then close."""
        while unanswered := [each.done for each in (*self._recording, *self._waiting) if not each.done.done()]:
            await asyncio.wait(unanswered)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._disconnect()

    async def _run(self) -> None:
        while True:
            await self._something_waits.wait()
            batch, self._waiting = self._waiting[:SHARED_ROWS_MAX], self._waiting[SHARED_ROWS_MAX:]
            if not self._waiting:
                self._something_waits.clear()
            # Who was answered meanwhile was told to send again.
            self._recording = [each for each in batch if not each.done.done()]
            if self._recording:
                await self._record_together(self._recording)

    async def _record_together(self, batch: Sequence[_Waiting]) -> None:
        try:
            results = await self._execute([each.delivery for each in batch])
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing is recorded and the next batch must go on
            if len(batch) == 1 or isinstance(error, TimeoutError) or database.is_away(error):
                await self._fail(batch, error)
            else:
                # One of them is at fault, and the others must not pay for it.
                for each in batch:
                    await self._record_together([each])
        else:
            for each, result in zip(batch, results, strict=True):
                if not each.done.done():
                    each.done.set_result(result)

    async def _execute(self, deliveries: Sequence[Delivery]) -> list[Receipt]:
        async with asyncio.timeout(self._answer_seconds_max):
            if self._connection is None or self._connection.closed:
                self._connection = await psycopg.AsyncConnection.connect(
                    self._url,
                    # The one statement is its own transaction: its answer comes after the commit.
                    autocommit=True,
                    prepare_threshold=None,
                    connect_timeout=database.CONNECT_SECONDS_MAX,
                )
            return await inbox.record_async(self._connection, deliveries)

    async def _fail(self, batch: Sequence[_Waiting], error: Exception) -> None:
        is_row = isinstance(error, psycopg.Error) and database.is_fault_of_data(error)
        if not is_row:
            # Whatever state it is in, the next delivery begins with a new one.
            await self._disconnect()
        _log.error("deliveries.not_recorded", deliveries=len(batch), reason=database.condition(error))
        for each in batch:
            if not each.done.done():
                each.done.set_exception(RowRefused() if is_row else DatabaseAway())

    async def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(Exception):
                await connection.close()
