"""Rules of the balances of customers, and of their ledgers."""

from typing import Final

from worker.proof.rules.rule import Rule

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
