"""The index of changes that may happen only once has hashes in place of ids, a third as many bytes for each.

The ids of sessions are random, so each change has a place of its own in it; now it fits into memory. It is built before
the other is dropped. The code of the release before finds changes by their columns: while its processes still run, they
fold slowly on a large table, or not in time, and then the events stay pending for the new ones. See Note [A one-shot is
found by a hash] in schemas/tables.py and Note [Large indexes are built ahead] in schemas/migrate.py.
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
BUILT = {
    "changes_one_shot_of_0025": "UNIQUE ON changes ((hashtextextended(subject_id, 0)), (hashtextextended("
    f"subject || ' ' || account || ' ' || subject_id, 1 + livemode::integer)), kind) {_ONE_SHOTS}",
}
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
