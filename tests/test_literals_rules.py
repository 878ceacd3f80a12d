"""What the folds alone decide, case by case: no database, so that a case costs a fraction of a millisecond.

Expected values are arithmetic by hand, and what Stripe's words mean: docs.stripe.com/api/checkout/sessions/object
(totals, ``total_details``, statuses), /credit_notes/object (pre and post payment amounts; stripe-facts, section 2.5),
/customer_balance_transactions/object (a credit is negative), /invoices/object, /charges/object and /refunds/object.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import EllipsisType
from typing import Any

import pytest

from schemas.own_events import SESSION_CLOCK_EXPIRED
from tests import envelopes, ledger
from tests.envelopes import Json
from tests.literals import at
from worker import folds
from worker.folding.claim import event_of_delivery
from worker.folds import balance, charge, checkout_session, credit_note, invoice, join, payment
from worker.folds.facts import Change, Facts, Row, Subject
from worker.folds.join import Joined
from worker.folds.payment import Payment

T = 1_700_000_000
WORLD: Row = {"account": "", "livemode": False}


def facts(*bodies: bytes) -> list[Facts]:
    """Return what the folds read from the events *bodies*."""
    return [one for body in bodies for one in folds.judge(event_of_delivery(ledger.delivery(body))).facts]


def joined(subject: Subject, *bodies: bytes) -> Joined:
    """Return the row *subject* that the events *bodies* make."""
    spec = folds.ROW_SPECS[subject.table]
    wanted = (subject, join.leader_of(spec, subject))
    found = join.fold_all(spec, [each for each in facts(*bodies) if each.subject in wanted])
    assert found is not None
    return found


def anomalies(found: Joined) -> list[tuple[str, dict[str, Any]]]:
    """Return the anomalies of a row, as kind and detail."""
    return [(each.kind, dict(each.detail)) for each in found.anomalies]


def of(table: str, id_: str, currency: str = "") -> Subject:
    """Return a row of *table* in test mode."""
    return Subject(table, "", False, id_, currency=currency)  # noqa: FBT003 - the mode


# ---- Balances ----


def customer(
    id_: str, created: int, amount: int | EllipsisType | None, before: Json | None = None, **fields: object
) -> bytes:
    """Return an update of customer cus_1 with the balance *amount* in dollars unless *fields* say otherwise."""
    usual = {"id": "cus_1", "object": "customer", "balance": amount, "currency": "usd"}
    whole = {name: value for name, value in {**usual, **fields}.items() if value is not ...}
    return envelopes.event(id_, "customer.updated", T + created, whole, before=before)


def listed(
    id_: str, created: int, amount: int, ending: int, *, read: int = 50, event: str = "", **fields: object
) -> bytes:
    """Return a reading, *read* seconds after T, of a transaction that was made *created* seconds after T."""
    usual = {
        "id": id_,
        "object": "customer_balance_transaction",
        "amount": amount,
        "created": T + created,
        "currency": "usd",
        "customer": "cus_1",
        "ending_balance": ending,
        "type": "adjustment",
    }
    type_ = "payfold.customer_balance_transaction.observed"
    return envelopes.event(event or f"obs_{id_}", type_, T + read, {**usual, **fields}, version=None)


USD = of("balances", "cus_1", "usd")
EUR = of("balances", "cus_1", "eur")
DEBT: Json = {"balance": 0}


def test_what_a_transaction_reports() -> None:
    """A transaction is a row, a step of the balance, a witness of its customer, and a credit to its note."""
    read = listed("cbtxn_1", 7, -300, -500, type="credit_note", credit_note="cn_1", invoice=None)
    common: dict[str, Any] = {"event_id": "obs_cbtxn_1", "source": "observation", "created": at(T + 50)}
    amounts: dict[str, Any] = {"amount": -500, "_transaction": "cbtxn_1"}

    assert facts(read) == [
        Facts(
            subject=of("balance_transactions", "cbtxn_1"),
            rank=0,
            stamp=(at(T + 50),),
            columns={
                "currency": "usd",
                "type": "credit_note",
                "amount": -300,
                "ending_balance": -500,
                "created": at(T + 7),
            },
            references={"customer": "cus_1", "invoice": None, "credit_note": "cn_1"},
            **common,
        ),
        Facts(subject=USD, rank=0, stamp=(at(T + 7),), columns=amounts, before={"amount": -200}, **common),
        Facts(
            subject=of("customers", "cus_1"),
            rank=-1,
            stamp=(at(T + 7),),
            columns={**amounts, "_currency": "usd"},
            before={"amount": -200},
            is_witness=True,
            **common,
        ),
        Facts(
            subject=of("credit_notes", "cn_1"),
            rank=-1,
            stamp=(at(T + 50),),
            columns={"_listed cbtxn_1": {"amount": 300, "currency": "usd"}},
            is_witness=True,
            **common,
        ),
    ]


def test_a_customer_outranks_the_ledger() -> None:
    """In the default currency the customer's step of a balance is above the ledger's."""
    (_, own), (_, step, _) = facts(customer("evt_1", 1, -500)), facts(listed("cbtxn_1", 1, -500, -500))

    assert (own.rank, step.rank) == (1, 0)


def test_a_break_in_the_ledger() -> None:
    """From 0 to -500, then from -400 to -300: 100 are missing between the two."""
    found = joined(USD, listed("cbtxn_1", 1, -500, -500), listed("cbtxn_2", 2, 100, -300))

    assert found.row["amount"] == -300
    assert anomalies(found) == [("broken_chain", {"expected": -500, "found": -400, "difference": 100})]


DIFFERS = ("balance_differs", {"customer_says": -500, "ledger_says": -300})


@pytest.mark.parametrize(
    ("bodies", "expected"),
    [
        # Read after the customer's last event, and before it.
        ([customer("evt_1", 10, -500, DEBT), listed("cbtxn_1", 1, -300, -300)], [DIFFERS]),
        ([customer("evt_1", 60, -500, DEBT), listed("cbtxn_1", 1, -300, -300)], []),
        ([customer("evt_1", 10, -500, DEBT), listed("cbtxn_1", 1, -500, -500)], []),
        # In the second of the last event: what the customer had in that second, and what it had before.
        ([customer("evt_1", 50, -500, {"balance": -300}), listed("cbtxn_1", 1, -300, -300)], []),
        (
            [
                customer("evt_1", 30, -300, DEBT),
                customer("evt_2", 40, -400, {"balance": -300}),
                customer("evt_3", 50, -500, {"balance": -400}),
                listed("cbtxn_1", 1, -300, -300),
            ],
            [DIFFERS],
        ),
        # The latest reading counts for all.
        (
            [
                customer("evt_1", 50, -500, DEBT),
                listed("cbtxn_1", 1, -100, -100, read=40),
                listed("cbtxn_2", 2, -200, -300, read=60),
            ],
            [DIFFERS],
        ),
    ],
)
def test_two_witnesses(bodies: Sequence[bytes], expected: list[object]) -> None:
    """They differ where the ledger was read no earlier than the last event, and that second never had its amount."""
    found = joined(USD, *bodies)

    assert found.row["amount"] == -500
    assert anomalies(found) == expected


@pytest.mark.parametrize(("read", "amount"), [(9, -500), (10, -500), (11, -400)])
def test_the_newer_witness_of_another_currency(read: int, amount: int) -> None:
    """In a currency that is no longer the default the ledger decides where it was read after the last event of it."""
    bodies = [
        customer("evt_1", 10, -500),
        customer("evt_2", 20, 0, {"currency": "usd", "balance": -500}, currency="eur"),
    ]

    assert joined(USD, *bodies, listed("cbtxn_1", 1, -400, -400, read=read)).row["amount"] == amount


def test_a_transaction_that_was_read_again() -> None:
    """Of two readings of one transaction the earlier is a twin, next to what the customer reports."""
    bodies = [
        customer("evt_1", 10, -500, DEBT),
        listed("cbtxn_1", 1, -500, -500),
        listed("cbtxn_1", 1, -500, -500, read=60, event="obs_again"),
    ]
    order = balance.ROW_SPEC.order
    assert order is not None

    path = order(facts(*bodies))

    assert [step.event_id for step in path.steps] == ["obs_cbtxn_1", "obs_again", "evt_1"]
    assert path.twins == {"obs_cbtxn_1"}


# Twice from 0 to -500 in one second, by two events alike; that the balance came back in between no event reports.
TWICE = [customer("evt_1", 1, -500, DEBT), customer("evt_2", 1, -500, DEBT)]
THRICE = [listed("cbtxn_1", 1, -500, -500), listed("cbtxn_2", 1, 500, 0), listed("cbtxn_3", 1, -500, -500)]


def test_a_step_that_the_ledger_lists_twice() -> None:
    """It was taken twice; without the ledger one event is the twin of the other."""
    assert [child["id"] for child in joined(USD, *TWICE).children] == ["evt_2"]
    assert [(child["id"], child["amount"]) for child in joined(USD, *TWICE, *THRICE).children] == [
        ("evt_1", -500),
        ("evt_2", -500),
    ]


def test_the_customer_of_a_step_that_the_ledger_lists_twice() -> None:
    """The customer's row has the order of its balance."""
    order, own = folds.ROW_SPECS["customers"].order, of("customers", "cus_1")
    assert order is not None

    def twins(*bodies: bytes) -> set[str]:
        return set(order([each for each in facts(*bodies) if each.subject == own]).twins)

    assert twins(*TWICE) == {"evt_1"}
    assert twins(*TWICE, *THRICE) == set()


@pytest.mark.parametrize(("read", "doubts"), [(50, []), (1, ["ambiguous_order"])])
def test_how_a_second_ended(read: int, doubts: list[str]) -> None:
    """A ledger that was read after a second shows its last balance; in that second it may not have seen the whole."""
    bodies = [customer("evt_2", 1, -500, DEBT), customer("evt_1", 1, 0, {"balance": -500})]
    found = joined(USD, *bodies, listed("cbtxn_1", 1, -500, -500, read=read), listed("cbtxn_2", 1, 500, 0, read=read))

    assert [kind for kind, _ in anomalies(found)] == doubts
    assert found.row["event_id"] == ("evt_2" if doubts else "evt_1")


def test_where_a_ledger_begins() -> None:
    """A ledger begins with 0, so of two steps of one second the one from 0 is the first."""
    found = joined(USD, listed("cbtxn_2", 1, -500, -500), listed("cbtxn_1", 1, 500, 0))

    assert (found.row["amount"], found.row["event_id"], anomalies(found)) == (0, "obs_cbtxn_1", [])


def test_a_ledger_in_doubt() -> None:
    """From 200 to 100 and back in one second, and nothing leads there: either may have been the last."""
    found = joined(USD, listed("cbtxn_1", 1, -100, 100), listed("cbtxn_2", 1, 100, 200))

    assert "ambiguous_order" in [kind for kind, _ in anomalies(found)]


def test_a_ledger_that_comes_back() -> None:
    """To -500, back to 0 and to -500 again in one second: none of the three is a twin, and -500 is the end."""
    found = joined(USD, *THRICE)

    assert (found.row["amount"], anomalies(found)) == (-500, [])


def test_two_transactions_alike() -> None:
    """Two transactions from 0 to -500 are two, though the chain is broken between them."""
    found = joined(USD, listed("cbtxn_1", 1, -500, -500), listed("cbtxn_2", 1, -500, -500))

    assert anomalies(found)[:1] == [("broken_chain", {"expected": -500, "found": 0, "difference": 500})]


IN_USD = customer("evt_1", 1, -100)
IN_EUR = customer("evt_3", 10, -700, {"currency": "usd", "balance": -100}, currency="eur")
NAMELESS = customer("evt_2", 5, ..., currency=..., name="Buyer")


@pytest.mark.parametrize(
    ("subject", "bodies", "opening"),
    [
        (USD, [IN_USD], None),
        (USD, [IN_USD, NAMELESS], None),
        (USD, [IN_USD, IN_EUR], {"amount": 0}),
        (USD, [IN_USD, NAMELESS, IN_EUR], {"amount": 0}),
        (EUR, [IN_USD, NAMELESS, IN_EUR], {"amount": -700}),
        (EUR, [IN_EUR], {"amount": -700}),
        (EUR, [IN_USD, IN_EUR, listed("cbtxn_1", 1, -700, -700, currency="eur")], {"amount": 0}),
        (USD, [IN_EUR, customer("evt_4", 20, -90, {"balance": -80})], {"amount": -80}),
    ],
)
def test_where_a_balance_begins(subject: Subject, bodies: Sequence[bytes], opening: Row | None) -> None:
    """After a change of the currency with what the first event shows; with 0 by a ledger, or before any change."""
    assert joined(subject, *bodies).opening == opening


def test_changes_of_a_balance() -> None:
    """A change for each step that leads on from the balance before, up to the one after; else none."""
    steps = balance.ROW_SPEC.steps
    first: Row = {"amount": -300, "ending_balance": -300}
    second: Row = {"amount": 100, "ending_balance": -200}
    third: Row = {"amount": -50, "ending_balance": -250}

    def changed(*amounts: int) -> list[Change]:
        states: list[dict[str, Any]] = [{"currency": "usd", "amount": amount} for amount in amounts]
        return [Change("balance.changed", before, after) for before, after in pairwise(states)]

    assert steps(None, {"currency": "usd", "amount": -200}, [first, second]) == changed(0, -300, -200)
    assert steps({"amount": -200}, {"currency": "usd", "amount": -250}, [third]) == changed(-200, -250)
    assert steps({"amount": -100}, {"currency": "usd", "amount": -250}, [third]) == []
    assert steps(None, {"currency": "usd", "amount": -301}, [first]) == []
    assert balance.ROW_SPEC.changes(None, {"currency": "usd", "amount": -200}) == changed(0, -200)
    assert balance.ROW_SPEC.changes({"amount": -200}, {"currency": "usd", "amount": -200}) == []


# ---- Orders ----

ORDER: Json = {
    "id": "cs_1",
    "object": "checkout.session",
    "amount_subtotal": 1000,
    "amount_total": 1080,
    "created": T,
    "currency": "usd",
    "mode": "payment",
    "payment_status": "paid",
    "status": "complete",
    "total_details": {"amount_discount": 5, "amount_shipping": 50, "amount_tax": 30},
}
ONE: Json = {
    "id": "li_1",
    "object": "item",
    "amount_discount": 7,
    "amount_subtotal": 600,
    "amount_tax": 10,
    "amount_total": 610,
    "currency": "usd",
    "description": "Tea",
    "quantity": 1,
}
TWO: Json = {**ONE, "id": "li_2", "amount_subtotal": 400, "amount_tax": 20, "amount_total": 420}
OBSERVED = "payfold.checkout.session.observed"
CS = of("orders", "cs_1")


def session(id_: str, created: int, type_: str = "checkout.session.completed", **fields: object) -> bytes:
    """Return an event of session cs_1, without the *fields* that are `...`."""
    whole = {name: value for name, value in {**ORDER, **fields}.items() if value is not ...}
    before = whole.pop("before", None)
    return envelopes.event(id_, type_, T + created, whole, before=before)


def lines(*items: Json) -> Json:
    """Return a whole list of lines."""
    return {"object": "list", "data": list(items), "has_more": False}


def total(details: Json, amount: object) -> dict[str, Any]:
    """Return the *amount* of an order, of which *details* are a part."""
    return {"amount_total": amount, "total_details": {"amount_discount": 5, **details}}


def differs(column: str, order: object, of_lines: object) -> list[tuple[str, dict[str, object]]]:
    """Return the anomaly of an order that differs from its lines."""
    return [("lines_differ", {"column": column, "order": order, "lines": of_lines})]


# The totals of the order, its lines, and what is wrong: 600 + 400 = 1000, 610 + 420 + 50 for shipping = 1080.
LISTED: Mapping[str, tuple[dict[str, Any], Sequence[Json], list[tuple[str, dict[str, object]]]]] = {
    "equal": ({}, [ONE, TWO], []),
    "another_subtotal": ({"amount_subtotal": 999}, [ONE, TWO], differs("amount_subtotal", 999, 1000)),
    "no_subtotal": ({"amount_subtotal": None}, [ONE, TWO], []),
    "a_line_without_a_subtotal": ({}, [ONE, {**TWO, "amount_subtotal": None}], []),
    "another_total": ({"amount_total": 1081}, [ONE, TWO], differs("amount_total", 1081, 1080)),
    "tax_on_shipping": (total({"amount_shipping": 50, "amount_tax": 40}, 1090), [ONE, TWO], []),
    "tax_on_nothing": (
        total({"amount_shipping": 50, "amount_tax": 41}, 1090),
        [ONE, TWO],
        differs("amount_total", 1090, 1080),
    ),
    "no_total": ({"amount_total": None}, [ONE, TWO], []),
    "no_shipping": (total({"amount_shipping": None, "amount_tax": 30}, 1081), [ONE, TWO], []),
    "no_tax": (total({"amount_shipping": 50, "amount_tax": None}, 1081), [ONE, TWO], []),
    "a_line_without_tax": ({"amount_total": 1081}, [ONE, {**TWO, "amount_tax": None}], []),
    "a_line_without_a_total": ({"amount_total": 1081}, [ONE, {**TWO, "amount_total": None}], []),
    "another_currency": ({}, [ONE, {**TWO, "currency": "eur"}], differs("currency", "usd", "eur")),
    "other_currencies": (
        {},
        [{**ONE, "currency": "gbp"}, {**TWO, "currency": "eur"}],
        differs("currency", "usd", "eur"),
    ),
    "a_line_without_a_currency": ({}, [ONE, {**TWO, "currency": None}], []),
    "an_order_without_a_currency": ({"currency": None}, [ONE, {**TWO, "currency": "eur"}], []),
    "converted": (
        {"presentment_details": {"presentment_currency": "eur", "presentment_amount": 990}},
        [{**ONE, "currency": "eur"}, {**TWO, "currency": "eur"}],
        [],
    ),
    "converted_and_another": (
        {"presentment_details": {"presentment_currency": "eur", "presentment_amount": 990}},
        [{**ONE, "currency": "eur"}, {**TWO, "currency": "gbp"}],
        differs("currency", "usd", "eur"),
    ),
}


@pytest.mark.parametrize("name", LISTED)
def test_lines_that_were_listed_again(name: str) -> None:
    """Lines that are listed after the totals moved have to add up to them."""
    fields, items, expected = LISTED[name]
    open_: dict[str, Any] = {
        "status": "open",
        "payment_status": "unpaid",
        "amount_total": 2000,
        "amount_subtotal": 2000,
    }
    bodies = [
        session("obs_1", 1, OBSERVED, line_items=lines({**ONE, "amount_subtotal": 2000}), **open_),
        session("evt_2", 2, **fields),
    ]
    again = session("obs_3", 3, OBSERVED, line_items=lines(*items), **fields)

    assert (joined(CS, *bodies).row["lines_complete"], anomalies(joined(CS, *bodies))) == (False, [])
    assert (joined(CS, *bodies, again).row["lines_complete"], anomalies(joined(CS, *bodies, again))) == (True, expected)
    # The totals may move with the listing itself.
    assert anomalies(joined(CS, bodies[0], again)) == expected
    # Lines are those of the totals that they were listed with, as long as these do not move.
    assert anomalies(joined(CS, session("evt_2", 2, **fields), again)) == []


def test_what_a_row_can_be_advanced_by() -> None:
    """A row of which the lines moved, were listed again, or differ, is folded from all its events."""
    bare = joined(CS, session("evt_1", 1)).row
    whole = joined(CS, session("evt_1", 1, line_items=lines(ONE, TWO))).row
    partial = session("evt_2", 600, amount_total=..., amount_subtotal=..., currency=..., client_reference_id="c")

    def advances(row: Row, body: bytes) -> bool:
        return join.advance(checkout_session.ROW_SPEC, row, facts(body)) is not None

    assert advances(bare, session("evt_2", 600, amount_total=9))
    assert advances(bare, session("evt_2", 600, line_items=lines(ONE, TWO)))
    assert not advances(bare, session("evt_2", 600, line_items=lines(ONE)))
    assert advances(whole, session("evt_2", 600))
    assert advances(whole, partial)
    assert not advances(whole, session("evt_2", 600, amount_total=9))
    assert not advances(whole, session("evt_2", 600, line_items=lines(ONE, TWO)))


def test_totals_that_move() -> None:
    """Lines that were listed before the totals moved are not known to be complete, and not known to differ."""
    row = joined(CS, session("evt_1", 1, line_items=lines(ONE, TWO))).row
    (step,) = facts(session("evt_2", 600, amount_total=9))
    after: Row = {**row, **step.columns}

    assert not checkout_session.ROW_SPEC.follow(row, step, after)
    assert [after[name] for name in ("lines_complete", "_lines_moved", "_lines_differ")] == [False, True, None]


# The state of a session, and its order's status.
STATUSES: Sequence[tuple[str | None, str | None, str, str | None]] = (
    ("open", "unpaid", "payment", "open"),
    ("open", "no_payment_required", "payment", "open"),
    ("open", "no_payment_required", "setup", "open"),
    ("open", None, "setup", "open"),
    ("complete", "unpaid", "payment", "processing"),
    ("complete", "unpaid", "setup", "processing"),
    ("complete", "paid", "payment", "paid"),
    ("complete", "no_payment_required", "payment", "paid"),
    ("complete", "no_payment_required", "setup", "complete"),
    ("complete", None, "setup", "complete"),
    ("complete", None, "payment", None),
    ("expired", "unpaid", "payment", "expired"),
    ("later", "unpaid", "payment", None),
)


@pytest.mark.parametrize(("status", "payment_status", "mode", "expected"), STATUSES)
def test_the_status_of_an_order(status: str, payment_status: str | None, mode: str, expected: str | None) -> None:
    """The status follows from the session's own, from its payment's and from the mode; else it is not known."""
    found = joined(CS, session("obs_1", 1, OBSERVED, status=status, payment_status=payment_status, mode=mode))
    unknown = {"session_status": status, "payment_status": payment_status, "mode": mode}

    assert found.row["status"] == expected
    assert anomalies(found) == ([] if expected else [("unknown_status", unknown)])


def test_a_status_of_a_payment_that_stripe_has_yet_to_invent() -> None:
    """It is reported, though the session is known to be open."""
    found = joined(CS, session("obs_1", 1, OBSERVED, status="open", payment_status="later"))

    assert found.row["status"] == "open"
    assert anomalies(found) == [
        ("unknown_status", {"session_status": "open", "payment_status": "later", "mode": "payment"})
    ]


def test_a_session_that_is_missing() -> None:
    """That Stripe has no such session decides nothing, and is reported."""
    missing = envelopes.event(
        "obs_9", "payfold.checkout.session.missing", T + 9, {"id": "cs_1", "object": "checkout.session"}, version=None
    )
    found = joined(CS, session("evt_1", 1), missing)

    assert (found.row["status"], found.row["event_id"]) == ("paid", "evt_1")
    assert anomalies(found) == [("missing_at_stripe", {})]
    opened = session("obs_1", 1, OBSERVED, status="open", payment_status="unpaid")
    assert joined(CS, opened, missing).row["event_id"] == "obs_1"


def test_the_clock() -> None:
    """Our clock expires an order and knows nothing of its session; any real event undoes it."""
    opened = session("obs_1", 1, OBSERVED, status="open", payment_status="unpaid")
    clock = session("clk_2", 90_000, SESSION_CLOCK_EXPIRED, status="expired", payment_status="unpaid")
    late = session("evt_3", 90_001)

    expired = joined(CS, opened, clock).row
    assert (expired["status"], expired["session_status"]) == ("expired", "open")
    assert expired["expired_at"] == at(T + 90_000)
    paid = joined(CS, opened, clock, late)
    assert (paid.row["status"], paid.row["expired_at"], anomalies(paid)) == ("paid", None, [])


def test_before_an_event_of_a_session() -> None:
    """What an event lists as previous is the state before it, under the names of the row."""
    (found,) = facts(session("evt_1", 1, before={"amount_total": 900, "customer": None, "payment_intent": "pi_0"}))

    assert found.before == {
        "amount_discount": 5,
        "amount_shipping": 50,
        "amount_subtotal": 1000,
        "amount_tax": 30,
        "amount_total": 900,
        "created": at(T),
        "currency": "usd",
        "customer": None,
        "mode": "payment",
        "payment_intent": "pi_0",
        "payment_status": "paid",
    }
    assert facts(session("evt_1", 1))[0].before is None


def test_a_session_without_a_status() -> None:
    """In 2019 a session had no status: a reading of one does not make one up."""
    (found,) = facts(session("obs_1", 1, OBSERVED, status=..., payment_status=...))

    assert "session_status" not in found.columns
    assert joined(CS, session("obs_1", 1, OBSERVED, status=..., payment_status=...)).row["session_status"] is None


ONWARD = ("open", "expired", "processing", "failed", "paid")
ANNOUNCED: Mapping[str | None, str | None] = {
    "open": "order.opened",
    "expired": "order.expired",
    "processing": "order.processing",
    "failed": "order.failed",
    "paid": "order.paid",
    "complete": "order.completed",
}


def state(status: str | None, amount: int = 5, currency: str = "usd") -> Row:
    """Return what decides the kind of a change, and what does not."""
    return {"status": status, "session_status": "complete", "amount_total": amount, "currency": currency}


@pytest.mark.parametrize("now", ONWARD)
def test_a_step_back_is_a_correction(now: str) -> None:
    """From every state on to a later one is that state's kind, once; back, or to what was announced, a correction."""
    kind_of = checkout_session.kind_of_step
    place = ONWARD.index(now)

    assert kind_of(None, state(now)) == ANNOUNCED[now]
    assert [kind_of(state(was), state(now)) for was in ONWARD[:place]] == [ANNOUNCED[now]] * place
    assert [kind_of(state(was), state(now)) for was in ONWARD[place + 1 :]] == ["order.corrected"] * (4 - place)
    assert kind_of(state(None), state(now)) == ANNOUNCED[now]
    assert kind_of(state(now), state(now)) is None
    assert kind_of(state(now), state(now, amount=6)) == "order.corrected"
    assert kind_of(state(now), state(now, currency="eur")) == "order.corrected"
    assert kind_of(state(None), state(now), [ANNOUNCED[now] or ""]) == "order.corrected"


def test_paid_and_complete_are_one_place() -> None:
    """Neither is before the other, so each is announced after the other."""
    kind_of = checkout_session.kind_of_step

    assert kind_of(state("paid"), state("complete")) == "order.completed"
    assert kind_of(state("complete"), state("paid")) == "order.paid"
    assert kind_of(state("complete"), state("failed")) == "order.corrected"
    assert kind_of(state("failed"), state("complete")) == "order.completed"


def test_an_order_of_which_the_status_is_no_longer_known() -> None:
    """An unknown status is before all others, so a step to it is one back."""
    assert [checkout_session.kind_of_step(state(was), state(None)) for was in ONWARD] == ["order.corrected"] * 5


SHOWN_OF_AN_ORDER: Row = {
    "status": "paid",
    "session_status": "complete",
    "payment_status": "unpaid",
    "mode": "payment",
    "currency": "usd",
    "amount_subtotal": 1,
    "amount_discount": 2,
    "amount_shipping": 3,
    "amount_tax": 4,
    "amount_total": 5,
    "presentment_currency": "eur",
    "presentment_amount": 6,
    "client_reference_id": "cart_1",
    "customer": "cus_1",
    "payment_link": "plink_1",
    "payment_intent": "pi_1",
    "subscription": "sub_1",
    "invoice": "in_1",
}
NOT_SHOWN: Row = {**WORLD, "livemode": True, "customer_email": "buyer@example.com", "recovered_from": "cs_0"}


@pytest.mark.parametrize(
    ("status", "complete", "more"),
    [
        ("paid", True, {"lines": []}),
        ("paid", False, {"lines": None}),
        ("expired", True, {"lines": []}),
        ("failed", True, {}),
    ],
)
def test_what_a_change_of_an_order_shows(status: str, complete: bool, more: dict[str, Any]) -> None:  # noqa: FBT001
    """All that a shop acts on, without what may name a person; a paid or expired order has its lines, if known."""
    now = {**SHOWN_OF_AN_ORDER, "status": status}
    before = {**SHOWN_OF_AN_ORDER, "status": "open", "amount_total": 7}
    row: Row = {**NOT_SHOWN, **now, "lines_complete": complete}
    changes = checkout_session.ROW_SPEC.changes

    assert changes(None, row) == [Change(ANNOUNCED[status], None, {**now, **more})]  # type: ignore[arg-type]  # a kind
    assert changes({**NOT_SHOWN, **before}, row) == [Change(ANNOUNCED[status], before, {**now, **more})]  # type: ignore[arg-type]


# ---- Credit notes ----

NOTE: Json = {
    "id": "cn_1",
    "object": "credit_note",
    "amount": 300,
    "currency": "usd",
    "customer": "cus_1",
    "customer_balance_transaction": "cbtxn_1",
    "out_of_band_amount": None,
    "post_payment_amount": 300,
    "pre_payment_amount": 0,
    "refund": "re_1",
    "status": "issued",
    "type": "post_payment",
}
CN = of("credit_notes", "cn_1")
PARTS = ("pre_payment_amount", "post_payment_amount", "refunded_amount", "to_balance_amount")


def note(id_: str = "evt_1", created: int = 1, **fields: object) -> bytes:
    """Return an event of note cn_1, without the *fields* that are `...`."""
    whole = {name: value for name, value in {**NOTE, **fields}.items() if value is not ...}
    return envelopes.event(id_, "credit_note.updated", T + created, whole)


def credited(amount: int, name: str = "cbtxn_1", **fields: object) -> bytes:
    """Return a reading of the transaction by which *amount* went to the balance."""
    return listed(name, 1, -amount, -amount, credit_note="cn_1", type="credit_note", **fields)  # type: ignore[arg-type]


def refunds(*amounts: int) -> list[Json]:
    """Return the refunds of a note since basil."""
    return [
        {"amount_refunded": amount, "refund": f"re_{number}", "type": "refund"} for number, amount in enumerate(amounts)
    ]


def split(post: int = 300, out: int = 0, **parts: int) -> list[tuple[str, dict[str, int]]]:
    """Return the anomaly of a note of which the parts do not add up."""
    return [("credit_note_split", {"post_payment": post, "out_of_band": out, **parts})]


def sides(amount: int, pre: int, post: int) -> list[tuple[str, dict[str, int]]]:
    """Return the anomaly of a note of which the sides do not add up."""
    return [("credit_note_sides", {"amount": amount, "pre_payment": pre, "post_payment": post})]


UNNAMED: dict[str, Any] = {"refund": ..., "customer_balance_transaction": ...}
NEITHER: dict[str, Any] = {"refund": None, "customer_balance_transaction": None}
SIDELESS: dict[str, Any] = {"pre_payment_amount": None, "post_payment_amount": None}
LISTS: dict[str, Any] = {"refund": ..., "refunds": refunds(100, 20)}
Notes = Mapping[str, tuple[Sequence[bytes], tuple[int | None, ...], Sequence[tuple[str, dict[str, int]]]]]
# Events, then what was before and after the payment, what of that was refunded and credited, and what is wrong.
NOTES: Notes = {
    # ---- the sides ----
    "before": ([note(type="pre_payment", **SIDELESS, **NEITHER)], (300, 0, 0, 0), []),
    "after": ([note(**SIDELESS)], (0, 300, None, None), []),
    "mixed": ([note(type="mixed", **SIDELESS)], (None, None, None, None), []),
    "one_side": ([note(post_payment_amount=None)], (0, None, None, None), []),
    "other_side": ([note(pre_payment_amount=None, type="pre_payment")], (None, 300, None, None), []),
    "sides": ([note(pre_payment_amount=1)], (1, 300, None, None), sides(300, 1, 300)),
    "sides_without_an_amount": ([note(amount=None, pre_payment_amount=1)], (1, 300, None, None), []),
    # ---- the parts ----
    "named": ([note()], (0, 300, None, None), []),
    "refunded": ([note(customer_balance_transaction=None)], (0, 300, 300, 0), []),
    "credited": ([note(refund=None)], (0, 300, 0, 300), []),
    "neither": ([note(**NEITHER)], (0, 300, 0, None), split(refunded=0)),
    "unnamed": ([note(**UNNAMED)], (0, 300, None, None), []),
    "out_of_band": ([note(refund=None, out_of_band_amount=30)], (0, 300, 0, 270), []),
    "listed": ([note(), credited(180)], (0, 300, 120, 180), []),
    "listed_whole": ([note(), credited(300)], (0, 300, None, None), split(to_balance=300)),
    "listed_whole_without_a_refund": ([note(refund=None), credited(300)], (0, 300, 0, 300), []),
    "listed_in_euro": ([note(), credited(180, currency="eur")], (0, 300, None, None), []),
    "listed_twice": ([note(), credited(180), credited(170, "cbtxn_2")], (0, 300, 120, 180), []),
    "listed_twice_unnamed": (
        [note(customer_balance_transaction=...), credited(180), credited(170, "cbtxn_2")],
        (0, 300, None, None),
        [],
    ),
    "listed_though_none_is_named": ([note(**NEITHER | {"refund": ...}), credited(180)], (0, 300, 120, 180), []),
    "listed_alone": ([note(**SIDELESS, type="mixed"), credited(180)], (None, None, None, 180), []),
    "refunds": ([note(**LISTS)], (0, 300, 120, 180), []),
    "refunds_and_no_refund": ([note(**LISTS | {"refund": None})], (0, 300, 120, 180), []),
    "refunds_and_nothing_named": (
        [note(**LISTS, customer_balance_transaction=...)],
        (0, 300, 120, None),
        split(refunded=120),
    ),
    "refunds_of_all": (
        [note(refund=..., refunds=refunds(300), customer_balance_transaction=...)],
        (0, 300, 300, 0),
        [],
    ),
    "refunds_of_more": (
        [note(refund=..., refunds=refunds(400), customer_balance_transaction=...)],
        (0, 300, 400, None),
        split(refunded=400),
    ),
    "refunds_and_listed": ([note(**LISTS, customer_balance_transaction=...), credited(180)], (0, 300, 120, 180), []),
    "refunds_contradict": (
        [note(**LISTS, out_of_band_amount=20), credited(179)],
        (0, 300, 120, None),
        split(out=20, refunded=120, to_balance=179),
    ),
    "refunds_without_sides": (
        [note(**LISTS, **SIDELESS, type="mixed", customer_balance_transaction=...)],
        (None, None, 120, None),
        [],
    ),
    # An update that does not carry the refund leaves it as it is.
    "no_refund_and_a_memo": (
        [note(refund=None), note("evt_2", 2, refund=..., memo="m", customer_balance_transaction=...)],
        (0, 300, 0, 300),
        [],
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_the_parts_of_a_note(name: str) -> None:
    """What was refunded and what went to the balance come to what is after the payment and not out of band."""
    bodies, parts, expected = NOTES[name]
    found = joined(CN, *bodies)

    assert tuple(found.row[part] for part in PARTS) == parts
    assert anomalies(found) == list(expected)


UNBALANCED: dict[str, Any] = {"customer_balance_transaction": ...}
Refunded = tuple[Sequence[bytes], int | None, str | None, tuple[int | None, ...], Sequence[tuple[str, dict[str, int]]]]
# Events of the note, the amount and currency of its refund, the note's parts then, and what is wrong.
REFUNDED: Mapping[str, Refunded] = {
    "both": ([note()], 120, "usd", (0, 300, 120, 180), []),
    "all_though_a_transaction_is_named": ([note()], 300, "usd", (0, 300, None, None), split(refunded=300)),
    "nothing": ([note()], 0, "usd", (0, 300, None, None), split(refunded=0)),
    "more": ([note(**UNBALANCED)], 301, "usd", (0, 300, None, None), split(refunded=301)),
    "all": ([note(**UNBALANCED)], 300, "usd", (0, 300, 300, 0), []),
    "part_and_nothing_named": ([note(**UNBALANCED)], 120, "usd", (0, 300, 120, None), split(refunded=120)),
    "in_euro": ([note()], 120, "eur", (0, 300, None, None), []),
    "of_unknown_amount": ([note()], None, "usd", (0, 300, None, None), []),
    "in_no_currency": ([note(currency=None)], 120, None, (0, 300, None, None), []),
    "without_sides": ([note(**SIDELESS, type="mixed")], 120, "usd", (None, None, 120, None), []),
    "a_side_and_what_is_listed": (
        [note(**SIDELESS, type="mixed"), credited(180)],
        120,
        "usd",
        (None, None, 120, 180),
        [],
    ),
    "sides_alone": (
        [note(pre_payment_amount=1)],
        120,
        "usd",
        (1, 300, 120, 180),
        sides(300, 1, 300),
    ),
    "contradiction_alone": ([note(), credited(300)], 120, "usd", (0, 300, None, None), split(to_balance=300)),
    "contradiction": (
        [note(**LISTS, pre_payment_amount=1), credited(179)],
        5,
        "usd",
        (1, 300, 120, None),
        [*sides(300, 1, 300), *split(refunded=120, to_balance=179)],
    ),
}


@pytest.mark.parametrize("name", REFUNDED)
def test_the_refund_of_an_old_note(name: str) -> None:
    """The refund's amount is one part, and what it leaves is the other, if the note does not contradict it."""
    bodies, amount, currency, parts, expected = REFUNDED[name]
    found = credit_note.with_refund(joined(CN, *bodies), {"amount": amount, "currency": currency})

    assert tuple(found.row[part] for part in PARTS) == parts
    assert anomalies(found) == list(expected)


def test_a_note_that_waits_for_its_refund() -> None:
    """A note is open while it names a refund of which it does not report the amount."""
    assert credit_note.is_open(joined(CN, note()).row)
    assert not credit_note.is_open(joined(CN, note(refund=None)).row)
    assert not credit_note.is_open(joined(CN, note(**LISTS)).row)


def test_the_lines_of_a_note() -> None:
    """A line is found by the events of its note, whose order it has, and is never advanced."""
    line = {"id": "cnli_1", "object": "credit_note_line_item", "amount": 300, "type": "custom_line_item"}
    _, found = facts(note(lines={"object": "list", "data": [line], "has_more": False}))

    assert found.subject == Subject("credit_note_lines", "", False, "cnli_1", root="cn_1")  # noqa: FBT003 - the mode
    assert join.leader_of(credit_note.LINE_SPEC, found.subject) == CN
    assert join.advance(credit_note.LINE_SPEC, {"as_of": at(T), "event_id": "evt_0"}, [found]) is None


# ---- Invoices ----

INVOICE: Json = {
    "id": "in_1",
    "object": "invoice",
    "amount_paid": 70,
    "charge": "ch_1",
    "currency": "usd",
    "payment_intent": "pi_1",
    "status": "open",
}
EMPTY_INVOICE: Row = {**folds.ROW_SPECS["invoices"].empty, **WORLD, "livemode": True, "currency": "usd"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"status": "draft"}, []),
        ({"status": None}, [("unknown_status", {"status": None})]),
        ({"status": None, "deleted": True}, []),
        ({"status": "draft", "deleted": True}, []),
        ({"status": "open", "deleted": True}, [("deleted_and_final", {"status": "open"})]),
        ({"status": "draft", "deleted": True, "finalized_at": at(T)}, [("deleted_and_final", {"status": "draft"})]),
        ({"status": "draft", "deleted": True, "paid_at": at(T)}, []),
        ({"status": "open", "finalized_at": at(T)}, []),
        ({"status": "paid", "paid_at": at(T), "voided_at": at(T)}, [("paid_and_void", {})]),
    ],
)
def test_what_is_wrong_with_an_invoice(row: Row, expected: list[object]) -> None:
    """Only a draft can be deleted, one without a status is not known, and none is both paid and void."""
    found = invoice.ROW_SPEC.anomalies({**EMPTY_INVOICE, **row})

    assert [(each.kind, dict(each.detail)) for each in found] == expected


def test_a_change_of_an_invoice() -> None:
    """Each of its moves is a change that shows all of them; anything else is none."""
    moves: Row = {
        "status": "open",
        "deleted": False,
        "currency": "usd",
        "amount_due": 1,
        "amount_paid": 2,
        "amount_remaining": 3,
    }
    shown: Row = {**moves, "total": 4, "customer": "cus_1", "subscription": "sub_1"}
    row: Row = {**EMPTY_INVOICE, **shown, "amount_overpaid": 5}

    for name in moves:
        before = {**shown, name: None}
        assert invoice.ROW_SPEC.changes({**row, **before}, row) == [Change("invoice.changed", before, shown)], name
    assert invoice.ROW_SPEC.changes({**row, "total": 5, "livemode": False, "amount_overpaid": 6}, row) == []
    assert invoice.ROW_SPEC.changes(None, row) == [Change("invoice.changed", None, shown)]


def test_the_payment_that_an_invoice_names() -> None:
    """Before basil the invoice's event shows its payment, before it too, in the rank of its status."""
    before = {"status": "draft", "charge": None, "payment_intent": None, "amount_paid": 0}
    body = envelopes.event("evt_1", "invoice.updated", T, INVOICE, before=before, version="2022-11-15")
    own, found = facts(body)

    assert (own.columns["_charge"], own.columns["_payment_intent"]) == ("ch_1", "pi_1")
    assert found == Facts(
        subject=of("invoice_payments", "in_1"),
        event_id="evt_1",
        source="webhook",
        created=at(T),
        rank=1,
        stamp=(at(T),),
        columns={"status": "open", "currency": "usd", "amount_paid": 70, "charge": "ch_1"},
        references={"invoice": "in_1", "payment_intent": "pi_1"},
        before={
            "status": None,
            "currency": "usd",
            "amount_paid": 0,
            "charge": None,
            "invoice": "in_1",
            "payment_intent": None,
        },
    )


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ({"paid": True, "closed": True}, "paid"),
        ({"paid": False, "closed": True, "forgiven": True}, "uncollectible"),
        ({"paid": False, "closed": False, "attempted": True}, "open"),
        ({"paid": False, "closed": False, "attempted": True, "forgiven": False}, "open"),
        ({"paid": False, "closed": True, "attempted": True, "forgiven": False}, None),
        ({"paid": False, "closed": False, "attempted": False, "forgiven": False}, None),
        ({"paid": False, "attempted": True, "forgiven": False}, ...),
    ],
)
def test_an_invoice_of_2015(flags: Json, status: object) -> None:
    """Without a status it follows from the flags of that time (stripe-facts, section 11)."""
    object_ = {"id": "in_1", "object": "invoice", **flags}
    (found,) = facts(envelopes.event("evt_1", "invoice.updated", T, object_, version="2015-10-16"))

    assert found.columns.get("status", ...) == status


def test_before_an_invoice_payment() -> None:
    """What its event lists as previous is the state before it."""
    object_ = {"id": "inpay_1", "object": "invoice_payment", "invoice": "in_1", "status": "paid", "amount_paid": 5}
    body = envelopes.event("evt_1", "invoice_payment.paid", T, object_, before={"status": "open", "amount_paid": 0})
    (found,) = facts(body)

    assert found.before is not None
    assert (found.before["status"], found.before["amount_paid"]) == ("open", 0)


def test_the_rank_of_an_invoice_payment() -> None:
    """One that its invoice names follows that invoice, with the highest rank that its status allows."""
    rank_of, own = invoice.PAYMENT_SPEC.rank_of, {"payment_intent": "pi_1", "currency": "open"}

    assert rank_of({**own, "id": "inpay_1", "invoice": "in_1", "status": "open"}) == 0
    assert rank_of({**own, "id": "in_1", "invoice": "in_1", "status": "open"}) == 2
    assert rank_of({**own, "id": "in_1", "invoice": "in_1", "status": "paid"}) == 3
    assert join.leader_of(invoice.PAYMENT_SPEC, of("invoice_payments", "in_1")) == of("invoices", "in_1")
    assert join.leader_of(invoice.PAYMENT_SPEC, of("invoice_payments", "inpay_1")) is None


# ---- Payments ----

OPEN_ORDER: Row = {
    **WORLD,
    "id": "cs_1",
    "session_status": "complete",
    "payment_status": "unpaid",
    "payment_intent": "pi_1",
    "mode": "payment",
    "currency": "setup",
    "status": "processing",
    "paid_at": None,
    "failed_at": None,
    "completed_at": at(T),
    "expired_at": None,
}


def of_charge(id_: str, status: str = "succeeded", **fields: Any) -> Row:  # noqa: ANN401 - a column's value
    """Return the row of a charge that was neither captured nor released."""
    moments: Row = {"captured_at": None, "released_at": None}
    decided: Row = {"event_id": f"evt_{id_}", "as_of": at(T + 90), "source": "webhook"}
    return {"id": id_, "payment_intent": "pi_1", "status": status, **moments, **decided, **fields}


def of_release(id_: str, created: int | None, charge_id: str | None = None, event_id: str = "") -> Row:
    """Return the row of a refund that released a hold."""
    decided: Row = {"event_id": event_id or f"evt_{id_}", "as_of": at(T + 95), "source": "webhook"}
    made = None if created is None else at(T + created)
    return {"id": id_, "payment_intent": "pi_1", "charge": charge_id, "created": made, **decided}


CANCELED: Row = {"canceled_at": at(T + 40), "event_id": "evt_pi", "as_of": at(T + 99), "source": "webhook"}
HELD, RELEASED = of_charge("ch_1"), of_charge("ch_9", released_at=at(T + 30))
# A payment, and what it decides: the status, how many seconds after T, and by which event.
DECIDED: Mapping[str, tuple[Payment, tuple[str, int, str] | None]] = {
    "nothing": (Payment([], []), None),
    "held": (Payment([HELD], []), None),
    "captured": (Payment([of_charge("ch_1", captured_at=at(T + 20))], []), ("paid", 20, "evt_ch_1")),
    "pending": (Payment([of_charge("ch_1", "pending", captured_at=at(T + 20))], []), None),
    "captured_and_released": (
        Payment([of_charge("ch_1", "failed", captured_at=at(T + 20), released_at=at(T + 30))], []),
        ("paid", 20, "evt_ch_1"),
    ),
    "captured_twice": (
        Payment([of_charge("ch_2", captured_at=at(T + 20)), of_charge("ch_1", captured_at=at(T + 20))], []),
        ("paid", 20, "evt_ch_1"),
    ),
    "released": (Payment([RELEASED], []), ("failed", 30, "evt_ch_9")),
    "released_and_failed": (
        Payment([of_charge("ch_1", "failed", released_at=at(T + 30))], []),
        ("failed", 30, "evt_ch_1"),
    ),
    "declined": (Payment([of_charge("ch_1", "failed")], []), None),
    "released_and_held": (Payment([RELEASED, HELD], []), None),
    "the_last_release": (
        Payment([RELEASED, of_charge("ch_2", released_at=at(T + 35))], []),
        ("failed", 35, "evt_ch_2"),
    ),
    "by_refunds": (
        Payment([HELD], [of_release("re_2", 62, "ch_1"), of_release("re_1", 61, "ch_1")]),
        ("failed", 61, "evt_re_1"),
    ),
    "by_a_refund_without_a_time": (Payment([HELD], [of_release("re_1", None, "ch_1")]), ("failed", 95, "evt_re_1")),
    "by_an_unnamed_refund": (Payment([HELD], [of_release("re_1", 61)]), ("failed", 61, "evt_re_1")),
    # The unnamed refund is of the charge that is known to be released, so that the other is held still.
    "by_the_refund_of_another": (Payment([HELD, RELEASED], [of_release("re_1", 61)]), None),
    "by_refunds_of_no_charge": (
        Payment([], [of_release("re_2", 62), of_release("re_1", 61)]),
        ("failed", 61, "evt_re_1"),
    ),
    "by_refunds_of_one_time": (
        Payment([], [of_release("re_2", 61), of_release("re_1", 61)]),
        ("failed", 61, "evt_re_1"),
    ),
    # Two holds end in one second, and the first charge by its id is named.
    "by_two_refunds_of_one_time": (
        Payment([of_charge("ch_2"), HELD], [of_release("re_1", 61), of_release("re_9", 61, "ch_1")]),
        ("failed", 61, "evt_re_9"),
    ),
    "by_the_refund_of_an_unknown_charge": (
        Payment([HELD], [of_release("re_1", 61, "ch_8")]),
        ("failed", 61, "evt_re_1"),
    ),
    "by_the_refund_of_one_of_two": (Payment([HELD, of_charge("ch_2")], [of_release("re_1", 61, "ch_1")]), None),
    "canceled": (Payment([HELD], [], CANCELED), ("failed", 40, "evt_pi")),
    "canceled_without_a_time": (Payment([], [], {**CANCELED, "canceled_at": None}), ("failed", 99, "evt_pi")),
}


@pytest.mark.parametrize("name", DECIDED)
def test_what_a_payment_decides(name: str) -> None:
    """A capture pays; a release or a cancellation fails what nothing else holds."""
    known, expected = DECIDED[name]
    found = payment.decide(OPEN_ORDER, known)

    assert (None if found is None else (found.status, found.at, found.by.event_id)) == (
        None if expected is None else (expected[0], at(T + expected[1]), expected[2])
    )


def test_which_orders_are_open() -> None:
    """Those that are complete, are to be paid by an intent, and of which the session does not report the payment."""
    assert payment.is_open(OPEN_ORDER)
    assert payment.is_open({**OPEN_ORDER, "payment_status": None})
    for other in ({"payment_status": "paid"}, {"mode": "setup"}, {"payment_intent": None}, {"session_status": "open"}):
        assert not payment.is_open({**OPEN_ORDER, **other, "currency": "usd"})


def test_an_order_before_it_was_settled() -> None:
    """Without what its payment decided it is as its session left it."""
    settled: Row = {**OPEN_ORDER, "status": "paid", "paid_at": at(T + 20)}

    assert payment.base(settled, failed_at=None) == OPEN_ORDER
    assert payment.base(settled, failed_at=at(T + 5)) == {**OPEN_ORDER, "status": "failed", "failed_at": at(T + 5)}


# ---- The rest ----


def test_a_charge_that_does_not_report_its_refunds() -> None:
    """Of several last states the one with the most refunds is preferred; one that reports none counts as 0."""
    reports = [
        facts(envelopes.event("evt_1", "charge.updated", T, {"id": "ch_1", "object": "charge", **fields}))[0]
        for fields in ({}, {"amount_refunded": None}, {"amount_refunded": 0}, {"amount_refunded": 7})
    ]

    assert [charge.ROW_SPEC.prefer(each) for each in reports] == [0, 0, 0, 7]


def test_before_a_change_of_a_customer() -> None:
    """Before an update a customer was not deleted."""
    (found,) = facts(customer("evt_1", 1, ..., {"name": "A"}, currency=...))

    assert found.before == {"name": "A", "deleted": False}


EMPTY_FEATURES = {
    "customer_update": {},
    "invoice_history": {},
    "payment_method_update": {},
    "subscription_cancel": {"cancellation_reason": {}, "options": []},
    "subscription_pause": {},
    "subscription_update": {"schedule_at_period_end": {}, "products": [{"adjustable_quantity": {}}]},
}


def test_empty_features() -> None:
    """An object that another language wrote as an empty list is an object, and a list stays one."""
    written = {
        "customer_update": [],
        "invoice_history": [],
        "payment_method_update": [],
        "subscription_cancel": {"cancellation_reason": [], "options": {}},
        "subscription_pause": [],
        "subscription_update": {"schedule_at_period_end": [], "products": [{"adjustable_quantity": []}]},
    }
    flat: Json = {key: [] for key in EMPTY_FEATURES}
    for features, read in (
        (written, EMPTY_FEATURES),
        (EMPTY_FEATURES, EMPTY_FEATURES),
        (flat, {key: {} for key in EMPTY_FEATURES}),
    ):
        object_ = {"id": "bpc_1", "object": "billing_portal.configuration", "features": features}
        (found,) = facts(envelopes.event("evt_1", "billing_portal.configuration.updated", T, object_))
        assert found.columns["features"] == read


READ_ORDER: Row = {
    **OPEN_ORDER,
    "status": "paid",
    "payment_status": "paid",
    "paid_at": at(T + 100),
    "completed_at": at(T + 1),
    "as_of": at(T + 200),
}


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (Payment([of_charge("ch_1", captured_at=at(T + 20))], [], read_at=at(T + 100)), (20, "evt_ch_1")),
        # A reading is dated up to five seconds before the state that it saw.
        (Payment([of_charge("ch_1", captured_at=at(T + 94))], [], read_at=at(T + 100)), (94, "evt_ch_1")),
        (Payment([of_charge("ch_1", captured_at=at(T + 95))], [], read_at=at(T + 100)), None),
        (Payment([of_charge("ch_1", captured_at=at(T + 150))], [], read_at=at(T + 100)), None),
        (Payment([HELD], [], read_at=at(T + 100)), None),
        (Payment([RELEASED], [], read_at=at(T + 100)), None),
        (Payment([of_charge("ch_1", captured_at=at(T + 20))], []), None),
    ],
)
def test_what_a_reading_leaves_to_a_charge(known: Payment, expected: tuple[int, str] | None) -> None:
    """Where only a reading shows that an order is paid, a capture well before it gives the time, and nothing else."""
    found = payment.decide(READ_ORDER, known)

    shown = None if found is None else (found.status, found.at, found.by.event_id)
    assert shown == (None if expected is None else ("paid", at(T + expected[0]), expected[1]))


def test_which_orders_a_reading_may_have_shown() -> None:
    """Those that are paid at a time that is neither the one of the deciding event nor that of the completion."""
    assert payment.may_be_read({**READ_ORDER, "event_id": "evt_1"})
    assert payment.is_unsettled({**READ_ORDER, "event_id": "evt_1"})
    for name, value in (
        ("payment_status", "unpaid"),
        ("session_status", "open"),
        ("paid_at", None),
        ("payment_intent", None),
        ("as_of", at(T + 100)),
        ("completed_at", at(T + 100)),
    ):
        assert not payment.may_be_read({**READ_ORDER, "event_id": "evt_1", name: value}), name
    decided_by_a_reading = {**READ_ORDER, "event_id": "obs_1", "as_of": at(T + 100)}
    assert payment.may_be_read(decided_by_a_reading)
    assert payment.base(READ_ORDER, failed_at=at(T + 5)) == READ_ORDER


RISES: Mapping[str, tuple[Json, str, Json, Json, str, str]] = {
    # An object as it was a second before; the event of its new state, and the changed keys; the event that lists what
    # it was, a state that no other event shows.
    "invoices": (
        {"id": "in_1", "object": "invoice", "status": "draft", "number": None, "currency": "usd"},
        "invoice.paid",
        {"status": "paid", "number": "A-1"},
        {"status": "open"},
        "invoice.created",
        "invoice.updated",
    ),
    "credit_notes": (
        {"id": "cn_1", "object": "credit_note", "status": "issued", "memo": None, "currency": "usd"},
        "credit_note.voided",
        {"status": "void", "memo": "b"},
        {"status": "issued", "memo": "a"},
        "credit_note.created",
        "credit_note.updated",
    ),
    "refunds": (
        {"id": "re_1", "object": "refund", "status": "pending", "reason": None, "currency": "usd"},
        "refund.updated",
        {"status": "succeeded", "reason": "b"},
        {"status": "pending", "reason": "a"},
        "refund.created",
        "refund.updated",
    ),
}


@pytest.mark.parametrize("table", RISES)
def test_the_event_that_lists_the_rise_comes_first(table: str) -> None:
    """Of three events of one second the one that lists the state before it is the first, whatever its id is."""
    about, kind, changes, before, created, updated = RISES[table]
    after = {**about, **changes}
    bodies = [
        envelopes.event("evt_0", created, T, about),
        envelopes.event("evt_1", kind, T + 1, after),
        envelopes.event("evt_2", kind, T + 1, after),
        envelopes.event("evt_9", updated, T + 1, after, before=before),
    ]

    found = joined(Subject(table, "", False, str(about["id"])), *bodies)  # noqa: FBT003 - a part of the key

    assert (found.row["status"], found.row["event_id"]) == (changes["status"], "evt_2")
