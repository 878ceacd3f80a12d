"""Folds dispute events into disputes.

Source: https://docs.stripe.com/api/disputes/object.

Note [An inquiry is no dispute]
    Some banks inquire before they dispute: while the status begins with ``warning_``, no money is taken. At its first
    other status the inquiry becomes a dispute, and the feed announces that it is opened. An inquiry that becomes no
    dispute ends as ``warning_closed``, which Stripe reports as a closing like the others. A dispute that was lost may
    be appealed and won: it then closes again, and does not open again. So during an appeal the feed's last change is
    the last closing, even where we learn of the closing after the appeal.
"""

from typing import Final

from msgspec import UNSET, Struct, UnsetType

from schemas.kinds import Kind
from schemas.own_events import observed
from worker.folds.facts import Change, Event, Facts, Row
from worker.folds.join import RowSpec, unknown_status
from worker.folds.reading import Name, Reader, Reference, Reported, Whole, carried, make_facts, references

TYPES: Final = (
    "charge.dispute.closed",
    "charge.dispute.created",
    "charge.dispute.funds_reinstated",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.updated",
    observed("dispute"),
)
_CLOSED: Final = ("lost", "prevented", "warning_closed", "won")
_INQUIRY: Final = "warning_"
_STATUSES: Final = (
    *_CLOSED,
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
    """Return the facts of *event*, of one of ``TYPES``, about its dispute.

    Raises:
        Unfoldable: when the dispute in it cannot be read.
    """
    dispute, before = _reader.read(event.payload)
    reported = None if before is None else _reported(before)
    return (make_facts(event, "disputes", dispute.id, after=_reported(dispute), before=reported),)


def _reported(dispute: Dispute) -> Reported:
    return Reported(
        carried(status=dispute.status, reason=dispute.reason, currency=dispute.currency, amount=dispute.amount),
        references(charge=dispute.charge, payment_intent=dispute.payment_intent),
    )


_SHOWN: Final = ("status", "reason", "currency", "amount", "charge", "payment_intent")


def _kind(row: Row) -> Kind | None:
    if row["status"] in _CLOSED:
        return "dispute.closed"
    return "dispute.opened" if _is_dispute(row) else None


def _is_dispute(row: Row | None) -> bool:
    status = None if row is None else row["status"]
    return status is not None and not str(status).startswith(_INQUIRY)


def _changes(before: Row | None, after: Row) -> list[Change]:
    kind = _kind(after)
    has_moved = before is None or before["status"] != after["status"]
    if kind is None or not has_moved or (kind == "dispute.opened" and _is_dispute(before)):
        return []
    known = None if before is None else {name: before[name] for name in _SHOWN}
    return [Change(kind, known, {name: after[name] for name in _SHOWN})]


ROW_SPEC: Final = RowSpec(
    table="disputes",
    subject="dispute",
    empty=dict.fromkeys(("charge", "payment_intent", "status", "reason", "currency", "amount")),
    anomalies=lambda row: unknown_status(row, _STATUSES),
    changes=_changes,
    announces_steps=True,
    prefer=lambda facts: int(facts.columns.get("status") in _CLOSED),
)
