"""One event rendered by several API versions, and its twin."""

from typing import Any

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
    """Dahlia renamed the ui modes; the version before it has all changes of basil."""
    session = render(completed(), "2026-02-25.clover").payload()["data"]["object"]

    assert session["ui_mode"] == "hosted"
    assert session["collected_information"]["shipping_details"]
    assert "shipping_details" not in session
    assert "allowed_payment_method_types" not in session


def test_before_basil() -> None:
    """Before basil shipping details were at the top level; acacia's last month has them in both places."""
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
    """Before basil the amounts were in the buyer's currency, and those of the shop's currency in the conversion."""
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
    """Events have a context since April 2025."""
    event = completed(account="acct_1connected")

    assert event.payload()["context"] == "acct_1connected"
    assert "context" not in render(event, "2025-03-31.basil").payload()


def data_of(shop: Account, kind: str, version: str) -> dict[str, Any]:
    """Return the ``data`` of the last event of a type at *version*."""
    event = [event for event in shop.events if event.type == kind][-1]
    data: dict[str, Any] = render(event, version).payload()["data"]
    return data


def test_invoices_before_basil() -> None:
    """Before basil an invoice had ``paid``, its payment and its subscription as fields of its own."""
    shop = Account(seed=1, payments=True)
    session = shop.open_session(mode="subscription")
    shop.complete(session)
    (intent,) = shop.order_intents(session) or []

    new, old = (data_of(shop, "invoice.paid", version)["object"] for version in ("2026-10-28.endive", "2024-06-20"))

    assert not new.keys() & {"payment_intent", "charge", "paid", "subscription", "total_tax_amounts", "quote"}
    assert not old.keys() & {"parent", "total_taxes", "amount_overpaid", "status_details", "amount_paid_off_stripe"}
    assert (old["paid"], old["payment_intent"], old["charge"]) == (True, intent, shop.charge_of(intent)["id"])
    assert old["subscription"] == shop.session(session)["subscription"]
    updates = [event for event in shop.events if event.type == "invoice.updated"]
    changes = [render(event, "2024-06-20").payload()["data"]["previous_attributes"] for event in updates]
    assert [change.get("payment_intent", "unchanged") for change in changes] == [None, "unchanged"]
    assert [change.get("paid", "unchanged") for change in changes] == ["unchanged", False]
    line = old["lines"]["data"][0]
    assert (line["type"], line["price"]["object"], line["tax_amounts"]) == ("subscription", "price", [])


def test_invoice_tax_before_basil() -> None:
    """Before basil an invoice had the sum of its taxes as ``tax``, and the single ones as ``total_tax_amounts``."""
    shop = Account(seed=1, payments=True)
    shop.create_invoice(shop.create_customer(), 2_000, tax=380)

    old = data_of(shop, "invoice.created", "2024-06-20")["object"]

    assert (old["tax"], old["total"]) == (380, 2_380)
    assert [(tax["amount"], tax["inclusive"]) for tax in old["total_tax_amounts"]] == [(380, False)]


def test_charges_before_basil() -> None:
    """Before basil a charge and a payment intent named their invoice, if they had one."""
    shop = Account(seed=1, payments=True)
    session = shop.open_session(invoice_creation=True)
    shop.complete(session)
    invoice = shop.session(session)["invoice"]

    for kind in ("charge.succeeded", "payment_intent.succeeded"):
        assert data_of(shop, kind, "2025-02-24.acacia")["object"]["invoice"] == invoice
        assert "invoice" not in data_of(shop, kind, "2025-03-31.basil")["object"]
    shop.complete(shop.open_session())
    assert data_of(shop, "charge.succeeded", "2024-06-20")["object"]["invoice"] is None


def test_credit_notes_of_old() -> None:
    """A note had one refund before basil, has its two parts since May 2025, and kinds of refunds since October."""
    shop = Account(seed=1, payments=True)
    invoice = shop.create_invoice(shop.create_customer(currency="usd", balance=-500), 2_000)
    shop.finalize_invoice(invoice)
    shop.issue_credit_note(invoice, 2_000, credit=500)
    mixed = data_of(shop, "credit_note.created", "2025-04-30.basil")["object"]
    assert mixed["type"] == "pre_payment"
    assert not mixed.keys() & {"pre_payment_amount", "post_payment_amount", "customer_account"}

    session = shop.open_session(invoice_creation=True)
    shop.complete(session)
    note = shop.issue_credit_note(shop.session(session)["invoice"], 700, refund=700)
    refund = shop.object("credit_note", note)["refunds"][0]["refund"]

    clover, basil, old = (
        data_of(shop, "credit_note.created", version)["object"]
        for version in ("2025-09-30.clover", "2025-03-31.basil", "2024-06-20")
    )
    assert clover["refunds"] == basil["refunds"] == [{"amount_refunded": 700, "refund": refund}]
    assert clover["post_payment_amount"] == 700
    assert "metadata" not in clover["lines"]["data"][0]
    assert (old["refund"], old["tax_amounts"]) == (refund, [])
    assert not old.keys() & {"refunds", "total_taxes"}
    assert "taxes" not in old["lines"]["data"][0]


def test_keys_of_later_versions() -> None:
    """Older versions lack the keys that later ones added to refunds and portal objects."""
    shop = Account(seed=1, payments=True)
    session = shop.open_session()
    shop.complete(session)
    shop.refund(shop.session(session)["payment_intent"], status="pending")
    shop.create_portal_session(shop.create_customer(), flow="subscription_pause")

    basil = "2025-03-31.basil"
    assert not data_of(shop, "refund.created", basil)["object"].keys() & {
        "pending_reason",
        "customer",
        "payment_method",
    }
    configuration = data_of(shop, "billing_portal.configuration.created", basil)["object"]
    assert "name" not in configuration
    assert "subscription_pause" not in configuration["features"]
    portal = data_of(shop, "billing_portal.session.created", basil)["object"]
    assert "after_expiration" not in portal
    assert not portal["flow"].keys() & {"subscription_pause", "customer_update"}


def test_newer_is_unknown() -> None:
    """An event cannot be rendered by a newer version, since the added values are unknown."""
    with pytest.raises(ValueError, match="older than"):
        render(render(completed(), "2024-06-20"), "2026-10-28.endive")


def test_twin() -> None:
    """A twin differs in its id alone, and the same seed gives the same twin."""
    event = completed()

    other = twin(event, seed=3)

    assert other.id != event.id
    assert other.payload() == event.payload() | {"id": other.id}
    assert twin(event, seed=3) == other
    assert twin(event, seed=4).id != other.id
