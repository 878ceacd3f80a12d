"""Customers and balances, invoices, credit notes, refunds, charges, disputes, the portal; and the order book."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE TABLE mentions (
    account text NOT NULL,
    livemode boolean NOT NULL,
    object_id text NOT NULL,
    seq bigint NOT NULL,
    PRIMARY KEY (account, livemode, object_id, seq)
);

CREATE TABLE order_lines (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    order_id text,
    description text,
    price text,
    product text,
    quantity bigint,
    currency text,
    amount_subtotal bigint,
    amount_discount bigint,
    amount_tax bigint,
    amount_total bigint,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX order_lines_order_id ON order_lines (account, livemode, order_id) WHERE order_id IS NOT NULL;

CREATE TABLE customers (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    email text,
    name text,
    currency text,
    delinquent boolean,
    deleted boolean DEFAULT false NOT NULL,
    test_clock text,
    metadata jsonb,
    created timestamptz,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);

CREATE TABLE balances (
    account text NOT NULL,
    livemode boolean NOT NULL,
    customer text NOT NULL,
    currency text NOT NULL,
    amount bigint,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, customer, currency)
);

CREATE TABLE balance_changes (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    customer text NOT NULL,
    currency text NOT NULL,
    amount bigint NOT NULL,
    ending_balance bigint NOT NULL,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX balance_changes_customer ON balance_changes (account, livemode, customer)
    WHERE customer IS NOT NULL;

CREATE TABLE balance_transactions (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    customer text,
    currency text,
    type text,
    amount bigint,
    ending_balance bigint,
    invoice text,
    credit_note text,
    order_id text,
    description text,
    created timestamptz,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX balance_transactions_customer ON balance_transactions (account, livemode, customer)
    WHERE customer IS NOT NULL;

CREATE TABLE invoices (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    number text,
    status text,
    currency text,
    total bigint,
    amount_due bigint,
    amount_paid bigint,
    amount_remaining bigint,
    amount_overpaid bigint,
    starting_balance bigint,
    ending_balance bigint,
    pre_payment_credit_notes_amount bigint,
    post_payment_credit_notes_amount bigint,
    customer text,
    subscription text,
    created timestamptz,
    finalized_at timestamptz,
    paid_at timestamptz,
    voided_at timestamptz,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX invoices_customer ON invoices (account, livemode, customer) WHERE customer IS NOT NULL;
CREATE INDEX invoices_newest ON invoices ((COALESCE(created, '-infinity'::timestamp with time zone)) DESC, id DESC);

CREATE TABLE credit_notes (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    number text,
    status text,
    type text,
    reason text,
    currency text,
    amount bigint,
    pre_payment_amount bigint,
    post_payment_amount bigint,
    refunded_amount bigint,
    out_of_band_amount bigint,
    to_balance_amount bigint,
    customer text,
    invoice text,
    customer_balance_transaction text,
    memo text,
    created timestamptz,
    effective_at timestamptz,
    voided_at timestamptz,
    lines_complete boolean DEFAULT false NOT NULL,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX credit_notes_customer ON credit_notes (account, livemode, customer) WHERE customer IS NOT NULL;
CREATE INDEX credit_notes_invoice ON credit_notes (account, livemode, invoice) WHERE invoice IS NOT NULL;
CREATE INDEX credit_notes_newest
    ON credit_notes ((COALESCE(created, '-infinity'::timestamp with time zone)) DESC, id DESC);

CREATE TABLE credit_note_lines (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    credit_note text,
    type text,
    invoice_line_item text,
    description text,
    quantity bigint,
    amount bigint,
    discount_amount bigint,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX credit_note_lines_credit_note ON credit_note_lines (account, livemode, credit_note)
    WHERE credit_note IS NOT NULL;

CREATE TABLE invoice_payments (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    invoice text,
    payment_intent text,
    charge text,
    status text,
    currency text,
    amount_paid bigint,
    paid_at timestamptz,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX invoice_payments_charge ON invoice_payments (account, livemode, charge) WHERE charge IS NOT NULL;
CREATE INDEX invoice_payments_payment_intent ON invoice_payments (account, livemode, payment_intent)
    WHERE payment_intent IS NOT NULL;
CREATE INDEX invoice_payments_invoice ON invoice_payments (account, livemode, invoice)
    WHERE invoice IS NOT NULL;

CREATE TABLE refunds (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    status text,
    currency text,
    amount bigint,
    charge text,
    payment_intent text,
    reason text,
    failure_reason text,
    created timestamptz,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX refunds_charge ON refunds (account, livemode, charge) WHERE charge IS NOT NULL;
CREATE INDEX refunds_newest ON refunds ((COALESCE(created, '-infinity'::timestamp with time zone)) DESC, id DESC);
CREATE INDEX refunds_payment_intent ON refunds (account, livemode, payment_intent)
    WHERE payment_intent IS NOT NULL;

CREATE TABLE charges (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    payment_intent text,
    status text,
    currency text,
    amount bigint,
    amount_refunded bigint,
    refunded boolean,
    disputed boolean,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX charges_payment_intent ON charges (account, livemode, payment_intent)
    WHERE payment_intent IS NOT NULL;

CREATE TABLE disputes (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    charge text,
    payment_intent text,
    status text,
    reason text,
    currency text,
    amount bigint,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX disputes_payment_intent ON disputes (account, livemode, payment_intent)
    WHERE payment_intent IS NOT NULL;

CREATE TABLE portal_configurations (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    active boolean,
    is_default boolean,
    name text,
    features jsonb,
    login_page_url text,
    created timestamptz,
    updated timestamptz,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);

CREATE TABLE portal_sessions (
    account text NOT NULL,
    livemode boolean NOT NULL,
    id text NOT NULL,
    configuration text,
    customer text,
    flow_type text,
    return_url text,
    created timestamptz,
    expired_at timestamptz,
    event_id text NOT NULL,
    as_of timestamptz NOT NULL,
    PRIMARY KEY (account, livemode, id)
);
CREATE INDEX portal_sessions_open ON portal_sessions (created) WHERE expired_at IS NULL;
CREATE INDEX portal_sessions_newest
    ON portal_sessions ((COALESCE(created, '-infinity'::timestamp with time zone)) DESC, id DESC);

CREATE INDEX orders_payment_intent ON orders (account, livemode, payment_intent)
    WHERE payment_intent IS NOT NULL;
CREATE INDEX orders_invoice ON orders (account, livemode, invoice) WHERE invoice IS NOT NULL;

DROP INDEX changes_one_shot;
CREATE UNIQUE INDEX changes_one_shot ON changes (account, livemode, subject, subject_id, kind)
    WHERE kind IN (
        'order.opened', 'order.processing', 'order.paid', 'order.completed', 'order.failed', 'order.expired',
        'credit_note.issued', 'credit_note.voided', 'dispute.opened', 'dispute.closed'
    );

CREATE INDEX changes_refund ON changes (account, livemode, subject_id, seq) WHERE kind = 'order.refund_changed';

-- What became of an order's money. The way from an order to its payments is its payment intent or, where an invoice
-- stands between, the payments of that one invoice; where neither is known, neither is what was refunded.
CREATE VIEW order_book AS
SELECT
    o.*,
    money.refunded_amount,
    noted.credited_amount,
    money.disputed_amount,
    CASE
        WHEN money.refunded_amount IS NULL THEN NULL
        WHEN money.refunded_amount = 0 THEN 'none'
        WHEN money.refunded_amount >= o.amount_total THEN 'full'
        ELSE 'partial'
    END AS refund_status
FROM orders AS o
LEFT JOIN LATERAL (
    SELECT
        array_agg(payment_intent) FILTER (WHERE payment_intent IS NOT NULL) AS intents,
        array_agg(charge) FILTER (WHERE charge IS NOT NULL) AS charges
    FROM (
        SELECT o.payment_intent, NULL AS charge WHERE o.payment_intent IS NOT NULL
        UNION ALL
        SELECT p.payment_intent, p.charge FROM invoice_payments AS p
        WHERE o.payment_intent IS NULL AND (p.account, p.livemode, p.invoice) = (o.account, o.livemode, o.invoice)
    ) AS ways
) AS paid_by ON true
LEFT JOIN LATERAL (
    SELECT
        (
            SELECT coalesce(sum(r.amount), 0)::bigint FROM refunds AS r
            WHERE (r.account, r.livemode, r.currency) = (o.account, o.livemode, o.currency)
                AND (r.payment_intent = ANY (paid_by.intents) OR r.charge = ANY (known.charges))
                AND coalesce(r.status, '') NOT IN ('failed', 'canceled')
        ) AS refunded_amount,
        (
            SELECT coalesce(sum(d.amount), 0)::bigint FROM disputes AS d
            WHERE (d.account, d.livemode, d.currency) = (o.account, o.livemode, o.currency)
                AND (d.payment_intent = ANY (paid_by.intents) OR d.charge = ANY (known.charges))
                -- Of these the money stayed with the shop, or came back.
                AND coalesce(d.status, '') NOT IN ('won', 'prevented', 'warning_closed')
        ) AS disputed_amount
    FROM (
        SELECT paid_by.charges || ARRAY(
            SELECT c.id FROM charges AS c
            WHERE (c.account, c.livemode) = (o.account, o.livemode) AND c.payment_intent = ANY (paid_by.intents)
        ) AS charges
    ) AS known
    WHERE paid_by.intents IS NOT NULL OR paid_by.charges IS NOT NULL
) AS money ON true
LEFT JOIN LATERAL (
    SELECT coalesce(sum(n.amount), 0)::bigint AS credited_amount FROM credit_notes AS n
    WHERE (n.account, n.livemode, n.invoice) = (o.account, o.livemode, o.invoice)
        AND n.status IS DISTINCT FROM 'void'
    HAVING o.invoice IS NOT NULL
) AS noted ON true;
"""


def upgrade() -> None:
    """Make them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_STATEMENTS)


def downgrade() -> None:
    """Drop them, with all that they hold; the next release makes them again from the inbox."""
    op.execute("DROP VIEW order_book")
    op.execute("DROP INDEX orders_payment_intent, orders_invoice")
    op.execute(
        "DROP TABLE mentions, order_lines, customers, balances, balance_changes, balance_transactions, invoices,"
        " credit_notes, credit_note_lines, invoice_payments, refunds, charges, disputes, portal_configurations,"
        " portal_sessions"
    )
