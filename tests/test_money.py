"""The money behind an order: history in, table out, in any order of arrival."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from deploy.sandbox.account import Account
from deploy.sandbox.rendering import render, twin
from schemas import database, observations
from schemas.own_events import PORTAL_SESSION_CLOCK_EXPIRED
from tests import busy, ledger
from worker.folding import portal_clock
from worker.proof.rebuild import refolded

VERSIONS = ("2024-06-20", "2025-03-31.basil", "2025-09-30.clover", "2026-03-25.dahlia")
ARRIVALS = 4


@pytest.fixture
def account() -> Account:
    """Return a shop's account that emits events of its sessions' payments too."""
    return Account(seed=51, payments=True)


def show(engine: Engine, account: Account, table: str, *, order_by: str = "id") -> list[dict[str, Any]]:
    """Return the rows of *table* after the events of *account*, which are the same in any order of arrival."""
    bodies = [event.body for event in account.events]
    chance = random.Random(5)
    shown = []
    for arrival in range(ARRIVALS):
        ledger.clear(engine)
        if arrival % 2:
            ledger.take_in(engine, *bodies)
        else:
            ledger.record(engine, [ledger.delivery(body) for body in bodies])
            ledger.fold(engine, limit=chance.randint(1, 9))
        shown.append(ledger.rows(engine, f"SELECT * FROM {table} ORDER BY {order_by}"))  # noqa: S608 - a test's own words
        chance.shuffle(bodies)
    assert all(rows == shown[0] for rows in shown)
    assert ledger.rows(engine, "SELECT id, reason FROM events WHERE state = 'parked'") == []
    return shown[0]


def listed(engine: Engine, account: Account, customer: str) -> None:
    """Record the ledger of *customer*, with an observation of each transaction."""
    found = [
        observations.observe(
            "payfold.customer_balance_transaction.observed",
            transaction,
            account="",
            livemode=False,
            created=account.now + 1,
            now=ledger.NOW,
        )
        for transaction in account.balance_transactions(customer)
    ]
    random.Random(6).shuffle(found)
    ledger.record(engine, found)
    ledger.fold(engine)


def part(row: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """Return the columns *names* of *row*."""
    return tuple(row[name] for name in names)


# Customers and their balances.


def test_a_customer(engine: Engine, account: Account) -> None:
    """A customer's row holds the values of its last event."""
    customer = account.create_customer(email="first@example.com", name="First")
    account.update_customer(customer, email="second@example.com")

    (row,) = show(engine, account, "customers")

    assert part(row, "id", "email", "name", "deleted") == (customer, "second@example.com", "First", False)


def test_a_deleted_customer_stays_deleted(engine: Engine, account: Account) -> None:
    """A late update of a deleted customer does not bring it back."""
    customer = account.create_customer(email="gone@example.com")
    account.update_customer(customer, name="Late")
    account.delete_customer(customer)

    (row,) = show(engine, account, "customers")

    assert part(row, "deleted", "name") == (True, "Late")


def test_a_subscription_is_no_customer(engine: Engine, account: Account) -> None:
    """An event whose type begins with customer. need not be a customer's: type and object decide exactly."""
    account.emit("customer.subscription.created", {"id": "sub_1", "object": "subscription"})

    ledger.take_in(engine, *(event.body for event in account.events))

    assert ledger.rows(engine, "SELECT id FROM customers") == []
    assert ledger.rows(engine, "SELECT state FROM events") == [{"state": "ignored"}]


def test_a_balance_is_the_customers_last(engine: Engine, account: Account) -> None:
    """Credit is negative; each real change is a row with its amount and its ending balance."""
    customer = account.create_customer(currency="usd")
    for amount in (-500, 200, -100):
        account.advance(60)
        account.adjust_balance(customer, amount)

    (balance,) = show(engine, account, "balances", order_by="customer")

    assert part(balance, "customer", "currency", "amount") == (customer, "usd", -400)
    changes = ledger.rows(engine, "SELECT amount, ending_balance FROM balance_changes ORDER BY as_of")
    assert [part(row, "amount", "ending_balance") for row in changes] == [(-500, -500), (200, -300), (-100, -400)]


@pytest.mark.parametrize("amounts", [(-500, 500, -500), (-500, 500), (-1, -1, -1, -1, -1), (100, -300, 200)])
def test_no_change_within_a_second_is_lost(engine: Engine, account: Account, amounts: tuple[int, ...]) -> None:
    """Repeated changes and circles within one second end where they ended, and none of them is dropped."""
    customer = account.create_customer(currency="usd")
    account.advance(1)
    for amount in amounts:
        account.adjust_balance(customer, amount)

    (balance,) = show(engine, account, "balances", order_by="customer")

    assert balance["amount"] == sum(amounts)
    changes = ledger.rows(engine, "SELECT amount FROM balance_changes")
    assert sorted(row["amount"] for row in changes) == sorted(amounts)


def test_the_first_change_of_a_balance_is_the_first(engine: Engine, account: Account) -> None:
    """The change that gives a customer its currency comes before the one that, in the same second, undoes it."""
    for _ in range(8):
        customer = account.create_customer()
        account.advance(60)
        account.adjust_balance(customer, -500, currency="usd")
        account.adjust_balance(customer, 500)

    balances = show(engine, account, "balances", order_by="customer")

    assert [row["amount"] for row in balances] == [0] * 8
    assert ledger.anomalies(engine) == []


def test_a_twin_of_a_change_is_no_second_change(engine: Engine, account: Account) -> None:
    """One change that is reported under two ids is one row and one change in the feed."""
    customer = account.create_customer(currency="usd")
    account.advance(1)
    account.adjust_balance(customer, -500)
    bodies = [event.body for event in account.events] + [twin(account.events[-1], seed=1).body]

    for order in (bodies, bodies[::-1]):
        ledger.clear(engine)
        ledger.take_in(engine, *order)
        assert ledger.rows(engine, "SELECT amount FROM balance_changes") == [{"amount": -500}]
        assert ledger.rows(engine, "SELECT amount FROM balances") == [{"amount": -500}]
        assert ledger.kinds(engine, customer) == ["balance.changed"]


def test_every_currency_has_its_own_balance(engine: Engine, account: Account) -> None:
    """The customer's events have one currency; the ledger has the others, and its chain is whole."""
    customer = account.create_customer(currency="usd")
    account.adjust_balance(customer, -500)
    for amount in (-700, 300):
        account.adjust_balance(customer, amount, currency="eur")
    ledger.take_in(engine, *(event.body for event in account.events))
    listed(engine, account, customer)

    found = ledger.rows(engine, "SELECT currency, amount FROM balances ORDER BY currency")

    assert [part(row, "currency", "amount") for row in found] == [("eur", -400), ("usd", -500)]
    assert ledger.anomalies(engine) == []
    assert len(ledger.rows(engine, "SELECT id FROM balance_transactions")) == 3


def test_a_missing_transaction_is_an_anomaly(engine: Engine, account: Account) -> None:
    """A gap in the ledger is an anomaly with the exact difference; no row is invented; the missing row resolves it."""
    customer = account.create_customer(currency="usd")
    account.adjust_balance(customer, -100, currency="eur")
    account.advance(60)
    missing = account.adjust_balance(customer, -30, currency="eur")
    account.advance(60)
    account.adjust_balance(customer, -5, currency="eur")
    listed(engine, account, customer)
    found = ledger.rows(engine, "SELECT seq FROM inbox WHERE object_id = :id", id=missing)
    assert ledger.anomalies(engine) == []

    ledger.clear(engine)
    transactions = [row for row in account.balance_transactions(customer) if row["id"] != missing]
    for transaction in transactions:
        word = observations.observe(
            "payfold.customer_balance_transaction.observed",
            transaction,
            account="",
            livemode=False,
            created=account.now + 1,
            now=ledger.NOW,
        )
        ledger.record(engine, [word])
        ledger.fold(engine)

    assert len(found) == 1
    (anomaly,) = ledger.rows(engine, "SELECT kind, detail FROM anomalies WHERE resolved_at IS NULL")
    assert anomaly == {
        "kind": "broken_chain",
        "detail": {"expected": -100, "found": -130, "difference": -30},
    }
    assert len(ledger.rows(engine, "SELECT id FROM balance_transactions")) == 2
    listed(engine, account, customer)
    assert ledger.anomalies(engine) == []


def test_a_transaction_that_is_ignored(engine: Engine, account: Account) -> None:
    """A balance that only an word transaction reported is gone, as if the transaction had never come."""
    customer = account.create_customer(currency="usd")
    account.adjust_balance(customer, -300, currency="eur")
    ledger.take_in(engine, *(event.body for event in account.events))
    listed(engine, account, customer)
    held = ledger.rows(engine, "SELECT currency FROM balances WHERE currency = 'eur'")
    (recorded,) = ledger.rows(engine, "SELECT id FROM inbox WHERE object_type = 'customer_balance_transaction'")
    about = {"object": "event", "id": recorded["id"], "reason": "a test"}
    at = int(ledger.NOW.timestamp())
    word = observations.observe("payfold.event.ignored", about, account="", livemode=False, created=at, now=ledger.NOW)

    ledger.record(engine, [word])
    ledger.fold(engine)

    assert held == [{"currency": "eur"}]
    assert ledger.rows(engine, "SELECT currency FROM balances WHERE currency = 'eur'") == []
    assert ledger.rows(engine, "SELECT id FROM balance_transactions") == []


def test_customer_and_ledger_differ_on_a_balance(engine: Engine, account: Account) -> None:
    """Where the ledger, read later, ends at another balance than the customer's, the customer's stays and is noted."""
    customer = account.create_customer(currency="usd")
    account.adjust_balance(customer, -500)
    (transaction,) = account.balance_transactions(customer)
    ledger.take_in(engine, *(event.body for event in account.events))
    observation = observations.observe(
        "payfold.customer_balance_transaction.observed",
        {**transaction, "amount": -400, "ending_balance": -400},
        account="",
        livemode=False,
        created=account.now + 60,
        now=ledger.NOW,
    )
    ledger.record(engine, [observation])
    ledger.fold(engine)

    assert ledger.rows(engine, "SELECT amount FROM balances") == [{"amount": -500}]
    assert ledger.anomalies(engine) == ["balance_differs"]


SECOND = (
    busy.customer("evt_0", 0, 0),
    busy.customer("evt_1", 9, -500, {"balance": 0}),
    busy.customer("evt_2", 9, 0, {"balance": -500}),
    busy.customer("evt_3", 9, -500, {"balance": 0}),
)
"""Events of a balance that goes down, up and down again within a second."""


def test_the_ledger_makes_no_balance_worse(engine: Engine) -> None:
    """A busy second is ambiguous until the ledger is read and right afterwards, in any arrival and in a rebuild."""
    read = [
        busy.transaction(f"cbtxn_{n}", *each, 9, read_at=9)
        for n, each in enumerate(((-500, -500), (500, 0), (-500, -500)))
    ]
    ledger.take_in(engine, *SECOND)
    assert ledger.rows(engine, "SELECT amount FROM balances") == [{"amount": -500}]
    assert ledger.anomalies(engine) == ["ambiguous_order"]

    chance = random.Random(7)
    for arrival in range(8):
        bodies = [*SECOND, *read]
        if arrival:
            ledger.clear(engine)
            chance.shuffle(bodies)
        ledger.take_in(engine, *bodies)
        assert ledger.rows(engine, "SELECT amount FROM balances") == [{"amount": -500}]
        changes = ledger.rows(engine, "SELECT amount FROM balance_changes ORDER BY id")
        assert [row["amount"] for row in changes] == [-500, 500, -500]
        assert ledger.anomalies(engine) == []
    with refolded(engine, seed=8) as made:
        assert ledger.digest_of(engine, made.schema) == ledger.digest_of(engine)


@pytest.mark.parametrize(("before", "amount", "changes"), [(-500, -500, 3), (0, 0, 2)])
def test_an_event_of_another_currency_ends_an_ambiguity(engine: Engine, before: int, amount: int, changes: int) -> None:
    """The event that changes the default currency decides the last balance in the old currency."""
    switch = busy.customer("evt_4", 20, 300, {"balance": before, "currency": "usd"}, currency="eur")
    bodies = [*SECOND, switch]
    random_order = random.Random(9)

    for _ in range(4):
        ledger.clear(engine)
        ledger.take_in(engine, *bodies)
        found = ledger.rows(engine, "SELECT currency, amount FROM balances ORDER BY currency")
        assert [part(row, "currency", "amount") for row in found] == [("eur", 300), ("usd", amount)]
        assert len(ledger.rows(engine, "SELECT id FROM balance_changes")) == changes
        assert ledger.anomalies(engine) == []
        random_order.shuffle(bodies)


def test_a_later_event_resolves_an_ambiguous_second(engine: Engine) -> None:
    """A later event of a link decides which step of an ambiguous second was a twin."""
    account = Account(seed=3)
    link = account.create_payment_link()
    account.advance(9)
    account.update_payment_link(link, active=False)
    off = account.events[-1]
    account.update_payment_link(link, active=True)
    account.advance(9)
    account.update_payment_link(link, metadata={"step": "1"})
    *early, later = [event.body for event in account.events]

    ledger.take_in(engine, *early, twin(off, seed=1).body)
    in_doubt = ledger.anomalies(engine)
    ledger.take_in(engine, later)

    assert in_doubt == ["ambiguous_order"]
    assert ledger.anomalies(engine) == []
    assert ledger.rows(engine, "SELECT active FROM payment_links") == [{"active": True}]


# Invoices.


def test_an_invoice_is_paid(engine: Engine, account: Account) -> None:
    """An invoice that is created, finalised and paid within a second is paid, with its amounts and its payment."""
    customer = account.create_customer(currency="usd")
    invoice = account.create_invoice(customer, 2_000)
    account.finalize_invoice(invoice)
    account.pay_invoice(invoice)

    (row,) = show(engine, account, "invoices")

    assert part(row, "id", "status", "total", "amount_paid", "amount_remaining") == (invoice, "paid", 2_000, 2_000, 0)
    assert row["paid_at"] is not None
    (payment,) = ledger.rows(engine, "SELECT * FROM invoice_payments")
    assert part(payment, "invoice", "status", "amount_paid") == (invoice, "paid", 2_000)
    assert payment["payment_intent"] in account.invoice_intents(invoice)


def test_a_paid_invoice_does_not_reopen(engine: Engine, account: Account) -> None:
    """An invoice marked uncollectible and then paid stays paid, also if the mark arrives late."""
    customer = account.create_customer(currency="usd")
    invoice = account.create_invoice(customer, 900)
    account.finalize_invoice(invoice)
    account.mark_uncollectible(invoice)
    account.pay_invoice(invoice)

    (row,) = show(engine, account, "invoices")

    assert part(row, "status", "voided_at") == ("paid", None)
    assert ledger.anomalies(engine) == []


def test_credit_is_used_by_an_invoice_and_returned_by_its_void(engine: Engine, account: Account) -> None:
    """An invoice uses the customer's credit, and voiding it returns the credit."""
    customer = account.create_customer(currency="usd")
    account.adjust_balance(customer, -300)
    invoice = account.create_invoice(customer, 1_000)
    account.finalize_invoice(invoice)
    account.advance(5)
    account.void_invoice(invoice)

    (row,) = show(engine, account, "invoices")

    assert part(row, "status", "amount_due", "starting_balance", "ending_balance") == ("void", 700, -300, 0)
    assert ledger.rows(engine, "SELECT amount FROM balances") == [{"amount": -300}]


def test_a_preview_is_no_invoice(engine: Engine, account: Account) -> None:
    """invoice.upcoming is about an invoice that does not exist: it is ignored, with the reason."""
    account.emit("invoice.upcoming", {"id": "upcoming_in_1", "object": "invoice", "status": "draft"})

    ledger.take_in(engine, account.events[-1].body)

    assert ledger.rows(engine, "SELECT state, reason FROM events") == [
        {"state": "ignored", "reason": "no fold wants the type invoice.upcoming"}
    ]


# Credit notes.


def paid_invoice(account: Account, amount: int = 2_000) -> str:
    """Return a paid invoice of a new customer."""
    invoice = account.create_invoice(account.create_customer(currency="usd"), amount)
    account.finalize_invoice(invoice)
    account.pay_invoice(invoice)
    return invoice


@pytest.mark.parametrize(
    ("split", "shown"),
    [
        ({"refund": 600}, (600, 0, 0)),
        ({"credit": 600}, (0, 0, 600)),
        ({"out_of_band": 600}, (0, 600, 0)),
        ({"refund": 300, "credit": 200, "out_of_band": 100}, (300, 100, 200)),
    ],
)
def test_the_split_of_a_credit_note(
    engine: Engine, account: Account, split: dict[str, Any], shown: tuple[int, int, int]
) -> None:
    """A note after the payment is split into refunds, out-of-band money and, for the rest, the balance."""
    note = account.issue_credit_note(paid_invoice(account), 600, **split)

    (row,) = show(engine, account, "credit_notes")

    assert part(row, "id", "status", "amount", "pre_payment_amount", "post_payment_amount") == (
        note,
        "issued",
        600,
        0,
        600,
    )
    refunded, out_of_band, to_balance = shown
    assert part(row, "refunded_amount", "to_balance_amount") == (refunded, to_balance)
    assert (row["out_of_band_amount"] or 0) == out_of_band
    assert ledger.anomalies(engine) == []


def test_a_note_before_the_payment(engine: Engine, account: Account) -> None:
    """A note on an open invoice lowers the amount due and has no other effect."""
    invoice = account.create_invoice(account.create_customer(currency="usd"), 2_000)
    account.finalize_invoice(invoice)
    account.advance(5)
    account.issue_credit_note(invoice, 500)

    (row,) = show(engine, account, "credit_notes")

    assert part(row, "pre_payment_amount", "post_payment_amount", "to_balance_amount") == (500, 0, 0)
    assert ledger.rows(engine, "SELECT amount_due, amount_remaining FROM invoices")[0]["amount_remaining"] == 1_500


def test_a_void_note_stays_void(engine: Engine, account: Account) -> None:
    """An update that arrives after the void does not issue the note again, and its own fields are kept."""
    invoice = account.create_invoice(account.create_customer(currency="usd"), 2_000)
    account.finalize_invoice(invoice)
    note = account.issue_credit_note(invoice, 500)
    account.update_credit_note(note, memo="as agreed")
    account.void_credit_note(note)

    (row,) = show(engine, account, "credit_notes")

    assert part(row, "status", "memo") == ("void", "as agreed")
    assert row["voided_at"] is not None
    assert "credit_note.voided" in ledger.kinds(engine, note)


def test_a_first_page_of_lines(engine: Engine, account: Account) -> None:
    """A first page of lines is kept, and the note's lines are marked incomplete."""
    account.issue_credit_note(paid_invoice(account, 6_000), 1_200, credit=1_200, lines=[100] * 12)

    (row,) = show(engine, account, "credit_notes")

    assert row["lines_complete"] is False
    lines = ledger.rows(engine, "SELECT credit_note, amount FROM credit_note_lines")
    assert lines == [{"credit_note": row["id"], "amount": 100}] * 10


def test_a_note_with_all_of_its_lines(engine: Engine, account: Account) -> None:
    """A page without more pages makes the note's lines complete."""
    account.issue_credit_note(paid_invoice(account), 300, credit=300, lines=[100, 200])

    (row,) = show(engine, account, "credit_notes")

    assert row["lines_complete"] is True


def test_a_split_that_does_not_add_up(engine: Engine, account: Account) -> None:
    """A note whose parts do not add up is an anomaly, and its unknown part is null, not a guess."""
    note = account.issue_credit_note(paid_invoice(account), 600, refund=600)
    wrong = {**account.object("credit_note", note), "refunds": [{"amount_refunded": 100, "refund": "re_1"}]}
    event = account.emit("credit_note.updated", wrong, created=account.now + 5)

    ledger.take_in(engine, event.body)

    (row,) = ledger.rows(engine, "SELECT refunded_amount, to_balance_amount FROM credit_notes")
    assert part(row, "refunded_amount", "to_balance_amount") == (100, None)
    assert ledger.anomalies(engine) == ["credit_note_split"]


@pytest.mark.parametrize("split", [{"refund": 600}, {"credit": 600}])
def test_the_old_shape_of_a_note(engine: Engine, account: Account, split: dict[str, Any]) -> None:
    """Before basil a note has its type and one refund's id: where these suffice, the row is the same as today's."""
    account.issue_credit_note(paid_invoice(account), 600, **split)
    (event,) = [event for event in account.events if event.type == "credit_note.created"]
    rows = []
    for version in (event.api_version, "2024-06-20"):
        ledger.clear(engine)
        ledger.take_in(engine, render(event, version).body)
        (row,) = ledger.rows(engine, "SELECT * FROM credit_notes")
        rows.append(row)

    refund = rows[1].pop("refund")
    assert (refund is not None, rows[0].pop("refund")) == ("refund" in split, None)
    assert rows[0] == rows[1]
    assert ledger.anomalies(engine) == []


def test_an_old_note_without_its_split_is_null(engine: Engine, account: Account) -> None:
    """A note from before basil that was partly refunded and partly credited does not report either amount."""
    account.issue_credit_note(paid_invoice(account), 600, refund=400, credit=200)
    (event,) = [event for event in account.events if event.type == "credit_note.created"]

    ledger.take_in(engine, render(event, "2024-06-20").body)

    (row,) = ledger.rows(engine, "SELECT * FROM credit_notes")
    assert part(row, "post_payment_amount", "refunded_amount", "to_balance_amount") == (600, None, None)
    assert ledger.anomalies(engine) == []


def test_the_balance_transaction_completes_a_note(engine: Engine, account: Account) -> None:
    """A transaction completes the note's split, whichever comes first; alone it makes no note."""
    invoice = paid_invoice(account)
    note = account.issue_credit_note(invoice, 600, refund=400, credit=200)
    (event,) = [event for event in account.events if event.type == "credit_note.created"]
    created = ledger.delivery(render(event, "2024-06-20").body)
    customer = account.object("invoice", invoice)["customer"]
    split = "SELECT refunded_amount, to_balance_amount FROM credit_notes"

    listed(engine, account, customer)
    assert ledger.rows(engine, split) == []
    ledger.record(engine, [created])
    ledger.fold(engine)
    before = ledger.rows(engine, split)
    ledger.clear(engine)
    ledger.record(engine, [created])
    ledger.fold(engine)
    listed(engine, account, customer)

    assert before == ledger.rows(engine, split) == [{"refunded_amount": 400, "to_balance_amount": 200}]
    assert ledger.rows(engine, "SELECT event_id FROM credit_notes WHERE id = :id", id=note) == [{"event_id": event.id}]
    assert ledger.anomalies(engine) == []


# Refunds, charges, disputes.


def paid_order(account: Account, **options: Any) -> tuple[str, str]:  # noqa: ANN401 - the session's own
    """Return a paid session and its payment intent."""
    session = account.open_session(**options)
    account.complete(session)
    intents = account.order_intents(session)
    assert intents
    return session, intents[0]


def book(engine: Engine, order: str) -> tuple[Any, ...]:
    """Return the order book's columns about *order*'s money."""
    (row,) = ledger.rows(engine, "SELECT * FROM order_book WHERE id = :id", id=order)
    return part(row, "refund_status", "refunded_amount", "disputed_amount")


@pytest.mark.parametrize("kind", ["invoice", "credit_note", "refund", "charge"])
def test_a_status_that_stripe_has_yet_to_invent(engine: Engine, account: Account, kind: str) -> None:
    """An unknown status is stored as it is, and is an anomaly until a known one follows."""
    _, intent = paid_order(account, amount=2_000)
    made = {
        "invoice": lambda: account.create_invoice(account.create_customer(), 500),
        "credit_note": lambda: account.issue_credit_note(paid_invoice(account), 600, refund=600),
        "refund": lambda: account.refund(intent, 500),
        "charge": lambda: account.object_ids("charge")[0],
    }[kind]()
    whole = account.object(kind, made)
    strange = account.emit(f"{kind}.updated", {**whole, "status": "pondered"}, created=account.now + 5)
    known = account.emit(f"{kind}.updated", whole, created=account.now + 6)
    table = f"{kind}s"

    ledger.take_in(engine, strange.body)
    first = ledger.rows(engine, f"SELECT status FROM {table}"), ledger.anomalies(engine)  # noqa: S608 - ours
    ledger.take_in(engine, known.body)

    assert first == ([{"status": "pondered"}], ["unknown_status"])
    assert ledger.rows(engine, f"SELECT status FROM {table}") == [{"status": whole["status"]}]  # noqa: S608 - ours
    assert "unknown_status" not in ledger.anomalies(engine)


def test_a_refund_counts_once(engine: Engine, account: Account) -> None:
    """refund.* and charge.refund.updated report one refund; the order is partially refunded."""
    order, intent = paid_order(account, amount=2_000)
    account.advance(5)
    refund = account.refund(intent, 500)

    (row,) = show(engine, account, "refunds")

    assert part(row, "id", "status", "amount", "payment_intent") == (refund, "succeeded", 500, intent)
    assert book(engine, order) == ("partial", 500, 0)
    assert account.expected_refunded(order) == 500


def test_a_refund_that_fails_after_it_succeeded(engine: Engine, account: Account) -> None:
    """When the bank returns a refund the order has no refund again, and the feed has both changes."""
    order, intent = paid_order(account, amount=2_000)
    account.advance(5)
    refund = account.refund(intent)
    account.advance(5)
    account.fail_refund(refund)

    ledger.take_in(engine, *(event.body for event in account.events))

    assert book(engine, order) == ("none", 0, 0)
    changes = ledger.rows(engine, "SELECT before, after FROM changes WHERE kind = 'order.refund_changed' ORDER BY seq")
    assert [(row["before"]["refunded_amount"], row["after"]["refunded_amount"]) for row in changes] == [
        (0, 2_000),
        (2_000, 0),
    ]
    assert part(show(engine, account, "refunds")[0], "status") == ("failed",)


def test_a_refund_before_its_order(engine: Engine, account: Account) -> None:
    """A refund that arrives before its order is announced once, when the order arrives."""
    order, intent = paid_order(account, amount=2_000)
    account.advance(5)
    account.refund(intent)

    ledger.take_in(engine, *(event.body for event in reversed(account.events)))

    assert book(engine, order) == ("full", 2_000, 0)
    assert ledger.kinds(engine, order).count("order.refund_changed") == 1


def test_a_dispute_that_is_won(engine: Engine, account: Account) -> None:
    """After a dispute is won the order has no disputed amount."""
    order, intent = paid_order(account, amount=2_000)
    dispute = account.open_dispute(intent)
    account.advance(5)
    account.close_dispute(dispute, "won")

    ledger.take_in(engine, *(event.body for event in account.events))

    assert book(engine, order)[2] == account.expected_disputed(order) == 0


def test_a_dispute(engine: Engine, account: Account) -> None:
    """The order shows its disputed amount; opening and closing are announced once each."""
    order, intent = paid_order(account, amount=2_000)
    account.advance(5)
    dispute = account.open_dispute(intent)
    account.advance(5)
    account.close_dispute(dispute, "lost")

    ledger.take_in(engine, *(event.body for event in account.events))

    assert book(engine, order)[2] == 2_000
    assert ledger.kinds(engine, dispute) == ["dispute.opened", "dispute.closed"]
    (row,) = show(engine, account, "disputes")
    assert part(row, "status", "amount", "payment_intent") == ("lost", 2_000, intent)


def test_a_charge_adds_up_its_refunds(engine: Engine, account: Account) -> None:
    """A charge's refunded sum is that of its last event, in any order of arrival."""
    _, intent = paid_order(account, amount=2_000)
    for amount in (300, 400):
        account.refund(intent, amount)

    (row,) = show(engine, account, "charges")

    assert part(row, "payment_intent", "amount", "amount_refunded", "refunded") == (intent, 2_000, 700, False)


def test_a_rebuild_announces_the_same_refunds(engine: Engine, account: Account) -> None:
    """A rebuild reads an order's refunds from its own tables, and not from the live ones."""
    order, intent = paid_order(account, amount=2_000)
    account.advance(5)
    account.refund(intent, 500)
    ledger.take_in(engine, *(event.body for event in account.events))
    with database.transaction(engine) as connection:
        connection.execute(text("UPDATE refunds SET amount = 1"))

    with refolded(engine, seed=1) as made:
        statement = f"SELECT after FROM {made.schema}.changes WHERE kind = 'order.refund_changed' AND subject_id = :id"  # noqa: S608 - ours
        changes = ledger.rows(engine, statement, id=order)

    assert [change["after"]["refunded_amount"] for change in changes] == [500]


# From an order through its invoice.


def test_an_order_with_an_invoice(engine: Engine, account: Account) -> None:
    """Refunds and credit notes of an order's own invoice count for the order, through the invoice's payments."""
    order, intent = paid_order(account, amount=2_000, invoice_creation=True)
    account.advance(5)
    account.refund(intent, 700)

    ledger.take_in(engine, *(event.body for event in account.events))

    assert book(engine, order)[:2] == ("partial", account.expected_refunded(order))
    (row,) = ledger.rows(engine, "SELECT credited_amount FROM order_book WHERE id = :id", id=order)
    assert row["credited_amount"] == account.expected_credited(order)


def test_later_invoices_are_not_the_orders(engine: Engine, account: Account) -> None:
    """A refund of a subscription's next invoice does not count for the order that began the subscription."""
    customer = account.create_customer()
    session = account.open_session(mode="subscription", amount=1_500, customer=customer)
    account.complete(session)
    account.advance(86_400)
    renewal = account.renew(account.session(session)["subscription"])
    account.finalize_invoice(renewal)
    account.pay_invoice(renewal)
    account.refund(account.invoice_intents(renewal)[0])

    ledger.take_in(engine, *(event.body for event in account.events))

    assert book(engine, session)[:2] == ("none", 0)


def test_an_order_without_a_known_payment_is_null(engine: Engine, account: Account) -> None:
    """A subscription's order without known invoice payments has a null refunded amount, not zero."""
    session = account.open_session(mode="subscription", amount=1_500, customer=account.create_customer())
    account.complete(session)
    known = [event.body for event in account.events if not event.type.startswith("invoice_payment")]

    ledger.take_in(engine, *known)

    assert book(engine, session) == (None, None, None)


# The billing portal.


def test_a_portal_configuration(engine: Engine, account: Account) -> None:
    """A configuration's own time of update decides, then its event's time."""
    configuration = account.create_portal_configuration()
    account.advance(5)
    account.update_portal_configuration(configuration, name="Self service")

    (row,) = show(engine, account, "portal_configurations")

    assert part(row, "id", "active", "name") == (configuration, True, "Self service")
    assert row["updated"] > row["created"]


def test_a_portal_configuration_changed_twice_in_a_second(engine: Engine, account: Account) -> None:
    """Two changes of a configuration within one second end where they ended, lists of features included."""
    configuration = account.create_portal_configuration()
    account.advance(5)
    for allowed in (["email"], ["email", "phone"]):
        account.update_portal_configuration(
            configuration, features={"customer_update": {"enabled": True, "allowed_updates": allowed}}
        )

    (row,) = show(engine, account, "portal_configurations")

    assert row["features"]["customer_update"]["allowed_updates"] == ["email", "phone"]


def test_a_portal_session_has_no_url(engine: Engine, account: Account) -> None:
    """A portal session's url is a credential: no table and no payload has it, and the inbox lists it as blanked."""
    customer = account.create_customer()
    session = account.create_portal_session(customer)
    url = account.object("billing_portal.session", session)["url"]

    (row,) = show(engine, account, "portal_sessions")

    assert part(row, "id", "customer", "expired_at") == (session, customer, None)
    (event,) = ledger.rows(engine, "SELECT payload, redacted FROM events WHERE object_id = :id", id=session)
    assert event["redacted"] == ["data.object.url"]
    assert url.encode() not in event["payload"]


def test_our_clock_ends_a_portal_session(engine: Engine, account: Account) -> None:
    """Stripe sends no event for the end of a portal session, so our clock's observation ends it."""
    session = account.create_portal_session(account.create_customer())
    word = observations.observe(
        PORTAL_SESSION_CLOCK_EXPIRED,
        {"object": "billing_portal.session", "id": session},
        account="",
        livemode=False,
        created=account.now + 3_600,
        now=ledger.NOW,
    )
    ledger.record(engine, [word])
    ledger.take_in(engine, *(event.body for event in account.events))

    (row,) = ledger.rows(engine, "SELECT expired_at FROM portal_sessions")
    assert row["expired_at"].timestamp() == account.now + 3_600


def test_the_clock_ends_old_portal_sessions(engine: Engine, account: Account) -> None:
    """A pass of the clock ends each portal session that is old enough, once, as of the time at which it expired."""
    old = account.create_portal_session(account.create_customer())
    account.advance(3_600)
    account.create_portal_session(account.create_customer())
    ledger.take_in(engine, *(event.body for event in account.events))
    now = datetime.fromtimestamp(account.now + 60, UTC)

    for expected in (1, 0):
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            assert portal_clock.end_portal_sessions(cursor, now=now, after=timedelta(hours=1)) == expected
        ledger.fold(engine)

    (ended,) = ledger.rows(engine, "SELECT id, created, expired_at FROM portal_sessions WHERE expired_at IS NOT NULL")
    assert (ended["id"], ended["expired_at"] - ended["created"]) == (old, timedelta(hours=1))


# Every object, every version.


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_the_same_rows(engine: Engine, account: Account, version: str) -> None:
    """Invoices, refunds, charges, disputes, customers and the portal have the same rows from an older version."""
    order, intent = paid_order(account, amount=2_000, invoice_creation=True)
    account.refund(intent, 100)
    account.open_dispute(paid_order(account)[1])
    account.create_portal_session(account.create_customer(email="a@example.com"))
    account.complete(account.open_session(mode="subscription", amount=700, customer=account.create_customer()))
    tables = ("customers", "refunds", "charges", "disputes", "portal_sessions", "orders")
    # A configuration's features depend on the version.
    configurations = "SELECT id, active, is_default, login_page_url, updated, event_id FROM portal_configurations"

    # Versions before basil do not report an overpaid amount.
    invoices = (
        "SELECT id, number, status, currency, total, amount_due, amount_paid, amount_remaining, starting_balance,"
        " ending_balance, customer, subscription, created, finalized_at, paid_at, voided_at, event_id FROM invoices"
    )

    def shown(bodies: list[bytes]) -> dict[str, list[dict[str, Any]]]:
        ledger.clear(engine)
        ledger.take_in(engine, *bodies)
        found = {table: ledger.rows(engine, f"SELECT * FROM {table} ORDER BY id") for table in tables}  # noqa: S608 - ours
        for charge in found["charges"]:
            # Before basil a charge names its invoice.
            del charge["invoice"]
        return {
            **found,
            "portal_configurations": ledger.rows(engine, configurations),
            "invoices": ledger.rows(engine, invoices),
        }

    newest = shown([event.body for event in account.events])
    older = shown([render(event, version).body for event in account.events])

    assert older == newest
    assert order in {row["id"] for row in newest["orders"]}
