"""Folds charge events into charges: whether the money was taken, is only held, or came back.

Source: https://docs.stripe.com/api/charges/object and
https://docs.stripe.com/payments/place-a-hold-on-a-payment-method. A released hold shows as ``charge.expired``, or as a
charge that was refunded and never captured. A pending charge of a delayed method may be marked as captured already.
"""

from datetime import datetime
from typing import Final

from msgspec import UNSET, Struct, UnsetType

from schemas.own_events import observed
from worker.folds.facts import Anomaly, Event, Facts, Row
from worker.folds.join import RowSpec, unknown_status
from worker.folds.reading import Name, Reader, Reference, Reported, Whole, carried, make_facts, references

EXPIRED: Final = "charge.expired"
TYPES: Final = (
    "charge.captured",
    EXPIRED,
    "charge.failed",
    "charge.pending",
    "charge.refunded",
    "charge.succeeded",
    "charge.updated",
    observed("charge"),
)


class Charge(Struct):
    """The fields of a charge that are kept."""

    id: Name
    amount: Whole | UnsetType | None = UNSET
    amount_captured: Whole | UnsetType | None = UNSET
    amount_refunded: Whole | UnsetType | None = UNSET
    captured: bool | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    disputed: bool | UnsetType | None = UNSET
    invoice: Reference | UnsetType = UNSET
    payment_intent: Reference | UnsetType = UNSET
    refunded: bool | UnsetType | None = UNSET
    status: str | UnsetType | None = UNSET


_reader = Reader(Charge)
_STATUSES: Final = ("pending", "succeeded", "failed")
_PENDING, _HELD, _ENDED = range(3)


def fold(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``TYPES``, about its charge.

    Raises:
        Unfoldable: when the charge in it cannot be read.
    """
    charge, before = _reader.read(event.payload)
    is_released = event.type == EXPIRED or (charge.refunded is True and charge.captured is False)
    return (
        make_facts(
            event,
            "charges",
            charge.id,
            after=_reported(charge),
            before=None if before is None else _reported(before),
            rank=_rank(charge.status, charge.captured, is_released=is_released),
            moments=_moments(event, charge, is_released=is_released),
        ),
    )


def _rank(status: object, captured: object, *, is_released: bool) -> int:
    if is_released or status == "failed":
        return _ENDED
    if status == "succeeded":
        return _HELD if captured is False else _ENDED
    return _PENDING


def _moments(event: Event, charge: Charge, *, is_released: bool) -> dict[str, datetime]:
    if is_released:
        return {"released_at": event.created}
    if charge.status == "succeeded" and charge.captured is True:
        return {"captured_at": event.created}
    return {}


def _reported(charge: Charge) -> Reported:
    return Reported(
        carried(
            status=charge.status,
            currency=charge.currency,
            amount=charge.amount,
            captured=charge.captured,
            amount_captured=charge.amount_captured,
            amount_refunded=charge.amount_refunded,
            refunded=charge.refunded,
            disputed=charge.disputed,
        ),
        references(payment_intent=charge.payment_intent, invoice=charge.invoice),
    )


def _prefer(facts: Facts) -> int:
    refunded = facts.columns.get("amount_refunded")
    return refunded if isinstance(refunded, int) else 0


def _rank_of(row: Row) -> int:
    return _rank(row["status"], row["captured"], is_released=row["released_at"] is not None)


def _anomalies(row: Row) -> list[Anomaly]:
    found = unknown_status(row, _STATUSES)
    if row["captured_at"] is not None and row["released_at"] is not None:
        found.append(Anomaly("released_and_captured", {}))
    return found


_COLUMNS: Final = (
    *("payment_intent", "invoice", "status", "currency", "amount", "captured", "amount_captured"),
    *("captured_at", "released_at", "amount_refunded", "refunded", "disputed"),
)
ROW_SPEC: Final = RowSpec(
    table="charges",
    subject="charge",
    empty=dict.fromkeys(_COLUMNS),
    rank_of=_rank_of,
    anomalies=_anomalies,
    prefer=_prefer,
)
