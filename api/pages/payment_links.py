"""Payment links: how far their sessions came, and each with its orders and its timeline."""

from typing import Final

from fastapi import APIRouter, Request, Response

from api import explanations, reads
from api.addresses import Id
from api.pages.forms import Text, filters_of
from api.pages.funnels import funnels
from api.pages.rendering import PageRoute, page
from api.pages.subjects import explained, latest_orders
from api.pages.viewers import Reader
from api.pages.worlds import Shown
from schemas.errors import NotFoundError

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/payment-links")
def list_payment_links(
    request: Request, viewer: Reader, worlds: Shown, active: Text = "", cursor: str | None = None
) -> Response:
    """List the payment links of a world, newest first, each with its funnel."""
    world = worlds.shown
    given = {"active": active}
    filters = filters_of(reads.PaymentLinkFilters, given, world, cursor)
    found = reads.list_payment_links(request, filters, viewer.sees)
    drawn = funnels(request, world, [each.id for each in found.data])
    return page(request, "payment_links.html.j2", viewer, worlds, found=found, given=given, funnels=drawn)


@router.get("/payment-links/{link_id:id}")
def show_payment_link(
    request: Request, viewer: Reader, worlds: Shown, link_id: Id, as_of: explanations.AsOf = None
) -> Response:
    """Show a payment link, even one that only its orders name."""
    world = worlds.shown
    known = explained(request, "payment_links", link_id, viewer, world, as_of=as_of)
    orders = latest_orders(request, viewer, world, payment_link=link_id)
    try:
        row = reads.show_payment_link(request, link_id, viewer.sees, world.account, world.livemode)
    except NotFoundError:
        if known.found is None and not orders.data:
            raise
        row = None
    drawn = funnels(request, world, [link_id]).get(link_id, [])
    return page(
        request, "payment_link.html.j2", viewer, worlds,
        link_id=link_id, row=row, explained=known, orders=orders, funnels=drawn, as_of=as_of,
    )  # fmt: skip
