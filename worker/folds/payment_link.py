"""Folds payment link events into payment links.

Source: https://docs.stripe.com/api/payment-link/object. The object has no time of creation, so only the created event
shows that time. Links are never deleted.
"""

from typing import Final

from msgspec import UNSET, Struct, UnsetType

from schemas.kinds import Kind
from schemas.own_events import observed
from worker.folds.facts import Change, Event, Facts, Row
from worker.folds.join import RowSpec
from worker.folds.reading import Metadata, Name, Reader, Reported, carried, make_facts

CREATED: Final = "payment_link.created"
TYPES: Final = (CREATED, "payment_link.updated", observed("payment_link"))


class PaymentLink(Struct):
    """The fields of a payment link that are kept."""

    id: Name
    active: bool | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    metadata: Metadata | UnsetType | None = UNSET
    url: str | UnsetType | None = UNSET


_reader = Reader(PaymentLink)


def fold(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``TYPES``, about its link.

    Raises:
        Unfoldable: when the link in it cannot be read.
    """
    link, before = _reader.read(event.payload)
    reported = None if before is None else _reported(before)
    # The object has no time of creation, so the time of the created event is taken.
    moments = {"created": event.created} if event.type == CREATED else {}
    return (make_facts(event, "payment_links", link.id, after=_reported(link), before=reported, moments=moments),)


def _reported(link: PaymentLink) -> Reported:
    return Reported(carried(active=link.active, url=link.url, currency=link.currency, metadata=link.metadata))


_SHOWN: Final = ("active", "currency")


def _changes(before: Row | None, after: Row) -> list[Change]:
    if after["active"] is None or (before is not None and after["active"] == before["active"]):
        return []
    kind: Kind = "payment_link.activated" if after["active"] else "payment_link.deactivated"
    known = None if before is None else {name: before[name] for name in _SHOWN}
    return [Change(kind, known, {name: after[name] for name in _SHOWN})]


ROW_SPEC: Final = RowSpec(
    table="payment_links",
    subject="payment_link",
    empty=dict.fromkeys(("active", "url", "currency", "metadata", "created")),
    changes=_changes,
)
