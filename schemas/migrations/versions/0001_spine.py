"""The inbox, orders, payment links, changes and anomalies."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE TABLE inbox (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    seq bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    type text NOT NULL,
    api_version text,
    created timestamptz NOT NULL,
    object_type text,
    object_id text,
    payload bytea NOT NULL,
    redacted text[] NOT NULL,
    payload_sha256 bytea NOT NULL,
    signature text,
    source text NOT NULL CONSTRAINT source_is_known CHECK (source IN ('webhook', 'replay', 'gap', 'observation')),
    received_at timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX inbox_object ON inbox (account, livemode, object_id) WHERE object_id IS NOT NULL;
CREATE INDEX inbox_set_aside ON inbox (account, livemode, object_id) WHERE type = 'payfold.event.ignored';

-- A queue: its rows live for milliseconds, so what they leave behind is cleaned by count and not by share.
CREATE TABLE pending (
    seq bigint PRIMARY KEY,
    again boolean NOT NULL DEFAULT false
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

CREATE TABLE outcomes (
    seq bigint PRIMARY KEY,
    state text NOT NULL CONSTRAINT state_is_known CHECK (state IN ('folded', 'ignored', 'parked')),
    reason text,
    attempts smallint NOT NULL,
    folded_at timestamptz NOT NULL,
    fold_version integer NOT NULL
);
CREATE INDEX outcomes_fold_version ON outcomes (fold_version, seq);
CREATE INDEX outcomes_parked ON outcomes (seq) WHERE state = 'parked';

CREATE TABLE orders (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    status text CONSTRAINT status_is_known
        CHECK (status IN ('open', 'processing', 'paid', 'failed', 'expired', 'complete')),
    session_status text,
    payment_status text,
    mode text,
    currency text,
    amount_subtotal bigint,
    amount_discount bigint,
    amount_shipping bigint,
    amount_tax bigint,
    amount_total bigint,
    presentment_currency text,
    presentment_amount bigint,
    customer text,
    customer_email text,
    client_reference_id text,
    payment_link text,
    payment_intent text,
    subscription text,
    invoice text,
    recovered_from text,
    recovery_url text,
    shipping jsonb,
    metadata jsonb,
    created timestamptz,
    expires_at timestamptz,
    completed_at timestamptz,
    paid_at timestamptz,
    failed_at timestamptz,
    expired_at timestamptz,
    lines_complete boolean NOT NULL DEFAULT false,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX orders_newest ON orders ((coalesce(created, '-infinity'::timestamptz)) DESC, id DESC);
CREATE INDEX orders_payment_link ON orders (account, livemode, payment_link) WHERE payment_link IS NOT NULL;
CREATE INDEX orders_customer ON orders (account, livemode, customer) WHERE customer IS NOT NULL;

CREATE TABLE payment_links (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    active boolean,
    url text,
    currency text,
    metadata jsonb,
    created timestamptz,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);

CREATE TABLE changes (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account text NOT NULL,
    livemode boolean NOT NULL,
    subject text NOT NULL,
    subject_id text NOT NULL,
    kind text NOT NULL,
    event_id text NOT NULL,
    source text NOT NULL CONSTRAINT source_is_known CHECK (source IN ('webhook', 'replay', 'gap', 'observation')),
    at timestamptz NOT NULL,
    before jsonb,
    after jsonb
);
CREATE UNIQUE INDEX changes_one_shot ON changes (account, livemode, subject, subject_id, kind)
    WHERE kind IN (
        'order.opened', 'order.processing', 'order.paid', 'order.completed', 'order.failed', 'order.expired'
    );

CREATE TABLE anomalies (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    kind text NOT NULL,
    subject text NOT NULL,
    subject_id text NOT NULL,
    detail jsonb NOT NULL,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    seen_at timestamptz NOT NULL,
    resolved_at timestamptz,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX anomalies_in_force ON anomalies (account, livemode, subject_id) WHERE resolved_at IS NULL;

CREATE VIEW events AS
SELECT
    i.account, i.livemode, i.id, i.seq, i.type, i.api_version, i.created, i.object_type, i.object_id, i.payload,
    i.redacted, encode(i.payload_sha256, 'hex') AS payload_sha256, i.signature, i.source, i.received_at,
    CASE WHEN p.seq IS NULL THEN coalesce(o.state, 'pending') ELSE 'pending' END AS state,
    o.reason, coalesce(o.attempts, 0::smallint) AS attempts, o.folded_at, o.fold_version
FROM inbox AS i
LEFT JOIN pending AS p USING (seq)
LEFT JOIN outcomes AS o USING (seq);

CREATE VIEW payment_link_funnel AS
SELECT
    account, livemode, payment_link, currency,
    count(*) AS opened,
    count(completed_at) AS completed,
    count(*) FILTER (WHERE status = 'paid') AS paid,
    count(*) FILTER (WHERE status = 'expired') AS expired,
    coalesce(sum(amount_total) FILTER (WHERE status = 'paid'), 0)::bigint AS amount_paid
FROM orders
WHERE payment_link IS NOT NULL
GROUP BY account, livemode, payment_link, currency;
"""


def upgrade() -> None:
    """Make them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop them, with all that they hold."""
    op.execute("DROP VIEW payment_link_funnel, events")
    op.execute("DROP TABLE anomalies, changes, payment_links, orders, outcomes, pending, inbox")
