"""Folds refund events into refunds. ``charge.refund.updated`` carries a refund and means ``refund.updated``.

Source: https://docs.stripe.com/api/refunds/object. A refund may fail after it succeeded. The object has no
``livemode``, so that of the event counts.
"""

from typing import Final

from msgspec import UNSET, Struct, UnsetType

from schemas.own_events import observed
from worker.folds.facts import Event, Facts, Row
from worker.folds.join import RowSpec, unknown_status
from worker.folds.reading import (
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

TYPES: Final = (
    "refund.created",
    "refund.updated",
    "refund.failed",
    "charge.refund.updated",
    observed("refund"),
)


class Refund(Struct):
    """The fields of a refund that are kept."""

    id: Name
    amount: Whole | UnsetType | None = UNSET
    charge: Reference | UnsetType = UNSET
    created: Seconds | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    failure_reason: str | UnsetType | None = UNSET
    payment_intent: Reference | UnsetType = UNSET
    reason: str | UnsetType | None = UNSET
    status: str | UnsetType | None = UNSET


_reader = Reader(Refund)
_NO_MONEY: Final = 2
_RANKS: Final = {"pending": 0, "requires_action": 0, "succeeded": 1, "failed": _NO_MONEY, "canceled": _NO_MONEY}


def fold(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``TYPES``, about its refund.

    Raises:
        Unfoldable: when the refund in it cannot be read.
    """
    refund, before = _reader.read(event.payload)
    rank = _rank(refund.status)
    reported = None if before is None else _reported(before)
    moments = {"failed_at": event.created} if rank == _NO_MONEY else {}
    return (
        make_facts(event, "refunds", refund.id, after=_reported(refund), before=reported, rank=rank, moments=moments),
    )


def _rank(status: object) -> int:
    return _RANKS.get(str(status), 0)


def _reported(refund: Refund) -> Reported:
    return Reported(
        carried(
            status=refund.status,
            currency=refund.currency,
            amount=refund.amount,
            reason=refund.reason,
            failure_reason=refund.failure_reason,
            created=moment(refund.created),
        ),
        references(charge=refund.charge, payment_intent=refund.payment_intent),
    )


def _rank_of(row: Row) -> int:
    return _rank(row["status"])


_COLUMNS: Final = (
    *("status", "currency", "amount", "charge", "payment_intent", "reason", "failure_reason"),
    *("created", "failed_at"),
)
ROW_SPEC: Final = RowSpec(
    table="refunds",
    subject="refund",
    empty=dict.fromkeys(_COLUMNS),
    rank_of=_rank_of,
    ranks=_RANKS,
    anomalies=lambda row: unknown_status(row, _RANKS),
)
