"""What a row is called in the feed and among the anomalies: the word of Stripe's object, which readers filter by."""

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
def test_what_a_row_is_called(table: str) -> None:
    """An order is a Checkout Session to Stripe; all others have Stripe's own names."""
    assert folds.ROW_SPECS[table].subject == SUBJECTS[table]
