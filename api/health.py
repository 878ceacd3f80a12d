"""How this process is, for whatever starts, balances and watches it. Nothing here waits for the pool of threads."""

from typing import Final

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api import metrics
from api.tokens import require
from schemas.answers import Health

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


@operations.get("/metrics", dependencies=[Depends(require("read"))], response_class=Response)
async def show_metrics(request: Request) -> Response:
    """Return the counters of all web processes, and what is this process's alone, in Prometheus's text format."""
    state = request.app.state
    text = metrics.exposition(await state.counts.totals(), state.instance, unwritten=state.counts.unwritten)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
