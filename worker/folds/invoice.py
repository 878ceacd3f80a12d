"""Folds invoice events into invoices, and invoice payment events into the links from an invoice to its payment.

Source: https://docs.stripe.com/api/invoices/object and https://docs.stripe.com/api/invoice-payment/object.

``invoice.upcoming`` is a preview of an invoice that does not exist, and is not folded. Only a draft can be deleted.

Note [Before basil an invoice names its payment]
    Since basil an invoice payment links an invoice to its payment intent. Before basil, the invoice itself named its
    intent and its charge. For such an invoice we make a payment row under the invoice's own id, which no invoice
    payment of Stripe's has. An account that moved to basil may have both rows for one payment; both name one intent.

Note [Before 2018 an invoice had no status]
    It had ``paid``, ``forgiven``, ``closed`` and ``attempted``. Paid and forgiven (today's uncollectible) are certain.
    An invoice that was attempted and is not closed is open. A closed invoice may have been given up or paid elsewhere,
    and an invoice that was not attempted may be a draft or not: in both cases the status is null, with an anomaly.
    Source: https://docs.stripe.com/upgrades (2018-11-08).
"""

from datetime import datetime
from typing import Final

from msgspec import UNSET, Struct, UnsetType

from schemas.own_events import observed
from worker.folds.facts import Anomaly, Change, Event, Facts, Row, utc
from worker.folds.join import UNKNOWN_STATUS, RowSpec, unknown_status
from worker.folds.reading import (
    Expanded,
    Name,
    Reader,
    Reference,
    Reported,
    Seconds,
    Whole,
    carried,
    make_facts,
    moment,
    references,
)

DELETED: Final = "invoice.deleted"
TYPES: Final = (
    "invoice.created",
    DELETED,
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
    observed("invoice"),
)
PAYMENT_TYPES: Final = ("invoice_payment.paid", observed("invoice_payment"))


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
    attempted: bool | UnsetType | None = UNSET
    charge: Reference | UnsetType = UNSET
    closed: bool | UnsetType | None = UNSET
    created: Seconds | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    customer: Reference | UnsetType = UNSET
    date: Seconds | UnsetType | None = UNSET
    deleted: bool | None = None
    ending_balance: Whole | UnsetType | None = UNSET
    finalized_at: Seconds | None = None
    forgiven: bool | UnsetType | None = UNSET
    number: str | UnsetType | None = UNSET
    paid: bool | UnsetType | None = UNSET
    paid_out_of_band: bool | UnsetType | None = UNSET
    parent: _Parent | UnsetType | None = UNSET
    payment_intent: Reference | UnsetType = UNSET
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
_DELETED_RANK: Final = 4


def fold(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``TYPES``, about its invoice and, before basil, about its payment.

    Raises:
        Unfoldable: when the invoice in it cannot be read.
    """
    invoice, before = _reader.read(event.payload)
    after, known = _reported(invoice), None if before is None else _reported(before)
    is_deleted = bool(invoice.deleted) or event.type == DELETED
    if is_deleted:
        after.columns["deleted"] = True
    rank = _DELETED_RANK if is_deleted else _rank(after.columns.get("status"))
    moments = _moments(event, invoice, after.columns.get("status"))
    facts = make_facts(event, "invoices", invoice.id, after=after, before=known, rank=rank, moments=moments)
    return (facts, *_own_payment(event, invoice, before))


def _rank(status: object) -> int:
    return _RANKS.get(str(status), 0)


def _own_payment(event: Event, invoice: Invoice, before: Invoice | None) -> tuple[Facts, ...]:
    """Return the payment that the invoice itself names: see Note [Before basil an invoice names its payment]."""
    if not isinstance(invoice.payment_intent, (str, Expanded)) and not isinstance(invoice.charge, (str, Expanded)):
        return ()
    after, known = _own_payment_reported(invoice), None if before is None else _own_payment_reported(before)
    paid_at = _moments(event, invoice, _status(invoice)).get("paid_at")
    moments = {} if paid_at is None or invoice.paid_out_of_band is True else {"paid_at": paid_at}
    rank = _rank(_status(invoice))
    return (make_facts(event, "invoice_payments", invoice.id, after=after, before=known, rank=rank, moments=moments),)


def _ways(invoice: Invoice) -> dict[str, str | None]:
    """Return the charge and the payment intent that the invoice itself names, before basil."""
    return references(charge=invoice.charge, payment_intent=invoice.payment_intent)


_STATUS_OF_OWN_PAYMENT: Final = {"paid": "paid", "open": "open", "uncollectible": "open", "void": "canceled"}


def _own_payment_reported(invoice: Invoice) -> Reported:
    # An invoice that was paid elsewhere was not paid by its intent, and the state of that intent is not known.
    is_elsewhere = invoice.paid_out_of_band is True
    return Reported(
        carried(
            status=None if is_elsewhere else _STATUS_OF_OWN_PAYMENT.get(str(_status(invoice))),
            currency=invoice.currency,
            amount_paid=None if is_elsewhere else invoice.amount_paid,
            # The charge of the latest attempt. Each attempt has its own charge, so this is a column and no reference.
            **references(charge=invoice.charge),
        ),
        {"invoice": invoice.id, **references(payment_intent=invoice.payment_intent)},
    )


def _status(invoice: Invoice) -> str | UnsetType | None:
    """Return the status; infer it where there is none: see Note [Before 2018 an invoice had no status]."""
    if invoice.status is not UNSET or invoice.closed is UNSET:
        return invoice.status
    if invoice.paid is True:
        return "paid"
    if invoice.forgiven is True:
        return "uncollectible"
    return "open" if invoice.attempted is True and invoice.closed is False else None


def _reported(invoice: Invoice) -> Reported:
    return Reported(
        carried(
            number=invoice.number,
            status=_status(invoice),
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
            created=moment(invoice.date if invoice.created is UNSET else invoice.created),
            # The invoice's row has no such columns. They are part of the state that orders its events and its payment.
            **{f"_{name}": way for name, way in _ways(invoice).items()},
        ),
        references(customer=invoice.customer, subscription=_subscription(invoice)),
    )


def _subscription(invoice: Invoice) -> Reference | UnsetType:
    """Return the parent's subscription since basil, and the invoice's own before."""
    if isinstance(invoice.parent, _Parent):
        details = invoice.parent.subscription_details
        return None if details is None else details.subscription
    return invoice.subscription if isinstance(invoice.parent, UnsetType) else None


def _moments(event: Event, invoice: Invoice, status: object) -> dict[str, datetime]:
    """Return the times of the invoice's steps. If it lacks the time of its status, that is the event's time."""
    reported = invoice.status_transitions if isinstance(invoice.status_transitions, _Transitions) else _Transitions()
    # For some months before 2019-03-14 the invoice itself had this field.
    finalized_at = invoice.finalized_at if reported.finalized_at is None else reported.finalized_at
    known = {"finalized_at": finalized_at, "paid_at": reported.paid_at, "voided_at": reported.voided_at}
    moments = {name: utc(at) for name, at in known.items() if at is not None}
    if status == "paid":
        moments.setdefault("paid_at", event.created)
    if status == "void":
        moments.setdefault("voided_at", event.created)
    return moments


def _rank_of(row: Row) -> int:
    return _DELETED_RANK if row["deleted"] is True else _rank(row["status"])


def _anomalies(row: Row) -> list[Anomaly]:
    found = unknown_status(row, _RANKS)
    if row["status"] is None and row["deleted"] is False:
        found.append(Anomaly(UNKNOWN_STATUS, {"status": None}))
    if row["deleted"] is True and (row["finalized_at"] is not None or row["status"] not in (None, "draft")):
        found.append(Anomaly("deleted_and_final", {"status": row["status"]}))
    if row["paid_at"] is not None and row["voided_at"] is not None:
        found.append(Anomaly("paid_and_void", {}))
    return found


_MOVES: Final = ("status", "deleted", "currency", "amount_due", "amount_paid", "amount_remaining")
_SHOWN: Final = (*_MOVES, "total", "customer", "subscription")


def _changes(before: Row | None, after: Row) -> list[Change]:
    if before is not None and all(before[name] == after[name] for name in _MOVES):
        return []
    known = None if before is None else {name: before[name] for name in _SHOWN}
    return [Change("invoice.changed", known, {name: after[name] for name in _SHOWN})]


ROW_SPEC: Final = RowSpec(
    table="invoices",
    subject="invoice",
    empty={
        **dict.fromkeys(
            (
                *("number", "status", "currency", "total"),
                *("amount_due", "amount_paid", "amount_remaining", "amount_overpaid"),
                *("starting_balance", "ending_balance"),
                *("pre_payment_credit_notes_amount", "post_payment_credit_notes_amount"),
                *("customer", "subscription", "created", "finalized_at", "paid_at", "voided_at"),
            )
        ),
        "deleted": False,
    },
    rank_of=_rank_of,
    ranks=_RANKS,
    anomalies=_anomalies,
    changes=_changes,
)


def fold_payment(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``PAYMENT_TYPES``, about its invoice payment.

    Raises:
        Unfoldable: when the invoice payment in it cannot be read.
    """
    payment, before = _payment_reader.read(event.payload)
    reported = None if before is None else _payment_reported(before)
    return (make_facts(event, "invoice_payments", payment.id, after=_payment_reported(payment), before=reported),)


def _payment_reported(payment: InvoicePayment) -> Reported:
    way = payment.payment if isinstance(payment.payment, _Payment) else _Payment()
    reported = payment.status_transitions
    return Reported(
        carried(
            status=payment.status,
            currency=payment.currency,
            amount_paid=payment.amount_paid,
            paid_at=moment(reported.paid_at) if isinstance(reported, _PaymentTransitions) else UNSET,
        ),
        references(invoice=payment.invoice, payment_intent=way.payment_intent, charge=way.charge),
    )


def _rank_of_payment(row: Row) -> int:
    """Return the rank of the row; a payment that was read from its invoice has the invoice's rank.

    The row does not show the invoice's status, so this is the highest rank that fits the status of the payment.
    """
    if row["id"] != row["invoice"]:
        return 0
    return _RANKS["uncollectible"] if row["status"] == "open" else _RANKS["paid"]


PAYMENT_SPEC: Final = RowSpec(
    table="invoice_payments",
    subject="invoice_payment",
    rank_of=_rank_of_payment,
    empty=dict.fromkeys(("invoice", "payment_intent", "charge", "status", "currency", "amount_paid", "paid_at")),
    # A payment that was read from its invoice follows the invoice's order.
    leader="invoices",
    ranks=_RANKS,
    is_led=lambda subject: not subject.id.startswith("inpay_"),
)
