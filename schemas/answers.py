"""The shapes of the JSON answers. Money is in the currency's smallest unit, times are in UTC.

What they are made of, and which readers may see a field, is in ``schemas.readers``: see Note [Personal data is left
out] there.
"""

from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, Any, Final, Generic, Self, TypeVar

from pydantic import Field

from schemas import kinds, tables
from schemas.readers import PERSONAL, Answer, Audience, Id, OneOf, Personal, Public, Word, personal_fields

__all__ = ["PERSONAL", "Answer", "Audience", "Id", "Personal", "Public", "Word", "personal_fields"]

T = TypeVar("T")

SET_ASIDE: Final = "set_aside"
FOUND_KINDS: Final = (
    *("order", "charge", "refund", "dispute", "invoice", "credit_note"),
    *("customer", "payment_link", "payment_intent", "event"),
)
"""What a search finds."""
FOUND_ORDERS_MAX: Final = 10
"""Orders that one hit of a search leads to: the newest."""
OrderStatus = Annotated[Public[str], OneOf(tables.ORDER_STATUSES)]
RefundStatus = Annotated[Public[str], OneOf(tables.REFUND_STATUSES)]
State = Annotated[Public[str], OneOf(tables.STATES)]
Source = Annotated[Public[str], OneOf(tables.SOURCES)]
Cause = Annotated[Public[str], OneOf(tables.CAUSES)]
ChangeKind = Annotated[Public[str], OneOf(kinds.KINDS)]
ChangeSubject = Annotated[Public[str], OneOf(kinds.SUBJECTS)]
AnomalyKind = Annotated[Public[str], OneOf(tables.ANOMALY_KINDS)]
AnomalySubject = Annotated[Public[str], OneOf(tables.ANOMALY_SUBJECTS)]


class Shown(Answer):
    """A row of a table: its world, its id, and the event that decided it."""

    account: Id = Field(description="Stripe account, or the label of the secret that verified the event")
    livemode: bool
    id: Id
    event_id: Id = Field(description="the event that decided the row")
    as_of: datetime = Field(description="when Stripe created that event")


class Order(Shown):
    """An order: a Checkout Session as its events report it. Its id is the session's."""

    status: OrderStatus | None = Field(description="null where Stripe's words are unknown")
    session_status: Word | None
    payment_status: Word | None
    mode: Word | None
    currency: Word | None
    amount_subtotal: int | None
    amount_discount: int | None
    amount_shipping: int | None
    amount_tax: int | None
    amount_total: int | None
    presentment_currency: Word | None
    presentment_amount: int | None
    customer: Id | None
    customer_email: Personal[str] = None
    client_reference_id: Id | None = Field(description="from a payment link it is what the buyer's browser sent")
    payment_link: Id | None
    payment_intent: Id | None
    subscription: Id | None
    invoice: Id | None
    recovered_from: Id | None
    recovery_url: Personal[str] = None
    shipping: Personal[dict[str, Any]] = None
    metadata: Personal[dict[str, Any]] = None
    created: datetime | None
    expires_at: datetime | None
    completed_at: datetime | None
    paid_at: datetime | None
    failed_at: datetime | None
    expired_at: datetime | None
    lines_complete: bool
    refunded_amount: int | None = Field(description="null where not known, or in another currency than the order")
    credited_amount: int | None = Field(description="by credit notes on the order's own invoice that are not void")
    disputed_amount: int | None
    refund_status: RefundStatus | None = Field(description="of what was captured, in any currency; null if not known")


class OrderLine(Shown):
    """A line of an order. Its amounts are those of the whole quantity."""

    order_id: Id | None
    description: Personal[str] = None
    price: Id | None
    product: Id | None
    quantity: int | None
    currency: Word | None
    amount_subtotal: int | None
    amount_discount: int | None
    amount_tax: int | None
    amount_total: int | None


class OrderWithLines(Order):
    """An order with its lines: none until all of them were read from Stripe; `lines_complete` is then true."""

    lines: list[OrderLine]


class PaymentLink(Shown):
    """A payment link as its events report it."""

    active: bool | None
    url: Public[str] | None
    currency: Word | None
    metadata: Personal[dict[str, Any]] = None
    created: datetime | None = Field(description="null until the created event is seen: the object has no such time")


class Invoice(Shown):
    """An invoice as its events report it."""

    number: Id | None
    status: Word | None
    currency: Word | None
    total: int | None
    amount_due: int | None
    amount_paid: int | None
    amount_remaining: int | None
    amount_overpaid: int | None
    starting_balance: int | None
    ending_balance: int | None
    pre_payment_credit_notes_amount: int | None
    post_payment_credit_notes_amount: int | None
    customer: Id | None
    subscription: Id | None
    deleted: bool
    created: datetime | None
    finalized_at: datetime | None
    paid_at: datetime | None
    voided_at: datetime | None


class CreditNote(Shown):
    """A credit note: amount = pre + post, and post = refunded + out of band + to the balance."""

    number: Id | None
    status: Word | None
    type: Word | None
    reason: Word | None
    currency: Word | None
    amount: int | None
    pre_payment_amount: int | None
    post_payment_amount: int | None
    refunded_amount: int | None = Field(description="null where the note names a refund of which no amount is known")
    out_of_band_amount: int | None
    to_balance_amount: int | None = Field(description="what is left of post; null where that is not known")
    customer: Id | None
    invoice: Id | None
    customer_balance_transaction: Id | None
    memo: Personal[str] = None
    created: datetime | None
    effective_at: datetime | None
    voided_at: datetime | None
    lines_complete: bool
    refund: Id | None = Field(description="the one that an old API version names; null where the note has amounts")


class CreditNoteLine(Shown):
    """A line of a credit note, of those that were seen."""

    credit_note: Id | None
    type: Word | None
    invoice_line_item: Id | None
    description: Personal[str] = None
    quantity: int | None
    amount: int | None
    discount_amount: int | None


class CreditNoteWithLines(CreditNote):
    """A credit note with the lines that were seen; `lines_complete` is true where those are all."""

    lines: list[CreditNoteLine]


class Refund(Shown):
    """A refund as its own events report it."""

    status: Word | None
    currency: Word | None
    amount: int | None
    charge: Id | None
    payment_intent: Id | None
    reason: Word | None
    failure_reason: Word | None
    created: datetime | None


class PortalConfiguration(Shown):
    """A configuration of the billing portal."""

    active: bool | None
    is_default: bool | None
    name: Public[str] | None
    features: Public[dict[str, Any]] | None
    login_page_url: Public[str] | None
    created: datetime | None
    updated: datetime | None


class PortalSession(Shown):
    """A session of the billing portal; its url is a credential and is kept nowhere."""

    configuration: Id | None
    customer: Id | None
    flow_type: Word | None
    return_url: Personal[str] = None
    created: datetime | None
    expired_at: datetime | None


class BalanceChange(Shown):
    """A change of a balance, as an event of its customer reported it."""

    amount: int
    ending_balance: int


class BalanceTransaction(Shown):
    """A transaction of a balance, as Stripe's ledger lists it."""

    type: Word | None
    amount: int | None
    ending_balance: int | None
    invoice: Id | None
    credit_note: Id | None
    order_id: Id | None
    description: Personal[str] = None
    created: datetime | None


class Balance(Answer):
    """A customer's balance in one currency. Negative is credit."""

    account: Id
    livemode: bool
    currency: Word
    amount: int | None
    event_id: Id
    as_of: datetime
    changes: list[BalanceChange] = Field(description="newest first")
    transactions: list[BalanceTransaction] = Field(description="newest first; empty where the ledger was not read")
    chain_is_unbroken: bool | None = Field(
        description="whether each transaction begins where the one before ended; null where the ledger was not read"
    )


class Dispute(Shown):
    """A dispute, or an inquiry that may become one, as its events report it."""

    charge: Id | None
    payment_intent: Id | None
    status: Word | None
    reason: Word | None
    currency: Word | None
    amount: int | None


class RelatedTransaction(BalanceTransaction):
    """A transaction of a balance, with its currency."""

    currency: Word | None


class Related(Answer):
    """What else moved the money of an order, newest first; its charges and refunds are in its explanation."""

    invoice: Invoice | None
    credit_notes: list[CreditNote] = Field(description="of its invoice")
    disputes: list[Dispute]
    balance_transactions: list[RelatedTransaction] = Field(description="that name the order")


class CustomerBalance(Answer):
    """A customer's balances, one for each currency; they are never added."""

    customer: Id
    balances: list[Balance]


class Anomaly(Answer):
    """Something about a row that should not be."""

    account: Id
    livemode: bool
    id: Id
    kind: AnomalyKind
    subject: AnomalySubject
    subject_id: Id
    detail: Public[dict[str, Any]]
    event_id: Id
    as_of: datetime
    seen_at: datetime
    resolved_at: datetime | None


class Event(Answer):
    """An event in the inbox, without its payload."""

    account: Id
    livemode: bool
    id: Id
    seq: int = Field(description="the order in which events were recorded")
    type: Word
    api_version: Word | None
    created: datetime
    object_type: Word | None
    object_id: Id | None
    redacted: Public[list[str]] = Field(description="places in the payload whose credentials are blanked")
    payload_sha256: Public[str] = Field(description="of the body as it came, in hexadecimal")
    source: Source
    received_at: datetime
    state: State
    cause: Cause | None = Field(description="a code for the state's cause")
    reason: Public[str] | None = Field(
        None, description="the same for people; an operator's own words, of an event that was ignored, are personal"
    )
    attempts: int = Field(description="how often it was folded, or failed to be")
    due_at: datetime | None = Field(description="of a pending event that failed: when it is tried again")
    folded_at: datetime | None
    fold_version: int | None

    @classmethod
    def of(cls, row: Mapping[str, Any], *, personal: bool) -> Self:
        """Return the answer that shows *row*."""
        is_hidden = row["cause"] == SET_ASIDE and not personal
        shown = {name: value for name, value in row.items() if not (is_hidden and name == "reason")}
        return super().of(shown, personal=personal)


class Rendering(Answer):
    """A copy of an event with another content than the copy that is folded."""

    content_sha256: Public[str] | None = Field(description="of its content; null until it has been compared")
    payload_sha256: Public[str] = Field(description="of the body as it came, in hexadecimal")
    signed: bool = Field(description="a verified delivery signed it")
    source: Source
    received_at: datetime
    type: Word
    api_version: Word | None
    created: datetime
    object_type: Word | None
    object_id: Id | None
    redacted: Public[list[str]]
    payload: Personal[str] = Field(None, description="null where it is archived")


class EventWithPayload(Event):
    """An event in the inbox with its payload as text, since not every payload is JSON that can be read."""

    payload: Personal[str] = Field(None, description="null where it is archived")
    archived: bool = Field(description="the payload is in an archive, no longer in the database")
    renderings: list[Rendering] = Field(description="copies with other contents, which are not folded")


class EventState(Answer):
    """An event that an operator acts on, and the state that it has now; a worker folds it soon."""

    account: Id
    livemode: bool
    id: Id
    state: State


class IgnoredEvent(EventState):
    """An event that is ignored once a worker has folded the observation of it."""

    observation_id: Id = Field(description="the event that records who ignores it, and why")


class MatchingEvents(Answer):
    """How many events match, and how many of them were queued."""

    count: int
    until: int = Field(description="the number up to which they were counted: pass it with `confirm`")
    queued: int | None = Field(description="null where nothing was to be done yet: pass `confirm` and `until`")


class MoneyOfGroup(Answer):
    """An amount in one currency, of so many objects."""

    currency: Word
    amount: int
    objects: int


class ParkedGroup(Answer):
    """The parked events of one account, mode, cause and type."""

    account: Id
    livemode: bool
    cause: Cause | None
    type: Word
    count: int
    first_received_at: datetime
    last_received_at: datetime
    money: list[MoneyOfGroup] | None = Field(
        description="the amounts of the objects that they are about, each object once; null where none is known"
    )
    unknown: int = Field(description="events of which no amount is known: they have none, or were not read")


class ParkedGroups(Answer):
    """The groups of parked events, the largest first."""

    data: list[ParkedGroup]
    is_cut: bool = Field(description="there are more groups, or more events, than were looked at")


class DescribedLine(Answer):
    """A line with its description; of a credit note price and product are not known."""

    id: Id
    description: Personal[str]
    price: Id | None
    product: Id | None
    quantity: int | None


class PersonalData(Answer):
    """What is personal of a change's subject, as it is now, and not as it was at the time of the change."""

    customer_email: Personal[str]
    metadata: Personal[dict[str, Any]]
    shipping: Personal[dict[str, Any]] = Field(description="of an order")
    memo: Personal[str] = Field(description="of a credit note")
    lines: Personal[list[DescribedLine]] = Field(
        description="of an order or a credit note; null where not all of them are known"
    )


class Change(Answer):
    """A step that was recorded once what is known moved forward."""

    seq: int = Field(description="in commit order: ask for what comes after the last one you saw")
    account: Id
    livemode: bool
    subject: ChangeSubject
    subject_id: Id
    kind: ChangeKind
    event_id: Id
    source: Source
    at: datetime = Field(description="when Stripe created the event that decided")
    before: Public[dict[str, Any]] | None
    after: Public[dict[str, Any]] | None = Field(
        description="what a shop acts on; of order.paid and order.expired with `lines`, null where not all are known"
    )
    personal: Personal[PersonalData] = Field(None, description="only for tokens of the scope personal, else absent")


Row = TypeVar("Row", bound=Answer)


class Page(Answer, Generic[Row]):
    """Rows, newest first, and the cursor of the next page."""

    data: list[Row]
    next_cursor: Public[str] | None = Field(description="pass it as `cursor`; null on the last page")


class Changes(Answer):
    """Changes in the order in which they were committed."""

    data: list[Change]
    next_after: int = Field(description="pass it as `after`; it also moves past what the filters left out")
    has_more: bool = Field(description="ask again at once, even where this page is empty")


class Customer(Shown):
    """A customer."""

    email: Personal[str] = None
    name: Personal[str] = None
    currency: Word | None
    delinquent: bool | None
    deleted: bool
    test_clock: Id | None
    metadata: Personal[dict[str, Any]] = None
    created: datetime | None


class ExpiringOrder(Answer):
    """An order whose session is open, and when the session ends unless the buyer completes it before."""

    account: Id
    livemode: bool
    id: Id
    mode: Word | None
    currency: Word | None
    amount_total: int | None
    customer: Id | None
    customer_email: Personal[str] = None
    payment_link: Id | None
    created: datetime | None
    expires_at: datetime | None = Field(description="when Stripe ends it")
    allowed_until: datetime | None = Field(
        description="when it is expired at Stripe by PAYFOLD_SESSION_TTL_MINUTES; null where there is no limit, or no"
        " key for its account and mode"
    )
    ends_at: datetime | None = Field(description="the earlier of the two; a time that has passed means any moment now")


class Expiring(Answer):
    """Open sessions, the next to end first."""

    data: list[ExpiringOrder]
    has_more: bool


class ExplainedColumn(Answer):
    """A column of a row, and the event that set it."""

    column: Public[str]
    value: Public[Any] = Field(None, description="absent where it is personal data that the token may not see")
    how: Public[str] = Field(description="how the value came about")
    event_id: Id | None
    type: Word | None
    created: datetime | None


class TimelineEvent(Answer):
    """An event about a row: what it set, or why it set nothing."""

    event_id: Id
    type: Word
    created: datetime
    received_at: datetime
    source: Source
    api_version: Word | None
    state: State
    cause: Cause | None
    sets: Public[list[str]] = Field(description="the columns that have their values from this event")
    verdict: Public[str]


class ExplainedAnomaly(Answer):
    """An anomaly of the row that is in force."""

    kind: AnomalyKind
    detail: Public[dict[str, Any]]
    seen_at: datetime


class MoneySource(Answer):
    """A charge or a refund behind the refunded amount of an order."""

    object: Word
    id: Id
    status: Word | None
    currency: Word | None
    amount: int | None
    amount_captured: int | None = Field(None, description="of a charge; absent of a refund")
    amount_refunded: int | None = Field(None, description="as the charge reports it; absent of a refund")
    amount_by_refunds: int | None = Field(
        None, description="the sum of the charge's refunds that count, null where not known; absent of a refund"
    )
    event_id: Id
    as_of: datetime
    verdict: Public[str]


class Explanation(Answer):
    """A row as its events make it: which event set each column, and what became of the others."""

    table: Public[str]
    id: Id
    account: Id
    livemode: bool
    row: Public[dict[str, Any]] | None = Field(description="null where the events make no row; without personal data")
    columns: list[ExplainedColumn]
    timeline: list[TimelineEvent] = Field(description="in the order in which they are laid over each other")
    anomalies: list[ExplainedAnomaly]
    dashboard: Public[str] | None = Field(description="where Stripe's Dashboard shows the object")
    money: list[MoneySource] = Field(description="of an order: the charges and refunds behind its refunded amount")

    @classmethod
    def of(cls, row: Mapping[str, Any], *, personal: bool) -> Self:
        """Return the explanation *row*, without the values of personal columns unless they are to be shown."""
        hidden = frozenset[str]() if personal else personal_fields(OF_TABLES[row["table"]])
        shown = {
            **row,
            "row": None if row["row"] is None else {k: v for k, v in row["row"].items() if k not in hidden},
            "columns": [
                {name: value for name, value in each.items() if name != "value" or each["column"] not in hidden}
                for each in row["columns"]
            ],
            "timeline": [
                {**each, "verdict": _IGNORED} if each["cause"] == SET_ASIDE and not personal else each
                for each in row["timeline"]
            ],
        }
        return cls.model_validate(shown)


_IGNORED: Final = "ignored by an operator; the reason is personal data"


OF_TABLES: Final[Mapping[str, type[Answer]]] = {
    "orders": Order,
    "order_book": Order,
    "order_lines": OrderLine,
    "payment_links": PaymentLink,
    "customers": Customer,
    "invoices": Invoice,
    "credit_notes": CreditNote,
    "credit_note_lines": CreditNoteLine,
    "refunds": Refund,
    "disputes": Dispute,
    "balance_changes": BalanceChange,
    "balance_transactions": BalanceTransaction,
    "portal_configurations": PortalConfiguration,
    "portal_sessions": PortalSession,
}
"""By table or view, the answer that declares which of its columns are personal data; other tables have none."""


class FoundOrder(Answer):
    """An order that a hit leads to."""

    id: Id
    status: OrderStatus | None
    currency: Word | None
    amount_total: int | None
    created: datetime | None


class EventSignature(Answer):
    """The signature that came with an event."""

    verified: bool = Field(description="one of our secrets made it; false where a log only quotes it")
    signed_at: datetime | None = Field(description="the time that it states")
    secret: int | None = Field(
        description="which of STRIPE_WEBHOOK_SECRETS made it, from 1; null where that cannot be checked again, since"
        " the secret is no longer set or the bytes are not kept as they came"
    )


class EventRow(Answer):
    """The row of an event's own object, and what the event set in it."""

    table: Public[str]
    id: Id
    sets: Public[list[str]] = Field(description="the columns that have their values from this event")
    verdict: Public[str]


class RecordedChange(Change):
    """A change, in the feed or withheld from it."""

    withheld: Word | None = Field(description="why it is not in the feed; null where it is")


class EventTrace(Answer):
    """Where an event came from, and what it did."""

    account: Id
    livemode: bool
    id: Id
    signature: EventSignature | None = Field(description="null where it came without one")
    row: EventRow | None = Field(description="null where it is not folded, or makes no row of its object")
    orders: list[FoundOrder] = Field(description="that its object belongs to, newest first")
    changes: list[RecordedChange] = Field(
        description="of its object, of these orders and of its customer's balances, in the order of their commits;"
        " without those of invoices and payment links"
    )


class Hit(Answer):
    """An object that was found, and its orders."""

    kind: Annotated[Public[str], OneOf(FOUND_KINDS)]
    account: Id
    livemode: bool
    id: Id
    matched: Public[str] = Field(description="the column that held what was searched for")
    status: Word | None
    currency: Word | None
    amount: int | None
    created: datetime | None
    orders: list[FoundOrder] = Field(description=f"newest first, at most {FOUND_ORDERS_MAX}")


class Found(Answer):
    """What a search found, newest first."""

    data: list[Hit]
    has_more: bool = Field(description="there is more than is shown: narrow the search")


class CountOfStatus(Answer):
    """How many orders have a status, in any currency."""

    status: OrderStatus | None = Field(description="null where Stripe's words are unknown")
    count: int


class Sum(Answer):
    """How many have a status and a currency, and their money, which is never added across currencies."""

    status: Word | None
    currency: Word | None
    count: int
    amount: int | None = Field(description="of those with an amount and a currency; null where none has")
    without_amount: int = Field(description="how many of them have no amount, or no currency")


class Summary(Answer):
    """The orders, refunds and disputes of one account and mode in a period."""

    account: Id
    livemode: bool
    orders_by_status: list[CountOfStatus]
    orders: list[Sum] = Field(description="those created in the period, with their `amount_total`")
    refunds: list[Sum] = Field(description="those created in the period")
    disputes: list[Sum] = Field(description="those with their deciding event, the last, in the period")
    undated_orders: int = Field(description="orders without a time of creation, which are in no period")
    undated_refunds: int = Field(description="the same of refunds")


class SummaryOfPeriod(Answer):
    """Summaries of a period of whole hours, for each account and mode that has any rows."""

    since: datetime = Field(description="what was asked for, or a day before `until`, rounded down to the hour")
    until: datetime = Field(description="what was asked for, or now, rounded up to the hour")
    data: list[Summary]


class SumOfDay(Sum):
    """The orders that were created on one day, of one account, mode, status and currency."""

    account: Id
    livemode: bool
    day: date = Field(description="in UTC")


class DaysOfPeriod(Answer):
    """The orders of each day of a period."""

    since: datetime
    until: datetime
    data: list[SumOfDay]


class LinkFunnel(Answer):
    """How far the sessions of one payment link came that are in one currency."""

    account: Id
    livemode: bool
    payment_link: Id
    currency: Word | None
    opened: int
    completed: int
    paid: int
    expired: int
    amount_paid: int = Field(description="of the paid sessions")
    without_amount: int = Field(description="paid sessions of which the amount is not known")


class Reconciliation(Answer):
    """A reconciliation: of all accounts and modes together."""

    id: int
    state: Annotated[Word, OneOf(tables.REQUEST_STATES)] = Field(description="done, or of one that was asked for")
    outcome: Annotated[Word, OneOf(tables.RECONCILED)] | None = Field(
        description="ok, drift or incomplete: no difference, and a part that was asked for was not looked at; null"
        " before it is done"
    )
    checks: Public[list[str]]
    drift: int | None = Field(description="how many differences it found; null before it is done")
    asked_at: datetime | None = Field(description="null where no token asked for it")
    asked_by: Word | None = Field(description="the name of the token")
    started_at: datetime | None
    finished_at: datetime | None = Field(description="when it was done, or failed")
    failure: Word | None = Field(
        description="why it has no result: lost where its worker ended, not_taken without one, else a kind of error"
    )
    detail: Word | None = Field(description="the failure in words")
    has_report: bool = Field(description="whether its differences are kept: those of the last runs are")


class ReconciliationWithResult(Reconciliation):
    """A reconciliation with its result."""

    result: Public[dict[str, Any]] | None = Field(
        description="as `payfold reconcile --format json` prints it, with its differences where these are kept; null"
        " before it is done"
    )


class Registered(Answer):
    """The session is kept; *recorded* is false where it was already. The order follows once it is folded."""

    id: Id
    account: Id
    livemode: bool
    event_id: Id
    recorded: bool


class Expired(Answer):
    """What the session of an order now is at Stripe. The order follows once it is folded."""

    id: Id
    account: Id
    livemode: bool
    session_status: Word
    payment_status: Word | None


class ReadOrder(Answer):
    """The session of an order as Stripe has it now. The order follows once it is folded."""

    id: Id
    account: Id
    livemode: bool
    recorded: bool = Field(description="it differs from its last event, or its order was in doubt")
    session_status: Word | None
    payment_status: Word | None


class NewPortalSession(Answer):
    """A billing portal session. The url is a credential, and answered this once."""

    id: Id
    account: Id
    livemode: bool
    url: Public[str]
    customer: Id | None
    configuration: Id | None
    return_url: Personal[str] = None
    created: int = Field(description="Unix seconds")
