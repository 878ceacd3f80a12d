"""Invoices and credit notes: amounts due, payments, and amounts given back."""

import pytest

from deploy.sandbox import Account, ParameterError, TransitionError


@pytest.fixture
def shop() -> Account:
    """Return an account that makes payments."""
    return Account(seed=1, payments=True)


def open_invoice(shop: Account, amount: int = 2_000, *, balance: int = 0) -> str:
    """Return a finalised invoice of a new customer, and drop the events so far."""
    customer = shop.create_customer(currency="usd", balance=balance)
    invoice = shop.create_invoice(customer, amount)
    shop.finalize_invoice(invoice)
    shop.take_events()
    return invoice


def paid_invoice(shop: Account, amount: int = 2_000, *, balance: int = 0) -> str:
    """Return an invoice that was paid by card."""
    invoice = open_invoice(shop, amount, balance=balance)
    shop.pay_invoice(invoice)
    shop.take_events()
    return invoice


def ledger(shop: Account, invoice: str) -> list[tuple[str, int, int]]:
    """Return type, amount and ending balance of the ledger rows of an invoice's customer, oldest first."""
    rows = shop.balance_transactions(shop.object("invoice", invoice)["customer"])
    return [(row["type"], row["amount"], row["ending_balance"]) for row in reversed(rows)]


@pytest.mark.parametrize(
    ("balance", "due", "ending"), [(0, 2_000, 0), (-500, 1_500, 0), (-2_500, 0, -500), (300, 2_300, 0)]
)
def test_balance_is_applied(shop: Account, balance: int, due: int, ending: int) -> None:
    """Finalising uses up a credit and adds a debt; an invoice with nothing due is paid at once."""
    invoice = shop.object("invoice", open_invoice(shop, balance=balance))

    assert (invoice["starting_balance"], invoice["ending_balance"]) == (balance, ending)
    assert (invoice["amount_due"], invoice["status"]) == (due, "open" if due else "paid")
    assert shop.expected_balance(invoice["customer"], "usd") == ending
    assert (invoice["status_transitions"]["paid_at"] is None) == bool(due)


def test_events_of_an_invoice(shop: Account) -> None:
    """Draft, finalised and paid are reported within one second, each by its own event type and as an update."""
    customer = shop.create_customer(currency="usd", balance=-500)
    shop.take_events()
    invoice = shop.create_invoice(customer, 2_000, tax=200)
    shop.finalize_invoice(invoice)
    shop.pay_invoice(invoice)

    reported = [(event.type, event.payload()["data"]) for event in shop.events]
    assert [kind for kind, _ in reported] == [
        "invoice.created",
        *("customer.updated", "invoice.updated", "invoice.finalized"),
        *("charge.succeeded", "payment_intent.succeeded", "invoice_payment.paid"),
        *("invoice.updated", "invoice.paid", "invoice.payment_succeeded"),
    ]
    draft, opened, paid = reported[0][1]["object"], reported[3][1]["object"], reported[-1][1]["object"]
    assert (draft["status"], draft["starting_balance"], draft["ending_balance"]) == ("draft", -500, None)
    assert (opened["status"], opened["amount_due"], opened["amount_remaining"]) == ("open", 1_700, 1_700)
    assert (paid["status"], paid["amount_paid"], paid["amount_remaining"]) == ("paid", 1_700, 0)
    assert reported[7][1]["previous_attributes"]["status"] == "open"
    (payment,) = (shop.object("invoice_payment", each) for each in shop.object_ids("invoice_payment"))
    assert (payment["invoice"], payment["amount_paid"]) == (invoice, 1_700)
    assert payment["payment"] == {"payment_intent": shop.invoice_intents(invoice)[0], "type": "payment_intent"}
    assert "payment_intent" not in paid


def test_void_gives_the_balance_back(shop: Account) -> None:
    """A void invoice returns the used balance, and is final."""
    invoice = open_invoice(shop, balance=-500)

    shop.void_invoice(invoice)

    assert [event.type for event in shop.events] == ["customer.updated", "invoice.updated", "invoice.voided"]
    assert ledger(shop, invoice) == [
        ("initial", -500, -500),
        ("applied_to_invoice", 500, 0),
        ("unapplied_from_invoice", -500, -500),
    ]
    with pytest.raises(TransitionError, match="is void"):
        shop.pay_invoice(invoice)


def test_uncollectible_may_be_paid(shop: Account) -> None:
    """An uncollectible invoice may still be paid, and is then paid."""
    invoice = open_invoice(shop)

    shop.mark_uncollectible(invoice)
    given_up = shop.object("invoice", invoice)
    shop.pay_invoice(invoice)

    paid = shop.object("invoice", invoice)
    assert (given_up["status"], given_up["status_details"]["uncollectible"]["reason"]) == (
        "uncollectible",
        "user_forgiven",
    )
    assert (paid["status"], paid["status_details"]) == ("paid", None)
    assert paid["status_transitions"]["marked_uncollectible_at"] == paid["status_transitions"]["paid_at"] == shop.now


def test_failed_payment(shop: Account) -> None:
    """A payment that fails leaves the invoice open and the customer delinquent, until it is paid."""
    invoice = open_invoice(shop)
    customer = shop.object("invoice", invoice)["customer"]

    shop.fail_invoice_payment(invoice)
    late = shop.object("customer", customer)["delinquent"]
    shop.pay_invoice(invoice)

    assert (late, shop.object("customer", customer)["delinquent"]) == (True, False)
    assert shop.object("invoice", invoice)["attempt_count"] == 2
    assert len(shop.invoice_intents(invoice)) == 1


def test_three_destinations(shop: Account) -> None:
    """A credit note gives a paid amount back in three parts: as a refund, to the balance, and outside Stripe."""
    invoice = paid_invoice(shop)

    note = shop.issue_credit_note(invoice, 1_000, refund=500, credit=300, out_of_band=200, reason="duplicate")

    assert [event.type for event in shop.events] == [
        *("refund.created", "charge.refunded", "customer.updated", "credit_note.created", "invoice.updated")
    ]
    issued = shop.object("credit_note", note)
    assert (issued["type"], issued["pre_payment_amount"], issued["post_payment_amount"]) == ("post_payment", 0, 1_000)
    (part,) = issued["refunds"]
    assert (part["amount_refunded"], shop.object("refund", part["refund"])["amount"]) == (500, 500)
    assert issued["out_of_band_amount"] == 200
    assert ledger(shop, invoice) == [("credit_note", -300, -300)]
    row = shop.object("customer_balance_transaction", issued["customer_balance_transaction"])
    assert row["credit_note"] == note
    assert shop.events[-1].payload()["data"]["previous_attributes"] == {"post_payment_credit_notes_amount": 0}


def test_note_of_an_open_invoice(shop: Account) -> None:
    """A note lowers the amount due of an open invoice; voiding the note raises it again."""
    invoice = open_invoice(shop)

    note = shop.issue_credit_note(invoice, 600)
    lowered = shop.object("invoice", invoice)
    shop.void_credit_note(note)

    raised, voided = shop.object("invoice", invoice), shop.object("credit_note", note)
    assert (lowered["amount_due"], lowered["pre_payment_credit_notes_amount"]) == (1_400, 600)
    assert (raised["amount_due"], raised["pre_payment_credit_notes_amount"]) == (2_000, 0)
    assert (voided["status"], voided["voided_at"], voided["type"]) == ("void", shop.now, "pre_payment")
    assert shop.creditable(invoice) == 2_000
    with pytest.raises(TransitionError, match="is void"):
        shop.void_credit_note(note)


def test_mixed_note_pays_the_invoice(shop: Account) -> None:
    """A note over more than remains credits the paid part too, here the balance; the invoice is then paid."""
    invoice = open_invoice(shop, balance=-500)

    note = shop.issue_credit_note(invoice, 2_000, credit=500)

    issued = shop.object("credit_note", note)
    assert (issued["type"], issued["pre_payment_amount"], issued["post_payment_amount"]) == ("mixed", 1_500, 500)
    assert [event.type for event in shop.events][-2:] == ["invoice.updated", "invoice.paid"]
    assert shop.object("invoice", invoice)["status"] == "paid"
    assert shop.object("invoice", invoice)["amount_due"] == 0
    with pytest.raises(TransitionError, match="is paid, not open"):
        shop.void_credit_note(note)


def test_creditable_amounts(shop: Account) -> None:
    """Notes never exceed the invoice, and amounts that were refunded without a note cannot be credited."""
    invoice = paid_invoice(shop)
    (intent,) = shop.invoice_intents(invoice)
    shop.refund(intent, 500)

    assert shop.creditable(invoice) == 1_500
    with pytest.raises(ParameterError, match="1500 left to credit"):
        shop.issue_credit_note(invoice, 1_600, out_of_band=1_600)
    with pytest.raises(ParameterError, match="goes in whole"):
        shop.issue_credit_note(invoice, 1_000, refund=900)
    with pytest.raises(ParameterError, match="lines add up"):
        shop.issue_credit_note(invoice, 1_000, refund=1_000, lines=[1, 2])
    shop.issue_credit_note(invoice, 1_500, refund=1_500)
    assert shop.creditable(invoice) == 0


def test_only_the_first_page_of_lines(shop: Account) -> None:
    """A note holds its first ten lines; the first of them credit the invoice's own lines."""
    invoice = paid_invoice(shop)

    note = shop.issue_credit_note(invoice, 1_200, out_of_band=1_200, lines=[100] * 12)

    lines = shop.object("credit_note", note)["lines"]
    assert (len(lines["data"]), lines["has_more"]) == (10, True)
    assert len(shop.credit_note_lines(note)) == 12
    assert [line["type"] for line in lines["data"][:2]] == ["invoice_line_item", "custom_line_item"]
    assert "invoice_line_item" not in lines["data"][1]


def test_memo(shop: Account) -> None:
    """Only the memo and the metadata of a note can change."""
    note = shop.issue_credit_note(paid_invoice(shop), 500, refund=500)
    shop.take_events()

    shop.update_credit_note(note, memo="Sorry.")
    shop.update_credit_note(note, memo="Sorry.")

    (event,) = shop.events
    assert event.payload()["data"]["previous_attributes"] == {"memo": None}


def test_invoice_of_an_order(shop: Account) -> None:
    """A session with invoice_creation has a payment intent and an invoice; the invoice uses no balance."""
    customer = shop.create_customer(currency="usd", balance=-500)
    session = shop.open_session(amount=2_000, tax=100, customer=customer, invoice_creation=True)

    shop.complete(session)

    completed = shop.session(session)
    invoice = shop.object("invoice", completed["invoice"])
    assert (invoice["status"], invoice["total"], invoice["amount_paid"]) == ("paid", 2_100, 2_100)
    assert (invoice["starting_balance"], invoice["ending_balance"]) == (-500, -500)
    assert shop.invoice_intents(completed["invoice"]) == [completed["payment_intent"]] == shop.order_intents(session)
    shop.issue_credit_note(completed["invoice"], 700, refund=500, credit=200)
    assert (shop.expected_credited(session), shop.expected_refunded(session)) == (700, 500)


def test_invoice_of_a_delayed_order(shop: Account) -> None:
    """With a delayed payment the invoice is made when the payment has cleared, and never if it fails."""
    cleared, failed = (shop.open_session(invoice_creation=True) for _ in range(2))
    for session in (cleared, failed):
        shop.complete(session, payment_status="unpaid")
        assert shop.session(session)["invoice"] is None

    shop.async_payment_succeeded(cleared)
    shop.async_payment_failed(failed)

    assert shop.object("invoice", shop.session(cleared)["invoice"])["status"] == "paid"
    assert shop.session(failed)["invoice"] is None
    assert shop.expected_credited(failed) is None


def test_subscription(shop: Account) -> None:
    """A subscription's session names its first invoice and no payment intent; later invoices are not of the order."""
    session = shop.open_session(mode="subscription", amount=1_200)
    shop.complete(session)
    completed = shop.session(session)

    renewed = shop.renew(completed["subscription"])
    shop.finalize_invoice(renewed)
    shop.pay_invoice(renewed)
    shop.issue_credit_note(renewed, 1_200, refund=1_200)

    first, second = shop.object("invoice", completed["invoice"]), shop.object("invoice", renewed)
    assert (first["billing_reason"], second["billing_reason"]) == ("subscription_create", "subscription_cycle")
    for invoice in (first, second):
        assert invoice["parent"]["subscription_details"]["subscription"] == completed["subscription"]
    assert completed["payment_intent"] is None
    assert (shop.expected_credited(session), shop.expected_refunded(session)) == (0, 0)
    shop.refund(shop.invoice_intents(completed["invoice"])[0], 200)
    assert shop.expected_refunded(session) == 200


def test_trial(shop: Account) -> None:
    """A trial has a paid invoice over 0, and no payment that could be refunded."""
    session = shop.open_session(mode="subscription", amount=0)

    shop.complete(session)

    invoice = shop.object("invoice", shop.session(session)["invoice"])
    assert (invoice["status"], invoice["total"]) == ("paid", 0)
    assert shop.expected_refunded(session) is None


def test_refusals(shop: Account) -> None:
    """The sandbox refuses the calls that Stripe refuses, names the reason, and emits no event."""
    opened, paid = open_invoice(shop), paid_invoice(shop)
    draft = shop.create_invoice(shop.create_customer(), 500)
    shop.take_events()

    with pytest.raises(TransitionError, match="is paid, not draft"):
        shop.finalize_invoice(paid)
    with pytest.raises(TransitionError, match="is paid, not open"):
        shop.void_invoice(paid)
    with pytest.raises(TransitionError, match="is open, not draft"):
        shop.delete_invoice(opened)
    with pytest.raises(TransitionError, match="is draft, not open or paid"):
        shop.issue_credit_note(draft, 100)
    with pytest.raises(ParameterError, match="for payment mode"):
        shop.open_session(mode="subscription", invoice_creation=True)
    with pytest.raises(ParameterError, match="No such subscription"):
        shop.renew("sub_unknown")
    assert shop.events == []
