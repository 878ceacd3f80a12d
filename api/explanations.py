"""Explains a row: which event set each of its columns, and why every other event about it did not."""

from dataclasses import asdict
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request

from api import problems, reads
from api.addresses import Id
from api.reads import Account, Livemode, Moment
from api.tokens import SeesPersonalData, require
from schemas import answers, lookup
from worker.folds.facts import Subject
from worker.proof import explain

EVENTS_MAX: Final = 1_000
"""An object with more events is explained by the command, since all of them are read and folded at once."""

router: Final = APIRouter(prefix="/v1", dependencies=[Depends(require("read"))], route_class=reads.Route)

AsOf = Annotated[
    Moment | None,
    Query(description="as it was known then, by the events that had been received: a time with its offset"),
]


def explained(request: Request, table: str, id_: str, **asked: Any) -> answers.Explanation:  # noqa: ANN401 - parameters of the routes
    """Return the explanation of the row *id_* of *table*, as it was *asked* for: ``account``, ``livemode``, ``as_of``.

    Without ``sees`` it is without personal data.
    """
    engine = request.app.state.engine
    with reads.reading(engine) as connection:
        world = lookup.world_of(connection, id_, account=asked["account"], livemode=asked["livemode"])
    subject, bounds = Subject(table, *world, id_), reads.bounds_of(engine)
    with reads.in_time():
        found = explain.explain(engine, subject, as_of=asked["as_of"], events_max=EVENTS_MAX, bounds=bounds)
    return answers.Explanation.of(asdict(found), personal=asked["sees"])


@router.get("/orders/{order_id:id}/explanation", tags=["orders"], responses=problems.declared(404, 409))
def explain_order(
    request: Request,
    order_id: Id,
    sees: SeesPersonalData,
    as_of: AsOf = None,
    account: Account = None,
    livemode: Livemode = None,
) -> answers.Explanation:
    """Explain an order."""
    return explained(request, "orders", order_id, sees=sees, as_of=as_of, account=account, livemode=livemode)


@router.get("/credit-notes/{note_id:id}/explanation", tags=["credit notes"], responses=problems.declared(404, 409))
def explain_credit_note(
    request: Request,
    note_id: Id,
    sees: SeesPersonalData,
    as_of: AsOf = None,
    account: Account = None,
    livemode: Livemode = None,
) -> answers.Explanation:
    """Explain a credit note."""
    return explained(request, "credit_notes", note_id, sees=sees, as_of=as_of, account=account, livemode=livemode)


@router.get("/payment-links/{link_id:id}/explanation", tags=["payment links"], responses=problems.declared(404, 409))
def explain_payment_link(
    request: Request,
    link_id: Id,
    sees: SeesPersonalData,
    as_of: AsOf = None,
    account: Account = None,
    livemode: Livemode = None,
) -> answers.Explanation:
    """Explain a payment link."""
    return explained(request, "payment_links", link_id, sees=sees, as_of=as_of, account=account, livemode=livemode)


@router.get("/customers/{customer_id:id}/explanation", tags=["customers"], responses=problems.declared(404, 409))
def explain_customer(
    request: Request,
    customer_id: Id,
    sees: SeesPersonalData,
    as_of: AsOf = None,
    account: Account = None,
    livemode: Livemode = None,
) -> answers.Explanation:
    """Explain a customer; a balance is explained by the command."""
    return explained(request, "customers", customer_id, sees=sees, as_of=as_of, account=account, livemode=livemode)
