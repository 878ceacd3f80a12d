"""Ids lie in an index as Stripe's do: the examples that Stripe has published, next to the moments of their making."""

import pytest

from deploy.sandbox import Account
from deploy.sandbox.chance import Chance


@pytest.mark.parametrize(
    ("made", "begins"),
    [
        (1_686_089_970, "evt_1NG8Du"),  # https://docs.stripe.com/api/events/object
        (1_681_750_958, "cn_1MxvRq"),  # https://docs.stripe.com/api/credit_notes/object
        (1_680_800_504, "pi_3MtwBw"),  # https://docs.stripe.com/api/payment_intents/object
        (1_680_893_993, "cus_Nffr"),  # https://docs.stripe.com/api/customers/object
        (1_483_565_364, "cus_9s6X"),  # the same page, as of 2017
    ],
)
def test_ids_begin_as_published_ones(made: int, begins: str) -> None:
    """An id begins as Stripe's own example that was made in the same second."""
    chance = Chance(0, now=lambda: made)
    prefix = begins.partition("_")[0]
    made_id = chance.intent_id() if prefix == "pi" else chance.short_id("cus") if prefix == "cus" else chance.id(prefix)
    assert made_id.startswith(begins)
    assert len(made_id) == len(prefix) + 1 + (14 if prefix == "cus" else 24)


def test_an_intent_and_what_pays_it_begin_alike() -> None:
    """A charge, its refund and their events have their PaymentIntent's beginning, however late they come."""
    shop = Account(seed=1, payments=True)
    session = shop.open_session()
    shop.complete(session)
    intent = shop.session(session)["payment_intent"]
    shop.advance(86_400)
    shop.refund(intent)

    stem = intent.removeprefix("pi_")[:16]
    ids = {event.type: (event.id, event.object_id) for event in shop.events}
    for event_type in ("charge.succeeded", "payment_intent.succeeded", "refund.created", "charge.refunded"):
        assert all(each.partition("_")[2].startswith(stem) for each in ids[event_type]), ids[event_type]
    assert len({event.id for event in shop.events}) == len(shop.events)
    assert not ids["checkout.session.completed"][0].startswith(f"evt_{stem}")


def test_ids_of_one_account_name_it() -> None:
    """Ten characters of each id are the account's own; another account has others."""
    first, again, other = (
        Account(seed=seed, account=name) for seed, name in ((1, "acct_a"), (2, "acct_a"), (1, "acct_b"))
    )
    own, same, others = (account.create_payment_link()[-18:-8] for account in (first, again, other))
    assert own == same != others
