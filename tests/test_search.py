"""One box finds an order by whatever a person has in hand, and reveals nothing that the token may not see."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from schemas import currencies, database, search
from schemas.currencies import Amount
from schemas.search import Hit
from tests import ledger
from tests.web import CLERK, READER, Web, serving, settings_of

pytestmark = pytest.mark.integration

EMAIL = "Buyer.One@Example.com"


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


def shop() -> tuple[Account, str, str]:
    """Return an account, its order that is paid and has an invoice, and another order that is open."""
    account = Account(seed=1, payments=True)
    customer = account.create_customer(email=EMAIL)
    paid = account.open_session(
        amount=4_999, currency="eur", customer=customer, client_reference_id="cart-7", invoice_creation=True
    )
    account.complete(paid)
    link = account.create_payment_link(amount=4_999, currency="usd")
    other = account.open_session(payment_link=link)
    account.expire(other)
    return account, paid, other


def found(engine: Engine, text: str, *, personal: bool = True, **world: Any) -> list[Hit]:  # noqa: ANN401 - the world
    """Return what a search for *text* finds."""
    with database.transaction(engine) as connection:
        given: dict[str, Any] = {name: world.get(name) for name in ("account", "livemode")}
        return search.find(connection, text, **given) or search.in_events(connection, text, **given, personal=personal)


def shown(hits: list[Hit]) -> list[tuple[str, str, list[str]]]:
    """Return of each hit its kind, the column that matched, and the orders that it leads to."""
    return [(hit.kind, hit.matched, [order.id for order in hit.orders]) for hit in hits]


@pytest.mark.parametrize(
    ("text", "minor", "currency"),
    [
        ("49.99 eur", 4_999, "eur"),
        ("EUR 49,99", 4_999, "eur"),
        ("1,234.50 USD", 123_450, "usd"),
        ("1.234,50 usd", 123_450, "usd"),
        ("1'234.50chf", 123_450, "chf"),
        ("1,234 usd", 123_400, "usd"),
        ("12.5 usd", 1_250, "usd"),
        ("20 usd", 2_000, "usd"),
        ("0.07 usd", 7, "usd"),
        # Source: https://docs.stripe.com/currencies#zero-decimal and #three-decimal.
        ("1,234 jpy", 1_234, "jpy"),
        ("1.234 kwd", 1_234, "kwd"),
    ],
)
def test_amounts_as_people_write_them(text: str, minor: int, currency: str) -> None:
    """An amount is read with a point or a comma, its currency before or after it."""
    assert currencies.read(text) == Amount(minor, currency)


@pytest.mark.parametrize(
    "text",
    [
        "49.99",
        "eur",
        "eur 49.99 eur",
        "cs_test_1",
        "-5 eur",
        "49.99 euros",
        "1 e",
        "999999999999999999999 usd",
        "٣ usd",
    ],
)
def test_texts_that_state_no_amount(text: str) -> None:
    """Without one currency of three letters and a number that a column can hold, a text is no amount."""
    assert currencies.read(text) is None


def test_every_object_leads_to_its_order(engine: Engine) -> None:
    """An order is found by its own id and by the id, number, email, reference or amount of each part of it."""
    account, paid, other = shop()
    session = account.session(paid)
    invoice = account.object("invoice", session["invoice"])
    (intent,) = account.order_intents(paid) or []
    refund = account.refund(intent, 500)
    dispute = account.open_dispute(intent, 1_000)
    note = account.issue_credit_note(invoice["id"], 300, credit=300)
    ledger.take_in(engine, *(event.body for event in account.events))
    names = [
        (paid, "order", "id"),
        (f"  {paid} ", "order", "id"),
        ("cart-7", "order", "client_reference_id"),
        (account.charge_of(intent)["id"], "charge", "id"),
        (refund, "refund", "id"),
        (dispute, "dispute", "id"),
        (invoice["id"], "invoice", "id"),
        (invoice["number"], "invoice", "number"),
        (note, "credit_note", "id"),
        (account.object("credit_note", note)["number"], "credit_note", "number"),
        (session["customer"], "customer", "id"),
        (next(event.id for event in account.events if event.type == "credit_note.created"), "event", "id"),
        ("49.99 EUR", "order", "amount_total"),
    ]

    ledger.execute(engine, ORDER, account="", livemode=False, id="cs_2", at=1)
    ledger.execute(engine, "UPDATE orders SET client_reference_id = 'ORD1001' WHERE id = 'cs_2'")

    # It looks like an amount of a currency ORD.
    assert shown(found(engine, "ORD1001")) == [("order", "client_reference_id", ["cs_2"])]
    assert [(text, shown(found(engine, text))) for text, _, _ in names] == [
        (text, [(kind, matched, [paid])]) for text, kind, matched in names
    ]
    assert ("charge", "payment_intent", [paid]) in shown(found(engine, intent))
    assert shown(found(engine, EMAIL.upper())) == [("customer", "email", [paid])]
    buyer = session["customer_details"]["email"]
    assert shown(found(engine, buyer.upper())) == [("order", "customer_email", [paid])]
    assert shown(found(engine, "49.99 usd")) == [("order", "amount_total", [other])]
    assert shown(found(engine, account.session(other)["payment_link"])) == [("payment_link", "id", [other])]
    assert found(engine, "4999 eur") == found(engine, "nothing-of-this-name") == []


ORDER = """INSERT INTO orders (account, livemode, id, created, event_id, as_of, status, currency, amount_total,
    client_reference_id)
    VALUES (:account, :livemode, :id, to_timestamp(:at), 'evt_1', now(), 'paid', 'eur', 700, 'r')"""


def test_worlds_are_apart(engine: Engine) -> None:
    """One id in several worlds is several hits, newest first; account and mode narrow the search."""
    worlds = [("", False), ("", True), ("acct_1", True)]
    for at, (account, livemode) in enumerate(worlds):
        ledger.execute(engine, ORDER, account=account, livemode=livemode, id="cs_1", at=at)

    for text in ("cs_1", "r", "7 eur"):
        assert [(hit.account, hit.livemode) for hit in found(engine, text)] == worlds[::-1]
        assert [(hit.account, hit.livemode) for hit in found(engine, text, livemode=True)] == worlds[:0:-1]
        assert [hit.livemode for hit in found(engine, text, account="")] == [True, False]
        assert [hit.account for hit in found(engine, text, account="acct_1", livemode=False)] == []


def test_more_than_is_shown(web: Web) -> None:
    """A search that finds many shows the newest and reports that there are more."""
    for number in range(search.HITS_MAX + 5):
        web.query(ORDERS, f"cs_{number}", number)
    answer = web.get("/v1/search?q=7 eur").json()

    assert [hit["id"] for hit in answer["data"]] == [f"cs_{number}" for number in range(24, 4, -1)]
    assert answer["has_more"] is True
    assert web.get("/v1/search?q=cs_3").json()["has_more"] is False


ORDERS = """INSERT INTO orders (account, livemode, id, created, event_id, as_of, status, currency, amount_total)
    VALUES ('', true, %s, to_timestamp(%s), 'evt_1', now(), 'paid', 'eur', 700)"""


def test_an_email_is_personal(web: Web) -> None:
    """Only a token of the scope personal searches by email: whether an address exists reveals a buyer."""
    account, *_ = shop()
    for event in account.events:
        assert web.deliver(event.body).status_code == 200

    refused = web.get(f"/v1/search?q={EMAIL}", READER)
    assert (refused.status_code, "personal" in refused.json()["detail"]) == (403, True)
    assert web.get(f"/v1/search?q={EMAIL}", CLERK).json() == {"data": [], "has_more": False}
    event = account.events[0]
    (hit,) = web.get(f"/v1/search?q={event.id}").json()["data"]
    assert (hit["kind"], hit["matched"], hit["orders"]) == ("event", "id", [])


@pytest.mark.parametrize("text", ["", "%00", "a" * 256])
def test_a_bad_search(web: Web, text: str) -> None:
    """An empty text, a NUL character, or a text that is too long is 422."""
    assert web.get(f"/v1/search?q={text}").status_code == 422


def test_what_is_parked(engine: Engine) -> None:
    """An order of which the only event is parked is found by its session, and by an email that only the payload has."""
    account = Account(seed=2)
    session = account.open_session(amount=4_999, currency="eur")
    account.complete(session)
    ledger.execute(engine, "ALTER TABLE orders ADD CONSTRAINT cheap CHECK (amount_total < 100)")
    ledger.take_in(engine, *(each.body for each in account.events))
    email = account.session(session)["customer_details"]["email"]
    (event,) = account.events

    assert shown(found(engine, session)) == [("event", "object_id", [session])]
    assert [(hit.id, hit.matched) for hit in found(engine, email.upper())] == [(event.id, "payload")]
    assert found(engine, email.upper(), personal=False) == []
    assert found(engine, email.upper(), livemode=True) == []
    assert found(engine, email[:3]) == []


def test_a_search_and_another_on_one_connection(engine: Engine) -> None:
    """What a search reads in parts leaves the connection as it was."""
    with database.transaction(engine) as connection:
        for _ in range(2):
            assert search.find(connection, "cs_none", account=None, livemode=None) == []
            assert search.in_events(connection, "cs_none", account=None, livemode=None, personal=True) == []
