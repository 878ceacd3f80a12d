"""Indexes by which events are listed, newest received first: all, of a type, of a rare source, and ignored ones.

See Note [Large indexes are built ahead] in schemas/migrate.py.
"""

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

BUILT = {
    "inbox_type": "ON inbox (type, received_at, seq)",
    "inbox_source": "ON inbox (source, received_at, seq) WHERE source <> 'webhook'",
    "outcomes_ignored": "ON outcomes (seq) WHERE state = 'ignored'",
    "inbox_received_of_0016": "ON inbox (received_at, seq)",
}
DROPPED = ("inbox_received",)
_BACK = """
DROP INDEX outcomes_ignored;
DROP INDEX inbox_received;
DROP INDEX inbox_source;
DROP INDEX inbox_type;
CREATE INDEX inbox_received ON inbox USING brin (received_at) WITH (autosummarize = on);
"""


def upgrade() -> None:
    """Give the one that replaces another its name."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER INDEX inbox_received_of_0016 RENAME TO inbox_received")


def downgrade() -> None:
    """Drop them, and make the block range index as it was."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
