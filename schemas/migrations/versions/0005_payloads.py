"""Payloads in a table of their own, in partitions, so that old ones can be archived at no cost.

The processes of the release before write ``inbox.payload`` and stop working here: deliveries are answered 503, which
Stripe sends again, and nothing is folded until this release's processes run.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_STATEMENTS = """
-- Not compressed: to compress a payload costs as much again as all the rest of recording it. A row stays in its page
-- where it fits there, which saves a visit to another table.
CREATE TABLE payloads (
    seq bigint NOT NULL,
    payload bytea NOT NULL,
    PRIMARY KEY (seq)
) PARTITION BY RANGE (seq);
ALTER TABLE payloads ALTER COLUMN payload SET STORAGE EXTERNAL;

-- What no other partition is for: a recorder never waits for one to be made.
CREATE TABLE payloads_rest PARTITION OF payloads DEFAULT WITH (toast_tuple_target = 8160);
CREATE TABLE payloads_from_0 PARTITION OF payloads FOR VALUES FROM (0) TO (1000000) WITH (toast_tuple_target = 8160);
CREATE TABLE payloads_from_1000000 PARTITION OF payloads FOR VALUES FROM (1000000) TO (2000000)
    WITH (toast_tuple_target = 8160);

INSERT INTO payloads (seq, payload) SELECT seq, payload FROM inbox ORDER BY seq;

DROP VIEW events;
ALTER TABLE inbox DROP COLUMN payload;

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
_BACK = """
DROP VIEW events;
ALTER TABLE inbox ADD COLUMN payload bytea;
UPDATE inbox AS i SET payload = b.payload FROM payloads AS b WHERE b.seq = i.seq;
DO $$ BEGIN
    IF EXISTS (SELECT FROM inbox WHERE payload IS NULL) THEN
        RAISE EXCEPTION 'payloads are archived, and the release before wants all of them';
    END IF;
END $$;
ALTER TABLE inbox ALTER COLUMN payload SET NOT NULL;
DROP TABLE payloads;

CREATE VIEW events AS
SELECT
    i.account, i.livemode, i.id, i.seq, i.type, i.api_version, i.created, i.object_type, i.object_id, i.payload,
    i.redacted, encode(i.payload_sha256, 'hex') AS payload_sha256, i.signature, i.source, i.received_at,
    CASE WHEN p.seq IS NULL THEN coalesce(o.state, 'pending') ELSE 'pending' END AS state,
    o.reason, coalesce(o.attempts, 0::smallint) AS attempts, o.folded_at, o.fold_version
FROM inbox AS i
LEFT JOIN pending AS p USING (seq)
LEFT JOIN outcomes AS o USING (seq);
"""


def upgrade() -> None:
    """Move the payloads; their old table keeps its size until it is vacuumed in full."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Move them back."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
