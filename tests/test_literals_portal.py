"""The rows of the billing portal's configurations and sessions, by docs.stripe.com/api/customer_portal.

Fields and versions are in stripe-facts, sections 2.7 and 6.
"""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import stripe
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

# The steps in order of arrival (type, created, fields, previous attributes, absent keys); the deciding one; columns.
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
    # A rendering without a key leaves the column as it was.
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
    # A null clears a column and an absent key does not (rule 5): a login page may be closed again.
    "closed_login": (
        [
            (CREATED, MADE, {}, None, ()),
            (UPDATED, CHANGED, {"login_page": {"enabled": False, "url": None}, "updated": CHANGED}, None, ()),
        ],
        1,
        {"login_page_url": None, "updated": at(CHANGED)},
    ),
    "null_login": (
        [
            (CREATED, MADE, {}, None, ()),
            (UPDATED, CHANGED, {"login_page": None, "name": None, "updated": CHANGED}, None, ()),
        ],
        1,
        {"login_page_url": None, "name": None, "updated": at(CHANGED)},
    ),
    # A reading at Stripe is folded like an event.
    "read": ([("payfold.billing_portal.configuration.observed", LATER, {}, None, ())], 0, {}),
    # The object's own `updated` beats the event's `created`: a later event with an older state changes nothing.
    "own_time": (
        [
            (UPDATED, CHANGED, {"active": False, "updated": CHANGED}, {"active": True, "updated": MADE - 5}, ()),
            (UPDATED, LATER, {"name": "Older", "updated": CHANGED - 1}, {"name": "Oldest", "updated": MADE}, ()),
        ],
        0,
        {"active": False, "updated": at(CHANGED)},
    ),
    # Events of one second with equal `updated`: the state before each event shows their order.
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
    """Each history gives every column, in its order of arrival."""
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


def test_empty_lists_of_the_features_stay_lists(engine: Engine) -> None:
    """Every list in the features that Stripe's SDK has is kept as a list when it is empty."""
    source = inspect.getsource(sys.modules[stripe.billing_portal.Configuration.__module__])
    lists = sorted(set(re.findall(r"^ +(\w+): (?:Optional\[)?List\[", source, re.MULTILINE)))
    assert "products" in lists
    features: Json = {"newer": {name: [] for name in lists}, "enabled": False}

    take_in(
        engine,
        event(
            "evt_1",
            "billing_portal.configuration.created",
            MADE,
            {**CONFIGURATION, "id": "bpc_1", "features": features},
        ),
    )

    assert rows(engine, "SELECT features FROM portal_configurations") == [{"features": features}]


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


def test_a_later_null_of_a_portal_session(engine: Engine) -> None:
    """A null clears a column and an absent key does not (rule 5), in either order of arrival."""
    observed = "payfold.billing_portal.session.observed"
    cleared: Json = {"flow_type": None, "return_url": None}
    for id_, order in (("null", (0, 1)), ("null_first", (1, 0)), ("absent", (0, 1)), ("absent_first", (1, 0))):
        later = {**SESSION, "id": id_, "flow": None, "return_url": None}
        if id_.startswith("absent"):
            later = {name: value for name, value in later.items() if name not in ("flow", "return_url")}
        made = event(f"evt_{id_}", "billing_portal.session.created", MADE, {**SESSION, "id": id_})
        arrivals = [made, event(f"obs_{id_}", observed, LATER, later)]
        take_in(engine, *(arrivals[number] for number in order))

    expected = [
        {"id": id_, **SESSION_ROW, "event_id": f"obs_{id_}", "as_of": at(LATER), **columns}
        for id_, columns in (("null", cleared), ("null_first", cleared), ("absent", {}), ("absent_first", {}))
    ]
    assert_rows(engine, {"portal_sessions": expected})


def test_an_expired_portal_session(engine: Engine) -> None:
    """Stripe reports no end of a portal session, our clock does, whichever event arrives first."""
    clock = "payfold.billing_portal.session.clock_expired"
    made = [event(f"evt_{id_}", "billing_portal.session.created", MADE, {**SESSION, "id": id_}) for id_ in ("a", "b")]
    ended = [event(f"evt_{id_}_end", clock, LATER, {**SESSION, "id": id_}) for id_ in ("a", "b")]
    take_in(engine, made[0], ended[0], ended[1], made[1])

    over: Json = {**SESSION_ROW, "expired_at": at(LATER), "as_of": at(LATER)}
    assert_rows(engine, {"portal_sessions": [{"id": id_, **over, "event_id": f"evt_{id_}_end"} for id_ in ("a", "b")]})


def test_a_configuration_that_an_older_event_follows(engine: Engine) -> None:
    """A configuration's own `updated` comes before the event's time, also where the older one arrives alone later."""
    updated = "billing_portal.configuration.updated"
    # bpc_1: the newer state has the earlier event. bpc_2: its newer event has no `updated`, so the event's time counts.
    newer = {**CONFIGURATION, "id": "bpc_1", "updated": CHANGED + 5}
    older = {**CONFIGURATION, "id": "bpc_1", "updated": CHANGED + 2}
    take_in(engine, event("evt_1_newer", updated, CHANGED, newer), event("evt_1_older", updated, LATER, older))
    silent = {name: value for name, value in CONFIGURATION.items() if name != "updated"}
    dated = {**CONFIGURATION, "id": "bpc_2", "updated": CHANGED}
    take_in(engine, event("evt_2_newer", updated, LATER, {**silent, "id": "bpc_2"}))
    take_in(engine, event("evt_2_older", updated, CHANGED, dated))

    found = rows(engine, "SELECT event_id FROM portal_configurations ORDER BY id")
    assert found == [{"event_id": "evt_1_newer"}, {"event_id": "evt_2_newer"}]


def test_a_late_event_does_not_reopen_a_portal_session(engine: Engine) -> None:
    """Our clock's expiry outranks an event that is created later and arrives alone."""
    clock = "payfold.billing_portal.session.clock_expired"
    observed = "payfold.billing_portal.session.observed"
    ended = event("evt_end", clock, CHANGED, {**SESSION, "id": "bps_e"})
    take_in(engine, ended, event("obs_later", observed, LATER, {**SESSION, "id": "bps_e"}))

    found = rows(engine, "SELECT event_id, expired_at FROM portal_sessions")
    assert found == [{"event_id": "evt_end", "expired_at": at(CHANGED)}]
