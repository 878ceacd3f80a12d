"""Names the kinds of object that Stripe is asked for, and counts what came of each.

Payment intents are not asked for: only canceled ones have rows, and Stripe's list cannot be narrowed to those. Portal
sessions cannot be read at Stripe at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Final

from schemas import tables

NOT_ASKED: Final = "not asked, since no key serves it"
REFUSED: Final = "not asked any more, since Stripe refuses it"
ANOTHER_SANDBOX: Final = (
    "Stripe lists no session that an event here is of: is the API key of another account or sandbox? --repair records"
    " no session as missing."
)
LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class Listed:
    """The tally of one kind of object in one world: how many objects Stripe listed, and how many rows differ.

    Two kinds of objects are not compared: *archived* ones, since payloads that their rows are folded from are archived,
    and *unreadable* ones, which have no readable id in Stripe's answer, or which no fold can read. *only_by_map* counts
    differing rows that would stay the same if the listed objects were folded. *unstated* counts values that are absent
    from the API version of the recorded events. The lines of *without_lines* objects were not compared, since Stripe
    lists a part of them, and the rest was not read. If only a sample was looked at, the tables hold *sampled_of*
    objects; of ledgers, *sampled* of *sampled_of* customers were asked for. The list was *cut_short* (1) if an answer
    of Stripe's shows no object to go on after, and has a *reason* then. *is_forbidden* is whether the key may not list
    the kind. If Stripe refuses a world, the world has a tally of its own with the *reason*. The tally of sessions has a
    *reason* if all of them belong to another sandbox.
    """

    account: str
    livemode: bool
    object: str
    listed: int = 0
    missing: int = 0
    extra: int = 0
    different: int = 0
    archived: int = 0
    unreadable: int = 0
    only_by_map: int = 0
    unstated: int = 0
    without_lines: int = 0
    sampled: int = 0
    sampled_of: int = 0
    cut_short: int = 0
    is_forbidden: bool = False
    reason: str = ""


COUNTS: Final = tuple(each.name for each in fields(Listed) if each.type is int)
OF_PAGES: Final = ("listed", "sampled", "sampled_of", "unreadable", "cut_short")
"""Counted once for a page, when it is first listed, and not when its objects are compared again."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object: its *name*, the *table* of its rows, the *path* of its list, and whether that is *by_age*.

    Payment links have no creation time, and lists of portal configurations cannot be narrowed by it. There are few of
    both, so all are looked at. *params* narrow the list to objects that have rows, and *rows* is the condition of the
    rows that the list can have.
    """

    name: str
    table: str
    path: tuple[str, ...]
    by_age: bool = True
    params: Mapping[str, Any] = field(default_factory=dict)
    rows: str = "true"
    is_sampled: bool = False

    @property
    def created(self) -> str:
        """The time by which rows are searched, as SQL: never earlier than the creation of the object."""
        return "coalesce(created, as_of)" if "created" in tables.metadata.tables[self.table].columns else "as_of"


SESSIONS: Final = Kind("checkout.session", "orders", ("checkout", "sessions"), params={"expand": ["data.line_items"]})
_KINDS: Final = (
    SESSIONS,
    Kind("payment_link", "payment_links", ("payment_links",), by_age=False),
    # Stripe does not list a deleted draft.
    Kind("invoice", "invoices", ("invoices",), rows="NOT deleted"),
    Kind("credit_note", "credit_notes", ("credit_notes",)),
    Kind("refund", "refunds", ("refunds",)),
    Kind("charge", "charges", ("charges",)),
    Kind("dispute", "disputes", ("disputes",)),
    # Only paid ones have events, and the payments that invoices before basil report have no id of their own.
    Kind(
        "invoice_payment",
        "invoice_payments",
        ("invoice_payments",),
        params={"status": "paid"},
        rows="id IS DISTINCT FROM invoice",
    ),
    Kind("customer", "customers", ("customers",), rows="NOT deleted", is_sampled=True),
    Kind("billing_portal.configuration", "portal_configurations", ("billing_portal", "configurations"), by_age=False),
)
LEDGERS: Final = Kind("customer_balance_transaction", "balance_transactions", ("customers",))
WALKED: Final = (*_KINDS, LEDGERS)
