"""The change feed: what a shop reads to act once on what happened."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy import Engine, func, select
from starlette.concurrency import run_in_threadpool

from api import tasks
from api.reads import ROWS_MAX, reading
from api.tokens import require
from schemas import stopping, tables
from schemas.answers import Change, Changes
from schemas.errors import DatabaseAway
from schemas.logs import Seldom

WAIT_SECONDS_MAX: Final = 25
LOOK_SECONDS: Final = 0.2
STOP_SECONDS_MAX: Final = 1

_seldom: Final = Seldom()

router: Final = APIRouter(prefix="/v1", dependencies=[Depends(require("read"))])


class Lookout:
    """Looks for new changes on behalf of all requests that wait for one.

    LISTEN would want a session of its own, which a pooler in transaction mode does not give. One look for
    however many wait costs one index probe, and none while nobody waits.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._latest = 0
        self._waiters = 0
        self._news = asyncio.Condition()
        self._somebody_waits = asyncio.Event()
        self._task = tasks.start("lookout", self._work)

    async def wait(self, after: int, seconds: float) -> None:
        """Return when there is a change after *after*, when *seconds* are up, or when the process is to stop."""
        self._waiters += 1
        self._somebody_waits.set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds), self._news:
                    # A process that is to stop has 30 seconds, and the reader asks again anyway.
                    await self._news.wait_for(lambda: self._latest > after or stopping.has_begun())
        finally:
            self._waiters -= 1

    async def stop(self) -> None:
        """End the looking, and give up on a look that does not come to an end."""
        self._task.cancel()
        await asyncio.wait([self._task], timeout=STOP_SECONDS_MAX)

    async def _work(self) -> None:
        while True:
            await self._somebody_waits.wait()
            try:
                self._latest = await run_in_threadpool(self._look)
            except DatabaseAway:
                _seldom.warning("changes.not_looked_at", kind="DatabaseAway")
            async with self._news:
                self._news.notify_all()
            if self._waiters == 0:
                self._somebody_waits.clear()
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self) -> int:
        with reading(self._engine) as connection:
            latest = select(func.max(tables.changes.c.seq)).where(tables.changes.c.withheld.is_(None))
            return connection.execute(latest).scalar() or 0


@router.get("/changes", tags=["changes"])
async def list_changes(
    request: Request,
    *,
    after: Annotated[int, Query(ge=0, le=2**63 - 1, description="the last `seq` you saw")] = 0,
    wait: Annotated[float, Query(ge=0, le=WAIT_SECONDS_MAX, description="seconds to wait for one")] = 0,
    limit: Annotated[int, Query(ge=1, le=ROWS_MAX)] = ROWS_MAX,
) -> Changes:
    """List changes after a cursor, in commit order, waiting for one where none is there yet."""
    rows = await run_in_threadpool(_after, request.app.state.engine, after, limit)
    if not rows and wait:
        await request.app.state.lookout.wait(after, wait)
        rows = await run_in_threadpool(_after, request.app.state.engine, after, limit)
    data = [Change.model_validate(row) for row in rows[:limit]]
    return Changes(data=data, next_after=data[-1].seq if data else after, has_more=len(rows) > limit)


def _after(engine: Engine, after: int, limit: int) -> Sequence[Any]:
    changes = tables.changes
    query = (
        select(changes)
        .where(changes.c.seq > after, changes.c.withheld.is_(None))
        .order_by(changes.c.seq)
        .limit(limit + 1)
    )
    with reading(engine) as connection:
        return connection.execute(query).mappings().all()
