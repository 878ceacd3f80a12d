"""What belongs to an order is found by keys, before a table has statistics and while it is small.

Note [Each object of an order is looked for by itself]
    One condition for several intents and charges makes PostgreSQL guess how many rows they find. Where it guesses too
    many, as in a table without statistics, it reads all of an account for each order, or the whole of a small table.
    So each object is looked for by itself, behind an OFFSET that keeps this at one look at an index. A row that is
    found by its intent is left out where it is found by its charge.

The rest is as in revision 0010: see Note [What was refunded of an order] there.
"""

from alembic import context, op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

# Replaced and not dropped, so that grants on the view stay.
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
        array_agg(DISTINCT way.payment_intent) FILTER (WHERE way.payment_intent IS NOT NULL) AS intents,
        array_agg(DISTINCT way.charge) FILTER (WHERE way.charge IS NOT NULL) AS charges
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
        FROM (
            SELECT t.* FROM unnest(ways.intents) AS i (id) CROSS JOIN LATERAL (
                SELECT t.id, t.payment_intent, t.currency, t.amount, t.amount_captured, t.amount_refunded, t.refunded,
                    t.captured, t.captured_at, t.released_at, t.status, t.event_id, t.as_of
                FROM charges AS t
                WHERE (t.account, t.livemode, t.payment_intent) = (o.account, o.livemode, i.id) OFFSET 0
            ) AS t
            UNION ALL
            SELECT t.* FROM unnest(ways.charges) AS i (id) CROSS JOIN LATERAL (
                SELECT t.id, t.payment_intent, t.currency, t.amount, t.amount_captured, t.amount_refunded, t.refunded,
                    t.captured, t.captured_at, t.released_at, t.status, t.event_id, t.as_of
                FROM charges AS t
                WHERE (t.account, t.livemode, t.id) = (o.account, o.livemode, i.id)
                    AND (t.payment_intent = ANY (ways.intents)) IS NOT TRUE OFFSET 0
            ) AS t
        ) AS c
        CROSS JOIN LATERAL (
            SELECT c.captured_at IS NOT NULL OR (c.status = 'succeeded' AND c.captured) IS TRUE AS is_captured
        ) AS s
    ), named AS (
        SELECT p.id FROM paid AS p UNION SELECT unnest(ways.charges)
    ), given AS (
        SELECT r.amount, r.currency, b.charge, least(r.created, r.as_of) AS created, r.failed_at,
            coalesce(r.status, '') NOT IN ('failed', 'canceled') AS counts
        FROM (
            SELECT t.* FROM unnest(ways.intents) AS i (id) CROSS JOIN LATERAL (
                SELECT t.amount, t.currency, t.charge, t.payment_intent, t.reason, t.status, t.created,
                    t.failed_at, t.as_of
                FROM refunds AS t
                WHERE (t.account, t.livemode, t.payment_intent) = (o.account, o.livemode, i.id) OFFSET 0
            ) AS t
            UNION ALL
            SELECT t.* FROM named AS i CROSS JOIN LATERAL (
                SELECT t.amount, t.currency, t.charge, t.payment_intent, t.reason, t.status, t.created,
                    t.failed_at, t.as_of
                FROM refunds AS t
                WHERE (t.account, t.livemode, t.charge) = (o.account, o.livemode, i.id)
                    AND (t.payment_intent = ANY (ways.intents)) IS NOT TRUE OFFSET 0
            ) AS t
        ) AS r
        CROSS JOIN LATERAL (
            SELECT coalesce(r.charge, (
                SELECT p.id FROM paid AS p
                WHERE p.payment_intent = r.payment_intent AND (p.is_captured OR p.is_released)
                ORDER BY p.is_captured DESC, p.id LIMIT 1
            )) AS charge
        ) AS b
        WHERE r.reason IS DISTINCT FROM 'expired_uncaptured_charge'
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
        FROM (
            SELECT t.* FROM unnest(ways.intents) AS i (id) CROSS JOIN LATERAL (
                SELECT t.amount, t.currency, t.status
                FROM disputes AS t
                WHERE (t.account, t.livemode, t.payment_intent) = (o.account, o.livemode, i.id) OFFSET 0
            ) AS t
            UNION ALL
            SELECT t.* FROM named AS i CROSS JOIN LATERAL (
                SELECT t.amount, t.currency, t.status
                FROM disputes AS t
                WHERE (t.account, t.livemode, t.charge) = (o.account, o.livemode, i.id)
                    AND (t.payment_intent = ANY (ways.intents)) IS NOT TRUE OFFSET 0
            ) AS t
        ) AS d
        -- An inquiry takes no money; of the others the money stayed with the shop, or came back.
        WHERE coalesce(d.status, '') NOT IN ('won', 'prevented')
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


def upgrade() -> None:
    """Replace the view."""
    op.execute(_BOOK)


def downgrade() -> None:
    """Make the view that revision 0010 made."""
    op.execute(context.script.get_revision("0010").module._BOOK)  # noqa: SLF001 - the view's text there
