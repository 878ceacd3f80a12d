"""Explanations over HTTP: what the command prints, without personal data unless the token has the scope."""

from collections.abc import Iterator

import httpx
import pytest
from sqlalchemy import Engine

from api import explanations
from deploy.sandbox.account import Account
from tests import ledger
from tests.web import CLERK, READER, Web, event, serving, settings_of
from worker.logs import retry

pytestmark = pytest.mark.integration


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


def test_an_order_is_explained(web: Web, engine: Engine) -> None:
    """Each column names the event that set it; only the scope personal sees the values of personal columns."""
    account = Account(seed=3)
    session = account.open_session(metadata={"cart": "17"})
    account.complete(session)
    ledger.take_in(engine, *(each.body for each in account.events))
    (completed,) = account.events
    path = f"/v1/orders/{session}/explanation"

    answer, whole = web.get(path, READER).json(), web.get(path, CLERK).json()

    columns = {each["column"]: each for each in answer["columns"]}
    assert (columns["status"]["value"], columns["amount_total"]["event_id"]) == ("paid", completed.id)
    assert [(each["event_id"], each["verdict"]) for each in answer["timeline"]] == [(completed.id, "it decides")]
    assert ("metadata" in answer["row"], "value" in columns["metadata"]) == (False, False)
    assert columns["metadata"]["event_id"] == completed.id
    assert whole["row"]["metadata"] == {"cart": "17"}
    (email,) = [each["value"] for each in whole["columns"] if each["column"] == "customer_email"]
    assert email is not None
    assert email not in web.get(path, READER).text


def test_the_money_of_a_refunded_order(web: Web, engine: Engine) -> None:
    """The charge has its sums and each refund its amount; the sums of a charge are absent of a refund."""
    account = Account(seed=3, payments=True)
    session = account.open_session(amount=700)
    account.complete(session)
    account.refund(account.session(session)["payment_intent"], amount=200)
    ledger.take_in(engine, *(each.body for each in account.events))

    answer = web.get(f"/v1/orders/{session}/explanation")

    assert answer.status_code == 200
    sums = ("amount", "amount_captured", "amount_refunded", "amount_by_refunds")
    money = [(each["object"], {name: each[name] for name in sums if name in each}) for each in answer.json()["money"]]
    of_charge = {"amount": 700, "amount_captured": 700, "amount_refunded": 200, "amount_by_refunds": 200}
    assert money == [("charge", of_charge), ("refund", {"amount": 200})]


def test_as_it_was_known(web: Web, engine: Engine) -> None:
    """Before any event of an order was received, there is nothing to explain.

    A time without an offset is refused, and so is a number.
    """
    account = Account(seed=3)
    session = account.open_session()
    account.complete(session)
    ledger.take_in(engine, *(each.body for each in account.events))
    path = f"/v1/orders/{session}/explanation"

    # They were received at ``ledger.NOW``.
    assert web.get(f"{path}?as_of=2026-11-22T12:00:00Z").json()["row"]["status"] == "paid"
    assert web.get(f"{path}?as_of=2026-11-22T11:59:59Z").status_code == 404
    assert web.get(f"{path}?as_of=2026-11-22T12:00:00").status_code == 422
    # It may be seconds or milliseconds.
    assert web.get(f"{path}?as_of=1795348800").status_code == 422


def test_an_object_with_too_many_events(web: Web, engine: Engine) -> None:
    """An object with more events than are explained at once is refused, and the answer names the command."""
    about = {"object": {"object": "customer", "id": "cus_1"}}
    bodies = [event(number, type="customer.updated", data=about) for number in range(explanations.EVENTS_MAX + 1)]
    ledger.record(engine, map(ledger.delivery, bodies))

    answer = web.get("/v1/customers/cus_1/explanation")

    assert (answer.status_code, "command" in answer.json()["detail"]) == (409, True)


def test_an_id_in_several_worlds(web: Web, engine: Engine) -> None:
    """An id that several accounts know is 409 until the account is named; an unknown one is 404."""
    body = event(1, type="customer.created", data={"object": {"object": "customer", "id": "cus_1", "created": 1}})
    for account in ("acct_1", "acct_2"):
        ledger.take_in(engine, body, account=account)

    assert web.get("/v1/customers/cus_1/explanation").status_code == 409
    assert web.get("/v1/customers/cus_1/explanation?account=acct_2").json()["account"] == "acct_2"
    assert web.get("/v1/customers/cus_2/explanation").status_code == 404


def test_an_object_of_another_kind(web: Web, engine: Engine) -> None:
    """The id of another kind of object is 404 at each route, also where events mention it; its own route knows it."""
    account = Account(seed=5)
    customer = account.create_customer()
    session = account.open_session(customer=customer)
    account.complete(session)
    ledger.take_in(engine, *(each.body for each in account.events))

    found = {
        kind: {
            path: web.get(f"/v1/{path}/{id_}/explanation").status_code
            for path in ("orders", "customers", "credit-notes", "payment-links")
        }
        for kind, id_ in (("orders", session), ("customers", customer))
    }

    assert found == {
        "orders": {"orders": 200, "customers": 404, "credit-notes": 404, "payment-links": 404},
        "customers": {"orders": 404, "customers": 200, "credit-notes": 404, "payment-links": 404},
    }


def test_the_words_of_an_operator(web: Web, engine: Engine) -> None:
    """The reason why an operator ignored an event is shown to the scope personal alone; that it was ignored, to all."""
    account = Account(seed=6)
    link = account.create_payment_link()
    odd = account.emit("payment_link.updated", account.payment_link(link) | {"active": "maybe"})
    ledger.take_in(engine, *(each.body for each in account.events))
    retry.ignore(engine, odd.id, reason="as Jo of example.com asked", now=ledger.NOW)
    path = f"/v1/payment-links/{link}/explanation"

    def verdict(answer: httpx.Response) -> str:
        (found,) = [each["verdict"] for each in answer.json()["timeline"] if each["event_id"] == odd.id]
        return str(found)

    assert verdict(web.get(path, CLERK)) == "ignored: set aside by an operator: as Jo of example.com asked"
    assert verdict(web.get(path, READER)).startswith("ignored by an operator")
    assert "Jo" not in web.get(path, READER).text
