"""In the feed and the anomalies a row has the name of Stripe's object, which readers filter by."""

import pytest

from worker import folds

SUBJECTS = {
    "balance_transactions": "balance_transaction",
    "balances": "balance",
    "charges": "charge",
    "credit_note_lines": "credit_note_line",
    "credit_notes": "credit_note",
    "customers": "customer",
    "disputes": "dispute",
    "invoice_payments": "invoice_payment",
    "invoices": "invoice",
    "orders": "order",
    "payment_intents": "payment_intent",
    "payment_links": "payment_link",
    "portal_configurations": "portal_configuration",
    "portal_sessions": "portal_session",
    "refunds": "refund",
}


@pytest.mark.parametrize("table", SUBJECTS)
def test_the_name_of_a_row(table: str) -> None:
    """An order is a Checkout Session to Stripe; all others have Stripe's own names."""
    assert folds.ROW_SPECS[table].subject == SUBJECTS[table]
