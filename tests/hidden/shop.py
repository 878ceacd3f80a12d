"""The account's sales: payment links, Checkout Sessions, charges, refunds and disputes; and a whole history of them."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from tests.hidden import billing
from tests.hidden.account import CURRENCIES, Account, Body, Thing

SHIPPING: Final[Body] = {
    "name": "Room 7",
    "address": {
        "city": "Exampleton",
        "country": "US",
        "line1": "1 Example Street",
        "line2": None,
        "postal_code": "97001",
        "state": "OR",
    },
}
GRACE: Final = 3600
"""Seconds after a session's own end, before our clock decides that it is over (``PAYFOLD_EXPIRY_GRACE_MINUTES``)."""
OPEN_DISPUTES: Final = ("needs_response", "under_review", "appeal_under_review")


# ---- Payment links ----


def create_link(account: Account) -> None:
    """Make a payment link."""
    body: Body = {
        "id": account.name("plink"),
        "object": "payment_link",
        "active": True,
        "currency": account.rng.choice(CURRENCIES),
        "livemode": account.livemode,
        "metadata": {},
        "url": "https://buy.example.com/1",
    }
    account.emit(account.add("payment_links", body, created=account.now), "payment_link.created")


def change_link(account: Account) -> None:
    """Switch a link on or off, or change its metadata."""
    link = account.rng.choice(account.all_of("payment_links"))
    if account.chance(0.5):
        account.change(link, "payment_link.updated", active=not link["active"])
    else:
        metadata = {"of": account.name("note")}
        account.change(link, "payment_link.updated", metadata=metadata)


# ---- Checkout Sessions ----


def open_session(account: Account) -> None:
    """Open a session of some mode: no event reports it."""
    mode = account.rng.choices(("payment", "subscription", "setup"), (7, 2, 1))[0]
    link = account.rng.choice([None, *account.all_of("payment_links")]) if mode == "payment" else None
    currency = str(link["currency"]) if link else account.rng.choice(CURRENCIES)
    session = add_session(account, mode, currency, payment_link=link.id if link else None)
    if session["payment_status"] == "unpaid" and account.chance(0.2):
        account.observe(session.id, "payfold.checkout.session.registered", session.body, account.now)
        _see_open(session)


def _see_open(session: Thing) -> None:
    session.was_read = True
    if session["status"] == "open":
        session.facts["passed"].append("order.opened")


def add_session(account: Account, mode: str, currency: str, **fields: object) -> Thing:
    """Make an open session."""
    trial = mode == "subscription" and account.chance(0.25)
    amounts = _no_amounts() if mode == "setup" else _amounts(account, currency, free=trial)
    nothing = mode == "setup" or trial
    recovery: Body | None = None
    if account.chance(0.3):
        recovery = {"recovery": {"enabled": True, "allow_promotion_codes": False, "url": None, "expires_at": None}}
    body: Body = {
        "id": account.name("cs"),
        "object": "checkout.session",
        "after_expiration": recovery,
        "client_reference_id": account.rng.choice((None, "cart-1")),
        "collected_information": None,
        "created": account.now,
        "customer": None,
        "customer_details": None,
        "customer_email": account.rng.choice((None, "passed@example.com")),
        "expires_at": account.now + 86_400,
        "invoice": None,
        "livemode": account.livemode,
        "metadata": account.rng.choice(({}, {"cart": "1"})),
        "mode": mode,
        "payment_intent": None,
        "payment_link": None,
        "payment_status": "no_payment_required" if nothing else "unpaid",
        "recovered_from": None,
        "status": "open",
        "subscription": None,
        "url": "https://checkout.example.com/1",
        **{name: value for name, value in amounts.items() if name != "lines"},
        **fields,
    }
    moments = dict.fromkeys(("completed_at", "paid_at", "failed_at", "expired_at"))
    lines = [{**line, "id": account.name("li")} for line in amounts["lines"]]
    return account.add("orders", body, status="open", passed=[], lines=lines, listed=None, shown=None, **moments)


def _no_amounts() -> Body:
    return {"amount_subtotal": None, "amount_total": None, "currency": None, "total_details": None, "lines": []}


def _amounts(account: Account, currency: str, *, free: bool) -> Body:
    """Return the amounts of a session and its lines, shipping apart."""
    lines = [_line(account, currency, free=free) for _ in range(account.rng.randint(1, 3))]
    subtotal = sum(int(line["amount_subtotal"]) for line in lines)
    shipping = 0 if free else account.rng.choice((0, 0, 500))
    details = {"amount_discount": 0, "amount_shipping": shipping, "amount_tax": 0}
    total = subtotal + shipping
    return {
        "amount_subtotal": subtotal,
        "amount_total": total,
        "currency": currency,
        "total_details": details,
        "lines": lines,
    }


def _line(account: Account, currency: str, *, free: bool) -> Body:
    amount = 0 if free else 100 * account.rng.randint(1, 30)
    return {
        "object": "item",
        "amount_discount": 0,
        "amount_subtotal": amount,
        "amount_tax": 0,
        "amount_total": amount,
        "currency": currency,
        "description": "A thing",
        "price": {"id": "price_1", "object": "price", "product": "prod_1"},
        "quantity": account.rng.randint(1, 4),
    }


def _discount(session: Thing, amount: int) -> Body:
    """Return the fields of a session after a promotion code over *amount* of its first line."""
    first = session.facts["lines"][0]
    less = {"amount_discount": amount, "amount_total": int(first["amount_subtotal"]) - amount}
    session.facts["lines"] = [{**first, **less}, *session.facts["lines"][1:]]
    details = {**session["total_details"], "amount_discount": amount}
    return {"amount_total": int(session["amount_total"]) - amount, "total_details": details}


def sessions_of(account: Account, *statuses: str) -> list[Thing]:
    """Return the sessions of the orders that have a status."""
    return [session for session in account.all_of("orders") if session.facts["status"] in statuses]


def read_session(account: Account) -> None:
    """Read a session with its lines; record the read only if it differs from the one before."""
    session = account.rng.choice(account.all_of("orders"))
    listed = {"object": "list", "data": session.facts["lines"], "has_more": False}
    whole = {**session.body, "line_items": listed}
    if whole == session.facts["shown"]:
        return
    session.facts.update(shown=whole, listed=session.facts["lines"], listed_at=_totals(session))
    _see_open(session)
    account.observe(session.id, "payfold.checkout.session.observed", whole)


def _totals(session: Thing) -> tuple[object, ...]:
    return (session["amount_subtotal"], session["amount_total"], session["currency"])


def lines_are_complete(session: Thing) -> bool:
    """Return whether the lines were listed, and the totals have not changed since."""
    return session.facts["listed"] is not None and session.facts["listed_at"] == _totals(session)


def move_order(account: Account, session: Thing, status: str, moment: str | None) -> None:
    """Set the status of an order, and its time."""
    session.facts["status"] = status
    session.facts["passed"].append(f"order.{'completed' if status == 'complete' else status}")
    if moment is not None:
        session.facts[moment] = account.now


def overdue(account: Account) -> list[Thing]:
    """Return the sessions that were seen open and have expired by our clock, however they really ended."""
    return [
        session
        for session in account.all_of("orders")
        if "order.opened" in session.facts["passed"]
        and "by_clock" not in session.facts
        and session["expires_at"] + GRACE <= account.now
    ]


def expire_by_clock(account: Account) -> None:
    """Let our clock expire a session; a report of Stripe's, before or after, outranks it."""
    session = account.rng.choice(overdue(account))
    session.facts["by_clock"] = session["expires_at"] + GRACE
    about = {"object": "checkout.session", "id": session.id}
    account.observe(session.id, "payfold.checkout.session.clock_expired", about, session.facts["by_clock"])


def expire_session(account: Account) -> None:
    """Expire an open session; sometimes the buyer comes back by its recovery link."""
    session = account.rng.choice(sessions_of(account, "open"))
    fields: Body = {"status": "expired", "url": None}
    if session["after_expiration"]:
        recovery = {**session["after_expiration"]["recovery"], "url": "https://buy.example.com/r/1"}
        fields["after_expiration"] = {"recovery": {**recovery, "expires_at": account.now + 2_592_000}}
    account.change(session, "checkout.session.expired", **fields)
    move_order(account, session, "expired", "expired_at")
    if session["after_expiration"] and account.chance(0.5):
        of = {"recovered_from": session.id, "payment_link": session["payment_link"]}
        add_session(account, str(session["mode"]), session["currency"] or "usd", **of)


def payable(account: Account) -> list[Thing]:
    """Return the sessions that a buyer may still finish."""
    return [session for session in sessions_of(account, "open") if account.now < session["expires_at"]]


def complete_session(account: Account) -> None:
    """Let a buyer finish a session in one of the ways that its mode allows."""
    session = account.rng.choice(payable(account))
    details: Body = {"customer_details": {"email": "typed@example.com", "name": "Buyer"}}
    if session["mode"] == "payment" and account.chance(0.2):
        details["presentment_details"] = {"presentment_amount": 4321, "presentment_currency": "cad"}
    if account.chance(0.3):
        details["collected_information"] = {"shipping_details": SHIPPING}
    if session["mode"] == "setup":
        _complete(account, session, "complete", None, **details)
    elif session["mode"] == "subscription":
        _subscribe(account, session, details)
    else:
        _buy(account, session, details)


def _complete(account: Account, session: Thing, status: str, moment: str | None, **fields: object) -> None:
    found: Body = dict(fields)
    account.change(session, "checkout.session.completed", status="complete", url=None, **found)
    session.facts["completed_at"] = account.now
    move_order(account, session, status, moment)


def _subscribe(account: Account, session: Thing, details: Body) -> None:
    """Complete a session that begins a subscription; its first invoice is paid, or there is nothing to pay."""
    currency = str(session["currency"])
    customer = billing.create_customer(account, currency=currency)
    invoice = billing.create_invoice(account, customer, int(session["amount_total"]))
    subscription = account.name("sub")
    invoice.body["parent"] = {"type": "subscription_details", "subscription_details": {"subscription": subscription}}
    account.emit(invoice, "invoice.created")
    billing.finalize_invoice(account, invoice)
    if invoice["status"] == "open":
        billing.pay_part(account, invoice, int(invoice["amount_remaining"]))
    words = "paid" if session["amount_total"] else "no_payment_required"
    found = {"customer": customer.id, "invoice": invoice.id, "subscription": subscription}
    _complete(account, session, "paid", "paid_at", payment_status=words, **found, **details)


def _buy(account: Account, session: Thing, details: Body) -> None:
    if account.chance(0.25):
        first = int(session.facts["lines"][0]["amount_subtotal"])
        details |= _discount(session, first if account.chance(0.5) else first // 4)
    total = int(details.get("amount_total", session["amount_total"]))
    if total == 0:
        _complete(account, session, "paid", "paid_at", payment_status="no_payment_required", **details)
        return
    buyers = billing.alive(account)
    if buyers and account.chance(0.4):
        details["customer"] = account.rng.choice(buyers).id
    details["payment_intent"] = account.name("pi")
    account.rng.choice((_buy_at_once, _buy_at_once, _buy_delayed, _buy_held))(account, session, total, details)


def _decline(account: Account, intent: str, total: int, currency: str) -> None:
    """Let a first payment attempt fail in some cases."""
    if account.chance(0.2):
        declined = {"status": "failed", "captured": False, "amount_captured": 0, "paid": False}
        billing.add_charge(account, intent, total, currency, **declined)


def _buy_at_once(account: Account, session: Thing, total: int, details: Body) -> None:
    intent, currency = details["payment_intent"], str(session["currency"])
    _decline(account, intent, total, currency)
    charge = billing.add_charge(account, intent, total, currency)
    _succeed(account, charge)
    if account.chance(0.15):
        details |= _invoice_it(account, charge)
    if account.chance(0.3):
        account.now += 1
    _complete(account, session, "paid", "paid_at", payment_status="paid", **details)


def _succeed(account: Account, charge: Thing) -> None:
    """Report the payment intent of a charge that was captured."""
    amounts = {"amount": charge["amount"], "amount_received": charge["amount_captured"], "currency": charge["currency"]}
    about = {"id": charge["payment_intent"], "object": "payment_intent", "status": "succeeded", **amounts}
    account.mention("payment_intent.succeeded", about)


def _invoice_it(account: Account, charge: Thing) -> Body:
    """Make the invoice of a payment that asked for one (``invoice_creation``), for a customer of its own."""
    currency, total = str(charge["currency"]), int(charge["amount"])
    customer = billing.create_customer(account, currency=currency)
    invoice = billing.create_invoice(account, customer, total)
    account.emit(invoice, "invoice.created")
    billing.finalize_invoice(account, invoice)
    billing.record_payment(account, invoice, charge, total)
    return {"customer": customer.id, "invoice": invoice.id}


def _buy_delayed(account: Account, session: Thing, total: int, details: Body) -> None:
    taken = account.chance(0.5)
    pending = {"status": "pending", "captured": taken, "amount_captured": total if taken else 0, "paid": False}
    billing.add_charge(account, details["payment_intent"], total, str(session["currency"]), **pending)
    session.facts["way"] = "delayed"
    _complete(account, session, "processing", None, payment_status="unpaid", **details)


def _buy_held(account: Account, session: Thing, total: int, details: Body) -> None:
    intent, currency = details["payment_intent"], str(session["currency"])
    _decline(account, intent, total, currency)
    billing.add_charge(account, intent, total, currency, captured=False, amount_captured=0)
    session.facts["way"] = "held"
    _complete(account, session, "processing", None, payment_status="unpaid", **details)


def waiting(account: Account, way: str) -> list[Thing]:
    """Return the complete sessions that wait for a delayed payment or for a capture."""
    return [session for session in sessions_of(account, "processing") if session.facts["way"] == way]


def charge_of(account: Account, session: Thing) -> Thing:
    """Return the last charge of a session's payment intent."""
    return charges_of(account, session)[-1]


def charges_of(account: Account, session: Thing) -> list[Thing]:
    """Return the charges of a session: those of its intent, else those that paid its invoice."""
    if session["payment_intent"] is None:
        return billing.charges_of_invoice(account, str(session["invoice"]))
    return [charge for charge in account.all_of("charges") if charge["payment_intent"] == session["payment_intent"]]


def clear(account: Account) -> None:
    """Let a delayed payment clear; the session's event may come later than the charge's."""
    session = account.rng.choice(waiting(account, "delayed"))
    charge = charge_of(account, session)
    before = account.shape.names_before
    fields = {"status": "succeeded", "captured": True, "amount_captured": charge["amount"], "paid": True}
    account.change(charge, "charge.succeeded", before=before, **fields)
    charge.facts["captured_at"] = account.now
    if account.chance(0.4):
        account.tick()
    account.change(session, "checkout.session.async_payment_succeeded", payment_status="paid")
    move_order(account, session, "paid", "paid_at")


def bounce(account: Account) -> None:
    """Let a delayed payment fail: the session's snapshot does not change."""
    session = account.rng.choice(waiting(account, "delayed"))
    charge = charge_of(account, session)
    account.change(
        charge, "charge.failed", before=account.shape.names_before, status="failed", captured=False, amount_captured=0
    )
    account.emit(session, "checkout.session.async_payment_failed")
    move_order(account, session, "failed", "failed_at")


def capture(account: Account) -> None:
    """Capture a held payment, in whole or in part: no event of the session reports it."""
    session = account.rng.choice(waiting(account, "held"))
    charge = charge_of(account, session)
    amount = int(charge["amount"])
    # If only the charge reports refunds, their sum never equals the released amount: the two would look the same.
    most = amount if account.shape.hears_refunds else amount // 3
    taken = account.rng.randint(1, most) if account.chance(0.4) else amount
    rest = amount - taken if account.shape.rest_is_refunded else 0
    fields = {"captured": True, "amount_captured": taken, "amount_refunded": rest}
    account.change(charge, "charge.captured", before=account.shape.names_before, **fields)
    charge.facts["captured_at"] = account.now
    _succeed(account, charge)
    move_order(account, session, "paid", "paid_at")


def release(account: Account) -> None:
    """Release a held payment, by time or by canceling; in some cases with a refund that returns no money."""
    session = account.rng.choice(waiting(account, "held"))
    charge = charge_of(account, session)
    amount, intent = charge["amount"], str(charge["payment_intent"])
    account.change(charge, "charge.expired", before=account.shape.names_before, amount_refunded=amount, refunded=True)
    charge.facts["released_at"] = account.now
    body: Body = {
        "id": intent,
        "object": "payment_intent",
        "amount": amount,
        "canceled_at": account.now,
        "cancellation_reason": "abandoned",
        "currency": charge["currency"],
        "livemode": account.livemode,
        "metadata": {},
        "status": "canceled",
    }
    account.emit(account.add("payment_intents", body), "payment_intent.canceled")
    if account.chance(0.4):
        _refund_of_release(account, charge)
    move_order(account, session, "failed", "failed_at")


def _refund_of_release(account: Account, charge: Thing) -> None:
    body: Body = {
        "id": account.name("re"),
        "object": "refund",
        "amount": charge["amount"],
        "charge": charge.id,
        "created": account.now,
        "currency": charge["currency"],
        "metadata": {},
        "payment_intent": charge["payment_intent"],
        "reason": "expired_uncaptured_charge",
        "status": "succeeded",
    }
    account.emit(account.add("refunds", body, failed_at=None), "refund.created")


# ---- Refunds and disputes ----


def refund(account: Account) -> None:
    """Refund a part or all of a charge."""
    charge = account.rng.choice(refundable(account))
    rest = billing.refundable(account, charge)
    billing.add_refund(account, charge, rest if account.chance(0.4) else account.rng.randint(1, rest))


def refundable(account: Account) -> list[Thing]:
    """Return the charges that may be refunded in whole or in part."""
    return [
        charge
        for charge in account.all_of("charges")
        if billing.refundable(account, charge) > 0
        and (charge["amount_captured"] == charge["amount"] or charge.second != account.now)
    ]


def movable(account: Account) -> list[Thing]:
    """Return the refunds that may still change their status."""
    return [
        refund
        for refund in account.all_of("refunds")
        if refund["status"] in {"pending", "succeeded"}
        and account.things["charges", refund["charge"]].second != account.now
        and refund["reason"] != "expired_uncaptured_charge"
        # Whether the charge's total falls is not known, and nothing else would report it.
        and account.shape.hears_refunds
    ]


def move_refund(account: Account) -> None:
    """Let a refund succeed, fail or be canceled."""
    refund = account.rng.choice(movable(account))
    choices = ("succeeded", "failed", "canceled") if refund["status"] == "pending" else ("failed",)
    status = account.rng.choice(choices)
    types = ["refund.updated"]
    if status == "failed":
        types.append("refund.failed")
    if account.chance(0.2):
        types.append("charge.refund.updated")
    fields: Body = {"status": status}
    if status == "failed":
        fields["failure_reason"] = "expired_or_canceled_card"
    account.change(refund, *types, **fields)
    if status != "succeeded":
        refund.facts["failed_at"] = account.now
        account.things["charges", refund["charge"]].facts["frozen"] = True


def disputable(account: Account) -> list[Thing]:
    """Return the charges that took money and were never disputed; see Note [What the account does not do]."""
    disputed = {dispute["charge"] for dispute in account.all_of("disputes")}
    return [
        charge
        for charge in account.all_of("charges")
        if charge.facts["captured_at"] and charge.as_of != account.now and charge.id not in disputed
    ]


def dispute(account: Account) -> None:
    """Dispute a charge, or inquire about it."""
    charge = account.rng.choice(disputable(account))
    inquiry = account.chance(0.3)
    amount = int(charge["amount_captured"])
    body: Body = {
        "id": account.name("du"),
        "object": "dispute",
        "amount": amount if account.chance(0.6) else max(1, amount // 2),
        "charge": charge.id,
        "created": account.now,
        "currency": "cad" if account.chance(0.1) else charge["currency"],
        "livemode": account.livemode,
        "metadata": {},
        "payment_intent": charge["payment_intent"],
        "reason": "fraudulent",
        "status": "warning_needs_response" if inquiry else "needs_response",
    }
    made = account.add("disputes", body, closed=[], closed_at=None, appealed_at=None, was_real=False)
    account.emit(made, "charge.dispute.created")
    if not inquiry:
        _take_funds(account, made, charge)


def _take_funds(account: Account, dispute: Thing, charge: Thing) -> None:
    dispute.facts["was_real"] = True
    account.change(charge, disputed=True)
    if account.chance(0.5):
        account.emit(dispute, "charge.dispute.funds_withdrawn")


DISPUTE_STEPS: Final[Mapping[str, tuple[str, ...]]] = {
    "warning_needs_response": ("warning_under_review", "warning_closed", "needs_response"),
    "warning_under_review": ("warning_closed", "needs_response"),
    "needs_response": ("under_review", "won", "lost"),
    "under_review": ("won", "lost"),
    "lost": ("appeal_under_review",),
    "appeal_under_review": ("won", "lost"),
}
CLOSING: Final = ("won", "lost", "warning_closed")


def movable_disputes(account: Account) -> list[Thing]:
    """Return the disputes that may still change their status; an appeal takes longer than a second."""
    return [
        dispute
        for dispute in account.all_of("disputes")
        if dispute["status"] in DISPUTE_STEPS
        and account.now not in {dispute.facts["closed_at"], dispute.facts["appealed_at"]}
    ]


def move_dispute(account: Account) -> None:
    """Change the status of a dispute."""
    dispute = account.rng.choice(movable_disputes(account))
    was, status = dispute["status"], account.rng.choice(DISPUTE_STEPS[dispute["status"]])
    closes = status in CLOSING
    account.change(dispute, "charge.dispute.closed" if closes else "charge.dispute.updated", status=status)
    if closes:
        dispute.facts["closed"].append(status)
        if status == "won" and account.chance(0.5):
            account.emit(dispute, "charge.dispute.funds_reinstated")
        dispute.facts["closed_at"] = account.now
    if status == "appeal_under_review":
        dispute.facts["appealed_at"] = account.now
    if was.startswith("warning") and status == "needs_response":
        _take_funds(account, dispute, account.things["charges", dispute["charge"]])


# ---- Reads ----

READABLE: Final = (
    *("payment_links", "customers", "invoices", "credit_notes", "charges", "refunds", "disputes"),
    *("invoice_payments", "portal_configurations"),
)


def readable(account: Account) -> list[Thing]:
    """Return the objects that Payfold may read at Stripe, as its audit does."""
    return [
        thing
        for table in READABLE
        for thing in account.all_of(table)
        if not (thing.facts.get("deleted") or thing.facts.get("frozen"))
        and (table != "charges" or ("charge.refunded" not in account.shape.unheard and thing.second != account.now))
        and (table != "refunds" or account.shape.hears_refunds)
    ]


def read_object(account: Account) -> None:
    """Read an object as it is now, which also makes fields known that no event has reported."""
    thing = account.rng.choice(readable(account))
    thing.reported, thing.was_read = thing.body, True
    account.observe(thing.id, f"payfold.{thing['object']}.observed", thing.body)


# ---- A life ----

Need = Callable[[Account], Any]


def _currencies_known(account: Account) -> list[Thing]:
    return [customer for customer in billing.alive(account) if customer["currency"]]


ACTIONS: Final[tuple[tuple[int, billing.Action, Need], ...]] = (
    (2, create_link, lambda _: True),
    (3, change_link, lambda account: account.all_of("payment_links")),
    (6, open_session, lambda _: True),
    (7, complete_session, payable),
    (2, expire_session, lambda account: sessions_of(account, "open")),
    (3, read_session, lambda account: account.all_of("orders")),
    (4, expire_by_clock, overdue),
    (4, clear, lambda account: waiting(account, "delayed")),
    (2, bounce, lambda account: waiting(account, "delayed")),
    (4, capture, lambda account: waiting(account, "held")),
    (2, release, lambda account: waiting(account, "held")),
    (5, refund, refundable),
    (4, move_refund, movable),
    (2, dispute, disputable),
    (4, move_dispute, movable_disputes),
    (2, lambda account: void(billing.create_customer(account)), lambda _: True),
    (3, billing.change_customer, billing.alive),
    (4, billing.adjust_balance, billing.alive),
    (1, billing.delete_customer, billing.alive),
    (3, billing.read_ledger, billing.alive),
    (4, read_object, readable),
    (4, billing.draft_invoice, _currencies_known),
    (4, billing.finalize, lambda account: billing.invoices_of(account, "draft")),
    (1, billing.delete_draft, lambda account: billing.invoices_of(account, "draft")),
    (4, billing.pay, lambda account: billing.invoices_of(account, "open", "uncollectible")),
    (
        1,
        billing.void_invoice,
        lambda account: [
            one for one in billing.invoices_of(account, "open", "uncollectible") if not one["amount_paid"]
        ],
    ),
    (1, billing.give_up, lambda account: billing.invoices_of(account, "open")),
    (
        4,
        billing.credit,
        lambda account: [one for one in billing.invoices_of(account, "open", "paid") if billing.creditable(one)],
    ),
    (2, billing.void_note, billing.voidable),
    (1, billing.write_memo, lambda account: account.all_of("credit_notes")),
    (1, billing.configure_portal, lambda _: True),
    (2, billing.change_portal, lambda account: account.all_of("portal_configurations")),
    (
        1,
        billing.open_portal,
        lambda account: account.all_of("portal_configurations") and billing.alive(account),
    ),
)


def void(_: object) -> None:
    """Ignore the result of an action."""


def live(seed: str, number: int, *, twins: float) -> Account:
    """Return an account after history *number*: a sequence of actions, some of them repeated at once."""
    account = Account(seed, number, twins=twins)
    for _ in range(account.rng.randint(3, 30)):
        possible = [chosen for chosen in ACTIONS if chosen[2](account)]
        _, action, need = account.rng.choices(possible, [weight for weight, _, _ in possible])[0]
        for _ in range(account.rng.randint(2, 6) if account.chance(0.1) else 1):
            if need(account):
                action(account)
        account.tick()
    if billing.alive(account) and account.chance(0.7):
        billing.read_ledger(account)
    return account
