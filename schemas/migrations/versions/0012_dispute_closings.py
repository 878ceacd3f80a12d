"""One closing of a dispute for each closing status, an index of orders' corrections, and a table of unsettled rows."""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

# The release before appends with ON CONFLICT DO NOTHING, which holds for any index. The statements that lock readers
# out come last, after those that read whole tables.
_STATEMENTS = """
-- In a transaction of its own, so that what is received meanwhile can be recorded.
UPDATE inbox SET verified = false WHERE signature IS NOT NULL AND source <> 'webhook';

CREATE TABLE unsettled (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    withheld text,
    CONSTRAINT withheld_is_known CHECK (withheld IN ('import', 'fold_version', 'rename', 'rendering', 'swap')),
    PRIMARY KEY (account, livemode, id)
);

CREATE UNIQUE INDEX changes_dispute_closed ON changes (account, livemode, subject_id, (after ->> 'status'))
    WHERE kind = 'dispute.closed';
CREATE INDEX changes_corrected ON changes (account, livemode, subject_id, seq) WHERE kind = 'order.corrected';
CREATE INDEX changes_balance ON changes (account, livemode, subject_id) WHERE kind = 'balance.changed';
CREATE UNIQUE INDEX changes_one_shot_of_0012 ON changes (account, livemode, subject, subject_id, kind)
    WHERE kind IN ('order.opened', 'order.processing', 'order.paid', 'order.completed', 'order.failed', 'order.expired',
    'credit_note.issued', 'credit_note.voided', 'dispute.opened');
DROP INDEX changes_one_shot;
ALTER INDEX changes_one_shot_of_0012 RENAME TO changes_one_shot;
"""
# Of several closings only the first is kept.
_BACK = """
DELETE FROM changes AS c USING changes AS first
WHERE c.kind = 'dispute.closed' AND first.kind = 'dispute.closed' AND first.seq < c.seq
    AND (first.account, first.livemode, first.subject, first.subject_id)
        = (c.account, c.livemode, c.subject, c.subject_id);
DROP INDEX changes_one_shot;
CREATE UNIQUE INDEX changes_one_shot ON changes (account, livemode, subject, subject_id, kind)
    WHERE kind IN ('order.opened', 'order.processing', 'order.paid', 'order.completed', 'order.failed', 'order.expired',
    'credit_note.issued', 'credit_note.voided', 'dispute.opened', 'dispute.closed');
DROP INDEX changes_balance;
DROP INDEX changes_corrected;
DROP INDEX changes_dispute_closed;
DROP TABLE unsettled;
"""


def upgrade() -> None:
    """Make the indexes."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Go back to one closing."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
