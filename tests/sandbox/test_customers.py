"""Customers, their balances, and the billing portal."""

import pytest

from deploy.sandbox import Account, ParameterError, TransitionError, UnknownObjectError
from tests.sandbox.test_account import only_event


def shop() -> Account:
    """Return an account that makes payments."""
    return Account(seed=1, payments=True)


def test_first_money_decides_the_currency() -> None:
    """The first change of a balance sets the customer's currency, and one event reports both."""
    account = shop()
    customer = account.create_customer(email="buyer@example.com")
    account.take_events()

    account.adjust_balance(customer, -500, currency="eur", description="Sorry.")

    event = only_event(account)
    assert event.type == "customer.updated"
    assert event.payload()["data"]["previous_attributes"] == {"balance": 0, "currency": None}
    assert account.object("customer", customer)["balance"] == account.expected_balance(customer, "eur") == -500
    (row,) = account.balance_transactions(customer)
    assert (row["type"], row["amount"], row["ending_balance"], row["description"]) == (
        "adjustment",
        -500,
        -500,
        "Sorry.",
    )


def test_other_currencies_have_no_events() -> None:
    """A balance in another currency than the customer's own is in the ledger alone."""
    account = shop()
    customer = account.create_customer(currency="usd")
    account.take_events()

    account.adjust_balance(customer, -900, currency="cad")

    assert account.events == []
    assert account.object("customer", customer)["balance"] == 0
    assert account.expected_balance(customer, "cad") == -900
    assert account.expected_balance(customer, "usd") == 0


def test_balance_of_the_beginning() -> None:
    """A customer that is created with a balance has it in its first event and in a ledger row."""
    account = shop()

    customer = account.create_customer(balance=-700)

    snapshot = only_event(account).payload()["data"]["object"]
    assert (snapshot["balance"], snapshot["currency"]) == (-700, "usd")
    assert [row["type"] for row in account.balance_transactions(customer)] == ["initial"]


def test_there_and_back_within_a_second() -> None:
    """Each change has one event, even if the balance had that value before; the list is newest first."""
    account = shop()
    customer = account.create_customer(currency="usd")
    account.take_events()

    for amount in (-500, 500, -500):
        account.adjust_balance(customer, amount)

    changes = [event.payload()["data"] for event in account.events]
    moves = [(data["previous_attributes"]["balance"], data["object"]["balance"]) for data in changes]
    assert moves == [(0, -500), (-500, 0), (0, -500)]
    assert {event.created for event in account.events} == {account.now}
    assert [row["ending_balance"] for row in account.balance_transactions(customer)] == [-500, 0, -500]


def test_updates() -> None:
    """An update's event has the changed fields, metadata by keys; an update that changes nothing has no event."""
    account = shop()
    customer = account.create_customer(name="Ada", metadata={"kept": "1", "gone": "2"})
    account.take_events()

    account.update_customer(customer, name="Ada Quillon", metadata={"gone": None, "new": "3"})
    data = only_event(account).payload()["data"]
    account.update_customer(customer, name="Ada Quillon")

    assert data["previous_attributes"] == {"metadata": {"gone": "2", "new": None}, "name": "Ada"}
    assert account.events == []


def test_deletion() -> None:
    """The event carries the whole customer, the API returns a tombstone, and further calls are refused."""
    account = shop()
    customer = account.create_customer(name="Ada")
    account.adjust_balance(customer, -500)
    last = account.object("customer", customer)
    account.take_events()

    account.delete_customer(customer)

    assert only_event(account).payload()["data"] == {"object": last}
    assert account.object("customer", customer) == {"id": customer, "object": "customer", "deleted": True}
    assert account.expected_balance(customer, "usd") == -500
    with pytest.raises(TransitionError, match="is deleted"):
        account.update_customer(customer, name="Eve")
    with pytest.raises(TransitionError, match="is deleted"):
        account.open_session(customer=customer)


def test_one_call_is_one_request() -> None:
    """All events of one API call have the same request, and those of another call another one."""
    account = shop()
    customer = account.create_customer(currency="usd", balance=-500)
    invoice = account.create_invoice(customer, 2_000)
    account.take_events()

    account.finalize_invoice(invoice)
    first = {event.payload()["request"]["id"] for event in account.take_events()}
    account.pay_invoice(invoice)
    second = {event.payload()["request"]["id"] for event in account.take_events()}

    assert len(first) == len(second) == 1
    assert first != second
    assert None not in first | second


def test_refusals() -> None:
    """The sandbox refuses the calls that Stripe refuses, and names the reason."""
    account = shop()
    customer = account.create_customer()

    with pytest.raises(ParameterError, match="must not be 0"):
        account.adjust_balance(customer, 0)
    with pytest.raises(ParameterError, match="unknown parameters: balance"):
        account.update_customer(customer, balance=5)
    with pytest.raises(UnknownObjectError, match="No such customer"):
        account.open_session(customer="cus_unknown")


def test_portal_configuration() -> None:
    """A configuration has the time of its update; a second update in the same second leaves that unchanged."""
    account = shop()
    configuration = account.create_portal_configuration(name="Shop")
    account.take_events()
    account.advance(60)

    account.update_portal_configuration(configuration, features={"invoice_history": {"enabled": False}})
    account.update_portal_configuration(configuration, login_page=True, active=False)
    account.update_portal_configuration(configuration, active=False)

    first, second = (event.payload()["data"] for event in account.events)
    assert first["previous_attributes"] == {
        "features": {"invoice_history": {"enabled": True}},
        "updated": account.now - 60,
    }
    assert second["previous_attributes"] == {"active": True, "login_page": {"enabled": False, "url": None}}
    assert first["object"]["updated"] == second["object"]["updated"] == account.now
    with pytest.raises(TransitionError, match="not active"):
        account.create_portal_session(account.create_customer(), configuration=configuration)
    default = account.create_portal_configuration(is_default=True)
    with pytest.raises(TransitionError, match="default configuration"):
        account.update_portal_configuration(default, active=False)


def test_portal_session() -> None:
    """A portal session has one event and a login url; the first one creates the default configuration."""
    account = shop()
    customer = account.create_customer()
    account.take_events()

    first = account.create_portal_session(customer, flow="payment_method_update")
    second = account.create_portal_session(customer)

    types = [event.type for event in account.events]
    requests = [event.payload()["request"]["id"] for event in account.events]
    assert requests[0] == requests[1] != requests[2]
    assert types == ["billing_portal.configuration.created", *["billing_portal.session.created"] * 2]
    session, other = (account.object("billing_portal.session", each) for each in (first, second))
    assert session["configuration"] == other["configuration"]
    assert (session["flow"]["type"], other["flow"]) == ("payment_method_update", None)
    assert session["url"].startswith("https://billing.stripe.com/p/session/")
