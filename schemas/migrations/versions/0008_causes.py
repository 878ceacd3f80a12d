"""Causes of outcomes, further tries of pending events, failures of jobs, and the objects of anomalies."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_STATEMENTS = """
ALTER TABLE outcomes ADD COLUMN cause text;
ALTER TABLE pending
    ADD COLUMN attempts smallint NOT NULL DEFAULT 0,
    ADD COLUMN due_at timestamp with time zone,
    ADD COLUMN cause text,
    ADD COLUMN reason text;
ALTER TABLE stripe_jobs
    ADD COLUMN failed_at timestamp with time zone,
    ADD COLUMN failure text;
ALTER TABLE anomalies ADD COLUMN object_id text;
UPDATE anomalies SET object_id = CASE WHEN subject = 'balance' THEN split_part(subject_id, ' ', 1) ELSE subject_id END;

ALTER TABLE outcomes ADD CONSTRAINT cause_is_known CHECK (
    cause IN (
        'fold_failed', 'object_unexpected', 'payload_archived', 'payload_unreadable', 'row_refused', 'set_aside',
        'thin_event', 'type_unwanted', 'database_refused', 'database_busy', 'machine_short'
    )
);
ALTER TABLE pending ADD CONSTRAINT cause_is_known CHECK (
    cause IN (
        'fold_failed', 'object_unexpected', 'payload_archived', 'payload_unreadable', 'row_refused', 'set_aside',
        'thin_event', 'type_unwanted', 'database_refused', 'database_busy', 'machine_short'
    )
);

-- The code of what was parked under a release that kept only the text. What was ignored may be millions of rows, and
-- nothing asks for its code.
UPDATE outcomes SET cause = CASE
    WHEN reason ~ '^The payload of .* is archived|^its payload is archived' THEN 'payload_archived'
    WHEN reason LIKE 'its object is %' THEN 'object_unexpected'
    WHEN reason LIKE 'PostgreSQL refused its row%' THEN 'row_refused'
    WHEN reason LIKE 'the fold failed%' OR reason LIKE 'the join failed%' THEN 'fold_failed'
    ELSE 'payload_unreadable'
END
WHERE state = 'parked';
CREATE OR REPLACE VIEW events AS
SELECT
    i.account, i.livemode, i.id, i.seq, i.type, i.api_version, i.created, i.object_type, i.object_id, b.payload,
    i.redacted, encode(i.payload_sha256, 'hex') AS payload_sha256, i.signature, i.source, i.received_at,
    CASE WHEN p.seq IS NULL THEN coalesce(o.state, 'pending') ELSE 'pending' END AS state,
    coalesce(p.reason, o.reason) AS reason,
    (coalesce(o.attempts, 0) + coalesce(p.attempts, 0))::smallint AS attempts, o.folded_at, o.fold_version,
    coalesce(p.cause, o.cause) AS cause, p.due_at
FROM inbox AS i
LEFT JOIN payloads AS b USING (seq)
LEFT JOIN pending AS p USING (seq)
LEFT JOIN outcomes AS o USING (seq);
"""
_BACK = """
DROP VIEW events;
ALTER TABLE outcomes DROP COLUMN cause;
ALTER TABLE pending DROP COLUMN attempts, DROP COLUMN due_at, DROP COLUMN cause, DROP COLUMN reason;
ALTER TABLE stripe_jobs DROP COLUMN failed_at, DROP COLUMN failure;
ALTER TABLE anomalies DROP COLUMN object_id;

CREATE VIEW events AS
SELECT
    i.account, i.livemode, i.id, i.seq, i.type, i.api_version, i.created, i.object_type, i.object_id, b.payload,
    i.redacted, encode(i.payload_sha256, 'hex') AS payload_sha256, i.signature, i.source, i.received_at,
    CASE WHEN p.seq IS NULL THEN coalesce(o.state, 'pending') ELSE 'pending' END AS state,
    o.reason, coalesce(o.attempts, 0::smallint) AS attempts, o.folded_at, o.fold_version
FROM inbox AS i
LEFT JOIN payloads AS b USING (seq)
LEFT JOIN pending AS p USING (seq)
LEFT JOIN outcomes AS o USING (seq);
"""


def upgrade() -> None:
    """Add them; outcomes of an older release have no cause, which is read as unknown."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
