"""Money's own rules, held against the tables: what has to add up, whoever wrote it.

Note [Broken, or not provable]
    A rule is broken only where all that it needs is there and disagrees. Where something is not known, because no
    event told it or its list is not whole, the row is *not provable*, which is a gap of knowledge and no drift.
    Each rule compares amounts of one currency; rows of two currencies are broken where they may not differ, and are
    never added up.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final, Literal, get_args

from schemas.database import Cursor
from worker.folds import payment

State = Literal["holds", "broken", "not provable"]
NOT_PROVABLE_LISTED_MAX: Final = 200
"""So many rows that are not provable are listed for each rule; all are counted."""
ROWS_READ: Final = 500


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: its *name*, what it says in a line, and its *query*.

    The query gives, for each row that it is about: account, livemode, id, state, currency, held, expected, detail and
    at. It computes in numeric, since odd amounts may come to more than a bigint holds. *explains* names what it needs
    and compares.
    """

    name: str
    title: str
    explains: str
    table: str
    query: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A row of *table* of which a rule is broken or cannot be proven; *held* and *expected* are in minor units."""

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
class Tally:
    """Of how many rows a rule was checked, and what came of it."""

    rule: str
    checked: int
    holds: int
    broken: int
    not_provable: int


def check(cursor: Cursor) -> tuple[list[Tally], list[Finding]]:
    """Check every rule on the tables that *cursor* finds, and return the tallies and what does not hold.

    All rows that break a rule are listed, and of those that are not provable the first
    ``NOT_PROVABLE_LISTED_MAX`` of each rule.
    """
    tallies, findings = [], []
    for rule in RULES:
        tally, found = _check(cursor, rule)
        tallies.append(tally)
        findings += found
    return tallies, findings


def _check(cursor: Cursor, rule: Rule) -> tuple[Tally, list[Finding]]:
    counts = dict.fromkeys(get_args(State), 0)
    findings = []
    with cursor.connection.cursor("rule", binary=True) as rows:
        rows.itersize = ROWS_READ
        rows.execute(rule.query)
        for account, livemode, id_, state, currency, held, expected, detail, at in rows:
            counts[state] += 1
            if state == "broken" or (state == "not provable" and counts[state] <= NOT_PROVABLE_LISTED_MAX):
                world, sides = (rule.name, account, livemode, rule.table), (_whole(held), _whole(expected))
                findings.append(Finding(*world, id_, state, currency, *sides, detail, at))
    tally = Tally(rule.name, sum(counts.values()), counts["holds"], counts["broken"], counts["not provable"])
    return tally, findings


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
        WHEN l.others > 0 OR l.subtotal <> o.amount_subtotal THEN 'broken'
        WHEN l.total + o.amount_shipping IN (o.amount_total, o.amount_total - (o.amount_tax - l.tax)) THEN 'holds'
        ELSE 'broken' END,
    o.currency,
    CASE WHEN l.subtotal <> o.amount_subtotal THEN o.amount_subtotal ELSE o.amount_total END,
    CASE WHEN l.subtotal <> o.amount_subtotal THEN l.subtotal ELSE l.total + o.amount_shipping END,
    CASE WHEN NOT o.lines_complete OR l.unknown THEN 'not all lines are known'
        WHEN l.others > 0 THEN 'a line is in another currency'
        WHEN l.subtotal <> o.amount_subtotal THEN 'the subtotal is not that of its lines'
        ELSE 'the total is not that of its lines and the shipping' END,
    coalesce(o.created, o.as_of)
FROM orders AS o
CROSS JOIN LATERAL (
    SELECT coalesce(sum(t.amount_subtotal), 0) AS subtotal, coalesce(sum(t.amount_total), 0) AS total,
        coalesce(sum(t.amount_tax), 0) AS tax, count(*) FILTER (WHERE t.currency <> o.currency) AS others,
        coalesce(bool_or(t.amount_subtotal IS NULL OR t.amount_total IS NULL OR t.amount_tax IS NULL), false) AS unknown
    FROM order_lines AS t WHERE (t.account, t.livemode, t.order_id) = (o.account, o.livemode, o.id)
) AS l
WHERE o.mode IS DISTINCT FROM 'setup'
"""

# Before basil the charge of a converted price is in the buyer's currency, and so is compared with what was presented.
# Less may be captured than was authorized: then the rest was released, and the total is what was authorized.
_PAID_ORDER: Final = """
SELECT o.account, o.livemode, o.id,
    CASE WHEN c.id IS NULL OR o.currency IS NULL OR c.currency IS NULL THEN 'not provable'
        WHEN NOT p.is_comparable THEN 'broken'
        WHEN p.total IS NULL OR c.amount IS NULL THEN 'not provable'
        WHEN p.total = c.amount AND c.amount >= p.captured THEN 'holds'
        ELSE 'broken' END,
    CASE WHEN p.is_comparable THEN c.currency END,
    CASE WHEN p.is_comparable THEN p.total ELSE o.amount_total END,
    CASE WHEN p.total = c.amount THEN p.captured ELSE c.amount END,
    CASE WHEN c.id IS NULL THEN 'its charge is not known'
        WHEN o.currency IS NULL OR c.currency IS NULL THEN 'a currency is not known'
        WHEN NOT p.is_comparable
            THEN 'order and charge are in two currencies: ' || upper(o.currency) || ' and ' || upper(c.currency)
        WHEN p.total IS NULL OR c.amount IS NULL THEN 'an amount is not known'
        WHEN p.total = c.amount THEN 'more was captured than the total'
        ELSE 'the total is not what was charged' END,
    coalesce(o.created, o.as_of)
FROM orders AS o
LEFT JOIN LATERAL (
    SELECT * FROM charges AS t
    WHERE (t.account, t.livemode, t.payment_intent) = (o.account, o.livemode, o.payment_intent)
        AND t.status = 'succeeded' AND t.captured IS NOT FALSE
    ORDER BY t.captured IS NULL, t.id LIMIT 1
) AS c ON true
CROSS JOIN LATERAL (
    SELECT coalesce(c.currency IN (o.currency, o.presentment_currency), false) AS is_comparable,
        CASE c.currency WHEN o.currency THEN o.amount_total WHEN o.presentment_currency THEN o.presentment_amount END
            AS total,
        coalesce(c.amount_captured, c.amount) AS captured
) AS p
WHERE o.status = 'paid' AND o.mode = 'payment' AND o.payment_intent IS NOT NULL
"""

_NOTE_SPLIT: Final = """
SELECT account, livemode, id,
    CASE WHEN amount IS NULL OR pre_payment_amount IS NULL OR post_payment_amount IS NULL THEN 'not provable'
        WHEN amount <> pre_payment_amount::numeric + post_payment_amount THEN 'broken'
        WHEN refunded_amount IS NULL OR to_balance_amount IS NULL THEN 'not provable'
        WHEN post_payment_amount = went THEN 'holds'
        ELSE 'broken' END,
    currency,
    CASE WHEN amount <> pre_payment_amount::numeric + post_payment_amount THEN amount ELSE post_payment_amount END,
    CASE WHEN amount <> pre_payment_amount::numeric + post_payment_amount
        THEN pre_payment_amount::numeric + post_payment_amount ELSE went END,
    CASE WHEN amount IS NULL OR pre_payment_amount IS NULL OR post_payment_amount IS NULL OR refunded_amount IS NULL
            OR to_balance_amount IS NULL THEN 'a part of it is not known'
        WHEN amount <> pre_payment_amount::numeric + post_payment_amount THEN 'the amount is not its two sides'
        ELSE 'what was credited after payment is not what went out' END,
    coalesce(created, as_of)
FROM (
    SELECT *, refunded_amount::numeric + coalesce(out_of_band_amount, 0) + to_balance_amount AS went FROM credit_notes
) AS n
"""

_INVOICE_AMOUNTS: Final = """
SELECT account, livemode, id,
    CASE WHEN amount_due IS NULL OR amount_paid IS NULL OR amount_remaining IS NULL THEN 'not provable'
        WHEN amount_remaining = amount_due::numeric - amount_paid THEN 'holds'
        WHEN coalesce(amount_overpaid, amount_paid::numeric - amount_due) > 0 THEN 'not provable'
        ELSE 'broken' END,
    currency, amount_remaining, amount_due::numeric - amount_paid,
    CASE WHEN amount_due IS NULL OR amount_paid IS NULL OR amount_remaining IS NULL THEN 'an amount is not known'
        WHEN coalesce(amount_overpaid, amount_paid::numeric - amount_due) > 0
            THEN 'more was paid than is due, and how that is counted is not documented'
        ELSE 'what remains is not what is due less what was paid' END,
    coalesce(created, as_of)
FROM invoices
"""

# A charge may report its capture before the last step of it, so that more than that proves nothing. What releases a
# hold is no refund.
_REFUNDS_WITHIN: Final = f"""
SELECT r.account, r.livemode, r.charge,
    CASE WHEN c.amount IS NULL OR c.currency IS NULL OR r.unknown THEN 'not provable'
        WHEN r.others > 0 OR r.amount > c.most THEN 'broken'
        WHEN r.amount > c.captured_amount THEN 'not provable'
        ELSE 'holds' END,
    CASE WHEN r.others = 0 THEN c.currency END, CASE WHEN r.others = 0 THEN r.amount END, c.captured_amount,
    CASE WHEN c.amount IS NULL OR c.currency IS NULL THEN 'its charge is not known'
        WHEN r.unknown THEN 'an amount is not known'
        WHEN r.others > 0
            THEN 'a refund is in another currency than its charge: ' || r.currencies || ' and ' || upper(c.currency)
        WHEN r.amount > c.most THEN 'more was refunded than was charged'
        ELSE 'more was refunded than its charge reports as captured' END,
    r.at
FROM (
    SELECT t.account, t.livemode, t.charge, sum(t.amount) AS amount, max(coalesce(t.created, t.as_of)) AS at,
        count(*) FILTER (WHERE t.currency <> p.currency) AS others,
        string_agg(DISTINCT upper(t.currency), ', ') FILTER (WHERE t.currency <> p.currency) AS currencies,
        bool_or(t.amount IS NULL OR t.currency IS NULL) AS unknown
    FROM refunds AS t LEFT JOIN charges AS p ON (p.account, p.livemode, p.id) = (t.account, t.livemode, t.charge)
    WHERE t.charge IS NOT NULL AND coalesce(t.status, '') NOT IN ('failed', 'canceled')
        AND t.reason IS DISTINCT FROM '{payment.RELEASED}'
    GROUP BY t.account, t.livemode, t.charge
) AS r
LEFT JOIN (
    SELECT *, greatest(amount, amount_captured) AS most,
        CASE WHEN captured THEN coalesce(amount_captured, amount) ELSE amount END AS captured_amount
    FROM charges
) AS c ON (c.account, c.livemode, c.id) = (r.account, r.livemode, r.charge)
"""

# A charge tells its refunds when it tells of itself, and a refund when it does: only those that the charge's last word
# can have counted are held against it.
_CHARGE_REFUNDED: Final = """
SELECT c.account, c.livemode, c.id,
    CASE WHEN c.amount_refunded IS NULL OR r.unknown THEN 'not provable'
        WHEN c.amount_refunded BETWEEN r.least AND r.most THEN 'holds'
        WHEN c.amount_refunded > r.most THEN 'not provable'
        ELSE CASE WHEN c.amount_refunded >= r.settled THEN 'not provable' ELSE 'broken' END END,
    c.currency, c.amount_refunded, r.settled,
    CASE WHEN c.amount_refunded IS NULL OR r.unknown THEN 'an amount is not known'
        WHEN c.amount_refunded > r.most THEN 'not all of its refunds are known'
        WHEN c.amount_refunded >= r.settled THEN 'it has not told of itself since its last refund'
        ELSE 'less was refunded than its refunds that had succeeded' END,
    c.as_of
FROM charges AS c
JOIN LATERAL (
    SELECT count(*) AS refunds, coalesce(sum(t.amount) FILTER (WHERE t.status = 'succeeded'), 0) AS least,
        coalesce(sum(t.amount), 0) AS most,
        coalesce(sum(t.amount) FILTER (WHERE t.status = 'succeeded' AND t.as_of < c.as_of), 0) AS settled,
        coalesce(bool_or(t.amount IS NULL OR t.currency IS DISTINCT FROM c.currency), false) AS unknown
    FROM refunds AS t WHERE (t.account, t.livemode, t.charge) = (c.account, c.livemode, c.id)
) AS r ON r.refunds > 0 OR (c.amount_refunded <> 0 AND c.captured IS NOT FALSE)
"""

# A gap may always be an entry that is not known, so it proves nothing; the balance's last word may (below).
_BALANCE_CHAIN: Final = """
SELECT account, livemode, id, CASE WHEN ending_balance = was + amount THEN 'holds' ELSE 'not provable' END,
    currency, ending_balance, was + amount, 'the entry before it is not known', coalesce(created, as_of)
FROM (
    SELECT *, CASE WHEN row_number() OVER ledger = 1 THEN ending_balance::numeric - amount
        ELSE lag(ending_balance) OVER ledger END AS was
    FROM balance_transactions WINDOW ledger AS (PARTITION BY account, livemode, customer, currency ORDER BY created, id)
) AS t
"""

_BALANCE_CHANGES: Final = """
SELECT b.account, b.livemode, b.customer || ' ' || b.currency,
    CASE WHEN l.ending_balance IS NULL OR b.amount IS NULL THEN 'not provable'
        WHEN b.amount = l.ending_balance THEN 'holds'
        WHEN l.as_of < b.as_of OR l.is_tied OR x.is_listed THEN 'not provable'
        ELSE 'broken' END,
    b.currency, b.amount, l.ending_balance,
    CASE WHEN l.ending_balance IS NULL OR b.amount IS NULL THEN 'nothing told of a change'
        WHEN l.as_of < b.as_of OR l.is_tied OR x.is_listed THEN 'which word is the last is not known'
        ELSE 'the balance is not what its last change left' END,
    b.as_of
FROM balances AS b
LEFT JOIN LATERAL (
    SELECT c.ending_balance, c.as_of, EXISTS (
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
        " currency: the order's, or what was presented to the buyer. Less may have been captured, and not more."
        " Source: https://docs.stripe.com/api/charges/object.",
        "orders",
        _PAID_ORDER,
    ),
    Rule(
        "credit-note-split",
        "A credit note is what it took before payment and after, and the latter is what went out",
        "Needs every part: amount = pre + post, and post = refunds + out of band + to the balance."
        " Source: https://docs.stripe.com/api/credit_notes/object.",
        "credit_notes",
        _NOTE_SPLIT,
    ),
    Rule(
        "invoice-amounts",
        "What remains of an invoice is what is due, less what was paid",
        "Needs the three amounts. Of an invoice that is overpaid it is not documented what remains."
        " Source: https://docs.stripe.com/api/invoices/object.",
        "invoices",
        _INVOICE_AMOUNTS,
    ),
    Rule(
        "refunds-within-charge",
        "No more is refunded than was charged",
        "Needs the charge, and every refund's amount; refunds that failed or were canceled, or released a hold, do not"
        " count. More than is reported as captured, and no more than was charged, is not provable."
        " Source: https://docs.stripe.com/api/refunds/object.",
        "charges",
        _REFUNDS_WITHIN,
    ),
    Rule(
        "charge-refunded",
        "A charge's refunded amount covers the refunds that had succeeded when it told of itself",
        "Lies between the refunds that succeeded, and those and the pending, failed and canceled ones. Of a charge that"
        " tells more than the known refunds, some are not known. Source: https://docs.stripe.com/api/charges/object.",
        "charges",
        _CHARGE_REFUNDED,
    ),
    Rule(
        "balance-chain",
        "Each entry of a customer's ledger leaves what was before it, and its amount",
        "Needs the entry before it; a step between two that do not meet is not known."
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
)
