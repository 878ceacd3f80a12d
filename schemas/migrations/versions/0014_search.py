"""Indexes by which a person finds an order: an email in any case, an amount, an invoice's or a note's number."""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_STATEMENTS = """
ALTER INDEX orders_customer_email RENAME TO orders_customer_email_as_written;
CREATE INDEX orders_customer_email ON orders (lower(customer_email)) WHERE customer_email IS NOT NULL;
CREATE INDEX orders_amount ON orders
    (currency, amount_total, (COALESCE(created, '-infinity'::timestamp with time zone)));
CREATE INDEX customers_email ON customers (lower(email)) WHERE email IS NOT NULL;
CREATE INDEX invoices_number ON invoices (number) WHERE number IS NOT NULL;
CREATE INDEX credit_notes_number ON credit_notes (number) WHERE number IS NOT NULL;
-- Last, since it keeps readers away until the end of the transaction.
DROP INDEX orders_customer_email_as_written;
"""
_BACK = """
DROP INDEX credit_notes_number;
DROP INDEX invoices_number;
DROP INDEX customers_email;
DROP INDEX orders_amount;
DROP INDEX orders_customer_email;
CREATE INDEX orders_customer_email ON orders (customer_email) WHERE customer_email IS NOT NULL;
"""


def upgrade() -> None:
    """Make them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop them, and make the index of emails as it was."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
