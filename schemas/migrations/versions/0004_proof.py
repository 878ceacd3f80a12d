"""The results of reconciliations."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE TABLE reconciliations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    outcome text NOT NULL,
    checks text[] NOT NULL,
    drift bigint NOT NULL,
    result jsonb NOT NULL,
    CONSTRAINT outcome_is_known CHECK (outcome IN ('ok', 'drift'))
);
"""


def upgrade() -> None:
    """Make the table."""
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop the table: the runs are forgotten, and nothing else depends on them."""
    op.execute("DROP TABLE reconciliations")
