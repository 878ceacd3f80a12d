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
    refunded_amount: int | None = Field(description="null where the way from the order to its payment is not known")
    credited_amount: int | None = Field(description="by credit notes on the order's own invoice that are not void")
    disputed_amount: int | None
    refund_status: str | None = Field(description="none, partial or full; null as refunded_amount is")


class OrderLine(Shown):
    """A line of an order. Its amounts are those of the whole quantity."""

    order_id: str | None
    description: str | None
    price: str | None
    product: str | None
    quantity: int | None
    currency: str | None
    amount_subtotal: int | None
    amount_discount: int | None
    amount_tax: int | None
    amount_total: int | None


class OrderWithLines(Order):
    """An order with its lines: none until all of them were read from Stripe, as `lines_complete` says."""

    lines: list[OrderLine]


class PaymentLink(Shown):
    """A payment link as the events tell it."""

    active: bool | None
    url: str | None
    currency: str | None
    metadata: dict[str, Any] | None
    created: datetime | None = Field(description="null until the created event is seen: the object does not say")


class Invoice(Shown):
    """An invoice as the events tell it."""

    number: str | None
    status: str | None
    currency: str | None
    total: int | None
    amount_due: int | None
    amount_paid: int | None
    amount_remaining: int | None
    amount_overpaid: int | None
    starting_balance: int | None
    ending_balance: int | None
    pre_payment_credit_notes_amount: int | None
    post_payment_credit_notes_amount: int | None
    customer: str | None
    subscription: str | None
    created: datetime | None
    finalized_at: datetime | None
    paid_at: datetime | None
    voided_at: datetime | None


class CreditNote(Shown):
    """A credit note: amount = pre + post, and post = refunded + out of band + to the balance."""

    number: str | None
    status: str | None
    type: str | None
    reason: str | None
    currency: str | None
    amount: int | None
    pre_payment_amount: int | None
    post_payment_amount: int | None
    refunded_amount: int | None = Field(description="null where the note names a refund without its amount")
    out_of_band_amount: int | None
    to_balance_amount: int | None = Field(description="what is left of post; null where that is not known")
    customer: str | None
    invoice: str | None
    customer_balance_transaction: str | None
    memo: str | None
    created: datetime | None
    effective_at: datetime | None
    voided_at: datetime | None
    lines_complete: bool


class CreditNoteLine(Shown):
    """A line of a credit note, of those that were seen."""

    credit_note: str | None
    type: str | None
    invoice_line_item: str | None
    description: str | None
    quantity: int | None
    amount: int | None
    discount_amount: int | None


class CreditNoteWithLines(CreditNote):
    """A credit note with the lines that were seen; `lines_complete` says whether those are all."""

    lines: list[CreditNoteLine]


class Refund(Shown):
    """A refund as its own events tell it."""

    status: str | None
    currency: str | None
    amount: int | None
    charge: str | None
    payment_intent: str | None
    reason: str | None
    failure_reason: str | None
    created: datetime | None


class PortalConfiguration(Shown):
    """A configuration of the billing portal."""

    active: bool | None
    is_default: bool | None
    name: str | None
    features: dict[str, Any] | None
    login_page_url: str | None
    created: datetime | None
    updated: datetime | None


class PortalSession(Shown):
    """A session of the billing portal; its url is a credential and is kept nowhere."""

    configuration: str | None
    customer: str | None
    flow_type: str | None
    return_url: str | None
    created: datetime | None
    expired_at: datetime | None


class BalanceChange(Shown):
    """A change of a balance, as an event of its customer told it."""

    amount: int
    ending_balance: int


class BalanceTransaction(Shown):
    """A transaction of a balance, as Stripe's ledger lists it."""

    type: str | None
    amount: int | None
    ending_balance: int | None
    invoice: str | None
    credit_note: str | None
    order_id: str | None
    description: str | None
    created: datetime | None


class Balance(Answer):
    """A customer's balance in one currency. Negative is credit."""

    account: str
    livemode: bool
    currency: str
    amount: int | None
    event_id: str
    as_of: datetime
    changes: list[BalanceChange] = Field(description="newest first")
    transactions: list[BalanceTransaction] = Field(description="newest first; empty where the ledger was not read")
    chain_is_unbroken: bool | None = Field(
        description="whether each transaction begins where the one before ended; null where the ledger was not read"
    )


class CustomerBalance(Answer):
    """A customer's balances, one for each currency; they are never added."""

    customer: str
    balances: list[Balance]


class Anomaly(Answer):
    """Something about a row that should not be."""

    account: str
    livemode: bool
    id: str
    kind: str
    subject: str
    subject_id: str
    detail: dict[str, Any]
    event_id: str
    as_of: datetime
    seen_at: datetime
    resolved_at: datetime | None


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
    cause: str | None = Field(description="a code for the state's cause, as row_refused or type_unwanted")
    reason: str | None = Field(description="the same for people")
    attempts: int = Field(description="how often it was folded, or failed to be")
    due_at: datetime | None = Field(description="of a pending event that failed: when it is tried again")
    folded_at: datetime | None
    fold_version: int | None


class EventWithPayload(Event):
    """An event in the inbox with its payload as text, since not every payload is JSON that can be read."""

    payload: str | None = Field(description="null where it is archived")
    archived: bool = Field(description="the payload is in an archive, no longer in the database")


class DescribedLine(Answer):
    """A line with its description; of a credit note price and product are not known."""

    id: str
    description: str | None
    price: str | None
    product: str | None
    quantity: int | None


class PersonalData(Answer):
    """What is personal of a change's subject, as it is now, and not as it was at the time of the change."""

    customer_email: str | None
    metadata: dict[str, Any] | None
    shipping: dict[str, Any] | None = Field(description="of an order")
    memo: str | None = Field(description="of a credit note")
    lines: list[DescribedLine] | None = Field(
        description="of an order or a credit note; null where not all of them are known"
    )


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
    after: dict[str, Any] | None = Field(
        description="what a shop acts on; of order.paid and order.expired with `lines`, null where not all are known"
    )
    personal: PersonalData | None = Field(None, description="only for tokens of the scope personal, else absent")


Row = TypeVar("Row", bound=Answer)


class Page(Answer, Generic[Row]):
    """Rows, newest first, and the cursor of the next page."""

    data: list[Row]
    next_cursor: str | None = Field(description="pass it as `cursor`; null on the last page")


class Changes(Answer):
    """Changes in the order in which they were committed."""

    data: list[Change]
    next_after: int = Field(description="pass it as `after`; it also moves past what the filters left out")
    has_more: bool = Field(description="ask again at once, even where this page is empty")


class Registered(Answer):
    """The session is kept; *recorded* is false where it was already. The order follows once it is folded."""

    id: str
    account: str
    livemode: bool
    event_id: str
    recorded: bool


class Expired(Answer):
    """What the session of an order now is at Stripe. The order follows once it is folded."""

    id: str
    account: str
    livemode: bool
    session_status: str
    payment_status: str | None


class NewPortalSession(Answer):
    """A billing portal session. The url is a credential, and answered this once."""

    id: str
    account: str
    livemode: bool
    url: str
    customer: str | None
    configuration: str | None
    return_url: str | None = None
    created: int = Field(description="Unix seconds")


class Health(Answer):
    """Whether this process can take deliveries, and how its neighbours are."""

    ready: bool
    database: str
    migrations: str
    broker: str = Field(description="reported only: a broker that is away does not stop deliveries")
    stripe: str = Field(
        description="reported only: ok, no key, or stopped with the jobs that Stripe refuses, and failing with those"
        " that end before their time"
    )
