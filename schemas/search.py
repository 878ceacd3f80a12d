"""Finds orders by what a person has in hand: an id of any object, a number, an email, a reference, or an amount.

Each hit leads to its orders: a refund by its charge's payment intent, an invoice by its payments.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from functools import cache
from itertools import islice
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Connection,
    DateTime,
    RowMapping,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    cast,
    func,
    literal,
    null,
    select,
    union,
    union_all,
)
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.types import TypeEngine

from schemas import currencies, database, lookup, tables
from schemas.answers import FOUND_KINDS, FOUND_ORDERS_MAX

HITS_MAX: Final = 20
PARKED_MAX: Final = 1_000
"""Parked events of which the payload is looked into, the last recorded ones."""
PAYLOAD_BYTES_MAX: Final = 64 * 1024
"""Longer payloads are not looked into."""
PAYLOAD_TEXT_MIN: Final = 4
"""Characters of a text that is looked for in payloads."""
PAYLOADS_AT_ONCE: Final = 50
"""In memory."""

_TABLES: Final = (
    *(tables.orders, tables.charges, tables.refunds, tables.disputes, tables.invoices, tables.credit_notes),
    *(tables.customers, tables.payment_links, tables.payment_intents, tables.inbox),
)
_OBJECTS: Final[Mapping[str, Table]] = dict(zip(FOUND_KINDS, _TABLES, strict=True))
_SHOWN: Final[Mapping[str, TypeEngine[Any]]] = {
    "status": Text(),
    "currency": Text(),
    "created": DateTime(timezone=True),
}
_OTHER_NAMES: Final = {
    "order": ("payment_intent", "client_reference_id"),
    "charge": ("payment_intent",),
    "invoice": ("number",),
    "credit_note": ("number",),
}
"""The columns by which an object is found, apart from its id."""
_COLUMNS_OF_ORDERS: Final = {"order": "id"} | {
    kind: kind for kind in ("payment_intent", "invoice", "customer", "payment_link")
}
"""The columns by which orders name an object of a kind."""
_NAMED: Final = {
    "charge": ("payment_intent", "invoice"),
    "refund": ("payment_intent", "charge"),
    "dispute": ("payment_intent", "charge"),
    "credit_note": ("invoice",),
}
"""The columns in which an object names others, that lead to its orders."""
_OTHER_SIDE: Final = {"payment_intent": "invoice", "invoice": "payment_intent"}
"""The two that a row of ``invoice_payments`` joins."""
_KINDS: Final = {"checkout.session": "order"}
"""Kinds by Stripe's name for the object, where it is another one."""


@dataclass(frozen=True, slots=True)
class FoundOrder:
    """An order that a hit leads to."""

    id: str
    status: str | None
    currency: str | None
    amount_total: int | None
    created: datetime | None


@dataclass(frozen=True, slots=True)
class Hit:
    """An object that was found by the column *matched*, and the newest *orders* that it belongs to."""

    kind: str
    account: str
    livemode: bool
    id: str
    matched: str
    status: str | None
    currency: str | None
    amount: int | None
    created: datetime | None
    orders: Sequence[FoundOrder]


def is_email(text: str) -> bool:
    """Return whether *text* is looked up as an email address, which is personal data."""
    return "@" in text


def find(connection: Connection, text: str, *, account: str | None, livemode: bool | None) -> list[Hit]:
    """Return the objects that *text* names, newest first: at most HITS_MAX, and one more where there are more.

    An id, a number or a reference is found as it is written, an email in any case, an amount with its currency, as
    ``49.99 eur``. *account* and *livemode* narrow the search to one world.
    """
    text = text.strip()
    # A reference may look like an amount, as ORD1001 does.
    amount = None if is_email(text) else currencies.read(text)
    query = _finding(
        is_email=is_email(text),
        is_amount=amount is not None,
        of_account=account is not None,
        of_mode=livemode is not None,
    )
    given: dict[str, object] = {"text": text, "account": account, "livemode": livemode}
    if amount is not None:
        given |= {"currency": amount.currency, "minor": amount.minor}
    rows = database.by_key(connection, query, given).mappings().all()
    return [Hit(**row, orders=_orders_of(connection, dict(row))) for row in rows]


@cache
def _finding(*, is_email: bool, is_amount: bool, of_account: bool, of_mode: bool) -> Select[Any]:
    """Return the query of the objects that ``text``, or ``minor`` of a ``currency``, names.

    The query is cached, since building it takes longer than running it.
    """
    world = {
        "account": bindparam("account", type_=Text()) if of_account else None,
        "livemode": bindparam("livemode", type_=Boolean()) if of_mode else None,
    }
    found = union_all(*_queries(world, is_email=is_email, is_amount=is_amount)).subquery()
    # An object may be found by several of its columns.
    key = [found.c[name] for name in ("kind", "account", "livemode", "id")]
    once = select(found).ext(distinct_on(*key)).order_by(*key, found.c.matched).subquery()
    order = (once.c.created.desc().nulls_last(), once.c.kind, once.c.id, once.c.account, once.c.livemode)
    return select(once).order_by(*order).limit(HITS_MAX + 1)


def in_events(
    connection: Connection, text: str, *, account: str | None, livemode: bool | None, personal: bool
) -> list[Hit]:
    """Return the newest events about the object *text*: what has no row yet may be in events that wait or are parked.

    If there are none, and *personal* data may be revealed, return the parked events of which the payload has *text*.
    """
    text, world, inbox = text.strip(), {"account": account, "livemode": livemode}, tables.inbox
    query = _events_where(lookup.of_object(text, account=account, livemode=livemode))
    matched, rows = "object_id", connection.execute(query.limit(HITS_MAX + 1)).mappings().all()
    # That a payload has some text is personal data.
    if not rows and personal and len(text) >= PAYLOAD_TEXT_MIN:
        seqs = _parked_with(connection, text, world)
        matched, rows = "payload", connection.execute(_events_where([inbox.c.seq.in_(seqs)])).mappings().all()
    return [_event(row, matched) for row in rows]


def _events_where(wanted: Sequence[ColumnElement[bool]]) -> Select[Any]:
    inbox = tables.inbox
    names = ("account", "livemode", "id", "created", "object_type", "object_id")
    return select(*(inbox.c[name] for name in names)).where(*wanted).order_by(inbox.c.seq.desc())


def _event(row: RowMapping, matched: str) -> Hit:
    """Return the hit of an event; its session leads to the page of the order, which shows why there is none yet."""
    is_session = row["object_type"] == "checkout.session" and row["object_id"] is not None
    orders = [FoundOrder(row["object_id"], None, None, None, None)] if is_session else []
    key = (row["account"], row["livemode"], row["id"])
    return Hit("event", *key, matched, None, None, None, row["created"], orders)


def _parked_with(connection: Connection, text: str, world: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the newest parked events of which the payload has *text*, in any case."""
    outcomes, inbox, payloads = tables.outcomes, tables.inbox, tables.payloads
    latest = (
        select(outcomes.c.seq)
        .where(outcomes.c.state == "parked")
        .order_by(outcomes.c.seq.desc())
        .limit(PARKED_MAX)
        .subquery()
    )
    of_world = [inbox.c[name] == value for name, value in world.items() if value is not None]
    query = (
        select(latest.c.seq, payloads.c.payload)
        .join(inbox, inbox.c.seq == latest.c.seq)
        .join(payloads, payloads.c.seq == latest.c.seq)
        .where(func.octet_length(payloads.c.payload) <= PAYLOAD_BYTES_MAX, *of_world)
        .order_by(latest.c.seq.desc())
    )
    # As it stands in JSON, and in any case.
    wanted = json.dumps(text, ensure_ascii=False)[1:-1].lower()
    rows = connection.execute(query, execution_options={"yield_per": PAYLOADS_AT_ONCE})
    found = (seq for seq, payload in rows if wanted in payload.decode(errors="replace").lower())
    return list(islice(found, HITS_MAX + 1))


def _queries(world: Mapping[str, Any], *, is_email: bool, is_amount: bool) -> Iterator[Select[Any]]:
    text = bindparam("text", type_=Text())
    if is_email:
        for kind, column in (("order", tables.orders.c.customer_email), ("customer", tables.customers.c.email)):
            yield _query(kind, column.name, [lookup.has_email(column, text)], world, rare=True)
    else:
        if is_amount:
            orders = tables.orders.c
            wanted = [
                orders.currency == bindparam("currency", type_=Text()),
                orders.amount_total == bindparam("minor", type_=BigInteger()),
            ]
            yield _query("order", "amount_total", wanted, world)
        for kind, table in _OBJECTS.items():
            for name in ("id", *_OTHER_NAMES.get(kind, ())):
                yield _query(kind, name, lookup.where(table, {name: text, **world}), {})


def _query(
    kind: str, matched: str, wanted: Sequence[ColumnElement[bool]], world: Mapping[str, Any], *, rare: bool = False
) -> Select[Any]:
    """Return the query of the newest objects of a *kind* that are as *wanted*.

    What is *rare* is found by its own index and then sorted; else PostgreSQL may look through the newest for it.
    """
    table = _OBJECTS[kind]
    amount = next((table.c[name] for name in tables.MAIN_AMOUNTS if name in table.c), null())
    newest = lookup.NEWEST if table is tables.orders else table.c.as_of if "as_of" in table.c else table.c.created
    if rare:
        # No index has this order.
        newest = cast(newest, DateTime(timezone=True)) + timedelta(0)
    query = (
        select(
            literal(kind).label("kind"),
            *(table.c[name] for name in ("account", "livemode", "id")),
            literal(matched).label("matched"),
            *(table.c.get(name, cast(null(), of)).label(name) for name, of in _SHOWN.items()),
            cast(amount, BigInteger).label("amount"),
        )
        .where(*wanted, *lookup.where(table, world))
        .order_by(newest.desc())
        .limit(HITS_MAX + 1)
    )
    return select(query.subquery())


def _orders_of(connection: Connection, hit: Mapping[str, Any]) -> list[FoundOrder]:
    """Return the newest orders that *hit* belongs to."""
    if hit["kind"] == "order":
        return [FoundOrder(*(hit[name] for name in ("id", "status", "currency", "amount", "created")))]
    names = _names_of_orders(connection, hit)
    if not names:
        return []
    orders = tables.orders
    columns = [orders.c[each.name] for each in fields(FoundOrder)]
    of_each = [
        select(
            select(*columns)
            .where(_is_of(orders, hit), orders.c[name] == value)
            .order_by(lookup.NEWEST.desc())
            .limit(FOUND_ORDERS_MAX)
            .subquery()
        )
        for name, value in sorted(names)
    ]
    # An order may be found by its intent and by its invoice.
    found = union(*of_each).subquery()
    query = select(found).order_by(found.c.created.desc().nulls_last(), found.c.id).limit(FOUND_ORDERS_MAX)
    return [FoundOrder(*row) for row in connection.execute(query)]


def _names_of_orders(connection: Connection, hit: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Return the columns of ``orders`` with the values by which the orders of *hit* are found."""
    found: set[tuple[str, str]] = set()
    known: set[tuple[str, str]] = set()
    new = {(hit["kind"], hit["id"])}
    while new:
        known |= new
        found |= {(_COLUMNS_OF_ORDERS[kind], id_) for kind, id_ in new if kind in _COLUMNS_OF_ORDERS}
        new = {each for kind, id_ in new for each in _named_by(connection, hit, kind, id_)} - known
    return found


def _named_by(connection: Connection, hit: Mapping[str, Any], kind: str, id_: str) -> Iterator[tuple[str, str]]:
    """Yield the kind and the id of each object that leads on from the object *id_* of a *kind* to its orders."""
    if kind == "event":
        inbox = tables.inbox
        query = select(inbox.c.object_type, inbox.c.object_id).where(_is_of(inbox, hit), inbox.c.id == id_)
        for type_, object_id in connection.execute(query):
            if object_id is not None:
                yield _KINDS.get(type_, type_), object_id
    elif kind in _NAMED:
        table = _OBJECTS[kind]
        names = _NAMED[kind]
        for row in connection.execute(
            select(*(table.c[name] for name in names)).where(_is_of(table, hit), table.c.id == id_)
        ):
            yield from ((name, value) for name, value in zip(names, row, strict=True) if value is not None)
    elif kind in _OTHER_SIDE:
        table, other = tables.invoice_payments, _OTHER_SIDE[kind]
        query = select(table.c[other]).where(_is_of(table, hit), table.c[kind] == id_, table.c[other].is_not(None))
        yield from ((other, value) for value in connection.scalars(query.limit(FOUND_ORDERS_MAX)))


def _is_of(table: Table, hit: Mapping[str, Any]) -> ColumnElement[bool]:
    """Return the condition that a row of *table* is of the world of *hit*."""
    return and_(table.c.account == hit["account"], table.c.livemode == hit["livemode"])
