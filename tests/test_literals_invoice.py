"""Invoices: every column, from every version of the object, and every status, as literals.

The objects are those of https://docs.stripe.com/api/invoices/object; what older versions call the same is in Stripe's
API upgrades (https://docs.stripe.com/upgrades) and in stripe-facts sections 2.6, 6 and 11.
"""

from itertools import count
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.envelopes import event
from tests.ledger import anomalies, kinds, rows, take_in
from tests.literals import assert_rows, at
from worker.folds.facts import Subject
from worker.proof import explain

T = 1_700_000_000

# Each value occurs once, so that no column can hold another's by chance. The amounts need not add up.
ENDIVE: dict[str, Any] = {
    "id": "in_1",
    "object": "invoice",
    "account_name": "Account Name",
    "amount_due": 9001,
    "amount_overpaid": 9002,
    "amount_paid": 9003,
    "amount_paid_off_stripe": 9004,
    "amount_remaining": 9005,
    "amount_shipping": 9006,
    "attempt_count": 3,
    "attempted": True,
    "auto_advance": False,
    "automatically_finalizes_at": T + 11,
    "billing_reason": "subscription_cycle",
    "collection_method": "charge_automatically",
    "created": T + 1,
    "currency": "eur",
    "customer": "cus_1",
    "customer_account": "acct_customer",
    "customer_email": "buyer@example.com",
    "customer_name": "Buyer",
    "due_date": T + 12,
    "effective_at": T + 13,
    "ending_balance": -9007,
    "from_invoice": {"action": "revision", "invoice": "in_from"},
    "hosted_invoice_url": "https://invoice.example.com/i/hosted-invoice-url-1",
    "invoice_pdf": "https://invoice.example.com/i/invoice-pdf-1",
    "latest_revision": "in_latest",
    "lines": {
        "object": "list",
        "data": [
            {
                "id": "il_1",
                "object": "line_item",
                "amount": 9008,
                "currency": "eur",
                "invoice": "in_1",
                "parent": {
                    "type": "subscription_item_details",
                    "subscription_item_details": {"subscription": "sub_line", "subscription_item": "si_1"},
                },
                "quantity": 4,
                "subtotal": 9009,
            }
        ],
        "has_more": False,
    },
    "livemode": False,
    "metadata": {"number": "NUMBER-METADATA", "subscription": "sub_metadata"},
    "next_payment_attempt": T + 14,
    "number": "NUMBER-1",
    "parent": {
        "type": "subscription_details",
        "quote_details": None,
        "subscription_details": {"metadata": {"a": "b"}, "subscription": "sub_1", "subscription_proration_date": None},
    },
    "period_end": T + 15,
    "period_start": T + 16,
    "post_payment_credit_notes_amount": 9010,
    "pre_payment_credit_notes_amount": 9011,
    "receipt_number": "RECEIPT-1",
    "shipping_cost": {"amount_subtotal": 9012, "amount_tax": 9013, "amount_total": 9014},
    "starting_balance": -9015,
    "status": "paid",
    "status_details": None,
    "status_transitions": {
        "finalized_at": T + 17,
        "marked_uncollectible_at": T + 18,
        "paid_at": T + 19,
        "voided_at": None,
    },
    "subtotal": 9016,
    "subtotal_excluding_tax": 9017,
    "test_clock": "clock_1",
    "total": 9018,
    "total_discount_amounts": [{"amount": 9019, "discount": "di_1"}],
    "total_excluding_tax": 9020,
    "total_pretax_credit_amounts": [],
    "total_taxes": [{"amount": 9021, "tax_behavior": "exclusive", "taxable_amount": 9022}],
    "webhooks_delivered_at": T + 20,
}
NEW_IN_BASIL = {
    "amount_overpaid",
    "amount_paid_off_stripe",
    "customer_account",
    "parent",
    "status_details",
    "total_pretax_credit_amounts",
    "total_taxes",
}
# Before basil (2025-03-31): the subscription is the invoice's own key.
ACACIA: dict[str, Any] = {
    **{key: ENDIVE[key] for key in ENDIVE if key not in NEW_IN_BASIL},
    "charge": None,
    "discount": None,
    "lines": {
        "object": "list",
        "data": [{"id": "il_1", "object": "line_item", "amount": 9008, "subscription": "sub_line", "quantity": 4}],
        "has_more": False,
    },
    "paid": True,
    "paid_out_of_band": True,
    "payment_intent": None,
    "quote": "qt_1",
    "subscription": "sub_1",
    "subscription_details": {"metadata": {"a": "b"}},
    "tax": 9023,
    "total_tax_amounts": [{"amount": 9024, "inclusive": False, "taxable_amount": 9025}],
}
ROW: dict[str, Any] = {
    "id": "in_1",
    "number": "NUMBER-1",
    "status": "paid",
    "currency": "eur",
    "total": 9018,
    "amount_due": 9001,
    "amount_paid": 9003,
    "amount_remaining": 9005,
    "amount_overpaid": 9002,
    "starting_balance": -9015,
    "ending_balance": -9007,
    "pre_payment_credit_notes_amount": 9011,
    "post_payment_credit_notes_amount": 9010,
    "customer": "cus_1",
    "subscription": "sub_1",
    "deleted": False,
    "created": at(T + 1),
    "finalized_at": at(T + 17),
    "paid_at": at(T + 19),
    "voided_at": None,
}


def _moments(**values: int) -> dict[str, int | None]:
    names = ("finalized_at", "marked_uncollectible_at", "paid_at", "voided_at")
    return {name: values.get(name) for name in names}


def _of_status(status: str | None) -> dict[str, int]:
    """Return the moments of an invoice that reached *status* by the shortest way: finalized, paid or given up."""
    finalized = {"finalized_at": T + 40} if status in {"open", "uncollectible", "paid", "void"} else {}
    last = {"uncollectible": "marked_uncollectible_at", "paid": "paid_at", "void": "voided_at"}.get(status or "")
    return finalized | ({last: T + 41} if last else {})


def _invoice(invoice_id: str, status: str | None, **values: object) -> dict[str, Any]:
    return {
        "id": invoice_id,
        "object": "invoice",
        "amount_due": 901,
        "amount_overpaid": 0,
        "amount_paid": 902,
        "amount_remaining": 903,
        "created": T,
        "currency": "usd",
        "customer": "cus_1",
        "ending_balance": 904,
        "number": "NUMBER-2",
        "parent": None,
        "post_payment_credit_notes_amount": 905,
        "pre_payment_credit_notes_amount": 906,
        "starting_balance": 907,
        "status": status,
        "status_transitions": _moments(**_of_status(status)),
        "total": 908,
        **values,
    }


def _row(invoice_id: str, status: str | None, event_id: str, as_of: int, **values: object) -> dict[str, Any]:
    return {
        "id": invoice_id,
        "number": "NUMBER-2",
        "status": status,
        "currency": "usd",
        "total": 908,
        "amount_due": 901,
        "amount_paid": 902,
        "amount_remaining": 903,
        "amount_overpaid": 0,
        "starting_balance": 907,
        "ending_balance": 904,
        "pre_payment_credit_notes_amount": 906,
        "post_payment_credit_notes_amount": 905,
        "customer": "cus_1",
        "subscription": None,
        "deleted": False,
        "created": at(T),
        "finalized_at": at(T + 40) if "finalized_at" in _of_status(status) else None,
        "paid_at": at(T + 41) if status == "paid" else None,
        "voided_at": at(T + 41) if status == "void" else None,
        "event_id": event_id,
        "as_of": at(as_of),
        **values,
    }


# ---- Columns ----

EXPANDED: dict[str, Any] = {
    **ENDIVE,
    "customer": {"id": "cus_1", "object": "customer", "balance": 9026, "currency": "gbp"},
    "parent": {
        "type": "subscription_details",
        "subscription_details": {"subscription": {"id": "sub_1", "object": "subscription", "customer": "cus_other"}},
    },
}
OF_A_QUOTE = {**ENDIVE, "parent": {"type": "quote_details", "quote_details": {"quote": "qt_1"}}}
VOIDED = {
    **ENDIVE,
    "status": "void",
    "status_transitions": _moments(finalized_at=T + 17, marked_uncollectible_at=T + 18, voided_at=T + 21),
}
DRAFT = {**ENDIVE, "status": "draft", "number": None, "ending_balance": None, "status_transitions": _moments()}
# Before 2019-03-14: `date` for `created`, and the time of finalization is a key of the invoice itself.
IN_2018: dict[str, Any] = {
    **{key: ACACIA[key] for key in ACACIA if key not in {"created", "status_transitions", "status"}},
    "status": "open",
    "paid": False,
    "paid_out_of_band": False,
    "date": T + 1,
    "finalized_at": T + 17,
}


@pytest.mark.parametrize(
    ("kind", "version", "about", "row"),
    [
        pytest.param("invoice.paid", "2026-10-28.endive", ENDIVE, ROW, id="endive"),
        pytest.param("payfold.invoice.observed", None, EXPANDED, ROW, id="expanded"),
        pytest.param("invoice.paid", "2025-02-24.acacia", ACACIA, {**ROW, "amount_overpaid": None}, id="acacia"),
        pytest.param("invoice.paid", "2026-10-28.endive", OF_A_QUOTE, {**ROW, "subscription": None}, id="of a quote"),
        pytest.param(
            "invoice.voided",
            "2026-10-28.endive",
            VOIDED,
            {**ROW, "status": "void", "paid_at": None, "voided_at": at(T + 21)},
            id="voided",
        ),
        pytest.param(
            "invoice.created",
            "2026-10-28.endive",
            DRAFT,
            {
                **ROW,
                "status": "draft",
                "number": None,
                "ending_balance": None,
                "finalized_at": None,
                "paid_at": None,
            },
            id="draft",
        ),
        pytest.param(
            "invoice.finalized",
            "2018-11-08",
            IN_2018,
            {**ROW, "status": "open", "amount_overpaid": None, "paid_at": None},
            id="2018",
        ),
        # Without transitions the event alone shows when it was voided.
        pytest.param(
            "invoice.updated",
            "2018-11-08",
            {**IN_2018, "status": "void"},
            {**ROW, "status": "void", "amount_overpaid": None, "paid_at": None, "voided_at": at(T + 30)},
            id="2018 void",
        ),
    ],
)
def test_columns(engine: Engine, kind: str, version: str | None, about: dict[str, Any], row: dict[str, Any]) -> None:
    """Each field has its column, whichever key the version keeps it under."""
    take_in(engine, event("evt_1", kind, T + 30, about, version=version))

    assert_rows(engine, {"invoices": [{**row, "event_id": "evt_1", "as_of": at(T + 30)}]})
    assert kinds(engine, "in_1") == ["invoice.changed"]
    assert anomalies(engine) == []


def test_an_older_version_erases_nothing(engine: Engine) -> None:
    """Fields of one version survive a later event of the other, in both directions; a reference survives null."""
    newer, older = _invoice("in_1", "open", amount_overpaid=909), _invoice("in_2", "open", subscription="sub_2")
    newer["parent"] = {"type": "subscription_details", "subscription_details": {"subscription": "sub_1"}}
    del older["parent"], older["amount_overpaid"]
    without = {"id": "in_1", "object": "invoice", "status": "open", "total": 910, "subscription": None}
    take_in(
        engine,
        event("evt_1", "invoice.updated", T + 1, newer),
        event("evt_2", "invoice.updated", T + 5, without, before={"total": 908}, version="2024-06-20"),
        event("evt_3", "invoice.updated", T + 1, older, version="2024-06-20"),
        event("evt_4", "invoice.updated", T + 5, _invoice("in_2", "open", total=911), before={"total": 908}),
    )

    assert_rows(
        engine,
        {
            "invoices": [
                _row("in_1", "open", "evt_2", T + 5, total=910, amount_overpaid=909, subscription="sub_1"),
                _row("in_2", "open", "evt_4", T + 5, total=911, amount_overpaid=0, subscription="sub_2"),
            ]
        },
    )


def test_two_references(engine: Engine) -> None:
    """A second customer replaces the first in the row, and is an anomaly (design rule 5)."""
    take_in(
        engine,
        event("evt_1", "invoice.updated", T + 1, _invoice("in_1", "open")),
        event("evt_2", "invoice.updated", T + 5, _invoice("in_1", "open", customer="cus_2")),
    )

    assert_rows(engine, {"invoices": [_row("in_1", "open", "evt_2", T + 5, customer="cus_2")]})
    assert anomalies(engine) == ["two_references"]


def test_moments_are_the_earliest(engine: Engine) -> None:
    """A paid invoice that changes again was paid when it was first paid, whichever event arrives first."""
    later = _invoice("in_1", "paid", status_transitions=_moments(finalized_at=T + 2, paid_at=T + 7), total=909)
    first = _invoice("in_1", "paid", status_transitions=_moments(finalized_at=T + 2, paid_at=T + 4))
    take_in(engine, event("evt_2", "invoice.updated", T + 9, later), event("evt_1", "invoice.paid", T + 5, first))

    [row] = rows(engine, "SELECT total, finalized_at, paid_at, event_id FROM invoices")
    assert row == {"total": 909, "finalized_at": at(T + 2), "paid_at": at(T + 4), "event_id": "evt_2"}


def test_an_explanation_names_the_first_event_of_a_moment(engine: Engine) -> None:
    """Later events repeat when an invoice was finalized and paid; the first event with the moment set it (rule 5)."""
    steps = (("invoice.finalized", "open"), ("invoice.paid", "paid"), ("invoice.updated", "paid"))
    bodies = [event(f"evt_{n}", kind, T + 50 + n, _invoice("in_1", status)) for n, (kind, status) in enumerate(steps)]
    take_in(engine, *bodies)

    explanation = explain.explain(engine, Subject("invoices", "", False, "in_1"))  # noqa: FBT003 - the mode
    by_column = {each["column"]: each["event_id"] for each in explanation.columns}
    assert (by_column["finalized_at"], by_column["paid_at"], by_column["total"]) == ("evt_0", "evt_1", "evt_2")


@pytest.mark.parametrize("arrival", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_one_second(engine: Engine, arrival: tuple[int, ...]) -> None:
    """Three updates of a paid invoice in one second are in the order of their ``previous_attributes``.

    Credit notes still change it (stripe-facts 3.3). Listed fields that are not kept make no step.
    """
    steps = [(70, 905, None), (500, 70, 80), (20, 500, 90)]
    bodies = [
        event(
            f"evt_{9 - number}",
            "invoice.updated",
            T + 9,
            _invoice("in_1", "paid", post_payment_credit_notes_amount=now, amount_overpaid=number),
            before={"post_payment_credit_notes_amount": before, "amount_overpaid": number - 1}
            | ({} if unkept is None else {"lines": {"total_count": unkept}}),
        )
        for number, (now, before, unkept) in enumerate(steps)
    ]
    take_in(engine, *(bodies[number] for number in arrival))

    moved = {"post_payment_credit_notes_amount": 20, "amount_overpaid": 2}
    assert_rows(engine, {"invoices": [_row("in_1", "paid", "evt_7", T + 9, **moved)]})
    assert anomalies(engine) == []


# ---- Event types ----

TYPES = (
    "created",
    "finalization_failed",
    "finalized",
    "marked_uncollectible",
    "overdue",
    "overpaid",
    "paid",
    "payment_action_required",
    "payment_attempt_required",
    "payment_failed",
    "payment_succeeded",
    "sent",
    "updated",
    "voided",
    "will_be_due",
)


def test_every_type_carries_its_invoice(engine: Engine) -> None:
    """Each type that Stripe lists reports the whole invoice (https://docs.stripe.com/api/events/types)."""
    take_in(
        engine,
        *(
            event(f"evt_{kind}", f"invoice.{kind}", T + number, _invoice(f"in_{kind}", "open", total=number))
            for number, kind in enumerate(TYPES)
        ),
    )

    assert_rows(
        engine,
        {
            "invoices": [
                _row(f"in_{kind}", "open", f"evt_{kind}", T + number, total=number) for number, kind in enumerate(TYPES)
            ]
        },
    )


def test_a_preview_is_no_invoice(engine: Engine) -> None:
    """``invoice.upcoming`` has no id before clover (2025-09-30), and one of its own since; neither is stored."""
    without = {key: value for key, value in _invoice("in_1", "draft").items() if key != "id"}
    take_in(
        engine,
        event("evt_1", "invoice.upcoming", T, without, version="2025-03-31.basil"),
        event("evt_2", "invoice.upcoming", T, _invoice("upcoming_in_1", "draft")),
    )

    assert_rows(engine, {})


# ---- Statuses ----

# Design rule 3, from the states of stripe-facts 3.3: the higher status, and the one that it outranks.
RANKS = (
    ("open", "draft"),
    ("uncollectible", "draft"),
    ("uncollectible", "open"),
    ("paid", "draft"),
    ("paid", "open"),
    ("paid", "uncollectible"),
    ("void", "draft"),
    ("void", "open"),
    ("void", "uncollectible"),
)


def test_ranks(engine: Engine) -> None:
    """A lower status changes nothing: not later in the same second, not in a later one, not when it came first."""
    number = count()
    bodies: list[bytes] = []
    expected = []
    for high, low in RANKS:
        for low_created, low_first in ((T + 9, False), (T + 20, False), (T + 20, True), (T + 5, False)):
            invoice = f"in_{next(number)}"
            of_high, of_low = f"evt_{invoice}_high", f"evt_{invoice}_low"
            pair = [
                event(of_high, "invoice.updated", T + 9, _invoice(invoice, high, total=1, number=high)),
                event(of_low, "invoice.updated", low_created, _invoice(invoice, low, total=2, number=low)),
            ]
            bodies += reversed(pair) if low_first else pair
            expected.append(_row(invoice, high, of_high, T + 9, total=1, number=high))
    take_in(engine, *bodies)

    assert_rows(engine, {"invoices": expected})
    assert anomalies(engine) == []


def test_late_and_lower_is_no_change(engine: Engine) -> None:
    """Each step of an invoice is one change; a late event of lower rank is none."""
    steps = ("draft", "open", "uncollectible", "paid")
    bodies = [event(f"evt_{n}", "invoice.updated", T + n, _invoice("in_1", step)) for n, step in enumerate(steps)]
    take_in(engine, *bodies, event("evt_9", "invoice.updated", T + 9, _invoice("in_1", "open", total=1)))

    assert_rows(engine, {"invoices": [_row("in_1", "paid", "evt_3", T + 3)]})
    assert kinds(engine, "in_1") == ["invoice.changed"] * 4


@pytest.mark.parametrize(("first", "second"), [("paid", "void"), ("void", "paid")])
def test_paid_and_void(engine: Engine, first: str, second: str) -> None:
    """Paid and void have equal rank, so the later one decides; having both is an anomaly."""
    bodies = [
        event("evt_1", "invoice.updated", T + 1, _invoice("in_1", first)),
        event("evt_2", "invoice.updated", T + 2, _invoice("in_1", second)),
    ]
    take_in(engine, *reversed(bodies))

    both = {"paid_at": at(T + 41), "voided_at": at(T + 41)}
    assert_rows(engine, {"invoices": [_row("in_1", second, "evt_2", T + 2, **both)]})
    assert anomalies(engine) == ["paid_and_void"]


def test_unknown_status(engine: Engine) -> None:
    """An unknown status is kept and noted, and has the lowest rank."""
    take_in(
        engine,
        event("evt_1", "invoice.updated", T + 1, _invoice("in_1", "dunning")),
        event("evt_2", "invoice.finalized", T + 1, _invoice("in_2", "open")),
        event("evt_3", "invoice.updated", T + 9, _invoice("in_2", "dunning")),
    )

    assert_rows(
        engine,
        {"invoices": [_row("in_1", "dunning", "evt_1", T + 1), _row("in_2", "open", "evt_2", T + 1)]},
    )
    assert "unknown_status" in anomalies(engine)


# ---- Deleted drafts ----


def test_deleted_draft(engine: Engine) -> None:
    """A draft can be deleted (stripe-facts section 1), and no other event outranks the deletion."""
    draft = _invoice("in_1", "draft")
    take_in(
        engine,
        event("evt_1", "invoice.created", T, draft),
        event("evt_2", "invoice.deleted", T + 9, draft),
        event("evt_3", "invoice.updated", T + 9, _invoice("in_1", "draft", total=1), before={"total": 908}),
        event("evt_4", "invoice.updated", T + 20, _invoice("in_1", "draft", total=2), before={"total": 908}),
        event("evt_5", "invoice.deleted", T + 9, _invoice("in_2", "draft")),
        # The API's answer for a deleted invoice; ``deleted`` is "always true for a deleted object".
        event("evt_6", "invoice.created", T, _invoice("in_3", "draft")),
        event("obs_7", "payfold.invoice.observed", T + 9, {"id": "in_3", "object": "invoice", "deleted": True}),
    )

    assert_rows(
        engine,
        {
            "invoices": [
                _row("in_1", "draft", "evt_2", T + 9, deleted=True),
                _row("in_2", "draft", "evt_5", T + 9, deleted=True),
                _row("in_3", "draft", "obs_7", T + 9, deleted=True),
            ]
        },
    )
    assert anomalies(engine) == []


def test_only_a_draft_can_be_deleted(engine: Engine) -> None:
    """A finalized invoice that is reported deleted is an anomaly (design rule 3)."""
    finalized = ("open", "paid", "uncollectible", "void")
    for status in finalized:
        invoice = f"in_{status}"
        take_in(
            engine,
            event(f"evt_{status}", "invoice.updated", T, _invoice(invoice, status)),
            event(f"evt_{status}_deleted", "invoice.deleted", T + 9, _invoice(invoice, status)),
            event(f"evt_{status}_later", "invoice.updated", T + 20, _invoice(invoice, status)),
        )

    expected = [_row(f"in_{status}", status, f"evt_{status}_deleted", T + 9, deleted=True) for status in finalized]
    assert_rows(engine, {"invoices": expected})
    noted = rows(engine, "SELECT DISTINCT subject_id FROM anomalies WHERE resolved_at IS NULL ORDER BY subject_id")
    assert [row["subject_id"] for row in noted] == [f"in_{status}" for status in finalized]


# ---- Invoices of 2015 ----

# https://stripe.com/docs/upgrades: `date` is `created` since 2019-03-14; by 2018-11-08 `closed` controls automatic
# collection alone, and the status `uncollectible` replaces `forgiven`.
OF_2015: dict[str, Any] = {
    "object": "invoice",
    "amount_due": 9031,
    "application_fee": 9032,
    "attempt_count": 1,
    "attempted": True,
    "charge": None,
    "closed": False,
    "currency": "eur",
    "customer": "cus_1",
    "date": T + 1,
    "discount": None,
    "ending_balance": -9033,
    "forgiven": False,
    "lines": {"object": "list", "data": [{"id": "sub_line", "object": "line_item", "amount": 9034}]},
    "livemode": False,
    "metadata": {},
    "next_payment_attempt": None,
    "paid": False,
    "period_end": T + 2,
    "period_start": T + 3,
    "receipt_number": "RECEIPT-1",
    "starting_balance": -9035,
    "subscription": "sub_1",
    "subtotal": 9036,
    "tax": 9037,
    "tax_percent": 19.0,
    "total": 9038,
    "webhooks_delivered_at": T + 4,
}


def _row_of_2015(invoice_id: str, status: str | None, **values: object) -> dict[str, Any]:
    return {
        "id": invoice_id,
        "number": None,
        "status": status,
        "currency": "eur",
        "total": 9038,
        "amount_due": 9031,
        "amount_paid": None,
        "amount_remaining": None,
        "amount_overpaid": None,
        "starting_balance": -9035,
        "ending_balance": -9033,
        "pre_payment_credit_notes_amount": None,
        "post_payment_credit_notes_amount": None,
        "customer": "cus_1",
        "subscription": "sub_1",
        "deleted": False,
        "created": at(T + 1),
        "finalized_at": None,
        "paid_at": None,
        "voided_at": None,
        "event_id": f"evt_{invoice_id}",
        "as_of": at(T + 9),
        **values,
    }


def test_invoices_of_2015(engine: Engine) -> None:
    """Invoices of 2015 have three booleans and no status: paid means paid, forgiven means uncollectible.

    These versions do not report whether an invoice without an attempt is a draft or open, nor what became
    of one that was closed although nothing was paid.
    """
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("in_paid", "invoice.payment_succeeded", {"paid": True, "closed": True}),
        ("in_forgiven", "invoice.updated", {"forgiven": True, "closed": True}),
        ("in_paid_and_forgiven", "invoice.updated", {"paid": True, "forgiven": True, "closed": True}),
        ("in_attempted", "invoice.payment_failed", {}),
        ("in_closed", "invoice.updated", {"closed": True}),
        ("in_new", "invoice.created", {"attempted": False, "attempt_count": 0}),
    ]
    take_in(
        engine,
        *(
            event(f"evt_{invoice}", kind, T + 9, {**OF_2015, "id": invoice, **values}, version="2015-10-16")
            for invoice, kind, values in cases
        ),
    )

    assert_rows(
        engine,
        {
            "invoices": [
                # It was paid at the time of the first event that reports so.
                _row_of_2015("in_paid", "paid", paid_at=at(T + 9)),
                _row_of_2015("in_forgiven", "uncollectible"),
                _row_of_2015("in_paid_and_forgiven", "paid", paid_at=at(T + 9)),
                _row_of_2015("in_attempted", "open"),
                _row_of_2015("in_closed", None),
                _row_of_2015("in_new", None),
            ]
        },
    )


def test_ranks_of_2015(engine: Engine) -> None:
    """The booleans rank as the statuses that replaced them."""
    paid = {**OF_2015, "id": "in_1", "paid": True, "closed": True}
    take_in(
        engine,
        event("evt_in_1", "invoice.payment_succeeded", T + 9, paid, version="2015-10-16"),
        event("evt_2", "invoice.payment_failed", T + 9, {**OF_2015, "id": "in_1"}, version="2015-10-16"),
        event("evt_3", "invoice.updated", T + 20, {**OF_2015, "id": "in_1", "forgiven": True}, version="2015-10-16"),
    )

    assert_rows(engine, {"invoices": [_row_of_2015("in_1", "paid", paid_at=at(T + 9))]})


def test_status_is_believed_before_the_booleans(engine: Engine) -> None:
    """From 2018 to 2025 an invoice carries its status and ``paid``; a carried status is not inferred (rule 6)."""
    about = _invoice("in_1", "open", paid=True, forgiven=True, closed=True, attempted=True)
    take_in(engine, event("evt_1", "invoice.updated", T + 1, about, version="2018-10-31"))

    assert_rows(engine, {"invoices": [_row("in_1", "open", "evt_1", T + 1)]})
