"""Indexes for the filters of orders that had none, and for the disputes of a charge."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the indexes; orders are not folded while this runs."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(
        "CREATE INDEX orders_client_reference_id ON orders (client_reference_id) WHERE client_reference_id IS NOT NULL"
    )
    op.execute("CREATE INDEX orders_customer_email ON orders (customer_email) WHERE customer_email IS NOT NULL")
    op.execute("CREATE INDEX disputes_charge ON disputes (account, livemode, charge) WHERE charge IS NOT NULL")


def downgrade() -> None:
    """Drop them."""
    op.execute("DROP INDEX orders_client_reference_id, orders_customer_email, disputes_charge")
