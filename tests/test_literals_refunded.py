"""The refunded amount of an order (design.md rule 10), each history in every order of arrival.

An order is of 5000 usd and paid at 10, its charge is captured at 10 where no case has it otherwise. The arithmetic is
with each case: *known* are the charge's refunds, *unseen* is its `amount_refunded` less those.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.local.services import Services
from tests import ledger
from tests.literals import at
from tests.stripe_payments import (
    T,
    arrived_in_every_order,
    arrived_in_every_way,
    charge,
    dispute,
    event,
    refund,
    released,
    session,
    suffixes,
    ways,
)

ORDER = event("evt_cs@", "checkout.session.completed", 10, session())
UNPAID = event("evt_cs@", "checkout.session.completed", 10, session(payment_status="unpaid"))


def charge_refunded(
    amount: int, created: int, id_: str = "evt_ch@", charge_id: str = "ch@", /, **fields: object
) -> bytes:
    """Return a ``charge.refunded`` with *amount* as its `amount_refunded`."""
    whole = charge(charge_id, amount_refunded=amount, refunded=amount == 5000) | fields
    return event(id_, "charge.refunded", created, whole)


def made(amount: int, created: int, id_: str = "re@", /, **fields: object) -> bytes:
    """Return a ``refund.created`` of *amount*."""
    return event(f"evt_{id_}", "refund.created", created, refund(id_, created=created, amount=amount, **fields))


def failed(amount: int, made_at: int, failed_at: int, id_: str = "re@", status: str = "failed") -> bytes:
    """Return the failure of a refund, which was made at *made_at*."""
    object_ = refund(id_, created=made_at, amount=amount, status=status, failure_reason="unknown")
    return event(f"evt_f_{id_}", "refund.failed", failed_at, object_)


@dataclass(frozen=True)
class Case:
    """A history, and its order's refunded amount after it in any order of arrival."""

    bodies: list[bytes]
    amount: int | None
    status: str | None


def in_part(amount: int, *refunds: bytes, captured: int = 3000, at_: int = 100) -> list[bytes]:
    """Return a history: *captured* of a charge of 5000 was captured, and *amount* is its `amount_refunded`."""
    return [ORDER, charge_refunded(amount, at_, amount_captured=captured), *refunds]


SUBSCRIPTION = event(
    "evt_cs@",
    "checkout.session.completed",
    10,
    session(mode="subscription", payment_intent=None, invoice="in@", subscription="sub@"),
)
# invoice_payment.paid (since 2025-05-28.basil) names what paid an invoice.
PAYMENT = {
    "id": "inpay@",
    "object": "invoice_payment",
    "amount_paid": 5000,
    "amount_requested": 5000,
    "created": T + 9,
    "currency": "usd",
    "invoice": "in@",
    "is_default": True,
    "livemode": False,
    "payment": {"type": "payment_intent", "payment_intent": "pi@"},
    "status": "paid",
    "status_transitions": {"canceled_at": None, "paid_at": T + 9},
}
BY_INTENT = event("evt_inpay@", "invoice_payment.paid", 9, PAYMENT)
BY_CHARGE = event("evt_inpay@", "invoice_payment.paid", 9, {**PAYMENT, "payment": {"type": "charge", "charge": "ch@"}})
# Before basil an invoice names payment intent and charge itself, and a charge its invoice.
INVOICE = event(
    "evt_in@",
    "invoice.paid",
    9,
    {
        "id": "in@",
        "object": "invoice",
        "amount_due": 5000,
        "amount_paid": 5000,
        "amount_remaining": 0,
        "charge": "ch@",
        "created": T,
        "currency": "usd",
        "customer": "cus@",
        "livemode": False,
        "number": "R-1",
        "paid": True,
        "payment_intent": "pi@",
        "status": "paid",
        "status_transitions": {"finalized_at": T, "marked_uncollectible_at": None, "paid_at": T + 9, "voided_at": None},
        "subscription": "sub@",
        "total": 5000,
    },
    version="2024-06-20",
)
# Adaptive Pricing before basil: every object was in the buyer's currency, and the row is in the shop's.
CONVERTED = event(
    "evt_cs@",
    "checkout.session.completed",
    10,
    session(
        currency="cad",
        amount_total=2055,
        amount_subtotal=2055,
        currency_conversion={
            "amount_subtotal": 1500,
            "amount_total": 1500,
            "fx_rate": "1.37",
            "source_currency": "usd",
        },
    ),
    version="2024-06-20",
)
CAD = {"amount": 2055, "amount_captured": 2055, "currency": "cad"}
OF_2019 = event(
    "evt_cs@",
    "checkout.session.completed",
    10,
    {"id": "cs@", "object": "checkout.session", "livemode": False, "mode": "payment", "payment_intent": "pi@"},
    version="2019-05-16",
)

# Before 2020 a charge has no amount_captured: its captured part is unknown, and so is every sum.
UNTIL_2020 = {"amount_captured": None}

CASES = {
    "nothing_known": Case([ORDER], 0, "none"),
    "nothing_refunded": Case([ORDER, event("evt_ch@", "charge.succeeded", 10, charge())], 0, "none"),
    # 1500 - known 0 = unseen 1500
    "unseen": Case([ORDER, charge_refunded(1500, 100)], 1500, "partial"),
    "unseen_whole": Case([ORDER, charge_refunded(5000, 100)], 5000, "full"),
    # The last amount_refunded of the charge counts, 1500.
    "unseen_again": Case([ORDER, charge_refunded(1000, 100), charge_refunded(1500, 200, "evt_ch2@")], 1500, "partial"),
    # 1500 - known 1500, made in the charge's second = 0; counted 1500
    "known": Case([ORDER, charge_refunded(1500, 100), made(1500, 100)], 1500, "partial"),
    "known_alone": Case([ORDER, made(1500, 100)], 1500, "partial"),
    # Without an event of the charge the order's own total is the paid amount.
    "known_alone_whole": Case([ORDER, made(5000, 100, charge=None)], 5000, "full"),
    "known_whole": Case([ORDER, charge_refunded(5000, 100), made(5000, 90)], 5000, "full"),
    # 1500 - known 500 = unseen 1000; counted 500
    "known_in_part": Case([ORDER, charge_refunded(1500, 100), made(500, 100)], 1500, "partial"),
    # 1000 - known 0, for the refund is later = unseen 1000; counted 500
    "made_later": Case([ORDER, charge_refunded(1000, 100), made(500, 101)], 1500, "partial"),
    # 1000 - known 1000 = unseen 0; counted 1000 + 700, which is later than the charge
    "known_and_made_later": Case(
        [ORDER, charge_refunded(1000, 100), made(1000, 100), made(700, 200, "re_2@")], 1700, "partial"
    ),
    # known 1500 is more than 1000: unseen is never less than 0
    "known_more_than_reported": Case([ORDER, charge_refunded(1000, 100), made(1500, 99)], 1500, "partial"),
    # made at 100 and failed at 200, after the charge's event: known 1000, unseen 0; counted 0
    "failed_later": Case([ORDER, charge_refunded(1000, 100), made(1000, 100), failed(1000, 100, 200)], 0, "none"),
    "canceled_later": Case([ORDER, charge_refunded(1000, 100), failed(1000, 100, 200, status="canceled")], 0, "none"),
    # failed at 200, and at 300 the charge has 0: unseen 0; counted 0
    "failed_and_taken_back": Case(
        [ORDER, charge_refunded(1000, 100), failed(1000, 100, 200), charge_refunded(0, 300, "evt_ch3@")], 0, "none"
    ),
    # failed at 200; in that second the charge has 700: known 1000 - 1000 = 0, unseen 700; counted 0
    "failed_in_its_second": Case([ORDER, charge_refunded(700, 200), failed(1000, 100, 200)], 700, "partial"),
    # failed at 200, another of 700 is made at 250, and at 300 the charge has 700: unseen 0; counted 700
    "failed_and_again": Case(
        [ORDER, failed(1000, 100, 200), made(700, 250, "re_2@"), charge_refunded(700, 300)], 700, "partial"
    ),
    "pending_counts": Case([ORDER, made(800, 100, status="pending")], 800, "partial"),
    "waiting_counts": Case([ORDER, made(800, 100, status="requires_action", charge=None)], 800, "partial"),
    "failed_does_not": Case([ORDER, failed(800, 100, 200)], 0, "none"),
    "canceled_does_not": Case([ORDER, failed(800, 100, 200, status="canceled")], 0, "none"),
    # A refund may name only the intent: it is the captured charge's, so known 1500, unseen 0; counted 1500
    "names_only_the_intent": Case([ORDER, charge_refunded(1500, 100), made(1500, 100, charge=None)], 1500, "partial"),
    "names_only_the_charge": Case(
        [ORDER, charge_refunded(1500, 100), made(1500, 100, payment_intent=None)], 1500, "partial"
    ),
    "names_the_intent_of_two_charges": Case(
        [
            ORDER,
            event("evt_d@", "charge.failed", 5, charge("ch_d@", status="failed", captured=False, amount_captured=0)),
            charge_refunded(1500, 100),
            made(1500, 100, charge=None),
        ],
        1500,
        "partial",
    ),
    # Each charge for itself: unseen 200 of one, unseen 300 - 100 of the other; counted 100
    "two_charges": Case(
        [
            ORDER,
            charge_refunded(200, 100, "evt_1@", "ch_1@", amount=2000, amount_captured=2000),
            charge_refunded(300, 100, "evt_2@", "ch_2@", amount=3000, amount_captured=3000),
            made(100, 90, charge="ch_2@"),
        ],
        500,
        "partial",
    ),
    # The unseen of one charge does not offset the surplus of another: 0 + 300, counted 400
    "two_charges_apart": Case(
        [
            ORDER,
            charge_refunded(100, 100, "evt_1@", "ch_1@", amount=2000, amount_captured=2000),
            charge_refunded(300, 100, "evt_2@", "ch_2@", amount=3000, amount_captured=3000),
            made(400, 90, charge="ch_1@"),
        ],
        700,
        "partial",
    ),
    # A part was captured, 3000 of 5000: the released 2000 may be in amount_refunded, or not.
    "part_untouched": Case(in_part(0), 0, "none"),
    "part_rest_released": Case(in_part(2000), 0, "none"),
    "part_known": Case(in_part(500, made(500, 100)), 500, "partial"),
    "part_known_with_rest": Case(in_part(2500, made(500, 100)), 500, "partial"),
    # The refund is known first, of the order's own total: 3000 of 5000, then 3000 of 3000
    "part_whole_after_its_refund": Case(
        [ORDER, made(3000, 50), charge_refunded(3000, 100, amount_captured=3000)], 3000, "full"
    ),
    # 3000 is all that was captured, although the order is of 5000
    "part_whole": Case(in_part(3000, made(3000, 100)), 3000, "full"),
    "part_whole_with_rest": Case(in_part(5000, made(3000, 100)), 3000, "full"),
    # known 500 is neither 2600 nor 2600 - 2000; known 0 is neither 2500 nor 2500 - 2000
    "part_unclear_with_refund": Case(in_part(2600, made(500, 100)), None, "partial"),
    "part_unclear": Case(in_part(2500), None, "partial"),
    "old_whole": Case([ORDER, charge_refunded(5000, 100, **UNTIL_2020)], None, "full"),
    # 3000 of 5000 may be all that was captured, and "refunded" reports that it is.
    "old_whole_of_a_part": Case([ORDER, charge_refunded(3000, 100, refunded=True, **UNTIL_2020)], None, "full"),
    "old_whole_known": Case([ORDER, charge_refunded(5000, 100, **UNTIL_2020), made(5000, 100)], 5000, "full"),
    "old_whole_with_refund": Case([ORDER, charge_refunded(5000, 100, **UNTIL_2020), made(500, 90)], None, "full"),
    # 5000 by then, less 500 that failed since: no longer whole, and the captured amount is unknown
    "old_whole_until_one_failed": Case(
        [ORDER, charge_refunded(5000, 100, **UNTIL_2020), failed(500, 90, 200)], None, None
    ),
    "old_in_part": Case([ORDER, charge_refunded(1500, 100, **UNTIL_2020)], None, None),
    "old_and_converted": Case([CONVERTED, charge_refunded(2055, 100, refunded=True, **CAD | UNTIL_2020)], None, "full"),
    "old_and_without_currency": Case([OF_2019, charge_refunded(5000, 100, **UNTIL_2020)], None, "full"),
    # Both charges whole; then one whole and the other untouched
    "old_two_charges": Case(
        [
            ORDER,
            charge_refunded(2000, 100, "evt_1@", "ch_1@", amount=2000, refunded=True, **UNTIL_2020),
            charge_refunded(3000, 100, "evt_2@", "ch_2@", amount=3000, amount_captured=3000),
        ],
        None,
        "full",
    ),
    "old_two_charges_of_which_one": Case(
        [
            ORDER,
            charge_refunded(2000, 100, "evt_1@", "ch_1@", amount=2000, refunded=True, **UNTIL_2020),
            charge_refunded(0, 100, "evt_2@", "ch_2@", amount=3000, amount_captured=3000),
        ],
        None,
        "partial",
    ),
    "old_released": Case([UNPAID, charge_refunded(5000, 100, captured=False, **UNTIL_2020)], 0, "none"),
    # A hold that was released refunds no money, for none was taken.
    "released_hold": Case([UNPAID, event("evt_x@", "charge.expired", 100, released())], 0, "none"),
    "released_with_refund": Case(
        [
            UNPAID,
            event("evt_x@", "charge.expired", 100, released()),
            made(5000, 100, reason="expired_uncaptured_charge"),
        ],
        0,
        "none",
    ),
    "released_and_captured": Case(
        [
            ORDER,
            event("evt_x@", "charge.expired", 100, released("ch_x@")),
            made(5000, 100, "re_x@", charge="ch_x@", reason="expired_uncaptured_charge"),
            charge_refunded(1500, 100),
        ],
        1500,
        "partial",
    ),
    # Other currencies are never added up, and never 0.
    "converted_whole": Case([CONVERTED, charge_refunded(2055, 100, refunded=True, **CAD)], None, "full"),
    "converted_in_part": Case([CONVERTED, charge_refunded(500, 100, **CAD)], None, "partial"),
    "converted_refund": Case(
        [
            CONVERTED,
            charge_refunded(2055, 100, refunded=True, **CAD),
            made(2055, 100, currency="cad"),
        ],
        None,
        "full",
    ),
    "converted_untouched": Case([CONVERTED, event("evt_ch@", "charge.succeeded", 10, charge(**CAD))], 0, "none"),
    # How much of 5000 usd 500 cad are is not known either.
    "refund_in_another_currency": Case([ORDER, made(500, 100, charge=None, currency="cad")], None, None),
    "order_becomes_of_another_currency": Case(
        [
            ORDER,
            charge_refunded(1500, 100),
            event("evt_cs2@", "checkout.session.completed", 20, session(currency="cad")),
        ],
        None,
        "partial",
    ),
    "order_without_currency": Case(
        [OF_2019, charge_refunded(1500, 100)],
        None,
        "partial",
    ),
    "order_without_currency_untouched": Case(
        [OF_2019, event("evt_ch@", "charge.succeeded", 10, charge())], None, "none"
    ),
    # Through the invoice, where the session has no intent.
    "invoice_payment_of_an_intent": Case([SUBSCRIPTION, BY_INTENT, charge_refunded(1500, 100)], 1500, "partial"),
    "invoice_payment_of_a_charge": Case([SUBSCRIPTION, BY_CHARGE, charge_refunded(5000, 100)], 5000, "full"),
    "invoice_payment_and_refund": Case(
        [SUBSCRIPTION, BY_INTENT, charge_refunded(1500, 100), made(1500, 100)], 1500, "partial"
    ),
    "invoice_before_basil": Case(
        [SUBSCRIPTION, INVOICE, charge_refunded(5000, 100, payment_intent="pi@", invoice="in@")], 5000, "full"
    ),
    # Through the invoice only where the session has no intent of its own.
    "its_intent_before_its_invoice": Case(
        [
            event("evt_cs@", "checkout.session.completed", 10, session(invoice="in@")),
            event(
                "evt_inpay@",
                "invoice_payment.paid",
                9,
                {**PAYMENT, "payment": {"type": "payment_intent", "payment_intent": "pi_x@"}},
            ),
            made(700, 100, charge=None, payment_intent="pi_x@"),
        ],
        0,
        "none",
    ),
    "payment_of_another_invoice": Case(
        [SUBSCRIPTION, event("evt_inpay@", "invoice_payment.paid", 9, {**PAYMENT, "invoice": "in_x@"}), made(7, 100)],
        None,
        None,
    ),
    "neither_intent_nor_payment": Case([SUBSCRIPTION], None, None),
    "of_another_intent": Case(
        [
            ORDER,
            charge_refunded(1500, 100, payment_intent="pi_x@"),
            made(700, 90, charge="ch@", payment_intent="pi_x@"),
        ],
        0,
        "none",
    ),
}


@pytest.fixture(scope="module")
def arrived(services: Services) -> Iterator[Engine]:
    """Return a database into which every history came in every order."""
    with arrived_in_every_order(services, {name: case.bodies for name, case in CASES.items()}) as engine:
        yield engine


@pytest.mark.parametrize("name", CASES)
def test_the_book_in_every_order(arrived: Engine, name: str) -> None:
    """The sum and the status are the same whichever event came first."""
    case = CASES[name]
    for end in suffixes(name, case.bodies):
        (row,) = ledger.rows(
            arrived, "SELECT refunded_amount, refund_status FROM order_book WHERE id = :id", id=f"cs{end}"
        )
        assert row["refunded_amount"] == case.amount, end
        # The status is undefined where amount_refunded may or may not contain the released amount.
        if not name.startswith("part_unclear"):
            assert row["refund_status"] == case.status, end


def _sum(row: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Return the refunded sum and the refund status."""
    return row["refunded_amount"], row["refund_status"]


@pytest.mark.parametrize("name", CASES)
def test_the_changes_in_every_order(arrived: Engine, name: str) -> None:
    """The last change of an order's refunds has the book's sum and status; no change repeats both."""
    case = CASES[name]
    for end in suffixes(name, case.bodies):
        changes = ledger.rows(
            arrived,
            """
            SELECT subject, before, after FROM changes
            WHERE subject_id = :id AND kind = 'order.refund_changed' ORDER BY seq
            """,
            id=f"cs{end}",
        )
        sums = [_sum(change["after"]) for change in changes]
        if changes or case.amount:
            assert sums[-1][0] == case.amount, end
            assert sums[-1][1] == case.status or name.startswith("part_unclear"), end
        assert all(change["subject"] == "order" for change in changes)
        assert all(_sum(change["before"]) != _sum(change["after"]) for change in changes)
        assert all(one != next_ for one, next_ in pairwise(sums)), end


# The sum becomes null as soon as all of the history has arrived, and the feed has that change.
UNKNOWN = {
    name: case.bodies
    for name, case in CASES.items()
    if case.amount is None
    # An order without a known payment has no known refund; and without any refund the sum does not move.
    and name not in ("neither_intent_nor_payment", "payment_of_another_invoice", "order_without_currency_untouched")
}


@pytest.fixture(scope="module")
def unknown(services: Services) -> Iterator[Engine]:
    """Return a database into which the histories of unknown sums came in every order and in all batches."""
    with arrived_in_every_way(services, UNKNOWN) as engine:
        yield engine


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_sum_is_announced(unknown: Engine, name: str) -> None:
    """In any arrival an `order.refund_changed` leads to null, from the last known sum or from 0."""
    for end, batches in ways(name, UNKNOWN[name]):
        changes = ledger.rows(
            unknown,
            "SELECT before, after FROM changes WHERE subject_id = :id AND kind = 'order.refund_changed' ORDER BY seq",
            id=f"cs{end}",
        )
        sums = [_sum(change["after"]) for change in changes]

        assert sums, batches
        assert sums[-1][0] is None, batches
        assert sums[-1][1] == CASES[name].status or name.startswith("part_unclear"), batches
        assert [_sum(change["before"]) for change in changes] == [(0, "none"), *sums[:-1]], batches


def test_changes_in_order(engine: Engine) -> None:
    """A refund, another that only the charge reports, and the failure of the first give 500, 1500, 1000."""
    ledger.take_in(
        engine,
        ORDER,
        made(500, 100),
        charge_refunded(500, 100),
        charge_refunded(1500, 200, "evt_ch2@"),
        failed(500, 100, 300),
    )

    changes = ledger.rows(
        engine, "SELECT event_id, at, before, after FROM changes WHERE kind = 'order.refund_changed' ORDER BY seq"
    )
    assert [(each["before"]["refunded_amount"], each["after"]["refunded_amount"]) for each in changes] == [
        (0, 500),
        (500, 1500),
        (1500, 1000),
    ]
    assert [(each["event_id"], each["at"]) for each in changes] == [
        ("evt_re@", at(T + 100)),
        ("evt_ch2@", at(T + 200)),
        ("evt_f_re@", at(T + 300)),
    ]


@pytest.mark.parametrize(("account", "livemode"), [("acct_2", False), (None, True)])
def test_another_world_refunds_nothing(engine: Engine, account: str | None, livemode: bool) -> None:  # noqa: FBT001 - a mode
    """Refunds and charges of the same ids in another account or mode are others (law 6)."""
    ledger.take_in(
        engine,
        ORDER,
        event("evt_ch@", "charge.refunded", 90, charge(amount_refunded=900), account=account, livemode=livemode),
        event("evt_re@", "refund.created", 100, refund(created=100), account=account, livemode=livemode),
    )

    assert ledger.rows(engine, "SELECT refunded_amount, refund_status FROM order_book") == [
        {"refunded_amount": 0, "refund_status": "none"}
    ]


@pytest.mark.parametrize(("account", "livemode"), [("acct_2", False), (None, True)])
def test_another_world_pays_no_invoice(engine: Engine, account: str | None, livemode: bool) -> None:  # noqa: FBT001 - a mode
    """A payment of the same invoice's id in another account or mode is no way to the order's refunds (law 6)."""
    ledger.take_in(
        engine,
        SUBSCRIPTION,
        event("evt_inpay@", "invoice_payment.paid", 9, PAYMENT, account=account, livemode=livemode),
        made(700, 100),
    )

    assert ledger.rows(engine, "SELECT refunded_amount, refund_status, disputed_amount FROM order_book") == [
        {"refunded_amount": None, "refund_status": None, "disputed_amount": None}
    ]


def test_the_book_is_the_order(engine: Engine) -> None:
    """Every other column of the view is the order's own."""
    ledger.take_in(engine, ORDER, made(1500, 100))

    (book,) = ledger.rows(engine, "SELECT * FROM order_book")
    (order,) = ledger.rows(engine, "SELECT * FROM orders")
    del book["credited_amount"]
    assert book == order | {"refunded_amount": 1500, "disputed_amount": 0, "refund_status": "partial"}


def credited(id_: str, amount: int, /, **fields: object) -> dict[str, object]:
    """Return a credit note on the order's invoice."""
    return {
        "id": id_,
        "object": "credit_note",
        "amount": amount,
        "created": T + 50,
        "currency": "usd",
        "customer": "cus@",
        "invoice": "in@",
        "livemode": False,
        "number": id_,
        "out_of_band_amount": 0,
        "post_payment_amount": amount,
        "pre_payment_amount": 0,
        "refunds": [],
        "status": "issued",
        "type": "post_payment",
        "voided_at": None,
        **fields,
    }


# A second note for an order that has one of 300: its fields, its world, and the sum.
NOTES: dict[str, tuple[dict[str, object], str | None, bool, int | None]] = {
    "another": ({}, None, False, 370),
    "void": ({"status": "void", "voided_at": T + 60}, None, False, 300),
    "of_another_invoice": ({"invoice": "in_x@"}, None, False, 300),
    "of_another_account": ({}, "acct_2", False, 300),
    "of_the_other_mode": ({}, None, True, 300),
    "in_another_currency": ({"currency": "cad"}, None, False, None),
    "void_in_another_currency": ({"currency": "cad", "status": "void", "voided_at": T + 60}, None, False, 300),
}


@pytest.fixture(scope="module")
def with_notes(services: Services) -> Iterator[Engine]:
    """Return a database with an order, its invoice's payment, a note and one more for each case, in every order."""
    histories = {
        name: [
            SUBSCRIPTION,
            event("evt_n1@", "credit_note.created", 50, credited("cn_1@", 300)),
            event(
                "evt_n2@",
                "credit_note.voided" if fields.get("status") == "void" else "credit_note.created",
                60,
                credited("cn_2@", 70, **fields),
                account=account,
                livemode=livemode,
            ),
        ]
        for name, (fields, account, livemode, _) in NOTES.items()
    }
    with arrived_in_every_order(services, histories, BY_INTENT) as engine:
        yield engine


@pytest.mark.parametrize("name", NOTES)
def test_the_credited_amount(with_notes: Engine, name: str) -> None:
    """A note of the order's invoice counts unless it is void; a note in another currency makes the sum null."""
    for end in suffixes(name, [SUBSCRIPTION] * 3):
        (row,) = ledger.rows(
            with_notes,
            "SELECT credited_amount, refunded_amount, disputed_amount FROM order_book WHERE id = :id",
            id=f"cs{end}",
        )
        assert row == {"credited_amount": NOTES[name][3], "refunded_amount": 0, "disputed_amount": 0}, end


def test_a_dispute_through_the_invoice(engine: Engine) -> None:
    """A dispute of the intent that paid the order's invoice is the order's; one of another intent is not."""
    ledger.take_in(
        engine,
        SUBSCRIPTION,
        BY_INTENT,
        event("evt_d1", "charge.dispute.created", 70, dispute("du_1", charge="ch@", amount=40)),
        event("evt_d2", "charge.dispute.created", 71, dispute("du_2", charge="ch_x", payment_intent="pi_x", amount=2)),
    )

    assert ledger.rows(engine, "SELECT disputed_amount FROM order_book") == [{"disputed_amount": 40}]


def test_a_loose_refund_of_an_order_in_two_currencies(engine: Engine) -> None:
    """The captured amounts have no common sum, so that a refund of an unknown charge may or may not be whole."""
    ledger.take_in(
        engine,
        event("evt_1", "checkout.session.completed", 10, session("cs_1", payment_intent="pi_1")),
        event("evt_2", "charge.succeeded", 11, charge("ch_1", payment_intent="pi_1")),
        event("evt_3", "charge.succeeded", 12, charge("ch_2", payment_intent="pi_1", currency="eur")),
        event("evt_4", "refund.created", 20, refund("re_1", created=20, payment_intent="pi_1", charge="ch_x")),
    )

    found = ledger.rows(engine, "SELECT refunded_amount, refund_status FROM order_book")
    assert found == [{"refunded_amount": 1500, "refund_status": None}]
