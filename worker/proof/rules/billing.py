"""Rules of the amounts of credit notes and invoices."""

from typing import Final

from schemas import tables
from worker.proof.rules.rule import Rule

# One of the parts that went out may have been inferred from the others, and then they add up in any case. So a second
# source is needed. The part that went to the balance has one if the ledger lists it, or if nothing went there. The
# refunded part has one, unless an old note names its refund only by the id, and that refund is not known. Versions
# before 2025-05-28.basil do not carry the two sides, which are inferred from the type then: the whole amount is on one.
_NOTE_SPLIT: Final = f"""
SELECT n.account, n.livemode, n.id,
    CASE WHEN amount IS NULL OR pre_payment_amount IS NULL OR post_payment_amount IS NULL THEN 'not provable'
        WHEN amount <> pre_payment_amount::numeric + post_payment_amount THEN 'broken'
        WHEN refunded_amount IS NULL OR to_balance_amount IS NULL THEN 'not provable'
        WHEN post_payment_amount <> went THEN 'broken'
        WHEN is_rest OR is_refund_open OR sides.are_inferred THEN 'not provable'
        ELSE 'holds' END,
    currency,
    CASE WHEN amount <> pre_payment_amount::numeric + post_payment_amount THEN amount ELSE post_payment_amount END,
    CASE WHEN amount <> pre_payment_amount::numeric + post_payment_amount
        THEN pre_payment_amount::numeric + post_payment_amount ELSE went END,
    CASE WHEN amount IS NULL OR pre_payment_amount IS NULL OR post_payment_amount IS NULL OR refunded_amount IS NULL
            OR to_balance_amount IS NULL THEN 'a part of it is not known'
        WHEN amount <> pre_payment_amount::numeric + post_payment_amount THEN 'the amount is not its two sides'
        WHEN post_payment_amount <> went THEN 'what was credited after payment is not what went out'
        WHEN is_rest THEN 'what went to the balance is known from its other parts alone'
        WHEN is_refund_open THEN 'what was refunded is known from its other parts alone'
        ELSE 'its two sides are known from its type alone' END,
    coalesce(n.created, n.as_of)
FROM (
    SELECT n.*, n.refunded_amount::numeric + coalesce(n.out_of_band_amount, 0) + n.to_balance_amount AS went,
        n.to_balance_amount <> 0 AND NOT coalesce(
            CASE WHEN n.customer_balance_transaction IS NULL THEN naming.is_listed
                ELSE own.amount IS NOT NULL AND own.currency = n.currency END, false
        ) AS is_rest,
        n.refund IS NOT NULL AND NOT coalesce(r.amount IS NOT NULL AND r.currency = n.currency, false) AS is_refund_open
    FROM credit_notes AS n
    LEFT JOIN balance_transactions AS own
        ON (own.account, own.livemode, own.id) = (n.account, n.livemode, n.customer_balance_transaction)
    LEFT JOIN (
        SELECT account, livemode, credit_note, currency, count(*) = 1 AND count(amount) = 1 AS is_listed
        FROM balance_transactions WHERE credit_note IS NOT NULL GROUP BY account, livemode, credit_note, currency
    ) AS naming
        ON (naming.account, naming.livemode, naming.credit_note, naming.currency)
            = (n.account, n.livemode, n.id, n.currency)
    LEFT JOIN refunds AS r ON (r.account, r.livemode, r.id) = (n.account, n.livemode, n.refund)
) AS n
CROSS JOIN LATERAL (
    SELECT coalesce(bool_and(coalesce(left(i.api_version, 10) < '2025-05-28', false)), false) AS are_inferred
    FROM inbox AS i WHERE {tables.of_object("i", "n.account", "n.livemode", "n.id")}
        AND 0 IN (n.pre_payment_amount, n.post_payment_amount)
) AS sides
"""

# In the ledger a negative amount is a credit. The transaction is the one that the note names, else the one that names
# the note.
_NOTE_BALANCE: Final = """
SELECT n.account, n.livemode, n.id,
    CASE WHEN t.currency IS NULL OR n.currency IS NULL THEN 'not provable'
        WHEN t.currency <> n.currency THEN 'broken'
        WHEN n.to_balance_amount IS NULL OR t.amount IS NULL THEN 'not provable'
        WHEN n.to_balance_amount = -t.amount THEN 'holds'
        ELSE 'broken' END,
    CASE WHEN t.currency = n.currency THEN n.currency END, n.to_balance_amount, -t.amount,
    CASE WHEN t.entries > 1 THEN 'which balance transaction is its own is not known'
        WHEN t.entries = 0 THEN 'its balance transaction was not read'
        WHEN t.currency IS NULL OR n.currency IS NULL THEN 'a currency is not known'
        WHEN t.currency <> n.currency
            THEN 'note and balance transaction are in two currencies: ' || upper(n.currency) || ' and '
                || upper(t.currency)
        WHEN n.to_balance_amount IS NULL OR t.amount IS NULL THEN 'what went to the balance is not known'
        ELSE 'what went to the balance is not what its balance transaction credits' END,
    coalesce(n.created, n.as_of)
FROM credit_notes AS n
LEFT JOIN balance_transactions AS own
    ON (own.account, own.livemode, own.id) = (n.account, n.livemode, n.customer_balance_transaction)
LEFT JOIN (
    SELECT account, livemode, credit_note, count(*) AS entries, min(amount) AS amount, min(currency) AS currency
    FROM balance_transactions WHERE credit_note IS NOT NULL GROUP BY account, livemode, credit_note
) AS naming ON (naming.account, naming.livemode, naming.credit_note) = (n.account, n.livemode, n.id)
    AND n.customer_balance_transaction IS NULL
CROSS JOIN LATERAL (
    SELECT CASE WHEN own.id IS NOT NULL THEN 1 ELSE coalesce(naming.entries, 0) END AS entries,
        CASE WHEN own.id IS NOT NULL THEN own.currency WHEN naming.entries = 1 THEN naming.currency END AS currency,
        CASE WHEN own.id IS NOT NULL THEN own.amount ELSE naming.amount END::numeric AS amount
) AS t
WHERE n.customer_balance_transaction IS NOT NULL OR n.to_balance_amount IS DISTINCT FROM 0 OR t.entries > 0
"""

# A line's amount is before discounts and exclusive tax; the note's amount is after them, with shipping. Tax and
# shipping are not kept, nor are the billing credits that lower the lines of an invoice. Custom lines of a note have no
# such credits.
_NOTE_LINES: Final = """
SELECT n.account, n.livemode, n.id,
    CASE WHEN NOT n.lines_complete OR n.amount IS NULL OR l.unknown THEN 'not provable'
        WHEN n.amount = s.net THEN 'holds'
        WHEN n.amount < s.net AND l.is_custom THEN 'broken'
        ELSE 'not provable' END,
    n.currency, n.amount, s.net,
    CASE WHEN NOT n.lines_complete THEN 'not all lines are known'
        WHEN n.amount IS NULL OR l.unknown THEN 'an amount is not known'
        WHEN n.amount > s.net THEN 'the rest may be tax or shipping, which are not kept'
        WHEN l.is_custom THEN 'less is credited than its lines come to'
        ELSE 'billing credits may have lowered it, which are not kept' END,
    coalesce(n.created, n.as_of)
FROM credit_notes AS n
LEFT JOIN (
    SELECT account, livemode, credit_note, sum(amount) AS gross, sum(discount_amount) AS discount,
        bool_or(amount IS NULL OR discount_amount IS NULL) AS unknown,
        bool_and(coalesce(type = 'custom_line_item', false) AND amount >= 0) AS is_custom
    FROM credit_note_lines GROUP BY account, livemode, credit_note
) AS l ON (l.account, l.livemode, l.credit_note) = (n.account, n.livemode, n.id)
CROSS JOIN LATERAL (SELECT coalesce(l.gross, 0) - coalesce(l.discount, 0) AS net) AS s
"""

# The documentation gives the remaining amount as the amount due less the amount paid. It is not known whether that
# holds if more was paid, if the invoice was given up, or if it was paid outside of Stripe, as the amount that its
# payments do not cover may have been. A part of an open invoice may be paid outside of Stripe, too. Stripe subtracts
# that from the remaining amount, and we do not keep it.
_INVOICE_AMOUNTS: Final = """
SELECT i.account, i.livemode, i.id,
    CASE WHEN i.amount_due IS NULL OR i.amount_paid IS NULL OR i.amount_remaining IS NULL THEN 'not provable'
        WHEN s.is_right THEN 'holds'
        WHEN s.is_overpaid OR i.status IS NULL OR i.status NOT IN ('draft', 'open', 'paid') OR p.is_open OR s.is_less
            THEN 'not provable'
        ELSE 'broken' END,
    i.currency, i.amount_remaining, s.rest,
    CASE WHEN i.amount_due IS NULL OR i.amount_paid IS NULL OR i.amount_remaining IS NULL THEN 'an amount is not known'
        WHEN s.is_overpaid THEN 'more was paid than is due, and how that is counted is not documented'
        WHEN i.status IN ('void', 'uncollectible') THEN 'what remains of a void or uncollectible one is not documented'
        WHEN i.status IS NULL OR i.status NOT IN ('draft', 'open', 'paid') THEN 'its status is not known'
        WHEN s.is_less THEN 'a part may have been paid outside of Stripe, which is not kept'
        WHEN p.is_open THEN 'it may have been paid outside of Stripe, and how that is counted is not documented'
        ELSE 'what remains is not what is due less what was paid' END,
    coalesce(i.created, i.as_of)
FROM invoices AS i
CROSS JOIN LATERAL (
    SELECT i.amount_due::numeric - i.amount_paid AS rest,
        i.amount_remaining = i.amount_due::numeric - i.amount_paid AS is_right,
        i.status = 'open' AND i.amount_remaining BETWEEN 0 AND i.amount_due::numeric - i.amount_paid AS is_less,
        coalesce(coalesce(i.amount_overpaid, i.amount_paid::numeric - i.amount_due) > 0, false) AS is_overpaid
) AS s
CROSS JOIN LATERAL (
    SELECT i.status = 'paid' AND i.amount_paid <= i.amount_due AND i.amount_due > greatest(
        coalesce(sum(t.amount_paid) FILTER (WHERE t.id = t.invoice), 0),
        coalesce(sum(t.amount_paid) FILTER (WHERE t.id <> t.invoice), 0)
    ) AS is_open
    FROM invoice_payments AS t
    WHERE NOT s.is_right AND (t.account, t.livemode, t.invoice) = (i.account, i.livemode, i.id)
        AND t.status = 'paid' AND coalesce(t.payment_intent, t.charge) IS NOT NULL
) AS p
"""

# Before basil an invoice made its own payment, which is recorded under the invoice's id, and may be the same as another
# payment. When an invoice is paid, it must report at least the sum of its payments until then as paid. The exception is
# a sum above the amount due: versions before basil do not report the excess. Credit from the balance is no payment; it
# lowers the amount due instead.
_INVOICE_PAID: Final = """
SELECT i.account, i.livemode, i.id,
    CASE WHEN i.amount_paid IS NULL OR p.unknown THEN 'not provable'
        WHEN p.others IS NOT NULL THEN 'broken'
        WHEN p.is_loose THEN 'not provable'
        WHEN i.amount_paid = s.paid THEN 'holds'
        WHEN s.is_overpaid IS NOT FALSE THEN 'not provable'
        WHEN i.status = 'paid' AND i.amount_paid < s.settled THEN 'broken'
        ELSE 'not provable' END,
    CASE WHEN p.others IS NULL THEN i.currency END, i.amount_paid,
    CASE WHEN p.others IS NULL THEN s.settled END,
    CASE WHEN i.amount_paid IS NULL OR p.unknown THEN 'an amount is not known'
        WHEN p.others IS NULL AND s.is_overpaid IS NULL THEN 'an amount is not known'
        WHEN p.others IS NOT NULL
            THEN 'a payment is in another currency than its invoice: ' || p.others || ' and ' || upper(i.currency)
        WHEN p.is_loose THEN 'a currency is not known'
        WHEN s.is_overpaid THEN 'more was paid than is due, and how that is counted is not documented'
        WHEN i.status = 'paid' AND i.amount_paid < s.settled THEN 'less was paid than its payments had come to'
        WHEN i.amount_paid < s.paid THEN 'it has not reported since its last payment'
        ELSE 'some payments are not known, or were made outside of Stripe' END,
    coalesce(i.created, i.as_of)
FROM invoices AS i
LEFT JOIN (
    SELECT t.account, t.livemode, t.invoice, bool_or(t.amount_paid IS NULL) AS unknown,
        bool_or((t.currency = v.currency) IS NULL) AS is_loose, bool_or(t.id <> t.invoice) AS has_its_own,
        string_agg(DISTINCT upper(t.currency), ', ') FILTER (WHERE t.currency <> v.currency) AS others,
        sum(t.amount_paid) FILTER (WHERE t.id <> t.invoice) AS paid,
        sum(t.amount_paid) FILTER (WHERE t.id <> t.invoice AND coalesce(t.paid_at, t.as_of) <= v.paid_at) AS settled,
        sum(t.amount_paid) FILTER (WHERE t.id = t.invoice) AS by_invoice
    FROM invoice_payments AS t JOIN invoices AS v ON (v.account, v.livemode, v.id) = (t.account, t.livemode, t.invoice)
    WHERE t.status = 'paid' GROUP BY t.account, t.livemode, t.invoice
) AS p ON (p.account, p.livemode, p.invoice) = (i.account, i.livemode, i.id)
CROSS JOIN LATERAL (
    SELECT coalesce(CASE WHEN p.has_its_own THEN p.paid ELSE p.by_invoice END, 0) AS paid,
        coalesce(CASE WHEN p.has_its_own THEN p.settled ELSE p.by_invoice END, 0) AS settled,
        coalesce(
            i.amount_overpaid > 0, greatest(i.amount_paid, CASE WHEN p.has_its_own THEN p.settled END) > i.amount_due
        ) AS is_overpaid
) AS s
WHERE NOT i.deleted AND (i.amount_paid IS DISTINCT FROM 0 OR p.invoice IS NOT NULL)
"""

RULES: Final = (
    Rule(
        "credit-note-split",
        "A credit note is what it took before payment and after, and the latter is what went out",
        "Needs every part: amount = pre + post, and post = refunds + out of band + to the balance. Where one of these"
        " is known from the others alone, that they add up proves nothing; nor is anything proven by sides that old"
        " versions do not carry."
        " Source: https://docs.stripe.com/api/credit_notes/object.",
        "credit_notes",
        _NOTE_SPLIT,
    ),
    Rule(
        "credit-note-balance",
        "What of a credit note went to the balance is what its balance transaction credits",
        "Needs the balance transaction that the note names, or the only one that names the note. Its amount is"
        " negative, in the currency of the note."
        " Source: https://docs.stripe.com/api/customer_balance_transactions/object.",
        "credit_notes",
        _NOTE_BALANCE,
    ),
    Rule(
        "credit-note-lines",
        "A credit note's amount is its lines, less their discounts",
        "Needs all lines. Exclusive tax, shipping and billing credits are not kept: more than the lines may be the"
        " first two, and less may be the last, but for a note of custom lines alone."
        " Source: https://docs.stripe.com/api/credit_notes/line_item.",
        "credit_notes",
        _NOTE_LINES,
    ),
    Rule(
        "invoice-amounts",
        "What remains of an invoice is what is due, less what was paid",
        "Needs the three amounts. It is not documented what remains of an invoice that is overpaid, void or"
        " uncollectible, or was paid outside of Stripe, so that only a match proves something of these."
        " Source: https://docs.stripe.com/api/invoices/object.",
        "invoices",
        _INVOICE_AMOUNTS,
    ),
    Rule(
        "invoice-paid",
        "What was paid of an invoice is what its payments come to",
        "Needs the invoice's payments that were paid, in its currency; before basil the payment is made from the"
        " invoice. A paid invoice reports no less than its payments had come to when it was paid. What is more may have"
        " been paid outside of Stripe. Source: https://docs.stripe.com/api/invoice-payment/object.",
        "invoices",
        _INVOICE_PAID,
    ),
)
