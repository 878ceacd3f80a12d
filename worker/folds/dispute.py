"""What dispute events say.

Source: https://docs.stripe.com/api/disputes/object.
"""

from typing import Final

from msgspec import UNSET, Struct, UnsetType

from schemas.kinds import Kind
from worker.folds.facts import Change, Event, Facts, Row
from worker.folds.join import Shape
from worker.folds.reading import Name, Reader, Reference, Told, Whole, carried, references, say

TYPES: Final = (
    "charge.dispute.closed",
    "charge.dispute.created",
    "charge.dispute.funds_reinstated",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.updated",
    "payfold.dispute.observed",
)
_CLOSED: Final = ("lost", "prevented", "warning_closed", "won")


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
    if row is None:
        return None
    return "dispute.closed" if row["status"] in _CLOSED else "dispute.opened"


def _changes(before: Row | None, after: Row) -> list[Change]:
    kind, was = _kind(after), _kind(before)
    # What was lost may be won on appeal, and is closed once more.
    is_closed_again = before is not None and kind == "dispute.closed" and before["status"] != after["status"]
    if kind is None or (kind == was and not is_closed_again):
        return []
    known = None if before is None else {name: before[name] for name in _SHOWN}
    return [Change(kind, known, {name: after[name] for name in _SHOWN})]


SHAPE: Final = Shape(
    table="disputes",
    subject="dispute",
    empty=dict.fromkeys(("charge", "payment_intent", "status", "reason", "currency", "amount")),
    changes=_changes,
    prefer=lambda facts: int(facts.columns.get("status") in _CLOSED),
)
