"""Folds the cancellation of a payment intent: no money will come by it.

Source: https://docs.stripe.com/api/payment_intents/object. No other event of an intent is kept, because its charges
show whether money came.
"""

from typing import Final

from msgspec import UNSET, Struct, UnsetType

from worker.folds.facts import Event, Facts
from worker.folds.join import RowSpec
from worker.folds.reading import Name, Reader, Reported, Seconds, carried, make_facts, moment

TYPES: Final = ("payment_intent.canceled",)


class PaymentIntent(Struct):
    """The fields of a payment intent that are kept."""

    id: Name
    canceled_at: Seconds | UnsetType | None = UNSET
    status: str | UnsetType | None = UNSET


_reader = Reader(PaymentIntent)


def fold(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``TYPES``, about its payment intent.

    Raises:
        Unfoldable: when the intent in it cannot be read.
    """
    intent, before = _reader.read(event.payload)
    known = None if before is None else _reported(before)
    return (make_facts(event, "payment_intents", intent.id, after=_reported(intent), before=known),)


def _reported(intent: PaymentIntent) -> Reported:
    return Reported(carried(status=intent.status, canceled_at=moment(intent.canceled_at)))


ROW_SPEC: Final = RowSpec(
    table="payment_intents", subject="payment_intent", empty=dict.fromkeys(("status", "canceled_at"))
)
