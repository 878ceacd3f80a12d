"""Invariants of everything after a sale, checked on seeded tangles, and the fields of Stripe's own types."""

from collections import defaultdict
from types import NoneType
from typing import Any, get_args

import pytest
import stripe
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.sandbox import LATEST, Account
from deploy.sandbox.history import shop_history, stream_shop, tangle
from deploy.sandbox.rendering import render
from deploy.sandbox.samples import _STORIES, sample
from tests.sandbox.test_account import overlay

SEEDS = st.integers(min_value=0, max_value=2**32)
VERSIONS = (LATEST, "2026-02-25.clover", "2025-08-27.basil", "2025-04-30.basil", "2025-02-24.acacia", "2024-06-20")
Snapshots = dict[tuple[str, str], dict[str, Any]]

# Events that change their object without previous_attributes.
WITHOUT_PREVIOUS_ATTRIBUTES = (
    *("charge.succeeded", "charge.failed", "charge.dispute.closed", "charge.dispute.funds_reinstated"),
    *("credit_note.voided", "payment_intent.succeeded", "payment_intent.payment_failed"),
)


def without_nulls(value: Any) -> Any:  # noqa: ANN401 (JSON values)
    """Return a value without its null keys: the overlay gives null for an absent key."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return value


def objects(account: Account, kind: str) -> list[dict[str, Any]]:
    """Return all objects of a kind that were not deleted."""
    found = [account.object(kind, each) for each in account.object_ids(kind)]
    return [each for each in found if not each.get("deleted")]


@pytest.mark.parametrize("version", VERSIONS)
@given(seed=SEEDS)
@settings(max_examples=60)
def test_previous_attributes_chain(version: str, seed: int) -> None:
    """Overlaid on its object, an event's previous_attributes give the previous snapshot, at every version."""
    last: Snapshots = {}
    for event in tangle(seed, money=True, contradictory=False).events:
        data = render(event, version).payload()["data"]
        snapshot = data["object"]
        before = last.get((snapshot["object"], snapshot["id"]))
        if event.type.startswith("checkout.session."):
            continue
        if "previous_attributes" in data:
            assert before is not None
            if event.type == "charge.refund.updated":
                assert snapshot == before  # the legacy twin of the refund.updated before it
                continue
            assert without_nulls(overlay(snapshot, data["previous_attributes"])) == without_nulls(before)
        elif before is not None and event.type not in WITHOUT_PREVIOUS_ATTRIBUTES:
            assert snapshot == before
        last[snapshot["object"], snapshot["id"]] = snapshot


@given(SEEDS)
def test_previous_attributes_are_changes_only(seed: int) -> None:
    """A value in previous_attributes always differs from the present value."""

    def assert_changed(now: dict[str, Any], was: dict[str, Any]) -> None:
        for key, value in was.items():
            assert now.get(key) != value
            if isinstance(value, dict) and isinstance(now[key], dict):
                assert_changed(now[key], value)

    for event in tangle(seed, money=True).events:
        data = event.payload()["data"]
        assert_changed(data["object"], data.get("previous_attributes", {}))


@given(SEEDS)
def test_last_events_carry_the_final_objects(seed: int) -> None:
    """The last event of every object carries it as the account has it, and a deleted object stays deleted."""
    account = tangle(seed, money=True, contradictory=False)
    last: Snapshots = {}
    deleted = set()
    for event in account.events:
        snapshot = event.payload()["data"]["object"]
        last[snapshot["object"], snapshot["id"]] = snapshot
        if event.type.endswith(".deleted"):
            deleted.add(snapshot["id"])

    for (kind, object_id), snapshot in last.items():
        if object_id in deleted:
            assert account.object(kind, object_id) == {"id": object_id, "object": kind, "deleted": True}
        elif kind != "payment_intent":  # its amount changes without an event
            assert account.object(kind, object_id) == snapshot


@given(SEEDS)
def test_balance_chain(seed: int) -> None:
    """Each ledger row continues the row before it, by currency; the customer's balance is the last in its currency."""
    account = tangle(seed, money=True)

    for customer in account.object_ids("customer"):
        running: dict[str, int] = defaultdict(int)
        for row in reversed(account.balance_transactions(customer)):
            running[row["currency"]] += row["amount"]
            assert row["ending_balance"] == running[row["currency"]]
        for currency, balance in running.items():
            assert account.expected_balance(customer, currency) == balance
        current = account.object("customer", customer)
        if "deleted" not in current:
            assert current["balance"] == running[current["currency"] or ""]


@given(SEEDS)
def test_balance_events(seed: int) -> None:
    """Each row in the default currency has one event, in the same order; rows in other currencies have none."""
    account = tangle(seed, money=True)
    reported: dict[str, list[tuple[int, int]]] = defaultdict(list)
    currencies = {}
    for event in account.events:
        data = event.payload()["data"]
        if event.type == "customer.updated" and "balance" in data["previous_attributes"]:
            move = data["previous_attributes"]["balance"], data["object"]["balance"]
            reported[event.object_id].append(move)
        if data["object"]["object"] == "customer":
            currencies[event.object_id] = data["object"]["currency"]

    for customer in account.object_ids("customer"):
        rows = [row for row in reversed(account.balance_transactions(customer)) if row["type"] != "initial"]
        moves = [
            (row["ending_balance"] - row["amount"], row["ending_balance"])
            for row in rows
            if row["currency"] == currencies[customer]
        ]
        assert reported[customer] == moves


@given(SEEDS)
def test_invoice_amounts(seed: int) -> None:
    """In every snapshot due is the total less balance and pre-payment notes, and remaining is due less paid."""
    for event in tangle(seed, money=True).events:
        invoice = event.payload()["data"]["object"]
        if invoice["object"] != "invoice" or invoice["status"] == "draft":
            continue
        applied = invoice["ending_balance"] - invoice["starting_balance"]
        assert invoice["amount_due"] == invoice["total"] - applied - invoice["pre_payment_credit_notes_amount"]
        assert invoice["amount_remaining"] == invoice["amount_due"] - invoice["amount_paid"]
        assert (invoice["amount_remaining"] == 0) == (invoice["status"] == "paid")
        assert invoice["total"] == invoice["subtotal"] + sum(tax["amount"] for tax in invoice["total_taxes"])
        assert len(invoice["lines"]["data"]) <= 10


@given(SEEDS)
def test_credit_note_sums(seed: int) -> None:
    """A note's parts add up to its amount, its destinations to the paid part, and the notes to the invoice's sums."""
    account = tangle(seed, money=True)

    credited: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for note in objects(account, "credit_note"):
        refunded = sum(part["amount_refunded"] for part in note["refunds"])
        to_balance = 0
        if note["customer_balance_transaction"]:
            row = account.object("customer_balance_transaction", note["customer_balance_transaction"])
            assert (row["type"], row["credit_note"]) == ("credit_note", note["id"])
            to_balance = -row["amount"]
        assert note["amount"] == note["pre_payment_amount"] + note["post_payment_amount"]
        assert note["post_payment_amount"] == refunded + (note["out_of_band_amount"] or 0) + to_balance
        lines = account.credit_note_lines(note["id"])
        assert sum(line["amount"] for line in lines) == note["amount"]
        assert (note["lines"]["data"], note["lines"]["has_more"]) == (lines[:10], len(lines) > 10)
        for part in note["refunds"]:
            assert account.object("refund", part["refund"])["amount"] == part["amount_refunded"]
        if note["status"] == "issued":
            credited[note["invoice"]].append(note)
    for invoice in objects(account, "invoice"):
        notes = credited[invoice["id"]]
        for part in ("pre_payment", "post_payment"):
            assert invoice[f"{part}_credit_notes_amount"] == sum(note[f"{part}_amount"] for note in notes)
        assert sum(note["amount"] for note in notes) <= invoice["total"]


@given(SEEDS)
def test_refund_sums(seed: int) -> None:
    """A charge's refunded amount is the sum of its refunds, and may include those that failed."""
    account = tangle(seed, money=True)

    for charge in objects(account, "charge"):
        refunds = [each for each in account.refunds_of(charge["payment_intent"]) if each["charge"] == charge["id"]]
        disputes = [each for each in account.disputes_of(charge["payment_intent"]) if each["charge"] == charge["id"]]
        counting = sum(each["amount"] for each in refunds if each["status"] not in {"failed", "canceled"})
        assert counting <= charge["amount_refunded"] <= min(charge["amount"], sum(each["amount"] for each in refunds))
        assert charge["refunded"] == (charge["amount_refunded"] == charge["amount"] > 0)
        assert charge["disputed"] == bool(disputes)


@given(SEEDS)
def test_order_money(seed: int) -> None:
    """The expected refunds and losses of a paid order are between 0 and its total; those of an unpaid one unknown."""
    account = tangle(seed, money=True)

    for session in map(account.session, account.session_ids()):
        known = account.order_intents(session["id"]) is not None
        refunded, disputed = account.expected_refunded(session["id"]), account.expected_disputed(session["id"])
        assert (refunded is not None) == (disputed is not None) == known
        assert 0 <= (refunded or 0) <= (session["amount_total"] or 0)
        assert 0 <= (disputed or 0) <= (session["amount_total"] or 0)
        credited = account.expected_credited(session["id"])
        assert (credited is None) == (session["invoice"] is None)
        assert 0 <= (credited or 0) <= (session["amount_total"] or 0)


@settings(max_examples=20)
@given(SEEDS)
def test_deterministic(seed: int) -> None:
    """The same seed gives the same bytes, another seed others."""
    assert tangle(seed, money=True).events == tangle(seed, money=True).events
    assert tangle(seed, money=True).events != tangle(seed + 1, money=True).events


@given(SEEDS)
def test_tangles_stay_small(seed: int) -> None:
    """A tangle of money has 3 to 60 events."""
    assert 3 <= len(tangle(seed, money=True).events) <= 60


def test_tangles_are_nasty() -> None:
    """A few hundred tangles contain all types, and five changes of one object within a second."""
    tangles = [tangle(seed, money=True) for seed in range(600)]

    types = {event.type for account in tangles for event in account.events}
    assert types == set(_STORIES)
    for kind in ("customer.updated", "billing_portal.configuration.updated"):
        bursts: dict[tuple[int, str, int], int] = defaultdict(int)
        for number, account in enumerate(tangles):
            for event in account.events:
                bursts[number, event.object_id, event.created] += event.type == kind
        assert max(bursts.values()) >= 5


def test_balances_go_back_and_forth() -> None:
    """Some balance goes from 0 to -500 and back more than once within one second."""
    cycles = 0
    for seed in range(200):
        reported: dict[tuple[str, int], list[int]] = defaultdict(list)
        for event in tangle(seed, money=True).events:
            if event.type == "customer.updated":
                reported[event.object_id, event.created].append(event.payload()["data"]["object"]["balance"])
        cycles += any(balances.count(-500) > 1 and 0 in balances for balances in reported.values())
    assert cycles > 3


@pytest.fixture(scope="module")
def shop() -> Account:
    """A shop of a thousand visits, with the payments, refunds and disputes that follow."""
    return shop_history(seed=5, orders=1_000, money=True)


def test_shop_keeps_its_proportions(shop: Account) -> None:
    """Most sales stay sales; a few are refunded, credited or disputed, in every possible way."""
    sold = [session for session in shop.session_ids() if shop.expected_status(session) == "paid"]
    refunded = [session for session in sold if shop.expected_refunded(session)]

    assert len(sold) > 600
    assert 0.02 < len(refunded) / len(sold) < 0.2
    assert {refund["status"] for refund in objects(shop, "refund")} >= {"succeeded", "failed", "canceled"}
    assert {dispute["status"] for dispute in objects(shop, "dispute")} == {"won", "lost", "warning_closed"}
    assert {"pre_payment", "post_payment"} <= {note["type"] for note in objects(shop, "credit_note")}
    assert {"paid", "void"} <= {invoice["status"] for invoice in objects(shop, "invoice")}
    assert any(shop.expected_credited(session) for session in sold)
    assert any(shop.expected_disputed(session) for session in sold)
    renewed = [each for each in objects(shop, "invoice") if each["billing_reason"] == "subscription_cycle"]
    assert renewed


def test_shops_come_to_their_end() -> None:
    """No payment of a shop is left undecided, and every renewal is paid, by card or by the balance alone."""
    shops = [shop_history(seed, 500, money=True) for seed in (36, 61, 67)]

    for shop in shops:
        assert {refund["status"] for refund in objects(shop, "refund")} <= {"succeeded", "failed", "canceled"}
        assert {dispute["status"] for dispute in objects(shop, "dispute")} <= {"won", "lost", "warning_closed"}
        assert {invoice["status"] for invoice in objects(shop, "invoice")} <= {"paid", "void"}
    renewed = [
        each
        for shop in shops
        for each in objects(shop, "invoice")
        if each["billing_reason"] == "subscription_cycle" and each["total"]
    ]
    assert {bool(invoice["amount_paid"]) for invoice in renewed} == {True, False}


def test_shop_is_deterministic(shop: Account) -> None:
    """The same seed gives the same shop, streamed or in whole, and no object twice."""
    streamed = list(stream_shop(Account(seed=5, payments=True), 5, 1_000))

    assert streamed == shop.events
    assert len({event.id for event in shop.events}) == len(shop.events)


def test_only_changes_before_a_deletion_are_reported_late(shop: Account) -> None:
    """Events are in the order of their seconds, but for customers' changes that are reported after their deletion."""
    now = 0
    for event in shop.events:
        if event.created < now:
            assert event.type == "customer.updated"
            assert shop.object("customer", event.object_id)["deleted"]
        now = max(now, event.created)


@pytest.mark.parametrize("kind", _STORIES)
def test_samples(kind: str) -> None:
    """There is a sample of every type, and overrides change nothing else of it."""
    event = sample(kind, {}, now=1_793_491_200)
    changed = sample(kind, {"metadata.x": "y"}, now=1_793_491_200).payload()["data"]

    assert event.type == kind
    data = event.payload()["data"]
    data["object"].setdefault("metadata", {})["x"] = "y"
    assert changed == data


MODELS: dict[str, Any] = {
    "billing_portal.configuration": stripe.billing_portal.Configuration,
    "billing_portal.session": stripe.billing_portal.Session,
    "charge": stripe.Charge,
    "credit_note": stripe.CreditNote,
    "customer": stripe.Customer,
    "customer_balance_transaction": stripe.CustomerBalanceTransaction,
    "dispute": stripe.Dispute,
    "invoice": stripe.Invoice,
    "invoice_payment": stripe.InvoicePayment,
    "payment_intent": stripe.PaymentIntent,
    "refund": stripe.Refund,
}


@pytest.mark.parametrize("kind", MODELS)
def test_fields_are_those_of_the_sdk(shop: Account, kind: str) -> None:
    """Objects have the fields of Stripe's own types: no unknown ones, and all that are never null."""
    known = {name: type_ for name, type_ in MODELS[kind].__annotations__.items() if name != "OBJECT_NAME"}
    required = {name for name, type_ in known.items() if NoneType not in get_args(type_)}

    for fields in objects(shop, kind)[:200]:
        assert fields.keys() <= known.keys()
        assert required <= fields.keys()
        assert {name for name in required if fields[name] is None} == set()


def test_lines_are_those_of_the_sdk(shop: Account) -> None:
    """Lines of invoices and credit notes have the fields of Stripe's own types."""
    billed = [*objects(shop, "invoice"), *objects(shop, "credit_note")]
    models: dict[str, Any] = {"line_item": stripe.InvoiceLineItem, "credit_note_line_item": stripe.CreditNoteLineItem}

    for line in (line for each in billed for line in each["lines"]["data"]):
        known = {name: type_ for name, type_ in models[line["object"]].__annotations__.items() if name != "OBJECT_NAME"}
        required = {name for name, type_ in known.items() if NoneType not in get_args(type_)}
        assert line.keys() <= known.keys()
        assert required <= line.keys()
