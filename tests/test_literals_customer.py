"""Customers and their balances: every column, from every version of the object, as literals.

The objects are those of https://docs.stripe.com/api/customers/object, the older names those of Stripe's API upgrades
(https://docs.stripe.com/upgrades): ``account_balance`` is ``balance`` since 2019-10-17.
See stripe-facts sections 2.3 and 11.
"""

from typing import Any

import pytest
from sqlalchemy import Engine

from tests.envelopes import event
from tests.ledger import anomalies, kinds, rows, splits, take_in, take_in_batches
from tests.literals import assert_rows, at

T = 1_700_000_000

# Each value occurs once, so that no column can hold another's by chance.
FULL: dict[str, Any] = {
    "id": "cus_1",
    "object": "customer",
    "address": {"city": "Address City", "country": "DE", "line1": "Address Street 1"},
    "balance": -1101,
    "business_name": "Business Name",
    "cash_balance": {"object": "cash_balance", "available": {"usd": 1102}, "customer": "cus_cash", "livemode": False},
    "created": T + 1,
    "currency": "usd",
    "customer_account": "acct_customer",
    "default_source": "card_1",
    "delinquent": True,
    "description": "A description",
    "discount": None,
    "email": "email@example.com",
    "individual_name": "Individual Name",
    "invoice_credit_balance": {"usd": 1103, "cad": 1104},
    "invoice_prefix": "PREFIX1",
    "invoice_settings": {"default_payment_method": "pm_1", "footer": "A footer"},
    "livemode": False,
    "metadata": {"tier": "gold", "email": "metadata@example.com"},
    "name": "The Name",
    "next_invoice_sequence": 1105,
    "phone": "+15550100",
    "preferred_locales": ["de"],
    "shipping": {"name": "Shipping Name", "phone": "+15550101", "address": {"city": "Shipping City"}},
    "tax_exempt": "none",
    "test_clock": "clock_1",
}
# By a version of 2020: neither a customer account nor the two further names.
IN_2020 = {
    **{key: FULL[key] for key in FULL if key not in {"business_name", "customer_account", "individual_name"}},
    "sources": {"object": "list", "data": [], "has_more": False},
    "subscriptions": {"object": "list", "data": [], "has_more": False},
}
FULL_ROW: dict[str, Any] = {
    "id": "cus_1",
    "email": "email@example.com",
    "name": "The Name",
    "currency": "usd",
    "delinquent": True,
    "deleted": False,
    "test_clock": "clock_1",
    "metadata": {"tier": "gold", "email": "metadata@example.com"},
    "created": at(T + 1),
}


def _customer(customer_id: str, **values: object) -> dict[str, Any]:
    return {
        "id": customer_id,
        "object": "customer",
        "balance": 0,
        "created": T,
        "currency": "usd",
        "delinquent": False,
        "email": "buyer@example.com",
        "metadata": {},
        "name": "Buyer",
        "test_clock": None,
        **values,
    }


def _row(customer_id: str, event_id: str, as_of: int, **values: object) -> dict[str, Any]:
    return {
        "id": customer_id,
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
        **values,
    }


def _balance(customer: str, currency: str, amount: int, event_id: str, as_of: int) -> dict[str, Any]:
    seen = {"event_id": event_id, "as_of": at(as_of)}
    return {"customer": customer, "currency": currency, "amount": amount, **seen}


def _change(event_id: str, customer: str, currency: str, amount: int, ending: int, as_of: int) -> dict[str, Any]:
    seen = {"event_id": event_id, "as_of": at(as_of)}
    return {
        "id": event_id,
        "customer": customer,
        "currency": currency,
        "amount": amount,
        "ending_balance": ending,
        **seen,
    }


# ---- Columns ----


@pytest.mark.parametrize(
    ("version", "about"), [("2026-10-28.endive", FULL), ("2020-08-27", IN_2020)], ids=["endive", "2020"]
)
def test_created(engine: Engine, version: str, about: dict[str, Any]) -> None:
    """A new customer has a row and a balance in the default currency; the first balance is no balance change."""
    take_in(engine, event("evt_1", "customer.created", T + 2, about, version=version))

    seen = {"event_id": "evt_1", "as_of": at(T + 2)}
    assert_rows(
        engine,
        {"customers": [{**FULL_ROW, **seen}], "balances": [_balance("cus_1", "usd", -1101, "evt_1", T + 2)]},
    )
    assert kinds(engine, "cus_1") == ["balance.changed"]
    assert anomalies(engine) == []


def test_updated(engine: Engine) -> None:
    """Every column moves, null is carried, and the balance change is the difference to ``previous_attributes``."""
    moved = {
        "balance": 1211,
        "delinquent": False,
        "email": None,
        "metadata": {"tier": "silver"},
        "name": None,
    }
    take_in(
        engine,
        event("evt_1", "customer.created", T + 2, FULL),
        event("evt_2", "customer.updated", T + 9, {**FULL, **moved}, before={key: FULL[key] for key in moved}),
    )

    seen = {"event_id": "evt_2", "as_of": at(T + 9)}
    columns = {key: value for key, value in moved.items() if key != "balance"}
    assert_rows(
        engine,
        {
            "customers": [{**FULL_ROW, **columns, **seen}],
            "balances": [_balance("cus_1", "usd", 1211, "evt_2", T + 9)],
            # 1211 - -1101
            "balance_changes": [_change("evt_2", "cus_1", "usd", 2312, 1211, T + 9)],
        },
    )
    assert kinds(engine, "cus_1") == ["balance.changed", "balance.changed"]


def test_absent_keys_erase_nothing(engine: Engine) -> None:
    """A later event with nothing but the id (an older version, a redacted copy) leaves every column as it was."""
    take_in(
        engine,
        event("evt_1", "customer.created", T + 2, FULL),
        event("evt_2", "customer.updated", T + 9, {"id": "cus_1", "object": "customer"}, before={}),
    )

    seen = {"event_id": "evt_2", "as_of": at(T + 9)}
    assert_rows(
        engine,
        {"customers": [{**FULL_ROW, **seen}], "balances": [_balance("cus_1", "usd", -1101, "evt_1", T + 2)]},
    )


def test_default_currency_comes_later(engine: Engine) -> None:
    """A balance without a currency has no row (stripe-facts 2.3: the default is set by the first invoice)."""
    start = _customer("cus_1", balance=-2501, currency=None)
    take_in(engine, event("evt_1", "customer.created", T, start))
    assert_rows(engine, {"customers": [_row("cus_1", "evt_1", T, currency=None)]})

    in_euro = _customer("cus_1", balance=-2501, currency="eur")
    less = {**in_euro, "balance": -502}
    take_in(
        engine,
        event("evt_2", "customer.updated", T + 5, in_euro, before={"currency": None}),
        event("evt_3", "customer.updated", T + 9, less, before={"balance": -2501}),
    )
    assert_rows(
        engine,
        {
            "customers": [_row("cus_1", "evt_3", T + 9, currency="eur")],
            "balances": [_balance("cus_1", "eur", -502, "evt_3", T + 9)],
            "balance_changes": [_change("evt_3", "cus_1", "eur", 1999, -502, T + 9)],
        },
    )


def test_default_currency_becomes_another(engine: Engine) -> None:
    """A new default currency gets a balance of its own; the old balance does not move (design rule 9)."""
    start, now = _customer("cus_1", balance=-2501), _customer("cus_1", balance=-502, currency="eur")
    take_in(
        engine,
        event("evt_1", "customer.created", T, start),
        event("evt_2", "customer.updated", T + 9, now, before={"balance": -2501, "currency": "usd"}),
    )

    assert_rows(
        engine,
        {
            "customers": [_row("cus_1", "evt_2", T + 9, currency="eur")],
            "balances": [
                _balance("cus_1", "usd", -2501, "evt_1", T),
                _balance("cus_1", "eur", -502, "evt_2", T + 9),
            ],
        },
    )
    assert kinds(engine, "cus_1") == ["balance.changed"]


Step = tuple[str, int, int]
"""A change of a balance: its currency, and the amounts before and after it."""

IN_DOLLARS = event("evt_1", "customer.created", T, _customer("cus_1", balance=-2501))
IN_EUROS = event(
    "evt_2",
    "customer.updated",
    T + 9,
    _customer("cus_1", balance=-502, currency="eur"),
    before={"balance": -2501, "currency": "usd"},
)
LESS_EUROS = event(
    "evt_3",
    "customer.updated",
    T + 20,
    _customer("cus_1", balance=-402, currency="eur"),
    before={"balance": -502},
)
IN_DOLLARS_AGAIN = event(
    "evt_4",
    "customer.updated",
    T + 30,
    _customer("cus_1", balance=-2401),
    before={"balance": -502, "currency": "eur"},
)
GONE = event("evt_5", "customer.deleted", T + 40, _customer("cus_1", balance=-502, currency="eur"))
NAMED = event(
    "evt_6", "customer.updated", T + 19, _customer("cus_1", balance=-502, currency="eur"), before={"name": "Other"}
)
LISTED = event(
    "obs_1",
    "payfold.customer_balance_transaction.observed",
    T + 50,
    {
        "id": "cbtxn_1",
        "object": "customer_balance_transaction",
        "amount": -502,
        "created": T + 5,
        "currency": "eur",
        "customer": "cus_1",
        "ending_balance": -502,
        "type": "adjustment",
    },
)
WITHOUT_CURRENCY = event("evt_1", "customer.created", T, _customer("cus_1", balance=-2501, currency=None))
WITH_CURRENCY = event(
    "evt_2", "customer.updated", T + 5, _customer("cus_1", balance=-2501, currency="eur"), before={"currency": None}
)
WITH_BALANCE = event(
    "evt_2",
    "customer.updated",
    T + 5,
    _customer("cus_1", balance=-501, currency="eur"),
    before={"currency": None, "balance": 0},
)
NO_BALANCE = event("evt_1", "customer.created", T, _customer("cus_1", balance=0, currency=None))

DOLLARS = ("usd", 0, -2501)
# The events, and what the feed announces of them, however they arrive.
BECOMES: dict[str, tuple[list[bytes], list[Step]]] = {
    "another": ([IN_DOLLARS, IN_EUROS], [DOLLARS]),
    "another, of a customer that is deleted": ([IN_DOLLARS, IN_EUROS, GONE], [DOLLARS]),
    "another, before a name": ([IN_DOLLARS, IN_EUROS, NAMED], [DOLLARS]),
    # The ledger shows that the balance in euros moved, and when.
    "another, and the ledger is read": ([IN_DOLLARS, IN_EUROS, LISTED], [("eur", 0, -502), DOLLARS]),
    "known": ([WITHOUT_CURRENCY, WITH_CURRENCY], [("eur", 0, -2501)]),
    "known as the balance moves": ([NO_BALANCE, WITH_BALANCE], [("eur", 0, -501)]),
}


def _announced(engine: Engine) -> list[Step]:
    """Return the changes of the customer's balances, in their order."""
    found = rows(engine, "SELECT before, after FROM changes WHERE kind = 'balance.changed' ORDER BY seq")
    return [(each["after"]["currency"], each["before"]["amount"], each["after"]["amount"]) for each in found]


@pytest.mark.parametrize("name", BECOMES)
def test_a_currency_announces_no_change(engine: Engine, name: str) -> None:
    """A default currency that becomes another moves no balance, in any arrival and any batches (design rule 9)."""
    history, expected = BECOMES[name]
    for batches in splits(history):
        is_last_first = batches[0] in ([GONE], [NAMED])
        take_in_batches(engine, batches)

        # The first known balance of a customer counts whole: that a currency came between shows only later.
        more = [("eur", 0, -502)] if is_last_first else []
        assert sorted(_announced(engine)) == sorted([*more, *expected]), batches


def test_balance_changes_after_a_new_currency_are_announced(engine: Engine) -> None:
    """In the new currency the changes begin with its former balance, unless the customer was unknown."""
    for batches in splits([IN_DOLLARS, IN_EUROS, LESS_EUROS]):
        take_in_batches(engine, batches)

        began = 0 if batches[0] == [LESS_EUROS] else -502
        assert sorted(_announced(engine)) == [("eur", began, -402), DOLLARS], batches


def test_a_currency_that_comes_back_announces_its_changes(engine: Engine) -> None:
    """-2501 dollars are -2401 when dollars are the default again: that change is the last in the feed."""
    for batches in splits([IN_DOLLARS, IN_EUROS, IN_DOLLARS_AGAIN]):
        take_in_batches(engine, batches)

        found = _announced(engine)
        assert {currency for currency, _, _ in found} == {"usd"}, batches
        assert [before for _, before, _ in found] == [0, *(after for _, _, after in found[:-1])], batches
        assert found[-1][2] == -2401, batches


def test_account_balance(engine: Engine) -> None:
    """Before 2019-10-17 the balance, also in ``previous_attributes``, is called ``account_balance``."""
    about = {key: value for key, value in _customer("cus_1").items() if key != "balance"}
    steps = [(0, None), (-501, 0), (-202, -501)]
    take_in(
        engine,
        *(
            event(
                f"evt_{number}",
                "customer.updated" if number else "customer.created",
                T + number,
                {**about, "account_balance": now},
                before={"account_balance": before} if number else None,
                version="2017-08-15",
            )
            for number, (now, before) in enumerate(steps)
        ),
    )

    assert_rows(
        engine,
        {
            "customers": [_row("cus_1", "evt_2", T + 2)],
            "balances": [_balance("cus_1", "usd", -202, "evt_2", T + 2)],
            "balance_changes": [
                _change("evt_1", "cus_1", "usd", -501, -501, T + 1),
                _change("evt_2", "cus_1", "usd", 299, -202, T + 2),
            ],
        },
    )
    assert kinds(engine, "cus_1") == ["balance.changed", "balance.changed"]


def test_old_and_new_name_of_the_balance(engine: Engine) -> None:
    """Two endpoints of different versions report one balance under two names."""
    old = {key: value for key, value in _customer("cus_1").items() if key != "balance"}
    moved = {**old, "account_balance": -501}
    take_in(
        engine,
        event("evt_1", "customer.created", T, _customer("cus_1", balance=-101)),
        event("evt_2", "customer.updated", T + 5, moved, before={"account_balance": -101}, version="2019-09-09"),
        event("evt_3", "customer.updated", T + 9, _customer("cus_1", balance=-702), before={"balance": -501}),
    )

    assert_rows(
        engine,
        {
            "customers": [_row("cus_1", "evt_3", T + 9)],
            "balances": [_balance("cus_1", "usd", -702, "evt_3", T + 9)],
            "balance_changes": [
                _change("evt_2", "cus_1", "usd", -400, -501, T + 5),
                _change("evt_3", "cus_1", "usd", -201, -702, T + 9),
            ],
        },
    )


def test_empty_list_for_an_empty_object(engine: Engine) -> None:
    """PHP writes an empty object as a list (stripe-facts section 11, copies are not always as sent)."""
    about = _customer("cus_1", balance=-101, metadata=[], address=[], shipping=[], invoice_settings=[])
    take_in(engine, event("evt_1", "customer.created", T, about))

    assert_rows(
        engine,
        {
            "customers": [_row("cus_1", "evt_1", T)],
            "balances": [_balance("cus_1", "usd", -101, "evt_1", T)],
        },
    )


# ---- Order and ranks ----


@pytest.mark.parametrize("arrival", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_one_second(engine: Engine, arrival: tuple[int, ...]) -> None:
    """Three updates of one second are in the order of their ``previous_attributes``, however they arrive."""
    steps = [(-505, 0), (-207, -505), (-909, -207)]
    bodies = [
        event(
            f"evt_{9 - number}", "customer.updated", T + 9, _customer("cus_1", balance=now), before={"balance": before}
        )
        for number, (now, before) in enumerate(steps)
    ]
    take_in(engine, *(bodies[number] for number in arrival))

    assert_rows(
        engine,
        {
            "customers": [_row("cus_1", "evt_7", T + 9)],
            "balances": [_balance("cus_1", "usd", -909, "evt_7", T + 9)],
            "balance_changes": [
                _change("evt_9", "cus_1", "usd", -505, -505, T + 9),
                _change("evt_8", "cus_1", "usd", 298, -207, T + 9),
                _change("evt_7", "cus_1", "usd", -702, -909, T + 9),
            ],
        },
    )
    assert anomalies(engine) == []


def test_one_second_of_metadata(engine: Engine) -> None:
    """``previous_attributes`` lists only the changed keys of a nested object; null means that the key was absent."""
    last = _customer("cus_1", metadata={"a": "1", "b": "2"})
    first = _customer("cus_1", metadata={"a": "1", "c": "3"})
    take_in(
        engine,
        event("evt_1", "customer.updated", T + 9, last, before={"metadata": {"b": None, "c": "3"}}),
        event("evt_2", "customer.updated", T + 9, first, before={"metadata": {"a": None, "c": None}}),
    )

    [row] = rows(engine, "SELECT metadata, event_id FROM customers")
    assert row == {"metadata": {"a": "1", "b": "2"}, "event_id": "evt_1"}
    assert anomalies(engine) == []


def test_late_and_older(engine: Engine) -> None:
    """An update that arrives late changes neither row nor balance, and still gives its balance change."""
    last = _customer("cus_1", balance=-303, delinquent=True, test_clock="clock_2")
    first = _customer("cus_1", balance=-101, delinquent=False, test_clock=None, email="old@example.com")
    take_in(
        engine,
        event("evt_2", "customer.updated", T + 9, last, before={"balance": -101}),
        event("evt_1", "customer.updated", T + 5, first, before={"balance": 0}),
    )

    assert_rows(
        engine,
        {
            "customers": [_row("cus_1", "evt_2", T + 9, delinquent=True, test_clock="clock_2")],
            "balances": [_balance("cus_1", "usd", -303, "evt_2", T + 9)],
            "balance_changes": [
                _change("evt_2", "cus_1", "usd", -202, -303, T + 9),
                _change("evt_1", "cus_1", "usd", -101, -101, T + 5),
            ],
        },
    )
    assert kinds(engine, "cus_1") == ["balance.changed"]


def test_deleted(engine: Engine) -> None:
    """A deletion carries the last full object or a tombstone, and outranks every other event of the customer."""
    whole, stub = _customer("cus_1", balance=-101), _customer("cus_2", balance=-202)
    tombstone = {"id": "cus_2", "object": "customer", "deleted": True}
    late = _customer("cus_1", email="late@example.com", name="Late", delinquent=True)
    del late["balance"]
    take_in(
        engine,
        event("evt_1", "customer.created", T, whole),
        event("evt_2", "customer.deleted", T + 9, whole),
        event("evt_3", "customer.updated", T + 9, late, before={"email": "buyer@example.com"}),
        event("evt_4", "customer.updated", T + 20, late, before={"name": "Buyer"}),
        event("evt_5", "customer.created", T, stub),
        event("evt_6", "customer.deleted", T + 9, tombstone),
    )

    assert_rows(
        engine,
        {
            "customers": [
                _row("cus_1", "evt_2", T + 9, deleted=True),
                _row("cus_2", "evt_6", T + 9, deleted=True),
            ],
            "balances": [
                _balance("cus_1", "usd", -101, "evt_2", T + 9),
                _balance("cus_2", "usd", -202, "evt_5", T),
            ],
        },
    )
    assert kinds(engine, "cus_1") == kinds(engine, "cus_2") == ["balance.changed"]


def test_a_reading_of_a_deleted_customer(engine: Engine) -> None:
    """Reading a deleted customer gives a tombstone, which deletes it as the event would have."""
    take_in(
        engine,
        event("evt_1", "customer.created", T, _customer("cus_1", balance=-101)),
        event(
            "obs_1",
            "payfold.customer.observed",
            T + 9,
            {"id": "cus_1", "object": "customer", "deleted": True},
            version=None,
        ),
    )

    assert_rows(
        engine,
        {
            "customers": [_row("cus_1", "obs_1", T + 9, deleted=True)],
            "balances": [_balance("cus_1", "usd", -101, "evt_1", T)],
        },
    )


def test_deletion_outranks_a_later_balance(engine: Engine) -> None:
    """A balance follows its customer's order of events, in which a deletion comes last (design rules 3 and 4)."""
    about = _customer("cus_1", balance=-101)
    late = _customer("cus_1", balance=-404)
    take_in(
        engine,
        event("evt_1", "customer.created", T, about),
        event("evt_2", "customer.deleted", T + 9, about),
        event("evt_3", "customer.updated", T + 20, late, before={"balance": -101}),
    )

    assert_rows(
        engine,
        {
            "customers": [_row("cus_1", "evt_2", T + 9, deleted=True)],
            "balances": [_balance("cus_1", "usd", -101, "evt_2", T + 9)],
            "balance_changes": [_change("evt_3", "cus_1", "usd", -303, -404, T + 20)],
        },
    )
    assert kinds(engine, "cus_1") == ["balance.changed"]


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("customer.discount.created", {"id": "di_1", "object": "discount", "customer": "cus_1", "start": T}),
    ("customer.source.created", {"id": "card_1", "object": "card", "customer": "cus_1", "name": "Card Name"}),
    ("customer.subscription.updated", {"id": "sub_1", "object": "subscription", "customer": "cus_1"}),
    ("customer.tax_id.created", {"id": "txi_1", "object": "tax_id", "customer": "cus_1", "created": T}),
    (
        "customer_cash_balance_transaction.created",
        {
            "id": "ccsbtxn_1",
            "object": "customer_cash_balance_transaction",
            "net_amount": 500,
            "ending_balance": 500,
            "currency": "usd",
            "customer": "cus_1",
            "type": "funded",
        },
    ),
    ("cash_balance.funds_available", {"object": "cash_balance", "available": {"usd": 500}, "customer": "cus_1"}),
    (
        "billing.credit_balance_transaction.created",
        {"id": "cbtxn_1", "object": "billing.credit_balance_transaction", "type": "credit", "created": T},
    ),
]


def test_other_types_make_no_customer(engine: Engine) -> None:
    """Other types that begin with `customer.`, and the two other ledgers, make no row (stripe-facts 1 and 2.4)."""
    take_in(engine, *(event(f"evt_{number}", kind, T, about) for number, (kind, about) in enumerate(OTHERS)))

    assert_rows(engine, {})


def test_a_customer_that_reports_no_balance(engine: Engine) -> None:
    """A currency without a balance makes no balance row, and neither does a null balance."""
    about = {"object": "customer", "currency": "usd", "livemode": False, "metadata": {}}
    silent, null = {**about, "id": "cus_a"}, {**about, "id": "cus_b", "balance": None}
    take_in(engine, event("evt_a", "customer.created", T, silent), event("evt_b", "customer.created", T, null))

    assert rows(engine, "SELECT id FROM customers ORDER BY id") == [{"id": "cus_a"}, {"id": "cus_b"}]
    assert rows(engine, "SELECT customer FROM balances") == []
