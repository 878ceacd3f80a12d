"""A Checkout Session's order and lines: every column, from each API version that moved a field.

The objects are written after docs.stripe.com/api/checkout/sessions/object and .../sessions/line_items; where a field
stood before is in Stripe's changelog (docs.stripe.com/changelog), summed up in stripe-facts, sections 2.1, 3.1, 6, 11.
Every amount, id and text of an object is used once in it, so that no column agrees by chance.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.envelopes import Json, event
from tests.ledger import anomalies, kinds, rows, take_in
from tests.literals import assert_rows, at
from worker.folds.facts import Subject
from worker.proof import explain

OPENED, DONE, LATER, EXPIRES = 1_760_000_100, 1_760_000_300, 1_760_003_900, 1_760_086_500

SHIPPING = {
    "name": "Room 7",
    "address": {
        "line1": "1 Example Street",
        "line2": "Floor 4",
        "city": "Exampleton",
        "state": "OR",
        "postal_code": "97001",
        "country": "US",
    },
}
OLD_SHIPPING = {
    "name": "Room 8",
    "address": {
        "line1": "2 Example Street",
        "line2": "Floor 5",
        "city": "Oldton",
        "state": "ON",
        "postal_code": "K1A 0B1",
        "country": "CA",
    },
}

SESSION: Json = {
    "object": "checkout.session",
    "after_expiration": {"recovery": {"allow_promotion_codes": True, "enabled": True, "expires_at": None, "url": None}},
    "allow_promotion_codes": True,
    "amount_subtotal": 5000,
    "amount_total": 5225,
    "automatic_tax": {"enabled": True, "liability": {"type": "self"}, "status": "complete"},
    "cancel_url": "https://shop.example.com/cancel",
    "client_reference_id": "cart-1",
    "client_secret": None,
    "collected_information": {"business_name": None, "individual_name": None, "shipping_details": SHIPPING},
    "created": OPENED,
    "currency": "usd",
    "currency_conversion": None,
    "customer": "cus_1",
    "customer_account": "acct_cus_1",
    "customer_creation": "always",
    "customer_details": {
        "address": {"line1": "3 Example Street", "country": "MX"},
        "business_name": None,
        "email": "typed@example.com",
        "individual_name": None,
        "name": "Buyer",
        "phone": None,
        "tax_exempt": "none",
        "tax_ids": [],
    },
    "customer_email": "passed@example.com",
    "discounts": [{"coupon": "co_1", "promotion_code": "promo_1"}],
    "expires_at": EXPIRES,
    "invoice": "in_1",
    "invoice_creation": {"enabled": True, "invoice_data": {"metadata": {"of": "invoice"}}},
    "livemode": False,
    "locale": "en",
    "metadata": {"cart": "1", "channel": "web"},
    "mode": "payment",
    "payment_intent": "pi_1",
    "payment_link": "plink_1",
    "payment_method_types": ["card"],
    "payment_status": "paid",
    "presentment_details": {"presentment_amount": 7315, "presentment_currency": "cad"},
    "recovered_from": "cs_0",
    "setup_intent": "seti_1",
    "shipping_cost": {"amount_subtotal": 801, "amount_tax": 92, "amount_total": 893, "shipping_rate": "shr_1"},
    "shipping_options": [{"shipping_amount": 804, "shipping_rate": "shr_2"}],
    "status": "complete",
    "subscription": "sub_1",
    "success_url": "https://shop.example.com/thanks",
    "total_details": {"amount_discount": 1003, "amount_shipping": 801, "amount_tax": 427},
    "ui_mode": "hosted_page",
    "url": None,
}

# The order of SESSION after `checkout.session.completed` of DONE. `shipping` is the object as sent.
ORDER: Json = {
    "status": "paid",
    "session_status": "complete",
    "payment_status": "paid",
    "mode": "payment",
    "currency": "usd",
    "amount_subtotal": 5000,
    "amount_discount": 1003,
    "amount_shipping": 801,
    "amount_tax": 427,
    "amount_total": 5225,
    "presentment_currency": "cad",
    "presentment_amount": 7315,
    "customer": "cus_1",
    "customer_email": "typed@example.com",
    "client_reference_id": "cart-1",
    "payment_link": "plink_1",
    "payment_intent": "pi_1",
    "subscription": "sub_1",
    "invoice": "in_1",
    "recovered_from": "cs_0",
    "recovery_url": None,
    "shipping": SHIPPING,
    "metadata": {"cart": "1", "channel": "web"},
    "created": at(OPENED),
    "expires_at": at(EXPIRES),
    "completed_at": at(DONE),
    "paid_at": at(DONE),
    "failed_at": None,
    "expired_at": None,
    "lines_complete": False,
    "as_of": at(DONE),
}
COMPLETED, EXPIRED, OBSERVED = (
    "checkout.session.completed",
    "checkout.session.expired",
    "payfold.checkout.session.observed",
)
SUCCEEDED, FAILED = "checkout.session.async_payment_succeeded", "checkout.session.async_payment_failed"


def session(id_: str, *, without: Sequence[str] = (), **fields: object) -> dict[str, Any]:
    """Return SESSION with other *fields*, and without the keys that a version lacks."""
    return {name: value for name, value in {**SESSION, "id": id_, **fields}.items() if name not in without}


def order(id_: str, **columns: object) -> dict[str, Any]:
    """Return ORDER with other *columns*, decided by the event of the same number unless it names another."""
    return {**ORDER, "id": id_, "event_id": f"evt_{id_}", **columns}


UNPAID: Json = {"payment_status": "unpaid"}
OPEN: Json = {"status": "open", "payment_status": "unpaid", "url": "https://checkout.stripe.com/c/pay/cs_1#secret"}
GONE: Json = {"status": "expired", "payment_status": "unpaid"}
PROCESSING: Json = {"status": "processing", "payment_status": "unpaid", "paid_at": None}
OPENED_ORDER: Json = {
    "status": "open", "session_status": "open", "payment_status": "unpaid", "completed_at": None, "paid_at": None
}  # fmt: skip
EXPIRED_ORDER: Json = {
    **OPENED_ORDER,
    "status": "expired",
    "session_status": "expired",
    "expired_at": at(EXPIRES),
    "as_of": at(EXPIRES),
}
NO_PAYMENT: Json = {"payment_status": "no_payment_required", "payment_intent": None}
NO_AMOUNTS: Json = dict.fromkeys(
    ("amount_subtotal", "amount_discount", "amount_shipping", "amount_tax", "amount_total", "currency")
)
NOTHING_SHOWN: Json = {"presentment_currency": None, "presentment_amount": None}
NEW_SINCE_2021 = (
    "after_expiration",
    "collected_information",
    "created",
    "currency_conversion",
    "customer_account",
    "customer_creation",
    "expires_at",
    "invoice_creation",
    "payment_link",
    "presentment_details",
    "recovered_from",
    "shipping_cost",
    "shipping_options",
    "status",
    "ui_mode",
)
OF_2021: Json = {
    **NOTHING_SHOWN,
    **dict.fromkeys(("created", "expires_at", "payment_link", "recovered_from", "shipping")),
}
RECOVERY = {
    "recovery": {
        "allow_promotion_codes": True,
        "enabled": True,
        "expires_at": 1_762_592_500,
        "url": "https://buy.stripe.com/r/live_1",
    }
}

# One event each: its type, API version, object, and the order that it makes.
SINGLE: Sequence[tuple[str, str, Json, Json]] = (
    # ---- modes and statuses of the newest version (stripe-facts 3.1) ----
    (COMPLETED, "2026-10-28.endive", session("cs_paid"), order("cs_paid")),
    (COMPLETED, "2026-10-28.endive", session("cs_unpaid", **UNPAID), order("cs_unpaid", **PROCESSING)),
    (
        COMPLETED,
        "2026-10-28.endive",
        session("cs_free", **NO_PAYMENT, amount_total=0),
        order("cs_free", **NO_PAYMENT, amount_total=0),
    ),
    (
        COMPLETED,
        "2026-10-28.endive",
        session("cs_sub", mode="subscription", payment_intent=None),
        order("cs_sub", mode="subscription", payment_intent=None),
    ),
    (
        COMPLETED,
        "2026-10-28.endive",
        session("cs_trial", mode="subscription", **NO_PAYMENT),
        order("cs_trial", mode="subscription", **NO_PAYMENT),
    ),
    (
        COMPLETED,
        "2026-10-28.endive",
        session(
            "cs_setup",
            mode="setup",
            **NO_PAYMENT,
            amount_subtotal=None,
            amount_total=None,
            currency=None,
            total_details=None,
            invoice=None,
            subscription=None,
            without=["presentment_details"],
        ),
        order(
            "cs_setup",
            mode="setup",
            status="complete",
            **NO_PAYMENT,
            **NO_AMOUNTS,
            **NOTHING_SHOWN,
            invoice=None,
            subscription=None,
            paid_at=None,
        ),
    ),
    (SUCCEEDED, "2026-10-28.endive", session("cs_cleared"), order("cs_cleared")),
    # The snapshot equals an unpaid completion's: only the type reports the failure.
    (
        FAILED,
        "2026-10-28.endive",
        session("cs_failed", **UNPAID),
        order("cs_failed", **{**PROCESSING, "status": "failed"}, failed_at=at(DONE)),
    ),
    (
        EXPIRED,
        "2026-10-28.endive",
        session("cs_expired", status="expired", **UNPAID, after_expiration=RECOVERY),
        order(
            "cs_expired",
            status="expired",
            session_status="expired",
            **UNPAID,
            recovery_url="https://buy.stripe.com/r/live_1",
            completed_at=None,
            paid_at=None,
            expired_at=at(DONE),
        ),
    ),
    (OBSERVED, "2026-10-28.endive", session("cs_open", **OPEN), order("cs_open", **OPENED_ORDER)),
    # ---- parts that are null ----
    (
        COMPLETED,
        "2026-10-28.endive",
        session("cs_passed", customer_details=None, after_expiration=None, total_details=None, metadata={}),
        order(
            "cs_passed",
            customer_email="passed@example.com",
            amount_discount=None,
            amount_shipping=None,
            amount_tax=None,
            metadata={},
        ),
    ),
    (
        COMPLETED,
        "2026-10-28.endive",
        session("cs_typed", customer_email=None, collected_information=None),
        order("cs_typed", shipping=None),
    ),
    (
        COMPLETED,
        "2026-10-28.endive",
        session("cs_mailless", customer_details={"email": None, "name": "Buyer"}),
        order("cs_mailless", customer_email="passed@example.com"),
    ),
    (
        COMPLETED,
        "2026-10-28.endive",
        session("cs_unshipped", total_details={"amount_discount": 11, "amount_shipping": None, "amount_tax": 13}),
        order("cs_unshipped", amount_discount=11, amount_shipping=None, amount_tax=13),
    ),
    # ---- references as objects, as an API read with `expand` gives them ----
    (
        OBSERVED,
        "2026-10-28.endive",
        session(
            "cs_expanded",
            **OPEN,
            customer={"id": "cus_2", "object": "customer", "email": "other@example.com"},
            payment_intent={"id": "pi_2", "object": "payment_intent", "amount": 9},
            payment_link={"id": "plink_2", "object": "payment_link", "active": True},
            subscription={"id": "sub_2", "object": "subscription", "status": "active"},
            invoice={"id": "in_2", "object": "invoice", "total": 8},
        ),
        order(
            "cs_expanded",
            **OPENED_ORDER,
            customer="cus_2",
            payment_intent="pi_2",
            payment_link="plink_2",
            subscription="sub_2",
            invoice="in_2",
        ),
    ),
    # ---- where older versions keep a field ----
    # Both places from 2025-02-24.acacia until basil: the new one is read first, then the old one.
    (
        COMPLETED,
        "2025-02-24.acacia",
        session("cs_acacia", shipping_details=OLD_SHIPPING, ui_mode="hosted"),
        order("cs_acacia"),
    ),
    (
        COMPLETED,
        "2024-06-20",
        session(
            "cs_2024",
            shipping_details=OLD_SHIPPING,
            without=["collected_information", "presentment_details", "customer_account"],
        ),
        order("cs_2024", shipping=OLD_SHIPPING, **NOTHING_SHOWN),
    ),
    (
        COMPLETED,
        "2025-02-24.acacia",
        session("cs_2025", shipping_details=OLD_SHIPPING, collected_information=None),
        order("cs_2025", shipping=OLD_SHIPPING),
    ),
    (
        COMPLETED,
        "2025-02-24.acacia",
        session(
            "cs_2025_null",
            shipping_details=OLD_SHIPPING,
            collected_information={"business_name": None, "individual_name": None, "shipping_details": None},
        ),
        order("cs_2025_null", shipping=OLD_SHIPPING),
    ),
    # Between 2020 and 2021 it had neither `status` (since November 2021) nor `created`, `expires_at`, recovery and
    # `shipping_cost`: its status follows from the event's type (docs.stripe.com/api/events/types).
    (COMPLETED, "2020-08-27", session("cs_2021", without=NEW_SINCE_2021), order("cs_2021", **OF_2021)),
    (
        COMPLETED,
        "2020-08-27",
        session("cs_2021_unpaid", **UNPAID, without=NEW_SINCE_2021),
        order("cs_2021_unpaid", **{**OF_2021, **PROCESSING}),
    ),
    (
        FAILED,
        "2020-08-27",
        session("cs_2021_failed", **UNPAID, without=NEW_SINCE_2021),
        order("cs_2021_failed", **{**OF_2021, **PROCESSING, "status": "failed", "failed_at": at(DONE)}),
    ),
    (
        EXPIRED,
        "2020-08-27",
        session("cs_2021_expired", **UNPAID, without=NEW_SINCE_2021),
        order("cs_2021_expired", **{**OF_2021, **EXPIRED_ORDER, "expired_at": at(DONE), "as_of": at(DONE)}),
    ),
    # Adaptive Pricing before basil: the session is in the buyer's currency, `currency_conversion` holds the shop's. It
    # converts only the two totals: discount, shipping and tax in usd are unknown.
    (
        COMPLETED,
        "2024-06-20",
        session(
            "cs_converted",
            currency="cad",
            currency_conversion={
                "amount_subtotal": 3650,
                "amount_total": 3814,
                "fx_rate": "1.37",
                "source_currency": "usd",
            },
            without=["presentment_details"],
        ),
        order(
            "cs_converted",
            currency="usd",
            amount_subtotal=3650,
            amount_discount=None,
            amount_shipping=None,
            amount_tax=None,
            amount_total=3814,
            presentment_currency="cad",
            presentment_amount=5225,
        ),
    ),
)


def test_a_session_by_each_status_and_version(engine: Engine) -> None:
    """One event gives all columns, in the newest version and in older ones."""
    for type_, version, object_, _ in SINGLE:
        take_in(engine, event(f"evt_{object_['id']}", type_, DONE, object_, version=version))

    assert_rows(engine, {"orders": [row for *_, row in SINGLE]})
    assert anomalies(engine) == []
    assert {object_["id"]: kinds(engine, object_["id"]) for _, _, object_, _ in SINGLE} == {
        row["id"]: [KIND_OF[row["status"]]] for *_, row in SINGLE
    }


KIND_OF: Mapping[str, str] = {
    "open": "order.opened",
    "processing": "order.processing",
    "paid": "order.paid",
    "failed": "order.failed",
    "expired": "order.expired",
    "complete": "order.completed",
}


def test_a_session_of_a_connected_account(engine: Engine) -> None:
    """Account and mode are the event's, so the order is separate from the test session of the same id."""
    live = session("cs_1", livemode=True, amount_total=99)
    take_in(
        engine,
        event("evt_cs_1", COMPLETED, DONE, session("cs_1")),
        event("evt_cs_1", COMPLETED, DONE, live, account="acct_1", livemode=True),
    )

    world = {"account": "acct_1", "livemode": True}
    assert_rows(engine, {"orders": [order("cs_1"), order("cs_1", **world, amount_total=99)]})


# ---- Unknown words ----


def test_an_unknown_status(engine: Engine) -> None:
    """Stripe's enums are open: an unknown status is kept, and gives no order status (stripe-facts, enum rule)."""
    take_in(
        engine,
        event("evt_cs_a", COMPLETED, DONE, session("cs_a", payment_status="partially_paid")),
        event("evt_cs_b", OBSERVED, DONE, session("cs_b", status="paused", **UNPAID)),
    )

    unknown: Json = {"status": None, "paid_at": None}
    assert_rows(
        engine,
        {
            "orders": [
                order("cs_a", **unknown, payment_status="partially_paid"),
                order("cs_b", **unknown, session_status="paused", payment_status="unpaid", completed_at=None),
            ]
        },
    )
    assert anomalies(engine) == ["unknown_status", "unknown_status"]


# A session of 2019, with `display_items` (API reference of 2019-05-16; stripe-facts, section 11).
SESSION_OF_2019: Json = {
    "object": "checkout.session",
    "billing_address_collection": None,
    "cancel_url": "https://shop.example.com/cancel",
    "client_reference_id": "cart-9",
    "customer": "cus_9",
    "customer_email": "passed@example.com",
    "display_items": [
        {
            "amount": 1500,
            "currency": "usd",
            "custom": {"description": "Comfortable", "images": None, "name": "Shirt"},
            "quantity": 2,
            "type": "custom",
        }
    ],
    "livemode": False,
    "locale": None,
    "metadata": {"cart": "9"},
    "payment_method_types": ["card"],
    "setup_intent": None,
    "submit_type": None,
    "success_url": "https://shop.example.com/thanks",
}


def order_of_2019(id_: str, **columns: object) -> dict[str, Any]:
    """Return the order of a session of 2019: completed, by its event's type, and without fields it does not report."""
    known: Json = {
        "session_status": "complete",
        "customer": "cus_9",
        "customer_email": "passed@example.com",
        "client_reference_id": "cart-9",
        "metadata": {"cart": "9"},
        "completed_at": at(DONE),
        "lines_complete": False,
        "as_of": at(DONE),
    }
    return order(id_, **{**dict.fromkeys(ORDER), **known, **columns})


def test_a_session_of_2019(engine: Engine) -> None:
    """A session of 2019 reports no payment, so the order's payment is unknown until a charge reports it (rule 10)."""
    paid: Json = {**SESSION_OF_2019, "id": "cs_a", "mode": "payment", "payment_intent": "pi_9", "subscription": None}
    sub: Json = {**SESSION_OF_2019, "id": "cs_b", "mode": "subscription", "payment_intent": None, "subscription": "s_9"}
    take_in(
        engine,
        event("evt_cs_a", COMPLETED, DONE, paid, version="2019-05-16"),
        event("evt_cs_b", COMPLETED, DONE, sub, version="2019-05-16"),
    )

    orders = [
        order_of_2019("cs_a", mode="payment", payment_intent="pi_9"),
        order_of_2019("cs_b", mode="subscription", subscription="s_9"),
    ]
    assert_rows(engine, {"orders": orders})
    assert noted(engine) == {("cs_a", "unknown_status"), ("cs_b", "unknown_status")}
    assert kinds(engine, "cs_a") == kinds(engine, "cs_b") == []


def test_an_unknown_status_has_the_lowest_rank(engine: Engine) -> None:
    """An unknown status ranks with open and below all others; a known status that follows resolves the anomaly."""
    partly: Json = {"payment_status": "partially_paid"}
    take_in(
        engine,
        event("evt_cs_a_0", OBSERVED, OPENED, session("cs_a", **OPEN)),
        event("evt_cs_a", COMPLETED, DONE, session("cs_a", **partly)),
        event("evt_cs_b", COMPLETED, DONE, session("cs_b")),
        event("evt_cs_b_1", OBSERVED, LATER, session("cs_b", **partly)),
        event("evt_cs_c", EXPIRED, DONE, session("cs_c", **GONE)),
        event("evt_cs_c_1", OBSERVED, LATER, session("cs_c", status="paused", **UNPAID)),
        event("evt_cs_d_0", COMPLETED, DONE, session("cs_d", **partly)),
        event("evt_cs_d", SUCCEEDED, LATER, session("cs_d")),
    )

    expired: Json = {"expired_at": at(DONE), "as_of": at(DONE)}
    orders = [
        order("cs_a", status=None, **partly, paid_at=None),
        order("cs_b"),
        order("cs_c", **{**EXPIRED_ORDER, **expired}),
        order("cs_d", paid_at=at(LATER), as_of=at(LATER)),
    ]
    assert_rows(engine, {"orders": orders})
    doubted = {subject for subject, kind in noted(engine) if kind == "unknown_status"}
    assert "cs_a" in doubted
    assert "cs_d" not in doubted


# ---- Several events of one session ----

Step = tuple[str, int, Json]
OBSERVED_OPEN = (OBSERVED, OPENED, OPEN)
COMPLETED_PAID: Step = (COMPLETED, DONE, {})
COMPLETED_UNPAID = (COMPLETED, DONE, UNPAID)
CLEARED: Step = (SUCCEEDED, LATER, {})
BOUNCED = (FAILED, LATER, UNPAID)
RAN_OUT = (EXPIRED, EXPIRES, GONE)
CLOCK = ("payfold.checkout.session.clock_expired", EXPIRES + 60, OPEN)
READ_EXPIRED: Json = {"expired_at": at(LATER), "as_of": at(LATER)}

ASYNC_PAID: Json = {"paid_at": at(LATER), "as_of": at(LATER)}
ASYNC_FAILED: Json = {**PROCESSING, "status": "failed", "failed_at": at(LATER), "as_of": at(LATER)}

# The steps in order of arrival, the deciding one, the columns, the kinds of change and the anomalies.
Steps = Sequence[Step]
HISTORIES: Mapping[str, tuple[Steps, int, Json, Sequence[str], Sequence[str]]] = {
    "opened_paid": ([OBSERVED_OPEN, COMPLETED_PAID], 1, {}, ["order.opened", "order.paid"], []),
    # A shop registers the session that it just created.
    "registered": (
        [("payfold.checkout.session.registered", OPENED, OPEN), COMPLETED_PAID],
        1,
        {},
        ["order.opened", "order.paid"],
        [],
    ),
    "opened_expired": ([OBSERVED_OPEN, RAN_OUT], 1, EXPIRED_ORDER, ["order.opened", "order.expired"], []),
    "cleared": ([COMPLETED_UNPAID, CLEARED], 1, ASYNC_PAID, ["order.processing", "order.paid"], []),
    "bounced": ([COMPLETED_UNPAID, BOUNCED], 1, ASYNC_FAILED, ["order.processing", "order.failed"], []),
    # An older state that arrives later changes only the moment that it reports.
    "cleared_backwards": ([CLEARED, COMPLETED_UNPAID], 0, ASYNC_PAID, ["order.paid"], []),
    "bounced_backwards": ([BOUNCED, COMPLETED_UNPAID], 0, ASYNC_FAILED, ["order.failed"], []),
    "opened_late": ([COMPLETED_PAID, OBSERVED_OPEN], 0, {}, ["order.paid"], []),
    "expired_late": ([RAN_OUT, OBSERVED_OPEN], 0, EXPIRED_ORDER, ["order.expired"], []),
    # Rank beats time: an event of lower rank with a later `created` changes nothing, and no earlier moment either.
    "read_open_after_paid": ([COMPLETED_PAID, (OBSERVED, LATER, OPEN)], 0, {}, ["order.paid"], []),
    "read_open_after_expired": (
        [RAN_OUT, (OBSERVED, EXPIRES + 9, OPEN)],
        0,
        EXPIRED_ORDER,
        ["order.expired"],
        [],
    ),
    "unpaid_after_failed": (
        [BOUNCED, (COMPLETED, LATER + 9, UNPAID)],
        0,
        {**ASYNC_FAILED, "completed_at": at(LATER)},
        ["order.failed"],
        [],
    ),
    "unpaid_after_paid": (
        [COMPLETED_PAID, (COMPLETED, LATER, UNPAID)],
        0,
        {},
        ["order.paid"],
        [],
    ),
    # All in one second, the highest rank first.
    "one_second": (
        [(SUCCEEDED, DONE, {}), (FAILED, DONE, UNPAID), COMPLETED_UNPAID, (OBSERVED, DONE, OPEN)],
        0,
        {"failed_at": at(DONE)},
        ["order.paid"],
        [],
    ),
    # Paid is above failed: both moments stay.
    "failed_then_paid": (
        [COMPLETED_UNPAID, BOUNCED, (SUCCEEDED, LATER + 60, {})],
        2,
        {"paid_at": at(LATER + 60), "failed_at": at(LATER), "as_of": at(LATER + 60)},
        ["order.processing", "order.failed", "order.paid"],
        [],
    ),
    "paid_then_failed": (
        [(SUCCEEDED, LATER + 60, {}), BOUNCED, COMPLETED_UNPAID],
        0,
        {"paid_at": at(LATER + 60), "failed_at": at(LATER), "as_of": at(LATER + 60)},
        ["order.paid"],
        [],
    ),
    # Both terminal states: complete ranks above expired, and the contradiction is noted.
    "expired_then_paid": (
        [RAN_OUT, (COMPLETED, EXPIRES + 5, {})],
        1,
        {
            "completed_at": at(EXPIRES + 5),
            "paid_at": at(EXPIRES + 5),
            "expired_at": at(EXPIRES),
            "as_of": at(EXPIRES + 5),
        },
        ["order.expired", "order.paid"],
        ["expired_and_complete"],
    ),
    "paid_then_expired": (
        [COMPLETED_UNPAID, RAN_OUT],
        0,
        {**PROCESSING, "expired_at": at(EXPIRES)},
        ["order.processing"],
        ["expired_and_complete"],
    ),
    # Two events of one change (twins): the earlier one reports the moments, the later one decides.
    "completed_twice": ([(COMPLETED, DONE + 1, {}), COMPLETED_PAID], 0, {"as_of": at(DONE + 1)}, ["order.paid"], []),
    # A later read of a paid session is no earlier moment.
    "read_paid": ([COMPLETED_PAID, (OBSERVED, LATER, {})], 1, {"as_of": at(LATER)}, ["order.paid"], []),
    # A reference is the last value that is not null; another column is the last value carried, null included.
    "references": (
        [
            OBSERVED_OPEN,
            (
                COMPLETED,
                DONE,
                dict.fromkeys(
                    ("customer", "payment_link", "payment_intent", "subscription", "invoice", "recovered_from")
                )
                | {"client_reference_id": None, "metadata": {}},
            ),
        ],
        1,
        {"client_reference_id": None, "metadata": {}},
        ["order.opened", "order.paid"],
        [],
    ),
    # A key that an older version lacks erases nothing.
    "older_version": (
        [COMPLETED_UNPAID, (SUCCEEDED, LATER, {"without": NEW_SINCE_2021})],
        1,
        ASYNC_PAID,
        ["order.processing", "order.paid"],
        [],
    ),
    "two_customers": (
        [OBSERVED_OPEN, (COMPLETED, DONE, {"customer": "cus_9"})],
        1,
        {"customer": "cus_9"},
        ["order.opened", "order.paid"],
        ["two_references"],
    ),
    # Our clock's expiry ranks below Stripe's, and its moment counts only while it decides.
    "clock": (
        [OBSERVED_OPEN, CLOCK],
        1,
        {**OPENED_ORDER, "status": "expired", "expired_at": at(EXPIRES + 60), "as_of": at(EXPIRES + 60)},
        ["order.opened", "order.expired"],
        [],
    ),
    "clock_then_expired": (
        [OBSERVED_OPEN, CLOCK, RAN_OUT],
        2,
        EXPIRED_ORDER,
        ["order.opened", "order.expired"],
        [],
    ),
    "expired_then_clock": ([RAN_OUT, CLOCK], 0, EXPIRED_ORDER, ["order.expired"], []),
    "clock_then_paid": ([CLOCK, COMPLETED_PAID], 1, {}, ["order.expired", "order.paid"], []),
    # A reading at Stripe sets a moment where no earlier event reports it.
    "read_first": ([(OBSERVED, LATER, GONE)], 0, {**EXPIRED_ORDER, **READ_EXPIRED}, ["order.expired"], []),
    "read_before_paid": (
        [(OBSERVED, LATER, {}), COMPLETED_PAID],
        0,
        {"as_of": at(LATER)},
        ["order.paid"],
        [],
    ),
}


def test_several_events_of_a_session(engine: Engine) -> None:
    """Rank decides first, then time: the order, its moments, its changes and its anomalies."""
    for name, (steps, *_) in HISTORIES.items():
        for number, (type_, created, fields) in enumerate(steps):
            take_in(engine, event(f"evt_{name}_{number}", type_, created, session(name, **fields)))

    expected = [
        order(name, event_id=f"evt_{name}_{decides}", **columns)
        for name, (_, decides, columns, _, _) in HISTORIES.items()
    ]
    assert_rows(engine, {"orders": expected})
    assert {name: kinds(engine, name) for name in HISTORIES} == {
        name: history[3] for name, history in HISTORIES.items()
    }
    assert noted(engine) == {(name, kind) for name, history in HISTORIES.items() for kind in history[4]}


def noted(engine: Engine) -> set[tuple[str, str]]:
    """Return the subject and the kind of each anomaly in force."""
    found = rows(engine, "SELECT subject_id, kind FROM anomalies WHERE resolved_at IS NULL")
    return {(row["subject_id"], row["kind"]) for row in found}


# ---- Which event set a moment ----

# Of the histories above: the number of the event that each moment is from.
SET_BY: Mapping[str, Mapping[str, int]] = {
    "opened_paid": {"completed_at": 1, "paid_at": 1},
    "cleared": {"completed_at": 0, "paid_at": 1},
    "cleared_backwards": {"completed_at": 1, "paid_at": 0},
    "bounced": {"completed_at": 0, "failed_at": 1},
    "bounced_backwards": {"completed_at": 1, "failed_at": 0},
    "failed_then_paid": {"completed_at": 0, "failed_at": 1, "paid_at": 2},
    "paid_then_failed": {"completed_at": 2, "failed_at": 1, "paid_at": 0},
    "expired_then_paid": {"expired_at": 0, "completed_at": 1, "paid_at": 1},
    "completed_twice": {"completed_at": 1, "paid_at": 1},
    "read_paid": {"completed_at": 0, "paid_at": 0},
    "read_before_paid": {"completed_at": 1, "paid_at": 1},
    "clock": {"expired_at": 1},
    "clock_then_expired": {"expired_at": 2},
    "clock_then_paid": {"completed_at": 1, "paid_at": 1},
}
MOMENTS = ("completed_at", "paid_at", "failed_at", "expired_at")


def test_an_explanation_names_the_event_of_each_moment(engine: Engine) -> None:
    """The earliest event that reports a moment sets it, not the event that decides the row (rule 5)."""
    for name in SET_BY:
        for number, (type_, created, fields) in enumerate(HISTORIES[name][0]):
            take_in(engine, event(f"evt_{name}_{number}", type_, created, session(name, **fields)))

    assert {name: explained(engine, name) for name in SET_BY} == {
        name: {moment: f"evt_{name}_{number}" for moment, number in moments.items()} for name, moments in SET_BY.items()
    }


def explained(engine: Engine, id_: str) -> dict[str, str]:
    """Return the event that the explanation names for each moment of an order."""
    explanation = explain.explain(engine, Subject("orders", "", False, id_))  # noqa: FBT003 - the mode
    by_column = {each["column"]: each["event_id"] for each in explanation.columns}
    return {moment: by_column[moment] for moment in MOMENTS if by_column[moment] is not None}


# ---- Lines ----

PRODUCT: Json = {"id": "prod_2", "object": "product", "name": "Cup", "default_price": "price_9"}
# docs.stripe.com/api/checkout/sessions/line_items: the list is present only if `expand` asked for it.
LINE: Json = {
    "id": "li_1",
    "object": "item",
    "adjustable_quantity": {"enabled": True, "maximum": 9, "minimum": 1},
    "amount_discount": 121,
    "amount_subtotal": 3300,
    "amount_tax": 254,
    "amount_total": 3433,
    "currency": "usd",
    "description": "Shirt",
    "discounts": [{"amount": 122, "discount": {"id": "di_1", "object": "discount"}}],
    "metadata": {"of": "line"},
    "price": {
        "id": "price_1",
        "object": "price",
        "currency": "eur",
        "nickname": "Small",
        "product": "prod_1",
        "unit_amount": 1100,
    },
    "quantity": 3,
    "taxes": [{"amount": 255, "rate": {"id": "txr_1", "object": "tax_rate"}, "taxable_amount": 3179}],
}
SECOND_LINE: Json = {
    **LINE,
    "id": "li_2",
    "amount_discount": 0,
    "amount_subtotal": 1700,
    "amount_tax": 136,
    "amount_total": 1836,
    "currency": "cad",
    "description": None,
    "price": {"id": "price_2", "object": "price", "product": PRODUCT, "unit_amount": 1700},
    "quantity": 1,
}
# Lines had no amounts of discount and tax until 2022, and may have neither a price nor a quantity.
OLD_LINE: Json = {
    "id": "li_3",
    "object": "item",
    "amount_subtotal": 500,
    "amount_total": 501,
    "currency": "usd",
    "description": "Gift",
    "price": None,
    "quantity": None,
}


def listed(*lines: Json, has_more: bool = False) -> dict[str, Any]:
    """Return the list object that holds *lines*."""
    url = "/v1/checkout/sessions/cs/line_items"
    return {"line_items": {"object": "list", "data": list(lines), "has_more": has_more, "url": url}}


def line(id_: str, order_id: str, **columns: object) -> dict[str, Any]:
    """Return the row of LINE with other *columns*."""
    known: Json = {
        "description": "Shirt",
        "price": "price_1",
        "product": "prod_1",
        "quantity": 3,
        "currency": "usd",
        "amount_subtotal": 3300,
        "amount_discount": 121,
        "amount_tax": 254,
        "amount_total": 3433,
        "event_id": f"evt_{order_id}",
        "as_of": at(DONE),
    }
    return {"id": id_, "order_id": order_id, **known, **columns}


SECOND_ROW: Json = {
    "description": None,
    "price": "price_2",
    "product": "prod_2",
    "quantity": 1,
    "currency": "cad",
    "amount_subtotal": 1700,
    "amount_discount": 0,
    "amount_tax": 136,
    "amount_total": 1836,
}
OLD_ROW: Json = {
    "description": "Gift",
    "price": None,
    "product": None,
    "quantity": None,
    "amount_subtotal": 500,
    "amount_discount": None,
    "amount_tax": None,
    "amount_total": 501,
}


def test_the_lines_of_a_session(engine: Engine) -> None:
    """The lines of a session that was read with them are complete if the list has no more."""
    take_in(
        engine,
        event("evt_cs_a", OBSERVED, DONE, session("cs_a", **OPEN, **listed(LINE, SECOND_LINE))),
        event("evt_cs_b", OBSERVED, DONE, session("cs_b", **OPEN, **listed(OLD_LINE))),
        event("evt_cs_c", OBSERVED, DONE, session("cs_c", **OPEN, **listed())),
        # The first ten of more lines: the others are unknown (docs.stripe.com/api/checkout/sessions/line_items).
        event("evt_cs_d", OBSERVED, DONE, session("cs_d", **OPEN, **listed({**LINE, "id": "li_4"}, has_more=True))),
    )

    assert_rows(
        engine,
        {
            "orders": [
                order("cs_a", **OPENED_ORDER, lines_complete=True),
                order("cs_b", **OPENED_ORDER, lines_complete=True),
                order("cs_c", **OPENED_ORDER, lines_complete=True),
                order("cs_d", **OPENED_ORDER),
            ],
            "order_lines": [
                line("li_1", "cs_a"),
                line("li_2", "cs_a", **SECOND_ROW),
                line("li_3", "cs_b", **OLD_ROW),
            ],
        },
    )


def test_lines_that_are_listed_again(engine: Engine) -> None:
    """The last list replaces earlier ones. An event without lines leaves them as they are."""
    first = session("cs_a", **OPEN, **listed(LINE, {**LINE, "id": "li_2"}))
    second = session("cs_a", **OPEN, **listed({**LINE, "id": "li_2", "quantity": 8}, {**LINE, "id": "li_3"}))
    take_in(
        engine,
        event("evt_cs_a", OBSERVED, DONE, second),
        event("evt_cs_0", OBSERVED, OPENED, first),
        event("evt_cs_1", COMPLETED, LATER, session("cs_a")),
    )

    paid: Json = {"completed_at": at(LATER), "paid_at": at(LATER), "as_of": at(LATER)}
    assert_rows(
        engine,
        {
            "orders": [order("cs_a", **paid, event_id="evt_cs_1", lines_complete=True)],
            "order_lines": [line("li_2", "cs_a", quantity=8), line("li_3", "cs_a")],
        },
    )


# ---- The view of orders ----


def test_the_order_book_has_every_column_of_the_order(engine: Engine) -> None:
    """The view has the order's columns and its returned money: zero where intent and invoice are known."""
    take_in(engine, event("evt_cs_1", COMPLETED, DONE, session("cs_1")))

    nothing: Json = {"refunded_amount": 0, "credited_amount": 0, "disputed_amount": 0, "refund_status": "none"}
    expected = {"orders": [order("cs_1")], "order_book": [{**order("cs_1"), **nothing}]}
    assert_rows(engine, expected, views=["order_book"])


# ---- Old names, old places, and copies that another language wrote ----


def test_the_oldest_key_of_the_shipping_address(engine: Engine) -> None:
    """Before 2022-08-01 `shipping_details` was `shipping` (docs.stripe.com/changelog/2022-08-01)."""
    old: dict[str, Any] = {"shipping": OLD_SHIPPING, "without": NEW_SINCE_2021}
    both: dict[str, Any] = {
        "shipping": SHIPPING,
        "shipping_details": OLD_SHIPPING,
        "without": ["collected_information"],
    }
    take_in(
        engine,
        event("evt_cs_a", COMPLETED, DONE, session("cs_a", **old), version="2020-08-27"),
        event("evt_cs_b", COMPLETED, DONE, session("cs_b", **both), version="2022-08-01"),
    )

    rows_ = [order("cs_a", **{**OF_2021, "shipping": OLD_SHIPPING}), order("cs_b", shipping=OLD_SHIPPING)]
    assert_rows(engine, {"orders": rows_})


# The shipping keys of a later event; and whether they clear the address.
LATER_SHIPPING: dict[str, tuple[Json, bool]] = {
    "cs_null": ({"collected_information": {"business_name": None, "shipping_details": None}}, True),
    "cs_nothing": ({"collected_information": None}, True),
    "cs_old_null": ({"shipping_details": None, "without": ["collected_information"]}, True),
    "cs_oldest_null": ({"shipping": None, "without": ["collected_information"]}, True),
    "cs_absent": ({"collected_information": {"business_name": None}}, False),
    "cs_without": ({"without": ["collected_information"]}, False),
}


@pytest.mark.parametrize("order_", [(0, 1), (1, 0)], ids=["as it happened", "backwards"])
def test_a_later_null_clears_the_shipping_address(engine: Engine, order_: tuple[int, int]) -> None:
    """A null clears the address and an absent key does not (rule 5), whichever key a version uses."""
    for id_, (fields, _) in LATER_SHIPPING.items():
        bodies = [
            event(f"evt_{id_}_1", COMPLETED, DONE, session(id_)),
            event(f"evt_{id_}_2", COMPLETED, DONE + 9, session(id_, **fields)),
        ]
        take_in(engine, *(bodies[number] for number in order_))

    found = rows(engine, "SELECT id, shipping FROM orders")
    assert {row["id"]: row["shipping"] for row in found} == {
        id_: None if is_cleared else SHIPPING for id_, (_, is_cleared) in LATER_SHIPPING.items()
    }


def test_a_setup_of_2019_is_complete(engine: Engine) -> None:
    """A session in setup mode has nothing to pay, so it is complete without a payment (rule 10)."""
    setup: Json = {**SESSION_OF_2019, "id": "cs_a", "mode": "setup", "payment_intent": None, "setup_intent": "seti_9"}
    take_in(engine, event("evt_cs_a", COMPLETED, DONE, setup, version="2019-05-16"))

    assert_rows(engine, {"orders": [order_of_2019("cs_a", mode="setup", status="complete")]})
    assert noted(engine) == set()
    assert kinds(engine, "cs_a") == ["order.completed"]


def test_empty_objects_and_decimals_of_other_languages(engine: Engine) -> None:
    """PHP writes {} as [], other languages 1500 as 1500.0: the rows are equal (rule 8; stripe-facts, section 11)."""
    empty = session(
        "cs_a",
        after_expiration=[],
        collected_information=[],
        customer_details=[],
        metadata=[],
        presentment_details=[],
        total_details=[],
    )
    decimal = session(
        "cs_b",
        amount_total=5225.0,
        created=OPENED + 0.0,
        presentment_details={"presentment_amount": 7315.0, "presentment_currency": "cad"},
        total_details={"amount_discount": 1003.0, "amount_shipping": 801.0, "amount_tax": 427.0},
    )
    take_in(engine, event("evt_cs_a", COMPLETED, DONE, empty), event("evt_cs_b", COMPLETED, DONE, decimal))

    parts: Json = dict.fromkeys(("amount_discount", "amount_shipping", "amount_tax", "shipping"))
    mailed: Json = {"customer_email": "passed@example.com", "metadata": {}}
    assert_rows(engine, {"orders": [order("cs_a", **NOTHING_SHOWN, **parts, **mailed), order("cs_b")]})


# ---- What moves without a new status ----


def test_a_total_that_moved(engine: Engine) -> None:
    """A total or a currency that changes without a new one-shot in the same step is a correction."""
    for id_, fields in (("cs_a", {"amount_total": 5000}), ("cs_b", {"currency": "eur"}), ("cs_c", {"metadata": {}})):
        take_in(
            engine,
            event(f"evt_{id_}", COMPLETED, DONE, session(id_)),
            event(f"evt_{id_}_read", OBSERVED, LATER, session(id_, **fields)),
        )

    assert {id_: kinds(engine, id_) for id_ in ("cs_a", "cs_b", "cs_c")} == {
        "cs_a": ["order.paid", "order.corrected"],
        "cs_b": ["order.paid", "order.corrected"],
        "cs_c": ["order.paid"],
    }


def test_lines_of_other_totals_are_not_complete(engine: Engine) -> None:
    """Lines that were listed with other totals or another currency are no longer those of the order (rule 11)."""
    changed: Mapping[str, Json] = {
        "cs_total": {"amount_total": 5226},
        "cs_subtotal": {"amount_subtotal": 5001},
        "cs_currency": {"currency": "eur"},
        "cs_shipping": {"total_details": {"amount_discount": 1003, "amount_shipping": 802, "amount_tax": 427}},
    }
    for id_, fields in changed.items():
        open_ = session(id_, **OPEN, **listed({**LINE, "id": f"li_{id_}"}))
        done = session(id_, **fields)
        take_in(engine, event(f"evt_{id_}_0", OBSERVED, OPENED, open_), event(f"evt_{id_}", COMPLETED, DONE, done))
    again = session("cs_total", amount_total=5226, **listed({**LINE, "id": "li_cs_total"}))
    assert complete(engine) == {"cs_total": False, "cs_subtotal": False, "cs_currency": False, "cs_shipping": True}

    take_in(engine, event("evt_again", OBSERVED, LATER, again))
    assert complete(engine)["cs_total"]


def complete(engine: Engine) -> dict[str, bool]:
    """Return whether the lines of each order are complete."""
    return {row["id"]: row["lines_complete"] for row in rows(engine, "SELECT id, lines_complete FROM orders")}
