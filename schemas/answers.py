"""The shapes of the JSON answers. Money is in the currency's smallest unit, times are in UTC."""

from datetime import datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """What every answer has in common: it says what it is, and cannot be changed."""

    model_config = ConfigDict(frozen=True)


class Shown(Answer):
    """A row of a table: its world, its id, and the event that decided it."""

    account: str = Field(description="Stripe account, or the label of the secret that verified the event")
    livemode: bool
    id: str
    event_id: str = Field(description="the event that decided the row")
    as_of: datetime = Field(description="when Stripe created that event")


class Order(Shown):
    """An order: a Checkout Session as the events tell it. Its id is the session's."""

    status: str | None = Field(
        description="open, processing, paid, failed, expired or complete; null where Stripe said something unknown"
    )
    session_status: str | None
    payment_status: str | None
    mode: str | None
    currency: str | None
    amount_subtotal: int | None
    amount_discount: int | None
    amount_shipping: int | None
    amount_tax: int | None
    amount_total: int | None
    presentment_currency: str | None
    presentment_amount: int | None
    customer: str | None
    customer_email: str | None
    client_reference_id: str | None = Field(description="from a payment link it is what the buyer's browser sent")
    payment_link: str | None
    payment_intent: str | None
    subscription: str | None
    invoice: str | None
    recovered_from: str | None
    recovery_url: str | None
    shipping: dict[str, Any] | None
    metadata: dict[str, Any] | None
    created: datetime | None
    expires_at: datetime | None
    completed_at: datetime | None
    paid_at: datetime | None
    failed_at: datetime | None
    expired_at: datetime | None
    lines_complete: bool


class PaymentLink(Shown):
    """A payment link as the events tell it."""

    active: bool | None
    url: str | None
    currency: str | None
    metadata: dict[str, Any] | None
    created: datetime | None = Field(description="null until the created event is seen: the object does not say")


class Event(Answer):
    """An event in the inbox, without its payload."""

    account: str
    livemode: bool
    id: str
    seq: int = Field(description="the order in which events were recorded")
    type: str
    api_version: str | None
    created: datetime
    object_type: str | None
    object_id: str | None
    redacted: list[str] = Field(description="places in the payload whose credentials are blanked")
    payload_sha256: str = Field(description="of the body as it came, in hexadecimal")
    source: str
    received_at: datetime
    state: str = Field(description="pending, folded, ignored or parked")
    reason: str | None
    attempts: int
    folded_at: datetime | None
    fold_version: int | None


class EventWithPayload(Event):
    """An event in the inbox with its payload as text, since not every payload is JSON that can be read."""

    payload: str


class Change(Answer):
    """A step that was recorded once what is known moved forward."""

    seq: int = Field(description="in commit order: ask for what comes after the last one you saw")
    account: str
    livemode: bool
    subject: str
    subject_id: str
    kind: str
    event_id: str
    source: str
    at: datetime = Field(description="when Stripe created the event that decided")
    before: dict[str, Any] | None
    after: dict[str, Any] | None


Row = TypeVar("Row", bound=Answer)


class Page(Answer, Generic[Row]):
    """Rows, newest first, and the cursor of the next page."""

    data: list[Row]
    next_cursor: str | None = Field(description="pass it as `cursor`; null on the last page")


class Changes(Answer):
    """Changes in the order in which they were committed."""

    data: list[Change]
    next_after: int = Field(description="pass it as `after`")
    has_more: bool


class Health(Answer):
    """Whether this process can take deliveries, and how its neighbours are."""

    ready: bool
    database: str
    migrations: str
    broker: str = Field(description="reported only: a broker that is away does not stop deliveries")
