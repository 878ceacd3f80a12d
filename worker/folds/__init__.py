"""The meaning of each event: pure functions from an event to facts, and from facts to a row.

Nothing here reads a clock, opens a connection or logs. ``FOLD_VERSION``, in schemas/fold_version.py, rises whenever a
fold would return other facts for an event that is already folded. The clock then queues the events that an older
version folded.
"""

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from msgspec import Struct

from schemas.errors import Unfoldable
from schemas.fold_version import FOLD_VERSION
from schemas.own_events import EVENT_IGNORED, is_own
from worker.folds import (
    balance,
    charge,
    checkout_session,
    credit_note,
    customer,
    dispute,
    invoice,
    payment_intent,
    payment_link,
    portal,
    refund,
)
from worker.folds.facts import Event, Facts
from worker.folds.join import RowSpec

Fold: TypeAlias = Callable[[Event], tuple[Facts, ...]]

FOLDS: Final[Mapping[str, tuple[str, Fold]]] = {
    **dict.fromkeys(balance.TRANSACTION_TYPES, ("customer_balance_transaction", balance.fold_transaction)),
    **dict.fromkeys(charge.TYPES, ("charge", charge.fold)),
    **dict.fromkeys(checkout_session.TYPES, ("checkout.session", checkout_session.fold)),
    **dict.fromkeys(credit_note.TYPES, ("credit_note", credit_note.fold)),
    **dict.fromkeys(customer.TYPES, ("customer", customer.fold)),
    **dict.fromkeys(dispute.TYPES, ("dispute", dispute.fold)),
    **dict.fromkeys(invoice.TYPES, ("invoice", invoice.fold)),
    **dict.fromkeys(invoice.PAYMENT_TYPES, ("invoice_payment", invoice.fold_payment)),
    **dict.fromkeys(payment_intent.TYPES, ("payment_intent", payment_intent.fold)),
    **dict.fromkeys(payment_link.TYPES, ("payment_link", payment_link.fold)),
    **dict.fromkeys(portal.CONFIGURATION_TYPES, ("billing_portal.configuration", portal.fold_configuration)),
    **dict.fromkeys(portal.SESSION_TYPES, ("billing_portal.session", portal.fold_session)),
    **dict.fromkeys(refund.TYPES, ("refund", refund.fold)),
}
"""By event type: the type of the object that the event must carry, and the fold that reads the event."""

STRIPE_TYPES: Final = tuple(sorted(kind for kind in FOLDS if not is_own(kind)))
"""The types of Stripe's own events that a fold reads. A webhook endpoint has to send all of them."""

API_VERSION: Final = "2026-10-28.endive"
"""The newest version of Stripe's API that the folds were written for. They read the fields of older ones as well."""

ROW_SPECS: Final[Mapping[str, RowSpec]] = {
    spec.table: spec
    for spec in (
        balance.ROW_SPEC,
        balance.TRANSACTION_SPEC,
        charge.ROW_SPEC,
        checkout_session.ROW_SPEC,
        credit_note.LINE_SPEC,
        credit_note.ROW_SPEC,
        customer.ROW_SPEC,
        dispute.ROW_SPEC,
        invoice.PAYMENT_SPEC,
        invoice.ROW_SPEC,
        payment_intent.ROW_SPEC,
        payment_link.ROW_SPEC,
        portal.CONFIGURATION_SPEC,
        portal.SESSION_SPEC,
        refund.ROW_SPEC,
    )
}
"""By table: how the rows of the table are joined."""

TABLES_OF_OBJECT: Final[Mapping[str, tuple[str, ...]]] = {
    "billing_portal.configuration": ("portal_configurations",),
    "billing_portal.session": ("portal_sessions",),
    "charge": ("charges",),
    "checkout.session": ("orders",),
    "credit_note": ("credit_notes",),
    "customer": ("customers",),
    "customer_balance_transaction": ("balance_transactions",),
    "dispute": ("disputes",),
    "invoice": ("invoices",),
    "invoice_payment": ("invoice_payments",),
    "payment_intent": ("payment_intents",),
    "payment_link": ("payment_links",),
    "refund": ("refunds",),
}
"""By type of object: the tables in which the object's own id is the key of a row."""


class Verdict(Struct, frozen=True):
    """The outcome of one event: facts if it is folded, otherwise a reason and the reason's code, the *cause*."""

    state: str
    reason: str | None = None
    facts: tuple[Facts, ...] = ()
    cause: str | None = None


def _unwanted(kind: str) -> Verdict:
    if kind.startswith(("v1.", "v2.")):
        reason = "a thin event carries no object: it is read from Stripe where a key is configured"
        return Verdict("ignored", reason, cause="thin_event")
    return Verdict("ignored", f"no fold wants the type {kind}", cause="type_unwanted")


def _parked(cause: str, reason: str) -> Verdict:
    return Verdict("parked", reason, cause=cause)


def ignored_by_operator(reason: str) -> Verdict:
    """Return the verdict on an event that an operator ignores for *reason*."""
    return Verdict("ignored", reason, cause="set_aside")


def judge(event: Event) -> Verdict:
    """Return the facts of *event*, or the reason why it has none."""
    if event.type == EVENT_IGNORED:
        return Verdict("folded")
    wanted = FOLDS.get(event.type)
    if wanted is None:
        return _unwanted(event.type)
    object_type, fold = wanted
    if event.object_type != object_type:
        found = event.object_type or "unnamed"
        return _parked("object_unexpected", f"its object is {found}, where {object_type} is wanted")
    try:
        return Verdict("folded", facts=fold(event))
    except Unfoldable as error:
        return _parked("payload_unreadable", str(error))
    except Exception as error:  # noqa: BLE001 - a fault of a fold parks its event, and holds up no other
        # The error's message could quote the event, so only the error's type is kept.
        return _parked("fold_failed", f"the fold failed with {type(error).__name__}")


__all__ = [
    "API_VERSION",
    "FOLDS",
    "FOLD_VERSION",
    "ROW_SPECS",
    "STRIPE_TYPES",
    "TABLES_OF_OBJECT",
    "Verdict",
    "ignored_by_operator",
    "judge",
]
