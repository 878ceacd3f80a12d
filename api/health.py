"""The health of this process, for the programs that start, balance and watch it.

Nothing here waits for the pool of threads.
"""

import asyncio
from typing import Final

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api import metrics
from api.metrics import Own
from api.tokens import require
from schemas.status import Health, Status

STATUS_AGE_SECONDS_MAX: Final = 3.0
"""The age of the status in the metrics, so that they may be asked for often."""
STATUS_SECONDS_MAX: Final = 2.0
"""The metrics wait this long for the status."""

probes: Final = APIRouter(prefix="/health", tags=["health"])
operations: Final = APIRouter(tags=["operations"])


@probes.head("/live", include_in_schema=False)
@probes.get("/live")
async def live() -> dict[str, str]:
    """Answer that the process runs, without a thread, since reads may keep all of them busy."""
    return {"status": "alive"}


@probes.head("/ready", include_in_schema=False)
@probes.get("/ready", responses={503: {"model": Health}})
async def ready(request: Request, response: Response) -> Health:
    """Answer whether deliveries can be taken: recording was just tried, and the schema is not behind."""
    health: Health = await request.app.state.readiness.health()
    response.status_code = 200 if health.ready else 503
    return health


@operations.get("/v1/status", dependencies=[Depends(require("read"))])
async def show_status(request: Request) -> Status:
    """Return how everything is, as values: null is what is not known."""
    status: Status = await request.app.state.status.now()
    return status


@operations.get("/metrics", dependencies=[Depends(require("read"))], response_class=Response)
async def show_metrics(request: Request) -> Response:
    """Return what all web processes have counted, how everything is, and what is this process's alone.

    It is in Prometheus's text format.
    """
    state = request.app.state
    totals, status = await asyncio.gather(
        state.counts.totals(), state.status.latest(age_max=STATUS_AGE_SECONDS_MAX, wait_max=STATUS_SECONDS_MAX)
    )
    own = Own(state.instance, in_flight=state.recorder.in_flight, unwritten=state.counts.unwritten)
    is_daily = state.settings.payfold_reconcile_at is not None
    text = metrics.exposition(totals, status, own, reconciles_daily=is_daily)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
