"""What invoice events say of an invoice, and invoice payment events of the way to its payment.

Source: https://docs.stripe.com/api/invoices/object and https://docs.stripe.com/api/invoice-payment/object.

``invoice.upcoming`` is a preview of an invoice that does not exist, and ``invoice.deleted`` tells of a draft
that nobody ever owed: neither is folded.
"""

from datetime import datetime
from typing import Final

from msgspec import UNSET, Struct, UnsetType

from worker.folds.facts import Anomaly, Change, Event, Facts, Row, utc
from worker.folds.join import Shape, unknown_status
from worker.folds.reading import Name, Reader, Reference, Seconds, Told, Whole, carried, moment, references, say

TYPES: Final = (
    "invoice.created",
    "invoice.finalization_failed",
    "invoice.finalized",
    "invoice.marked_uncollectible",
    "invoice.overdue",
    "invoice.overpaid",
    "invoice.paid",
    "invoice.payment_action_required",
    "invoice.payment_attempt_required",
    "invoice.payment_failed",
    "invoice.payment_succeeded",
    "invoice.sent",
    "invoice.updated",
    "invoice.voided",
    "invoice.will_be_due",
    "payfold.invoice.observed",
)
PAYMENT_TYPES: Final = ("invoice_payment.paid", "payfold.invoice_payment.observed")


class _Transitions(Struct):
    finalized_at: Seconds | None = None
    paid_at: Seconds | None = None
    voided_at: Seconds | None = None


class _SubscriptionDetails(Struct):
    subscription: Reference = None


class _Parent(Struct):
    subscription_details: _SubscriptionDetails | None = None


class Invoice(Struct):
    """The fields of an invoice that are kept."""

    id: Name
    amount_due: Whole | UnsetType | None = UNSET
    amount_overpaid: Whole | UnsetType | None = UNSET
    amount_paid: Whole | UnsetType | None = UNSET
    amount_remaining: Whole | UnsetType | None = UNSET
    created: Seconds | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    customer: Reference | UnsetType = UNSET
    ending_balance: Whole | UnsetType | None = UNSET
    number: str | UnsetType | None = UNSET
    parent: _Parent | UnsetType | None = UNSET
    post_payment_credit_notes_amount: Whole | UnsetType | None = UNSET
    pre_payment_credit_notes_amount: Whole | UnsetType | None = UNSET
    starting_balance: Whole | UnsetType | None = UNSET
    status: str | UnsetType | None = UNSET
    status_transitions: _Transitions | UnsetType | None = UNSET
    subscription: Reference | UnsetType = UNSET
    total: Whole | UnsetType | None = UNSET


class _Payment(Struct):
    charge: Reference = None
    payment_intent: Reference = None


class _PaymentTransitions(Struct):
    paid_at: Seconds | UnsetType | None = UNSET


class InvoicePayment(Struct):
    """The fields of an invoice payment that are kept."""

    id: Name
    amount_paid: Whole | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    invoice: Reference | UnsetType = UNSET
    payment: _Payment | UnsetType | None = UNSET
    status: str | UnsetType | None = UNSET
    status_transitions: _PaymentTransitions | UnsetType | None = UNSET


_reader = Reader(Invoice)
_payment_reader = Reader(InvoicePayment)
_RANKS: Final = {"draft": 0, "open": 1, "uncollectible": 2, "paid": 3, "void": 3}


def fold(event: Event) -> tuple[Facts, ...]:
    """Return what *event*, of one of ``TYPES``, says of its invoice.

    Raises:
        Unfoldable: when the invoice in it cannot be read.
    """
    invoice, before = _reader.read(event.payload)
    told = None if before is None else _told(before)
    rank, moments = _rank(invoice.status), _moments(event, invoice)
    return (say(event, "invoices", invoice.id, after=_told(invoice), before=told, rank=rank, moments=moments),)


def _rank(status: object) -> int:
    return _RANKS.get(str(status), 0)


def _told(invoice: Invoice) -> Told:
    return Told(
        carried(
            number=invoice.number,
            status=invoice.status,
            currency=invoice.currency,
            total=invoice.total,
            amount_due=invoice.amount_due,
            amount_paid=invoice.amount_paid,
            amount_remaining=invoice.amount_remaining,
            amount_overpaid=invoice.amount_overpaid,
            starting_balance=invoice.starting_balance,
            ending_balance=invoice.ending_balance,
            pre_payment_credit_notes_amount=invoice.pre_payment_credit_notes_amount,
            post_payment_credit_notes_amount=invoice.post_payment_credit_notes_amount,
            created=moment(invoice.created),
        ),
        references(customer=invoice.customer, subscription=_subscription(invoice)),
    )


def _subscription(invoice: Invoice) -> Reference | UnsetType:
    """The parent's since basil, the invoice's own before."""
    if isinstance(invoice.parent, _Parent):
        details = invoice.parent.subscription_details
        return None if details is None else details.subscription
    return invoice.subscription if isinstance(invoice.parent, UnsetType) else None


def _moments(event: Event, invoice: Invoice) -> dict[str, datetime]:
    """Return the times that the invoice tells; where it only tells its status, the event's."""
    told = invoice.status_transitions if isinstance(invoice.status_transitions, _Transitions) else _Transitions()
    known = {"finalized_at": told.finalized_at, "paid_at": told.paid_at, "voided_at": told.voided_at}
    moments = {name: utc(at) for name, at in known.items() if at is not None}
    if invoice.status == "paid":
        moments.setdefault("paid_at", event.created)
    if invoice.status == "void":
        moments.setdefault("voided_at", event.created)
    return moments


def _anomalies(row: Row) -> list[Anomaly]:
    found = unknown_status(row, _RANKS)
    if row["paid_at"] is not None and row["voided_at"] is not None:
        found.append(Anomaly("paid_and_void", {}))
    return found


_MOVES: Final = ("status", "currency", "amount_due", "amount_paid", "amount_remaining")
_SHOWN: Final = (*_MOVES, "total", "customer", "subscription")


def _changes(before: Row | None, after: Row) -> list[Change]:
    if before is not None and all(before[name] == after[name] for name in _MOVES):
        return []
    known = None if before is None else {name: before[name] for name in _SHOWN}
    return [Change("invoice.changed", known, {name: after[name] for name in _SHOWN})]


SHAPE: Final = Shape(
    table="invoices",
    subject="invoice",
    empty=dict.fromkeys(
        (
            *("number", "status", "currency", "total"),
            *("amount_due", "amount_paid", "amount_remaining", "amount_overpaid"),
            *("starting_balance", "ending_balance"),
            *("pre_payment_credit_notes_amount", "post_payment_credit_notes_amount"),
            *("customer", "subscription", "created", "finalized_at", "paid_at", "voided_at"),
        )
    ),
    rank_of=lambda row: _rank(row["status"]),
    anomalies=_anomalies,
    changes=_changes,
)


def fold_payment(event: Event) -> tuple[Facts, ...]:
    """Return what *event*, of one of ``PAYMENT_TYPES``, says of its invoice payment.

    Raises:
        Unfoldable: when the invoice payment in it cannot be read.
    """
    payment, before = _payment_reader.read(event.payload)
    told = None if before is None else _payment_told(before)
    return (say(event, "invoice_payments", payment.id, after=_payment_told(payment), before=told),)


def _payment_told(payment: InvoicePayment) -> Told:
    way = payment.payment if isinstance(payment.payment, _Payment) else _Payment()
    told = payment.status_transitions
    return Told(
        carried(
            status=payment.status,
            currency=payment.currency,
            amount_paid=payment.amount_paid,
            paid_at=moment(told.paid_at) if isinstance(told, _PaymentTransitions) else UNSET,
        ),
        references(invoice=payment.invoice, payment_intent=way.payment_intent, charge=way.charge),
    )


PAYMENT_SHAPE: Final = Shape(
    table="invoice_payments",
    subject="invoice_payment",
    empty=dict.fromkeys(("invoice", "payment_intent", "charge", "status", "currency", "amount_paid", "paid_at")),
)
