"""What the billing portal's configurations and sessions become, by docs.stripe.com/api/customer_portal.

Fields and versions are in stripe-facts, sections 2.7 and 6.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.envelopes import Json, event
from tests.ledger import anomalies, rows, take_in
from tests.literals import assert_rows, at

MADE, CHANGED, LATER = 1_760_000_100, 1_760_000_300, 1_760_000_500

FEATURES: Json = {
    "customer_update": {"allowed_updates": ["email", "tax_id"], "enabled": True},
    "invoice_history": {"enabled": False},
    "payment_method_update": {"enabled": True, "payment_method_configuration": "pmc_1"},
    "subscription_cancel": {
        "cancellation_reason": {"enabled": True, "options": ["too_expensive", "other"]},
        "enabled": True,
        "mode": "at_period_end",
        "proration_behavior": "none",
    },
    "subscription_pause": {"enabled": False},
    "subscription_update": {
        "default_allowed_updates": ["price"],
        "enabled": True,
        "products": [{"prices": ["price_1"], "product": "prod_1"}],
        "proration_behavior": "always_invoice",
    },
}
CONFIGURATION: Json = {
    "object": "billing_portal.configuration",
    "active": True,
    "application": "ca_1",
    "business_profile": {
        "headline": "Headline",
        "privacy_policy_url": "https://shop.example.com/privacy",
        "terms_of_service_url": "https://shop.example.com/terms",
    },
    "created": MADE - 7,
    "default_return_url": "https://shop.example.com/account",
    "features": FEATURES,
    "is_default": False,
    "livemode": False,
    "login_page": {"enabled": True, "url": "https://billing.stripe.com/p/login/test_1"},
    "metadata": {"of": "configuration"},
    "name": "Small shops",
    "updated": MADE - 5,
}
ROW: Json = {
    "active": True,
    "is_default": False,
    "name": "Small shops",
    "features": FEATURES,
    "login_page_url": "https://billing.stripe.com/p/login/test_1",
    "created": at(MADE - 7),
    "updated": at(MADE - 5),
}
CREATED, UPDATED = "billing_portal.configuration.created", "billing_portal.configuration.updated"

# The steps as they arrive (type, created, fields, previous attributes, keys a version has not); which decides; columns.
Step = tuple[str, int, Json, Json | None, Sequence[str]]
CONFIGURATIONS: Mapping[str, tuple[Sequence[Step], int, Json]] = {
    "created": ([(CREATED, MADE, {}, None, ())], 0, {}),
    "default": (
        [(CREATED, MADE, {"is_default": True, "active": False}, None, ())],
        0,
        {"is_default": True, "active": False},
    ),
    "no_login": (
        [(CREATED, MADE, {"login_page": {"enabled": False, "url": None}}, None, ())],
        0,
        {"login_page_url": None},
    ),
    # Before 2025-08-27 it had no name; before 2022 no login page.
    "of_2024": ([(CREATED, MADE, {}, None, ("name",))], 0, {"name": None}),
    "of_2021": ([(CREATED, MADE, {}, None, ("name", "login_page"))], 0, {"name": None, "login_page_url": None}),
    "bare": ([(CREATED, MADE, {"features": {}, "name": None}, None, ())], 0, {"features": {}, "name": None}),
    # A rendering without a key leaves what is known of it.
    "older_version": (
        [
            (CREATED, MADE, {}, None, ()),
            (
                UPDATED,
                CHANGED,
                {"active": False, "updated": CHANGED},
                {"active": True, "updated": MADE - 5},
                ("name", "login_page"),
            ),
        ],
        1,
        {"active": False, "updated": at(CHANGED)},
    ),
    # What was read at Stripe is folded like an event.
    "read": ([("payfold.billing_portal.configuration.observed", LATER, {}, None, ())], 0, {}),
    # Its own `updated` is before the event's `created`: the later delivery of an older state changes nothing.
    "own_time": (
        [
            (UPDATED, CHANGED, {"active": False, "updated": CHANGED}, {"active": True, "updated": MADE - 5}, ()),
            (UPDATED, LATER, {"name": "Older", "updated": CHANGED - 1}, {"name": "Oldest", "updated": MADE}, ()),
        ],
        0,
        {"active": False, "updated": at(CHANGED)},
    ),
    # Of one second, of `updated` too: the state before each event shows which came after which.
    "one_second": (
        [
            (UPDATED, CHANGED, {"name": "Third", "updated": CHANGED}, {"name": "Second"}, ()),
            (
                UPDATED,
                CHANGED,
                {"name": "Second", "updated": CHANGED},
                {"name": "Small shops", "updated": MADE - 5},
                (),
            ),
            (CREATED, MADE, {}, None, ()),
        ],
        0,
        {"name": "Third", "updated": at(CHANGED)},
    ),
    "arrived_backwards": (
        [
            (UPDATED, CHANGED, {"features": {}, "updated": CHANGED}, {"features": FEATURES, "updated": MADE - 5}, ()),
            (CREATED, MADE, {}, None, ()),
        ],
        0,
        {"features": {}, "updated": at(CHANGED)},
    ),
}


def test_a_portal_configuration(engine: Engine) -> None:
    """Every column, by what was seen of the configuration and in which order it arrived."""
    for name, (steps, *_) in CONFIGURATIONS.items():
        for number, (type_, created, fields, previous, without) in enumerate(steps):
            whole = {**CONFIGURATION, "id": name, **fields}
            object_ = {key: value for key, value in whole.items() if key not in without}
            take_in(engine, event(f"evt_{name}_{number}", type_, created, object_, before=previous))

    expected = [
        {"id": name, **ROW, "event_id": f"evt_{name}_{decides}", "as_of": at(steps[decides][1]), **columns}
        for name, (steps, decides, columns) in CONFIGURATIONS.items()
    ]
    assert_rows(engine, {"portal_configurations": expected})
    assert anomalies(engine) == []


@pytest.mark.xfail(strict=True, reason="A list that the fold does not know becomes an object where it is empty.")
def test_an_empty_list_of_features(engine: Engine) -> None:
    """A list stays a list where it is empty, also one that only the newest version has (`interval_options`)."""
    features = {"subscription_pause": {"duration": {"interval_options": [], "type": "indefinite"}, "enabled": False}}
    take_in(engine, event("evt_1", CREATED, MADE, {**CONFIGURATION, "id": "bpc_1", "features": features}))

    [row] = rows(engine, "SELECT features FROM portal_configurations")
    assert row == {"features": features}


# ---- Sessions ----

SESSION: Json = {
    "object": "billing_portal.session",
    "after_expiration": {"customer_login": {"expires_at": LATER}, "type": "customer_login"},
    "configuration": "bpc_1",
    "created": MADE - 3,
    "customer": "cus_1",
    "customer_account": "acct_9",
    "flow": {
        "after_completion": {
            "hosted_confirmation": None,
            "redirect": {"return_url": "https://shop.example.com/done"},
            "type": "redirect",
        },
        "subscription_cancel": {"retention": {"coupon_offer": {"coupon": "co_1"}, "type": "coupon_offer"}},
        "type": "subscription_cancel",
    },
    "livemode": False,
    "locale": "fr",
    "on_behalf_of": None,
    "return_url": "https://shop.example.com/account",
    "url": "https://billing.stripe.com/p/session/test_secret",
}
SESSION_ROW: Json = {
    "configuration": "bpc_1",
    "customer": "cus_1",
    "flow_type": "subscription_cancel",
    "return_url": "https://shop.example.com/account",
    "created": at(MADE - 3),
    "expired_at": None,
    "as_of": at(MADE),
}
SESSIONS: Mapping[str, tuple[Json, Json]] = {
    "bps_full": ({}, {}),
    # Before 2022-12 it had no flow, and a session without one has null.
    "bps_null_flow": ({"flow": None, "return_url": None}, {"flow_type": None, "return_url": None}),
    **{
        f"bps_{flow}": ({"flow": {"type": flow}}, {"flow_type": flow})
        for flow in (
            "customer_update",
            "payment_method_update",
            "subscription_pause",
            "subscription_update",
            "subscription_update_confirm",
        )
    },
    "bps_expanded": (
        {"configuration": {**CONFIGURATION, "id": "bpc_2"}, "customer": {"id": "cus_2", "object": "customer"}},
        {"configuration": "bpc_2", "customer": "cus_2"},
    ),
}


def test_a_portal_session(engine: Engine) -> None:
    """Every column of a session that was created; its url, a credential, is in no row and in no payload."""
    for name, (fields, _) in SESSIONS.items():
        take_in(engine, event(f"evt_{name}", "billing_portal.session.created", MADE, {**SESSION, "id": name, **fields}))

    expected: list[dict[str, Any]] = [
        {"id": name, **SESSION_ROW, "event_id": f"evt_{name}", **columns} for name, (_, columns) in SESSIONS.items()
    ]
    assert_rows(engine, {"portal_sessions": expected})
    assert rows(engine, "SELECT id FROM events WHERE convert_from(payload, 'UTF8') LIKE '%test_secret%'") == []
    assert anomalies(engine) == []


def test_a_portal_session_whose_time_is_up(engine: Engine) -> None:
    """Stripe reports no end of a session: our clock does, whichever of the two arrives first."""
    clock = "payfold.billing_portal.session.clock_expired"
    made = [event(f"evt_{id_}", "billing_portal.session.created", MADE, {**SESSION, "id": id_}) for id_ in ("a", "b")]
    ended = [event(f"evt_{id_}_end", clock, LATER, {**SESSION, "id": id_}) for id_ in ("a", "b")]
    take_in(engine, made[0], ended[0], ended[1], made[1])

    over: Json = {**SESSION_ROW, "expired_at": at(LATER), "as_of": at(LATER)}
    assert_rows(engine, {"portal_sessions": [{"id": id_, **over, "event_id": f"evt_{id_}_end"} for id_ in ("a", "b")]})
