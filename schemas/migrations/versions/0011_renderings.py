"""Copies of an event that have another content than the one that is folded."""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE TABLE contents (
    seq bigint NOT NULL PRIMARY KEY,
    content_sha256 bytea NOT NULL
);

CREATE TABLE renderings (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    content_sha256 bytea,
    type text NOT NULL,
    api_version text,
    created timestamp with time zone NOT NULL,
    object_type text,
    object_id text,
    redacted text[] NOT NULL,
    payload_sha256 bytea NOT NULL,
    signature text,
    source text NOT NULL,
    received_at timestamp with time zone NOT NULL,
    verified boolean NOT NULL DEFAULT true,
    payload bytea,
    CONSTRAINT source_is_known CHECK (source IN ('webhook', 'replay', 'gap', 'observation')),
    PRIMARY KEY (account, livemode, id, payload_sha256)
);
CREATE INDEX renderings_fresh ON renderings (account, livemode, id) WHERE content_sha256 IS NULL;

ALTER TABLE pending ADD COLUMN copies boolean NOT NULL DEFAULT false;

-- What came by webhook was verified; of a signature that a log quotes the next migration takes it back.
ALTER TABLE inbox ADD COLUMN verified boolean NOT NULL DEFAULT true;
"""
_BACK = """
ALTER TABLE pending DROP COLUMN copies;
ALTER TABLE inbox DROP COLUMN verified;
DROP TABLE renderings, contents;
"""


def upgrade() -> None:
    """Add them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop them: of an event with several contents the chosen one stays."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
