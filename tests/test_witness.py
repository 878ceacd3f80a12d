"""An independent reading, from Stripe's documentation, states every column as the folds have it."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from schemas import tables
from tests import envelopes, ledger
from tests.shapes_of_objects import SHAPES, Body, Chance
from worker.proof import witness
from worker.proof.witness import Statement

ROUNDS: Final = 3
"""How many objects of each shape the property test folds with one event each, and how many with two."""
STATE: Final = ("status", "payment_status", "captured", "refunded", "status_transitions", "voided_at", "finalized_at")
"""Fields that order the events of an object before their times do, or date its state."""
NOT_FOLDED: Final = {("charge", "refunds"), ("invoice", "invoice_payments")}
"""Lists within an object of which the folds make no rows: delete a line once they do."""

T: Final = 1_700_000_000
AT_T: Final = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
Key: TypeAlias = tuple[str, str, str]

# ---- All columns ----


def test_every_column_is_mapped_or_excepted() -> None:
    """The map and its exceptions together name each column of the projections except the keys exactly once."""
    every = {
        (table.name, column.name)
        for table in tables.PROJECTIONS
        for column in table.columns
        if column.name not in table.primary_key.columns
    }
    mapped = [(each.table, each.column) for each in witness.MAP]

    assert len(mapped) == len(set(mapped))
    assert not set(mapped) & set(witness.EXCEPTIONS)
    assert set(mapped) | set(witness.EXCEPTIONS) == every


def test_every_line_has_its_source_and_every_exception_its_reason() -> None:
    """A line of the map cites Stripe's documentation, an exception is explained by a sentence."""
    assert all(each.source.startswith("https://docs.stripe.com/") and each.paths for each in witness.MAP)
    assert {each.table for each in witness.LISTED} == {each.table for each in witness.MAP}
    for reason in witness.EXCEPTIONS.values():
        assert reason[0].isupper()
        assert reason.endswith(".")
        assert len(reason.split()) > 5


# ---- Agreement with the folds ----


def _key(statement: Statement) -> Key:
    return statement.table, statement.id, statement.currency


def _rows_at_rest(engine: Engine) -> dict[Key, dict[str, Any]]:
    """Return every row of every projection table by its key."""
    return {
        (table.name, row["customer"], row["currency"]) if table is tables.balances else (table.name, row["id"], ""): row
        for table in tables.PROJECTIONS
        for row in ledger.rows(engine, f"SELECT * FROM {table.name}")  # noqa: S608 - our own tables' names
    }


def _folded(engine: Engine, events: list[tuple[str, str | None, Body]]) -> dict[Key, dict[str, Any]]:
    """Fold one event for each type, version and object of *events*, and return the rows at rest."""
    bodies = [
        envelopes.event(f"evt_{number}", type_, T + number, body, version=version)
        for number, (type_, version, body) in enumerate(events)
    ]
    ledger.clear(engine)
    ledger.record(engine, map(ledger.delivery, bodies))
    ledger.fold(engine)
    assert not ledger.rows(engine, "SELECT type, reason FROM events WHERE state <> 'folded'")
    return _rows_at_rest(engine)


def _changed(before: Body, after: Body) -> Body:
    """Return *after* as the same object in the same state as *before*."""
    return {**after, **{key: before[key] for key in ("id", *STATE) if key in before}}


@settings(
    max_examples=2, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_a_row_is_what_its_object_states(engine: Engine, seed: int) -> None:
    """A row has the columns that the witness states for its object, of any type and version, by one event or two.

    The second event of the same state overwrites the first.
    """
    chance = Chance(seed)
    alone = [shape(chance) for _ in range(ROUNDS) for shape in SHAPES]
    first = [(shape, shape(chance)) for _ in range(ROUNDS) for shape in SHAPES]
    later = [(type_, version, _changed(body, shape(chance)[2])) for shape, (type_, version, body) in first]
    rows = _folded(engine, alone + [event for _, event in first] + later)

    for type_, _, body in alone + later:
        for statement in witness.statements(body):
            row = rows.get(_key(statement))
            if (body["object"], statement.table) in NOT_FOLDED:
                assert row is None
            else:
                assert row is not None
                assert {name: row[name] for name in statement.columns} == statement.columns, (type_, statement.id)


def test_the_objects_at_random_have_every_column() -> None:
    """Each column has a value in some random object, so that no column goes uncompared."""
    chance = Chance(0)
    stated = {
        (statement.table, name)
        for _ in range(30)
        for shape in SHAPES
        for statement in witness.statements(shape(chance)[2])
        for name, value in statement.columns.items()
        if value is not None
    }
    assert stated == {(each.table, each.column) for each in witness.MAP}


def test_no_custom_feedback_options_are_an_empty_list(engine: Engine) -> None:
    """`subscription_cancel.cancellation_reason.feedback_options` is a list of ids in Stripe's API reference."""
    reason = {"enabled": True, "feedback_options": [], "options": []}
    features = {"subscription_cancel": {"cancellation_reason": reason, "enabled": True}}
    body = {"id": "bpc_1", "object": "billing_portal.configuration", "features": features, "created": T, "updated": T}
    kept = {"is_default": False, "active": True, "login_page": {"enabled": False, "url": None}}

    rows = _folded(engine, [("billing_portal.configuration.created", envelopes.NEWEST, {**body, **kept})])

    assert witness.statements(body)[0].columns["features"] == features
    assert rows["portal_configurations", "bpc_1", ""]["features"] == features


# ---- Odd JSON ----

_LEAVES: Final = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_JSON: Final = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("id", "data", "x")), inner),
    max_leaves=5,
)


def _places(json: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401 - any JSON
    """Return every container within *json* with each of its keys or indexes."""
    keys = json if isinstance(json, dict) else range(len(json)) if isinstance(json, list) else ()
    return [place for key in keys for place in ((json, key), *_places(json[key]))]


def _listed(body: Body) -> int:
    """Return the number of items in the lists of *body*."""
    pages = [value.get("data") for value in body.values() if isinstance(value, Mapping)]
    return sum(len(data) for data in pages if isinstance(data, list))


def _fits(value: witness.Value, kind: type) -> bool:
    """Return whether *value* is null or of the *kind* of its column; true is no number."""
    return value is None or (isinstance(value, kind) and isinstance(value, bool) == (kind is bool))


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_no_json_is_too_odd(seed: int, data: st.DataObject) -> None:
    """With any JSON in any place the witness raises no error, states at most the listed rows, and each value fits."""
    chance = Chance(seed)
    _, _, body = chance.choice(SHAPES)(chance)
    for _ in range(data.draw(st.integers(1, 4))):
        container, key = data.draw(st.sampled_from(_places(body)))
        container[key] = data.draw(_JSON)

    found = witness.statements(body)

    assert len(found) <= 2 + _listed(body)
    for statement in found:
        columns = tables.metadata.tables[statement.table].columns
        kinds = {name: columns[name].type.python_type for name in statement.columns}
        assert statement.id
        assert all(_fits(value, kinds[name]) for name, value in statement.columns.items())


@given(odd=_JSON, kind=st.sampled_from(sorted({each.object for each in witness.LISTED})))
def test_any_json_may_be_asked(odd: Any, kind: str) -> None:  # noqa: ANN401 - any JSON
    """JSON without an object of a known type and a readable id states no row."""
    assert witness.statements(odd) == []
    assert witness.statements({"id": "x_1", "object": odd, "amount": 5}) == []
    assert witness.statements({"object": kind, "amount": 5, "status": odd}) == []


# ---- By hand ----


def _stated(body: Body, table: str) -> Mapping[str, Any]:
    """Return what *body* states of its one row of *table*."""
    (statement,) = [each for each in witness.statements(body) if each.table == table]
    return statement.columns


def test_a_converted_session_counts_in_the_shops_currency() -> None:
    """15.00 USD that the buyer paid as 20.55 CAD: the conversion does not give the tax in USD, which is null."""
    session = {"id": "cs_1", "object": "checkout.session", "currency": "cad", "amount_subtotal": 2055}
    session |= {"amount_total": 2055, "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 137}}
    conversion = {"amount_subtotal": 1500, "amount_total": 1500, "fx_rate": "1.37", "source_currency": "usd"}

    assert _stated({**session, "currency_conversion": conversion}, "orders") == {
        "currency": "usd",
        "amount_subtotal": 1500,
        "amount_total": 1500,
        "presentment_currency": "cad",
        "presentment_amount": 2055,
    }
    assert _stated({**session, "currency_conversion": None}, "orders") == {
        "currency": "cad",
        "amount_subtotal": 2055,
        "amount_total": 2055,
        "amount_discount": 0,
        "amount_shipping": 0,
        "amount_tax": 137,
    }


def test_a_session_of_today_has_the_buyers_currency() -> None:
    """Since basil amounts stay in the shop's currency, and presentment_details has the buyer's."""
    details = {"presentment_amount": 163400, "presentment_currency": "krw"}
    session = {"id": "cs_1", "object": "checkout.session", "currency": "usd", "amount_total": 1500}
    session |= {"presentment_details": details, "created": T, "expires_at": T + 86400}

    assert _stated(session, "orders") == {
        "currency": "usd",
        "amount_total": 1500,
        "presentment_currency": "krw",
        "presentment_amount": 163400,
        "created": AT_T,
        "expires_at": datetime(2023, 11, 15, 22, 13, 20, tzinfo=UTC),
    }


@pytest.mark.parametrize(
    "places",
    [
        {"collected_information": {"shipping_details": "HERE"}},
        {"collected_information": {"shipping_details": "HERE"}, "shipping_details": "HERE"},
        {"shipping_details": "HERE"},
        {"shipping": "HERE"},
    ],
)
def test_shipping_is_a_name_and_an_address(places: dict[str, Any]) -> None:
    """Basil moved it, and dropped the carrier, phone and tracking number."""
    address = {"city": "Berlin", "country": "DE", "line1": "Hof 1", "line2": None, "postal_code": "1", "state": None}
    full = {"address": address, "carrier": "post", "name": "Buyer", "phone": None, "tracking_number": None}
    body: Body = {"id": "cs_1", "object": "checkout.session", **places}
    for container, key in _places(body):
        container[key] = full if container[key] == "HERE" else container[key]

    assert _stated(body, "orders") == {"shipping": {"name": "Buyer", "address": address}}


def test_the_buyers_email_beats_the_shops() -> None:
    """The buyer's email beats `customer_email`, with which the shop created the session."""
    session = {"id": "cs_1", "object": "checkout.session", "customer_email": "passed@example.com"}

    typed = {**session, "customer_details": {"email": "typed@example.com"}}
    assert _stated(typed, "orders") == {"customer_email": "typed@example.com"}
    assert _stated({**session, "customer_details": None}, "orders") == {"customer_email": "passed@example.com"}


def test_lines_are_stated_whole_or_not_at_all() -> None:
    """An incomplete list of lines states no line; a line names its order, price and product by their ids."""
    price = {"id": "price_1", "object": "price", "product": {"id": "prod_1", "object": "product"}}
    line = {"id": "li_1", "object": "item", "amount_total": 300, "price": price, "quantity": 3}
    page = {"object": "list", "data": [line], "has_more": False}
    session = {"id": "cs_1", "object": "checkout.session", "line_items": page}

    columns: Body = {"order_id": "cs_1", "price": "price_1", "product": "prod_1", "quantity": 3, "amount_total": 300}
    assert witness.statements(session) == [Statement("order_lines", "li_1", columns)]
    assert witness.statements({**session, "line_items": {**page, "has_more": True}}) == []
    assert witness.statements(line) == []


def test_a_credit_note_adds_up() -> None:
    """12.00 credited: 3.00 before payment; of 9.00 after it 5.00 + 1.00 refunded, 1.00 elsewhere, 2.00 to balance."""
    note = {"id": "cn_1", "object": "credit_note", "amount": 1200, "pre_payment_amount": 300}
    refunds = [{"amount_refunded": 500, "refund": "re_1"}, {"amount_refunded": 100, "refund": "re_2"}]
    note |= {"post_payment_amount": 900, "out_of_band_amount": 100, "refunds": refunds}

    columns = _stated({**note, "customer_balance_transaction": "cbtxn_1"}, "credit_notes")
    assert columns == {
        "amount": 1200,
        "pre_payment_amount": 300,
        "post_payment_amount": 900,
        "refunded_amount": 600,
        "out_of_band_amount": 100,
        "to_balance_amount": 200,
        "customer_balance_transaction": "cbtxn_1",
    }
    doubtful = {**note, "customer_balance_transaction": None}
    assert "to_balance_amount" not in _stated(doubtful, "credit_notes")


def test_an_old_credit_note_leaves_its_parts_open() -> None:
    """Before basil a note names one refund by its id, and never its amount."""
    note = {"id": "cn_1", "object": "credit_note", "amount": 900, "refund": "re_1", "out_of_band_amount": None}

    assert _stated(note, "credit_notes") == {"amount": 900, "out_of_band_amount": None}


def test_a_balance_is_in_the_customers_currency() -> None:
    """A negative balance is credit; its key was another until 2019-10-17; without a currency it is not stated."""
    for name in ("balance", "account_balance"):
        customer = {"id": "cus_1", "object": "customer", name: -200}
        (_, balance) = witness.statements({**customer, "currency": "usd"})
        assert balance == Statement("balances", "cus_1", {"amount": -200}, "usd")
        assert [each.table for each in witness.statements({**customer, "currency": None})] == ["customers"]


def test_an_invoice_was_dated_elsewhere_before_2019() -> None:
    """`date` became `created`, and `finalized_at` moved into status_transitions; a moment still to come is null."""
    invoice = {"id": "in_1", "object": "invoice", "subscription": "sub_1"}
    older = {**invoice, "date": T, "finalized_at": T}
    newer = {"created": T, "status_transitions": {"finalized_at": T, "paid_at": None, "voided_at": None}}

    columns = {"created": AT_T, "finalized_at": AT_T, "subscription": "sub_1"}
    assert _stated(older, "invoices") == columns
    assert _stated({**invoice, **newer}, "invoices") == columns


def test_a_reference_is_an_id_or_an_object_or_null() -> None:
    """An answer may hold the whole object instead of its id; basil moved an invoice's subscription into its parent."""
    parent = {"type": "subscription_details", "subscription_details": {"subscription": {"id": "sub_1"}}}
    invoice = {"id": "in_1", "object": "invoice", "customer": None, "parent": parent}

    assert _stated(invoice, "invoices") == {"subscription": "sub_1"}


def test_a_deleted_object_states_only_that() -> None:
    """A deleted customer and a deleted draft state only `deleted`."""
    assert witness.statements({"id": "cus_1", "object": "customer", "deleted": True}) == [
        Statement("customers", "cus_1", {"deleted": True})
    ]
    assert witness.statements({"id": "in_1", "object": "invoice", "deleted": True}) == [
        Statement("invoices", "in_1", {"deleted": True})
    ]


def test_only_kept_objects_are_stated() -> None:
    """A preview states no invoice, and only a canceled payment intent states a row."""
    intent = {"id": "pi_1", "object": "payment_intent", "canceled_at": T}
    canceled: Body = {"status": "canceled", "canceled_at": AT_T}

    assert witness.statements({"id": "upcoming_in_1", "object": "invoice", "total": 900}) == []
    assert witness.statements({**intent, "status": "succeeded", "canceled_at": None}) == []
    assert witness.statements({**intent, "status": "canceled"}) == [Statement("payment_intents", "pi_1", canceled)]


def test_a_charge_of_2020_states_its_refunds_too() -> None:
    """Until 2022-11-15 a charge lists its whole refunds, and until basil it names its invoice."""
    refund = {"id": "re_1", "object": "refund", "amount": 500, "charge": "ch_1", "status": "succeeded"}
    page = {"object": "list", "data": [refund], "has_more": True}

    assert witness.statements({"id": "ch_1", "object": "charge", "invoice": "in_1", "refunds": page}) == [
        Statement("charges", "ch_1", {"invoice": "in_1"}),
        Statement("refunds", "re_1", {"status": "succeeded", "amount": 500, "charge": "ch_1"}),
    ]
