"""Orders: found by whatever a person has in hand, listed, and each with all that is known of it."""

from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from api import actions, explanations, reads, search
from api.addresses import Id
from api.pages.forms import Text, filters_of
from api.pages.rendering import PageRoute, back, link_within, page
from api.pages.viewers import Reader, require
from api.pages.worlds import Shown, Worlds
from api.related import show_related
from schemas import tables
from schemas.errors import NotFoundError
from schemas.search import is_email

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)
Done = Annotated[Literal["expired", "news", "no-news"] | None, Query(description="what an act has just done")]


@router.get("/search")
def show_search(request: Request, viewer: Reader, worlds: Shown, q: Text = "") -> Response:
    """Find what a person has in hand; a single order is shown at once."""
    text, world = q.strip(), worlds.shown
    if not text:
        return page(request, "search.html.j2", viewer, worlds, text="", found=None, fault=None, elsewhere=[])
    if is_email(text) and not viewer.sees:
        fault = "An email is searched for with a token of the scope personal."
        return page(request, "search.html.j2", viewer, worlds, text=text, found=None, fault=fault, elsewhere=[])
    found = search.find(request, text, viewer.sees, world.account, world.livemode)
    elsewhere = [] if found.data else _elsewhere(request, text, viewer.sees, worlds)
    return page(request, "search.html.j2", viewer, worlds, text=text, found=found, fault=None, elsewhere=elsewhere)


def _elsewhere(request: Request, text: str, sees: bool, worlds: Worlds) -> list[Any]:  # noqa: FBT001 - as the route has it
    """Return the other worlds in which *text* is found."""
    hits = search.find(request, text, sees).data
    return [
        each
        for each in worlds.known
        if any((hit.account, hit.livemode) == (each.account, each.livemode) for hit in hits)
    ]


@router.get("/orders")
def list_orders(
    request: Request,
    viewer: Reader,
    worlds: Shown,
    status: Text = "",
    customer: Text = "",
    payment_link: Text = "",
    cursor: str | None = None,
) -> Response:
    """List the orders of a world, newest first."""
    given = {"status": status, "customer": customer, "payment_link": payment_link}
    found = reads.list_orders(request, filters_of(reads.OrderFilters, given, worlds.shown, cursor), viewer.sees)
    return page(
        request, "orders.html.j2", viewer, worlds,
        found=found, given=given, statuses=tables.ORDER_STATUSES,
    )  # fmt: skip


@router.get("/orders/{order_id:id}")
def show_order(
    request: Request,
    viewer: Reader,
    worlds: Shown,
    order_id: Id,
    as_of: explanations.AsOf = None,
    done: Done = None,
) -> Response:
    """Show an order: its columns, its money, and the timeline that explains them."""
    world = worlds.shown
    explained = explanations.explained(
        request, "orders", order_id, sees=viewer.sees, as_of=as_of, account=world.account, livemode=world.livemode
    )
    try:
        order = reads.show_order(request, order_id, viewer.sees, world.account, world.livemode)
    except NotFoundError:
        order = None
    related = None
    if order is not None:
        related = show_related(request, order_id, viewer.sees, world.account, world.livemode)
    return page(
        request, "order.html.j2", viewer, worlds,
        order_id=order_id, order=order, explained=explained, as_of=as_of, done=done, related=related,
    )  # fmt: skip


@router.post("/orders/{order_id:id}/expire", dependencies=[Depends(require("admin"))])
def expire_order(request: Request, worlds: Shown, order_id: Id) -> Response:
    """Expire an open order's session at Stripe."""
    world = worlds.shown
    actions.expire_order(request, order_id, world.account, world.livemode)
    return back(link_within(worlds)("orders", order_id, done="expired"))


@router.post("/orders/{order_id:id}/read", dependencies=[Depends(require("admin"))])
def read_order(request: Request, worlds: Shown, order_id: Id) -> Response:
    """Ask Stripe for an order's session."""
    world = worlds.shown
    found = actions.read_order(request, order_id, world.account, world.livemode)
    return back(link_within(worlds)("orders", order_id, done="news" if found.recorded else "no-news"))
