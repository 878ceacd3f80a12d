"""The account's expectations at the end of its history: its rows, and the changes in the feed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.hidden import shop
from tests.hidden.account import Account, Expected, Key, Thing, at, picked
from tests.hidden.billing import balance_of

Columns = dict[str, Any]

SAME: Final[Mapping[str, tuple[str, ...]]] = {
    "payment_links": ("active", "url", "currency", "metadata"),
    "customers": ("email", "name", "currency", "delinquent", "test_clock", "metadata"),
    "balance_transactions": (
        *("customer", "currency", "type", "amount", "ending_balance", "invoice", "credit_note", "description"),
    ),
    "invoices": (
        *("number", "status", "currency", "total", "amount_due", "amount_paid", "amount_remaining", "amount_overpaid"),
        *("starting_balance", "ending_balance", "customer"),
        *("pre_payment_credit_notes_amount", "post_payment_credit_notes_amount"),
    ),
    "credit_notes": (
        *("number", "status", "type", "reason", "currency", "amount", "pre_payment_amount", "post_payment_amount"),
        *("out_of_band_amount", "customer", "invoice", "customer_balance_transaction", "memo"),
    ),
    "invoice_payments": ("invoice", "status", "currency", "amount_paid"),
    "refunds": ("status", "currency", "amount", "charge", "payment_intent", "reason"),
    "payment_intents": ("status",),
    "charges": (*("payment_intent", "status", "currency", "amount", "captured", "amount_captured"),),
    "disputes": ("charge", "payment_intent", "status", "reason", "currency", "amount"),
    "portal_configurations": ("active", "is_default", "name", "features"),
    "portal_sessions": ("configuration", "customer", "return_url"),
    "orders": (
        *("payment_status", "mode", "currency", "amount_subtotal", "amount_total", "customer", "client_reference_id"),
        *("payment_link", "payment_intent", "subscription", "invoice", "recovered_from", "metadata"),
    ),
}
"""The columns that are fields of the object by the same name."""


def _payment_link(link: Thing) -> Columns:
    return {"created": at(link.facts["created"])}


def _customer(customer: Thing) -> Columns:
    return {"created": at(customer["created"]), "deleted": customer.facts["deleted"]}


def _balance_transaction(entry: Thing) -> Columns:
    return {"created": at(entry["created"]), "order_id": None}


def _invoice(invoice: Thing) -> Columns:
    moments = invoice["status_transitions"]
    parent = invoice["parent"]
    return {
        "created": at(invoice["created"]),
        "subscription": parent and parent["subscription_details"]["subscription"],
        "deleted": invoice.facts["deleted"],
        **{name: at(moments[name]) for name in ("finalized_at", "paid_at", "voided_at")},
    }


def _credit_note(note: Thing) -> Columns:
    moments = {name: at(note[name]) for name in ("created", "effective_at", "voided_at")}
    amounts = {"refunded_amount": note.facts["refunded"], "to_balance_amount": note.facts["to_balance"]}
    return {**moments, **amounts, "lines_complete": True}


def _invoice_payment(payment: Thing) -> Columns:
    moment = at(payment["status_transitions"]["paid_at"])
    return {"payment_intent": payment["payment"]["payment_intent"], "charge": None, "paid_at": moment}


def _refund(refund: Thing) -> Columns:
    return {
        "failure_reason": refund.body.get("failure_reason"),
        "created": at(refund["created"]),
        "failed_at": at(refund.facts["failed_at"]),
    }


def _payment_intent(intent: Thing) -> Columns:
    return {"canceled_at": at(intent["canceled_at"])}


def _charge(charge: Thing) -> Columns:
    assert charge.reported is not None
    moments = {name: at(charge.facts[name]) for name in ("captured_at", "released_at")}
    # A column that no event has reported becomes known with the next event.
    last = {name: charge.reported[name] for name in ("amount_refunded", "refunded", "disputed")}
    return {"invoice": None, **last, **moments}


def _dispute(_: Thing) -> Columns:
    return {}


def _portal_configuration(made: Thing) -> Columns:
    moments = {name: at(made[name]) for name in ("created", "updated")}
    return {"login_page_url": made["login_page"]["url"], **moments}


def _portal_session(made: Thing) -> Columns:
    flow = made["flow"]
    return {"created": at(made["created"]), "expired_at": None, "flow_type": flow and flow["type"]}


FUNNEL: Final = ("opened", "completed", "paid", "expired", "amount_paid")
MOMENTS: Final = ("completed_at", "paid_at", "failed_at", "expired_at")


def is_over_by_clock(session: Thing) -> bool:
    """Return whether no end of the session was reported, so that our clock decides."""
    return session["status"] == "open" and "by_clock" in session.facts


def status_of(session: Thing) -> str:
    """Return the status of an order."""
    return "expired" if is_over_by_clock(session) else str(session.facts["status"])


def _order(session: Thing) -> Columns:
    details, recovery = session["customer_details"], session["after_expiration"]
    collected = session["collected_information"]
    amounts, shown = session["total_details"] or {}, session.body.get("presentment_details", {})
    moments = {name: at(session.facts[name]) for name in MOMENTS}
    if is_over_by_clock(session):
        moments["expired_at"] = at(session.facts["by_clock"])
    return {
        "status": status_of(session),
        "session_status": session["status"],
        **{f"amount_{name}": amounts.get(f"amount_{name}") for name in ("discount", "shipping", "tax")},
        "presentment_currency": shown.get("presentment_currency"),
        "presentment_amount": shown.get("presentment_amount"),
        "customer_email": details["email"] if details else session["customer_email"],
        "recovery_url": recovery and recovery["recovery"]["url"],
        "shipping": collected and collected["shipping_details"],
        "created": at(session["created"]),
        "expires_at": at(session["expires_at"]),
        **moments,
        "lines_complete": shop.lines_are_complete(session),
    }


ROWS: Final[Mapping[str, Callable[[Thing], Columns]]] = {
    "orders": _order,
    "payment_links": _payment_link,
    "customers": _customer,
    "balance_transactions": _balance_transaction,
    "invoices": _invoice,
    "credit_notes": _credit_note,
    "invoice_payments": _invoice_payment,
    "refunds": _refund,
    "payment_intents": _payment_intent,
    "charges": _charge,
    "disputes": _dispute,
    "portal_configurations": _portal_configuration,
    "portal_sessions": _portal_session,
}


def rows(account: Account) -> Iterator[tuple[Key, Expected]]:
    """Yield every row that the account expects; ``balance_changes``, which are named by events, are counted below."""
    for thing in account.things.values():
        if thing.is_known:
            yield thing.key, Expected(_columns(thing), _relies(account, thing))
    for session in account.all_of("orders"):
        if session.is_known:
            yield ("order_book", session.id), _of_book(account, session)
        yield from _lines(session)
    yield from _funnel(account)
    for customer in account.all_of("customers"):
        yield from _balances(customer)
    for note in account.all_of("credit_notes"):
        yield from _note_lines(note)


def _columns(thing: Thing) -> Columns:
    stamp = {} if thing.was_read else {"as_of": at(thing.as_of)}
    return {**picked(thing, SAME[thing.table]), **ROWS[thing.table](thing), **stamp}


def _relies(account: Account, thing: Thing) -> frozenset[Key]:
    if thing.table != "orders":
        return frozenset()
    return frozenset(charge.key for charge in shop.charges_of(account, thing))


def _lines(session: Thing) -> Iterator[tuple[Key, Expected]]:
    for line in session.facts["listed"] or ():
        same = ("description", "quantity", "currency", *(name for name in line if name.startswith("amount_")))
        columns = {name: line[name] for name in same}
        bought = {"price": line["price"]["id"], "product": line["price"]["product"], "order_id": session.id}
        yield ("order_lines", line["id"]), Expected({**columns, **bought}, frozenset({session.key}))


def _note_lines(note: Thing) -> Iterator[tuple[Key, Expected]]:
    for line in note["lines"]["data"]:
        columns = {name: line[name] for name in ("type", "description", "quantity", "amount", "discount_amount")}
        of = {"credit_note": note.id, "invoice_line_item": None}
        yield ("credit_note_lines", line["id"]), Expected({**columns, **of}, frozenset({note.key}))


def _balances(customer: Thing) -> Iterator[tuple[Key, Expected]]:
    """Yield the current balance of the default currency, and the others as they were last read."""
    amounts = dict(customer.facts["read"])
    if customer["currency"] is not None:
        amounts[customer["currency"]] = balance_of(customer, customer["currency"])
    entries = {("balance_transactions", entry["id"]) for entry in customer.facts["ledger"]}
    for currency, amount in amounts.items():
        yield (
            ("balances", f"{customer.id} {currency}"),
            Expected({"amount": amount}, frozenset({customer.key, *entries})),
        )


def _funnel(account: Account) -> Iterator[tuple[Key, Expected]]:
    """Yield, by link and currency, the outcomes of the sessions that Payfold knows."""
    found: dict[Key, Counter[str]] = defaultdict(Counter)
    for session in account.all_of("orders"):
        if session["payment_link"] and session.is_known:
            counts = found["payment_link_funnel", f"{session['payment_link']} {session['currency']}"]
            paid = session.facts["status"] == "paid"
            counts.update(opened=1, completed=session["status"] == "complete", expired=status_of(session) == "expired")
            counts.update(paid=paid, amount_paid=session["amount_total"] if paid else 0)
    for key, counts in found.items():
        relies = {one.key for one in account.all_of("orders")}
        yield key, Expected({name: counts[name] for name in FUNNEL}, frozenset(relies))


def balance_changes(account: Account) -> Counter[tuple[Any, ...]]:
    """Count the changes of balances that customers' events report: customer, currency, amount, ending, second."""
    return Counter(
        (customer.id, currency, amount, ending, at(second))
        for customer in account.all_of("customers")
        for currency, amount, ending, second in customer.facts["changes"]
    )


# ---- Refunds and disputes of an order ----


def _of_book(account: Account, session: Thing) -> Expected:
    charges = shop.charges_of(account, session)
    intents = {charge["payment_intent"] for charge in charges}
    refunds = [refund for refund in account.all_of("refunds") if refund["payment_intent"] in intents]
    disputes = [dispute for dispute in account.all_of("disputes") if dispute["payment_intent"] in intents]
    notes = [note for note in account.all_of("credit_notes") if note["invoice"] == session["invoice"]]
    columns = {**_came_back(account, session, refunds), **_disputed(account, session, disputes)}
    columns["credited_amount"] = _credited(session, notes)
    return Expected(columns, frozenset(thing.key for thing in (session, *charges, *refunds, *disputes, *notes)))


def _came_back(account: Account, session: Thing, refunds: list[Thing]) -> Columns:
    """Return the refunded amount, null where no event can have reported it."""
    charges = shop.charges_of(account, session)
    if not charges:
        return {"refunded_amount": None, "refund_status": None}
    refunded = sum(refund["amount"] for refund in refunds if _counts(refund))
    if refunded and not account.shape.hears_refunds and any(map(_is_in_part, charges)):
        return {"refunded_amount": None}
    taken = sum(charge["amount_captured"] for charge in charges if charge.facts["captured_at"])
    status = "none" if not refunded else "full" if refunded == taken else "partial"
    return {"refunded_amount": refunded, "refund_status": status}


def _is_in_part(charge: Thing) -> bool:
    return charge.facts["captured_at"] is not None and charge["amount_captured"] < charge["amount"]


def _disputed(account: Account, session: Thing, disputes: list[Thing]) -> Columns:
    """Return the amount that was or may be lost by disputes, null where it is in another currency."""
    if not shop.charges_of(account, session):
        return {"disputed_amount": None}
    counted = [one for one in disputes if one["status"] in (*shop.OPEN_DISPUTES, "lost")]
    if any(one["currency"] != session["currency"] for one in counted):
        return {"disputed_amount": None}
    return {"disputed_amount": sum(one["amount"] for one in counted)}


def _counts(refund: Thing) -> bool:
    return refund["status"] not in {"failed", "canceled"} and refund["reason"] != "expired_uncaptured_charge"


def _credited(session: Thing, notes: list[Thing]) -> int | None:
    if session["invoice"] is None:
        return None
    return sum(int(note["amount"]) for note in notes if note["status"] != "void")


# ---- News ----

News = tuple[str, str, str]
"""A subject, its id and the kind of its change; of ``dispute.closed`` with the status after a colon."""
KNOWN_KINDS: Final = (
    *("order.opened", "order.processing", "order.paid", "order.completed", "order.failed", "order.expired"),
    *("order.corrected", "credit_note.issued", "credit_note.voided", "dispute.opened", "dispute.closed"),
)


def news(account: Account) -> dict[News, tuple[int, int]]:
    """Return how often at least and at most each change is in the feed; a change that is not returned is never in it.

    The last change of a subject is there once. An earlier one is there at most once: it is left out if it arrives late.
    """
    found: dict[News, tuple[int, int]] = {}
    for session in account.all_of("orders"):
        if "by_clock" in session.facts:
            # If our clock's event arrives before the read that it is based on, the order's amounts are announced too.
            found["order", session.id, "order.expired"] = found["order", session.id, "order.corrected"] = (0, 1)
        passed = [*session.facts["passed"], *["order.expired"] * is_over_by_clock(session)]
        _add(found, ("order", session.id), passed)
    for note in account.all_of("credit_notes"):
        passed = ["credit_note.issued"] + ["credit_note.voided"] * (note["status"] == "void")
        _add(found, ("credit_note", note.id), passed)
    for dispute in account.all_of("disputes"):
        found |= _news_of_dispute(dispute)
    return found


def _news_of_dispute(dispute: Thing) -> dict[News, tuple[int, int]]:
    """A dispute is opened once if it ever was more than an inquiry, and closed once by each status that closes it.

    Its final status is always there; an earlier status is left out if it arrives after the final one.
    """
    opened: dict[News, tuple[int, int]] = {}
    if dispute.facts["was_real"]:
        opened["dispute", dispute.id, "dispute.opened"] = (
            int(dispute["status"] in {"needs_response", "under_review"}),
            1,
        )
    closed: dict[News, tuple[int, int]] = {
        ("dispute", dispute.id, f"dispute.closed:{status}"): (int(status == dispute["status"]), 1)
        for status in dispute.facts["closed"]
    }
    return opened | closed


def _add(found: dict[News, tuple[int, int]], subject: tuple[str, str], passed: list[str]) -> None:
    for kind in passed:
        found[*subject, kind] = (0, 1)
    if passed:
        found[*subject, passed[-1]] = (1, 1)


# ---- Last announcements ----

Topic = tuple[str, str, str]
"""The subject of a change that repeats, its id, and the currency of a balance (else '')."""


@dataclass(frozen=True)
class Last:
    """The content of the last change of a topic; if *is_silent*, there may be no change, since nothing ever moved."""

    after: Columns
    is_silent: bool


def last_announced(account: Account) -> Iterator[tuple[Topic, Last, frozenset[Key]]]:
    """Yield the last announcement of each topic, and the rows of which an anomaly excuses a different one."""
    for link in account.all_of("payment_links"):
        yield ("payment_link", link.id, ""), Last({"active": link["active"]}, is_silent=False), frozenset({link.key})
    for key, expected in rows(account):
        if key[0] == "balances":
            customer, currency = key[1].split(" ")
            amount = expected.columns["amount"]
            last = Last({"amount": amount}, is_silent=amount == 0)
            yield ("balance", customer, currency), last, expected.relies | {key}
        elif key[0] == "order_book":
            amount = expected.columns["refunded_amount"]
            last = Last({"refunded_amount": amount}, is_silent=not amount)
            yield ("order", key[1], ""), last, expected.relies
    for invoice in account.all_of("invoices"):
        if invoice.is_known and not invoice.facts["deleted"]:
            same = ("status", "total", "amount_paid")
            last = Last(picked(invoice, same), is_silent=invoice["status"] == "draft")
            yield ("invoice", invoice.id, ""), last, frozenset({invoice.key})
