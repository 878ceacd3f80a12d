"""The index by which the list of orders of one status pages, newest first.

Without it, orders of a rare status, or of a usual one behind many of another, were found by reading all that are newer.
See Note [Large indexes are built ahead] in schemas/migrate.py.
"""

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

BUILT = {
    "orders_status": "ON orders (status, (COALESCE(created, '-infinity'::timestamp with time zone)) DESC, id DESC)",
}


def upgrade() -> None:
    """Do nothing more: the index is built ahead."""


def downgrade() -> None:
    """Drop it."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("DROP INDEX orders_status")
