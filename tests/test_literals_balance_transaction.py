"""The credit ledger: every column, and the balances that it decides, as literals.

The objects are those of https://docs.stripe.com/api/customer_balance_transactions/object; no event carries them, so
they come as observations of what Stripe's list answered, ``created`` being when (stripe-facts sections 1 and 2.4).
"""

from typing import Any

import pytest
from sqlalchemy import Engine

from tests.envelopes import event
from tests.ledger import anomalies, kinds, rows, take_in
from tests.literals import assert_rows, at

T = 1_700_000_000

FULL: dict[str, Any] = {
    "id": "cbtxn_1",
    "object": "customer_balance_transaction",
    "amount": -701,
    "checkout_session": "cs_1",
    "created": T + 5,
    "credit_note": "cn_1",
    "currency": "cad",
    "customer": "cus_1",
    "customer_account": "acct_customer",
    "description": "A description",
    "ending_balance": -1902,
    "invoice": "in_1",
    "livemode": False,
    "metadata": {"checkout_session": "cs_metadata", "order_id": "6735"},
    "type": "adjustment",
}
FULL_ROW: dict[str, Any] = {
    "id": "cbtxn_1",
    "customer": "cus_1",
    "currency": "cad",
    "type": "adjustment",
    "amount": -701,
    "ending_balance": -1902,
    "invoice": "in_1",
    "credit_note": "cn_1",
    "order_id": "cs_1",
    "description": "A description",
    "created": at(T + 5),
}


def _observed(event_id: str, read: int, about: dict[str, Any]) -> bytes:
    return event(event_id, "payfold.customer_balance_transaction.observed", read, about, version=None)


def _entry(number: int, amount: int, ending: int, currency: str = "cad", **values: object) -> dict[str, Any]:
    return {
        "id": f"cbtxn_{number}",
        "object": "customer_balance_transaction",
        "amount": amount,
        "checkout_session": None,
        "created": T + number,
        "credit_note": None,
        "currency": currency,
        "customer": "cus_1",
        "description": None,
        "ending_balance": ending,
        "invoice": None,
        "type": "adjustment",
        **values,
    }


def _row(
    number: int, amount: int, ending: int, event_id: str, as_of: int, currency: str = "cad", **values: object
) -> dict[str, Any]:
    return {
        "id": f"cbtxn_{number}",
        "customer": "cus_1",
        "currency": currency,
        "type": "adjustment",
        "amount": amount,
        "ending_balance": ending,
        "invoice": None,
        "credit_note": None,
        "order_id": None,
        "description": None,
        "created": at(T + number),
        "event_id": event_id,
        "as_of": at(as_of),
        **values,
    }


def _balance(currency: str, amount: int, event_id: str, as_of: int) -> dict[str, Any]:
    seen = {"event_id": event_id, "as_of": at(as_of)}
    return {"customer": "cus_1", "currency": currency, "amount": amount, **seen}


# ---- Columns ----

EXPANDED: dict[str, Any] = {
    **FULL,
    "checkout_session": {"id": "cs_1", "object": "checkout.session", "amount_total": 11},
    "credit_note": {"id": "cn_1", "object": "credit_note", "amount": 12},
    "customer": {"id": "cus_1", "object": "customer", "balance": 13},
    "invoice": {"id": "in_1", "object": "invoice", "total": 14},
}
# Before basil (2025-03-31) a transaction named no session, and before 2025-11 no account that is a customer.
BEFORE_BASIL = {key: FULL[key] for key in FULL if key not in {"checkout_session", "customer_account"}}


@pytest.mark.parametrize(
    ("about", "row"),
    [
        pytest.param(FULL, FULL_ROW, id="ids"),
        pytest.param(EXPANDED, FULL_ROW, id="expanded"),
        pytest.param(BEFORE_BASIL, {**FULL_ROW, "order_id": None}, id="before basil"),
    ],
)
def test_columns(engine: Engine, about: dict[str, Any], row: dict[str, Any]) -> None:
    """Each field has its column, and the balance of the currency is the transaction's ending balance."""
    take_in(engine, _observed("obs_1", T + 50, about))

    seen = {"event_id": "obs_1", "as_of": at(T + 50)}
    assert_rows(
        engine,
        {"balance_transactions": [{**row, **seen}], "balances": [_balance("cad", -1902, "obs_1", T + 50)]},
    )
    assert kinds(engine, "cus_1") == ["balance.changed"]


def test_description_is_edited(engine: Engine) -> None:
    """Only description and metadata of a transaction may change (stripe-facts 2.4)."""
    take_in(
        engine,
        _observed("obs_1", T + 50, FULL),
        _observed("obs_2", T + 60, {**FULL, "description": "Another"}),
    )

    [row] = [{**FULL_ROW, "description": "Another", "event_id": "obs_2", "as_of": at(T + 60)}]
    # The same entry read again: the balance did not move.
    assert_rows(
        engine,
        {"balance_transactions": [row], "balances": [_balance("cad", -1902, "obs_2", T + 60)]},
    )
    assert kinds(engine, "cus_1") == ["balance.changed"]


TYPES = (
    "adjustment",
    "applied_to_invoice",
    "checkout_session_subscription_payment",
    "checkout_session_subscription_payment_canceled",
    "credit_note",
    "initial",
    "invoice_overpaid",
    "invoice_too_large",
    "invoice_too_small",
    "migration",
    "unapplied_from_invoice",
    "unspent_receiver_credit",
    "a_type_to_come",
)


def test_types(engine: Engine) -> None:
    """A transaction keeps its type as Stripe names it, also an unknown one."""
    entries = [_entry(number, -1, -number, type=kind) for number, kind in enumerate(TYPES, 1)]
    take_in(engine, *(_observed(f"obs_{number}", T + 50, entry) for number, entry in enumerate(entries, 1)))

    assert_rows(
        engine,
        {
            "balance_transactions": [
                _row(number, -1, -number, f"obs_{number}", T + 50, type=kind) for number, kind in enumerate(TYPES, 1)
            ],
            "balances": [_balance("cad", -13, "obs_13", T + 50)],
        },
    )
    assert anomalies(engine) == []


# ---- Balances ----

CUSTOMER: dict[str, Any] = {
    "id": "cus_1",
    "object": "customer",
    "balance": -303,
    "created": T,
    "currency": "usd",
    "delinquent": False,
    "email": "buyer@example.com",
    "metadata": {},
    "name": "Buyer",
    "test_clock": None,
}


def _customer_row(event_id: str, as_of: int) -> dict[str, Any]:
    return {
        "id": "cus_1",
        "email": "buyer@example.com",
        "name": "Buyer",
        "currency": "usd",
        "delinquent": False,
        "deleted": False,
        "test_clock": None,
        "metadata": {},
        "created": at(T),
        "event_id": event_id,
        "as_of": at(as_of),
    }


@pytest.mark.parametrize("arrival", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_each_currency_its_own(engine: Engine, arrival: tuple[int, ...]) -> None:
    """One read of two other currencies: each balance is where its chain ends, the default one the customer's."""
    bodies = [
        event("evt_1", "customer.created", T, CUSTOMER),
        _observed("obs_1", T + 50, _entry(1, -701, -701)),
        _observed("obs_2", T + 50, _entry(2, 202, -499)),
        _observed("obs_3", T + 50, _entry(3, -44, -44, "eur")),
    ]
    take_in(engine, *(bodies[number] for number in arrival))

    assert_rows(
        engine,
        {
            "customers": [_customer_row("evt_1", T)],
            "balance_transactions": [
                _row(1, -701, -701, "obs_1", T + 50),
                _row(2, 202, -499, "obs_2", T + 50),
                _row(3, -44, -44, "obs_3", T + 50, "eur"),
            ],
            "balances": [
                _balance("usd", -303, "evt_1", T),
                _balance("cad", -499, "obs_2", T + 50),
                _balance("eur", -44, "obs_3", T + 50),
            ],
        },
    )
    assert anomalies(engine) == []


def test_a_later_read_goes_on(engine: Engine) -> None:
    """A later read moves the balance, and an older read that arrives after it does not."""
    take_in(
        engine,
        _observed("obs_2", T + 60, _entry(2, 202, -499)),
        _observed("obs_1", T + 50, _entry(1, -701, -701)),
    )

    assert_rows(
        engine,
        {
            "balance_transactions": [_row(2, 202, -499, "obs_2", T + 60), _row(1, -701, -701, "obs_1", T + 50)],
            "balances": [_balance("cad", -499, "obs_2", T + 60)],
        },
    )
    assert kinds(engine, "cus_1") == ["balance.changed"]


@pytest.mark.parametrize(
    ("read", "ending", "found"),
    [
        pytest.param(T + 10, -303, [], id="agree"),
        pytest.param(T + 10, -404, ["balance_differs"], id="read after, differ"),
        pytest.param(T + 9, -404, ["balance_differs"], id="read in that second, differ"),
        pytest.param(T + 8, -404, [], id="read before, differ"),
    ],
)
def test_default_currency_is_the_customers(engine: Engine, read: int, ending: int, found: list[str]) -> None:
    """The customer decides the default currency; a ledger that was read no earlier and differs is an anomaly."""
    take_in(
        engine,
        event("evt_1", "customer.created", T + 9, CUSTOMER),
        _observed("obs_1", read, _entry(1, ending, ending, "usd")),
    )

    assert_rows(
        engine,
        {
            "customers": [_customer_row("evt_1", T + 9)],
            "balance_transactions": [_row(1, ending, ending, "obs_1", read, "usd")],
            "balances": [_balance("usd", -303, "evt_1", T + 9)],
        },
    )
    assert anomalies(engine) == found
    assert kinds(engine, "cus_1") == ["balance.changed"]


def test_a_currency_that_is_the_default_no_more(engine: Engine) -> None:
    """Once the customer's events report another currency, a later read of the ledger decides the old one (rule 9)."""
    take_in(
        engine,
        event("evt_1", "customer.created", T, CUSTOMER),
        event(
            "evt_2",
            "customer.updated",
            T + 9,
            {**CUSTOMER, "balance": 0, "currency": "eur"},
            before={"balance": -303, "currency": "usd"},
        ),
        _observed("obs_1", T + 50, _entry(1, -303, -303, "usd")),
        _observed("obs_2", T + 50, _entry(2, -101, -404, "usd")),
    )

    found = rows(engine, "SELECT currency, amount, event_id FROM balances ORDER BY currency")
    assert [tuple(row.values()) for row in found] == [("eur", 0, "evt_2"), ("usd", -404, "obs_2")]
