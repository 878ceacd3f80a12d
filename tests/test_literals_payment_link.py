"""A payment link's row, after docs.stripe.com/api/payment-link/object and stripe-facts, section 2.2.

The object has neither a `created` nor an `updated`: only `payment_link.created` shows when it was made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine

from tests.envelopes import Json, event
from tests.ledger import anomalies, kinds, take_in
from tests.literals import assert_rows, at

MADE, CHANGED, LATER = 1_760_000_100, 1_760_000_300, 1_760_000_500

LINK: Json = {
    "object": "payment_link",
    "active": True,
    "after_completion": {
        "hosted_confirmation": {"custom_message": "Thanks"},
        "redirect": {"url": "https://shop.example.com/thanks"},
        "type": "redirect",
    },
    "allow_promotion_codes": False,
    "application_fee_amount": 12,
    "created": 1_700_000_009,  # No version has this key; its value differs from the event's time.
    "currency": "chf",
    "custom_text": {"submit": {"message": "Buy"}},
    "customer_creation": "if_required",
    "inactive_message": "Sold out",
    "invoice_creation": {"enabled": True, "invoice_data": {"metadata": {"of": "invoice"}}},
    "livemode": False,
    "metadata": {"campaign": "spring", "sku": "1"},
    "on_behalf_of": None,
    "payment_intent_data": {"description": "Payment", "metadata": {"of": "intent"}},
    "payment_method_types": ["card"],
    "restrictions": {"completed_sessions": {"count": 4, "limit": 70}},
    "shipping_options": [],
    "subscription_data": {"metadata": {"of": "subscription"}},
    "transfer_data": {"amount": 11, "destination": "acct_9"},
    "url": "https://buy.stripe.com/test_1",
}
ROW: Json = {
    "active": True,
    "url": "https://buy.stripe.com/test_1",
    "currency": "chf",
    "metadata": {"campaign": "spring", "sku": "1"},
    "created": at(MADE),
}
CREATED, UPDATED, OBSERVED = "payment_link.created", "payment_link.updated", "payfold.payment_link.observed"
ACTIVATED, DEACTIVATED = "payment_link.activated", "payment_link.deactivated"
OFF: Json = {"active": False}
ON: Json = {"active": True}

# The steps in order of arrival (type, created, fields, previous attributes), the deciding one, columns, changes.
Step = tuple[str, int, Json, Json | None]
HISTORIES: Mapping[str, tuple[Sequence[Step], int, Json, Sequence[str]]] = {
    "created": ([(CREATED, MADE, {}, None)], 0, {}, [ACTIVATED]),
    "born_off": ([(CREATED, MADE, OFF, None)], 0, OFF, [DEACTIVATED]),
    "bare": ([(CREATED, MADE, {"metadata": {}}, None)], 0, {"metadata": {}}, [ACTIVATED]),
    "seen_late": ([(UPDATED, CHANGED, {}, {"metadata": {"sku": None}})], 0, {"created": None}, [ACTIVATED]),
    "read": ([(OBSERVED, CHANGED, {}, None)], 0, {"created": None}, [ACTIVATED]),
    "switched": (
        [(CREATED, MADE, {}, None), (UPDATED, CHANGED, OFF, ON), (UPDATED, LATER, ON, OFF)],
        2,
        {},
        [ACTIVATED, DEACTIVATED, ACTIVATED],
    ),
    # An older event that arrives late sets only the time at which the link was made.
    "backwards": (
        [
            (UPDATED, LATER, {**OFF, "metadata": {"sku": "2"}}, {**ON, "metadata": {"sku": "1"}}),
            (CREATED, MADE, {}, None),
        ],
        0,
        {**OFF, "metadata": {"sku": "2"}},
        [DEACTIVATED],
    ),
    # One second: the state before each event shows which came after which, and nothing comes before the first.
    "one_second": (
        [(UPDATED, MADE, ON, OFF), (CREATED, MADE, {}, None), (UPDATED, MADE, OFF, ON)],
        0,
        {},
        [ACTIVATED],
    ),
    "one_second_off": ([(UPDATED, MADE, OFF, ON), (CREATED, MADE, {}, None)], 0, OFF, [DEACTIVATED]),
    # A version that does not report whether the link is active records no change.
    "not_reported": ([(CREATED, MADE, {"active": None}, None)], 0, {"active": None}, []),
    "renamed": (
        [(CREATED, MADE, {}, None), (UPDATED, CHANGED, {"metadata": {"sku": "3"}}, {"metadata": {"sku": "1"}})],
        1,
        {"metadata": {"sku": "3"}},
        [ACTIVATED],
    ),
}


def test_a_payment_link(engine: Engine) -> None:
    """Each history gives every column and the changes, in its order of arrival."""
    for name, (steps, *_) in HISTORIES.items():
        for number, (type_, created, fields, previous) in enumerate(steps):
            object_ = {**LINK, "id": name, **fields}
            take_in(engine, event(f"evt_{name}_{number}", type_, created, object_, before=previous))

    assert_rows(engine, {"payment_links": [row(name) for name in HISTORIES]})
    assert {name: kinds(engine, name) for name in HISTORIES} == {
        name: history[3] for name, history in HISTORIES.items()
    }
    assert anomalies(engine) == []


def row(name: str) -> dict[str, Any]:
    """Return the row of one history."""
    steps, decides, columns, _ = HISTORIES[name]
    return {"id": name, **ROW, "event_id": f"evt_{name}_{decides}", "as_of": at(steps[decides][1]), **columns}
