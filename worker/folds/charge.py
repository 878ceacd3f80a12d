"""What charge events say of a charge: the cross-check of what its refunds add up to.

Source: https://docs.stripe.com/api/charges/object.
"""

from typing import Final

from msgspec import UNSET, Struct, UnsetType

from worker.folds.facts import Event, Facts
from worker.folds.join import Shape, unknown_status
from worker.folds.reading import Name, Reader, Reference, Told, Whole, carried, references, say

TYPES: Final = (
    "charge.captured",
    "charge.expired",
    "charge.failed",
    "charge.pending",
    "charge.refunded",
    "charge.succeeded",
    "charge.updated",
    "payfold.charge.observed",
)


class Charge(Struct):
    """The fields of a charge that are kept."""

    id: Name
    amount: Whole | UnsetType | None = UNSET
    amount_refunded: Whole | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    disputed: bool | UnsetType | None = UNSET
    payment_intent: Reference | UnsetType = UNSET
    refunded: bool | UnsetType | None = UNSET
    status: str | UnsetType | None = UNSET


_reader = Reader(Charge)
_RANKS: Final = {"pending": 0, "succeeded": 1, "failed": 1}


def fold(event: Event) -> tuple[Facts, ...]:
    """Return what *event*, of one of ``TYPES``, says of its charge.

    Raises:
        Unfoldable: when the charge in it cannot be read.
    """
    charge, before = _reader.read(event.payload)
    told = None if before is None else _told(before)
    return (say(event, "charges", charge.id, after=_told(charge), before=told, rank=_rank(charge.status)),)


def _rank(status: object) -> int:
    return _RANKS.get(str(status), 0)


def _told(charge: Charge) -> Told:
    return Told(
        carried(
            status=charge.status,
            currency=charge.currency,
            amount=charge.amount,
            amount_refunded=charge.amount_refunded,
            refunded=charge.refunded,
            disputed=charge.disputed,
        ),
        references(payment_intent=charge.payment_intent),
    )


def _prefer(facts: Facts) -> int:
    refunded = facts.columns.get("amount_refunded")
    return refunded if isinstance(refunded, int) else 0


SHAPE: Final = Shape(
    table="charges",
    subject="charge",
    empty=dict.fromkeys(("payment_intent", "status", "currency", "amount", "amount_refunded", "refunded", "disputed")),
    rank_of=lambda row: _rank(row["status"]),
    anomalies=lambda row: unknown_status(row, _RANKS),
    prefer=_prefer,
)
