"""Rules of the amounts of orders."""

from typing import Final

from worker.proof.rules.rule import Rule

_ORDER_TOTAL: Final = """
SELECT account, livemode, id,
    CASE WHEN total IS NULL OR before_tax IS NULL OR tax IS NULL THEN 'not provable'
        WHEN total IN (before_tax, before_tax + tax) THEN 'holds'
        WHEN total BETWEEN before_tax AND before_tax + tax THEN 'not provable'
        ELSE 'broken' END,
    currency, total, before_tax + tax,
    CASE WHEN total IS NULL OR before_tax IS NULL OR tax IS NULL THEN 'an amount of the session is not known'
        WHEN total BETWEEN before_tax AND before_tax + tax THEN 'how much of the tax is included is not known'
        ELSE 'the total is not subtotal - discount + shipping, nor that and the tax' END,
    coalesce(created, as_of)
FROM (
    SELECT *, amount_total AS total, amount_tax AS tax,
        amount_subtotal::numeric - amount_discount + amount_shipping AS before_tax
    FROM orders WHERE mode IS DISTINCT FROM 'setup'
) AS o
"""

_ORDER_LINES: Final = """
SELECT o.account, o.livemode, o.id,
    CASE WHEN NOT o.lines_complete OR l.unknown OR o.amount_total IS NULL OR o.amount_subtotal IS NULL
            OR o.amount_shipping IS NULL OR o.amount_tax IS NULL THEN 'not provable'
        WHEN l.others IS NOT NULL OR l.subtotal <> o.amount_subtotal THEN 'broken'
        WHEN l.total + o.amount_shipping IN (o.amount_total, o.amount_total - (o.amount_tax - l.tax)) THEN 'holds'
        ELSE 'broken' END,
    CASE WHEN l.others IS NULL THEN o.currency END,
    CASE WHEN l.others IS NOT NULL THEN NULL
        WHEN l.subtotal <> o.amount_subtotal THEN o.amount_subtotal ELSE o.amount_total END,
    CASE WHEN l.others IS NOT NULL THEN NULL
        WHEN l.subtotal <> o.amount_subtotal THEN l.subtotal ELSE l.total + o.amount_shipping END,
    CASE WHEN NOT o.lines_complete AND o.status = 'open' THEN 'lines of open sessions were not read'
        WHEN NOT o.lines_complete THEN 'not all lines are known'
        WHEN l.unknown OR o.amount_total IS NULL OR o.amount_subtotal IS NULL
            OR o.amount_shipping IS NULL OR o.amount_tax IS NULL THEN 'an amount is not known'
        WHEN l.others IS NOT NULL
            THEN 'a line is in another currency than its order: ' || l.others || ' and ' || upper(o.currency)
        WHEN l.subtotal <> o.amount_subtotal THEN 'the subtotal is not that of its lines'
        ELSE 'the total is not that of its lines and the shipping' END,
    coalesce(o.created, o.as_of)
FROM orders AS o
CROSS JOIN LATERAL (
    SELECT coalesce(sum(t.amount_subtotal), 0) AS subtotal, coalesce(sum(t.amount_total), 0) AS total,
        coalesce(sum(t.amount_tax), 0) AS tax,
        string_agg(DISTINCT upper(t.currency), ', ') FILTER (WHERE t.currency <> o.currency) AS others,
        coalesce(bool_or(t.amount_subtotal IS NULL OR t.amount_total IS NULL OR t.amount_tax IS NULL), false) AS unknown
    FROM order_lines AS t WHERE (t.account, t.livemode, t.order_id) = (o.account, o.livemode, o.id)
) AS l
WHERE o.mode IS DISTINCT FROM 'setup'
"""

# Before basil the charge of a converted price is in the buyer's currency, and is then compared with the presented
# amount. If less was captured than authorized, the rest was released, and the total is the authorized amount. A
# merchant may also raise the authorization, and capture more, so only a charge below the total proves an error.
#
# If no charge was captured, there are two proofs of an error. First, an order that its session left open can be paid
# only by a charge. Second, an intent has only one charge at a time that is pending or held. If such a charge is
# reported after the payment, no other charge had paid.
_PAID_ORDER: Final = """
SELECT o.account, o.livemode, o.id,
    CASE WHEN c.id IS NULL THEN CASE WHEN x.is_out OR x.is_its_ground THEN 'broken' ELSE 'not provable' END
        WHEN o.currency IS NULL OR c.currency IS NULL THEN 'not provable'
        WHEN NOT p.is_comparable THEN 'broken'
        WHEN p.total IS NULL OR c.amount IS NULL THEN 'not provable'
        WHEN p.total = c.amount AND c.amount >= p.captured THEN 'holds'
        WHEN p.total <= c.amount THEN 'not provable'
        ELSE 'broken' END,
    CASE WHEN p.is_comparable THEN c.currency END,
    CASE WHEN p.is_comparable THEN p.total ELSE o.amount_total END,
    CASE WHEN p.total = c.amount THEN p.captured ELSE c.amount END,
    CASE WHEN c.id IS NULL AND x.is_out THEN 'its charge was not captured when it was reported after the payment'
        WHEN c.id IS NULL AND x.is_its_ground THEN 'only a charge can have paid it, and none was captured'
        WHEN c.id IS NULL THEN 'its charge is not known'
        WHEN o.currency IS NULL OR c.currency IS NULL THEN 'a currency is not known'
        WHEN NOT p.is_comparable
            THEN 'order and charge are in two currencies: ' || upper(o.currency) || ' and ' || upper(c.currency)
        WHEN p.total IS NULL OR c.amount IS NULL THEN 'an amount is not known'
        WHEN p.total > c.amount THEN 'the total is not what was charged'
        WHEN p.total < p.captured THEN 'more may be captured than was authorized'
        ELSE 'an authorization may be raised above the total' END,
    coalesce(o.created, o.as_of)
FROM orders AS o
LEFT JOIN LATERAL (
    SELECT * FROM charges AS t
    WHERE (t.account, t.livemode, t.payment_intent) = (o.account, o.livemode, o.payment_intent)
        AND ((t.status = 'succeeded' AND t.captured IS NOT FALSE)
            OR (t.captured_at IS NOT NULL AND t.released_at IS NOT NULL))
    ORDER BY t.captured IS NULL, t.id LIMIT 1
) AS c ON true
CROSS JOIN LATERAL (
    SELECT coalesce(bool_or(t.as_of > o.paid_at AND t.released_at IS NULL
            AND (t.status = 'pending' OR (t.status = 'succeeded' AND t.captured IS FALSE))), false) AS is_out,
        count(*) > 0 AND coalesce(o.payment_status = 'unpaid', true) AS is_its_ground
    FROM charges AS t
    WHERE c.id IS NULL AND (t.account, t.livemode, t.payment_intent) = (o.account, o.livemode, o.payment_intent)
) AS x
CROSS JOIN LATERAL (
    SELECT coalesce(c.currency IN (o.currency, o.presentment_currency), false) AS is_comparable,
        CASE c.currency WHEN o.currency THEN o.amount_total WHEN o.presentment_currency THEN o.presentment_amount END
            AS total,
        coalesce(c.amount_captured, c.amount) AS captured
) AS p
WHERE o.status = 'paid' AND o.mode = 'payment' AND o.payment_intent IS NOT NULL
"""

RULES: Final = (
    Rule(
        "order-total",
        "An order's total is its subtotal, less the discount, plus shipping and tax",
        "Needs all five amounts. Tax that prices include is in the subtotal already, so the total may be either; where"
        " only a part of the tax is included, it lies between. Source: https://docs.stripe.com/api/checkout/sessions.",
        "orders",
        _ORDER_TOTAL,
    ),
    Rule(
        "order-lines",
        "An order's amounts are those of its lines, and the shipping",
        "Needs all lines. Compares the subtotal, and the total with or without the tax on shipping."
        " Source: https://docs.stripe.com/api/checkout/sessions/line_items.",
        "orders",
        _ORDER_LINES,
    ),
    Rule(
        "order-charged",
        "A paid order's total is what was charged",
        "Needs the charge that was captured for the order's payment intent. Compares its amount with the total in its"
        " currency: the order's, or what was presented to the buyer. Less may have been captured; more, or a raised"
        " authorization, is not provable (https://docs.stripe.com/payments/overcapture). Broken, too, where charges"
        " are known, none was captured, and the order is paid by nothing but a charge, or one is reported as pending or"
        " held after the payment."
        " Source: https://docs.stripe.com/api/charges/object.",
        "orders",
        _PAID_ORDER,
    ),
)
