"""One box for all that a person may have in hand."""

from dataclasses import asdict
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Request
from starlette.exceptions import HTTPException

from api import reads
from api.addresses import NO_NUL
from api.reads import Account, Livemode
from api.tokens import SeesPersonalData, require
from schemas import answers, search
from schemas.events import TEXT_CHARACTERS_MAX

router: Final = APIRouter(prefix="/v1", dependencies=[Depends(require("read"))], route_class=reads.Route)

Text = Annotated[
    str,
    Query(
        min_length=1,
        max_length=TEXT_CHARACTERS_MAX,
        pattern=NO_NUL,
        description="the id of any object, a number of an invoice or a credit note, an email in any case (scope"
        " personal), a client reference, or an amount with its currency, as `49.99 eur`",
    ),
]


@router.get("/search", tags=["search"])
def find(
    request: Request, q: Text, sees: SeesPersonalData, account: Account = None, livemode: Livemode = None
) -> answers.Found:
    """Find what a person has in hand, and the orders that it belongs to."""
    if search.is_email(q) and not sees:
        raise HTTPException(403, "An email is searched for with a token of the scope personal.")
    with reads.reading(request.app.state.engine) as connection:
        hits = search.find(connection, q, account=account, livemode=livemode)
        if not hits:
            hits = search.in_events(connection, q, account=account, livemode=livemode, personal=sees)
    shown = [answers.Hit.model_validate(asdict(hit)) for hit in hits[: search.HITS_MAX]]
    return answers.Found(data=shown, has_more=len(hits) > search.HITS_MAX)
