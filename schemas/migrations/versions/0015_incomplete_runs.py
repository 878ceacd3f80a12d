"""Reconciliations that found no difference, and could not look at all that they were asked for."""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_STATEMENTS = """
ALTER TABLE reconciliations DROP CONSTRAINT outcome_is_known,
    ADD CONSTRAINT outcome_is_known CHECK (outcome IN ('ok', 'drift', 'incomplete'));
"""
_BACK = """
DELETE FROM reconciliations WHERE outcome = 'incomplete';
ALTER TABLE reconciliations DROP CONSTRAINT outcome_is_known,
    ADD CONSTRAINT outcome_is_known CHECK (outcome IN ('ok', 'drift'));
"""


def upgrade() -> None:
    """Allow the outcome."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Forget these runs: the older schema could only call them ok."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
