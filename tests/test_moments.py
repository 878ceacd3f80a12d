"""A moment is the time of the first of Stripe's events that reports it, or of our own reading where no event does.

An observation is dated by Stripe's answer less the call's duration, so it may seem older than what it saw (rule 5 and
"Observations" of the design): a session that is read in the very second in which it completed is dated a second before.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

import pytest
from sqlalchemy import Engine

from tests import ledger
from tests.envelopes import event
from tests.literals import at
from worker.proof import swap
from worker.proof.rebuild import rebuilt

T: Final = 1_700_000_000
DAY: Final = 86_400

Json = Mapping[str, Any]
SESSION: Final = {"id": "cs_#", "object": "checkout.session", "mode": "payment", "payment_intent": "pi_#"}
PAID: Final = {**SESSION, "status": "complete", "payment_status": "paid"}
EXPIRED: Final = {**SESSION, "status": "expired", "payment_status": "unpaid"}
CHARGE: Final = {"id": "ch_#", "object": "charge", "status": "succeeded", "captured": True, "amount_captured": 900}
REFUND: Final = {"id": "re_#", "object": "refund", "amount": 900, "status": "failed"}
NOTE: Final = {"id": "cn_#", "object": "credit_note", "status": "void"}
INVOICE: Final = {"id": "in_#", "object": "invoice", "status": "paid"}
CASES: Final[dict[str, tuple[str, tuple[str, ...], Json, str]]] = {
    # table: columns, the object, the event that reports it
    "completed": ("orders", ("completed_at", "paid_at"), PAID, "checkout.session.completed"),
    "expired": ("orders", ("expired_at",), EXPIRED, "checkout.session.expired"),
    "captured": ("charges", ("captured_at",), CHARGE, "charge.succeeded"),
    "failed": ("refunds", ("failed_at",), REFUND, "refund.failed"),
    "void": ("credit_notes", ("voided_at",), NOTE, "credit_note.voided"),
    "paid": ("invoices", ("paid_at",), INVOICE, "invoice.paid"),
}


def sent(name: str, number: str) -> list[bytes]:
    """Return the event of the case *name*, a reading from a second before, and an event that repeats it a day later."""
    _, _, about, kind = CASES[name]
    later = "charge.refunded" if name == "captured" else kind
    bodies = [
        event("evt_1#", kind, T, about),
        event("obs_2#", f"payfold.{about['object']}.observed", T - 1, about, version=None),
        event("evt_3#", later, T + DAY, about),
    ]
    return [body.replace(b"#", number.encode()) for body in bodies]


def record(engine: Engine, body: bytes) -> None:
    """Record *body*, by the source that it is of."""
    source = "observation" if b'"payfold.' in body else "webhook"
    ledger.record(engine, [ledger.delivery(body, source=source)])


def moments(engine: Engine, name: str) -> list[dict[str, Any]]:
    """Return the distinct values of the columns of the case *name*."""
    table, columns, *_ = CASES[name]
    return ledger.rows(engine, f"SELECT DISTINCT {', '.join(columns)} FROM {table}")  # noqa: S608 - names of our own


@pytest.mark.parametrize("name", CASES)
def test_a_reading_makes_no_moment_earlier(engine: Engine, name: str) -> None:
    """In every order and every split the first real event sets the moment, also in a rebuild."""
    ways = list(ledger.splits(sent(name, "#")))
    for place in range(3):
        for number, batches in enumerate(ways):
            for body in batches[place] if place < len(batches) else ():
                record(engine, body.replace(b"#", str(number).encode()))
        ledger.fold(engine)

    assert moments(engine, name) == [dict.fromkeys(CASES[name][1], at(T))]
    with rebuilt(engine) as made:
        assert swap.compare(made, on_difference=print).drift == 0


@pytest.mark.parametrize("name", CASES)
def test_a_reading_long_before_any_event_is_the_moment(engine: Engine, name: str) -> None:
    """A reading long before the first event sets the moment: an earlier event was missed."""
    _, read, again = sent(name, "1")
    for body in (read, again):
        record(engine, body)
        ledger.fold(engine)

    assert moments(engine, name) == [dict.fromkeys(CASES[name][1], at(T - 1))]
    with rebuilt(engine) as made:
        assert swap.compare(made, on_difference=print).drift == 0


@pytest.mark.parametrize("name", CASES)
def test_a_reading_is_a_moment_where_no_event_is(engine: Engine, name: str) -> None:
    """Where only readings report a moment, the earliest reading sets it."""
    _, first, _ = sent(name, "1")
    again = json.dumps({**json.loads(first), "id": "obs_9", "created": T + 60}).encode()

    for body in (again, first):
        record(engine, body)
        ledger.fold(engine)

    assert moments(engine, name) == [dict.fromkeys(CASES[name][1], at(T - 1))]
