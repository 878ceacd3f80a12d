"""The index of events by their object has a hash in place of account, mode and id, and is a third as large.

The ids of sessions are random, so each of their events has a place of its own in it, and it was the largest of the
indexes that every recording writes to. The release before finds an object's events by their columns, for which there is
no index then: it records as ever, but where it folds an object again, or shows its events, it reads all events of the
account. Where a million or more are kept, its workers are to be stopped before: their batches end by their time limit.
Events stay pending, and none is lost. See Note [Events of an object are found by a hash] in schemas/tables.py and Note
[Large indexes are built ahead] in schemas/migrate.py.
"""

from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None

# New entries come everywhere, so each page has room for some.
BUILT = {
    "inbox_object_hash": "ON inbox (hashtextextended(object_id, 0)) WITH (fillfactor = 70) WHERE object_id IS NOT NULL"
}
DROPPED = ("inbox_object",)


def upgrade() -> None:
    """Do nothing: all of it is built and dropped ahead."""


def downgrade() -> None:
    """Make all as it was."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("DROP INDEX inbox_object_hash")
    op.execute("CREATE INDEX inbox_object ON inbox (account, livemode, object_id) WHERE object_id IS NOT NULL")
