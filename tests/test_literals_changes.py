"""A change holds the row's money, currency and ids before and after; each kind is shown by a small history.

The names are those that the feed promises (api/README.md, "Acting once"): amounts, currency and ids, of a paid or an
expired order also its lines. `at` is when Stripe created the event that decided.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.local.services import Services
from schemas import database, observations
from schemas.inbox import Delivery
from schemas.own_events import SESSION_REGISTERED
from tests import ledger
from tests.literals import at
from tests.stripe_payments import Body, T, charge, dispute, event, refund, released, session
from tests.web import migrated_database

Expected = tuple[str, str, int, Mapping[str, Any] | None, Mapping[str, Any]]
"""A kind, the deciding event, the time of its creation, and parts of the row before (None: no row) and after."""

PERSONAL = {
    "customer_details": {"email": "buyer@example.com", "name": "Personal Name"},
    "metadata": {"personal": "Personal Note"},
}


def whole(name: str, **fields: object) -> Body:
    """Return a session that has every id that a change may hold; the ids end in *name*."""
    return session(
        f"cs_{name}",
        **{
            "client_reference_id": f"cart_{name}",
            "customer": f"cus_{name}",
            "payment_intent": f"pi_{name}",
            "payment_link": f"plink_{name}",
            "amount_subtotal": 5200,
            "amount_total": 5004,
            "total_details": {"amount_discount": 250, "amount_shipping": 50, "amount_tax": 4},
            **PERSONAL,
            **fields,
        },
    )


def ids(name: str, status: str, **fields: object) -> dict[str, object]:
    """Return the fields that a change of that order must hold."""
    return {
        "status": status,
        "currency": "usd",
        "amount_total": 5004,
        "client_reference_id": f"cart_{name}",
        "customer": f"cus_{name}",
        "payment_link": f"plink_{name}",
        "payment_intent": f"pi_{name}",
        **fields,
    }


def opened(name: str, **fields: object) -> Delivery:
    """Return the shop's registration of the open session, at 0."""
    about = whole(name, status="open", payment_status="unpaid", **fields)
    return observations.observe(SESSION_REGISTERED, about, account="", livemode=False, created=T, now=ledger.NOW)


def completed(name: str, created: int = 10, id_: str = "evt_c", **fields: object) -> bytes:
    """Return the completion of the session."""
    return event(f"{id_}_{name}", "checkout.session.completed", created, whole(name, **fields))


LINES = {
    "object": "list",
    "has_more": False,
    "data": [
        {
            "id": f"li_{number}",
            "object": "item",
            "amount_discount": 125,
            "amount_subtotal": 2600,
            "amount_tax": 2,
            "amount_total": 2477,
            "currency": "usd",
            "description": "Personal Shirt",
            "price": {"id": f"price_{number}", "object": "price", "product": f"prod_{number}", "unit_amount": 1300},
            "quantity": number + 1,
        }
        for number in (1, 2)
    ],
}
BOUGHT = [
    {"price": "price_1", "product": "prod_1", "quantity": 2},
    {"price": "price_2", "product": "prod_2", "quantity": 3},
]

INVOICE: Body = {
    "id": "in_1",
    "object": "invoice",
    "amount_due": 901,
    "amount_overpaid": 0,
    "amount_paid": 0,
    "amount_remaining": 901,
    "created": T,
    "currency": "usd",
    "customer": "cus_in",
    "customer_email": "buyer@example.com",
    "ending_balance": 0,
    "livemode": False,
    "number": "R-1",
    "parent": {"type": "subscription_details", "subscription_details": {"subscription": "sub_1"}},
    "post_payment_credit_notes_amount": 0,
    "pre_payment_credit_notes_amount": 0,
    "starting_balance": 0,
    "status": "open",
    "status_transitions": {"finalized_at": T + 1, "marked_uncollectible_at": None, "paid_at": None, "voided_at": None},
    "total": 902,
}
PAID = {"status": "paid", "amount_paid": 901, "amount_remaining": 0}
NOTE: Body = {
    "id": "cn_1",
    "object": "credit_note",
    "amount": 300,
    "created": T + 20,
    "currency": "usd",
    "customer": "cus_in",
    "customer_balance_transaction": "cbtxn_1",
    "effective_at": T + 20,
    "invoice": "in_1",
    "lines": {"object": "list", "data": [], "has_more": False},
    "livemode": False,
    "memo": "Personal Memo",
    "number": "R-1-CN-1",
    "out_of_band_amount": 0,
    "post_payment_amount": 300,
    "pre_payment_amount": 0,
    "reason": "order_change",
    "refunds": [{"amount_refunded": 110, "refund": "re_n", "type": "refund", "payment_record_refund": None}],
    "status": "issued",
    "type": "post_payment",
    "voided_at": None,
}
CUSTOMER: Body = {
    "id": "cus_b",
    "object": "customer",
    "balance": -500,
    "created": T,
    "currency": "usd",
    "delinquent": False,
    "email": "buyer@example.com",
    "livemode": False,
    "metadata": {},
    "name": "Personal Name",
}
LINK: Body = {
    "id": "plink_1",
    "object": "payment_link",
    "active": True,
    "currency": "usd",
    "livemode": False,
    "metadata": {"personal": "Personal Note"},
    "url": "https://buy.stripe.com/test_1",
}
DISPUTE = {
    "status": "needs_response",
    "currency": "usd",
    "amount": 1000,
    "charge": "ch_d",
    "payment_intent": "pi_d",
    "reason": "fraudulent",
}


def note(**fields: object) -> dict[str, object]:
    """Return the fields that a change of the credit note must hold: post 300 = refunds 110 + balance 190."""
    return {
        "currency": "usd",
        "amount": 300,
        "refunded_amount": 110,
        "to_balance_amount": 190,
        "invoice": "in_1",
        "customer": "cus_in",
        **fields,
    }


# By name: the subject, the history, and its changes.
HISTORIES: dict[str, tuple[str, str, Sequence[bytes | Delivery], list[Expected]]] = {
    "paid_with_lines": (
        "order",
        "cs_lines",
        [opened("lines", line_items=LINES), completed("lines")],
        [
            ("order.opened", "*", 0, None, ids("lines", "open")),
            ("order.paid", "evt_c_lines", 10, ids("lines", "open"), ids("lines", "paid", lines=BOUGHT)),
        ],
    ),
    "paid_without_lines": (
        "order",
        "cs_paid",
        [completed("paid")],
        [("order.paid", "evt_c_paid", 10, None, ids("paid", "paid", lines=None))],
    ),
    "delayed": (
        "order",
        "cs_late",
        [
            completed("late", payment_status="unpaid"),
            event("evt_s", "checkout.session.async_payment_succeeded", 90, whole("late")),
        ],
        [
            ("order.processing", "evt_c_late", 10, None, ids("late", "processing")),
            ("order.paid", "evt_s", 90, ids("late", "processing"), ids("late", "paid", lines=None)),
        ],
    ),
    "failed": (
        "order",
        "cs_fail",
        [
            completed("fail", payment_status="unpaid"),
            event("evt_f", "checkout.session.async_payment_failed", 91, whole("fail", payment_status="unpaid")),
        ],
        [
            ("order.processing", "evt_c_fail", 10, None, ids("fail", "processing")),
            ("order.failed", "evt_f", 91, ids("fail", "processing"), ids("fail", "failed")),
        ],
    ),
    "expired": (
        "order",
        "cs_gone",
        [
            opened("gone", line_items=LINES),
            event(
                "evt_x",
                "checkout.session.expired",
                92,
                whole("gone", status="expired", payment_status="unpaid"),
            ),
        ],
        [
            ("order.opened", "*", 0, None, ids("gone", "open")),
            ("order.expired", "evt_x", 92, ids("gone", "open"), ids("gone", "expired", lines=BOUGHT)),
        ],
    ),
    "setup": (
        "order",
        "cs_setup",
        [
            completed(
                "setup",
                mode="setup",
                payment_status="no_payment_required",
                amount_total=None,
                amount_subtotal=None,
                total_details=None,
                currency=None,
                payment_intent=None,
            )
        ],
        [
            (
                "order.completed",
                "evt_c_setup",
                10,
                None,
                ids("setup", "complete", amount_total=None, currency=None, payment_intent=None),
            )
        ],
    ),
    "refunded": (
        "order",
        "cs_back",
        [
            completed("back"),
            event("evt_r1", "refund.created", 50, refund("re_1", created=50, charge=None, payment_intent="pi_back")),
            event(
                "evt_r2",
                "refund.created",
                60,
                refund("re_2", created=60, charge=None, payment_intent="pi_back", amount=3504),
            ),
        ],
        [
            ("order.paid", "evt_c_back", 10, None, ids("back", "paid")),
            (
                "order.refund_changed",
                "evt_r1",
                50,
                ids("back", "paid", refunded_amount=0),
                ids("back", "paid", refunded_amount=1500),
            ),
            (
                "order.refund_changed",
                "evt_r2",
                60,
                ids("back", "paid", refunded_amount=1500),
                ids("back", "paid", refunded_amount=5004),
            ),
        ],
    ),
    # Paid and failed by the charge's events (rule 10): the change names the charge's event.
    "paid_by_its_charge": (
        "order",
        "cs_capture",
        [
            completed("capture", payment_status="unpaid"),
            event("evt_cap", "charge.captured", 900, charge("ch_capture", payment_intent="pi_capture")),
        ],
        [
            ("order.processing", "evt_c_capture", 10, None, ids("capture", "processing")),
            (
                "order.paid",
                "evt_cap",
                900,
                ids("capture", "processing"),
                ids("capture", "paid", lines=None),
            ),
        ],
    ),
    "failed_by_its_charge": (
        "order",
        "cs_release",
        [
            completed("release", payment_status="unpaid"),
            event("evt_rel", "charge.expired", 901, released("ch_release", payment_intent="pi_release")),
        ],
        [
            ("order.processing", "evt_c_release", 10, None, ids("release", "processing")),
            ("order.failed", "evt_rel", 901, ids("release", "processing"), ids("release", "failed")),
        ],
    ),
    # The same page completed again with another total: no new one-shot in that step (design.md, Changes).
    "corrected_total": (
        "order",
        "cs_sum",
        [completed("sum"), completed("sum", 30, "evt_c2", amount_total=4004)],
        [
            ("order.paid", "evt_c_sum", 10, None, ids("sum", "paid")),
            ("order.corrected", "evt_c2_sum", 30, ids("sum", "paid"), ids("sum", "paid", amount_total=4004)),
        ],
    ),
    "corrected_currency": (
        "order",
        "cs_cur",
        [completed("cur"), completed("cur", 30, "evt_c2", currency="cad")],
        [
            ("order.paid", "evt_c_cur", 10, None, ids("cur", "paid")),
            ("order.corrected", "evt_c2_cur", 30, ids("cur", "paid"), ids("cur", "paid", currency="cad")),
        ],
    ),
    # Another total in the step that pays is no correction.
    "paid_with_another_total": (
        "order",
        "cs_new",
        [opened("new"), completed("new", amount_total=4004)],
        [
            ("order.opened", "*", 0, None, ids("new", "open")),
            ("order.paid", "evt_c_new", 10, ids("new", "open"), ids("new", "paid", amount_total=4004)),
        ],
    ),
    "disputed": (
        "dispute",
        "du_d",
        [
            event("evt_d1", "charge.dispute.created", 70, dispute("du_d", charge="ch_d", payment_intent="pi_d")),
            event(
                "evt_d2",
                "charge.dispute.closed",
                80,
                dispute("du_d", charge="ch_d", payment_intent="pi_d", status="lost", amount=1001, reason="general"),
            ),
        ],
        [
            ("dispute.opened", "evt_d1", 70, None, DISPUTE),
            (
                "dispute.closed",
                "evt_d2",
                80,
                DISPUTE,
                {**DISPUTE, "status": "lost", "amount": 1001, "reason": "general"},
            ),
        ],
    ),
    "inquired": (
        "dispute",
        "du_i",
        [
            event("evt_q1", "charge.dispute.created", 70, dispute("du_i", status="warning_needs_response")),
            event("evt_q2", "charge.dispute.updated", 75, dispute("du_i", status="needs_response")),
        ],
        [
            (
                "dispute.opened",
                "evt_q2",
                75,
                {"status": "warning_needs_response", "amount": 1000},
                {"status": "needs_response", "amount": 1000, "currency": "usd", "reason": "fraudulent"},
            )
        ],
    ),
    "appealed": (
        "dispute",
        "du_a",
        [
            event("evt_a1", "charge.dispute.created", 70, dispute("du_a")),
            event("evt_a2", "charge.dispute.closed", 80, dispute("du_a", status="lost")),
            event("evt_a3", "charge.dispute.updated", 90, dispute("du_a", status="appeal_under_review")),
            event("evt_a4", "charge.dispute.closed", 95, dispute("du_a", status="won")),
        ],
        [
            ("dispute.opened", "evt_a1", 70, None, {"status": "needs_response"}),
            ("dispute.closed", "evt_a2", 80, {"status": "needs_response"}, {"status": "lost"}),
            ("dispute.closed", "evt_a4", 95, {"status": "appeal_under_review"}, {"status": "won"}),
        ],
    ),
    "invoiced": (
        "invoice",
        "in_1",
        [
            event("evt_i1", "invoice.finalized", 1, INVOICE),
            event("evt_i2", "invoice.paid", 5, {**INVOICE, **PAID}),
        ],
        [
            (
                "invoice.changed",
                "evt_i1",
                1,
                None,
                {
                    "status": "open",
                    "currency": "usd",
                    "total": 902,
                    "amount_paid": 0,
                    "customer": "cus_in",
                    "subscription": "sub_1",
                },
            ),
            (
                "invoice.changed",
                "evt_i2",
                5,
                {"status": "open", "amount_paid": 0, "total": 902},
                {
                    "status": "paid",
                    "currency": "usd",
                    "total": 902,
                    "amount_paid": 901,
                    "customer": "cus_in",
                    "subscription": "sub_1",
                },
            ),
        ],
    ),
    "credited": (
        "credit_note",
        "cn_1",
        [
            event("evt_n1", "credit_note.created", 20, NOTE),
            event("evt_n2", "credit_note.voided", 25, {**NOTE, "status": "void", "voided_at": T + 25}),
        ],
        [
            ("credit_note.issued", "evt_n1", 20, None, note()),
            ("credit_note.voided", "evt_n2", 25, note(), note()),
        ],
    ),
    "balance": (
        "balance",
        "cus_b",
        [
            event("evt_b1", "customer.updated", 30, CUSTOMER, previous={"balance": 0}),
            event("evt_b2", "customer.updated", 40, {**CUSTOMER, "balance": -200}, previous={"balance": -500}),
        ],
        [
            (
                "balance.changed",
                "evt_b1",
                30,
                {"currency": "usd", "amount": 0},
                {"currency": "usd", "amount": -500},
            ),
            (
                "balance.changed",
                "evt_b2",
                40,
                {"currency": "usd", "amount": -500},
                {"currency": "usd", "amount": -200},
            ),
        ],
    ),
    "link": (
        "payment_link",
        "plink_1",
        [
            event("evt_l1", "payment_link.created", 2, LINK),
            event("evt_l2", "payment_link.updated", 3, {**LINK, "active": False}, previous={"active": True}),
            event("evt_l3", "payment_link.updated", 4, LINK, previous={"active": False}),
        ],
        [
            ("payment_link.activated", "evt_l1", 2, None, {"active": True, "currency": "usd"}),
            ("payment_link.deactivated", "evt_l2", 3, {"active": True}, {"active": False, "currency": "usd"}),
            ("payment_link.activated", "evt_l3", 4, {"active": False}, {"active": True, "currency": "usd"}),
        ],
    ),
}


@pytest.fixture(scope="module")
def arrived(services: Services) -> Iterator[Engine]:
    """Return a database into which each history came, one event after another."""
    with migrated_database(services) as database_url:
        engine = database.engine(database_url)
        for _, _, arrivals, _ in HISTORIES.values():
            for each in arrivals:
                ledger.record(engine, [each if isinstance(each, Delivery) else ledger.delivery(each)])
                ledger.fold(engine)
        yield engine
        engine.dispose()


def in_part(found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the fields of *found* that *expected* has, with lines in the order of their prices."""
    if found is None or expected is None:
        return found
    assert set(expected) <= set(found)
    part = {name: found[name] for name in expected}
    if part.get("lines"):
        part["lines"] = sorted(part["lines"], key=lambda line: str(line["price"]))
    return part


@pytest.mark.parametrize("name", HISTORIES)
def test_each_step_and_its_fields(arrived: Engine, name: str) -> None:
    """Each history records its kinds in order, each with its deciding event, time, and row before and after."""
    subject, subject_id, _, steps = HISTORIES[name]
    changes = ledger.rows(arrived, "SELECT * FROM changes WHERE subject_id = :id ORDER BY seq", id=subject_id)

    assert [change["kind"] for change in changes] == [step[0] for step in steps]
    for change, (_, event_id, created, before, after) in zip(changes, steps, strict=True):
        assert change["event_id"] == event_id or (event_id == "*" and change["event_id"].startswith("obs_"))
        assert (change["account"], change["livemode"], change["subject"]) == ("", False, subject)
        assert (change["at"], change["withheld"]) == (at(T + created), None)
        assert change["source"] == ("observation" if event_id == "*" else "webhook")
        assert in_part(change["before"], before) == before
        assert in_part(change["after"], after) == after


def test_only_paid_and_expired_orders_have_lines(arrived: Engine) -> None:
    """`after` of order.paid and order.expired holds lines, null where they are not all known; no other change does."""
    with_lines = {row["kind"] for row in ledger.rows(arrived, "SELECT kind FROM changes WHERE after ? 'lines'")}
    without = {row["kind"] for row in ledger.rows(arrived, "SELECT kind FROM changes WHERE NOT after ? 'lines'")}

    assert with_lines == {"order.paid", "order.expired"}
    assert not without & with_lines
    assert ledger.rows(arrived, "SELECT kind FROM changes WHERE before ? 'lines'") == []


def test_nothing_personal(arrived: Engine) -> None:
    """Neither email nor name, metadata, memo or description is in any change (design.md: no personal data)."""
    changes = ledger.rows(arrived, "SELECT before, after FROM changes")
    text = json.dumps([[change["before"], change["after"]] for change in changes])

    assert [word for word in ("buyer@example.com", "Personal", "metadata", "memo", "description") if word in text] == []


def test_an_event_that_moves_nothing_is_no_change(engine: Engine) -> None:
    """An older event, or one that leaves status, total and currency as they were, records no change."""
    ledger.take_in(
        engine,
        completed("same", 10),
        completed("same", 20, "evt_c2", metadata={"another": "note"}),
        event("evt_o", "checkout.session.completed", 5, whole("same", payment_status="unpaid")),
        event("evt_ch", "charge.succeeded", 9, charge("ch_same", payment_intent="pi_same")),
        event("evt_ch2", "charge.updated", 19, charge("ch_same", payment_intent="pi_same", disputed=True)),
    )

    assert ledger.kinds(engine, "cs_same") == ["order.paid"]
    assert ledger.rows(engine, "SELECT DISTINCT subject_id FROM changes") == [{"subject_id": "cs_same"}]
