"""Reads one event from its JSON: its columns after and before the event, its rank, and the rows that it is about.

Written from Stripe's documentation alone (stripe-facts, sections 1, 2, 6 and 11, and the design's rules 1 and 3);
``tests/reference.py`` combines the events of one object. A column that an event does not carry is absent from its
columns, and one that it carries as null is None.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from schemas import events

Json = dict[str, Any]
Row = dict[str, Any]
Thing = tuple[str, bool, str, str]
"""One object at Stripe: its account, mode, type and id."""


@dataclass(frozen=True)
class Report:
    """The report of one event about its object.

    ``after`` and ``before`` are the object's kept columns, of all rows that they belong to; ``before`` is None for the
    first event. ``moments`` are the times at which a state was reached. ``lines`` are the rows of a list that the event
    holds, None if it holds none, and ``is_whole`` shows whether that list is complete.
    """

    thing: Thing
    event_id: str
    type: str
    created: datetime
    rank: int
    rank_before: int
    stamp: tuple[datetime, datetime]
    after: Row
    before: Row | None
    moments: dict[str, datetime] = field(default_factory=dict)
    lines: tuple[Row, ...] | None = None
    is_whole: bool = False

    @property
    def is_observation(self) -> bool:
        """Whether it is no event of Stripe's, but an answer to our call or a decision of our clock."""
        return self.type.startswith("payfold.")


@dataclass(frozen=True)
class _Reading:
    """The functions that read one kind of object."""

    columns: Callable[[Json, str], Row]
    rank: Callable[[Row, str], int]
    moments: Callable[[Row, Json, str, datetime], dict[str, datetime | None]]
    lines: Callable[[Json], tuple[tuple[Row, ...], bool] | None] = lambda _: None


def read(body: bytes, account: str = "") -> Report | None:
    """Return the report of the event in *body*, None if its kind of object is not kept."""
    envelope = events.read(body)
    event = json.loads(envelope.payload, parse_float=_number)
    if not isinstance(event.get("data"), dict):
        return None  # A thin event carries no object.
    about = event["data"]["object"]
    kind = _object_of(envelope.type)
    if kind is None or about.get("object") != kind or not about.get("id"):
        return None
    reading = _READINGS[kind]
    previous = event["data"].get("previous_attributes") or {}
    after = reading.columns(about, envelope.type)
    before = reading.columns(overlaid(about, previous), envelope.type) if previous else after
    created = _time(envelope.created)
    found = reading.lines(about)
    moments = reading.moments(after, about, envelope.type, created)
    return Report(
        thing=(envelope.account or account, envelope.livemode, kind, about["id"]),
        event_id=envelope.id,
        type=envelope.type,
        created=created,
        rank=reading.rank(after, envelope.type),
        rank_before=reading.rank(before, envelope.type),
        stamp=(after.get("updated") or created, created),
        after=after,
        before=None if envelope.type.endswith(".created") else before,
        moments={name: at for name, at in moments.items() if at is not None},
        lines=found and found[0],
        is_whole=bool(found and found[1]),
    )


def overlaid(after: Json, previous: Json) -> Json:
    """Return the object *after* a change as it was before, by its *previous* attributes.

    A nested object has only its changed keys; a metadata key that was absent before is null.
    """
    before = dict(after)
    for name, value in previous.items():
        if isinstance(value, dict) and isinstance(after.get(name), dict):
            before[name] = overlaid(after[name], value)
            if name == "metadata":
                before[name] = {key: text for key, text in before[name].items() if text is not None}
        else:
            before[name] = value
    return before


def ignored(body: bytes, account: str = "") -> tuple[str, bool, str] | None:
    """Return the account, mode and id of the event that an operator ignored by *body*, None for other events."""
    envelope = events.read(body)
    if envelope.type != "payfold.event.ignored" or envelope.object_id is None:
        return None
    return envelope.account or account, envelope.livemode, envelope.object_id


# ---- Event types ----

_CHARGE: Final = ("succeeded", "failed", "pending", "captured", "expired", "updated", "refunded")
_DISPUTE: Final = ("created", "updated", "closed", "funds_withdrawn", "funds_reinstated")
_INVOICE: Final = (
    *("created", "updated", "finalized", "finalization_failed", "sent", "paid", "payment_succeeded", "payment_failed"),
    *("payment_action_required", "payment_attempt_required", "overdue", "overpaid", "will_be_due"),
    *("marked_uncollectible", "voided", "deleted"),
)
_SESSION: Final = ("completed", "async_payment_succeeded", "async_payment_failed", "expired")
_TYPES: Final[Mapping[str, str]] = {
    **{f"checkout.session.{name}": "checkout.session" for name in _SESSION},
    **{f"payment_link.{name}": "payment_link" for name in ("created", "updated")},
    **{f"customer.{name}": "customer" for name in ("created", "updated", "deleted")},
    **{f"credit_note.{name}": "credit_note" for name in ("created", "updated", "voided")},
    **{f"invoice.{name}": "invoice" for name in _INVOICE},
    "invoice_payment.paid": "invoice_payment",
    **{f"refund.{name}": "refund" for name in ("created", "updated", "failed")},
    "charge.refund.updated": "refund",
    **{f"charge.{name}": "charge" for name in _CHARGE},
    **{f"charge.dispute.{name}": "dispute" for name in _DISPUTE},
    "payment_intent.canceled": "payment_intent",
    **{f"billing_portal.configuration.{name}": "billing_portal.configuration" for name in ("created", "updated")},
    "billing_portal.session.created": "billing_portal.session",
}
CLOCK: Final = ".clock_expired"
MISSING: Final = ".missing"
_OURS: Final = (".observed", ".registered", CLOCK, MISSING)


def _object_of(type_: str) -> str | None:
    """Return the kind of object that events of *type_* carry, None if it is not kept."""
    if not type_.startswith("payfold."):
        return _TYPES.get(type_)
    found = next((type_.removeprefix("payfold.").removesuffix(end) for end in _OURS if type_.endswith(end)), None)
    # Only the cancellation of an intent is kept, and only an event reports it.
    return found if found in _READINGS and found != "payment_intent" else None


# ---- Values ----


def _number(text: str) -> object:
    """Read a whole number, which other languages write with a decimal point."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _maybe_time(seconds: int | None) -> datetime | None:
    return None if seconds is None else _time(seconds)


def _id(value: Any) -> Any:  # noqa: ANN401 - an id or an object
    """Return the id, also of a whole object that ``expand`` has put in its place."""
    return value["id"] if isinstance(value, dict) else value


def _map(value: Any) -> Any:  # noqa: ANN401 - a JSON value
    """Return an object as it is; PHP writes an empty one as a list."""
    return {} if value == [] else value


def _plain(value: Any) -> Any:  # noqa: ANN401 - a JSON value
    return value


_NONE: Final = object()


def _at(about: Json, path: str) -> Any:  # noqa: ANN401 - a JSON value
    """Return the value at the dotted *path*; ``_NONE`` where a key is absent, None where one is null."""
    value: Any = about
    for name in path.split("."):
        value = _map(value)
        if value is None:
            return None
        if name not in value:
            return _NONE
        value = value[name]
    return value


def _first(about: Json, *paths: str) -> Any:  # noqa: ANN401 - a JSON value
    """Return the first value at *paths* that is present and not null; else None if one is present, else ``_NONE``."""
    found = [value for path in paths if (value := _at(about, path)) is not _NONE]
    return next((value for value in found if value is not None), None if found else _NONE)


def _columns(about: Json, plan: Mapping[str, tuple[Callable[[Any], Any], tuple[str, ...]]]) -> Row:
    """Return the columns of *plan* that *about* carries: each from the first of its places that has a value."""
    read_ = {name: (make, _first(about, *paths)) for name, (make, paths) in plan.items()}
    return {name: make(value) for name, (make, value) in read_.items() if value is not _NONE}


def _as(make: Callable[[Any], Any], *names: str) -> dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]]:
    """Return the plan of columns that are keys of the object with the same *names*."""
    return {name: (make, (name,)) for name in names}


def _no_rank(_after: Row, _type: str) -> int:
    return 0


def _no_moments(_after: Row, _about: Json, _type: str, _created: datetime) -> dict[str, datetime | None]:
    return {}


def _list(about: Json, name: str, columns: Callable[[Json], Row]) -> tuple[tuple[Row, ...], bool] | None:
    held = _map(about.get(name))
    if not held or held.get("data") is None:
        return None
    return tuple(columns(line) for line in held["data"]), not held.get("has_more", False)


# ---- Checkout Sessions ----

_SESSION_PLAN: Final = {
    **_as(_plain, "payment_status", "mode", "currency", "amount_subtotal", "amount_total", "client_reference_id"),
    **_as(_id, "customer", "payment_link", "payment_intent", "subscription", "invoice", "recovered_from"),
    **{name: (_plain, (f"total_details.{name}",)) for name in ("amount_discount", "amount_shipping", "amount_tax")},
    **{name: (_plain, (f"presentment_details.{name}",)) for name in ("presentment_currency", "presentment_amount")},
    "session_status": (_plain, ("status",)),
    "customer_email": (_plain, ("customer_details.email", "customer_email")),
    "recovery_url": (_plain, ("after_expiration.recovery.url",)),
    "shipping": (_map, ("collected_information.shipping_details", "shipping_details", "shipping")),
    "metadata": (_map, ("metadata",)),
    "created": (_maybe_time, ("created",)),
    "expires_at": (_maybe_time, ("expires_at",)),
}
_STATUS_BY_TYPE: Final = {
    "checkout.session.completed": "complete",
    "checkout.session.async_payment_succeeded": "complete",
    "checkout.session.async_payment_failed": "complete",
    "checkout.session.expired": "expired",
}
FAILED: Final = "checkout.session.async_payment_failed"
NO_MONEY_OWED: Final = ("paid", "no_payment_required")


def _session(about: Json, type_: str) -> Row:
    if type_.endswith(MISSING):
        return {}
    found = _columns(about, _SESSION_PLAN)
    if "session_status" not in found and type_ in _STATUS_BY_TYPE:
        found["session_status"] = _STATUS_BY_TYPE[type_]
    if about.get("currency_conversion"):
        found |= _before_conversion(about, about["currency_conversion"])
    return found


def _before_conversion(about: Json, conversion: Json) -> Row:
    """Return a session's amounts in the shop's currency, in which only the two totals are known."""
    return {
        "currency": conversion["source_currency"],
        "amount_subtotal": conversion["amount_subtotal"],
        "amount_total": conversion["amount_total"],
        **dict.fromkeys(("amount_discount", "amount_shipping", "amount_tax")),
        "presentment_currency": about.get("currency"),
        "presentment_amount": about.get("amount_total"),
    }


def _session_rank(after: Row, type_: str) -> int:
    """Return the rank: open, expired by our clock, expired, unpaid, failed, paid; an unknown status is the lowest."""
    if type_.endswith(MISSING):
        return -1
    if type_.endswith(CLOCK):
        return 1
    if after.get("session_status") == "expired":
        return 2
    if after.get("session_status") != "complete":
        return 0
    if type_ == FAILED:
        return 4
    ranks: dict[str | None, int] = {None: 3, "unpaid": 3} | dict.fromkeys(NO_MONEY_OWED, 5)
    payment: str | None = after.get("payment_status")
    return ranks.get(payment, 0)


def _session_moments(after: Row, _about: Json, type_: str, created: datetime) -> dict[str, datetime | None]:
    status = after.get("session_status")
    is_complete = status == "complete" and not type_.endswith(CLOCK)
    is_paid = is_complete and after.get("payment_status") in NO_MONEY_OWED and after.get("mode") != "setup"
    return {
        "completed_at": created if is_complete else None,
        "paid_at": created if is_paid else None,
        "failed_at": created if type_ == FAILED else None,
        "expired_at": created if status == "expired" and not type_.endswith(CLOCK) else None,
    }


def _order_line(line: Json) -> Row:
    names = ("description", "quantity", "currency", "amount_subtotal", "amount_discount", "amount_tax", "amount_total")
    price = line.get("price") or {}
    of_price = {"price": price.get("id"), "product": _id(price.get("product"))}
    return {"id": line["id"], **{name: line.get(name) for name in names}, **of_price}


def _order_lines(about: Json) -> tuple[tuple[Row, ...], bool] | None:
    return _list(about, "line_items", _order_line)


# ---- Payment links, customers, their ledger ----

_LINK_PLAN: Final = {**_as(_plain, "active", "url", "currency"), **_as(_map, "metadata")}


def _link(about: Json, _type: str) -> Row:
    return _columns(about, _LINK_PLAN)


def _link_moments(_after: Row, _about: Json, type_: str, created: datetime) -> dict[str, datetime | None]:
    return {"created": created if type_ == "payment_link.created" else None}


_CUSTOMER_PLAN: Final = {
    **_as(_plain, "email", "name", "currency", "delinquent", "test_clock"),
    **_as(_map, "metadata"),
    **_as(_maybe_time, "created"),
    "balance": (_plain, ("balance", "account_balance")),
}


def _is_deleted(about: Json, type_: str) -> bool:
    return type_.endswith(".deleted") or about.get("deleted") is True


def _customer(about: Json, type_: str) -> Row:
    return {**_columns(about, _CUSTOMER_PLAN), "deleted": _is_deleted(about, type_)}


def _customer_rank(after: Row, _type: str) -> int:
    return int(after["deleted"])


_TRANSACTION_PLAN: Final = {
    **_as(_plain, "currency", "type", "amount", "ending_balance", "description"),
    **_as(_id, "customer", "invoice", "credit_note"),
    **_as(_maybe_time, "created"),
    "order_id": (_id, ("checkout_session",)),
}


def _transaction(about: Json, _type: str) -> Row:
    return _columns(about, _TRANSACTION_PLAN)


# ---- Invoices and their payments ----

_INVOICE_PLAN: Final = {
    **_as(_plain, "number", "status", "currency", "total", "amount_due", "amount_paid", "amount_remaining"),
    **_as(_plain, "amount_overpaid", "starting_balance", "ending_balance"),
    **_as(_plain, "pre_payment_credit_notes_amount", "post_payment_credit_notes_amount"),
    **_as(_id, "customer"),
    "subscription": (_id, ("parent.subscription_details.subscription", "subscription")),
    "created": (_maybe_time, ("created", "date")),
}
PAYMENT: Final = "payment."
"""The prefix of an old invoice's columns that belong to its payment."""
_PAYMENT_STATUSES: Final = {
    "draft": "open",
    "open": "open",
    "uncollectible": "open",
    "paid": "paid",
    "void": "canceled",
}


def _invoice(about: Json, type_: str) -> Row:
    found = _columns(about, _INVOICE_PLAN)
    if "status" not in found and "paid" in about:
        found["status"] = _status_of_2015(about)
    return {**found, **_payment_of(about, found), "deleted": _is_deleted(about, type_)}


def _status_of_2015(about: Json) -> str | None:
    """Return the status that three booleans stand for, None if they stand for none."""
    if about.get("paid"):
        return "paid"
    if about.get("forgiven"):
        return "uncollectible"
    return "open" if about.get("attempted") and not about.get("closed") else None


def _payment_of(about: Json, found: Row) -> Row:
    """Return the payment columns of an invoice of before basil; the payment is its own if the invoice names it."""
    named = {name: _id(about.get(name)) for name in ("payment_intent", "charge")}
    if not any(named.values()):
        return {}
    payment = {name: value for name, value in named.items() if name in about}
    payment |= {name: found[name] for name in ("currency", "amount_paid") if name in found}
    payment["status"] = _PAYMENT_STATUSES.get(str(found.get("status")))
    if about.get("paid_out_of_band"):
        payment |= {"status": None, "amount_paid": None}
    return {PAYMENT + name: value for name, value in payment.items()}


def _invoice_rank(after: Row, _type: str) -> int:
    ranks = {"draft": 0, "open": 1, "uncollectible": 2, "paid": 3, "void": 3}
    return 4 if after["deleted"] else ranks.get(str(after.get("status")), 0)


def _invoice_moments(after: Row, about: Json, _type: str, created: datetime) -> dict[str, datetime | None]:
    def of(name: str, status: str | None = None) -> datetime | None:
        carried = _first(about, f"status_transitions.{name}", name)
        if carried is not _NONE and carried is not None:
            return _time(carried)
        return created if status is not None and after.get("status") == status else None

    moments = {
        "finalized_at": of("finalized_at"),
        "paid_at": of("paid_at", "paid"),
        "voided_at": of("voided_at", "void"),
    }
    paid_by_it = moments["paid_at"] if after.get(PAYMENT + "status") == "paid" else None
    return {**moments, PAYMENT + "paid_at": paid_by_it}


_INVOICE_PAYMENT_PLAN: Final = {
    **_as(_plain, "status", "currency", "amount_paid"),
    **_as(_id, "invoice"),
    "payment_intent": (_id, ("payment.payment_intent",)),
    "charge": (_id, ("payment.charge",)),
}


def _invoice_payment(about: Json, _type: str) -> Row:
    return _columns(about, _INVOICE_PAYMENT_PLAN)


def _invoice_payment_moments(after: Row, about: Json, _type: str, created: datetime) -> dict[str, datetime | None]:
    carried = _at(about, "status_transitions.paid_at")
    at = None if carried is _NONE else _maybe_time(carried)
    return {"paid_at": at or (created if after.get("status") == "paid" else None)}


# ---- Credit notes ----

_NOTE_PLAN: Final = {
    **_as(_plain, "number", "status", "type", "reason", "currency", "amount", "pre_payment_amount"),
    **_as(_plain, "post_payment_amount", "out_of_band_amount", "memo"),
    **_as(_id, "customer", "invoice", "customer_balance_transaction"),
    **_as(_maybe_time, "created", "effective_at"),
    "refunded_amount": (
        lambda parts: None if parts is None else sum(part["amount_refunded"] for part in parts),
        ("refunds",),
    ),
    "refund": (_id, ("refund",)),
}


def _note(about: Json, _type: str) -> Row:
    return _columns(about, _NOTE_PLAN)


def _note_rank(after: Row, _type: str) -> int:
    return int(after.get("status") == "void")


def _note_moments(after: Row, about: Json, _type: str, created: datetime) -> dict[str, datetime | None]:
    at = _maybe_time(about.get("voided_at"))
    return {"voided_at": at or (created if after.get("status") == "void" else None)}


def _note_line(line: Json) -> Row:
    names = ("id", "type", "invoice_line_item", "description", "quantity", "amount", "discount_amount")
    return {name: line.get(name) for name in names}


def _note_lines(about: Json) -> tuple[tuple[Row, ...], bool] | None:
    return _list(about, "lines", _note_line)


# ---- Charges, refunds, disputes, payment intents ----

_CHARGE_PLAN: Final = {
    **_as(_plain, "status", "currency", "amount", "captured", "amount_captured", "amount_refunded", "refunded"),
    **_as(_plain, "disputed"),
    **_as(_id, "payment_intent", "invoice"),
}


def _charge(about: Json, _type: str) -> Row:
    return _columns(about, _CHARGE_PLAN)


def _is_released(after: Row, type_: str) -> bool:
    """Whether a hold ended without a capture: the event's type reports it, or a refund of an uncaptured charge."""
    return type_ == "charge.expired" or (after.get("refunded") is True and after.get("captured") is False)


def _charge_rank(after: Row, type_: str) -> int:
    status = after.get("status")
    if status == "failed":
        return 2
    if status != "succeeded":
        return 0
    return 2 if after.get("captured") is not False or _is_released(after, type_) else 1


def _charge_moments(after: Row, _about: Json, type_: str, created: datetime) -> dict[str, datetime | None]:
    is_captured = after.get("status") == "succeeded" and after.get("captured") is True
    return {
        "captured_at": created if is_captured else None,
        "released_at": created if _is_released(after, type_) else None,
    }


_REFUND_PLAN: Final = {
    **_as(_plain, "status", "currency", "amount", "reason", "failure_reason"),
    **_as(_id, "charge", "payment_intent"),
    **_as(_maybe_time, "created"),
}
GONE: Final = ("failed", "canceled")


def _refund(about: Json, _type: str) -> Row:
    return _columns(about, _REFUND_PLAN)


def _refund_rank(after: Row, _type: str) -> int:
    return {"succeeded": 1, "failed": 2, "canceled": 2}.get(str(after.get("status")), 0)


def _refund_moments(after: Row, _about: Json, _type: str, created: datetime) -> dict[str, datetime | None]:
    return {"failed_at": created if after.get("status") in GONE else None}


_DISPUTE_PLAN: Final = {**_as(_plain, "status", "reason", "currency", "amount"), **_as(_id, "charge", "payment_intent")}


def _dispute(about: Json, _type: str) -> Row:
    return _columns(about, _DISPUTE_PLAN)


def _intent(about: Json, _type: str) -> Row:
    return _columns(about, {**_as(_plain, "status"), **_as(_maybe_time, "canceled_at")})


# ---- The billing portal ----


_CONFIGURATION_PLAN: Final = {
    **_as(_plain, "active", "is_default", "name"),
    **_as(_map, "features"),
    **_as(_maybe_time, "created", "updated"),
    "login_page_url": (_plain, ("login_page.url",)),
}
_PORTAL_SESSION_PLAN: Final = {
    **_as(_id, "configuration", "customer"),
    **_as(_plain, "return_url"),
    **_as(_maybe_time, "created"),
    "flow_type": (_plain, ("flow.type",)),
}


def _configuration(about: Json, _type: str) -> Row:
    return _columns(about, _CONFIGURATION_PLAN)


def _portal_session(about: Json, _type: str) -> Row:
    return _columns(about, _PORTAL_SESSION_PLAN)


def _clock_rank(_after: Row, type_: str) -> int:
    return int(type_.endswith(CLOCK))


_READINGS: Final[Mapping[str, _Reading]] = {
    "checkout.session": _Reading(_session, _session_rank, _session_moments, _order_lines),
    "payment_link": _Reading(_link, _no_rank, _link_moments),
    "customer": _Reading(_customer, _customer_rank, _no_moments),
    "customer_balance_transaction": _Reading(_transaction, _no_rank, _no_moments),
    "invoice": _Reading(_invoice, _invoice_rank, _invoice_moments),
    "invoice_payment": _Reading(_invoice_payment, _no_rank, _invoice_payment_moments),
    "credit_note": _Reading(_note, _note_rank, _note_moments, _note_lines),
    "charge": _Reading(_charge, _charge_rank, _charge_moments),
    "refund": _Reading(_refund, _refund_rank, _refund_moments),
    "dispute": _Reading(_dispute, _no_rank, _no_moments),
    "payment_intent": _Reading(_intent, _no_rank, _no_moments),
    "billing_portal.configuration": _Reading(_configuration, _no_rank, _no_moments),
    "billing_portal.session": _Reading(_portal_session, _clock_rank, _no_moments),
}
