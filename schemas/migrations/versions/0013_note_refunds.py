"""The refund that a credit note of an old API version names, by which the note is found when the refund is known."""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

# Notes that were folded before have no such refund: the new fold version fills the column.
_STATEMENTS = """
ALTER TABLE credit_notes ADD COLUMN refund text;
CREATE INDEX credit_notes_refund ON credit_notes (account, livemode, refund) WHERE refund IS NOT NULL;
"""
_BACK = """
ALTER TABLE credit_notes DROP COLUMN refund;
"""


def upgrade() -> None:
    """Add it."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop the column: the amounts that were folded by it stay."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
