"""The index by which the list of customers pages, newest first.

See Note [Large indexes are built ahead] in schemas/migrate.py.
"""

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

BUILT = {
    "customers_newest": "ON customers ((COALESCE(created, '-infinity'::timestamp with time zone)) DESC, id DESC)",
}


def upgrade() -> None:
    """Do nothing more: the index is built ahead."""


def downgrade() -> None:
    """Drop it."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("DROP INDEX customers_newest")
