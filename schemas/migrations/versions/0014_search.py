"""Indexes by which a person finds an order: an email in any case, an amount, an invoice's or a note's number.

See Note [Large indexes are built ahead] in schemas/migrate.py.
"""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

BUILT = {
    "orders_amount": "ON orders (currency, amount_total, (COALESCE(created, '-infinity'::timestamp with time zone)))",
    "customers_email": "ON customers (lower(email)) WHERE email IS NOT NULL",
    "invoices_number": "ON invoices (number) WHERE number IS NOT NULL",
    "credit_notes_number": "ON credit_notes (number) WHERE number IS NOT NULL",
    "orders_customer_email_of_0014": "ON orders (lower(customer_email)) WHERE customer_email IS NOT NULL",
}
DROPPED = ("orders_customer_email",)
_BACK = """
DROP INDEX credit_notes_number;
DROP INDEX invoices_number;
DROP INDEX customers_email;
DROP INDEX orders_amount;
DROP INDEX orders_customer_email;
CREATE INDEX orders_customer_email ON orders (customer_email) WHERE customer_email IS NOT NULL;
"""


def upgrade() -> None:
    """Give the one that replaces another its name."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER INDEX orders_customer_email_of_0014 RENAME TO orders_customer_email")


def downgrade() -> None:
    """Drop them, and make the index of emails as it was."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
