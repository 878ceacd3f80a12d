"""Checks the tables by rules of money: amounts that have to add up, no matter which code wrote them.

Note [Broken, or not provable]
    A rule is broken only if all values that it needs are known and disagree. If a value is not known, because no event
    reported it or its list is not complete, the row is *not provable*: a gap in knowledge, and no drift. Each rule
    compares amounts of one currency. If two amounts have to be in one currency and are not, the rule is broken; amounts
    of two currencies are never added up. A disagreement that one missing event can explain breaks no rule either. So an
    amount that an object reported at some time is compared only with what is known to have happened by then.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final, Literal, get_args

from schemas.database import Cursor
from worker.proof.rules import balances, billing, charges, orders
from worker.proof.rules.rule import Rule

State = Literal["holds", "broken", "not provable"]
NOT_PROVABLE_LISTED_MAX: Final = 200
"""For each rule up to so many rows that are not provable are listed; all are counted."""
ROWS_READ: Final = 500

RULES: Final[tuple[Rule, ...]] = (*orders.RULES, *billing.RULES, *charges.RULES, *balances.RULES)


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
