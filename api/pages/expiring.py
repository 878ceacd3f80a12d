"""Open sessions, the next to end first."""

from typing import Final

from fastapi import APIRouter, Request, Response

from api import expiring, reads
from api.pages.rendering import PageRoute, page
from api.pages.viewers import Reader
from api.pages.worlds import Shown
from schemas.observations import World
from schemas.stripe_api import StripeApi

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/expiring")
def list_expiring(request: Request, viewer: Reader, worlds: Shown) -> Response:
    """List the sessions of a world that end next, at Stripe or by our limit."""
    world = worlds.shown
    found = expiring.list_expiring_orders(request, viewer.sees, reads.ROWS_MAX, world.account, world.livemode)
    stripe: StripeApi = request.app.state.stripe
    return page(
        request, "expiring.html.j2", viewer, worlds,
        found=found, is_served=stripe.serves(World(world.account, world.livemode)),
        grace_minutes=request.app.state.settings.payfold_expiry_grace_minutes,
    )  # fmt: skip
