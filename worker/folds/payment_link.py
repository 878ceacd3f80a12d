"""What payment link events say of a link.

Source: https://docs.stripe.com/api/payment-link/object. The object has no time of creation, so it is known
only once the created event is seen; links are never deleted.
"""

from typing import Final

from msgspec import UNSET, Struct, UnsetType

from worker.folds.facts import Change, Event, Facts, Row, Subject, Value
from worker.folds.join import Shape
from worker.folds.reading import Metadata, Name, Reader, carried

CREATED: Final = "payment_link.created"
TYPES: Final = (CREATED, "payment_link.updated", "payfold.payment_link.observed")


class PaymentLink(Struct):
    """The fields of a payment link that are kept."""

    id: Name
    active: bool | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    metadata: Metadata | UnsetType | None = UNSET
    url: str | UnsetType | None = UNSET


_reader = Reader(PaymentLink)


def fold(event: Event) -> tuple[Facts, ...]:
    """Return what *event*, of one of ``TYPES``, says of its link.

    Raises:
        Unfoldable: when the link in it cannot be read.
    """
    link, before = _reader.read(event.payload)
    is_first = event.type == CREATED
    facts = Facts(
        subject=Subject("payment_links", event.account, event.livemode, link.id),
        event_id=event.id,
        source=event.source,
        created=event.created,
        rank=0,
        stamp=(event.created,),
        columns=_columns(link),
        moments={"created": event.created} if is_first else {},
        before=None if before is None else _columns(before),
        is_first=is_first,
    )
    return (facts,)


def _columns(link: PaymentLink) -> dict[str, Value]:
    return carried(active=link.active, url=link.url, currency=link.currency, metadata=link.metadata)


def _changes(before: Row | None, after: Row) -> list[Change]:
    known = None if before is None else before["active"]
    if after["active"] is None or after["active"] == known:
        return []
    kind = "payment_link.activated" if after["active"] else "payment_link.deactivated"
    return [Change(kind, None if before is None else {"active": known}, {"active": after["active"]})]


SHAPE: Final = Shape(
    table="payment_links",
    subject="payment_link",
    empty=dict.fromkeys(("active", "url", "currency", "metadata", "created")),
    rank_of=lambda _: 0,
    stamp_of=lambda row: (row["as_of"],),
    infer=lambda _: None,
    anomalies=lambda _: [],
    changes=_changes,
)
