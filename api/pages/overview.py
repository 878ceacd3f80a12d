"""The first page: is it working?"""

from typing import Annotated, Final

from fastapi import APIRouter, Depends, Request, Response

from api import reads, webhook
from api.pages.rendering import PageRoute, page
from api.pages.sales import sales
from api.pages.verdicts import verdict
from api.pages.viewers import Reader, is_loopback
from api.pages.worlds import Shown, World
from api.status import StatusReader
from schemas import parked
from schemas.parked import ParkedGroups
from schemas.status import Status
from worker.folds import STRIPE_TYPES

STATUS_AGE_SECONDS_MAX: Final = 2.0
"""A status this young is shown to all who look at the page, so that many of them cost what one costs."""
SOON_SECONDS: Final = 0.1
STATUS_KEPT_SECONDS_MAX: Final = 5.0
STATUS_SECONDS_MAX: Final = 5.0
PARKED_EVENTS_MAX: Final = 5_000
"""Parked events, and payloads of them, that are looked at for a page that refreshes; their own page looks at more."""
PARKED_PAYLOADS_MAX: Final = 200

_OUTCOMES: Final = {
    "new": "new, recorded",
    "copy": "another copy of a known event",
    "duplicate": "again, known already",
    "postponed": "postponed with 503",
    "failed": "failed",
}

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)


async def latest_status(request: Request) -> Status | None:
    """Return the status of everything; None where it cannot be known now."""
    reader: StatusReader = request.app.state.status
    # While a new one is read, one that is little older will do: the page refreshes anyway.
    found = await reader.latest(age_max=STATUS_AGE_SECONDS_MAX, wait_max=SOON_SECONDS, kept_max=STATUS_KEPT_SECONDS_MAX)
    return found or await reader.latest(age_max=STATUS_AGE_SECONDS_MAX, wait_max=STATUS_SECONDS_MAX)


LatestStatus = Annotated[Status | None, Depends(latest_status)]


@router.get("/")
def show_overview(request: Request, viewer: Reader, worlds: Shown, status: LatestStatus) -> Response:
    """Show whether everything works."""
    can_read = status is not None and status.database == "ok" and not status.migrations
    return page(
        request,
        "overview.html.j2",
        viewer,
        worlds,
        found=status,
        verdict=verdict(status),
        outcomes=_OUTCOMES,
        webhook=_webhook_address(request),
        event_types=STRIPE_TYPES,
        sold=sales(request, worlds.shown) if can_read else None,
        parked=_parked(request, worlds.shown) if can_read and status is not None and status.parked else None,
    )


def _webhook_address(request: Request) -> str:
    """Return the address for Stripe: behind a proxy that ends TLS this process sees http, and Stripe wants https."""
    url = request.base_url if is_loopback(request.url.hostname) else request.base_url.replace(scheme="https")
    return f"{str(url).rstrip('/')}{webhook.PATH}"


def _parked(request: Request, world: World) -> ParkedGroups:
    """Return the parked events of *world* by cause and type."""
    with reads.reading(request.app.state.engine) as connection:
        return parked.groups(
            connection,
            account=world.account,
            livemode=world.livemode,
            events_max=PARKED_EVENTS_MAX,
            payloads_max=PARKED_PAYLOADS_MAX,
        )
