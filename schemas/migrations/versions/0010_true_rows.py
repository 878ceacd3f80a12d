"""The money of an order, from its charges, refunds, invoices and canceled payment intents.

Note [What was refunded of an order]
    Refunds are reported twice: by their own events, and by their charge, as a sum. Either report may be missing or
    older. The amount that a charge reports beyond its refunds that were known by then is *unseen*, and is added to the
    refunds. A refund counts as known by the earlier of its own time and that of the event that decides its row. A
    charge that we read ourselves is dated up to some seconds before the state that was seen. So it may report refunds
    of those seconds, too: nothing is unseen where these explain the amount, and otherwise the sum is not known.

    For a charge that was captured in part, reports show ``amount_refunded`` with or without the rest that was released.
    Where the known refunds explain it either way, nothing is unseen; otherwise the sum is not known. Without
    ``amount_captured`` or ``amount`` (old versions have no ``amount_captured``) it is not known whether a charge was
    captured whole. Such a charge is read as one captured in part of which the rest is not known: only an
    ``amount_refunded`` of 0, or one that is exactly the known refunds, leaves nothing unseen. The same holds where
    neither ``captured`` nor ``status`` shows whether there was a capture at all.

    A hold that was released gave nothing back, since no money had come: neither its ``amount_refunded`` nor a refund
    that releases it counts, for any reason of that refund. A charge that is merely not captured yet may have been
    captured since, so that refunds of it do count.

    A sum is null where a part of it is in another currency than the order's, or has a currency while the order's is not
    known. For an order without a currency even a refunded amount of 0 is not known. The status compares the refunds of
    each charge with its captured amount, in the charge's own currency, and without a charge the refunds with the
    order's total. A captured charge without ``amount_captured`` that reports to be ``refunded`` was refunded whole,
    even where the sum is not known, unless one of its refunds failed after that report.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE INDEX orders_undecided ON orders (account, livemode, payment_intent)
    WHERE session_status = 'complete' AND payment_intent IS NOT NULL
        AND (payment_status IS NULL OR payment_status = 'unpaid');

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

ALTER TABLE refunds ADD COLUMN failed_at timestamp with time zone;

ALTER TABLE invoices ADD COLUMN deleted boolean DEFAULT false NOT NULL;
"""
# Replaced and not dropped, so that grants on the view stay. See Note [What was refunded of an order].
_BOOK = """
CREATE OR REPLACE VIEW order_book AS
SELECT
    o.*,
    money.refunded_amount,
    noted.credited_amount,
    money.disputed_amount,
    money.refund_status
FROM orders AS o
CROSS JOIN LATERAL (
    SELECT
        array_agg(way.payment_intent) FILTER (WHERE way.payment_intent IS NOT NULL) AS intents,
        array_agg(way.charge) FILTER (WHERE way.charge IS NOT NULL) AS charges
    FROM (
        SELECT o.payment_intent, NULL AS charge WHERE o.payment_intent IS NOT NULL
        UNION ALL
        SELECT p.payment_intent, p.charge FROM invoice_payments AS p
        WHERE o.payment_intent IS NULL AND (p.account, p.livemode, p.invoice) = (o.account, o.livemode, o.invoice)
        UNION ALL
        SELECT c.payment_intent, NULL FROM invoice_payments AS p
        CROSS JOIN LATERAL (
            SELECT t.payment_intent FROM charges AS t
            WHERE (t.account, t.livemode, t.id) = (p.account, p.livemode, p.charge) OFFSET 0
        ) AS c
        WHERE o.payment_intent IS NULL AND (p.account, p.livemode, p.invoice) = (o.account, o.livemode, o.invoice)
        UNION ALL
        SELECT c.payment_intent, c.id FROM charges AS c
        WHERE o.payment_intent IS NULL AND (c.account, c.livemode, c.invoice) = (o.account, o.livemode, o.invoice)
    ) AS way
) AS ways
LEFT JOIN LATERAL (
    WITH paid AS (
        SELECT c.id, c.payment_intent, c.currency, c.amount, c.amount_captured, c.amount_refunded, c.refunded,
            c.as_of, starts_with(c.event_id, 'obs_') AS is_read,
            s.is_captured, s.is_captured AND c.amount_captured >= c.amount AS is_whole,
            NOT s.is_captured AND c.released_at IS NOT NULL AS is_released,
            s.is_captured
                OR (c.captured IS NOT FALSE AND coalesce(c.status, '') NOT IN ('pending', 'failed')) AS may_give
        FROM charges AS c
        CROSS JOIN LATERAL (
            SELECT c.captured_at IS NOT NULL OR (c.status = 'succeeded' AND c.captured) IS TRUE AS is_captured
        ) AS s
        WHERE (c.account, c.livemode) = (o.account, o.livemode)
            AND (c.payment_intent = ANY (ways.intents) OR c.id = ANY (ways.charges))
    ), given AS (
        SELECT r.amount, r.currency, b.charge, least(r.created, r.as_of) AS created, r.failed_at,
            coalesce(r.status, '') NOT IN ('failed', 'canceled') AS counts
        FROM refunds AS r
        CROSS JOIN LATERAL (
            SELECT coalesce(r.charge, (
                SELECT p.id FROM paid AS p
                WHERE p.payment_intent = r.payment_intent AND (p.is_captured OR p.is_released)
                ORDER BY p.is_captured DESC, p.id LIMIT 1
            )) AS charge
        ) AS b
        WHERE (r.account, r.livemode) = (o.account, o.livemode)
            AND (r.payment_intent = ANY (ways.intents)
                OR r.charge = ANY (ways.charges || ARRAY(SELECT p.id FROM paid AS p)))
            AND r.reason IS DISTINCT FROM 'expired_uncaptured_charge'
            AND NOT EXISTS (SELECT FROM paid AS p WHERE p.id = b.charge AND p.is_released)
    ), each_charge AS (
        SELECT p.currency, coalesce(p.amount_captured, p.amount) AS taken, u.unseen,
            CASE WHEN NOT t.is_mixed THEN u.unseen + t.counted END AS back,
            (p.refunded AND p.is_captured AND p.amount_captured IS NULL AND p.amount_refunded IS DISTINCT FROM 0)
                IS TRUE AND NOT t.is_lessened AS is_gone
        FROM paid AS p
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(g.amount) FILTER (WHERE g.counts), 0) AS counted,
                coalesce(sum(g.amount) FILTER (WHERE k.is_known), 0) AS known,
                coalesce(bool_or(k.is_other) FILTER (WHERE g.counts), false) AS is_mixed,
                coalesce(bool_or(k.is_other) FILTER (WHERE k.is_known), false) AS is_known_mixed,
                coalesce(bool_or(k.is_known AND NOT g.counts), false) AS is_lessened
            FROM given AS g
            CROSS JOIN LATERAL (
                SELECT g.created <= p.as_of AND (g.failed_at IS NULL OR g.failed_at > p.as_of) AS is_known,
                    g.amount IS NULL OR (g.amount <> 0 AND g.currency IS DISTINCT FROM p.currency) AS is_other
            ) AS k
            WHERE g.charge = p.id
        ) AS t
        CROSS JOIN LATERAL (
            SELECT count(*) > 0 AS is_any, coalesce(bool_or(t.known + late.amount
                IN (p.amount_refunded, p.amount_refunded - (p.amount::numeric - p.amount_captured))), false) AS is_seen
            FROM (
                SELECT sum(g.amount) OVER (ORDER BY g.created) AS amount FROM given AS g
                WHERE p.is_read AND g.charge = p.id AND g.currency = p.currency
                    AND g.created > p.as_of AND g.created <= p.as_of + interval '5 s'
            ) AS late
        ) AS l
        CROSS JOIN LATERAL (
            SELECT CASE
                WHEN p.amount_refunded = 0 THEN 0
                WHEN p.amount_refunded IS NULL OR t.is_known_mixed THEN NULL
                WHEN l.is_seen THEN 0
                WHEN t.known IN (p.amount_refunded, p.amount_refunded - (p.amount::numeric - p.amount_captured)) THEN 0
                WHEN p.is_whole AND NOT (l.is_any AND p.amount_refunded > t.known)
                    THEN greatest(0, p.amount_refunded - t.known)
            END AS unseen
        ) AS u
        WHERE p.may_give
    ), charged AS (
        SELECT count(*) > 0 AS is_any, bool_and(e.currency = o.currency) AS is_one_currency, sum(e.taken) AS taken,
            bool_and(e.back = 0 AND NOT e.is_gone) AS is_none,
            bool_and(e.is_gone OR (e.back <> 0 AND e.back >= e.taken)) AS is_full,
            bool_or(NOT e.is_gone AND (e.back IS NULL OR (e.back <> 0 AND e.taken IS NULL))) AS is_unknown
        FROM each_charge AS e
    ), refunded AS (
        SELECT CASE WHEN NOT coalesce(bool_or(
                x.amount IS NULL OR (x.amount <> 0 AND x.currency IS DISTINCT FROM o.currency)
            ), false) AND o.currency IS NOT NULL THEN coalesce(sum(x.amount), 0) END AS amount,
            coalesce(bool_or(x.is_loose AND x.amount IS DISTINCT FROM 0), false) AS is_loose
        FROM (
            SELECT e.unseen AS amount, e.currency, false AS is_loose FROM each_charge AS e
            UNION ALL
            SELECT g.amount, g.currency, NOT EXISTS (SELECT FROM paid AS p WHERE p.may_give AND p.id = g.charge)
            FROM given AS g WHERE g.counts
        ) AS x
    ), disputed AS (
        SELECT CASE WHEN NOT coalesce(bool_or(
            d.amount IS NULL OR (d.amount <> 0 AND (d.currency = o.currency) IS NOT TRUE)
        ), false) THEN coalesce(sum(d.amount), 0) END AS amount
        FROM disputes AS d
        WHERE (d.account, d.livemode) = (o.account, o.livemode)
            AND (d.payment_intent = ANY (ways.intents)
                OR d.charge = ANY (ways.charges || ARRAY(SELECT p.id FROM paid AS p)))
            -- An inquiry takes no money; of the others the money stayed with the shop, or came back.
            AND coalesce(d.status, '') NOT IN ('won', 'prevented')
            AND NOT starts_with(coalesce(d.status, ''), 'warning_')
    )
    SELECT
        CASE WHEN abs(r.amount) <= 9223372036854775807 THEN r.amount::bigint END AS refunded_amount,
        CASE WHEN abs(d.amount) <= 9223372036854775807 THEN d.amount::bigint END AS disputed_amount,
        CASE
            WHEN r.is_loose OR NOT c.is_any THEN CASE
                WHEN r.amount = 0 THEN 'none'
                WHEN r.amount >= m.taken THEN 'full'
                WHEN r.amount < m.taken THEN 'partial'
            END
            WHEN c.is_unknown THEN NULL
            WHEN c.is_none THEN 'none'
            WHEN c.is_full THEN 'full'
            ELSE 'partial'
        END AS refund_status
    FROM refunded AS r CROSS JOIN charged AS c CROSS JOIN disputed AS d
    CROSS JOIN LATERAL (
        SELECT CASE WHEN NOT c.is_any THEN o.amount_total WHEN c.is_one_currency THEN c.taken END AS taken
    ) AS m
    WHERE ways.intents IS NOT NULL OR ways.charges IS NOT NULL
) AS money ON true
LEFT JOIN LATERAL (
    SELECT CASE WHEN NOT coalesce(bool_or(
        n.amount IS NULL OR (n.amount <> 0 AND (n.currency = o.currency) IS NOT TRUE)
    ), false) AND abs(coalesce(sum(n.amount), 0)) <= 9223372036854775807
        THEN coalesce(sum(n.amount), 0)::bigint END AS credited_amount
    FROM credit_notes AS n
    WHERE (n.account, n.livemode, n.invoice) = (o.account, o.livemode, o.invoice)
        AND n.status IS DISTINCT FROM 'void'
    HAVING o.invoice IS NOT NULL
) AS noted ON true;
"""
# As revision 0002 made it.
_BOOK_BEFORE = """
CREATE OR REPLACE VIEW order_book AS
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
    op.execute(_BOOK)


def downgrade() -> None:
    """Drop them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BOOK_BEFORE)
    op.execute(_BACK)
