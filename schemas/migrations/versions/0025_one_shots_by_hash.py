"""The index of changes that may happen only once has hashes in place of ids, and is less than half as large.

The ids of sessions are random, so each change has a place of its own in it, and with the ids themselves it was the
largest of the indexes that a fold writes to everywhere. The release before finds changes by their columns, for which
there is no index then. Where a million changes or more are kept, its workers are to be stopped before: each of their
batches ends by its time limit, and keeps the new ones from appending until then. Events stay pending, and none is lost.
See Note [A one-shot is found by a hash] in schemas/tables.py and Note [Large indexes are built ahead] in
schemas/migrate.py.
"""

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

_ONE_SHOTS = (
    "WHERE kind IN ('order.opened', 'order.processing', 'order.paid', 'order.completed', 'order.failed',"
    " 'order.expired', 'credit_note.issued', 'credit_note.voided', 'dispute.opened')"
)
_HASHES = (
    "(hashtextextended(subject_id, 0)),"
    " (hashtextextended(subject || ' ' || account || ' ' || subject_id, 1 + livemode::integer))"
)
# New entries come everywhere, so each page has room for some.
BUILT = {"changes_one_shot_of_0025": f"UNIQUE ON changes ({_HASHES}, kind) WITH (fillfactor = 70) {_ONE_SHOTS}"}
DROPPED = ("changes_one_shot",)


def upgrade() -> None:
    """Give the index that replaces the other its name."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER INDEX changes_one_shot_of_0025 RENAME TO changes_one_shot")


def downgrade() -> None:
    """Make all as it was."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("DROP INDEX changes_one_shot")
    op.execute(
        f"CREATE UNIQUE INDEX changes_one_shot ON changes (account, livemode, subject, subject_id, kind) {_ONE_SHOTS}"
    )
