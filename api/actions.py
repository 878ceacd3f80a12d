"""The acts that a shop may ask for: keep the session that it opened, expire one, open the billing portal.

The outcome is recorded in the inbox like every other fact; nothing here writes another table.
"""

import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from sqlalchemy import Connection, select
from starlette.exceptions import HTTPException

from api import posted, problems, reads
from api.addresses import Id
from api.reads import Account, Livemode
from api.tokens import SeesPersonalData, require
from schemas import accounts, answers, checkout, inbox, observations, tables
from schemas.broker import Waker
from schemas.budget import Lane
from schemas.checkout import Ending
from schemas.database import cursor, transaction
from schemas.errors import MissingAtStripe, NotFoundError
from schemas.events import CREATED_MAX, TEXT_CHARACTERS_MAX
from schemas.inbox import Delivery, Receipt, Recorded
from schemas.observations import World
from schemas.own_events import PORTAL_SESSION_OBSERVED, SESSION_REGISTERED
from schemas.settings import Settings
from schemas.stripe_api import StripeApi

SESSION_BYTES_MAX: Final = 256 * 1024
PORTAL_BYTES_MAX: Final = 64 * 1024
_MISSING: Final = "Stripe knows no such session in this account and mode; that is recorded."

router: Final = APIRouter(prefix="/v1", route_class=reads.Route)

Seconds = Annotated[StrictInt, Field(ge=0, le=CREATED_MAX)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=TEXT_CHARACTERS_MAX)]


class OpenSession(BaseModel):
    """A Checkout Session as Stripe returned it, as far as it is looked at here; all of it is kept."""

    model_config = ConfigDict(extra="allow")

    object: Literal["checkout.session"]
    id: Name
    # Any other value has a fault of its own, which names the remedy.
    status: Annotated[StrictStr, Field(json_schema_extra={"const": "open"})]
    payment_status: Annotated[StrictStr, Field(json_schema_extra={"not": {"const": "paid"}})]
    mode: StrictStr
    livemode: StrictBool
    created: Seconds
    expires_at: Seconds
    currency: StrictStr | None = None
    amount_total: StrictInt | None = None


@router.put(
    "/orders/{order_id:id}",
    tags=["orders"],
    dependencies=[Depends(require("register"))],
    responses={201: {"model": answers.Registered}, **problems.declared(408, 413)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "The Checkout Session as Stripe returned it; its url and client_secret are not kept.",
            "content": {"application/json": {"schema": OpenSession.model_json_schema()}},
        }
    },
)
def register_order(
    request: Request,
    response: Response,
    order_id: Id,
    body: Annotated[bytes, Depends(posted.body(SESSION_BYTES_MAX))],
    account: Account = None,
) -> answers.Registered:
    """Register the session that the shop has just opened: Stripe sends no event of it."""
    about = posted.object_in(body)
    session = _open_session(about, order_id)
    label = _label(request.app.state.settings) if account is None else account
    world = World(_names(request).get(label, label), session.livemode)
    delivery = observations.observe(
        SESSION_REGISTERED,
        about,
        account=world.account,
        livemode=world.livemode,
        # The observation holds for the moment of creation: later changes come from Stripe.
        created=session.created,
        now=datetime.now(UTC),
    )
    is_new = _record(request, [delivery])[0].recorded is Recorded.NEW
    response.status_code = 201 if is_new else 200
    return answers.Registered(
        id=order_id, account=world.account, livemode=world.livemode, event_id=delivery.envelope.id, recorded=is_new
    )


def _open_session(body: dict[str, Any], order_id: str) -> OpenSession:
    session = posted.read(OpenSession, body)
    if session.id != order_id:
        raise posted.fault(("id",), "it is not the id in the address")
    if session.status != "open" or session.payment_status == "paid":
        told = f"this one is {session.status} and {session.payment_status}: wait for its webhook"
        raise posted.fault(("status",), f"only an open, unpaid session is registered; {told}")
    return session


def _label(settings: Settings) -> str:
    """Return the account of a session that names none: the label that its own webhook will have.

    Raises:
        RequestValidationError: there are several such labels.
    """
    labels = {secret.account for secret in settings.signing_secrets} or {""}
    if len(labels) == 1:
        return labels.pop()
    if "" in labels:
        return ""
    fault = f"say whose session it is: account= is one of {', '.join(sorted(labels))}"
    raise RequestValidationError([{"type": "value_error", "loc": ("query", "account"), "msg": fault, "input": None}])


def _names(request: Request) -> dict[str, str]:
    """Return the newest name of each account by its old ones, and take the keys of Stripe's API under these as well."""
    with reads.reading(request.app.state.engine) as connection, cursor(connection) as opened:
        names = accounts.names(opened)
    request.app.state.stripe.learn(names)
    return names


def _record(request: Request, deliveries: list[Delivery]) -> list[Receipt]:
    """Record *deliveries* and, once they are committed, wake the worker."""
    with transaction(request.app.state.engine) as connection, cursor(connection) as opened:
        receipts = inbox.record(opened, deliveries)
    waker: Waker = request.app.state.waker
    waker.wake()
    return receipts


@router.post(
    "/orders/{order_id:id}/expire",
    tags=["orders"],
    dependencies=[Depends(require("admin"))],
    responses=problems.declared(404, 409, 502),
)
def expire_order(request: Request, order_id: Id, account: Account = None, livemode: Livemode = None) -> answers.Expired:
    """Expire an open order's session at Stripe, now. Where the buyer was faster, that is what is recorded."""
    order = reads.one(request, tables.orders, order_id, account, livemode)
    if order["status"] != "open":
        raise HTTPException(409, f"Only an open order can be expired; this one is {order['status'] or 'unclear'}.")
    world = World(order["account"], order["livemode"])
    _names(request)
    outcome = checkout.expire(request.app.state.stripe, world, order_id, read_first=False, now=datetime.now(UTC))
    _record(request, list(outcome.deliveries))
    session = outcome.session or {}
    if outcome.ending is Ending.MISSING:
        raise NotFoundError(_MISSING)
    if session.get("status") == "complete":
        raise HTTPException(409, "The buyer has completed it meanwhile, so it is not expired; that is recorded.")
    if outcome.ending is Ending.STILL_OPEN:
        raise HTTPException(409, "Stripe declined to expire it, and it is still open.")
    return answers.Expired(
        id=order_id,
        account=world.account,
        livemode=world.livemode,
        session_status=session["status"],
        payment_status=session.get("payment_status"),
    )


_SETTLED_BY_READING: Final = ("ambiguous_order", "expired_and_complete", "missing_at_stripe")
"""Anomalies of an order that a session read at Stripe may end, also one that shows nothing new."""


@router.post(
    "/orders/{order_id:id}/read",
    tags=["orders"],
    dependencies=[Depends(require("admin"))],
    responses=problems.declared(404, 409, 502),
)
def read_order(request: Request, order_id: Id, account: Account = None, livemode: Livemode = None) -> answers.ReadOrder:
    """Read an order's session at Stripe, now. What differs from its last event is recorded."""
    order = reads.one(request, tables.orders, order_id, account, livemode)
    world = World(order["account"], order["livemode"])
    _names(request)
    now = datetime.now(UTC)
    try:
        answer = checkout.read(request.app.state.stripe, world, order_id, lane=Lane.EXPIRY)
    except MissingAtStripe:
        _record(request, [checkout.missing(world, order_id, now=now)])
        raise NotFoundError(_MISSING) from None
    return answers.ReadOrder(
        id=order_id,
        account=world.account,
        livemode=world.livemode,
        recorded=_record_news(request, checkout.observed(answer, world, now=now)),
        session_status=_word(answer.body.get("status")),
        payment_status=_word(answer.body.get("payment_status")),
    )


def _word(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _record_news(request: Request, delivery: Delivery) -> bool:
    """Record *delivery*, of an order, if it shows something new or may end a doubt, and return whether it was new."""
    with transaction(request.app.state.engine) as connection, cursor(connection) as opened:
        is_wanted = bool(observations.news(opened, [delivery])) or _is_in_doubt(connection, delivery)
    return is_wanted and _record(request, [delivery])[0].recorded is Recorded.NEW


def _is_in_doubt(connection: Connection, delivery: Delivery) -> bool:
    anomalies = tables.anomalies
    world = (anomalies.c.account == delivery.account, anomalies.c.livemode == delivery.envelope.livemode)
    in_force = (anomalies.c.subject_id == delivery.envelope.object_id, anomalies.c.resolved_at.is_(None))
    is_doubt = anomalies.c.kind.in_(_SETTLED_BY_READING)
    return connection.execute(select(select(anomalies.c.id).where(*world, *in_force, is_doubt).exists())).scalar_one()


class PortalSessionRequest(BaseModel):
    """Which billing portal the customer is to see, and where it leads back to."""

    model_config = ConfigDict(extra="forbid")

    configuration: Name | None = Field(None, description="a portal configuration; Stripe's default one if absent")
    return_url: Annotated[StrictStr, Field(max_length=5000)] | None = None
    locale: Name | None = None
    flow_type: Name | None = Field(None, description="a flow that needs no more than its name")


@router.post(
    "/customers/{customer_id:id}/portal-sessions",
    tags=["customers"],
    status_code=201,
    dependencies=[Depends(require("admin"))],
    responses=problems.declared(404, 408, 409, 413, 502),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": PortalSessionRequest.model_json_schema()}},
        }
    },
)
def create_portal_session(
    request: Request,
    customer_id: Id,
    body: Annotated[bytes, Depends(posted.body(PORTAL_BYTES_MAX))],
    sees: SeesPersonalData,
    account: Account = None,
    livemode: Livemode = None,
) -> answers.NewPortalSession:
    """Open a billing portal session. Its url lets its bearer in: it is answered once, and kept nowhere."""
    wanted = posted.read(PortalSessionRequest, posted.object_in(body))
    world = _world_of(request, customer_id, account, livemode)
    given = wanted.model_dump(exclude_none=True, exclude={"flow_type"})
    if wanted.flow_type is not None:
        given["flow_data"] = {"type": wanted.flow_type}
    api: StripeApi = request.app.state.stripe
    answer = api.call(
        world,
        "post",
        *("billing_portal", "sessions"),
        lane=Lane.EXPIRY,
        idempotency_key=f"payfold-portal-{uuid.uuid4()}",
        customer=customer_id,
        **given,
    )
    now = datetime.now(UTC)
    _record(request, [observations.of_answer(PORTAL_SESSION_OBSERVED, answer, world, now=now)])
    return answers.NewPortalSession.of({**answer.body, "account": world.account}, personal=sees)


def _world_of(request: Request, customer: str, account: str | None, livemode: bool | None) -> World:  # noqa: FBT001 - as asked
    """Return the world of *customer*: its known one, else the one asked for, else the only one that has a key."""
    names = _names(request)
    account = None if account is None else names.get(account, account)
    customers = tables.customers
    wanted = [customers.c.id == customer]
    wanted += [customers.c.account == account] if account is not None else []
    wanted += [customers.c.livemode == livemode] if livemode is not None else []
    with reads.reading(request.app.state.engine) as connection:
        query = select(customers.c.account, customers.c.livemode).where(*wanted).limit(2)
        known = [World(*row) for row in connection.execute(query)]
    api: StripeApi = request.app.state.stripe
    own = [
        world
        for world in api.own_worlds()
        if account in {None, world.account} and livemode in {None, world.livemode}
    ]  # fmt: skip
    found = known or own
    if len(found) > 1:
        raise HTTPException(409, "Several accounts or modes may be meant: add account= or livemode= to the address.")
    if not found:
        raise NotFoundError("This customer is not known here, and no key in STRIPE_API_KEY says where to look.")
    return found[0]
