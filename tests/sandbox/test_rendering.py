"""One event in the shapes of several API versions, and its twin."""

import pytest

from deploy.sandbox import Account, Event
from deploy.sandbox.rendering import render, twin


def completed(*, presentment: tuple[str, int] | None = None, account: str | None = None) -> Event:
    """Return the completion of a session with shipping."""
    shop = Account(seed=1, account=account)
    session = shop.open_session(amount=2_000, shipping=500, tax=100, presentment=presentment)
    shop.complete(session)
    return shop.events[0]


def test_same_version_is_the_same() -> None:
    """Rendering at the event's own version changes no byte."""
    event = completed(presentment=("sek", 26_000), account="acct_1")

    assert render(event, event.api_version) == event


def test_before_dahlia() -> None:
    """Dahlia renamed the ui modes; everything of basil is in place before it."""
    session = render(completed(), "2026-02-25.clover").payload()["data"]["object"]

    assert session["ui_mode"] == "hosted"
    assert session["collected_information"]["shipping_details"]
    assert "shipping_details" not in session
    assert "allowed_payment_method_types" not in session


def test_before_basil() -> None:
    """Before basil shipping details stood at the top; acacia's last month had them in both places."""
    event = completed()
    details = event.payload()["data"]["object"]["collected_information"]["shipping_details"]

    last = render(event, "2025-02-24.acacia")
    old = render(event, "2024-06-20")

    both, top = (rendered.payload()["data"]["object"] for rendered in (last, old))
    assert both["shipping_details"] == both["collected_information"]["shipping_details"] == details
    assert top["shipping_details"] == details
    assert "collected_information" not in top
    assert old.id == event.id
    assert old.api_version == old.payload()["api_version"] == "2024-06-20"


def test_presentment_before_basil() -> None:
    """Before basil the amounts were the buyer's, and the shop's stood in the conversion."""
    session = render(completed(presentment=("sek", 26_000)), "2024-06-20").payload()["data"]["object"]

    assert "presentment_details" not in session
    assert (session["currency"], session["amount_total"], session["amount_subtotal"]) == ("sek", 26_000, 20_000)
    assert session["total_details"]["amount_shipping"] == 5_000
    assert session["currency_conversion"] == {
        "amount_subtotal": 2_000,
        "amount_total": 2_600,
        "fx_rate": "10",
        "source_currency": "usd",
    }


def test_context_of_connected_accounts() -> None:
    """Events name their context since April 2025."""
    event = completed(account="acct_1connected")

    assert event.payload()["context"] == "acct_1connected"
    assert "context" not in render(event, "2025-03-31.basil").payload()


def test_newer_is_unknown() -> None:
    """What a newer version would add to an old event cannot be known."""
    with pytest.raises(ValueError, match="older than"):
        render(render(completed(), "2024-06-20"), "2026-10-28.endive")


def test_twin() -> None:
    """A twin differs in its id alone, and is the same for the same seed."""
    event = completed()

    other = twin(event, seed=3)

    assert other.id != event.id
    assert other.payload() == event.payload() | {"id": other.id}
    assert twin(event, seed=3) == other
    assert twin(event, seed=4).id != other.id
