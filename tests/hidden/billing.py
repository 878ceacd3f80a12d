"""The account's actions on customers, their credit ledgers, invoices, credit notes and the billing portal."""

from collections.abc import Callable
from typing import Any, Final

from tests.hidden.account import CURRENCIES, Account, Body, Thing

Action = Callable[[Account], None]

NAMES: Final = ("Ada", "Bo", "Chris", None)


# ---- Customers and their ledgers ----


def create_customer(account: Account, *, currency: str | None = None) -> Thing:
    """Make a customer, sometimes with a balance, which sets the default currency."""
    balance = -100 * account.rng.randrange(1, 9) if currency is None and account.chance(0.2) else 0
    customer = account.add(
        "customers",
        {
            "id": account.name("cus"),
            "object": "customer",
            "balance": balance,
            "created": account.now,
            "currency": account.rng.choice(CURRENCIES) if balance else None,
            "delinquent": False,
            "email": f"buyer{account.suffix}@example.com",
            "livemode": account.livemode,
            "metadata": {},
            "name": account.rng.choice(NAMES),
            "test_clock": None,
        },
        deleted=False,
        ledger=[],
        read={},
        read_up_to=0,
        changes=[],
    )
    account.emit(customer, "customer.created")
    if balance:
        _entry(account, customer, str(customer["currency"]), balance, type="initial")
    if currency is not None:
        account.change(customer, "customer.updated", currency=currency)
    return customer


def alive(account: Account) -> list[Thing]:
    """Return the customers that were not deleted."""
    return [customer for customer in account.all_of("customers") if not customer.facts["deleted"]]


def change_customer(account: Account) -> None:
    """Rename a customer, or change its mail address, its metadata or whether it is delinquent."""
    customer = account.rng.choice(alive(account))
    fields: list[Body] = [
        {"name": account.rng.choice(NAMES)},
        {"email": account.rng.choice(("a@example.com", "b@example.com", None))},
        {"metadata": account.rng.choice(({}, {"tier": "gold"}, {"tier": "silver", "of": "shop"}))},
        {"delinquent": not customer["delinquent"]},
    ]
    chosen = account.rng.choice(fields)
    if any(customer[name] != value for name, value in chosen.items()):
        account.change(customer, "customer.updated", **chosen)


def delete_customer(account: Account) -> None:
    """Delete a customer: the event carries the last full object."""
    customer = account.rng.choice(alive(account))
    customer.facts["deleted"] = True
    account.emit(customer, "customer.deleted")


def adjust_balance(account: Account) -> None:
    """Enter an adjustment in some currency; the first sets the default one."""
    customer = account.rng.choice(alive(account))
    currency = customer["currency"] if customer["currency"] and account.chance(0.6) else account.rng.choice(CURRENCIES)
    enter(account, customer, currency, account.rng.choice((-500, 500, -250, 120, -30)), type="adjustment")


def balance_of(customer: Thing, currency: str) -> int:
    """Return the ending balance of the ledger of a currency."""
    return next(
        (entry["ending_balance"] for entry in reversed(customer.facts["ledger"]) if entry["currency"] == currency), 0
    )


def enter(account: Account, customer: Thing, currency: str, amount: int, **fields: object) -> Body:
    """Enter *amount* into the ledger; a customer event reports it in the default currency alone."""
    entry = _entry(account, customer, currency, amount, **fields)
    if customer["currency"] in {None, currency}:
        ending = entry["ending_balance"]
        account.change(customer, "customer.updated", balance=ending, currency=currency)
        customer.facts["changes"].append((currency, amount, ending, account.now))
    return entry


def _entry(account: Account, customer: Thing, currency: str, amount: int, **fields: object) -> Body:
    ending = balance_of(customer, currency) + amount
    entry: Body = {
        "id": account.name("cbtxn"),
        "object": "customer_balance_transaction",
        "amount": amount,
        "checkout_session": None,
        "created": account.now,
        "credit_note": None,
        "currency": currency,
        "customer": customer.id,
        "description": None,
        "ending_balance": ending,
        "invoice": None,
        "livemode": account.livemode,
        "metadata": {},
        **fields,
    }
    customer.facts["ledger"].append(entry)
    return entry


def read_ledger(account: Account) -> None:
    """Read the whole ledger of a customer; record only entries that were not read before."""
    customer = account.rng.choice(alive(account))
    entries, known = customer.facts["ledger"], customer.facts["read_up_to"]
    account.circled |= _comes_back(entries[known:])
    for entry in entries[known:]:
        account.observe(customer.id, "payfold.customer_balance_transaction.observed", entry)
        listed = account.add("balance_transactions", entry)
        listed.reported, listed.as_of = entry, account.now - 1
        customer.facts["read"][entry["currency"]] = entry["ending_balance"]
    customer.facts["read_up_to"] = len(entries)


def _comes_back(entries: list[Body]) -> bool:
    """Return whether the new entries of one read lead the ledger of a currency back to an earlier balance."""
    been = set()
    for entry in entries:
        been.add((entry["currency"], entry["ending_balance"] - entry["amount"]))
        if (entry["currency"], entry["ending_balance"]) in been:
            return True
    return False


# ---- Invoices ----


def create_invoice(account: Account, customer: Thing | None = None, total: int | None = None) -> Thing:
    """Draft an invoice of a customer that has a default currency."""
    chosen = customer or account.rng.choice([one for one in alive(account) if one["currency"]])
    currency = chosen["currency"] if customer or account.chance(0.8) else account.rng.choice(CURRENCIES)
    amount = account.rng.randrange(1, 40) * 100 if total is None else total
    balance = balance_of(chosen, currency)
    due = max(0, amount + balance)
    return account.add(
        "invoices", _draft(account, chosen, currency, amount, due, balance), finalized=None, deleted=False
    )


def _draft(account: Account, customer: Thing, currency: str, amount: int, due: int, balance: int) -> Body:
    return {
        "id": account.name("in"),
        "object": "invoice",
        "amount_due": due,
        "amount_overpaid": 0,
        "amount_paid": 0,
        "amount_remaining": due,
        "created": account.now,
        "currency": currency,
        "customer": customer.id,
        "ending_balance": None,
        "livemode": account.livemode,
        "metadata": {},
        "number": None,
        "parent": None,
        "post_payment_credit_notes_amount": 0,
        "pre_payment_credit_notes_amount": 0,
        "starting_balance": balance,
        "status": "draft",
        "status_transitions": {
            "finalized_at": None,
            "marked_uncollectible_at": None,
            "paid_at": None,
            "voided_at": None,
        },
        "subtotal": amount,
        "total": amount,
    }


def draft_invoice(account: Account) -> None:
    """Draft an invoice, and report it."""
    account.emit(create_invoice(account), "invoice.created")


def invoices_of(account: Account, *statuses: str) -> list[Thing]:
    """Return the invoices of a status, of customers that were not deleted."""
    living = {customer.id for customer in alive(account)}
    return [
        invoice
        for invoice in account.all_of("invoices")
        if invoice["status"] in statuses and invoice["customer"] in living and not invoice.facts["deleted"]
    ]


def customer_of(account: Account, thing: Thing) -> Thing:
    """Return the customer of an object."""
    return account.things["customers", thing["customer"]]


def delete_draft(account: Account) -> None:
    """Delete a draft."""
    invoice = account.rng.choice(invoices_of(account, "draft"))
    invoice.facts["deleted"] = True
    account.emit(invoice, "invoice.deleted")


def change_invoice(account: Account, invoice: Thing, *types: str, moment: str | None = None, **fields: object) -> None:
    """Change an invoice and report it by events of *types*, in some histories by an ``invoice.updated`` too."""
    found: Body = dict(fields)
    if moment is not None:
        found["status_transitions"] = {**invoice["status_transitions"], moment: account.now}
    updated = ("invoice.updated",) if account.shape.updates_invoices or not types else ()
    account.change(invoice, *types, *updated, **found)


def finalize(account: Account) -> None:
    """Finalize a draft: apply the balance of its currency, and mark the invoice as paid if nothing is left to pay."""
    finalize_invoice(account, account.rng.choice(invoices_of(account, "draft")))


def finalize_invoice(account: Account, invoice: Thing) -> None:
    """Finalize one draft."""
    customer, currency, total = customer_of(account, invoice), str(invoice["currency"]), int(invoice["total"])
    starting = balance_of(customer, currency)
    used = -starting if starting > 0 else min(-starting, total)
    if used:
        enter(account, customer, currency, used, type="applied_to_invoice", invoice=invoice.id)
    due = total - used
    invoice.facts["used"] = used
    amounts = {
        "amount_due": due,
        "amount_remaining": due,
        "starting_balance": starting,
        "ending_balance": starting + used,
    }
    number = f"R-{account.suffix}-{invoice.id}"
    types = ("invoice.finalized", "invoice.sent") if account.chance(0.3) else ("invoice.finalized",)
    change_invoice(account, invoice, *types, moment="finalized_at", status="open", number=number, **amounts)
    if due == 0:
        settle(account, invoice)


def settle(account: Account, invoice: Thing, **fields: object) -> None:
    """Mark an invoice as paid."""
    types = ("invoice.paid", "invoice.payment_succeeded")
    change_invoice(account, invoice, *types, moment="paid_at", status="paid", **fields)


def pay(account: Account) -> None:
    """Pay an invoice, whole, or in two parts by two payments."""
    invoice = account.rng.choice(invoices_of(account, "open", "uncollectible"))
    rest = int(invoice["amount_remaining"])
    part = rest // 2 if account.chance(0.25) and rest > 1 and invoice["status"] == "open" else rest
    pay_part(account, invoice, part)


def pay_part(account: Account, invoice: Thing, amount: int) -> Thing:
    """Pay *amount* of an invoice by a charge of its own, and return the charge."""
    charge = add_charge(account, account.name("pi"), amount, str(invoice["currency"]))
    record_payment(account, invoice, charge, amount)
    return charge


def record_payment(account: Account, invoice: Thing, charge: Thing, amount: int) -> None:
    """Record that a charge paid *amount* of an invoice."""
    payment: Body = {
        "id": account.name("inpay"),
        "object": "invoice_payment",
        "amount_paid": amount,
        "amount_requested": amount,
        "created": account.now,
        "currency": invoice["currency"],
        "invoice": invoice.id,
        "is_default": True,
        "livemode": account.livemode,
        "payment": {"type": "payment_intent", "payment_intent": charge["payment_intent"]},
        "status": "paid",
        "status_transitions": {"canceled_at": None, "paid_at": account.now},
    }
    account.emit(account.add("invoice_payments", payment), "invoice_payment.paid")
    rest = int(invoice["amount_remaining"]) - amount
    amounts: Body = {"amount_paid": int(invoice["amount_paid"]) + amount, "amount_remaining": rest}
    if rest:
        change_invoice(account, invoice, **amounts)
    else:
        settle(account, invoice, **amounts)


def add_charge(account: Account, intent: str, amount: int, currency: str, **fields: object) -> Thing:
    """Make a charge that succeeded and was captured unless *fields* differ, and report it."""
    body: Body = {
        "id": account.name("ch"),
        "object": "charge",
        "amount": amount,
        "amount_captured": amount,
        "amount_refunded": 0,
        "captured": True,
        "created": account.now,
        "currency": currency,
        "customer": None,
        "disputed": False,
        "livemode": account.livemode,
        "metadata": {},
        "paid": True,
        "payment_intent": intent,
        "refunded": False,
        "status": "succeeded",
        **fields,
    }
    taken = body["status"] == "succeeded" and body["captured"]
    charge = account.add("charges", body, captured_at=account.now if taken else None, released_at=None, frozen=False)
    account.emit(charge, f"charge.{body['status']}")
    return charge


def void_invoice(account: Account) -> None:
    """Void an invoice and return the applied balance to the customer."""
    invoices = [one for one in invoices_of(account, "open", "uncollectible") if not one["amount_paid"]]
    invoice = account.rng.choice(invoices)
    used = invoice.facts["used"]
    change_invoice(account, invoice, "invoice.voided", moment="voided_at", status="void")
    if used:
        customer, currency = customer_of(account, invoice), str(invoice["currency"])
        enter(account, customer, currency, -used, type="unapplied_from_invoice", invoice=invoice.id)


def give_up(account: Account) -> None:
    """Mark an invoice as uncollectible."""
    invoice = account.rng.choice(invoices_of(account, "open"))
    types = ("invoice.marked_uncollectible",)
    change_invoice(account, invoice, *types, moment="marked_uncollectible_at", status="uncollectible")


# ---- Credit notes ----


def credit(account: Account) -> None:
    """Issue a credit note about an invoice that is open (before the payment) or paid (after it)."""
    invoice = account.rng.choice([one for one in invoices_of(account, "open", "paid") if creditable(one)])
    if invoice["status"] == "open":
        _credit_before(account, invoice, account.rng.randint(1, creditable(invoice)))
    else:
        _credit_after(account, invoice, account.rng.randint(1, creditable(invoice)))


def creditable(invoice: Thing) -> int:
    """Return the amount of an invoice that may still be credited: before payment if it is open, after it if paid."""
    credited = int(invoice["pre_payment_credit_notes_amount"]) + int(invoice["post_payment_credit_notes_amount"])
    rest = int(invoice["total"]) - credited
    return min(rest, int(invoice["amount_remaining"])) if invoice["status"] == "open" else rest


def _note(account: Account, invoice: Thing, amount: int, **fields: object) -> Thing:
    line: Body = {
        "id": account.name("cnli"),
        "object": "credit_note_line_item",
        "amount": amount,
        "description": "Credited",
        "discount_amount": 0,
        "quantity": None,
        "type": "custom_line_item",
    }
    body: Body = {
        "id": account.name("cn"),
        "object": "credit_note",
        "amount": amount,
        "created": account.now,
        "currency": invoice["currency"],
        "customer": invoice["customer"],
        "customer_balance_transaction": None,
        "effective_at": account.now,
        "invoice": invoice.id,
        "lines": {"object": "list", "data": [line], "has_more": False},
        "livemode": account.livemode,
        "memo": None,
        "metadata": {},
        "number": f"CN-{account.name('n')}",
        "out_of_band_amount": None,
        "post_payment_amount": 0,
        "pre_payment_amount": 0,
        "reason": account.rng.choice(("duplicate", "order_change", None)),
        "refunds": [],
        "status": "issued",
        "total": amount,
        "type": "pre_payment",
        "voided_at": None,
        **fields,
    }
    return account.add("credit_notes", body, refunded=0, to_balance=0)


def _credit_before(account: Account, invoice: Thing, amount: int) -> None:
    account.emit(_note(account, invoice, amount, pre_payment_amount=amount), "credit_note.created")
    rest = int(invoice["amount_remaining"]) - amount
    amounts: Body = {
        "pre_payment_credit_notes_amount": int(invoice["pre_payment_credit_notes_amount"]) + amount,
        "amount_due": int(invoice["amount_due"]) - amount,
        "amount_remaining": rest,
    }
    if rest:
        change_invoice(account, invoice, **amounts)
    else:
        settle(account, invoice, **amounts)


def _credit_after(account: Account, invoice: Thing, amount: int) -> None:
    """Credit a paid invoice: refund as much as its charges allow, the rest to the balance or outside of Stripe."""
    customer, currency = customer_of(account, invoice), str(invoice["currency"])
    note = _note(account, invoice, amount, post_payment_amount=amount, type="post_payment")
    refunds = _refunds_for(account, invoice, account.rng.choice((0, amount, amount // 2)))
    refunded = sum(int(refund["amount_refunded"]) for refund in refunds)
    rest = amount - refunded
    outside = account.rng.choice((0, rest, rest // 3))
    fields: Body = {"refunds": refunds, "out_of_band_amount": outside or None}
    if rest - outside:
        entry = enter(
            account, customer, currency, outside - rest, type="credit_note", credit_note=note.id, invoice=invoice.id
        )
        fields["customer_balance_transaction"] = entry["id"]
    note.body.update(fields)
    note.facts.update(refunded=refunded, to_balance=rest - outside)
    account.emit(note, "credit_note.created")
    change_invoice(
        account, invoice, post_payment_credit_notes_amount=int(invoice["post_payment_credit_notes_amount"]) + amount
    )


def _refunds_for(account: Account, invoice: Thing, wanted: int) -> list[Body]:
    made = []
    for charge in charges_of_invoice(account, invoice.id):
        amount = min(wanted, refundable(account, charge))
        if amount > 0:
            refund = add_refund(account, charge, amount)
            made.append(
                {"amount_refunded": amount, "payment_record_refund": None, "refund": refund.id, "type": "refund"}
            )
            wanted -= amount
    return made


def charges_of_invoice(account: Account, invoice: str) -> list[Thing]:
    """Return the charges that paid an invoice."""
    intents = {
        payment["payment"]["payment_intent"]
        for payment in account.all_of("invoice_payments")
        if payment["invoice"] == invoice
    }
    return [charge for charge in account.all_of("charges") if charge["payment_intent"] in intents]


def void_note(account: Account) -> None:
    """Void a credit note of an open invoice; the amount due of the invoice rises again."""
    note = account.rng.choice(voidable(account))
    invoice, amount = account.things["invoices", note["invoice"]], int(note["amount"])
    types, before = ("credit_note.voided",), account.shape.names_before
    account.change(note, *types, before=before, status="void", voided_at=account.now)
    change_invoice(
        account,
        invoice,
        pre_payment_credit_notes_amount=int(invoice["pre_payment_credit_notes_amount"]) - amount,
        amount_due=int(invoice["amount_due"]) + amount,
        amount_remaining=int(invoice["amount_remaining"]) + amount,
    )


def voidable(account: Account) -> list[Thing]:
    """Return the notes that may be voided."""
    invoices = {invoice.id for invoice in invoices_of(account, "open")}
    return [
        note for note in account.all_of("credit_notes") if note["status"] == "issued" and note["invoice"] in invoices
    ]


def write_memo(account: Account) -> None:
    """Change the memo of a credit note."""
    note = account.rng.choice(account.all_of("credit_notes"))
    memo = account.rng.choice(("First", "Second"))
    if note["memo"] != memo:
        account.change(note, "credit_note.updated", memo=memo)


# ---- Refunds ----


def refundable(account: Account, charge: Thing) -> int:
    """Return the amount of a charge that may be refunded; see Note [What the account does not do]."""
    if charge.facts["frozen"] or not charge["captured"] or charge["status"] != "succeeded":
        return 0
    return _rest(account, charge)


def _rest(account: Account, charge: Thing) -> int:
    back = sum(int(refund["amount"]) for refund in account.all_of("refunds") if refund["charge"] == charge.id)
    return int(charge["amount_captured"]) - back


def add_refund(account: Account, charge: Thing, amount: int) -> Thing:
    """Refund *amount* of a charge; the charge's own total rises at once."""
    body: Body = {
        "id": account.name("re"),
        "object": "refund",
        "amount": amount,
        "charge": charge.id,
        "created": account.now,
        "currency": charge["currency"],
        "metadata": {},
        "payment_intent": charge["payment_intent"],
        "reason": account.rng.choice(("requested_by_customer", "duplicate", None)),
        "status": account.rng.choice(("succeeded", "succeeded", "pending")),
    }
    refund = account.add("refunds", body, failed_at=None)
    account.emit(refund, "refund.created")
    total = int(charge["amount_refunded"]) + amount
    whole = _rest(account, charge) == 0
    account.change(charge, "charge.refunded", before=True, amount_refunded=total, refunded=whole)
    return refund


# ---- The portal ----


def configure_portal(account: Account) -> None:
    """Make a configuration of the portal."""
    made = account.add(
        "portal_configurations",
        {
            "id": account.name("bpc"),
            "object": "billing_portal.configuration",
            "active": True,
            "created": account.now,
            "features": {"invoice_history": {"enabled": True}, "customer_update": {"enabled": False}},
            "is_default": False,
            "livemode": account.livemode,
            "login_page": {"enabled": False, "url": None},
            "metadata": {},
            "name": "First",
            "updated": account.now,
        },
    )
    account.emit(made, "billing_portal.configuration.created")


def change_portal(account: Account) -> None:
    """Change a configuration; ``updated`` is the time of the change."""
    made = account.rng.choice(account.all_of("portal_configurations"))
    history = {"enabled": account.chance(0.5)}
    choices: list[dict[str, Any]] = [
        {"active": not made["active"]},
        {"name": account.rng.choice(("First", "Second", "Third"))},
        {"features": {**made["features"], "invoice_history": history}},
        {"login_page": {"enabled": True, "url": f"https://billing.example.com/{made.id}"}},
    ]
    chosen = account.rng.choice(choices)
    if any(made[name] != value for name, value in chosen.items()):
        account.change(made, "billing_portal.configuration.updated", updated=account.now, **chosen)


def open_portal(account: Account) -> None:
    """Make a session of the portal."""
    made = account.add(
        "portal_sessions",
        {
            "id": account.name("bps"),
            "object": "billing_portal.session",
            "configuration": account.rng.choice(account.all_of("portal_configurations")).id,
            "created": account.now,
            "customer": account.rng.choice(alive(account)).id,
            "flow": account.rng.choice((None, {"type": "subscription_cancel"})),
            "livemode": account.livemode,
            "locale": None,
            "return_url": "https://shop.example.com/account",
            "url": "https://billing.example.com/session",
        },
    )
    account.emit(made, "billing_portal.session.created")
