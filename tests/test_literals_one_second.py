"""Two events of one second, of which only `previous_attributes` shows the order (docs.stripe.com/api/events/object).

Of each object the later one has the smaller id, so that no order of ids finds it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from deploy.local.services import Services
from schemas import database
from tests import ledger
from tests.stripe_payments import Body, canceled_intent, charge, dispute, event, refund
from tests.web import migrated_database

INVOICE: Body = {"id": "in_1", "object": "invoice", "currency": "usd", "livemode": False, "status": "draft"}
LINK: Body = {"id": "plink_1", "object": "payment_link", "livemode": False, "metadata": {}}
PORTAL: Body = {"id": "bpc_1", "object": "billing_portal.configuration", "livemode": False, "updated": 1_700_000_020}
CUSTOMER: Body = {"id": "cus_1", "object": "customer", "livemode": False, "metadata": {}}
NOTE: Body = {"id": "cn_1", "object": "credit_note", "livemode": False, "status": "issued"}

# By table: the object, its first event, the type of the two of one second, a field, and its values in turn.
STEPS: dict[str, tuple[Body, str, str, str, tuple[Any, Any, Any]]] = {
    "refunds": (
        refund("re_1", created=9, status="pending"),
        *("refund.created", "refund.updated", "status"),
        ("pending", "requires_action", "pending"),
    ),
    "charges": (
        charge("ch_1"),
        *("charge.succeeded", "charge.updated", "amount_refunded"),
        (0, 5000, 0),
    ),
    "disputes": (
        dispute("du_1"),
        *("charge.dispute.created", "charge.dispute.updated", "status"),
        ("needs_response", "under_review", "needs_response"),
    ),
    "payment_intents": (
        canceled_intent("pi_1", at=10),
        *("payment_intent.canceled", "payment_intent.canceled", "canceled_at"),
        (1_700_000_010, 1_700_000_011, 1_700_000_010),
    ),
    "invoices": (INVOICE, "invoice.created", "invoice.updated", "amount_due", (100, 200, 100)),
    # Before basil (docs.stripe.com/changelog/basil/2025-03-31/add-support-for-multiple-partial-payments-on-invoices).
    "invoice_payments": (
        {**INVOICE, "id": "in_2", "status": "open", "payment_intent": "pi_1"},
        *("invoice.created", "invoice.updated", "charge"),
        ("ch_1", "ch_2", "ch_1"),
    ),
    "payment_links": (LINK, "payment_link.created", "payment_link.updated", "active", (True, False, True)),
    "portal_configurations": (
        PORTAL,
        *("billing_portal.configuration.created", "billing_portal.configuration.updated", "name"),
        (None, "One", None),
    ),
    "customers": (CUSTOMER, "customer.created", "customer.updated", "name", ("One", "Two", "One")),
    "credit_notes": (NOTE, "credit_note.created", "credit_note.updated", "memo", (None, "one", None)),
}


def arrivals(table: str) -> list[bytes]:
    """Return the first event of an object, in an earlier second, then the last event, then the one before it."""
    about, first, then, field, (was, became, ended) = STEPS[table]
    return [
        event(f"evt_0_{table}", first, 10, {**about, field: was}),
        event(f"evt_1_{table}", then, 20, {**about, field: ended}, previous={field: became}),
        event(f"evt_2_{table}", then, 20, {**about, field: became}, previous={field: was}),
    ]


@pytest.fixture(scope="module")
def arrived(services: Services) -> Iterator[Engine]:
    """Return a database that took in both events of one second in one batch."""
    with migrated_database(services) as database_url:
        engine = database.engine(database_url)
        for table in STEPS:
            ledger.record(engine, map(ledger.delivery, arrivals(table)))
            ledger.fold(engine)
        yield engine
        engine.dispose()


@pytest.mark.parametrize("table", STEPS)
def test_the_event_that_continues_the_other_is_the_last(arrived: Engine, table: str) -> None:
    """The event whose previous attributes equal the other event's state is the later one."""
    found = ledger.rows(arrived, f"SELECT event_id FROM {table} WHERE event_id LIKE :own", own=f"%_{table}")  # noqa: S608 - our own names

    assert found == [{"event_id": f"evt_1_{table}"}]
