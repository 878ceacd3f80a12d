"""Changes that are kept for the record and hidden from the feed."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column, and the index by which the feed is read; every change so far has been announced."""
    op.execute("ALTER TABLE changes ADD COLUMN withheld boolean NOT NULL DEFAULT false")
    op.execute("CREATE INDEX changes_told ON changes (seq) WHERE NOT withheld")


def downgrade() -> None:
    """Drop the column: withheld changes are then in the feed."""
    op.execute("ALTER TABLE changes DROP COLUMN withheld")
