"""The course of money, step by step: the lives of balances, invoices, credit notes, refunds, disputes and portals.

A life changes an account and yields between its steps; its caller decides how much time passes there. The changes of
one step happen within one second, and changes within one second are where receivers go wrong.
"""

import random
from collections.abc import Callable, Generator, Iterator
from typing import Final

from deploy.sandbox.account import Account

Life = Iterator[None]

_BURST_MIN: Final = 2
_BURST_MAX: Final = 5
_CURRENCIES: Final = ("usd", "eur", "jpy")
_LINES_MAX: Final = 14
_LEFT_MIN: Final = 10
"""A smaller amount is not taken back any more, in minor units."""


def flip(rng: random.Random, probability: float) -> bool:
    """Return true in *probability* (0 to 1) of the calls."""
    return rng.random() < probability


# Customers.


def balance(account: Account, rng: random.Random) -> Life:
    """A customer's balance moves 2 to 5 times within a second, once or twice, now and then back and forth."""
    currency = rng.choice((None, "usd", "eur"))
    customer = account.create_customer(
        email="balance@example.com", currency=currency, balance=rng.choice((0, 0, 0, -700, 300))
    )
    if flip(rng, 0.8):
        yield
    for _ in range(rng.randint(1, 2)):
        move_balance(account, rng, customer)
        yield


def move_balance(account: Account, rng: random.Random, customer: str) -> None:
    """Move a balance 2 to 5 times within one second, sometimes between two states only."""
    moves = rng.randint(_BURST_MIN, _BURST_MAX)
    if flip(rng, 0.4):
        for number in range(moves):
            account.adjust_balance(customer, 500 if number % 2 else -500)
        return
    for _ in range(moves):
        match rng.randrange(6):
            case 0:
                # A change in another currency than the customer's own has no event.
                account.adjust_balance(customer, rng.choice((-400, 250)), currency=rng.choice(_CURRENCIES))
            case 1:
                account.update_customer(customer, metadata={"tier": rng.choice(("silver", "gold"))})
            case _:
                account.adjust_balance(customer, rng.choice((-500, -500, 500, -200, 1_000)))


def deletion(account: Account, rng: random.Random) -> Life:
    """A customer is deleted, and the event of an earlier change comes only after that."""
    customer = account.create_customer(email="gone@example.com", name="Zoë Quillon")
    yield
    if flip(rng, 0.5):
        account.adjust_balance(customer, -300)
    last = account.object("customer", customer)
    happened = account.now
    if flip(rng, 0.5):
        yield
    account.delete_customer(customer)
    if flip(rng, 0.5):
        yield
    if flip(rng, 0.8):
        created = rng.choice((happened, account.now))
        account.emit("customer.updated", last | {"name": "Zoe Quillon"}, {"name": last["name"]}, created=created)


# Invoices and credit notes.


def invoice(account: Account, rng: random.Random) -> Life:
    """A customer, often with a balance, is sent an invoice, which ends in any of the possible ways."""
    currency = rng.choice(_CURRENCIES)
    customer = account.create_customer(email="invoice@example.com")
    if flip(rng, 0.6):
        account.adjust_balance(customer, rng.choice((-500, -500, -4_000, 700)), currency=currency)
    parts = [rng.choice((100, 900, 1_500)) for _ in range(rng.choice((1, 2, 12)))]
    drafted = account.create_invoice(customer, sum(parts), currency=currency, tax=rng.choice((0, 190)), lines=parts)
    if flip(rng, 0.5):
        yield
    if flip(rng, 0.05):
        account.delete_invoice(drafted)
        return
    account.finalize_invoice(drafted)
    if flip(rng, 0.5):
        yield
    if account.object("invoice", drafted)["status"] == "open":
        yield from _collect(account, rng, drafted)
    if account.object("invoice", drafted)["status"] == "paid":
        yield
        yield from notes(account, rng, drafted)


def _collect(account: Account, rng: random.Random, opened: str) -> Life:
    """Bring an open invoice to its end."""
    remaining = account.object("invoice", opened)["amount_remaining"]
    creditable = account.creditable(opened)
    end = rng.choice(("pay", "pay", "note", "voided note", "credit it all", "void", "give up", "bounce"))
    match end:
        case "note" | "voided note":
            amount = max(1, min(remaining // 3, creditable))
            note = account.issue_credit_note(opened, amount, reason="order_change")
            if flip(rng, 0.5):
                yield
            if end == "voided note":
                account.void_credit_note(note)
        case "credit it all":
            # The part that the balance had paid can go back there; the debt from before stays due.
            amount = min(creditable, rng.choice((remaining, creditable)))
            account.issue_credit_note(opened, amount, credit=max(0, amount - remaining))
            if amount >= remaining:
                return
        case "give up":
            account.mark_uncollectible(opened)
            yield
        case "bounce":
            account.fail_invoice_payment(opened)
            yield
    if end == "void" or (end == "give up" and flip(rng, 0.4)):
        account.void_invoice(opened)
    else:
        account.pay_invoice(opened)


def notes(account: Account, rng: random.Random, paid: str) -> Life:
    """One to three credit notes of a paid invoice, to all three destinations, often within one second."""
    for _ in range(rng.randint(1, 3)):
        left = account.creditable(paid)
        if left < _LEFT_MIN:
            return
        note = credit(account, rng, paid, rng.choice((left, left // 2, left // 3)))
        if flip(rng, 0.3):
            account.update_credit_note(note, memo=rng.choice(("Sorry.", "Returned.")))
        if flip(rng, 0.4):
            yield
        for part in account.object("credit_note", note)["refunds"]:
            if flip(rng, 0.3) or account.object("refund", part["refund"])["status"] == "pending":
                yield from _end_refund(account, rng, part["refund"])


def credit(account: Account, rng: random.Random, paid: str, amount: int) -> str:
    """Credit *amount* of a paid invoice, split as chance wants and the payment allows; return the note."""
    refundable = 0
    for intent in account.invoice_intents(paid):
        charge = account.charge_of(intent)
        if not any(dispute["status"] != "won" for dispute in account.disputes_of(intent)):
            refundable = charge["amount"] - charge["amount_refunded"]
    refund = min(rng.choice((0, amount, amount // 2)), refundable)
    rest = amount - refund
    to_balance = rng.choice((0, rest, rest // 2))
    lines = rng.randint(11, _LINES_MAX) if flip(rng, 0.2) and amount > _LINES_MAX else rng.randint(1, 2)
    each = amount // lines
    return account.issue_credit_note(
        paid,
        amount,
        refund=refund,
        credit=to_balance,
        out_of_band=rest - to_balance,
        lines=[amount - each * (lines - 1), *[each] * (lines - 1)],
        refund_status=rng.choice(("succeeded", "pending")),
    )


# Refunds and disputes, which take payments back.


def refunds(account: Account, rng: random.Random, session: str) -> Life:
    """One to three refunds of a paid order, often within one second, which succeed, fail late, or are canceled."""
    (intent,) = account.order_intents(session) or [""]
    made = []
    for _ in range(rng.randint(1, 3)):
        charge = account.charge_of(intent)
        left = charge["amount"] - charge["amount_refunded"]
        if left < _LEFT_MIN:
            break
        amount = rng.choice((left, left // 2, left // 4))
        made.append(account.refund(intent, amount, status=rng.choice((None, "pending", "requires_action"))))
        if flip(rng, 0.3):
            yield
    for refund in made:
        yield from _end_refund(account, rng, refund)


def _end_refund(account: Account, rng: random.Random, refund: str) -> Life:
    waits = account.object("refund", refund)["status"] != "succeeded"
    end = rng.choice(("succeed", "succeed", "succeed", "succeed", "succeed", "fail", "cancel"))
    if waits and end == "cancel":
        account.cancel_refund(refund)
        return
    if waits and (end == "succeed" or flip(rng, 0.5)):
        account.succeed_refund(refund)
        if flip(rng, 0.5):
            yield
    if end == "fail":
        # A charge that did not fall would report, in its next event, a refund that no refund explains.
        flip(rng, 0.7)  # A draw that is not needed: each seed keeps its history.
        account.fail_refund(refund)


def dispute(account: Account, rng: random.Random, session: str) -> Life:
    """An order's payment is disputed, in whole or in part, and the bank decides; or it is asked about only."""
    (intent,) = account.order_intents(session) or [""]
    amount = account.charge_of(intent)["amount"]
    inquiry = flip(rng, 0.3)
    opened = account.open_dispute(intent, rng.choice((amount, amount // 2 or amount)), inquiry=inquiry)
    if flip(rng, 0.5):
        yield
    if flip(rng, 0.6):
        account.submit_evidence(opened)
        if flip(rng, 0.5):
            yield
    account.close_dispute(opened, "warning_closed" if inquiry else rng.choice(("won", "lost")))


# Orders that one of these lives follows.


def refunded_order(account: Account, rng: random.Random) -> Life:
    """An order is paid by card or bank debit, and refunded."""
    session = yield from _sell(account, rng)
    yield from refunds(account, rng, session)


def disputed_order(account: Account, rng: random.Random) -> Life:
    """An order is paid and disputed; one that was won back may be refunded."""
    session = yield from _sell(account, rng)
    yield from dispute(account, rng, session)
    if not account.expected_disputed(session) and flip(rng, 0.5):
        yield from refunds(account, rng, session)


def invoiced_order(account: Account, rng: random.Random) -> Life:
    """An order that has an invoice is paid, and credited by notes or refunded."""
    session = yield from _sell(account, rng, invoiced=True)
    if flip(rng, 0.7):
        yield from notes(account, rng, account.session(session)["invoice"])
    else:
        yield from refunds(account, rng, session)


def subscribed_order(account: Account, rng: random.Random) -> Life:
    """A subscription is bought, renewed, and its first or second invoice credited."""
    session = account.open_session(mode="subscription", amount=rng.choice((0, 1_200, 1_200)))
    yield
    account.complete(session)
    yield
    current = account.session(session)
    renewed = account.renew(current["subscription"], 1_200)
    account.finalize_invoice(renewed)
    account.pay_invoice(renewed)
    if flip(rng, 0.6):
        yield
        yield from notes(account, rng, rng.choice((current["invoice"], renewed)))


def _sell(account: Account, rng: random.Random, *, invoiced: bool = False) -> Generator[None, None, str]:
    """Sell something, by card or bank debit, and return the session."""
    session = account.open_session(amount=rng.choice((1_000, 2_500)), invoice_creation=invoiced)
    yield
    if flip(rng, 0.7):
        account.complete(session)
    else:
        account.complete(session, payment_status="unpaid")
        if flip(rng, 0.5):
            yield
        account.async_payment_succeeded(session)
    if flip(rng, 0.7):
        yield
    return session


# The portal.


def portal(account: Account, rng: random.Random) -> Life:
    """A portal configuration changes 2 to 5 times within a second, and customers use it."""
    configuration = account.create_portal_configuration(name=rng.choice((None, "Shop")))
    yield
    for _ in range(rng.randint(1, 2)):
        configure(account, rng, configuration)
        yield
    account.update_portal_configuration(configuration, active=True)
    customer = account.create_customer(email="portal@example.com")
    flow = rng.choice((None, "payment_method_update"))
    account.create_portal_session(customer, configuration=configuration, flow=flow)


def configure(account: Account, rng: random.Random, configuration: str) -> None:
    """Change a configuration 2 to 5 times within one second, sometimes back to what it was."""
    wanted = len(account.events) + rng.randint(_BURST_MIN, _BURST_MAX)
    while len(account.events) < wanted:
        current = account.object("billing_portal.configuration", configuration)
        match rng.randrange(4):
            case 0:
                account.update_portal_configuration(configuration, active=not current["active"])
            case 1:
                account.update_portal_configuration(configuration, login_page=not current["login_page"]["enabled"])
            case 2:
                invoices = {"enabled": not current["features"]["invoice_history"]["enabled"]}
                account.update_portal_configuration(configuration, features={"invoice_history": invoices})
            case _:
                account.update_portal_configuration(configuration, name=rng.choice(("Shop", "Account", None)))


BEGINNINGS: Final[tuple[Callable[[Account, random.Random], Life], ...]] = (
    balance,
    balance,
    deletion,
    invoice,
    invoice,
    portal,
    refunded_order,
    disputed_order,
    invoiced_order,
    subscribed_order,
)
"""Lives that need nothing before them."""
