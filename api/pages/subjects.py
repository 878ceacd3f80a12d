"""What the pages of customers and payment links have in common: their row, their timeline, their latest orders."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from fastapi import Request

from api import explanations, reads
from api.pages.forms import filters_of
from api.pages.viewers import Viewer
from api.pages.worlds import World
from schemas import answers
from schemas.answers import Page
from schemas.errors import ConflictError, NotFoundError

ORDERS_MAX: Final = 10
"""Orders on the page of an object that has orders: the newest."""


@dataclass(frozen=True, slots=True)
class Explained:
    """The explanation of a row; None where no event is about it, or there are so many that *fault* gives the way."""

    found: answers.Explanation | None
    fault: str | None = None


def explained(
    request: Request, table: str, key: str, viewer: Viewer, world: World, *, as_of: datetime | None
) -> Explained:  # fmt: skip
    """Return the explanation of the row *key* of *table*, as it was known at *as_of*."""
    asked = {"account": world.account, "livemode": world.livemode}
    try:
        return Explained(explanations.explained(request, table, key, sees=viewer.sees, as_of=as_of, **asked))
    except NotFoundError:
        return Explained(None)
    except ConflictError as error:
        return Explained(None, str(error))


def latest_orders(request: Request, viewer: Viewer, world: World, **of: str) -> Page[answers.Order]:
    """Return the newest orders *of* an object, by the column that names it."""
    filters = filters_of(reads.OrderFilters, {**of, "limit": str(ORDERS_MAX)}, world)
    return reads.list_orders(request, filters, viewer.sees)
