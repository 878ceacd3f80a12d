"""The tables of money over HTTP."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from schemas import observations
from tests import ledger
from tests.web import Web, serving, settings_of


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


def data(web: Web, path: str) -> list[dict[str, Any]]:
    """Return the rows of a list."""
    response = web.get(path)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["data"]
    return found


def shop(engine: Engine) -> tuple[Account, dict[str, str]]:
    """Return a shop that has one object of each kind, and their ids."""
    account = Account(seed=61, payments=True)
    customer = account.create_customer(currency="usd", email="buyer@example.com")
    account.adjust_balance(customer, -300)
    account.advance(5)
    account.adjust_balance(customer, 100)
    invoice = account.create_invoice(customer, 2_000)
    account.finalize_invoice(invoice)
    account.pay_invoice(invoice)
    note = account.issue_credit_note(invoice, 400, credit=400, lines=[100, 300])
    order = account.open_session(amount=1_000, customer=customer)
    account.complete(order)
    intent = account.order_intents(order)
    assert intent
    refund = account.refund(intent[0], 250)
    portal = account.create_portal_session(customer)
    ledger.take_in(engine, *(event.body for event in account.events))
    ids = {"customer": customer, "invoice": invoice, "note": note, "order": order, "refund": refund, "portal": portal}
    return account, {**ids, "intent": intent[0]}


def test_every_list_and_its_filters(engine: Engine, web: Web) -> None:
    """Each table of money is listed, and filtered by the fields that a shop looks for."""
    _, ids = shop(engine)
    wanted = {
        f"/v1/invoices?customer={ids['customer']}&status=paid": ids["invoice"],
        f"/v1/credit-notes?invoice={ids['invoice']}": ids["note"],
        f"/v1/credit-notes?customer={ids['customer']}&status=issued": ids["note"],
        f"/v1/refunds?payment_intent={ids['intent']}": ids["refund"],
        f"/v1/orders?customer={ids['customer']}": ids["order"],
        f"/v1/portal/sessions?customer={ids['customer']}": ids["portal"],
    }

    for path, expected in wanted.items():
        assert [row["id"] for row in data(web, path)] == [expected], path
        assert data(web, f"{path}&livemode=true") == []
    assert len(data(web, "/v1/portal/configurations?is_default=true")) == 1
    assert "url" not in data(web, "/v1/portal/sessions")[0]


def test_an_order_with_its_money(engine: Engine, web: Web) -> None:
    """An order's answer has its refunded amount."""
    _, ids = shop(engine)

    order = web.get(f"/v1/orders/{ids['order']}").json()

    assert (order["status"], order["refund_status"], order["refunded_amount"]) == ("paid", "partial", 250)


def test_a_credit_note_with_its_lines(engine: Engine, web: Web) -> None:
    """A note's answer has the split of its amount, and its lines."""
    _, ids = shop(engine)

    note = web.get(f"/v1/credit-notes/{ids['note']}").json()

    assert (note["post_payment_amount"], note["to_balance_amount"], note["lines_complete"]) == (400, 400, True)
    assert sorted(line["amount"] for line in note["lines"]) == [100, 300]


def test_a_balance(engine: Engine, web: Web) -> None:
    """A balance's answer has its currency and its changes, and once its ledger is read, whether it has a gap."""
    account, ids = shop(engine)
    path = f"/v1/customers/{ids['customer']}/balance"

    (balance,) = web.get(path).json()["balances"]
    assert (balance["currency"], balance["amount"]) == ("usd", account.expected_balance(ids["customer"], "usd"))
    assert [change["amount"] for change in balance["changes"]][-2:] == [100, -300]
    assert (balance["transactions"], balance["chain_is_unbroken"]) == ([], None)

    transactions = account.balance_transactions(ids["customer"])
    for whole, listed in ((False, [transactions[0], transactions[-1]]), (True, transactions)):
        for each in listed:
            kind = "payfold.customer_balance_transaction.observed"
            world: dict[str, Any] = {"account": "", "livemode": False, "created": account.now, "now": ledger.NOW}
            ledger.record(engine, [observations.observe(kind, each, **world)])
        ledger.fold(engine)
        (balance,) = web.get(path).json()["balances"]
        assert balance["chain_is_unbroken"] is whole
        assert len(balance["transactions"]) == len(listed)


def test_a_customer_without_a_balance(web: Web) -> None:
    """An unknown customer is a 404; an unknown filter is refused by name."""
    assert web.get("/v1/customers/cus_none/balance").status_code == 404
    assert web.get("/v1/refunds?colour=red").status_code == 422


def test_anomalies_are_listed(engine: Engine, web: Web) -> None:
    """Anomalies can be listed, and filtered by whether they are resolved."""
    account = Account(seed=62)
    session = account.open_session()
    account.emit("checkout.session.completed", {**account.session(session), "status": "paused"})
    ledger.take_in(engine, account.events[-1].body)

    (found,) = data(web, "/v1/anomalies?resolved=false")

    assert (found["kind"], found["subject"], found["subject_id"]) == ("unknown_status", "order", session)
    assert data(web, "/v1/anomalies?resolved=true") == []
