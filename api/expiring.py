"""The open sessions that are the next to end: what a shop's stock waits for."""

from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Request
from msgspec import structs

from api import reads
from api.reads import ROWS_DEFAULT, ROWS_MAX, Account, Livemode
from api.tokens import SeesPersonalData, require
from schemas import accounts, answers, session_ends
from schemas.database import cursor
from schemas.stripe_api import StripeApi

router: Final = APIRouter(prefix="/v1", dependencies=[Depends(require("read"))], route_class=reads.Route)

Limit = Annotated[int, Query(ge=1, le=ROWS_MAX, description="rows in the answer")]


@router.get("/orders/expiring", tags=["orders"])
def list_expiring_orders(
    request: Request,
    sees: SeesPersonalData,
    limit: Limit = ROWS_DEFAULT,
    account: Account = None,
    livemode: Livemode = None,
) -> answers.Expiring:
    """List the open orders whose sessions are the next to end, by Stripe or by our own limit."""
    stripe: StripeApi = request.app.state.stripe
    with reads.reading(request.app.state.engine) as connection, cursor(connection) as opened:
        stripe.learn(accounts.names(opened))
        found = session_ends.next_to_end(
            opened, request.app.state.settings, stripe.serves, account=account, livemode=livemode, limit=limit + 1
        )
    shown = [answers.ExpiringOrder.of(structs.asdict(each), personal=sees) for each in found[:limit]]
    return answers.Expiring(data=shown, has_more=len(found) > limit)
