"""Seeded shops and tangles have the properties that their users rely on."""

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.sandbox import Account, Event
from deploy.sandbox.history import shop_history, stream_shop, tangle

SEEDS = st.integers(min_value=0, max_value=2**32)

TRUTH_OF_EVENT = {
    ("checkout.session.completed", "paid"): "paid",
    ("checkout.session.completed", "unpaid"): "processing",
    ("checkout.session.completed", "no_payment_required"): "paid",
    ("checkout.session.async_payment_succeeded", "paid"): "paid",
    ("checkout.session.async_payment_failed", "unpaid"): "failed",
    ("checkout.session.expired", "unpaid"): "expired",
    ("checkout.session.expired", "no_payment_required"): "expired",
}


def statuses_after(events: Iterable[Event]) -> dict[str, str]:
    """Return the status of each session after all *events*, in true order."""
    statuses = {}
    for event in events:
        if event.type.startswith("checkout.session."):
            session = event.payload()["data"]["object"]
            setup = session["mode"] == "setup" and session["status"] == "complete"
            truth = TRUTH_OF_EVENT[event.type, session["payment_status"]]
            statuses[event.object_id] = "complete" if setup else truth
    return statuses


@pytest.fixture(scope="module")
def shop() -> Account:
    """A shop of a thousand visits."""
    return shop_history(seed=5, orders=1_000)


def test_shop_events_are_in_order(shop: Account) -> None:
    """Events come in the order of their seconds, and every one has an id of its own."""
    moments = [event.created for event in shop.events]

    assert moments == sorted(moments)
    assert len({event.id for event in shop.events}) == len(shop.events)


def test_shop_events_give_the_expected_status(shop: Account) -> None:
    """The events in true order give the expected status of each session; sessions without events are open."""
    statuses = statuses_after(shop.events)

    for session in shop.session_ids():
        assert shop.expected_status(session) == statuses.get(session, "open")


def test_shop_has_everything(shop: Account) -> None:
    """A shop sells by cart and link, in all kinds of currencies, and its sessions end in every possible way."""
    sessions = [shop.session(session) for session in shop.session_ids()]
    statuses = Counter(shop.expected_status(session["id"]) for session in sessions)

    assert statuses.keys() == {"paid", "complete", "failed", "expired", "processing", "open"}
    assert statuses["paid"] > len(sessions) / 2
    assert {"usd", "eur", "jpy", "kwd"} <= {session["currency"] for session in sessions}
    assert all(session["amount_total"] % 10 == 0 for session in sessions if session["currency"] == "kwd")
    assert any(session["recovered_from"] for session in sessions)
    assert any(session["payment_link"] for session in sessions)
    assert any("presentment_details" in session for session in sessions)
    assert {"payment", "setup", "subscription"} == {session["mode"] for session in sessions}
    links = Counter((e.object_id, e.created) for e in shop.events if e.type == "payment_link.updated")
    assert max(links.values()) > 1


def test_shop_is_deterministic(shop: Account) -> None:
    """The same seed gives the same shop, streamed or in whole."""
    streamed = list(stream_shop(Account(seed=5), 5, 1_000))

    assert streamed == shop.events
    assert shop_history(seed=6, orders=10).events != shop_history(seed=5, orders=10).events


def test_live_and_connected() -> None:
    """A shop is of one mode and one account."""
    shop = shop_history(seed=5, orders=20, livemode=True, account="acct_1connected")

    assert {(event.livemode, event.account) for event in shop.events} == {(True, "acct_1connected")}


@given(SEEDS)
def test_tangles_are_small(seed: int) -> None:
    """A tangle has 3 to 12 events, in the order of their seconds."""
    moments = [event.created for event in tangle(seed).events]

    assert 3 <= len(moments) <= 12
    assert moments == sorted(moments)


@given(SEEDS)
def test_tangle_events_give_the_expected_status(seed: int) -> None:
    """Without a contradiction, the events in true order give each session's expected status."""
    account = tangle(seed, contradictory=False)
    statuses = statuses_after(account.events)

    for session in account.session_ids():
        assert account.expected_status(session) == statuses.get(session, "open")


@given(SEEDS)
def test_contradictory_tangles(seed: int) -> None:
    """A contradictory tangle has an expired and a completed event of exactly one session."""
    account = tangle(seed, contradictory=True)
    ends: dict[str, set[str]] = {}
    for event in account.events:
        ends.setdefault(event.object_id, set()).add(event.type)

    both = [
        object_id
        for object_id, types in ends.items()
        if {"checkout.session.expired", "checkout.session.completed"} <= types
    ]
    assert len(both) == 1
    assert account.expected_status(both[0]) in {"paid", "processing"}


def test_tangles_are_nasty() -> None:
    """A few hundred tangles contain links that changed five times in a second, and every kind of event."""
    tangles = [tangle(seed) for seed in range(300)]

    types = {event.type for account in tangles for event in account.events}
    assert len(types) == 6
    bursts = Counter(
        (number, event.object_id, event.created)
        for number, account in enumerate(tangles)
        for event in account.events
        if event.type == "payment_link.updated"
    )
    assert max(bursts.values()) >= 5
