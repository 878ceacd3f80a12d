"""`reconcile --stripe` names every column of every table that differs from Stripe's list.

Each table has an object as an event reported it, and as Stripe lists it: with another value in every column. They are
written out by hand after Stripe's API reference, in the shape of the newest version, and where a column is of an older
one, in its shape.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pytest

from deploy.local.services import Services
from schemas import database
from tests import command, envelopes, ledger, stripe_lists
from tests.web import migrated_database
from worker.proof import witness

Body = dict[str, Any]
KEY: Final = "sk_test_columns"
T: Final = 1_700_000_000
DAY: Final = 86_400


class Case(NamedTuple):
    """An object: the *path* of its list, the event *type* that reported it, its fields *then* and *now*."""

    path: str
    type: str
    then: Body
    now: Body


def case(path: str, type_: str, same: Body, **fields: tuple[object, object]) -> Case:
    """Return the case of an object with the *same* fields then and now, and with pairs of changed fields."""
    both = ({name: values[at] for name, values in fields.items()} for at in (0, 1))
    then, now = ({"livemode": False, **same, **each} for each in both)
    return Case(path, type_, then, now)


def lines(*items: Body) -> Body:
    """Return a complete list."""
    return {"object": "list", "data": list(items), "has_more": False}


def line(**fields: object) -> Body:
    """Return a line of a session or of a credit note."""
    return {"id": "li_1", "object": "item", **fields}


SHIPPING: Final = {"name": "Room 7", "address": dict.fromkeys(("city", "country", "line1", "line2"))}
SESSION: Final = {"object": "checkout.session", "url": None, "created": T, "currency": "usd", "amount_total": 500}
NOTE: Final = {"object": "credit_note", "created": T, "currency": "usd", "amount": 500, "status": "issued"}
LEDGER: Final = "customers/cus_1/balance_transactions"

CASES: Final = (
    case(
        "checkout/sessions",
        "checkout.session.completed",
        {"id": "cs_1", "object": "checkout.session", "url": None},
        status=("complete", "expired"),
        payment_status=("paid", "unpaid"),
        mode=("payment", "subscription"),
        client_reference_id=("cart-1", "cart-2"),
        currency=("usd", "eur"),
        amount_subtotal=(900, 1900),
        amount_total=(1000, 2000),
        presentment_details=(
            {"presentment_currency": "gbp", "presentment_amount": 800},
            {"presentment_currency": "jpy", "presentment_amount": 90},
        ),
        total_details=(
            {"amount_discount": 10, "amount_shipping": 60, "amount_tax": 50},
            {"amount_discount": 20, "amount_shipping": 70, "amount_tax": 51},
        ),
        customer=("cus_1", "cus_2"),
        payment_link=("plink_1", "plink_2"),
        payment_intent=("pi_1", "pi_2"),
        subscription=("sub_1", "sub_2"),
        invoice=("in_1", "in_2"),
        recovered_from=("cs_8", "cs_9"),
        customer_details=({"email": "a@example.com"}, {"email": "b@example.com"}),
        after_expiration=(
            {"recovery": {"url": "https://buy.example.com/1"}},
            {"recovery": {"url": "https://buy.example.com/2"}},
        ),
        collected_information=({"shipping_details": SHIPPING}, {"shipping_details": {**SHIPPING, "name": "Room 8"}}),
        metadata=({"cart": "1"}, {"cart": "2"}),
        created=(T, T + 1),
        expires_at=(T + DAY, T + DAY + 1),
    ),
    case(
        "checkout/sessions",
        "payfold.checkout.session.observed",
        {**SESSION, "id": "cs_2", "status": "complete", "payment_status": "paid", "mode": "payment"},
        line_items=(
            lines(
                line(
                    description="A thing",
                    currency="usd",
                    price={"id": "price_1", "object": "price", "product": "prod_1"},
                    quantity=1,
                    amount_subtotal=500,
                    amount_discount=0,
                    amount_tax=0,
                    amount_total=500,
                )
            ),
            lines(
                line(
                    description="Another",
                    currency="eur",
                    price={"id": "price_2", "object": "price", "product": "prod_2"},
                    quantity=2,
                    amount_subtotal=450,
                    amount_discount=1,
                    amount_tax=51,
                    amount_total=501,
                )
            ),
        ),
    ),
    case(
        "payment_links",
        "payment_link.created",
        {"id": "plink_1", "object": "payment_link"},
        active=(True, False),
        url=("https://buy.example.com/1", "https://buy.example.com/2"),
        currency=("usd", "eur"),
        metadata=({}, {"of": "shop"}),
    ),
    case(
        "customers",
        "customer.created",
        {"id": "cus_1", "object": "customer"},
        email=("a@example.com", "b@example.com"),
        name=("Ada", None),
        currency=("usd", "eur"),
        balance=(0, 0),
        delinquent=(False, True),
        test_clock=("clock_1", "clock_2"),
        metadata=({}, {"tier": "gold"}),
        created=(T, T + 1),
    ),
    case(
        "customers",
        "customer.created",
        {"id": "cus_2", "object": "customer", "created": T, "currency": "usd", "email": None, "name": None},
        balance=(-500, -499),
    ),
    Case(
        "customers",
        "customer.created",
        {"id": "cus_3", "object": "customer", "created": T, "currency": None, "livemode": False},
        {"id": "cus_3", "object": "customer", "deleted": True},
    ),
    case(
        LEDGER,
        "payfold.customer_balance_transaction.observed",
        {"id": "cbtxn_1", "object": "customer_balance_transaction"},
        customer=("cus_1", "cus_2"),
        currency=("usd", "eur"),
        type=("adjustment", "initial"),
        description=("one", "two"),
        amount=(-500, -400),
        ending_balance=(-500, -400),
        invoice=("in_1", "in_2"),
        credit_note=("cn_1", "cn_2"),
        checkout_session=("cs_1", "cs_2"),
        created=(T, T + 1),
    ),
    case(
        "invoices",
        "invoice.created",
        {"id": "in_1", "object": "invoice"},
        number=("A-1", "A-2"),
        status=("open", "void"),
        currency=("usd", "eur"),
        total=(1000, 2000),
        amount_due=(1000, 2001),
        amount_paid=(0, 1),
        amount_remaining=(1000, 2000),
        amount_overpaid=(0, 2),
        starting_balance=(0, 3),
        ending_balance=(0, 4),
        pre_payment_credit_notes_amount=(0, 5),
        post_payment_credit_notes_amount=(0, 6),
        customer=("cus_1", "cus_2"),
        parent=(
            {"subscription_details": {"subscription": "sub_1"}},
            {"subscription_details": {"subscription": "sub_2"}},
        ),
        created=(T, T + 1),
        status_transitions=(
            {"finalized_at": T + 2, "paid_at": None, "voided_at": None},
            {"finalized_at": T + 3, "paid_at": T + 4, "voided_at": T + 5},
        ),
    ),
    case(
        "credit_notes",
        "credit_note.created",
        {"id": "cn_1", "object": "credit_note"},
        number=("N-1", "N-2"),
        status=("issued", "void"),
        type=("post_payment", "pre_payment"),
        reason=("duplicate", "fraudulent"),
        currency=("usd", "eur"),
        memo=("one", "two"),
        amount=(1000, 2000),
        pre_payment_amount=(200, 100),
        post_payment_amount=(800, 1900),
        refunds=([{"refund": "re_1", "amount_refunded": 300}], [{"refund": "re_1", "amount_refunded": 500}]),
        out_of_band_amount=(100, 300),
        # The rest of the post-payment amount: 800 - 300 - 100 = 400, and 1900 - 500 - 300 = 1100.
        customer_balance_transaction=("cbtxn_1", "cbtxn_2"),
        customer=("cus_1", "cus_2"),
        invoice=("in_1", "in_2"),
        created=(T, T + 1),
        effective_at=(T, T + 2),
        voided_at=(None, T + 3),
    ),
    # Before basil a note names one refund.
    case("credit_notes", "credit_note.created", {**NOTE, "id": "cn_2"}, refund=("re_1", "re_2")),
    case(
        "credit_notes",
        "credit_note.created",
        {**NOTE, "id": "cn_3"},
        lines=(
            lines(
                {
                    "id": "cnli_1",
                    "object": "credit_note_line_item",
                    "type": "invoice_line_item",
                    "description": "A thing",
                    "invoice_line_item": "il_1",
                    "quantity": 1,
                    "amount": 500,
                    "discount_amount": 0,
                }
            ),
            lines(
                {
                    "id": "cnli_1",
                    "object": "credit_note_line_item",
                    "type": "custom_line_item",
                    "description": "Another",
                    "invoice_line_item": "il_2",
                    "quantity": 2,
                    "amount": 499,
                    "discount_amount": 1,
                }
            ),
        ),
    ),
    case(
        "invoice_payments",
        "invoice_payment.paid",
        {"id": "inpay_1", "object": "invoice_payment", "created": T},
        invoice=("in_1", "in_2"),
        payment=(
            {"type": "payment_intent", "payment_intent": "pi_1", "charge": "ch_1"},
            {"type": "payment_intent", "payment_intent": "pi_2", "charge": "ch_2"},
        ),
        status=("paid", "canceled"),
        currency=("usd", "eur"),
        amount_paid=(1000, 999),
        status_transitions=({"paid_at": T, "canceled_at": None}, {"paid_at": T + 1, "canceled_at": None}),
    ),
    case(
        "refunds",
        "refund.created",
        {"id": "re_1", "object": "refund"},
        status=("pending", "failed"),
        currency=("usd", "eur"),
        reason=("duplicate", "fraudulent"),
        failure_reason=(None, "lost_or_stolen_card"),
        amount=(300, 301),
        charge=("ch_1", "ch_2"),
        payment_intent=("pi_1", "pi_2"),
        created=(T, T + 1),
    ),
    # Before basil a charge names its invoice.
    case(
        "charges",
        "charge.succeeded",
        {"id": "ch_1", "object": "charge", "created": T},
        payment_intent=("pi_1", "pi_2"),
        invoice=("in_1", "in_2"),
        status=("succeeded", "failed"),
        currency=("usd", "eur"),
        amount=(1000, 2000),
        amount_captured=(1000, 0),
        amount_refunded=(0, 2000),
        captured=(True, False),
        refunded=(False, True),
        disputed=(False, True),
    ),
    case(
        "disputes",
        "charge.dispute.created",
        {"id": "du_1", "object": "dispute", "created": T},
        charge=("ch_8", "ch_9"),
        payment_intent=("pi_1", "pi_2"),
        status=("needs_response", "lost"),
        reason=("fraudulent", "duplicate"),
        currency=("usd", "eur"),
        amount=(1000, 999),
    ),
    case(
        "billing_portal/configurations",
        "billing_portal.configuration.created",
        {"id": "bpc_1", "object": "billing_portal.configuration"},
        active=(True, False),
        is_default=(True, False),
        name=("Shop", None),
        features=({"invoice_history": {"enabled": True}}, {"invoice_history": {"enabled": False}}),
        login_page=({"enabled": True, "url": "https://billing.example.com/1"}, {"enabled": False, "url": None}),
        created=(T, T + 1),
        updated=(T, T + 2),
    ),
)
NOT_LISTED: Final = {"payment_intents", "portal_sessions"}
ALWAYS_THE_SAME: Final = {
    ("order_lines", "order_id"): "a line is listed by its order",
    ("credit_note_lines", "credit_note"): "a line is listed by its note",
    ("invoices", "deleted"): "only a draft can be deleted, of which Stripe then answers 404",
}
TABLES: Final = sorted({each.table for each in witness.MAP} - NOT_LISTED)


@pytest.fixture(scope="module")
def found(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """Return the columns that `reconcile --stripe` names, by table."""
    with migrated_database(services) as database_url:
        engine = database.engine(database_url)
        events = [envelopes.event(f"evt_{number}", each.type, T, each.then) for number, each in enumerate(CASES)]
        ledger.take_in(engine, *events)
        engine.dispose()
        lists: dict[str, list[Body]] = defaultdict(list)
        for each in CASES:
            lists[each.path].append(each.now)
        with stripe_lists.serving({KEY: lists}, now=T + DAY) as address:
            yield columns_of(
                command.python(
                    "deploy",
                    "reconcile",
                    "--stripe",
                    "--format",
                    "json",
                    settings={
                        "DATABASE_URL": database_url,
                        "REDIS_URL": services.redis_url,
                        "STRIPE_API_KEY": KEY,
                        "STRIPE_API_BASE": address,
                        "PAYFOLD_DATA_DIR": str(tmp_path_factory.mktemp("data")),
                    },
                )
            )


def columns_of(ran: command.Ran) -> dict[str, set[str]]:
    """Return the columns that a run of the command names, by table."""
    assert ran.code == 3, ran.err
    columns = defaultdict(set)
    for each in ran.json["drift"]:
        if each["check"] == "stripe":
            columns[each["table"]].add(each["column"])
    return columns


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_compared(found: dict[str, set[str]], table: str) -> None:
    """Each column with a field in Stripe's objects is named if the row has another value."""
    wanted = {each.column for each in witness.MAP if each.table == table}
    wanted -= {column for name, column in ALWAYS_THE_SAME if name == table}
    assert wanted - found[table] == set()
