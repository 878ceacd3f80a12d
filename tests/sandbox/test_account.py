"""Sessions and payment links: their transitions, and the events that Stripe sends of them."""

from collections.abc import Callable
from types import NoneType
from typing import Any, get_args

import pytest
import stripe
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.sandbox import Account, Event, ParameterError, SandboxError, TransitionError, UnknownObjectError
from deploy.sandbox.account import previous_attributes
from deploy.sandbox.history import tangle

SEEDS = st.integers(min_value=0, max_value=2**32)


def overlay(snapshot: dict[str, Any], previous: dict[str, Any]) -> dict[str, Any]:
    """Return the object before the change: nested keys are partial, and a null metadata value means absent."""
    before = dict(snapshot)
    for key, value in previous.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            before[key] = overlay(before[key], value)
        else:
            before[key] = value
    if "metadata" in before:
        before["metadata"] = {key: value for key, value in before["metadata"].items() if value is not None}
    return before


def only_event(account: Account) -> Event:
    """Return the one event since the last look."""
    (event,) = account.take_events()
    return event


def test_opening_is_silent() -> None:
    """Stripe sends no event when a session opens."""
    account = Account(seed=1)

    session = account.open_session()

    assert account.events == []
    assert account.expected_status(session) == "open"


def test_paid_at_once() -> None:
    """A completed session is paid, has its payment intent and buyer, and no url any more."""
    account = Account(seed=1)
    session = account.open_session(amount=2_000, discount=500, shipping=300, tax=100)
    assert account.session(session)["payment_intent"] is None

    account.complete(session)

    event = only_event(account)
    snapshot = event.payload()["data"]["object"]
    assert event.type == "checkout.session.completed"
    assert (snapshot["status"], snapshot["payment_status"]) == ("complete", "paid")
    assert (snapshot["amount_subtotal"], snapshot["amount_total"]) == (2_000, 1_900)
    assert snapshot["total_details"] == {"amount_discount": 500, "amount_shipping": 300, "amount_tax": 100}
    assert snapshot["payment_intent"].startswith("pi_3")
    assert snapshot["customer_details"]["email"].partition("@")[2] in {"example.com", "example.org"}
    assert snapshot["collected_information"]["shipping_details"]["address"]["country"]
    assert snapshot["url"] is None
    assert snapshot == account.session(session)
    assert account.expected_status(session) == "paid"


@pytest.mark.parametrize(
    ("act", "payment_status", "truth"),
    [(Account.async_payment_succeeded, "paid", "paid"), (Account.async_payment_failed, "unpaid", "failed")],
)
def test_delayed_payment(act: Callable[[Account, str], None], payment_status: str, truth: str) -> None:
    """A delayed payment is processing until it clears or fails; the failed snapshot equals the unpaid one."""
    account = Account(seed=1)
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    unpaid = only_event(account).payload()["data"]["object"]
    assert account.expected_status(session) == "processing"

    act(account, session)

    snapshot = only_event(account).payload()["data"]["object"]
    assert snapshot == unpaid | {"payment_status": payment_status}
    assert account.expected_status(session) == truth
    with pytest.raises(TransitionError):
        act(account, session)


def test_nothing_due() -> None:
    """A free order completes without a payment intent, and setup mode has no amounts."""
    account = Account(seed=1)
    free = account.open_session(amount=900, discount=900)
    setup = account.open_session(mode="setup")

    account.complete(free)
    account.complete(setup)

    given_away, set_up = (event.payload()["data"]["object"] for event in account.events)
    assert (given_away["payment_status"], given_away["payment_intent"]) == ("no_payment_required", None)
    assert (set_up["amount_total"], set_up["amount_subtotal"], set_up["currency"]) == (None, None, None)
    assert set_up["setup_intent"].startswith("seti_")
    assert account.expected_status(free) == "paid"
    assert account.expected_status(setup) == "complete"


def test_subscription() -> None:
    """A subscription's session names subscription, invoice and customer, and no payment intent."""
    account = Account(seed=1)
    session = account.open_session(mode="subscription")

    account.complete(session)

    snapshot = account.session(session)
    assert snapshot["subscription"].startswith("sub_")
    assert snapshot["invoice"].startswith("in_")
    assert snapshot["customer"].startswith("cus_")
    assert snapshot["payment_intent"] is None


def test_expired_and_recovered() -> None:
    """An expired session keeps its expires_at and has a recovery url, which opens a new session."""
    account = Account(seed=1)
    original = account.open_session(recoverable=True, metadata={"cart": "7"})
    opened = account.session(original)
    assert opened["after_expiration"]["recovery"]["url"] is None
    account.advance(3_600)

    account.expire(original)
    expired = only_event(account).payload()["data"]["object"]
    recovered = account.recover(original)

    assert (expired["status"], expired["payment_status"], expired["url"]) == ("expired", "unpaid", None)
    assert expired["expires_at"] == opened["expires_at"]
    assert expired["after_expiration"]["recovery"]["url"].startswith("https://")
    assert expired["after_expiration"]["recovery"]["expires_at"] == account.now + 30 * 86_400
    again = account.session(recovered)
    assert (again["status"], again["recovered_from"]) == ("open", original)
    assert (again["metadata"], again["amount_total"]) == ({"cart": "7"}, opened["amount_total"])
    assert account.expected_status(original) == "expired"
    assert account.recover(original) != recovered
    account.advance(31 * 86_400)
    with pytest.raises(TransitionError, match="no longer valid"):
        account.recover(original)


def test_expired_by_call_or_timer() -> None:
    """An expiry by the timer has no request in its event, an expiry by a call has one."""
    account = Account(seed=1)
    called, timed = account.open_session(), account.open_session()
    account.expire(called)
    account.advance(86_400)
    account.expire(timed)

    by_call, by_timer = (event.payload()["request"] for event in account.events)

    assert by_call["id"].startswith("req_")
    assert by_timer == {"id": None, "idempotency_key": None}


@pytest.mark.parametrize("end", [Account.complete, Account.expire])
@pytest.mark.parametrize("act", [Account.complete, Account.expire])
def test_terminal(end: Callable[[Account, str], None], act: Callable[[Account, str], None]) -> None:
    """Complete and expired are final: every further transition is refused, without an event."""
    account = Account(seed=1)
    session = account.open_session()
    end(account, session)
    before = account.session(session)

    with pytest.raises(TransitionError, match=f"status of `{before['status']}`"):
        act(account, session)

    assert len(account.events) == 1
    assert account.session(session) == before


def test_refusals() -> None:
    """The sandbox refuses the calls that Stripe refuses, and names the reason."""
    account = Account(seed=1)
    session = account.open_session()
    link = account.create_payment_link()
    account.update_payment_link(link, active=False)

    with pytest.raises(TransitionError, match="cannot complete as no_payment_required"):
        account.complete(session, payment_status="no_payment_required")
    with pytest.raises(TransitionError, match="not active"):
        account.open_session(payment_link=link)
    with pytest.raises(TransitionError, match="expired"):
        account.recover(session)
    with pytest.raises(TransitionError, match="no payment is processing"):
        account.async_payment_succeeded(session)
    for seconds in (1_799, 86_401):
        with pytest.raises(ParameterError):
            account.open_session(expires_in=seconds)
    with pytest.raises(ParameterError):
        account.open_session(amount=5, discount=6)
    with pytest.raises(ParameterError):
        account.advance(-1)
    with pytest.raises(UnknownObjectError, match="No such checkout"):
        account.complete("cs_test_unknown")
    with pytest.raises(UnknownObjectError, match="No such payment_link"):
        account.payment_link("plink_unknown")
    account.advance(86_401)
    with pytest.raises(SandboxError, match="can only expire"):
        account.complete(session)


def test_contradiction() -> None:
    """Any event can be emitted; that does not change the account's objects."""
    account = Account(seed=1)
    session = account.open_session()
    account.complete(session)

    snapshot = account.session(session) | {"status": "expired"}
    event = account.emit("checkout.session.expired", snapshot, created=account.now - 1)

    assert account.events[-1] == event
    assert (event.created, event.object_id) == (account.now - 1, session)
    assert account.expected_status(session) == "paid"


def test_sold_by_link() -> None:
    """A session of a link has the link's price and metadata, and names the link."""
    account = Account(seed=1)
    link = account.create_payment_link(currency="jpy", amount=3_000, metadata={"campaign": "spring"})

    session = account.session(account.open_session(payment_link=link, metadata={"visit": "1"}))

    assert (session["payment_link"], session["currency"], session["amount_total"]) == (link, "jpy", 3_000)
    assert session["metadata"] == {"campaign": "spring", "visit": "1"}


def test_link_updates() -> None:
    """previous_attributes has only the keys that an update changed, also of metadata; a new key was null before."""
    account = Account(seed=1)
    link = account.create_payment_link(metadata={"kept": "1", "changed": "2", "removed": "3"})
    assert only_event(account).type == "payment_link.created"

    account.update_payment_link(link, active=False, metadata={"changed": "4", "removed": None, "added": "5"})

    data = only_event(account).payload()["data"]
    assert data["previous_attributes"] == {
        "active": True,
        "metadata": {"added": None, "changed": "2", "removed": "3"},
    }
    assert data["object"]["metadata"] == {"kept": "1", "changed": "4", "added": "5"}
    account.update_payment_link(link, active=False)
    assert account.events == []


def test_previous_attributes_of_arrays_and_nulls() -> None:
    """previous_attributes has an array in whole, and null for an object that was null."""
    before = {"list": [1, 2], "none": None, "deep": {"kept": 1, "deeper": {"changed": 1}}, "same": [3]}
    after = {"list": [1], "none": {"a": 1}, "deep": {"kept": 1, "deeper": {"changed": 2}}, "same": [3]}

    previous = previous_attributes(before, after)

    assert previous == {"list": [1, 2], "none": None, "deep": {"deeper": {"changed": 1}}}


@given(SEEDS)
def test_previous_attributes_chain(seed: int) -> None:
    """Overlaid on its object, an update's previous_attributes give the object of the previous event."""
    last: dict[str, dict[str, Any]] = {}
    for event in tangle(seed).events:
        if not event.type.startswith("payment_link."):
            continue
        data = event.payload()["data"]
        if event.object_id in last:
            assert overlay(data["object"], data["previous_attributes"]) == last[event.object_id]
        else:
            assert "previous_attributes" not in data
        last[event.object_id] = data["object"]


@given(SEEDS)
def test_amounts_add_up(seed: int) -> None:
    """A session's total is its subtotal less the discount, with shipping and tax."""
    account = tangle(seed)
    for session in map(account.session, account.session_ids()):
        if session["mode"] == "setup":
            continue
        details = session["total_details"]
        extras = details["amount_shipping"] + details["amount_tax"] - details["amount_discount"]
        assert session["amount_total"] == session["amount_subtotal"] + extras


@settings(max_examples=20)
@given(SEEDS)
def test_deterministic(seed: int) -> None:
    """The same seed gives the same bytes, another seed others."""
    assert tangle(seed).events == tangle(seed).events
    assert tangle(seed).events != tangle(seed + 1).events


def test_fields_are_those_of_the_sdk() -> None:
    """Objects have the fields of Stripe's own types: no unknown ones, and all that are never null."""
    account = Account(seed=1)
    session = account.open_session(presentment=("sek", 22_000))
    account.complete(session)
    link = account.create_payment_link()
    absent_when_hosted = {"redirect_on_completion"}

    for fields, model in (
        (account.session(session), stripe.checkout.Session),
        (account.payment_link(link), stripe.PaymentLink),
    ):
        known = {name: kind for name, kind in model.__annotations__.items() if name != "OBJECT_NAME"}
        required = {name for name, kind in known.items() if NoneType not in get_args(kind)} - absent_when_hosted
        assert fields.keys() <= known.keys()
        assert required <= fields.keys()
        assert "line_items" not in fields
        never_null = {name for name in required if fields[name] is None}
        assert never_null == set()


@pytest.mark.parametrize(("livemode", "kind"), [(True, "live"), (False, "test")])
def test_envelope(livemode: bool, kind: str) -> None:  # noqa: FBT001 (pytest passes by name)
    """The envelope has Stripe's keys in Stripe's layout, and agrees with the attributes of the event."""
    account = Account(seed=1, livemode=livemode, account="acct_1connected")
    session = account.open_session()
    account.complete(session)
    event = account.events[0]

    payload = event.payload()

    assert list(payload) == [
        *("id", "object", "account", "api_version", "context", "created", "data"),
        *("livemode", "pending_webhooks", "request", "type"),
    ]
    assert (payload["id"], payload["type"], payload["created"]) == (event.id, event.type, event.created)
    assert (payload["livemode"], payload["account"]) == (livemode, "acct_1connected")
    assert payload["api_version"] == event.api_version == "2026-10-28.endive"
    assert event.body.startswith(b'{\n  "id": "evt_1')
    assert event.object_id == session
    assert session.startswith(f"cs_{kind}_a1")
    assert len(session.removeprefix(f"cs_{kind}_")) == 58
    assert b'"account"' not in _event_of_own_account().body


def _event_of_own_account() -> Event:
    account = Account(seed=1)
    account.create_payment_link()
    return account.events[0]


def test_returned_objects_are_copies() -> None:
    """Changing an object that the account returned does not change the account."""
    account = Account(seed=1)
    session = account.open_session()
    account.session(session)["invoice_creation"]["invoice_data"]["metadata"]["x"] = "y"

    assert account.session(session)["invoice_creation"]["invoice_data"]["metadata"] == {}
