"""What an order and a payment link show after a history: events in, table out."""

from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.sandbox.account import Account, Event
from deploy.sandbox.rendering import render, twin
from schemas import observations
from schemas.own_events import SESSION_CLOCK_EXPIRED, SESSION_MISSING, SESSION_OBSERVED
from tests import histories, ledger
from worker import folds

ShowAll = Callable[..., dict[str, Any]]


@pytest.fixture
def show_all(engine: Engine) -> ShowAll:
    """Return what takes events in, in every order and one by one, and shows the one row that all orders give."""

    def show(*events: Event, table: str = "orders") -> dict[str, Any]:
        shown = []
        for order in permutations(events):
            ledger.clear(engine)
            ledger.take_in(engine, *(event.body for event in order))
            shown.append(ledger.rows(engine, f"SELECT * FROM {table} ORDER BY id"))  # noqa: S608 - a test's own word
        assert all(rows == shown[0] for rows in shown)
        assert len(shown[0]) == 1
        return dict(shown[0][0])

    return show


@pytest.fixture
def account() -> Account:
    """Return a shop's account with nothing in it."""
    return Account(seed=31)


def part(row: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    """Return the columns *names* of *row*."""
    return tuple(row[name] for name in names)


def seconds(account: Account, row: Mapping[str, Any], name: str) -> int | None:
    """Return how long before *account*'s now the moment *name* of *row* was, None where it has none."""
    return None if row[name] is None else account.now - int(row[name].timestamp())


def test_paid_at_once(account: Account, show_all: ShowAll) -> None:
    """A session that completes with its payment is a paid order, with its money and its references."""
    session = account.open_session(amount=2_000, discount=200, shipping=500, tax=150, client_reference_id="cart-1")
    account.advance(30)
    account.complete(session)

    order = show_all(*account.events)

    assert part(order, "id", "status", "session_status", "payment_status") == (session, "paid", "complete", "paid")
    money = part(order, "amount_subtotal", "amount_discount", "amount_shipping", "amount_tax", "amount_total")
    assert money == (2_000, 200, 500, 150, 2_450)
    assert part(order, "currency", "client_reference_id") == ("usd", "cart-1")
    assert order["payment_intent"] == account.session(session)["payment_intent"]
    assert seconds(account, order, "paid_at") == seconds(account, order, "completed_at") == 0


def test_a_delayed_payment_that_clears(account: Account, show_all: ShowAll) -> None:
    """Completed unpaid and paid later: paid, completed when the buyer finished, whatever came first."""
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    account.advance(3_600)
    account.async_payment_succeeded(session)

    order = show_all(*account.events)

    assert order["status"] == "paid"
    assert (seconds(account, order, "completed_at"), seconds(account, order, "paid_at")) == (3_600, 0)


def test_a_delayed_payment_that_fails(account: Account, show_all: ShowAll) -> None:
    """The failure's snapshot looks like the unpaid completion, and the order still fails, even within a second."""
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    account.async_payment_failed(session)

    order = show_all(*account.events)

    assert part(order, "status", "session_status", "payment_status") == ("failed", "complete", "unpaid")
    assert order["failed_at"] == order["completed_at"]


def test_failed_and_then_paid(engine: Engine, account: Account) -> None:
    """Should Stripe tell of a payment after a failure, the order is paid, and each step was told once."""
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    account.advance(5)
    account.async_payment_failed(session)
    paid = {**account.session(session), "payment_status": "paid"}
    account.emit("checkout.session.async_payment_succeeded", paid, created=account.now + 9)

    ledger.take_in(engine, *(event.body for event in account.events))

    assert ledger.rows(engine, "SELECT status FROM orders") == [{"status": "paid"}]
    assert ledger.kinds(engine, session) == ["order.processing", "order.failed", "order.paid"]


def test_a_late_completion_undoes_nothing(engine: Engine, account: Account) -> None:
    """The unpaid completion that arrives after the payment changes no status and tells nothing."""
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    account.advance(60)
    account.async_payment_succeeded(session)
    completed, paid = account.events

    ledger.take_in(engine, paid.body, completed.body)

    assert ledger.rows(engine, "SELECT status FROM orders") == [{"status": "paid"}]
    assert ledger.kinds(engine, session) == ["order.paid"]


def test_expired_with_a_way_back(engine: Engine, account: Account) -> None:
    """An expired session keeps its recovery url; what is opened from it is an order of its own."""
    lost = account.open_session(recoverable=True)
    account.advance(86_400)
    account.expire(lost)
    found = account.recover(lost)
    account.complete(found)

    ledger.take_in(engine, *(event.body for event in account.events))

    orders = {row["id"]: row for row in ledger.rows(engine, "SELECT * FROM orders")}
    assert part(orders[lost], "status", "recovered_from") == ("expired", None)
    assert orders[lost]["recovery_url"].startswith("https://")
    assert part(orders[found], "status", "recovered_from") == ("paid", lost)


def test_nothing_to_pay(account: Account, show_all: ShowAll) -> None:
    """An order that costs nothing is paid without a payment intent."""
    session = account.open_session(amount=1_000, discount=1_000)
    account.complete(session)

    order = show_all(*account.events)

    assert part(order, "status", "payment_status", "payment_intent", "amount_total") == (
        "paid",
        "no_payment_required",
        None,
        0,
    )
    assert order["paid_at"] == order["completed_at"]


def test_setup_takes_no_money(account: Account, show_all: ShowAll) -> None:
    """A session in setup mode completes; it is not paid, and has no amounts."""
    session = account.open_session(mode="setup")
    account.complete(session)

    order = show_all(*account.events)

    assert part(order, "status", "amount_total", "paid_at") == ("complete", None, None)


def test_expired_and_complete_is_an_anomaly(engine: Engine, account: Account) -> None:
    """Both seen, the completion stands, whichever came first, and the contradiction is on record."""
    session = account.open_session()
    expired = account.emit(
        "checkout.session.expired", {**account.session(session), "status": "expired"}, created=account.now + 10
    )
    account.complete(session)
    completed = account.events[-1]

    for order in ((expired, completed), (completed, expired)):
        ledger.clear(engine)
        ledger.take_in(engine, *(event.body for event in order))
        assert ledger.rows(engine, "SELECT status FROM orders") == [{"status": "paid"}]
        assert ledger.anomalies(engine) == ["expired_and_complete"]


@pytest.mark.parametrize(
    ("field", "value"), [("status", "paused"), ("payment_status", "partially_paid"), ("status", None)]
)
def test_an_unknown_value_is_kept_and_decides_nothing(
    engine: Engine, account: Account, field: str, value: str | None
) -> None:
    """A status that Stripe has yet to invent is stored as it is; the order has no status of ours, and that is noted."""
    session = account.open_session()
    account.complete(session)
    strange = account.emit("checkout.session.completed", {**account.session(session), field: value})

    ledger.take_in(engine, strange.body)

    (order,) = ledger.rows(engine, "SELECT * FROM orders")
    assert order["status"] is None
    assert order["session_status" if field == "status" else field] == value
    assert ledger.anomalies(engine) == ["unknown_status"]
    assert ledger.kinds(engine, session) == []


def test_an_open_order_s_payment_may_be_strange(engine: Engine, account: Account) -> None:
    """An open session is open, whatever Stripe says of its payment; that nobody knows the word is noted."""
    session = account.open_session()
    strange = account.emit("payfold.checkout.session.observed", {**account.session(session), "payment_status": "lent"})

    ledger.take_in(engine, strange.body)

    assert ledger.rows(engine, "SELECT status, payment_status FROM orders") == [
        {"status": "open", "payment_status": "lent"}
    ]
    assert ledger.anomalies(engine) == ["unknown_status"]


def test_what_is_known_later_resolves_the_anomaly(engine: Engine, account: Account) -> None:
    """An anomaly that the next event clears up stays in the table as resolved."""
    session = account.open_session()
    account.emit("checkout.session.completed", {**account.session(session), "status": "paused"})
    account.advance(5)
    account.complete(session)

    ledger.take_in(engine, *(event.body for event in account.events))

    assert ledger.anomalies(engine) == []
    assert [row["kind"] for row in ledger.rows(engine, "SELECT kind FROM anomalies")] == ["unknown_status"]


def test_two_references_are_an_anomaly(engine: Engine, account: Account) -> None:
    """Two customers told of one session: the last one stands, and both are on record, in either order of arrival."""
    session = account.open_session(customer="cus_1")
    account.complete(session, payment_status="unpaid")
    account.advance(5)
    other = {**account.session(session), "customer": "cus_2", "payment_status": "paid"}
    account.emit("checkout.session.async_payment_succeeded", other)

    for order in (account.events, account.events[::-1]):
        ledger.clear(engine)
        ledger.take_in(engine, *(event.body for event in order))
        assert ledger.rows(engine, "SELECT customer FROM orders") == [{"customer": "cus_2"}]
        (anomaly,) = ledger.rows(engine, "SELECT kind, detail FROM anomalies WHERE resolved_at IS NULL")
        assert anomaly["detail"] == {"column": "customer", "values": ["cus_1", "cus_2"]}


def test_a_partial_object_erases_nothing(account: Account, show_all: ShowAll) -> None:
    """A later event that lacks keys leaves what an earlier one carried; one that carries null takes it away."""
    session = account.open_session(client_reference_id="cart-9", metadata={"a": "b"})
    account.complete(session, payment_status="unpaid")
    account.advance(5)
    full = {**account.session(session), "payment_status": "paid", "metadata": None}
    del full["client_reference_id"]
    account.emit("checkout.session.async_payment_succeeded", full)

    order = show_all(*account.events)

    assert part(order, "client_reference_id", "metadata", "status") == ("cart-9", None, "paid")


def test_a_reference_that_is_null_again(account: Account, show_all: ShowAll) -> None:
    """A reference, once told, stays: a later null is no other customer."""
    session = account.open_session(customer="cus_1")
    account.complete(session, payment_status="unpaid")
    account.advance(5)
    without = {**account.session(session), "payment_status": "paid", "customer": None}
    account.emit("checkout.session.async_payment_succeeded", without)

    assert part(show_all(*account.events), "customer", "status") == ("cus_1", "paid")


def test_a_reference_given_in_whole(account: Account, show_all: ShowAll) -> None:
    """Where an object stands in place of its id, the id is kept."""
    session = account.open_session(customer="cus_1")
    account.complete(session)
    expanded = {**account.session(session), "customer": {"id": "cus_1", "object": "customer"}}

    order = show_all(account.emit("checkout.session.completed", expanded))

    assert order["customer"] == "cus_1"


@pytest.mark.parametrize("version", ["2024-06-20", "2025-03-31.basil", "2025-09-30.clover", "2026-03-25.dahlia"])
def test_every_version_folds_to_the_same_columns(account: Account, show_all: ShowAll, version: str) -> None:
    """The same order, told by an older API version, is the same row, address and money included."""
    session = account.open_session(shipping=500, metadata={"k": "v"}, customer="cus_1")
    account.complete(session)
    (event,) = account.events

    assert show_all(render(event, version)) == show_all(event)


def test_the_buyers_currency_is_kept_apart(account: Account, show_all: ShowAll) -> None:
    """What the buyer saw stands beside the shop's amounts, also where an older version swapped the two."""
    session = account.open_session(amount=2_000, presentment=("sek", 22_000))
    account.complete(session)
    (event,) = account.events
    wanted = ("currency", "amount_total", "amount_subtotal", "presentment_currency", "presentment_amount")

    assert part(show_all(event), *wanted) == ("usd", 2_000, 2_000, "sek", 22_000)
    assert part(show_all(render(event, "2024-06-20")), *wanted) == ("usd", 2_000, 2_000, "sek", 22_000)


def test_our_clock_counts_while_it_decides(engine: Engine, account: Account) -> None:
    """Expired by our clock until a real event says otherwise; then nothing of the clock is left in the row."""
    session = account.open_session()
    opened = observations.observe(
        "payfold.checkout.session.registered",
        account.session(session),
        account="",
        livemode=False,
        created=account.now,
        now=ledger.NOW,
    )
    late = account.now + 90_000
    clock = observations.observe(
        SESSION_CLOCK_EXPIRED,
        {"object": "checkout.session", "id": session},
        account="",
        livemode=False,
        created=late,
        now=ledger.NOW,
    )
    account.complete(session)
    completed = ledger.delivery(account.events[-1].body)

    ledger.record(engine, [opened, clock])
    ledger.fold(engine)
    (by_clock,) = ledger.rows(engine, "SELECT status, session_status, expired_at FROM orders")
    assert (by_clock["status"], by_clock["session_status"]) == ("expired", "open")
    assert by_clock["expired_at"].timestamp() == late

    ledger.record(engine, [completed])
    ledger.fold(engine)
    assert ledger.rows(engine, "SELECT status, expired_at FROM orders") == [{"status": "paid", "expired_at": None}]
    assert ledger.anomalies(engine) == []
    assert ledger.kinds(engine, session) == ["order.expired", "order.paid"]
    advanced = ledger.digest_of(engine)

    ledger.clear(engine)
    ledger.record(engine, [completed, clock, opened])
    ledger.fold(engine)
    assert ledger.digest_of(engine) == advanced


def test_a_link_updated_before_it_was_created(account: Account, show_all: ShowAll) -> None:
    """An update that arrives before its link's creation is kept, and the creation gives it its date."""
    link = account.create_payment_link(metadata={"a": "1"})
    account.advance(60)
    account.update_payment_link(link, active=False, metadata={"a": "2"})

    row = show_all(*account.events, table="payment_links")

    assert part(row, "active", "metadata", "currency") == (False, {"a": "2"}, "usd")
    assert seconds(account, row, "created") == 60


def test_a_link_without_its_creation_has_no_date(account: Account, show_all: ShowAll) -> None:
    """A payment link does not say when it was created: without the created event that is unknown, not guessed."""
    link = account.create_payment_link()
    account.update_payment_link(link, active=False)

    assert show_all(account.events[-1], table="payment_links")["created"] is None


def test_switching_a_link_is_told_each_time(engine: Engine, account: Account) -> None:
    """Activation is repeatable; a twin, which tells of one change under two ids, tells it once."""
    link = account.create_payment_link()
    for active in (False, True, False):
        account.advance(60)
        account.update_payment_link(link, active=active)
    told = list(account.events)

    ledger.take_in(engine, *(event.body for event in (*told, twin(told[-1], seed=1))))

    on, off = "payment_link.activated", "payment_link.deactivated"
    assert ledger.kinds(engine, link) == [on, off, on, off]


def test_the_funnel_of_a_link(engine: Engine, account: Account) -> None:
    """Per link and currency: sessions known, completed, paid and expired, and what was paid."""
    link = account.create_payment_link(amount=700, currency="eur")
    paid, unpaid, lost = (account.open_session(payment_link=link) for _ in range(3))
    account.complete(paid)
    account.complete(unpaid, payment_status="unpaid")
    account.expire(lost)

    ledger.take_in(engine, *(event.body for event in account.events))

    assert ledger.rows(engine, "SELECT * FROM payment_link_funnel") == [
        {
            "account": "",
            "livemode": False,
            "payment_link": link,
            "currency": "eur",
            "opened": 3,
            "completed": 2,
            "paid": 1,
            "expired": 1,
            "amount_paid": 700,
        }
    ]


def test_a_change_holds_what_a_shop_acts_on(engine: Engine, account: Account) -> None:
    """The money, and the ids by which the shop finds its cart, before and after; and nothing personal."""
    session = account.open_session(
        amount=2_000,
        discount=200,
        shipping=500,
        tax=150,
        client_reference_id="cart-1",
        customer="cus_1",
        metadata={"note": "a gift"},
    )
    ledger.take_in(engine, seen(account, session))
    account.advance(30)
    account.complete(session)
    ledger.take_in(engine, *(event.body for event in account.events))

    opened, paid = ledger.rows(engine, "SELECT * FROM changes ORDER BY seq")
    (order,) = ledger.rows(engine, "SELECT customer_email, metadata FROM orders")
    assert "@" in order["customer_email"]
    assert order["metadata"] == {"note": "a gift"}
    money = {
        "currency": "usd",
        "amount_subtotal": 2_000,
        "amount_discount": 200,
        "amount_shipping": 500,
        "amount_tax": 150,
        "amount_total": 2_450,
        "presentment_currency": None,
        "presentment_amount": None,
    }
    ids = {"client_reference_id": "cart-1", "customer": "cus_1", "payment_link": None, "subscription": None}
    was = {"status": "open", "session_status": "open", "payment_status": "unpaid", "mode": "payment"}
    now = {"status": "paid", "session_status": "complete", "payment_status": "paid", "mode": "payment"}
    assert part(paid, "subject", "subject_id", "kind", "source") == ("order", session, "order.paid", "webhook")
    assert opened["before"] is None
    assert opened["after"] == was | money | ids | {"payment_intent": None, "invoice": None}
    assert paid["before"] == opened["after"]
    intent = account.session(session)["payment_intent"]
    assert paid["after"] == now | money | ids | {"payment_intent": intent, "invoice": None, "lines": None}


@pytest.mark.parametrize("end", ["complete", "expire"])
def test_a_change_tells_the_items(engine: Engine, account: Account, end: str) -> None:
    """Paid or expired, it carries price, product and quantity of what is known in whole, and null where it is not."""
    known, empty, unknown = (account.open_session() for _ in range(3))
    ledger.take_in(
        engine,
        seen(account, known, line_items=listed([item(1, quantity=2), item(2)])),
        seen(account, empty, line_items=listed([])),
        seen(account, unknown, line_items=listed([item(3)], has_more=True)),
    )
    account.advance(3_600)
    for session in (known, empty, unknown):
        getattr(account, end)(session)
    ledger.take_in(engine, *(event.body for event in account.events))

    told = ledger.rows(engine, "SELECT subject_id, after FROM changes WHERE kind IN ('order.paid', 'order.expired')")
    assert {row["subject_id"]: row["after"]["lines"] for row in told} == {
        known: [
            {"price": "price_1", "product": "prod_1", "quantity": 2},
            {"price": "price_2", "product": "prod_2", "quantity": 1},
        ],
        empty: [],
        unknown: None,
    }


def test_every_type_that_is_folded_has_an_outcome() -> None:
    """Each type that a fold is registered for names its object, and a payload that fits nothing parks it."""
    for kind, (object_type, _) in folds.FOLDS.items():
        event = Account(seed=1).emit(kind, {"id": 7, "object": object_type})
        assert folds.judge(histories.event_of(event.body)).state == "parked"
        wrong = Account(seed=1).emit(kind, {"id": "x_1", "object": "something_else"})
        verdict = folds.judge(histories.event_of(wrong.body))
        assert (verdict.state, verdict.reason) == (
            "parked",
            f"its object is something_else, where {object_type} is wanted",
        )


# What was read from Stripe.


def seen(account: Account, session: str, kind: str = SESSION_OBSERVED, **fields: Any) -> bytes:  # noqa: ANN401 - JSON values
    """Return the observation that *session* was as it is now, with *fields* laid over it."""
    told = account.session(session) | fields
    observed = observations.observe(kind, told, account="", livemode=False, created=account.now, now=ledger.NOW)
    return observed.envelope.payload


def listed(lines: list[dict[str, Any]], *, has_more: bool = False) -> dict[str, Any]:
    """Return *lines* as a session lists them."""
    return {"object": "list", "data": lines, "has_more": has_more}


def item(number: int, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
    """Return a line item."""
    price = {"id": f"price_{number}", "object": "price", "product": f"prod_{number}"}
    amounts = {"amount_subtotal": 500, "amount_discount": 0, "amount_tax": 0, "amount_total": 500, "currency": "usd"}
    return {
        "id": f"li_{number}",
        "object": "item",
        "description": "Mug",
        "quantity": 1,
        "price": price,
        **amounts,
    } | fields


def lines_of(engine: Engine) -> list[tuple[Any, ...]]:
    """Return the lines at rest."""
    found = ledger.rows(engine, "SELECT id, price, product, quantity, amount_total FROM order_lines ORDER BY id")
    return [tuple(row.values()) for row in found]


def test_lines_are_those_that_were_listed_last(engine: Engine, account: Account) -> None:
    """A newer listing replaces an older one whole, in whichever order they arrive and whatever comes between."""
    session = account.open_session(amount=1_500)
    older = seen(account, session, line_items=listed([item(1), item(2)]))
    account.advance(60)
    newer = seen(account, session, line_items=listed([item(2, quantity=3), item(3, price=None)]))
    account.advance(60)
    account.complete(session)
    for order in permutations((older, newer, account.events[-1].body)):
        ledger.clear(engine)
        ledger.take_in(engine, *order)

        assert lines_of(engine) == [("li_2", "price_2", "prod_2", 3, 500), ("li_3", None, None, 1, 500)]
        assert ledger.rows(engine, "SELECT status, lines_complete FROM orders") == [
            {"status": "paid", "lines_complete": True}
        ]


def test_lines_that_are_read_in_the_second_of_an_event(engine: Engine, account: Account) -> None:
    """An observation that tells the state of an event in its very second, and the lines beside, is heard."""
    session = account.open_session(amount=500)
    account.advance(60)
    account.complete(session)
    same = seen(account, session, line_items=listed([item(1)]))
    for order in permutations((account.events[-1].body, same)):
        ledger.clear(engine)
        ledger.take_in(engine, *order)

        assert lines_of(engine) == [("li_1", "price_1", "prod_1", 1, 500)]
        assert ledger.rows(engine, "SELECT lines_complete FROM orders") == [{"lines_complete": True}]


def test_a_first_page_of_lines_says_nothing(engine: Engine, account: Account) -> None:
    """Lines that are not all are not kept, and do not undo those that were."""
    session = account.open_session()
    ledger.take_in(engine, seen(account, session, line_items=listed([item(1)], has_more=True)))
    assert lines_of(engine) == []
    assert ledger.rows(engine, "SELECT lines_complete FROM orders") == [{"lines_complete": False}]
    account.advance(1)
    ledger.take_in(engine, seen(account, session, line_items=listed([item(1), item(2)])))
    account.advance(1)
    ledger.take_in(engine, seen(account, session, line_items=listed([item(1)], has_more=True)))

    assert [line[0] for line in lines_of(engine)] == ["li_1", "li_2"]


def test_two_orders_that_claim_one_line_do_not_stop_the_batch(engine: Engine, account: Account) -> None:
    """What Stripe never sends must still be folded, or nothing after it would be."""
    bodies = [seen(account, account.open_session(), line_items=listed([item(1)])) for _ in range(2)]
    ledger.record(engine, map(ledger.delivery, bodies))

    assert ledger.fold(engine) == 2
    assert ledger.rows(engine, "SELECT count(*) AS orders FROM orders") == [{"orders": 2}]


def test_a_session_that_stripe_does_not_know(engine: Engine, account: Account) -> None:
    """It changes no column, and is an anomaly from then on, also after what is heard of it later."""
    session = account.open_session()
    ledger.take_in(engine, seen(account, session))
    (before,) = ledger.rows(engine, "SELECT * FROM orders")
    account.advance(5)
    ledger.take_in(engine, seen(account, session, kind=SESSION_MISSING))
    (after,) = ledger.rows(engine, "SELECT * FROM orders")

    assert after == before
    assert ledger.anomalies(engine) == ["missing_at_stripe"]
    account.advance(5)
    account.complete(session)
    ledger.take_in(engine, account.events[-1].body)
    assert ledger.anomalies(engine) == ["missing_at_stripe"]


def test_a_thin_event_says_why_it_is_ignored(engine: Engine) -> None:
    """It is kept and listed, and its reason says what becomes of it."""
    thin = (
        b'{"id":"evt_thin","object":"v2.core.event","type":"v1.checkout.session.completed","livemode":false,'
        b'"created":"2026-11-20T10:00:00.000Z","related_object":{"id":"cs_1","type":"checkout.session","url":"/v1/x"}}'
    )
    ledger.take_in(engine, thin)

    ((row,)) = ledger.rows(engine, "SELECT state, reason, object_id FROM events")
    assert (row["state"], row["object_id"]) == ("ignored", "cs_1")
    assert "read from Stripe" in row["reason"]
