"""Indexes by which events are listed, newest received first: all, of a type, of a rare source, and ignored ones.

While they are made, deliveries wait, and are answered 503 after some seconds, so that Stripe sends them again.
"""

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE INDEX inbox_type ON inbox (type, received_at, seq);
CREATE INDEX inbox_source ON inbox (source, received_at, seq) WHERE source <> 'webhook';
CREATE INDEX outcomes_ignored ON outcomes (seq) WHERE state = 'ignored';
CREATE INDEX inbox_received_of_0016 ON inbox (received_at, seq);
-- Last, since it keeps readers away until the end of the transaction.
DROP INDEX inbox_received;
ALTER INDEX inbox_received_of_0016 RENAME TO inbox_received;
"""
_BACK = """
DROP INDEX outcomes_ignored;
DROP INDEX inbox_received;
DROP INDEX inbox_source;
DROP INDEX inbox_type;
CREATE INDEX inbox_received ON inbox USING brin (received_at) WITH (autosummarize = on);
"""


def upgrade() -> None:
    """Make them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop them, and make the block range index as it was."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
