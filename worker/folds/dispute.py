"""What dispute events say.

Source: https://docs.stripe.com/api/disputes/object.

Note [An inquiry is no dispute]
    Some banks ask before they dispute: the statuses that begin with ``warning_`` take no money. An inquiry becomes a
    dispute at its first other status; one that ends as ``warning_closed`` never was a dispute, and so closes none. A
    dispute that was lost may be appealed, and be won after all: it closes again, and does not open again.
"""

from typing import Final

from msgspec import UNSET, Struct, UnsetType

from schemas.kinds import Kind
from worker.folds.facts import Change, Event, Facts, Row
from worker.folds.join import Shape, unknown_status
from worker.folds.reading import Name, Reader, Reference, Told, Whole, carried, references, say

TYPES: Final = (
    "charge.dispute.closed",
    "charge.dispute.created",
    "charge.dispute.funds_reinstated",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.updated",
    "payfold.dispute.observed",
)
_CLOSED: Final = ("lost", "prevented", "won")
_INQUIRY: Final = "warning_"
_OVER: Final = (*_CLOSED, "warning_closed")
_STATUSES: Final = (
    *_OVER,
    *("needs_response", "under_review", "appeal_needs_response", "appeal_under_review"),
    *("warning_needs_response", "warning_under_review"),
)


class Dispute(Struct):
    """The fields of a dispute that are kept."""

    id: Name
    amount: Whole | UnsetType | None = UNSET
    charge: Reference | UnsetType = UNSET
    currency: str | UnsetType | None = UNSET
    payment_intent: Reference | UnsetType = UNSET
    reason: str | UnsetType | None = UNSET
    status: str | UnsetType | None = UNSET


_reader = Reader(Dispute)


def fold(event: Event) -> tuple[Facts, ...]:
    """Return what *event*, of one of ``TYPES``, says of its dispute.

    Raises:
        Unfoldable: when the dispute in it cannot be read.
    """
    dispute, before = _reader.read(event.payload)
    told = None if before is None else _told(before)
    return (say(event, "disputes", dispute.id, after=_told(dispute), before=told),)


def _told(dispute: Dispute) -> Told:
    return Told(
        carried(status=dispute.status, reason=dispute.reason, currency=dispute.currency, amount=dispute.amount),
        references(charge=dispute.charge, payment_intent=dispute.payment_intent),
    )


_SHOWN: Final = ("status", "reason", "currency", "amount", "charge", "payment_intent")


def _kind(row: Row | None) -> Kind | None:
    status = None if row is None else row["status"]
    if status is None or str(status).startswith(_INQUIRY):
        return None
    return "dispute.closed" if status in _CLOSED else "dispute.opened"


def _changes(before: Row | None, after: Row) -> list[Change]:
    kind, known_kind = _kind(after), _kind(before)
    is_step = known_kind is None if kind == "dispute.opened" else before is None or before["status"] != after["status"]
    if kind is None or not is_step:
        return []
    known = None if before is None else {name: before[name] for name in _SHOWN}
    return [Change(kind, known, {name: after[name] for name in _SHOWN})]


SHAPE: Final = Shape(
    table="disputes",
    subject="dispute",
    empty=dict.fromkeys(("charge", "payment_intent", "status", "reason", "currency", "amount")),
    anomalies=lambda row: unknown_status(row, _STATUSES),
    changes=_changes,
    prefer=lambda facts: int(facts.columns.get("status") in _OVER),
)
