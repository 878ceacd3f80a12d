"""Checks the tables by rules of money: amounts that have to add up, no matter which code wrote them.

Note [Broken, or not provable]
    A rule is broken only if all values that it needs are known and disagree. If a value is not known, because no event
    reported it or its list is not complete, the row is *not provable*: a gap in knowledge, and no drift. Each rule
    compares amounts of one currency. If two currencies may not differ and do, the rule is broken; amounts of two
    currencies are never added up. A disagreement that one missing event can explain breaks no rule either, so a report
    is compared only with what had ended before it.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final, Literal, get_args

from schemas.database import Cursor
from worker.folds import payment

State = Literal["holds", "broken", "not provable"]
NOT_PROVABLE_LISTED_MAX: Final = 200
"""For each rule up to so many rows that are not provable are listed; all are counted."""
ROWS_READ: Final = 500


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: its *name*, its text in one line, and its *query*.

    The query returns, for each row that the rule is about: account, livemode, id, state, currency, held, expected,
    detail and at. The detail of a row that is not provable is one of a few reasons, by which such rows are counted. The
    query computes in numeric, since the sum of odd amounts may be larger than a bigint holds, and joins by a hash or an
    index. *explains* names the values that the rule needs and compares.
    """

    name: str
    title: str
    explains: str
    table: str
    query: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A row of *table* that breaks a rule, or is not provable by it; *held* and *expected* are in minor units."""

    rule: str
    account: str
    livemode: bool
    table: str
    id: str
    state: str
    currency: str | None
    held: int | None
    expected: int | None
    detail: str
    at: datetime | None


@dataclass(frozen=True, slots=True)
class Reason:
    """A reason for which a rule could not be proven, and the number of its *rows*."""

    reason: str
    rows: int


@dataclass(frozen=True, slots=True)
class Tally:
    """How many rows a rule was checked for, the results, and the *reasons* of rows not provable, most common first."""

    rule: str
    checked: int
    holds: int
    broken: int
    not_provable: int
    reasons: tuple[Reason, ...] = ()


def check(cursor: Cursor) -> tuple[list[Tally], list[Finding]]:
    """Check every rule on the tables that *cursor* finds, and return the tallies and the findings.

    The findings have all rows that break a rule, and for each rule the first ``NOT_PROVABLE_LISTED_MAX`` rows that are
    not provable.
    """
    tallies, findings = [], []
    for rule in RULES:
        tally, found = _check(cursor, rule)
        tallies.append(tally)
        findings += found
    return tallies, findings


def _check(cursor: Cursor, rule: Rule) -> tuple[Tally, list[Finding]]:
    counts, reasons = dict.fromkeys(get_args(State), 0), Counter[str]()
    findings = []
    with cursor.connection.cursor("rule", binary=True) as rows:
        rows.itersize = ROWS_READ
        rows.execute(rule.query)
        for account, livemode, id_, state, currency, held, expected, detail, at in rows:
            counts[state] += 1
            if state == "not provable":
                reasons[detail] += 1
            if state == "broken" or (state == "not provable" and counts[state] <= NOT_PROVABLE_LISTED_MAX):
                world, sides = (rule.name, account, livemode, rule.table), (_whole(held), _whole(expected))
                findings.append(Finding(*world, id_, state, currency, *sides, detail, at))
    outcomes = (counts["holds"], counts["broken"], counts["not provable"])
    return Tally(rule.name, sum(outcomes), *outcomes, _by_rows(reasons)), findings


def _by_rows(reasons: Counter[str]) -> tuple[Reason, ...]:
    return tuple(Reason(*each) for each in sorted(reasons.items(), key=lambda each: (-each[1], each[0])))


def _whole(amount: Decimal | int | None) -> int | None:
    return None if amount is None else int(amount)


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

# One of the parts that went out may have been inferred from the others, and then they add up in any case. So a second
# source is needed. The part that went to the balance has one if the ledger lists it, or if nothing went there. The
# refunded part has one, unless an old note names its refund only by the id, and that refund is not known.
_NOTE_SPLIT: Final = """
SELECT account, livemode, id,
    CASE WHEN amount IS NULL OR pre_payment_amount IS NULL OR post_payment_amount IS NULL THEN 'not provable'
        WHEN amount <> pre_payment_amount::numeric + post_payment_amount THEN 'broken'
        WHEN refunded_amount IS NULL OR to_balance_amount IS NULL THEN 'not provable'
        WHEN post_payment_amount <> went THEN 'broken'
        WHEN is_rest OR is_refund_open THEN 'not provable'
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
        ELSE 'what was refunded is known from its other parts alone' END,
    coalesce(created, as_of)
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

# A gap may always be an entry that is not known, so it proves nothing. The last change of a balance may: see below.
_BALANCE_CHAIN: Final = """
SELECT account, livemode, id, CASE WHEN ending_balance = was + amount THEN 'holds' ELSE 'not provable' END,
    currency, ending_balance, was + amount,
    CASE WHEN ending_balance IS NULL OR amount IS NULL OR (was IS NULL AND NOT is_first) THEN 'an amount is not known'
        WHEN is_first THEN 'it is the first entry that is known'
        ELSE 'the entry before it is not known' END,
    coalesce(created, as_of)
FROM (
    SELECT *, (lag(ending_balance) OVER ledger)::numeric AS was, row_number() OVER ledger = 1 AS is_first
    FROM balance_transactions WINDOW ledger AS (PARTITION BY account, livemode, customer, currency ORDER BY created, id)
) AS t
"""

_BALANCE_CHANGES: Final = """
SELECT b.account, b.livemode, b.customer || ' ' || b.currency,
    CASE WHEN l.ending_balance IS NULL OR b.amount IS NULL THEN 'not provable'
        WHEN b.amount = l.ending_balance THEN 'holds'
        WHEN l.as_of < b.as_of OR l.is_tied OR l.is_passed OR x.is_listed THEN 'not provable'
        ELSE 'broken' END,
    b.currency, b.amount, l.ending_balance,
    CASE WHEN l.ending_balance IS NULL OR b.amount IS NULL THEN 'no change of it was reported'
        WHEN l.as_of < b.as_of OR l.is_tied OR l.is_passed OR x.is_listed THEN 'which report is the last is not known'
        ELSE 'the balance is not what its last change left' END,
    b.as_of
FROM balances AS b
LEFT JOIN LATERAL (
    SELECT c.ending_balance, c.as_of, c.as_of = b.as_of AND c.id <> b.event_id AS is_passed, EXISTS (
        SELECT FROM balance_changes AS o
        WHERE (o.account, o.livemode, o.customer, o.currency) = (c.account, c.livemode, c.customer, c.currency)
            AND o.as_of = c.as_of AND o.id <> c.id
    ) AS is_tied
    FROM balance_changes AS c
    WHERE (c.account, c.livemode, c.customer, c.currency) = (b.account, b.livemode, b.customer, b.currency)
    ORDER BY c.as_of DESC, c.id DESC LIMIT 1
) AS l ON true
CROSS JOIN LATERAL (
    SELECT EXISTS (
        SELECT FROM balance_transactions AS t
        WHERE (t.account, t.livemode, t.customer, t.currency) = (b.account, b.livemode, b.customer, b.currency)
    ) AS is_listed
) AS x
"""

# The customer's events decide the balance in its default currency. The ledger is read later, and is a second witness.
# If an event is missing, both may be right: the ledger then has an entry that is later than the balance, or one of the
# same second, and the balance is one that the ledger had in that second. A ledger is read as a whole, for all
# currencies at once, and begins at zero, so the sum of its amounts is the balance that it ends with. If the sum
# differs, some of its entries are not known.
_BALANCE_LEDGER: Final = """
WITH recent AS (
    SELECT * FROM (
        SELECT *, max(created) OVER (PARTITION BY account, livemode, customer, currency) AS last_at,
            sum(amount) OVER (PARTITION BY account, livemode, customer, currency) AS total,
            max(as_of) OVER (PARTITION BY account, livemode, customer) AS read_at
        FROM balance_transactions
    ) AS t WHERE created = last_at
), ledgers AS (
    SELECT b.account, b.livemode, b.customer, b.currency, max(t.last_at) AS last_at, max(t.read_at) AS read_at,
        max(t.total) AS total, bool_or(t.ending_balance = t.total) AS is_whole,
        bool_or(b.amount IN (t.ending_balance::numeric, t.ending_balance::numeric - t.amount)) AS is_seen,
        CASE WHEN count(*) = 1 THEN max(t.ending_balance) END AS only_end,
        max(t.ending_balance) FILTER (WHERE t.event_id = b.event_id) AS own_end
    FROM balances AS b JOIN recent AS t
        ON (t.account, t.livemode, t.customer, t.currency) = (b.account, b.livemode, b.customer, b.currency)
    GROUP BY b.account, b.livemode, b.customer, b.currency
)
SELECT b.account, b.livemode, b.customer || ' ' || b.currency,
    CASE WHEN w.reason IS NOT NULL THEN 'not provable' WHEN b.amount = o.ends_at THEN 'holds' ELSE 'broken' END,
    b.currency, b.amount, o.ends_at, coalesce(w.reason, 'the balance is not what its ledger ends at'), b.as_of
FROM balances AS b
LEFT JOIN ledgers AS l
    ON (l.account, l.livemode, l.customer, l.currency) = (b.account, b.livemode, b.customer, b.currency)
LEFT JOIN customers AS c ON (c.account, c.livemode, c.id) = (b.account, b.livemode, b.customer)
CROSS JOIN LATERAL (
    SELECT coalesce(l.own_end, CASE WHEN l.is_whole THEN l.total ELSE l.only_end END) AS ends_at
) AS o
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN l.read_at IS NULL THEN 'its ledger was not read'
        WHEN b.amount IS NULL THEN 'an amount is not known'
        WHEN l.own_end IS NOT NULL THEN NULL
        WHEN l.read_at < b.as_of THEN 'its ledger was not read since its last event'
        WHEN b.amount = o.ends_at THEN NULL
        WHEN o.ends_at IS NULL OR NOT (l.is_whole OR b.amount = l.total) THEN 'not all of its ledger is known'
        WHEN c.test_clock IS NOT NULL THEN 'a test clock sets its times'
        WHEN l.read_at = b.as_of OR l.last_at > b.as_of OR (l.last_at = b.as_of AND l.is_seen)
            THEN 'its ledger may be ahead of its events, or behind them'
    END AS reason
) AS w
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
    Rule(
        "credit-note-split",
        "A credit note is what it took before payment and after, and the latter is what went out",
        "Needs every part: amount = pre + post, and post = refunds + out of band + to the balance. Where one of these"
        " is known from the others alone, that they add up proves nothing."
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
    Rule(
        "balance-chain",
        "Each entry of a customer's ledger leaves what was before it, and its amount",
        "Needs the entry before it; a step between two that do not meet is not known, nor is the one before the first."
        " Source: https://docs.stripe.com/api/customer_balance_transactions/object.",
        "balance_transactions",
        _BALANCE_CHAIN,
    ),
    Rule(
        "balance-last",
        "A customer's balance is what its last change left",
        "Needs a last change that no other shares its second with, and that the ledger does not overrule."
        " Source: https://docs.stripe.com/api/customers/object.",
        "balances",
        _BALANCE_CHANGES,
    ),
    Rule(
        "balance-ledger",
        "A customer's balance is what its ledger ends at",
        "Needs a ledger in that currency that was read in or after the second of the balance's last event, and whose"
        " last entry is not later. Source: https://docs.stripe.com/api/customer_balance_transactions/list.",
        "balances",
        _BALANCE_LEDGER,
    ),
)
