"""Decides by its charges whether an order was paid, if the events of its session leave that open.

Source: https://docs.stripe.com/payments/place-a-hold-on-a-payment-method and
https://docs.stripe.com/api/payment_intents/cancel.

Note [A charge decides what its session leaves open]
    If a payment is captured later, its session completes as unpaid, and no further event of the session comes. The
    charge reports the capture, or the release of the hold. Sessions of 2019 have no payment status at all. The events
    of the session make the row, as with any other object. Last, ``settle`` lays the decision of the charges on that
    row. So the join never reads rows of other objects, and this module reads nothing but rows.

Note [A reading shows that it was paid, and not when]
    A session that was read at Stripe after its capture may report that it is paid, and no event of it does. The reading
    is dated by its own time, which may be years later. So where only a reading shows that an order is paid, the time of
    a capture before it is the time of the payment. Without a known capture it is the time of the reading, as with any
    other moment, and a capture that becomes known later replaces that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from msgspec import structs

from schemas.events import OBSERVED
from worker.folds import checkout_session
from worker.folds.chain import READING_TIME_MAX
from worker.folds.facts import Row, Witness
from worker.folds.join import Joined

RELEASED: Final = "expired_uncaptured_charge"
"""The reason of a refund that returns no money, because it releases a charge that was only held."""
_SAYS_COMPLETE: Final = "session_status = 'complete' AND payment_intent IS NOT NULL"
OF_ORDER_OPEN: Final = f"{_SAYS_COMPLETE} AND (payment_status IS NULL OR payment_status = 'unpaid')"
"""``is_open`` in SQL. It leaves out the mode, because a session in setup mode has no payment intent."""
OF_ORDER_READ: Final = (
    f"{_SAYS_COMPLETE} AND payment_status = 'paid' AND paid_at IS NOT NULL"
    f" AND (starts_with(event_id, '{OBSERVED}') OR (paid_at <> as_of AND paid_at IS DISTINCT FROM completed_at))"
)
"""``may_be_read`` in SQL."""


@dataclass(frozen=True, slots=True)
class Payment:
    """The rows of one payment intent: its ``charges``, the ``refunds`` that release holds, and its cancellation.

    Each row also has the *source* of its event. The event of a charge is the one that captured or released it.
    *read_at* is the order's time of payment where it is that of a reading, and of no event of Stripe's.
    """

    charges: Sequence[Row] = ()
    releases: Sequence[Row] = ()
    cancellation: Row | None = None
    read_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The result of a payment: *status* is paid or failed, *at* is its time, and *by* is the event that shows it."""

    status: str
    at: datetime
    by: Witness


def is_open(row: Row) -> bool:
    """Return whether the order *row* is complete and the events of its session leave open whether it is paid."""
    is_undecided = row["payment_status"] in (None, "unpaid") and row["mode"] != "setup"
    return row["session_status"] == "complete" and row["payment_intent"] is not None and is_undecided


def may_be_read(row: Row) -> bool:
    """Return whether the order *row* is reported as paid, and its time of payment may be that of a reading.

    Most rows are decided by the very event that reports the payment, or the completion with it.
    """
    is_paid = row["payment_status"] == "paid" and row["session_status"] == "complete"
    if not is_paid or row["paid_at"] is None or row["payment_intent"] is None:
        return False
    return str(row["event_id"]).startswith(OBSERVED) or row["paid_at"] not in (row["as_of"], row["completed_at"])


def is_unsettled(row: Row) -> bool:
    """Return whether its charges may decide something about the order *row*."""
    return is_open(row) or may_be_read(row)


def base(row: Row, *, failed_at: datetime | None) -> Row:
    """Return the order *row* as it was before ``settle``; *failed_at* is the time of its session's failure.

    A row that is not open stays as it is: a time of payment that was taken from a charge is none of a reading.
    """
    if not is_open(row):
        return dict(row)
    own: Row = {**row, "paid_at": None, "failed_at": failed_at}
    checkout_session.ROW_SPEC.infer(own)
    return own


def settle(joined: Joined, payment: Payment) -> Joined:
    """Return the order *joined*, made by its own events, with the decision of its *payment* laid on."""
    decision = decide(joined.row, payment)
    if decision is None:
        return joined
    row: Row = {**joined.row, "status": decision.status, f"{decision.status}_at": decision.at}
    own = checkout_session.ROW_SPEC.anomalies(joined.row)
    others = [each for each in joined.anomalies if each not in own]
    return structs.replace(
        joined, row=row, anomalies=(*others, *checkout_session.ROW_SPEC.anomalies(row)), decided_by=decision.by
    )


def decide(row: Row, payment: Payment) -> Decision | None:
    """Return what *payment* decides about the order *row*; None if nothing is decided, or if the session decided.

    A captured charge overrides a failure that the session reported. A released charge only confirms that failure. Of an
    order that a reading shows as paid only the time is decided.
    """
    if not is_open(row) and payment.read_at is None:
        return None
    captures = [(at, str(each["id"]), each) for each in payment.charges if (at := _captured_at(each)) is not None]
    if captures:
        at, _, charge = min(captures, key=lambda capture: capture[:2])
        is_older = payment.read_at is None or payment.read_at - at > READING_TIME_MAX
        return Decision("paid", at, _witness(charge)) if is_older else None
    return None if payment.read_at is not None or row["status"] == "failed" else _failure(payment)


def _captured_at(charge: Row) -> datetime | None:
    """Return the time of the charge's capture; None where it was not captured, or failed later.

    A pending charge of a delayed method may already be marked as captured, and pays nothing yet. A charge that was
    both captured and released counts as captured.
    """
    stands = charge["status"] == "succeeded" or charge["released_at"] is not None
    return _time(charge, "captured_at") if stands else None


def _failure(payment: Payment) -> Decision | None:
    """Return the failure if no charge is held or pending, and a hold was released or the intent was canceled.

    A canceled intent holds nothing any more, and takes no further charge.
    """
    unnamed = _unnamed_releases(payment)
    holds = sorted((each for each in payment.charges if not _is_declined(each)), key=_is_held_and_id)
    found = [_release(each, payment, unnamed) for each in holds]
    ended = [each for each in found if each is not None]
    if len(ended) < len(found):
        return None
    # Of several holds the last release decides. Without a hold, an unnamed refund or the cancellation decides.
    if ended:
        return max(ended, key=lambda each: each.at)
    rest = [_released_by(refund) for refund in unnamed]
    return min(rest, key=lambda each: each.at, default=_canceled_by(payment))


def _release(charge: Row, payment: Payment, unnamed: list[Row]) -> Decision | None:
    """Return how the hold of *charge* ended: by its own event, else a refund's, else the intent's; None if it is held.

    If no refund names the charge, one of *unnamed* is taken for it and removed from the list.
    """
    named = [each for each in payment.releases if each["charge"] == charge["id"]]
    refunds = named or ([unnamed.pop(0)] if unnamed else [])
    own = _time(charge, "released_at")
    if own is not None:
        return Decision("failed", own, _witness(charge))
    if refunds:
        return min(map(_released_by, refunds), key=lambda each: each.at)
    return _canceled_by(payment)


def _unnamed_releases(payment: Payment) -> list[Row]:
    """Return the releasing refunds that name none of the known charges, the earliest first."""
    known = {charge["id"] for charge in payment.charges}
    unnamed = [each for each in payment.releases if each["charge"] not in known]
    return sorted(unnamed, key=lambda each: (_released_by(each).at, str(each["id"])))


def _is_held_and_id(charge: Row) -> tuple[bool, str]:
    """Order released charges first, so that an unnamed refund is taken for a charge that is known to be released."""
    return charge["released_at"] is None, str(charge["id"])


def _is_declined(charge: Row) -> bool:
    return charge["status"] == "failed" and charge["released_at"] is None


def _released_by(refund: Row) -> Decision:
    by = _witness(refund)
    return Decision("failed", _time(refund, "created") or by.at, by)


def _canceled_by(payment: Payment) -> Decision | None:
    if payment.cancellation is None:
        return None
    by = _witness(payment.cancellation)
    return Decision("failed", _time(payment.cancellation, "canceled_at") or by.at, by)


def _time(row: Row, name: str) -> datetime | None:
    value = row[name]
    return value if isinstance(value, datetime) else None


def _witness(row: Row) -> Witness:
    at = row["as_of"]
    assert isinstance(at, datetime), "every row has the time of its deciding event"  # noqa: S101 - for the types alone
    return Witness(str(row["event_id"]), str(row["source"]), at)
