"""Customers: their balances, the ledger behind each, and their orders."""

from collections import defaultdict
from collections.abc import Collection
from typing import Final

from fastapi import APIRouter, Request, Response
from sqlalchemy import Text as SqlText
from sqlalchemy import any_, literal, select
from sqlalchemy.dialects.postgresql import ARRAY

from api import explanations, reads
from api.addresses import Id
from api.pages.forms import Text, filters_of
from api.pages.rendering import PageRoute, page
from api.pages.subjects import explained, latest_orders
from api.pages.viewers import Reader
from api.pages.worlds import Shown, World
from schemas import tables
from schemas.errors import NotFoundError

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/customers")
def list_customers(
    request: Request,
    viewer: Reader,
    worlds: Shown,
    email: Text = "",
    delinquent: Text = "",
    deleted: Text = "",
    cursor: str | None = None,
) -> Response:
    """List the customers of a world, newest first."""
    world = worlds.shown
    given = {"email": email.strip(), "delinquent": delinquent, "deleted": deleted}
    found = reads.list_customers(request, filters_of(reads.CustomerFilters, given, world, cursor), viewer.sees)
    balances = _balances(request, world, [each.id for each in found.data])
    return page(request, "customers.html.j2", viewer, worlds, found=found, given=given, balances=balances)


def _balances(request: Request, world: World, customers: Collection[str]) -> dict[str, list[tuple[int | None, str]]]:
    """Return the balances of *customers* by customer: amounts in the smallest unit, with their currencies."""
    table = tables.balances
    query = (
        select(table.c.customer, table.c.amount, table.c.currency)
        .where(table.c.account == world.account, table.c.livemode == world.livemode)
        .where(table.c.customer == any_(literal(list(customers), ARRAY(SqlText))))
        .order_by(table.c.currency)
    )
    found: dict[str, list[tuple[int | None, str]]] = defaultdict(list)
    with reads.reading(request.app.state.engine) as connection:
        for customer, amount, currency in connection.execute(query):
            found[customer].append((amount, currency))
    return found


@router.get("/customers/{customer_id:id}")
def show_customer(
    request: Request, viewer: Reader, worlds: Shown, customer_id: Id, as_of: explanations.AsOf = None
) -> Response:
    """Show a customer, even one that only orders or a ledger name."""
    world = worlds.shown
    asked = (customer_id, viewer.sees, world.account, world.livemode)
    known = explained(request, "customers", customer_id, viewer, world, as_of=as_of)
    orders = latest_orders(request, viewer, world, customer=customer_id)
    try:
        balances = reads.show_balance(request, *asked).balances
    except NotFoundError:
        balances = []
    try:
        row = reads.show_customer(request, *asked)
    except NotFoundError:
        if known.found is None and not orders.data and not balances:
            raise
        row = None
    return page(
        request, "customer.html.j2", viewer, worlds,
        customer_id=customer_id, row=row, explained=known, orders=orders, balances=balances, as_of=as_of,
        ledger_max=reads.BALANCE_ROWS_MAX,
    )  # fmt: skip
