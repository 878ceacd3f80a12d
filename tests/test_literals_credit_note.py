"""Credit notes and their lines: every column, from every version of the object, as literals.

The objects are those of https://docs.stripe.com/api/credit_notes/object and .../credit_notes/line_item; what older
versions carried, and how an amount is split, is in stripe-facts sections 2.5 and 6 and in Stripe's API upgrades
(https://docs.stripe.com/upgrades).
"""

from typing import Any

import pytest
from sqlalchemy import Engine

from tests.envelopes import event
from tests.ledger import anomalies, kinds, rows, take_in
from tests.literals import assert_rows, at
from worker import folds

T = 1_700_000_000

LINE_1: dict[str, Any] = {
    "id": "cnli_1",
    "object": "credit_note_line_item",
    "amount": 7001,
    "description": "A line of the invoice",
    "discount_amount": 7002,
    "discount_amounts": [{"amount": 7003, "discount": "di_1"}],
    "invoice_line_item": "il_1",
    "livemode": False,
    "metadata": {"quantity": "7004"},
    "pretax_credit_amounts": [{"amount": 7005, "discount": "di_1", "type": "discount"}],
    "quantity": 7006,
    "tax_rates": [],
    "taxes": [{"amount": 7007, "tax_behavior": "exclusive", "taxable_amount": 7008}],
    "type": "invoice_line_item",
    "unit_amount": 7009,
    "unit_amount_decimal": "7010",
}
# A line of its own names no line of the invoice: the key is absent.
LINE_2: dict[str, Any] = {
    "id": "cnli_2",
    "object": "credit_note_line_item",
    "amount": 7101,
    "description": None,
    "discount_amount": 7102,
    "discount_amounts": [],
    "livemode": False,
    "metadata": None,
    "pretax_credit_amounts": [],
    "quantity": None,
    "tax_rates": [],
    "taxes": None,
    "type": "custom_line_item",
    "unit_amount": None,
    "unit_amount_decimal": None,
}


def _lines(*lines: dict[str, Any], has_more: bool = False) -> dict[str, Any]:
    return {"object": "list", "data": list(lines), "has_more": has_more, "url": "/v1/credit_notes/cn_1/lines"}


# 8101 before the payment and 1230 after it: 211 + 307 refunded, 409 outside of Stripe, so 303 to the balance. Each
# other amount is arbitrary and occurs once.
ENDIVE: dict[str, Any] = {
    "id": "cn_1",
    "object": "credit_note",
    "amount": 9331,
    "amount_shipping": 8001,
    "created": T + 1,
    "currency": "eur",
    "customer": "cus_1",
    "customer_account": "acct_customer",
    "customer_balance_transaction": "cbtxn_1",
    "discount_amount": 8002,
    "discount_amounts": [{"amount": 8003, "discount": "di_1"}],
    "effective_at": T + 2,
    "invoice": "in_1",
    "lines": _lines(LINE_1, LINE_2),
    "livemode": False,
    "memo": "A memo",
    "metadata": {"memo": "A memo in metadata"},
    "number": "NUMBER-CN-01",
    "out_of_band_amount": 409,
    "pdf": "https://pay.example.com/credit_notes/the-pdf-of-cn-1",
    "post_payment_amount": 1230,
    "pre_payment_amount": 8101,
    "pretax_credit_amounts": [{"amount": 8004, "discount": "di_1", "type": "discount"}],
    "reason": "order_change",
    "refunds": [
        {"amount_refunded": 211, "payment_record_refund": None, "refund": "re_1", "type": "refund"},
        {
            "amount_refunded": 307,
            "payment_record_refund": {"payment_record": "prec_1", "refund_group": "group_1"},
            "refund": None,
            "type": "payment_record_refund",
        },
    ],
    "shipping_cost": {"amount_subtotal": 8005, "amount_tax": 8006, "amount_total": 8007, "shipping_rate": None},
    "status": "issued",
    "subtotal": 8008,
    "subtotal_excluding_tax": 8009,
    "total": 8010,
    "total_excluding_tax": 8011,
    "total_taxes": [{"amount": 8012, "tax_behavior": "exclusive", "taxable_amount": 8013}],
    "type": "mixed",
    "voided_at": None,
}
ROW: dict[str, Any] = {
    "id": "cn_1",
    "number": "NUMBER-CN-01",
    "status": "issued",
    "type": "mixed",
    "reason": "order_change",
    "currency": "eur",
    "amount": 9331,
    "pre_payment_amount": 8101,
    "post_payment_amount": 1230,
    "refunded_amount": 518,
    "out_of_band_amount": 409,
    "to_balance_amount": 303,
    "customer": "cus_1",
    "invoice": "in_1",
    "customer_balance_transaction": "cbtxn_1",
    "memo": "A memo",
    "created": at(T + 1),
    "effective_at": at(T + 2),
    "voided_at": None,
    "lines_complete": True,
    # Since basil the refunds are listed with their parts.
    "refund": None,
}
LINE_ROW_1: dict[str, Any] = {
    "id": "cnli_1",
    "credit_note": "cn_1",
    "type": "invoice_line_item",
    "invoice_line_item": "il_1",
    "description": "A line of the invoice",
    "quantity": 7006,
    "amount": 7001,
    "discount_amount": 7002,
}
LINE_ROW_2: dict[str, Any] = {
    "id": "cnli_2",
    "credit_note": "cn_1",
    "type": "custom_line_item",
    "invoice_line_item": None,
    "description": None,
    "quantity": None,
    "amount": 7101,
    "discount_amount": 7102,
}


def _seen(event_id: str, as_of: int) -> dict[str, Any]:
    return {"event_id": event_id, "as_of": at(as_of)}


# ---- Columns ----

NEW_SINCE_BASIL = {"customer_account", "post_payment_amount", "pre_payment_amount"}
# Basil before 2025-05-28: refunds in a list, both sides of the amount not yet (they follow from the type).
BASIL: dict[str, Any] = {
    **{key: ENDIVE[key] for key in ENDIVE if key not in NEW_SINCE_BASIL},
    "type": "post_payment",
    "refunds": [{"amount_refunded": 2011, "refund": "re_1"}, {"amount_refunded": 3013, "refund": "re_2"}],
}
# 9331 - 2011 - 3013 - 409
BASIL_ROW = {
    **ROW,
    "type": "post_payment",
    "pre_payment_amount": 0,
    "post_payment_amount": 9331,
    "refunded_amount": 5024,
    "to_balance_amount": 3898,
}
# Before basil: one refund without its amount, and the old name of the taxes.
OLD_LINES = [{**{key: line[key] for key in line if key != "taxes"}, "tax_amounts": []} for line in (LINE_1, LINE_2)]
ACACIA: dict[str, Any] = {
    **{key: BASIL[key] for key in BASIL if key not in {"refunds", "total_taxes"}},
    "customer_balance_transaction": None,
    "lines": _lines(*OLD_LINES),
    "refund": "re_1",
    "tax_amounts": [{"amount": 8012, "inclusive": False, "taxable_amount": 8013}],
}
# 9331 - 409, since nothing went to the balance
ACACIA_ROW = {
    **BASIL_ROW,
    "refunded_amount": 8922,
    "to_balance_amount": 0,
    "customer_balance_transaction": None,
    "refund": "re_1",
}
EXPANDED: dict[str, Any] = {
    **ENDIVE,
    "customer": {"id": "cus_1", "object": "customer", "balance": 1, "currency": "usd"},
    "customer_balance_transaction": {"id": "cbtxn_1", "object": "customer_balance_transaction", "amount": -303},
    "invoice": {"id": "in_1", "object": "invoice", "total": 2, "number": "NUMBER-IN"},
    "refunds": [
        {**ENDIVE["refunds"][0], "refund": {"id": "re_1", "object": "refund", "amount": 3}},
        ENDIVE["refunds"][1],
    ],
}
VOIDED = {**ENDIVE, "status": "void", "voided_at": T + 3}


@pytest.mark.parametrize(
    ("kind", "version", "about", "row"),
    [
        pytest.param("credit_note.created", "2026-10-28.endive", ENDIVE, ROW, id="endive"),
        pytest.param("payfold.credit_note.observed", None, EXPANDED, ROW, id="expanded"),
        pytest.param("credit_note.created", "2025-03-31.basil", BASIL, BASIL_ROW, id="basil"),
        pytest.param("credit_note.created", "2025-02-24.acacia", ACACIA, ACACIA_ROW, id="acacia"),
        pytest.param(
            "credit_note.voided",
            "2026-10-28.endive",
            VOIDED,
            {**ROW, "status": "void", "voided_at": at(T + 3)},
            id="voided",
        ),
        # A note without the time of its voiding was voided when its event happened.
        pytest.param(
            "credit_note.voided",
            "2026-10-28.endive",
            {**VOIDED, "voided_at": None},
            {**ROW, "status": "void", "voided_at": at(T + 9)},
            id="voided without its time",
        ),
    ],
)
def test_columns(engine: Engine, kind: str, version: str | None, about: dict[str, Any], row: dict[str, Any]) -> None:
    """Each field has its column, whichever key the version keeps it under."""
    take_in(engine, event("evt_1", kind, T + 9, about, version=version))

    seen = _seen("evt_1", T + 9)
    assert_rows(
        engine,
        {
            "credit_notes": [{**row, **seen}],
            "credit_note_lines": [{**LINE_ROW_1, **seen}, {**LINE_ROW_2, **seen}],
        },
    )
    assert anomalies(engine) == []
    assert kinds(engine, "cn_1") == [f"credit_note.{'voided' if row['status'] == 'void' else 'issued'}"]


def _note(note_id: str, **values: object) -> dict[str, Any]:
    """Return a note of 1009 after the payment, as a version before basil reports it."""
    return {
        "id": note_id,
        "object": "credit_note",
        "amount": 1009,
        "created": T,
        "currency": "usd",
        "customer": "cus_1",
        "customer_balance_transaction": None,
        "effective_at": T,
        "invoice": "in_1",
        "lines": _lines(),
        "memo": None,
        "number": "NUMBER-CN-02",
        "out_of_band_amount": None,
        "reason": None,
        "refund": "re_1",
        "status": "issued",
        "type": "post_payment",
        "voided_at": None,
        **values,
    }


def _row(note_id: str, event_id: str, as_of: int, **values: object) -> dict[str, Any]:
    return {
        "id": note_id,
        "number": "NUMBER-CN-02",
        "status": "issued",
        "type": "post_payment",
        "reason": None,
        "currency": "usd",
        "amount": 1009,
        "pre_payment_amount": 0,
        "post_payment_amount": 1009,
        "refunded_amount": 1009,
        "out_of_band_amount": None,
        "to_balance_amount": 0,
        "customer": "cus_1",
        "invoice": "in_1",
        "customer_balance_transaction": None,
        "memo": None,
        "created": at(T),
        "effective_at": at(T),
        "voided_at": None,
        "lines_complete": True,
        "refund": "re_1",
        **_seen(event_id, as_of),
        **values,
    }


REASONS = ("duplicate", "fraudulent", "order_change", "product_unsatisfactory", None, "a_reason_to_come")


def test_reasons(engine: Engine) -> None:
    """The reason is kept as Stripe names it, also null and a future one."""
    numbered = [(f"cn_{number}", f"evt_{number}", reason) for number, reason in enumerate(REASONS)]
    take_in(
        engine,
        *(event(evt, "credit_note.created", T, _note(note, reason=reason)) for note, evt, reason in numbered),
    )

    assert_rows(engine, {"credit_notes": [_row(note, evt, T, reason=reason) for note, evt, reason in numbered]})


@pytest.mark.parametrize("newer_first", [True, False])
def test_two_versions_of_one_note(engine: Engine, newer_first: bool) -> None:  # noqa: FBT001 - pytest's parameter
    """Fields that only one version reports stay: the older version's single refund does not undo a list of refunds."""
    newer = {**ENDIVE, "type": "post_payment", "pre_payment_amount": 0, "post_payment_amount": 9331}
    newer["refunds"] = BASIL["refunds"]
    older = {**ACACIA, "customer_balance_transaction": "cbtxn_1"}
    versions = [(newer, "2026-10-28.endive"), (older, "2025-02-24.acacia")]
    (first, version), (second, another) = versions if newer_first else reversed(versions)
    take_in(
        engine,
        event("evt_1", "credit_note.created", T + 5, first, version=version),
        event("evt_2", "credit_note.updated", T + 9, {**second, "memo": "Another"}, version=another),
    )

    seen = _seen("evt_2", T + 9)
    assert_rows(
        engine,
        {
            "credit_notes": [{**BASIL_ROW, "memo": "Another", **seen}],
            "credit_note_lines": [{**LINE_ROW_1, **seen}, {**LINE_ROW_2, **seen}],
        },
    )
    assert kinds(engine, "cn_1") == ["credit_note.issued"]


# ---- How an amount is split ----

OLD_SPLITS: list[tuple[str | None, str | None, int | None, int | None, int | None, list[str]]] = [
    # refund, customer_balance_transaction, out_of_band_amount; refunded and to the balance of 1009
    ("re_1", None, None, 1009, 0, []),
    ("re_1", None, 31, 978, 0, []),
    (None, "cbtxn_1", None, 0, 1009, []),
    (None, "cbtxn_1", 31, 0, 978, []),
    (None, None, 1009, 0, 0, []),
    # The note does not name where 109 went.
    (None, None, 900, 0, None, ["credit_note_split"]),
    # The note names both, and not how much went to each.
    ("re_1", "cbtxn_1", None, None, None, []),
    ("re_1", "cbtxn_1", 31, None, None, []),
]


def _split_anomalies(engine: Engine) -> dict[str, list[str]]:
    """Return the kinds of anomaly of each note that has one."""
    found: dict[str, list[str]] = {}
    for row in rows(engine, "SELECT subject_id, kind FROM anomalies WHERE resolved_at IS NULL ORDER BY kind"):
        found.setdefault(row["subject_id"], []).append(row["kind"])
    return found


def test_split_before_basil(engine: Engine) -> None:
    """After the payment a note's amount is split into refunds, money outside of Stripe and balance; unknown is null."""
    expected = []
    noted: dict[str, list[str]] = {}
    for number, (refund, transaction, outside, refunded, to_balance, found) in enumerate(OLD_SPLITS):
        note, evt = f"cn_{number}", f"evt_{number}"
        carried = {"customer_balance_transaction": transaction, "out_of_band_amount": outside}
        about = _note(note, refund=refund, **carried)
        take_in(engine, event(evt, "credit_note.created", T, about, version="2022-11-15"))
        split = {"refunded_amount": refunded, "to_balance_amount": to_balance, "refund": refund}
        expected.append(_row(note, evt, T, **carried, **split))
        noted |= {note: found} if found else {}

    assert_rows(engine, {"credit_notes": expected})
    assert _split_anomalies(engine) == noted


def test_split_before_the_payment(engine: Engine) -> None:
    """A note before the payment lowers the amount due: nothing is refunded or goes to the balance."""
    about = _note("cn_1", type="pre_payment", refund=None)
    take_in(engine, event("evt_1", "credit_note.created", T, about, version="2022-11-15"))

    sides = {"pre_payment_amount": 1009, "post_payment_amount": 0, "refunded_amount": 0}
    assert_rows(engine, {"credit_notes": [_row("cn_1", "evt_1", T, type="pre_payment", refund=None, **sides)]})
    assert anomalies(engine) == []


def test_split_of_2019(engine: Engine) -> None:
    """Until 2019-10 a note named only its refund, not where the rest of the amount went.

    https://stripe.com/docs/upgrades, 2019-12-03: the rest of an amount was allocated out of band by itself.
    """
    about = {
        key: value
        for key, value in _note("cn_1").items()
        if key not in {"customer_balance_transaction", "out_of_band_amount"}
    }
    take_in(
        engine,
        event("evt_1", "credit_note.created", T, about, version="2019-09-09"),
        event("evt_2", "credit_note.created", T, {**about, "id": "cn_2", "refund": None}, version="2019-09-09"),
    )

    unknown = {"refunded_amount": None, "to_balance_amount": None}
    assert_rows(
        engine,
        {
            "credit_notes": [
                _row("cn_1", "evt_1", T, **unknown),
                _row("cn_2", "evt_2", T, refunded_amount=0, to_balance_amount=None, refund=None),
            ]
        },
    )


@pytest.mark.parametrize("arrival", [(0, 1), (1, 0)])
def test_the_ledger_knows_the_split(engine: Engine, arrival: tuple[int, ...]) -> None:
    """The amount to the balance is the negative of the note's transaction (stripe-facts 2.5), whichever came first."""
    transaction = {
        "id": "cbtxn_1",
        "object": "customer_balance_transaction",
        "amount": -363,
        "checkout_session": None,
        "created": T + 1,
        "credit_note": "cn_1",
        "currency": "usd",
        "customer": "cus_1",
        "description": None,
        "ending_balance": -464,
        "invoice": "in_1",
        "type": "credit_note",
    }
    note = _note("cn_1", customer_balance_transaction="cbtxn_1", out_of_band_amount=31)
    bodies = [
        event("evt_1", "credit_note.created", T + 2, note, version="2022-11-15"),
        event("obs_1", "payfold.customer_balance_transaction.observed", T + 50, transaction, version=None),
    ]
    take_in(engine, *(bodies[number] for number in arrival))

    carried = {"customer_balance_transaction": "cbtxn_1", "out_of_band_amount": 31}
    # 1009 - 31 - 363
    split = {"refunded_amount": 615, "to_balance_amount": 363}
    assert_rows(
        engine,
        {
            "credit_notes": [_row("cn_1", "evt_1", T + 2, **carried, **split)],
            "balance_transactions": [
                {
                    "id": "cbtxn_1",
                    "customer": "cus_1",
                    "currency": "usd",
                    "type": "credit_note",
                    "amount": -363,
                    "ending_balance": -464,
                    "invoice": "in_1",
                    "credit_note": "cn_1",
                    "order_id": None,
                    "description": None,
                    "created": at(T + 1),
                    **_seen("obs_1", T + 50),
                }
            ],
            "balances": [{"customer": "cus_1", "currency": "usd", "amount": -464, **_seen("obs_1", T + 50)}],
        },
    )
    assert anomalies(engine) == []


NEW_SPLITS: list[tuple[int, int, list[int], int | None, str | None, int | None, list[str]]] = [
    # pre, post, refunds, outside, transaction; to the balance
    (302, 707, [200, 60], 40, "cbtxn_1", 407, []),
    (302, 707, [600, 60], 47, None, 0, []),
    (1009, 0, [], None, None, 0, []),
    (0, 1009, [], None, "cbtxn_1", 1009, []),
    # The two sides are not the amount.
    (101, 707, [], None, "cbtxn_1", 707, ["credit_note_sides"]),
    # The parts are not the side after the payment: 507 left without a transaction, 43 too many, a transaction of 0.
    (302, 707, [200], None, None, None, ["credit_note_split"]),
    (302, 707, [700], 50, None, None, ["credit_note_split"]),
    (302, 707, [700], 7, "cbtxn_1", None, ["credit_note_split"]),
]


def test_split_since_basil(engine: Engine) -> None:
    """The note carries both sides and each refund's part; the rest of the side after the payment is computed."""
    expected = []
    noted: dict[str, list[str]] = {}
    for number, (pre, post, refunds, outside, transaction, to_balance, found) in enumerate(NEW_SPLITS):
        note, evt = f"cn_{number}", f"evt_{number}"
        about = {key: value for key, value in _note(note).items() if key != "refund"}
        carried = {
            "type": "mixed",
            "pre_payment_amount": pre,
            "post_payment_amount": post,
            "out_of_band_amount": outside,
            "customer_balance_transaction": transaction,
        }
        listed = [{"amount_refunded": part, "refund": f"re_{part}", "type": "refund"} for part in refunds]
        take_in(engine, event(evt, "credit_note.created", T, {**about, **carried, "refunds": listed}))
        split = {"refunded_amount": sum(refunds), "to_balance_amount": to_balance, "refund": None}
        expected.append(_row(note, evt, T, **carried, **split))
        noted |= {note: found} if found else {}

    assert_rows(engine, {"credit_notes": expected})
    assert _split_anomalies(engine) == noted


# ---- Statuses ----


def test_void_outranks_issued(engine: Engine) -> None:
    """A void note stays void after an "issued" event of the same second, of a later one, or one that arrives first."""
    expected = []
    for number, (late, first) in enumerate(((T + 9, False), (T + 20, False), (T + 20, True), (T + 5, False))):
        note = f"cn_{number}"
        pair = [
            event(
                f"evt_{note}_void",
                "credit_note.voided",
                T + 9,
                _note(note, status="void", voided_at=T + 8, memo="Voided"),
            ),
            event(f"evt_{note}_issued", "credit_note.updated", late, _note(note, memo="Issued")),
        ]
        take_in(engine, *(reversed(pair) if first else pair))
        moments = {"voided_at": at(T + 8), "memo": "Voided"}
        expected.append(_row(note, f"evt_{note}_void", T + 9, status="void", **moments))
        known_before = ["credit_note.issued"] if first else []
        assert kinds(engine, note) == [*known_before, "credit_note.voided"]

    assert_rows(engine, {"credit_notes": expected})
    assert anomalies(engine) == []


def test_one_change_for_each_status(engine: Engine) -> None:
    """A note is issued once and voided once, however often it is reported; an update is no change of the feed."""
    void = _note("cn_1", status="void", voided_at=T + 8)
    take_in(
        engine,
        event("evt_1", "credit_note.created", T, _note("cn_1")),
        event("evt_2", "credit_note.created", T, _note("cn_1")),
        event("evt_3", "credit_note.updated", T + 5, _note("cn_1", memo="A memo"), before={"memo": None}),
        event("evt_4", "credit_note.voided", T + 9, void),
        event("evt_5", "credit_note.updated", T + 15, {**void, "memo": "Another"}, before={"memo": None}),
    )

    assert kinds(engine, "cn_1") == ["credit_note.issued", "credit_note.voided"]
    moments = {"voided_at": at(T + 8), "memo": "Another"}
    assert_rows(engine, {"credit_notes": [_row("cn_1", "evt_5", T + 15, status="void", **moments)]})


@pytest.mark.parametrize("arrival", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_one_second(engine: Engine, arrival: tuple[int, ...]) -> None:
    """Three updates of one second are in the order of their ``previous_attributes``, however they arrive."""
    steps = [("A", None), ("B", "A"), ("C", "B")]
    bodies = [
        event(f"evt_{9 - number}", "credit_note.updated", T + 9, _note("cn_1", memo=now), before={"memo": before})
        for number, (now, before) in enumerate(steps)
    ]
    take_in(engine, *(bodies[number] for number in arrival))

    assert_rows(engine, {"credit_notes": [_row("cn_1", "evt_7", T + 9, memo="C")]})
    assert anomalies(engine) == []
    assert kinds(engine, "cn_1") == ["credit_note.issued"]


def test_unknown_status(engine: Engine) -> None:
    """An unknown status is kept and noted, records no change, and outranks no other."""
    take_in(
        engine,
        event("evt_1", "credit_note.updated", T, _note("cn_1", status="pending")),
        event("evt_2", "credit_note.voided", T, _note("cn_2", status="void", voided_at=T)),
        event("evt_3", "credit_note.updated", T + 9, _note("cn_2", status="pending")),
    )

    assert_rows(
        engine,
        {
            "credit_notes": [
                _row("cn_1", "evt_1", T, status="pending"),
                _row("cn_2", "evt_2", T, status="void", voided_at=at(T)),
            ]
        },
    )
    assert "unknown_status" in anomalies(engine)
    assert kinds(engine, "cn_1") == []


# ---- Lines ----


def test_a_page_of_lines(engine: Engine) -> None:
    """A webhook holds the first page; the lines are complete once a list has no more."""
    page = _note("cn_1", lines=_lines(LINE_1, has_more=True))
    take_in(engine, event("evt_1", "credit_note.created", T, page))

    assert_rows(
        engine,
        {
            "credit_notes": [_row("cn_1", "evt_1", T, lines_complete=False)],
            "credit_note_lines": [{**LINE_ROW_1, **_seen("evt_1", T)}],
        },
    )

    whole = _note("cn_1", lines=_lines(LINE_1, LINE_2))
    take_in(engine, event("obs_1", "payfold.credit_note.observed", T + 9, whole, version=None))

    seen = _seen("obs_1", T + 9)
    assert_rows(
        engine,
        {
            "credit_notes": [_row("cn_1", "obs_1", T + 9)],
            "credit_note_lines": [{**LINE_ROW_1, **seen}, {**LINE_ROW_2, **seen}],
        },
    )


def test_lines_that_are_not_listed(engine: Engine) -> None:
    """A note never listed with lines has incomplete lines; an event without lines removes none."""
    without = {key: value for key, value in _note("cn_2").items() if key != "lines"}
    take_in(
        engine,
        event("evt_1", "credit_note.created", T, _note("cn_1", lines=_lines(LINE_1))),
        event("evt_2", "credit_note.updated", T + 9, {**without, "id": "cn_1", "memo": "A memo"}),
        event("evt_3", "credit_note.created", T, without),
    )

    assert_rows(
        engine,
        {
            "credit_notes": [
                _row("cn_1", "evt_2", T + 9, memo="A memo"),
                _row("cn_2", "evt_3", T, lines_complete=False),
            ],
            "credit_note_lines": [{**LINE_ROW_1, **_seen("evt_1", T)}],
        },
    )


def test_an_update_of_a_note_is_no_change() -> None:
    """Only an issued note's memo and metadata can be updated (docs.stripe.com/api/credit_notes/update): no change."""
    shape = folds.ROW_SPECS["credit_notes"]
    issued = {**shape.empty, "status": "issued", "type": "pre_payment", "amount": 300}

    assert shape.changes(issued, {**issued, "memo": "another"}) == []
    assert [each.kind for each in shape.changes(issued, {**issued, "status": "void"})] == ["credit_note.voided"]


def test_the_fields_of_a_change() -> None:
    """A change holds each part of the note's money and its customer; number, memo and times are read elsewhere."""
    shown: dict[str, Any] = {
        "status": "issued",
        "type": "mixed",
        "reason": "duplicate",
        "currency": "usd",
        "amount": 1000,
        "pre_payment_amount": 100,
        "post_payment_amount": 900,
        "refunded_amount": 500,
        "out_of_band_amount": 150,
        "to_balance_amount": 250,
        "customer": "cus_1",
        "invoice": "in_1",
        "customer_balance_transaction": "cbtxn_1",
    }
    shape = folds.ROW_SPECS["credit_notes"]

    [change] = shape.changes(None, {**shape.empty, **shown, "number": "CN-1", "memo": "memo"})
    assert (change.kind, change.before, change.after) == ("credit_note.issued", None, shown)
