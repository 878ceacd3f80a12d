"""Objects with the keys of older API versions, and deleted invoices.

Sources: https://docs.stripe.com/upgrades (2018-11-08, 2019-10-17, 2025-03-31), https://docs.stripe.com/api/invoices/delete
and the objects' own pages.
"""

from itertools import permutations
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from tests import ledger
from tests.literals import at

T = 1_500_000_000


def event(number: int, kind: str, of: dict[str, Any], previous: dict[str, Any] | None = None, *, t: int = T) -> bytes:
    """Return an event as Stripe writes it."""
    data = {"object": of} | ({} if previous is None else {"previous_attributes": previous})
    return msgspec.json.encode({"id": f"evt_{number}", "object": "event", "type": kind, "created": t, "data": data})


def invoice(name: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
    """Return an invoice with only *fields*."""
    return {"id": name, "object": "invoice", "currency": "usd", **fields}


def test_account_balance(engine: Engine) -> None:
    """Before 2019-10-17 a customer's balance was its account_balance, also in previous_attributes, in any order."""
    bodies = []
    for number, order in enumerate(permutations(range(3))):
        cus = {"id": f"cus_{number}", "object": "customer", "email": "buyer@example.com"}
        history = [
            event(10 * number, "customer.created", {**cus, "account_balance": 0, "currency": None}),
            event(
                10 * number + 1,
                "customer.updated",
                {**cus, "account_balance": -500, "currency": "usd"},
                {"account_balance": 0, "currency": None},
                t=T + 10,
            ),
            event(
                10 * number + 2,
                "customer.updated",
                {**cus, "account_balance": -200, "currency": "usd"},
                {"account_balance": -500},
                t=T + 20,
            ),
        ]
        bodies += [history[index] for index in order]
    ledger.take_in(engine, *bodies)

    balances = ledger.rows(engine, "SELECT currency, amount, count(*) FROM balances GROUP BY 1, 2")
    changes = ledger.rows(
        engine, "SELECT amount, ending_balance, count(*) FROM balance_changes GROUP BY 1, 2 ORDER BY amount"
    )
    assert balances == [{"currency": "usd", "amount": -200, "count": 6}]
    assert changes == [
        {"amount": -500, "ending_balance": -500, "count": 6},
        {"amount": 300, "ending_balance": -200, "count": 6},
    ]


def test_account_balance_in_a_busy_second(engine: Engine) -> None:
    """Steps of account_balance within one second are ordered as those of balance, independent of their ids."""
    cus = {"id": "cus_1", "object": "customer", "currency": "usd"}
    ledger.take_in(
        engine,
        event(1, "customer.created", {**cus, "account_balance": 0}),
        event(9, "customer.updated", {**cus, "account_balance": -500}, {"account_balance": 0}, t=T + 9),
        event(8, "customer.updated", {**cus, "account_balance": -300}, {"account_balance": -500}, t=T + 9),
        event(7, "customer.updated", {**cus, "account_balance": -100}, {"account_balance": -300}, t=T + 9),
    )

    assert ledger.rows(engine, "SELECT amount, event_id FROM balances") == [{"amount": -100, "event_id": "evt_7"}]
    assert ledger.anomalies(engine) == []


STATUSES_OF_2015 = {
    "paid": ({"paid": True, "closed": True, "forgiven": False, "attempted": True}, "paid"),
    "forgiven": ({"paid": False, "closed": True, "forgiven": True, "attempted": True}, "uncollectible"),
    "attempted": ({"paid": False, "closed": False, "forgiven": False, "attempted": True}, "open"),
    "closed": ({"paid": False, "closed": True, "forgiven": False, "attempted": True}, None),
    "fresh": ({"paid": False, "closed": False, "forgiven": False, "attempted": False}, None),
}


def test_invoices_of_2015(engine: Engine) -> None:
    """Before 2018-11-08 an invoice had no status, and `date` for `created`: its certain values are kept."""
    ledger.take_in(
        engine,
        *(
            event(number, "invoice.updated", invoice(f"in_{name}", date=T - 5, total=900, amount_due=700, **flags), {})
            for number, (name, (flags, _)) in enumerate(STATUSES_OF_2015.items())
        ),
    )

    rows = ledger.rows(engine, "SELECT id, status, created, total, amount_due, amount_paid, paid_at FROM invoices")
    assert {row["id"]: row["status"] for row in rows} == {
        f"in_{name}": status for name, (_, status) in STATUSES_OF_2015.items()
    }
    assert {(row["created"], row["total"], row["amount_due"], row["amount_paid"]) for row in rows} == {
        (at(T - 5), 900, 700, None)
    }
    assert {row["id"]: row["paid_at"] for row in rows if row["paid_at"] is not None} == {"in_paid": at(T)}
    doubts = ledger.rows(engine, "SELECT subject_id, kind FROM anomalies WHERE resolved_at IS NULL ORDER BY 1")
    assert doubts == [{"subject_id": f"in_{name}", "kind": "unknown_status"} for name in ("closed", "fresh")]


def test_an_invoice_names_its_payment(engine: Engine) -> None:
    """Before basil an invoice's own intent and charge are its payment, in any state and order of arrival."""
    draft = invoice("in_1", status="draft", amount_paid=0, payment_intent=None, charge=None)
    finalized = {**draft, "status": "open", "payment_intent": "pi_1"}
    paid = {**finalized, "status": "paid", "charge": {"id": "ch_1", "object": "charge"}, "amount_paid": 900}
    history = [
        event(1, "invoice.created", draft),
        event(2, "invoice.finalized", finalized, {"status": "draft", "payment_intent": None}, t=T + 1),
        event(3, "invoice.paid", paid, {"status": "open", "charge": None, "amount_paid": 0}, t=T + 2),
        event(4, "invoice.updated", invoice("in_2", status="void", charge="ch_2", amount_paid=0), t=T),
        event(5, "invoice.paid", invoice("in_3", status="paid", payment_intent="pi_3", paid_out_of_band=True), t=T),
        event(6, "invoice.paid", invoice("in_4", status="paid", amount_paid=0, charge=None), t=T),
    ]
    wanted = [
        ("in_1", "in_1", "pi_1", "ch_1", "paid", "usd", 900, at(T + 2)),
        ("in_2", "in_2", None, "ch_2", "canceled", "usd", 0, None),
        ("in_3", "in_3", "pi_3", None, None, "usd", None, None),
    ]
    for order in ((0, 1, 2, 3, 4, 5), (5, 2, 1, 0, 4, 3), (2, 0, 3, 1, 5, 4)):
        ledger.clear(engine)
        ledger.take_in(engine, *(history[index] for index in order))
        rows = ledger.rows(
            engine,
            "SELECT id, invoice, payment_intent, charge, status, currency, amount_paid, paid_at"
            " FROM invoice_payments ORDER BY id",
        )
        assert [tuple(row.values()) for row in rows] == wanted


@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
def test_an_invoice_with_two_attempts(engine: Engine, order: tuple[int, ...]) -> None:
    """Each attempt has a charge of its own: the last one pays, and two charges are no contradiction."""
    tried = invoice("in_1", status="open", amount_paid=0, payment_intent="pi_1", charge="ch_1")
    paid = {**tried, "status": "paid", "amount_paid": 900, "charge": "ch_3"}
    history = [
        event(1, "invoice.payment_failed", tried, t=T + 1),
        event(2, "invoice.payment_failed", {**tried, "charge": "ch_2"}, t=T + 2),
        event(3, "invoice.paid", paid, t=T + 3),
    ]
    ledger.take_in(engine, *(history[index] for index in order))

    assert ledger.rows(engine, "SELECT charge, status FROM invoice_payments") == [{"charge": "ch_3", "status": "paid"}]
    assert ledger.anomalies(engine) == []


@pytest.mark.parametrize("draft_first", [True, False], ids=["in order", "deleted first"])
def test_a_deleted_draft(engine: Engine, *, draft_first: bool) -> None:
    """A deleted draft is marked so, and no later event makes it due again; only drafts can be deleted."""
    draft = invoice("in_1", status="draft", total=900, amount_due=900)
    history = [
        event(1, "invoice.created", draft),
        event(2, "invoice.deleted", draft, t=T + 10),
        event(3, "invoice.updated", draft, {"total": 800}, t=T + 10),
    ]
    ledger.take_in(engine, *(history if draft_first else reversed(history)))
    ledger.take_in(
        engine,
        event(4, "invoice.paid", invoice("in_2", status="paid")),
        event(5, "invoice.deleted", invoice("in_2", status="paid"), t=T + 1),
        event(6, "invoice.deleted", {"id": "in_3", "object": "invoice", "deleted": True}),
    )

    rows = ledger.rows(engine, "SELECT id, deleted, event_id FROM invoices ORDER BY id")
    assert [tuple(row.values()) for row in rows] == [
        ("in_1", True, "evt_2"),
        ("in_2", True, "evt_5"),
        ("in_3", True, "evt_6"),
    ]
    doubts = ledger.rows(engine, "SELECT subject_id, kind FROM anomalies WHERE resolved_at IS NULL ORDER BY 1, 2")
    assert doubts == [{"subject_id": "in_2", "kind": "deleted_and_final"}]
    last = ledger.rows(engine, "SELECT after FROM changes WHERE subject_id = 'in_1' ORDER BY seq DESC LIMIT 1")
    assert last[0]["after"]["deleted"] is True
