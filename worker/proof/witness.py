"""Defines the columns a second time, without the folds: the place of each in Stripe's JSON.

``MAP`` names the paths of each column in Stripe's objects, newest place first. ``EXCEPTIONS`` gives for every other
column the reason why no single object states it. ``statements`` reads one object by the map.

Note [A witness of its own]
    If the folds read a column from the wrong place, every rebuild repeats the fault and agrees with it. So this module
    defines each column again, as paths in Stripe's objects, written from Stripe's documentation. It imports nothing of
    the folds. If an object leaves a doubt, the column is left out: a wrong statement is worse than none.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

Json: TypeAlias = Any  # as it came: of any shape, in spite of the documentation
Body: TypeAlias = Mapping[str, Json]
Value: TypeAlias = str | int | bool | datetime | dict[str, Any] | list[Any] | None
"""The value of a column, as PostgreSQL gives it back."""
Kind: TypeAlias = Callable[[Json], Value | UnsetType]
"""Converts JSON that is not null to the value of a column; UNSET if the JSON is of another type."""
Conversion: TypeAlias = Callable[[Body, Json], Json]
"""Converts the JSON that an object has at its paths, which is null or UNSET if nothing is there, to other JSON."""


class Statement(Struct, frozen=True):
    """The values that one object of Stripe states for one row: its *columns*, by name.

    *currency* is part of the key only for balances, and '' elsewhere. A column that the object lacks is absent.
    """

    table: str
    id: str
    columns: Mapping[str, Value]
    currency: str = ""


class Mapped(Struct, frozen=True):
    """The place of a column in Stripe's JSON: the first of *paths* that is not null, read as a *kind* of value.

    A path is keys joined by slashes; ``..`` is the object that lists this one. *source* is the page that documents it.
    Null is a value, unless *null_is_silent*, as for references and times at which something happened: these stay once
    they are known.
    """

    table: str
    column: str
    paths: tuple[str, ...]
    kind: Kind
    source: str
    conversion: Conversion | None = None
    null_is_silent: bool = False

    def of(self, body: Body) -> Value | UnsetType:
        """Return the value that *body* states, UNSET if it states none."""
        found = _first(body, self.paths)
        value = found if self.conversion is None else self.conversion(body, found)
        if value is None:
            return UNSET if self.null_is_silent else None
        return UNSET if value is UNSET else self.kind(value)


class Listed(Struct, frozen=True):
    """The objects of type *object* state rows of *table*, each itself or through the items of its list *items*.

    With *whole* a list states nothing unless it has all items, since some of an order's lines are not its lines.
    """

    object: str
    table: str
    items: str = ""
    whole: bool = False

    def of(self, body: Body) -> Iterator[Body]:
        """Yield the objects within *body* that state one row each."""
        if not self.items:
            yield body
            return
        items = _at(body, f"{self.items}/data")
        if isinstance(items, list) and (not self.whole or _at(body, f"{self.items}/has_more") is False):
            yield from ({**item, "..": body} for item in items if isinstance(item, Mapping))


# ---- Paths ----


def _at(body: Json, path: str) -> Json:
    """Return the JSON at *path*, UNSET if a key is absent; null has no keys."""
    for key in path.split("/"):
        body = body.get(key, UNSET) if isinstance(body, Mapping) else UNSET
    return body


def _first(body: Body, paths: Iterable[str]) -> Json:
    """Return the JSON at the first of *paths* that is not null, else null if any of them is null, else UNSET."""
    there = [value for path in paths if (value := _at(body, path)) is not UNSET]
    return next((value for value in there if value is not None), None if there else UNSET)


# ---- Kinds of values ----

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_BIGINT_MAX: Final = 2**63 - 1
_HALF_A_PAIR: Final = re.compile("[\ud800-\udfff]")


def text(value: Json) -> str | UnsetType:
    """Return a text as PostgreSQL can hold it: half a surrogate pair is replaced, a text with a NUL is UNSET."""
    return _HALF_A_PAIR.sub("\ufffd", value) if isinstance(value, str) and "\0" not in value else UNSET


def whole(value: Json) -> int | UnsetType:
    """Return a whole number: a quantity, or money in the smallest unit of its currency."""
    return value if type(value) is int and abs(value) <= _BIGINT_MAX else UNSET


def flag(value: Json) -> bool | UnsetType:
    """Return true or false."""
    return value if isinstance(value, bool) else UNSET


def moment(value: Json) -> datetime | UnsetType:
    """Return a time, which Stripe gives as seconds since 1970."""
    try:
        return _EPOCH + timedelta(seconds=value) if type(value) is int else UNSET
    except OverflowError:
        return UNSET


def reference(value: Json) -> str | UnsetType:
    """Return the id of another object from its id or, if it is expanded, from the object itself."""
    id_ = value.get("id") if isinstance(value, Mapping) else value
    return text(id_) if id_ else UNSET


def hash_(value: Json) -> dict[str, Any] | UnsetType:
    """Return an object, with its texts as ``text`` returns them. PHP writes an empty object as ``[]``, like a list."""
    if not isinstance(value, dict):
        return {} if value == [] else UNSET
    try:
        written = json.dumps(value, ensure_ascii=False)
        return UNSET if r"\u0000" in written else dict(json.loads(_HALF_A_PAIR.sub("\ufffd", written)))
    except (RecursionError, ValueError):  # deeper, or with more digits, than Python's own JSON reads
        return UNSET


# ---- Conversions ----

_ADDRESS: Final = ("city", "country", "line1", "line2", "postal_code", "state")


def _is_converted(session: Body) -> bool:
    """Return whether Adaptive Pricing before basil put a *session* into its buyer's currency."""
    return isinstance(session.get("currency_conversion"), Mapping)


def _presented_as(key: str) -> Conversion:
    """Before basil the value that the buyer saw is the session's own *key*, if there was a conversion."""

    def convert(session: Body, found: Json) -> Json:
        return _at(session, key) if found in (None, UNSET) and _is_converted(session) else found

    return convert


def _not_converted(session: Body, found: Json) -> Json:
    """A conversion has only the subtotal and the total in the shop's currency, and no amounts between them."""
    return UNSET if _is_converted(session) else found


def _name_and_address(_: Body, shipping: Json) -> Json:
    """Return *shipping* as it is since basil, which dropped its carrier, phone and tracking number."""
    if not isinstance(shipping, Mapping):
        return None if shipping is None else UNSET
    address = hash_(shipping.get("address"))
    parts = None if address is UNSET else {key: address.get(key) for key in _ADDRESS}
    return {"name": shipping.get("name"), "address": parts}


def _sum_of_refunds(_: Body, refunds: Json) -> Json:
    """Return the sum of ``amount_refunded`` of a credit note's *refunds*."""
    amounts = [whole(_at(each, "amount_refunded")) for each in refunds] if isinstance(refunds, list) else [UNSET]
    return UNSET if UNSET in amounts else sum(amounts)


def _rest_to_balance(note: Body, post_payment: Json) -> Json:
    """Return the amount that a *note* credited to the customer's balance: *post_payment* less refunds and out of band.

    ``out_of_band_amount`` is null if there is none. The note names a balance transaction if there is a rest.
    """
    refunded, out_of_band = _sum_of_refunds(note, note.get("refunds")), note.get("out_of_band_amount", UNSET)
    parts = [whole(post_payment), refunded, 0 if out_of_band is None else whole(out_of_band)]
    if UNSET in parts:
        return UNSET
    rest = parts[0] - parts[1] - parts[2]
    is_named = note.get("customer_balance_transaction") is not None
    return rest if rest >= 0 and is_named == (rest > 0) else UNSET


def _once_canceled(intent: Body, found: Json) -> Json:
    """Only canceled payment intents have rows."""
    return found if intent.get("status") == "canceled" else UNSET


# ---- The map ----

_API: Final = "https://docs.stripe.com/api"
_CHANGELOG: Final = "https://docs.stripe.com/changelog"
_BASIL: Final = f"{_CHANGELOG}/basil/2025-03-31"
_ACCOUNT_BALANCE: Final = f"{_CHANGELOG}/2019-10-17/renames-account-balance-customer-object"
_CONVERSION: Final = f"{_BASIL}/add_presentment_details"
_FINALIZED: Final = f"{_CHANGELOG}/2019-03-14/invoices-specify-finalized-alongside-status-transitions"
_PARENT: Final = f"{_BASIL}/adds-new-parent-field-to-invoicing-objects"
_PARTIAL_PAYMENTS: Final = f"{_BASIL}/add-support-for-multiple-partial-payments-on-invoices"
_PARTS_OF_A_NOTE: Final = f"{_API}/credit_notes/create"
_SHIPPING: Final = f"{_BASIL}/checkout-session-remove-shipping-details"

_SHIPPING_PATHS: Final = ("collected_information/shipping_details", "shipping_details", "shipping")
_PRESENTED_AMOUNT: Final = "presentment_details/presentment_amount"
_PRESENTED_CURRENCY: Final = "presentment_details/presentment_currency"


def _as(kind: Kind, *, null_is_silent: bool = False) -> Callable[..., Mapped]:
    """Return a function that makes a line of the map from a column, its paths (by default its name) and the rest."""

    def line(column: str, *paths: str, conversion: Conversion | None = None, source: str = "") -> Mapped:
        return Mapped("", column, paths or (column,), kind, source, conversion, null_is_silent)

    return line


_text, _whole, _flag, _moment, _hash = map(_as, (text, whole, flag, moment, hash_))
_reference, _once, _known = (_as(kind, null_is_silent=True) for kind in (reference, moment, whole))


def _of(table: str, page: str, *lines: Mapped) -> tuple[Mapped, ...]:
    """Return *lines* as those of *table*; the source of a line, if not given, is its newest path's place in *page*."""
    return tuple(
        replace(each, table=table, source=each.source or f"{_API}/{page}-{each.paths[0].replace('/', '-')}")
        for each in lines
    )


MAP: Final[tuple[Mapped, ...]] = (
    *_of(
        "orders",
        "checkout/sessions/object#checkout_session_object",
        _text("session_status", "status"),
        *map(_text, ("payment_status", "mode", "client_reference_id")),
        # Before basil Adaptive Pricing put the session into the buyer's currency, and its conversion had the shop's.
        _text("currency", "currency_conversion/source_currency", "currency", source=_CONVERSION),
        _whole("amount_subtotal", "currency_conversion/amount_subtotal", "amount_subtotal", source=_CONVERSION),
        _whole("amount_total", "currency_conversion/amount_total", "amount_total", source=_CONVERSION),
        _text("presentment_currency", _PRESENTED_CURRENCY, conversion=_presented_as("currency"), source=_CONVERSION),
        _whole("presentment_amount", _PRESENTED_AMOUNT, conversion=_presented_as("amount_total"), source=_CONVERSION),
        _whole("amount_discount", "total_details/amount_discount", conversion=_not_converted),
        _whole("amount_shipping", "total_details/amount_shipping", conversion=_not_converted),
        _whole("amount_tax", "total_details/amount_tax", conversion=_not_converted),
        *map(_reference, ("customer", "payment_link", "payment_intent", "subscription", "invoice", "recovered_from")),
        # The address that the buyer typed, else the one that the shop passed when it created the session.
        _text("customer_email", "customer_details/email", "customer_email"),
        _text("recovery_url", "after_expiration/recovery/url"),
        # The oldest name until https://docs.stripe.com/changelog/2022-08-01/updates-shipping-property-checkout-session
        _hash("shipping", *_SHIPPING_PATHS, conversion=_name_and_address, source=_SHIPPING),
        _hash("metadata"),
        *map(_moment, ("created", "expires_at")),
    ),
    *_of(
        "order_lines",
        "checkout/sessions/object#checkout_session_object-line_items-data",
        _reference("order_id", "../id", source=f"{_API}/checkout/sessions/line_items"),
        *map(_text, ("description", "currency")),
        _reference("price"),
        _reference("product", "price/product"),
        *map(_whole, ("quantity", "amount_subtotal", "amount_discount", "amount_tax", "amount_total")),
    ),
    *_of(
        "payment_links",
        "payment-link/object#payment_link_object",
        _flag("active"),
        *map(_text, ("url", "currency")),
        _hash("metadata"),
    ),
    *_of(
        "customers",
        "customers/object#customer_object",
        *map(_text, ("email", "name", "currency")),
        _flag("delinquent"),
        _flag("deleted", source=f"{_API}/customers/delete"),
        _reference("test_clock"),
        _hash("metadata"),
        _moment("created"),
    ),
    # In the currency of the customer. A negative amount is the customer's credit.
    *_of("balances", "", _known("amount", "balance", "account_balance", source=_ACCOUNT_BALANCE)),
    *_of(
        "balance_transactions",
        "customer_balance_transactions/object#customer_balance_transaction_object",
        *map(_text, ("currency", "type", "description")),
        *map(_whole, ("amount", "ending_balance")),
        *map(_reference, ("customer", "invoice", "credit_note")),
        _reference("order_id", "checkout_session"),
        _moment("created"),
    ),
    *_of(
        "invoices",
        "invoices/object#invoice_object",
        *map(_text, ("number", "status", "currency")),
        *map(_whole, ("total", "amount_due", "amount_paid", "amount_remaining", "amount_overpaid")),
        *map(_whole, ("starting_balance", "ending_balance")),
        *map(_whole, ("pre_payment_credit_notes_amount", "post_payment_credit_notes_amount")),
        _reference("customer"),
        _reference("subscription", "parent/subscription_details/subscription", "subscription", source=_PARENT),
        _flag("deleted", source=f"{_API}/invoices/delete"),
        _moment("created", "created", "date", source=f"{_CHANGELOG}/2019-03-14/renames-date-field-invoices-created"),
        _once("finalized_at", "status_transitions/finalized_at", "finalized_at", source=_FINALIZED),
        _once("paid_at", "status_transitions/paid_at"),
        _once("voided_at", "status_transitions/voided_at"),
    ),
    *_of(
        "credit_notes",
        "credit_notes/object#credit_note_object",
        *map(_text, ("number", "status", "type", "reason", "currency", "memo")),
        *map(_whole, ("amount", "pre_payment_amount", "post_payment_amount", "out_of_band_amount")),
        _whole("refunded_amount", "refunds", conversion=_sum_of_refunds),
        _whole("to_balance_amount", "post_payment_amount", conversion=_rest_to_balance, source=_PARTS_OF_A_NOTE),
        *map(_reference, ("customer", "invoice", "customer_balance_transaction")),
        *map(_moment, ("created", "effective_at")),
        _once("voided_at"),
    ),
    *_of(
        "credit_note_lines",
        "credit_notes/object#credit_note_object-lines-data",
        _reference("credit_note", "../id", source=f"{_API}/credit_notes/lines"),
        *map(_text, ("type", "description")),
        _reference("invoice_line_item"),
        *map(_whole, ("quantity", "amount", "discount_amount")),
    ),
    *_of(
        "invoice_payments",
        "invoice-payment/object#invoice_payment_object",
        _reference("invoice"),
        _reference("payment_intent", "payment/payment_intent"),
        _reference("charge", "payment/charge"),
        *map(_text, ("status", "currency")),
        _whole("amount_paid"),
        _once("paid_at", "status_transitions/paid_at"),
    ),
    *_of(
        "refunds",
        "refunds/object#refund_object",
        *map(_text, ("status", "currency", "reason", "failure_reason")),
        _whole("amount"),
        *map(_reference, ("charge", "payment_intent")),
        _moment("created"),
    ),
    *_of(
        "payment_intents",
        "payment_intents/object#payment_intent_object",
        _text("status", conversion=_once_canceled),
        _once("canceled_at", conversion=_once_canceled),
    ),
    *_of(
        "charges",
        "charges/object#charge_object",
        _reference("payment_intent"),
        _reference("invoice", source=_PARTIAL_PAYMENTS),
        *map(_text, ("status", "currency")),
        *map(_whole, ("amount", "amount_captured", "amount_refunded")),
        *map(_flag, ("captured", "refunded", "disputed")),
    ),
    *_of(
        "disputes",
        "disputes/object#dispute_object",
        *map(_reference, ("charge", "payment_intent")),
        *map(_text, ("status", "reason", "currency")),
        _whole("amount"),
    ),
    *_of(
        "portal_configurations",
        "customer_portal/configurations/object#portal_configuration_object",
        *map(_flag, ("active", "is_default")),
        _text("name"),
        _hash("features"),
        _text("login_page_url", "login_page/url"),
        *map(_moment, ("created", "updated")),
    ),
    *_of(
        "portal_sessions",
        "customer_portal/sessions/object#portal_session_object",
        *map(_reference, ("configuration", "customer")),
        _text("flow_type", "flow/type"),
        _text("return_url"),
        _moment("created"),
    ),
)
"""Every column that one object of Stripe's states by itself."""

_LINES: Final = {table: [each for each in MAP if each.table == table] for table in sorted({each.table for each in MAP})}
"""The lines of the map by their table."""

_EVENTS_DATE: Final = "No object has this moment: the first event that reports it dates it."
_OTHERS_TOO: Final = "It is counted from lists of lines over several events, and no object has it."
_OF_AN_EVENT: Final = "Stripe has no such object: a row is made from the previous_attributes of one customer.updated."

EXCEPTIONS: Final[Mapping[tuple[str, str], str]] = {
    **{
        (table, column): "It is of the event that decides the row by the order of events, not of an object."
        for table in ("balance_changes", *_LINES)
        for column in ("event_id", "as_of")
    },
    **{("balance_changes", column): _OF_AN_EVENT for column in ("customer", "currency", "amount", "ending_balance")},
    **{("orders", column): _EVENTS_DATE for column in ("completed_at", "paid_at", "failed_at", "expired_at")},
    **{("charges", column): _EVENTS_DATE for column in ("captured_at", "released_at")},
    ("refunds", "failed_at"): _EVENTS_DATE,
    ("orders", "status"): "It is inferred from the session, its charges, refunds and cancellation together.",
    ("orders", "lines_complete"): _OTHERS_TOO,
    ("credit_notes", "lines_complete"): _OTHERS_TOO,
    ("credit_notes", "refund"): "It names the refund of an old shape until any event of the note reports its amount.",
    ("payment_links", "created"): "A payment link has no created: its payment_link.created event dates it.",
    ("portal_sessions", "expired_at"): "A portal session has no end that Stripe reports: our clock dates it.",
}
"""Why no object states the other columns, by table and column.

Objects of older versions leave out some mapped columns, which are then inferred: the split of a credit note before
2025-05-28, the status of an invoice before 2018-11-08, the amounts between the totals of a converted session, and,
before basil, the invoice payment that is made from the invoice itself.
"""

# ---- Reading an object ----

LISTED: Final[tuple[Listed, ...]] = (
    Listed("billing_portal.configuration", "portal_configurations"),
    Listed("billing_portal.session", "portal_sessions"),
    Listed("charge", "charges"),
    Listed("charge", "refunds", items="refunds"),
    Listed("checkout.session", "orders"),
    Listed("checkout.session", "order_lines", items="line_items", whole=True),
    Listed("credit_note", "credit_notes"),
    Listed("credit_note", "credit_note_lines", items="lines", whole=True),
    Listed("customer", "customers"),
    Listed("customer", "balances"),
    Listed("customer_balance_transaction", "balance_transactions"),
    Listed("dispute", "disputes"),
    Listed("invoice", "invoices"),
    Listed("invoice", "invoice_payments", items="payments"),
    Listed("invoice_payment", "invoice_payments"),
    Listed("payment_intent", "payment_intents"),
    Listed("payment_link", "payment_links"),
    Listed("refund", "refunds"),
)
"""The rows that the objects of each type state."""

_PREVIEW: Final = "upcoming_in_"
"""Begins the id of a preview, an invoice that is not stored (docs.stripe.com/api/invoices/create_preview)."""


def statements(body: Mapping[str, Any]) -> list[Statement]:
    """Return the statements of *body*, a Stripe object of any API version, one for each row that it is about.

    No JSON makes it raise: an unknown object states nothing, and a value of the wrong type is left out.
    """
    every = [
        _statement(listed.table, item)
        for listed in LISTED
        if _at(body, "object") == listed.object
        for item in listed.of(body)
    ]
    return [statement for statement in every if statement is not None]


def _statement(table: str, body: Body) -> Statement | None:
    """Return the statement of *body* about its row of *table*; None if it has no column, or the key is not known."""
    id_, currency = reference(body), text(body.get("currency")) if table == "balances" else ""
    columns = {each.column: value for each in _LINES[table] if (value := each.of(body)) is not UNSET}
    if not columns or id_ is UNSET or currency is UNSET or id_.startswith(_PREVIEW):
        return None
    return Statement(table, id_, columns, currency)
