"""Reconciliations that were asked for, and the differences that each found."""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE TABLE reconciliation_requests (
    id bigint PRIMARY KEY,
    state text NOT NULL,
    asked_at timestamptz NOT NULL,
    asked_by text NOT NULL,
    checks text[] NOT NULL,
    begun_at timestamptz,
    leased_until timestamptz,
    failed_at timestamptz,
    failure text,
    detail text,
    CONSTRAINT state_is_known CHECK (state IN ('waiting', 'running', 'failed', 'done'))
);
CREATE UNIQUE INDEX reconciliation_requests_open ON reconciliation_requests ((asked_by IS NOT NULL))
    WHERE state IN ('waiting', 'running');
ALTER TABLE reconciliations ADD COLUMN details text;
"""
_BACK = """
ALTER TABLE reconciliations DROP COLUMN details;
DROP TABLE reconciliation_requests;
"""


def upgrade() -> None:
    """Make the table and the column."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop them, with the requests and the differences."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
