"""Folds Checkout Session events into orders.

Source: https://docs.stripe.com/api/checkout/sessions/object, Stripe's Checkout Session object and its events.

Note [Failed looks like an unpaid completion]
    A session with a failed delayed payment stays complete and unpaid, and its snapshot equals that of the earlier
    ``checkout.session.completed``. Only the event's type shows the failure.

Note [An older API version has the same values in other fields]
    Columns are read by the presence of fields, never by the version's name. Before basil the address was in
    ``shipping_details``, and before 2022-08-01 in ``shipping``. Before there were presentment details, Stripe's
    currency conversion put the buyer's currency into ``currency`` and ``amount_total``, and the shop's into
    ``currency_conversion``. The amounts that it did not convert back are unknown in the shop's currency, so they are
    null rather than wrong.

Note [Lines are those of the totals that they were listed with]
    No webhook lists lines, and a buyer may change them: a quantity, an optional item, a promotion code. An event with
    other totals than the event that listed the lines shows that the order has newer lines. While the lines are
    complete, no event since their listing has carried other totals. So the row still has the totals of that listing,
    and an event can be compared with the row alone.

Note [A step back is a correction]
    A status that was announced stays true unless the event that led to it turns out to be wrong: an operator ignores
    the event, or an unsigned rendering of it is replaced. By then readers have acted on the status, so they must get a
    correction. The order falls back to a status that it had before, which is no news of its own. A one-shot is sent
    only once for an order, so an order that is paid again after a step back is a correction as well.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, cast

import msgspec
from msgspec import UNSET, Struct, UnsetType

from schemas.kinds import Kind
from schemas.own_events import SESSION_CLOCK_EXPIRED, SESSION_MISSING, SESSION_OBSERVED, SESSION_REGISTERED
from worker.folds.facts import Anomaly, Change, Event, Facts, Row, Subject, Value
from worker.folds.join import LINES_DIFFER, MISSING_AT_STRIPE, UNKNOWN_STATUS, RowSpec
from worker.folds.reading import Metadata, Name, Reader, Reference, Seconds, Whole, carried, moment, references

ASYNC_PAYMENT_FAILED: Final = "checkout.session.async_payment_failed"
TYPES: Final = (
    "checkout.session.completed",
    "checkout.session.async_payment_succeeded",
    ASYNC_PAYMENT_FAILED,
    "checkout.session.expired",
    SESSION_OBSERVED,
    SESSION_REGISTERED,
    SESSION_CLOCK_EXPIRED,
    SESSION_MISSING,
)

# The status that the type implies, for API versions where a session has no status.
_STATUS_OF_TYPE: Final = {
    "checkout.session.completed": "complete",
    "checkout.session.async_payment_succeeded": "complete",
    ASYNC_PAYMENT_FAILED: "complete",
    "checkout.session.expired": "expired",
}


class _TotalDetails(Struct):
    amount_discount: Whole | UnsetType | None = UNSET
    amount_shipping: Whole | UnsetType | None = UNSET
    amount_tax: Whole | UnsetType | None = UNSET


class _PresentmentDetails(Struct):
    presentment_amount: Whole | UnsetType | None = UNSET
    presentment_currency: str | UnsetType | None = UNSET


class _CurrencyConversion(Struct):
    amount_subtotal: Whole
    amount_total: Whole
    source_currency: str


class _CustomerDetails(Struct):
    email: str | None = None


class _Recovery(Struct):
    url: str | UnsetType | None = UNSET


class _AfterExpiration(Struct):
    recovery: _Recovery | UnsetType | None = UNSET


class _Address(Struct):
    city: str | None = None
    country: str | None = None
    line1: str | None = None
    line2: str | None = None
    postal_code: str | None = None
    state: str | None = None


class _Shipping(Struct):
    name: str | None = None
    address: _Address | None = None


class _CollectedInformation(Struct):
    shipping_details: _Shipping | UnsetType | None = UNSET


class _Price(Struct):
    id: Name
    product: Reference | UnsetType = UNSET


class _LineItem(Struct):
    id: Name
    amount_discount: Whole | UnsetType | None = UNSET
    amount_subtotal: Whole | UnsetType | None = UNSET
    amount_tax: Whole | UnsetType | None = UNSET
    amount_total: Whole | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    price: _Price | UnsetType | None = UNSET
    quantity: Whole | UnsetType | None = UNSET


class _LineItems(Struct):
    data: list[_LineItem]
    has_more: bool = False


class CheckoutSession(Struct):
    """The fields of a Checkout Session that an order keeps."""

    id: Name
    after_expiration: _AfterExpiration | UnsetType | None = UNSET
    amount_subtotal: Whole | UnsetType | None = UNSET
    amount_total: Whole | UnsetType | None = UNSET
    client_reference_id: str | UnsetType | None = UNSET
    collected_information: _CollectedInformation | UnsetType | None = UNSET
    created: Seconds | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    currency_conversion: _CurrencyConversion | UnsetType | None = UNSET
    customer: Reference | UnsetType = UNSET
    customer_details: _CustomerDetails | UnsetType | None = UNSET
    customer_email: str | UnsetType | None = UNSET
    expires_at: Seconds | UnsetType | None = UNSET
    invoice: Reference | UnsetType = UNSET
    line_items: _LineItems | UnsetType | None = UNSET
    metadata: Metadata | UnsetType | None = UNSET
    mode: str | UnsetType | None = UNSET
    payment_intent: Reference | UnsetType = UNSET
    payment_link: Reference | UnsetType = UNSET
    payment_status: str | UnsetType | None = UNSET
    presentment_details: _PresentmentDetails | UnsetType | None = UNSET
    recovered_from: Reference | UnsetType = UNSET
    shipping: _Shipping | UnsetType | None = UNSET
    shipping_details: _Shipping | UnsetType | None = UNSET
    status: str | UnsetType | None = UNSET
    subscription: Reference | UnsetType = UNSET
    total_details: _TotalDetails | UnsetType | None = UNSET


_reader = Reader(CheckoutSession)


def fold(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``TYPES``, about its order.

    Raises:
        Unfoldable: when the session in it cannot be read.
    """
    session, before = _reader.read(event.payload)
    status = _STATUS_OF_TYPE.get(event.type, UNSET) if session.status is UNSET else session.status
    columns = _columns(session)
    # The clock knows that the session's time is up. It knows nothing new about the session's own status.
    if status is not UNSET and event.type != SESSION_CLOCK_EXPIRED:
        columns["session_status"] = status
    lines = _lines(event, session)
    if lines is not None:
        columns["lines_complete"] = True
    if event.type == SESSION_MISSING:
        columns["_missing"] = True
    failed = event.type == ASYNC_PAYMENT_FAILED
    facts = Facts(
        subject=Subject("orders", event.account, event.livemode, session.id),
        event_id=event.id,
        source=event.source,
        created=event.created,
        rank=_RANK_OF_TYPE.get(event.type, _rank(status, session.payment_status, failed=failed)),
        stamp=(event.created,),
        columns=columns,
        references=_references(session),
        moments=_moments(event, status, session),
        before=None if before is None else {**_columns(before), **_references(before)},
        parts=lines,
    )
    return (facts,)


def _lines(event: Event, session: CheckoutSession) -> tuple[Row, ...] | None:
    """Return the order's lines; None where the session does not list all of them, as with a first page."""
    if not isinstance(session.line_items, _LineItems) or session.line_items.has_more:
        return None
    return tuple({line.id: _line(event, session, line) for line in session.line_items.data}.values())


def _line(event: Event, session: CheckoutSession, line: _LineItem) -> Row:
    price = line.price if isinstance(line.price, _Price) else None
    reported = carried(
        description=line.description,
        quantity=line.quantity,
        currency=line.currency,
        amount_subtotal=line.amount_subtotal,
        amount_discount=line.amount_discount,
        amount_tax=line.amount_tax,
        amount_total=line.amount_total,
    )
    product = None if price is None else references(product=price.product).get("product")
    return {
        **dict.fromkeys(_LINE_COLUMNS),
        **reported,
        "account": event.account,
        "livemode": event.livemode,
        "id": line.id,
        "order_id": session.id,
        "price": None if price is None else price.id,
        "product": product,
        "event_id": event.id,
        "as_of": event.created,
    }


# An unknown status ranks lowest, so that it replaces no known status.
_OPEN, _CLOCK_EXPIRED, _EXPIRED, _PROCESSING, _FAILED, _PAID = range(6)
# A session that is missing at Stripe had some status before, so its event ranks below all and decides nothing.
_RANK_OF_TYPE: Final = {SESSION_CLOCK_EXPIRED: _CLOCK_EXPIRED, SESSION_MISSING: _OPEN - 1}
_SETTLED: Final = ("paid", "no_payment_required")


def _rank(status: object, payment_status: object, *, failed: bool) -> int:
    if status == "expired":
        return _EXPIRED
    if status == "complete" and payment_status in _SETTLED:
        return _PAID
    if status == "complete" and payment_status == "unpaid":
        return _FAILED if failed else _PROCESSING
    return _OPEN


def _columns(session: CheckoutSession) -> dict[str, Value]:
    totals = session.total_details if isinstance(session.total_details, _TotalDetails) else _TotalDetails()
    recovery = session.after_expiration.recovery if isinstance(session.after_expiration, _AfterExpiration) else UNSET
    columns = carried(
        payment_status=session.payment_status,
        mode=session.mode,
        currency=session.currency,
        amount_subtotal=session.amount_subtotal,
        amount_discount=totals.amount_discount,
        amount_shipping=totals.amount_shipping,
        amount_tax=totals.amount_tax,
        amount_total=session.amount_total,
        customer_email=_email(session),
        client_reference_id=session.client_reference_id,
        recovery_url=recovery.url if isinstance(recovery, _Recovery) else UNSET,
        shipping=_shipping(session),
        metadata=session.metadata,
        created=moment(session.created),
        expires_at=moment(session.expires_at),
    )
    presented = _presentment(session)
    return columns | presented if presented else columns


def _presentment(session: CheckoutSession) -> dict[str, Value]:
    """Return the buyer's currency and amount and, where these stand in the shop's fields, the shop's amounts."""
    details, conversion = session.presentment_details, session.currency_conversion
    if isinstance(details, _PresentmentDetails):
        return carried(presentment_currency=details.presentment_currency, presentment_amount=details.presentment_amount)
    if isinstance(conversion, _CurrencyConversion):
        return carried(
            presentment_currency=session.currency,
            presentment_amount=session.amount_total,
            currency=conversion.source_currency,
            amount_subtotal=conversion.amount_subtotal,
            amount_discount=None,
            amount_shipping=None,
            amount_tax=None,
            amount_total=conversion.amount_total,
        )
    return {}


def _email(session: CheckoutSession) -> str | UnsetType | None:
    """Return the email address that the buyer typed or, until then, the one that the shop passed."""
    if isinstance(session.customer_details, _CustomerDetails) and session.customer_details.email:
        return session.customer_details.email
    return session.customer_email


def _shipping(session: CheckoutSession) -> Value | UnsetType:
    collected = session.collected_information
    # If the collected information is null, or its address is null, no address was collected.
    newest = collected.shipping_details if isinstance(collected, _CollectedInformation) else collected
    places = (newest, session.shipping_details, session.shipping)
    # Some versions have both a newer and an older field, and fill only the older one.
    for place in places:
        if isinstance(place, _Shipping):
            return cast("Value", msgspec.to_builtins(place))
    return None if None in places else UNSET


def _references(session: CheckoutSession) -> dict[str, str | None]:
    return references(
        customer=session.customer,
        payment_link=session.payment_link,
        payment_intent=session.payment_intent,
        subscription=session.subscription,
        invoice=session.invoice,
        recovered_from=session.recovered_from,
    )


def _moments(event: Event, status: object, session: CheckoutSession) -> dict[str, datetime]:
    found = {}
    if status == "complete":
        found["completed_at"] = event.created
        if session.payment_status in _SETTLED and session.mode != "setup":
            found["paid_at"] = event.created
    if event.type == ASYNC_PAYMENT_FAILED:
        found["failed_at"] = event.created
    if status == "expired" or event.type == SESSION_CLOCK_EXPIRED:
        found["expired_at"] = event.created
    return found


# The totals that show new lines: see Note [Lines are those of the totals that they were listed with].
_TOTALS: Final = ("amount_subtotal", "amount_total", "currency")


def _follow(row: Row, step: Facts, laid: Row) -> bool:
    """Set in *laid* whether the lines are complete after *step*, and how lines that were listed again differ."""
    was_complete = row["lines_complete"] is True
    moved = was_complete and any(name in step.columns and step.columns[name] != row[name] for name in _TOTALS)
    if step.parts is None:
        if moved:
            laid |= {"lines_complete": False, "_lines_moved": True, "_lines_differ": None}
        return not moved
    laid["_lines_moved"] = moved or row.get("_lines_moved") is True
    difference = _difference(step.parts, laid)
    laid["_lines_differ"] = difference if laid["_lines_moved"] else None
    # The row does not keep whether the lines had changed before, or whether the earlier lines differed.
    return not was_complete and difference is None


def _difference(lines: Sequence[Row], order: Row) -> Mapping[str, Value] | None:
    """Return the first total in which *lines* differ from their *order*; None where all that both have are equal."""
    currency, subtotal = order["currency"], order["amount_subtotal"]
    others = {line["currency"] for line in lines} - {None, currency}
    if others and currency is not None:
        # The old conversion put the order's own amounts into the shop's currency, and left the lines in the buyer's.
        is_converted = others == {order["presentment_currency"]}
        return None if is_converted else _differing("currency", currency, min(map(str, others)))
    of_lines = _sum(lines, "amount_subtotal")
    if None not in (of_lines, subtotal) and of_lines != subtotal:
        return _differing("amount_subtotal", subtotal, of_lines)
    return _difference_of_total(lines, order)


def _difference_of_total(lines: Sequence[Row], order: Row) -> Mapping[str, Value] | None:
    total, tax = _sum(lines, "amount_total"), _sum(lines, "amount_tax")
    whole, shipping, taxes = (order[name] for name in ("amount_total", "amount_shipping", "amount_tax"))
    if not (isinstance(whole, int) and isinstance(shipping, int) and isinstance(taxes, int)):
        return None
    # Tax of the order that is not on the lines is tax on shipping.
    if total is None or tax is None or total + shipping in (whole, whole - (taxes - tax)):
        return None
    return _differing("amount_total", whole, total + shipping)


def _differing(column: str, order: Value, lines: Value) -> Mapping[str, Value]:
    return {"column": column, "order": order, "lines": lines}


def _sum(lines: Sequence[Row], name: str) -> int | None:
    """Return the sum of the column *name* of *lines*; None where one of them lacks it."""
    amounts = [amount for line in lines if isinstance(amount := line[name], int)]
    return sum(amounts) if len(amounts) == len(lines) else None


# From here on: inferences from the joined row.


def _rank_of(row: Row) -> int:
    rank = _rank(row["session_status"], row["payment_status"], failed=row["failed_at"] is not None)
    return _CLOCK_EXPIRED if rank == _OPEN and row["expired_at"] is not None else rank


def _status(row: Row) -> str | None:
    """Return the order's status; None where Stripe sent a value that we do not know."""
    rank = _rank_of(row)
    # In 2019 a session had no payment status, and one in setup mode has nothing to pay.
    is_settled = rank == _PAID or (row["session_status"] == "complete" and row["payment_status"] is None)
    if is_settled and row["mode"] == "setup":
        return "complete"
    if rank == _OPEN:
        return "open" if row["session_status"] == "open" else None
    return _STATUS_OF_RANK[rank]


_STATUS_OF_RANK: Final = {
    _CLOCK_EXPIRED: "expired",
    _EXPIRED: "expired",
    _PROCESSING: "processing",
    _FAILED: "failed",
    _PAID: "paid",
}


def _infer(row: Row) -> None:
    row["status"] = _status(row)


_KNOWN_PAYMENT_STATUSES: Final = (None, "unpaid", *_SETTLED)


def _anomalies(row: Row) -> list[Anomaly]:
    found = []
    if row["status"] is None or row["payment_status"] not in _KNOWN_PAYMENT_STATUSES:
        unknown = {name: row[name] for name in ("session_status", "payment_status", "mode")}
        found.append(Anomaly(UNKNOWN_STATUS, unknown))
    if row["completed_at"] is not None and row["expired_at"] is not None:
        found.append(Anomaly("expired_and_complete", {}))
    if row.get("_missing"):
        found.append(Anomaly(MISSING_AT_STRIPE, {}))
    if (difference := row.get("_lines_differ")) is not None:
        assert isinstance(difference, Mapping), "as _difference returns it"  # noqa: S101 - for the types alone
        found.append(Anomaly(LINES_DIFFER, difference))
    return found


_KIND_OF_STATUS: Final[Mapping[str, Kind]] = {
    "open": "order.opened",
    "processing": "order.processing",
    "paid": "order.paid",
    "complete": "order.completed",
    "failed": "order.failed",
    "expired": "order.expired",
}
# The columns that a shop acts on. Columns that may name or describe a person are joined when the feed is read.
_SHOWN: Final = (
    *("status", "session_status", "payment_status", "mode"),
    *("currency", "amount_subtotal", "amount_discount", "amount_shipping", "amount_tax", "amount_total"),
    *("presentment_currency", "presentment_amount"),
    *("client_reference_id", "customer", "payment_link", "payment_intent", "subscription", "invoice"),
)
KINDS_WITH_LINES: Final = ("order.paid", "order.expired")
CORRECTED: Final[Kind] = "order.corrected"
_CORRECTED_BY: Final = ("status", "amount_total", "currency")
_PLACE_OF_STATUS: Final[Mapping[object, int]] = {
    "open": _OPEN,
    "expired": _EXPIRED,
    "processing": _PROCESSING,
    "failed": _FAILED,
    "paid": _PAID,
    "complete": _PAID,
}


def kind_of_step(last: Mapping[str, Any] | None, now: Mapping[str, Any], kinds: Collection[str] = ()) -> Kind | None:
    """Return the kind of change from the *last* announced state of an order to the state *now*; None for no change.

    *last* is None where nothing was announced, and *kinds* are the one-shots that were announced.
    See Note [A step back is a correction].
    """
    one_shot = _KIND_OF_STATUS.get(now["status"])
    if last is None:
        return one_shot
    if all(last.get(name) == now[name] for name in _CORRECTED_BY):
        return None
    was, place = (_PLACE_OF_STATUS.get(each.get("status"), _OPEN - 1) for each in (last, now))
    is_onward = last.get("status") != now["status"] and place >= was
    return one_shot if is_onward and one_shot not in kinds else CORRECTED


def _changes(before: Row | None, after: Row) -> list[Change]:
    kind = kind_of_step(before, after)
    if kind is None:
        return []
    known = None if before is None else {name: before[name] for name in _SHOWN}
    now: dict[str, Value | list[Row]] = {name: after[name] for name in _SHOWN}
    if kind in KINDS_WITH_LINES:
        now["lines"] = [] if after["lines_complete"] else None
    return [Change(kind, known, now)]


_COLUMNS: Final = (
    *("status", "session_status", "payment_status", "mode"),
    *("currency", "amount_subtotal", "amount_discount", "amount_shipping", "amount_tax", "amount_total"),
    *("presentment_currency", "presentment_amount"),
    *("customer", "customer_email", "client_reference_id"),
    *("payment_link", "payment_intent", "subscription", "invoice", "recovered_from", "recovery_url"),
    *("shipping", "metadata", "created", "expires_at", "completed_at", "paid_at", "failed_at", "expired_at"),
)

_LINE_COLUMNS: Final = (
    *("description", "quantity", "currency"),
    *("amount_subtotal", "amount_discount", "amount_tax", "amount_total"),
)

ROW_SPEC: Final = RowSpec(
    table="orders",
    subject="order",
    empty={**dict.fromkeys(_COLUMNS), "lines_complete": False},
    rank_of=_rank_of,
    infer=_infer,
    anomalies=_anomalies,
    changes=_changes,
    clock_rank=_CLOCK_EXPIRED,
    clock_moment="expired_at",
    child="order_lines",
    child_key=("order_id",),
    follow=_follow,
)
