"""What charges, refunds, invoices and canceled payment intents say of the money of an order."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE TABLE payment_intents (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    status text,
    canceled_at timestamp with time zone,
    event_id text NOT NULL,
    as_of timestamp with time zone NOT NULL,
    PRIMARY KEY (account, livemode, id)
);

ALTER TABLE charges
    ADD COLUMN invoice text,
    ADD COLUMN captured boolean,
    ADD COLUMN amount_captured bigint,
    ADD COLUMN captured_at timestamp with time zone,
    ADD COLUMN released_at timestamp with time zone;
CREATE INDEX charges_invoice ON charges (account, livemode, invoice) WHERE invoice IS NOT NULL;

CREATE INDEX orders_undecided ON orders (account, livemode, payment_intent)
    WHERE session_status = 'complete' AND payment_intent IS NOT NULL
        AND (payment_status IS NULL OR payment_status = 'unpaid');

ALTER TABLE refunds ADD COLUMN failed_at timestamp with time zone;

ALTER TABLE invoices ADD COLUMN deleted boolean DEFAULT false NOT NULL;
"""
_BACK = """
DROP INDEX orders_undecided;
DROP TABLE payment_intents;
ALTER TABLE charges
    DROP COLUMN invoice, DROP COLUMN captured, DROP COLUMN amount_captured, DROP COLUMN captured_at,
    DROP COLUMN released_at;
ALTER TABLE refunds DROP COLUMN failed_at;
ALTER TABLE invoices DROP COLUMN deleted;
"""


def upgrade() -> None:
    """Add them; the rows get them as their events are folded again."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
