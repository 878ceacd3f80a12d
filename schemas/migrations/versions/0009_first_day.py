"""Heartbeats, counts of deliveries, names of accounts, and why a change is not in the feed."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE TABLE heartbeats (
    kind text NOT NULL,
    name text NOT NULL,
    instance text NOT NULL,
    at timestamp with time zone NOT NULL,
    since timestamp with time zone NOT NULL,
    outcome text,
    CONSTRAINT kind_is_known CHECK (kind IN ('web', 'clock', 'fold', 'consumer', 'job')),
    PRIMARY KEY (kind, name, instance)
) WITH (fillfactor = 50);

CREATE TABLE delivery_counts (
    outcome text NOT NULL,
    reason text NOT NULL,
    count bigint NOT NULL,
    since timestamp with time zone NOT NULL,
    last_at timestamp with time zone NOT NULL,
    PRIMARY KEY (outcome, reason)
) WITH (fillfactor = 50);

CREATE TABLE account_names (
    old text NOT NULL PRIMARY KEY,
    new text NOT NULL,
    renamed_at timestamp with time zone NOT NULL,
    finished_at timestamp with time zone,
    CONSTRAINT names_differ CHECK (old <> new)
);

-- The reason takes the place of the flag. Web processes of the release before cannot read the feed until they are
-- replaced; what they and their workers write is right.
ALTER TABLE changes RENAME COLUMN withheld TO was_withheld;
ALTER TABLE changes ADD COLUMN withheld text;
UPDATE changes SET withheld = 'import' WHERE was_withheld;
DROP INDEX changes_told;
ALTER TABLE changes DROP COLUMN was_withheld;
ALTER TABLE changes ADD CONSTRAINT withheld_is_known
    CHECK (withheld IN ('import', 'fold_version', 'rename', 'rendering', 'swap'));
CREATE INDEX changes_shown ON changes (seq) WHERE withheld IS NULL;
CREATE INDEX changes_withheld ON changes (kind) WHERE withheld IS NOT NULL;

-- Last, since nothing is recorded from its beginning to the commit.
CREATE INDEX inbox_received ON inbox USING brin (received_at) WITH (autosummarize = on);
"""
_BACK = """
DROP INDEX changes_shown;
DROP INDEX changes_withheld;
ALTER TABLE changes DROP CONSTRAINT withheld_is_known;
ALTER TABLE changes RENAME COLUMN withheld TO withheld_because;
ALTER TABLE changes ADD COLUMN withheld boolean NOT NULL DEFAULT false;
UPDATE changes SET withheld = true WHERE withheld_because IS NOT NULL;
ALTER TABLE changes DROP COLUMN withheld_because;
CREATE INDEX changes_told ON changes (seq) WHERE NOT withheld;
DROP INDEX inbox_received;
DROP TABLE account_names, delivery_counts, heartbeats;
"""


def upgrade() -> None:
    """Add them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
