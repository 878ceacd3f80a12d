"""The calls to make at Stripe, the progress of each job, and the indexes by which the clock finds work."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE TABLE stripe_calls (
    account text NOT NULL,
    livemode boolean NOT NULL,
    purpose text NOT NULL,
    object_id text NOT NULL,
    object_type text NOT NULL,
    lane smallint NOT NULL,
    asked_at timestamptz NOT NULL,
    due_at timestamptz NOT NULL,
    attempts smallint DEFAULT 0 NOT NULL,
    leased_until timestamptz,
    given_up text,
    CONSTRAINT purpose_is_known CHECK (purpose IN ('expire', 'session', 'ledger', 'credit_note', 'object', 'event')),
    PRIMARY KEY (account, livemode, purpose, object_id)
);
CREATE INDEX stripe_calls_due ON stripe_calls (lane, due_at) WHERE given_up IS NULL;

CREATE TABLE stripe_jobs (
    account text NOT NULL,
    livemode boolean NOT NULL,
    job text NOT NULL,
    reached_at timestamptz,
    reached_seq bigint,
    leased_until timestamptz,
    done_at timestamptz,
    stopped text,
    stopped_until timestamptz,
    found bigint DEFAULT 0 NOT NULL,
    CONSTRAINT job_is_known CHECK (job IN ('expire_sessions', 'poll_sessions', 'fetch', 'fill_gaps')),
    PRIMARY KEY (account, livemode, job)
);

CREATE INDEX orders_open ON orders (account, livemode, created) WHERE status = 'open';
CREATE INDEX inbox_thin ON inbox (received_at) WHERE type LIKE 'v_.%';
"""


def upgrade() -> None:
    """Make them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop them: calls that were still to be made are found again."""
    op.execute("DROP INDEX orders_open, inbox_thin")
    op.execute("DROP TABLE stripe_calls, stripe_jobs")
