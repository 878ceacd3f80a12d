"""Orders that are listed or searched for."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any, Final

from deploy import output
from deploy.commands.base import opened_database, utc
from deploy.output import Format, err
from schemas import database, lookup, search, tables

_ORDER_COLUMNS: Final = (
    *("id", "status", "created", "amount_total", "refund_status", "customer_email", "customer", "client_reference_id"),
    "payment_link",
)


def print_list(
    given: Mapping[str, object],
    *,
    status: str | None,
    email: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    form: Format,
) -> None:
    """Print the newest orders with the values *given* by column; None is any."""
    wanted = lookup.where(tables.orders, given)
    wanted += lookup.created_within(tables.orders, utc(since), utc(until))
    wanted += [] if email is None else [lookup.has_email(tables.orders.c.customer_email, email)]
    with opened_database() as engine, database.transaction(engine) as connection:
        found = [dict(row) for row in lookup.newest_orders(connection, wanted, status=status, limit=limit)]
    shown = _ORDER_COLUMNS if form is Format.TABLE else [column.name for column in tables.order_book.c]
    output.rows([_as_shown(row, form) for row in found], shown, form, empty="No such order.")


def print_hits(text: str, *, account: str | None, livemode: bool | None, form: Format) -> None:
    """Print the orders that *text* leads to."""
    with opened_database() as engine, database.transaction(engine) as connection:
        hits = search.find(connection, text, account=account, livemode=livemode)
        if not hits:
            hits = search.in_events(connection, text, account=account, livemode=livemode, personal=True)
    rows = [asdict(hit) for hit in hits[: search.HITS_MAX]]
    shown = [_as_shown(row, form, "amount") for row in rows]
    if form is Format.TABLE:
        shown = [{**row, "orders": " ".join(order["id"] for order in row["orders"])} for row in shown]
    output.rows(shown, _HIT_COLUMNS if form is Format.TABLE else _FIELDS_OF_HIT, form, empty="Nothing is found.")
    if len(hits) > search.HITS_MAX:
        err.print(f"Only the newest {search.HITS_MAX} are shown: narrow the search.")


_HIT_COLUMNS: Final = ("kind", "id", "matched", "status", "amount", "created", "orders")
_FIELDS_OF_HIT: Final = tuple(field.name for field in fields(search.Hit))


def _as_shown(row: Mapping[str, Any], form: Format, amount: str = "amount_total") -> dict[str, Any]:
    """Return *row* with its amount as money where people read it."""
    is_read = form is Format.TABLE
    return {**row, amount: output.amount(amount, row[amount], row["currency"])} if is_read else dict(row)
