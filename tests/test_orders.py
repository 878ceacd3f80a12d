"""The rows of orders and payment links after a history: events in, table out."""

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
    """Return a function that takes events in, one by one and in every order, and returns the row of all orders."""

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
    """Return an empty shop account."""
    return Account(seed=31)


def part(row: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    """Return the columns *names* of *row*."""
    return tuple(row[name] for name in names)


def seconds(account: Account, row: Mapping[str, Any], name: str) -> int | None:
    """Return the seconds from the moment *name* of *row* to *account*'s now, None if the row has no such moment."""
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
    """An order completed unpaid and paid later is paid, and completed when the buyer finished, in any arrival."""
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    account.advance(3_600)
    account.async_payment_succeeded(session)

    order = show_all(*account.events)

    assert order["status"] == "paid"
    assert (seconds(account, order, "completed_at"), seconds(account, order, "paid_at")) == (3_600, 0)


def test_a_delayed_payment_that_fails(account: Account, show_all: ShowAll) -> None:
    """The failure's snapshot equals the unpaid completion's, and the order still fails, even within a second."""
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    account.async_payment_failed(session)

    order = show_all(*account.events)

    assert part(order, "status", "session_status", "payment_status") == ("failed", "complete", "unpaid")
    assert order["failed_at"] == order["completed_at"]


def test_failed_and_then_paid(engine: Engine, account: Account) -> None:
    """A payment after a failure makes the order paid, and each step is announced once."""
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
    """An unpaid completion that arrives after the payment changes no status and announces nothing."""
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    account.advance(60)
    account.async_payment_succeeded(session)
    completed, paid = account.events

    ledger.take_in(engine, paid.body, completed.body)

    assert ledger.rows(engine, "SELECT status FROM orders") == [{"status": "paid"}]
    assert ledger.kinds(engine, session) == ["order.paid"]


def test_expired_with_a_way_back(engine: Engine, account: Account) -> None:
    """An expired session keeps its recovery url; a session opened from it is an order of its own."""
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
    """Of an expiry and a completion the completion decides, whichever came first, and the contradiction is noted."""
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
    """An unknown status is stored as it is; the order's own status is null, and the anomaly is noted."""
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
    """An open session with an unknown payment status is an open order, and the unknown status is noted."""
    session = account.open_session()
    strange = account.emit("payfold.checkout.session.observed", {**account.session(session), "payment_status": "lent"})

    ledger.take_in(engine, strange.body)

    assert ledger.rows(engine, "SELECT status, payment_status FROM orders") == [
        {"status": "open", "payment_status": "lent"}
    ]
    assert ledger.anomalies(engine) == ["unknown_status"]


def test_a_later_event_resolves_the_anomaly(engine: Engine, account: Account) -> None:
    """An anomaly that the next event clears up stays in the table as resolved."""
    session = account.open_session()
    account.emit("checkout.session.completed", {**account.session(session), "status": "paused"})
    account.advance(5)
    account.complete(session)

    ledger.take_in(engine, *(event.body for event in account.events))

    assert ledger.anomalies(engine) == []
    assert [row["kind"] for row in ledger.rows(engine, "SELECT kind FROM anomalies")] == ["unknown_status"]


def test_two_references_are_an_anomaly(engine: Engine, account: Account) -> None:
    """Of two customers of one session the last one stays, and the anomaly names both, in either order of arrival."""
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
    """A key that a later event lacks keeps its earlier value; a null in a later event clears it."""
    session = account.open_session(client_reference_id="cart-9", metadata={"a": "b"})
    account.complete(session, payment_status="unpaid")
    account.advance(5)
    full = {**account.session(session), "payment_status": "paid", "metadata": None}
    del full["client_reference_id"]
    account.emit("checkout.session.async_payment_succeeded", full)

    order = show_all(*account.events)

    assert part(order, "client_reference_id", "metadata", "status") == ("cart-9", None, "paid")


def test_a_reference_that_is_null_again(account: Account, show_all: ShowAll) -> None:
    """A known reference stays: a later null is not another customer."""
    session = account.open_session(customer="cus_1")
    account.complete(session, payment_status="unpaid")
    account.advance(5)
    without = {**account.session(session), "payment_status": "paid", "customer": None}
    account.emit("checkout.session.async_payment_succeeded", without)

    assert part(show_all(*account.events), "customer", "status") == ("cus_1", "paid")


def test_a_reference_given_in_whole(account: Account, show_all: ShowAll) -> None:
    """An expanded object is stored as its id."""
    session = account.open_session(customer="cus_1")
    account.complete(session)
    expanded = {**account.session(session), "customer": {"id": "cus_1", "object": "customer"}}

    order = show_all(account.emit("checkout.session.completed", expanded))

    assert order["customer"] == "cus_1"


@pytest.mark.parametrize("version", ["2024-06-20", "2025-03-31.basil", "2025-09-30.clover", "2026-03-25.dahlia"])
def test_every_version_folds_to_the_same_columns(account: Account, show_all: ShowAll, version: str) -> None:
    """The same order from an older API version gives the same row, address and money included."""
    session = account.open_session(shipping=500, metadata={"k": "v"}, customer="cus_1")
    account.complete(session)
    (event,) = account.events

    assert show_all(render(event, version)) == show_all(event)


def test_the_buyers_currency_is_kept_apart(account: Account, show_all: ShowAll) -> None:
    """The buyer's amounts have columns apart from the shop's, also where an older version swapped the two."""
    session = account.open_session(amount=2_000, presentment=("sek", 22_000))
    account.complete(session)
    (event,) = account.events
    wanted = ("currency", "amount_total", "amount_subtotal", "presentment_currency", "presentment_amount")

    assert part(show_all(event), *wanted) == ("usd", 2_000, 2_000, "sek", 22_000)
    assert part(show_all(render(event, "2024-06-20")), *wanted) == ("usd", 2_000, 2_000, "sek", 22_000)


def test_our_clock_counts_while_it_decides(engine: Engine, account: Account) -> None:
    """An order is expired by our clock until a real event decides; then no trace of the clock is left in the row."""
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
    """An update that arrives before its link's creation is folded, and the creation adds the date."""
    link = account.create_payment_link(metadata={"a": "1"})
    account.advance(60)
    account.update_payment_link(link, active=False, metadata={"a": "2"})

    row = show_all(*account.events, table="payment_links")

    assert part(row, "active", "metadata", "currency") == (False, {"a": "2"}, "usd")
    assert seconds(account, row, "created") == 60


def test_a_link_without_its_creation_has_no_date(account: Account, show_all: ShowAll) -> None:
    """A payment link does not carry its creation time: without the created event it is null, not guessed."""
    link = account.create_payment_link()
    account.update_payment_link(link, active=False)

    assert show_all(account.events[-1], table="payment_links")["created"] is None


def test_each_switch_of_a_link_is_announced(engine: Engine, account: Account) -> None:
    """Each activation is announced; a twin, which reports one change under two ids, is announced once."""
    link = account.create_payment_link()
    for active in (False, True, False):
        account.advance(60)
        account.update_payment_link(link, active=active)
    events = list(account.events)

    ledger.take_in(engine, *(event.body for event in (*events, twin(events[-1], seed=1))))

    on, off = "payment_link.activated", "payment_link.deactivated"
    assert ledger.kinds(engine, link) == [on, off, on, off]


def test_the_funnel_of_a_link(engine: Engine, account: Account) -> None:
    """Per link and currency the view counts sessions, completed, paid and expired, and sums the paid amounts."""
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


def test_a_change_holds_money_and_ids(engine: Engine, account: Account) -> None:
    """A change holds the money, and the ids by which a shop finds its cart, before and after; and nothing personal."""
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
def test_a_change_lists_the_items(engine: Engine, account: Account, end: str) -> None:
    """A paid or expired order's change has price, product and quantity of its lines, or null if not all are known."""
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

    changes = ledger.rows(engine, "SELECT subject_id, after FROM changes WHERE kind IN ('order.paid', 'order.expired')")
    assert {row["subject_id"]: row["after"]["lines"] for row in changes} == {
        known: [
            {"price": "price_1", "product": "prod_1", "quantity": 2},
            {"price": "price_2", "product": "prod_2", "quantity": 1},
        ],
        empty: [],
        unknown: None,
    }


def test_every_type_that_is_folded_has_an_outcome() -> None:
    """Each type with a fold names its object, and an event whose payload fits no fold is parked."""
    for kind, (object_type, _) in folds.FOLDS.items():
        event = Account(seed=1).emit(kind, {"id": 7, "object": object_type})
        assert folds.judge(histories.event_of(event.body)).state == "parked"
        wrong = Account(seed=1).emit(kind, {"id": "x_1", "object": "something_else"})
        verdict = folds.judge(histories.event_of(wrong.body))
        assert (verdict.state, verdict.reason) == (
            "parked",
            f"its object is something_else, where {object_type} is wanted",
        )


# Objects that were read from Stripe.


def seen(account: Account, session: str, kind: str = SESSION_OBSERVED, **fields: Any) -> bytes:  # noqa: ANN401 - JSON values
    """Return an observation of *session* as it is now, with *fields* laid over it."""
    content = account.session(session) | fields
    observed = observations.observe(kind, content, account="", livemode=False, created=account.now, now=ledger.NOW)
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
    """Return the stored lines."""
    found = ledger.rows(engine, "SELECT id, price, product, quantity, amount_total FROM order_lines ORDER BY id")
    return [tuple(row.values()) for row in found]


def test_lines_are_those_that_were_listed_last(engine: Engine, account: Account) -> None:
    """A newer listing replaces an older one whole, in any order of arrival and with any events between."""
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
    """The lines of an observation that repeats the state of an event in its very second are kept."""
    session = account.open_session(amount=500)
    account.advance(60)
    account.complete(session)
    same = seen(account, session, line_items=listed([item(1)]))
    for order in permutations((account.events[-1].body, same)):
        ledger.clear(engine)
        ledger.take_in(engine, *order)

        assert lines_of(engine) == [("li_1", "price_1", "prod_1", 1, 500)]
        assert ledger.rows(engine, "SELECT lines_complete FROM orders") == [{"lines_complete": True}]


def test_a_first_page_of_lines_changes_nothing(engine: Engine, account: Account) -> None:
    """An incomplete list of lines is not kept, and does not replace a complete one."""
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
    """Two orders that list one line, which Stripe never sends, are folded, so that later events are not blocked."""
    bodies = [seen(account, account.open_session(), line_items=listed([item(1)])) for _ in range(2)]
    ledger.record(engine, map(ledger.delivery, bodies))

    assert ledger.fold(engine) == 2
    assert ledger.rows(engine, "SELECT count(*) AS orders FROM orders") == [{"orders": 2}]


def test_a_session_that_stripe_does_not_know(engine: Engine, account: Account) -> None:
    """A session unknown to Stripe changes no column, and stays an anomaly, also after later events."""
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


def test_a_thin_event_is_ignored_with_a_reason(engine: Engine) -> None:
    """A thin event is kept and listed, and its reason explains how Payfold treats it."""
    thin = (
        b'{"id":"evt_thin","object":"v2.core.event","type":"v1.checkout.session.completed","livemode":false,'
        b'"created":"2026-11-20T10:00:00.000Z","related_object":{"id":"cs_1","type":"checkout.session","url":"/v1/x"}}'
    )
    ledger.take_in(engine, thin)

    ((row,)) = ledger.rows(engine, "SELECT state, reason, object_id FROM events")
    assert (row["state"], row["object_id"]) == ("ignored", "cs_1")
    assert "read from Stripe" in row["reason"]
