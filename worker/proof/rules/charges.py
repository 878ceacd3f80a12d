"""Rules of the refunds of charges."""

from typing import Final

from worker.folds import payment
from worker.proof.rules.rule import Rule

# A charge may report its capture before the last step of the capture, so refunds above the captured amount prove
# nothing. Releasing a hold is no refund. A refund that fails may be replaced by another before the event of the failure
# arrives. So the sum of several refunds is too much only if the charge itself reports as much. A single refund can be
# too much by itself. Both need a charge that was captured.
_REFUNDS_WITHIN: Final = f"""
SELECT r.account, r.livemode, r.charge,
    CASE WHEN c.amount IS NULL OR c.currency IS NULL OR r.unknown THEN 'not provable'
        WHEN r.others > 0 THEN 'broken'
        WHEN r.amount > c.most AND c.is_captured AND (r.largest > c.most OR c.amount_refunded > c.most) THEN 'broken'
        WHEN r.amount > c.captured_amount THEN 'not provable'
        ELSE 'holds' END,
    CASE WHEN r.others = 0 THEN c.currency END, CASE WHEN r.others = 0 THEN r.amount END, c.captured_amount,
    CASE WHEN c.amount IS NULL OR c.currency IS NULL THEN 'its charge is not known'
        WHEN r.unknown THEN 'an amount is not known'
        WHEN r.others > 0
            THEN 'a refund is in another currency than its charge: ' || r.currencies || ' and ' || upper(c.currency)
        WHEN r.amount <= c.most THEN 'more was refunded than its charge reports as captured'
        WHEN NOT c.is_captured THEN 'that it was captured is not known'
        WHEN r.largest > c.most OR c.amount_refunded > c.most THEN 'more was refunded than was charged'
        ELSE 'a refund may have failed before the next was made' END,
    r.at
FROM (
    SELECT t.account, t.livemode, t.charge, sum(t.amount) AS amount, max(t.amount) AS largest,
        max(coalesce(t.created, t.as_of)) AS at,
        count(*) FILTER (WHERE t.currency <> p.currency) AS others,
        string_agg(DISTINCT upper(t.currency), ', ') FILTER (WHERE t.currency <> p.currency) AS currencies,
        bool_or(t.amount IS NULL OR t.currency IS NULL) AS unknown
    FROM refunds AS t LEFT JOIN charges AS p ON (p.account, p.livemode, p.id) = (t.account, t.livemode, t.charge)
    WHERE t.charge IS NOT NULL AND coalesce(t.status, '') NOT IN ('failed', 'canceled')
        AND t.reason IS DISTINCT FROM '{payment.RELEASED}'
    GROUP BY t.account, t.livemode, t.charge
) AS r
LEFT JOIN (
    SELECT *, greatest(amount, amount_captured) AS most, captured IS TRUE AS is_captured,
        CASE WHEN captured THEN coalesce(amount_captured, amount) ELSE amount END AS captured_amount
    FROM charges
) AS c ON (c.account, c.livemode, c.id) = (r.account, r.livemode, r.charge)
"""

# Rule 10 of the design: a charge reports the sum of its refunds that were made until then, without those that had
# failed. If it reports more, some refunds are not known. If it reports less, only refunds that still stood afterwards
# can prove an error. The report may leave such refunds out because they required an action until then, or because they
# came after it in the same second. That is no explanation if each of them is more than the reported amount, and the
# charge has no room for them in addition to that amount. A charge that was read from Stripe may report refunds of the
# seconds that reading took.
_CHARGE_REFUNDS: Final = f"""
WITH taken AS (
    SELECT account, livemode, id, payment_intent, currency, as_of, captured_at, amount_refunded,
        starts_with(event_id, 'obs_') AS is_read,
        captured_at IS NOT NULL OR (status = 'succeeded' AND captured) IS TRUE AS is_captured,
        released_at IS NOT NULL OR captured IS FALSE AS is_held,
        CASE WHEN amount_captured < amount THEN amount::numeric - amount_captured END AS not_captured,
        greatest(amount, amount_captured) AS most
    FROM charges
), of_intents AS (
    SELECT DISTINCT ON (account, livemode, payment_intent) account, livemode, payment_intent, id FROM taken
    WHERE is_captured AND payment_intent IS NOT NULL ORDER BY account, livemode, payment_intent, id
), given AS (
    SELECT r.account, r.livemode, coalesce(r.charge, i.id) AS charge, r.amount, r.currency, r.status, r.failed_at,
        r.as_of, least(r.created, r.as_of) AS created
    FROM refunds AS r LEFT JOIN of_intents AS i
        ON (i.account, i.livemode, i.payment_intent) = (r.account, r.livemode, r.payment_intent) AND r.charge IS NULL
    WHERE r.reason IS DISTINCT FROM '{payment.RELEASED}'
), sums AS (
    SELECT g.account, g.livemode, g.charge, bool_or(g.amount IS NULL) AS unknown,
        bool_or(g.currency IS DISTINCT FROM c.currency) AS is_mixed,
        coalesce(sum(g.amount) FILTER (WHERE k.is_known), 0) AS known,
        coalesce(sum(g.amount) FILTER (WHERE k.is_late), 0) AS late,
        sum(g.amount) FILTER (WHERE k.stood) AS stood, min(g.amount) FILTER (WHERE k.stood) AS smallest
    FROM given AS g JOIN taken AS c ON (c.account, c.livemode, c.id) = (g.account, g.livemode, g.charge)
    CROSS JOIN LATERAL (
        SELECT g.created <= c.as_of AND (g.failed_at IS NULL OR g.failed_at > c.as_of) AS is_known,
            c.is_read AND g.created > c.as_of AND g.created <= c.as_of + interval '5 s' AS is_late,
            coalesce(g.status = 'succeeded' AND g.created >= c.captured_at, false)
                AND g.created <= c.as_of AND g.as_of >= c.as_of AS stood
    ) AS k
    GROUP BY g.account, g.livemode, g.charge
)
SELECT c.account, c.livemode, c.id,
    CASE WHEN c.amount_refunded IS NULL OR r.unknown OR r.is_mixed THEN 'not provable'
        WHEN c.amount_refunded > c.most THEN 'broken'
        WHEN NOT c.is_captured THEN 'not provable'
        WHEN c.amount_refunded IN (s.known, s.known + s.late, s.known + c.not_captured) THEN 'holds'
        WHEN c.amount_refunded < s.least THEN 'broken'
        ELSE 'not provable' END,
    c.currency, c.amount_refunded, CASE WHEN c.amount_refunded > c.most THEN c.most ELSE s.least END,
    CASE WHEN c.amount_refunded IS NULL OR r.unknown THEN 'an amount is not known'
        WHEN r.is_mixed THEN 'a refund is in another currency than its charge'
        WHEN c.amount_refunded > c.most THEN 'more is reported as refunded than was charged'
        WHEN NOT c.is_captured THEN 'that it was captured is not known'
        WHEN c.amount_refunded < s.least THEN 'less is reported as refunded than its refunds come to'
        WHEN c.amount_refunded < s.known THEN 'it may not have counted its last refund, or one may have failed'
        ELSE 'not all of its refunds are known' END,
    c.as_of
FROM taken AS c
LEFT JOIN sums AS r ON (r.account, r.livemode, r.charge) = (c.account, c.livemode, c.id)
CROSS JOIN LATERAL (
    SELECT coalesce(r.known, 0) AS known, coalesce(r.late, 0) AS late,
        CASE WHEN c.amount_refunded < r.smallest AND c.amount_refunded + r.stood > c.most THEN r.stood ELSE 0 END
            AS least
) AS s
WHERE (r.charge IS NOT NULL OR c.amount_refunded IS DISTINCT FROM 0) AND (c.is_captured OR NOT c.is_held)
"""

RULES: Final = (
    Rule(
        "refunds-within-charge",
        "No more is refunded than was charged",
        "Needs the charge, and every refund's amount; refunds that failed or were canceled, or released a hold, do not"
        " count. More than is reported as captured, and no more than was charged, is not provable; nor is what several"
        " come to, of which one may have failed, unless the charge reports more than it captured."
        " Source: https://docs.stripe.com/api/refunds/object.",
        "charges",
        _REFUNDS_WITHIN,
    ),
    Rule(
        "charge-refunds",
        "A charge's refunded amount is what its refunds came to when it was reported",
        "Needs the charge's refunds, but for those that had failed or release a hold. Of a charge that was captured in"
        " part, what was released may be in it or not. Less than each is broken where the refunds still stood"
        " afterwards, and the charge has no room for them all; more than was charged always. Source: https://docs.stripe.com/api/charges/object.",
        "charges",
        _CHARGE_REFUNDS,
    ),
)
