"""What was sold within a day, a week and a month: the figures and the charts of the overview."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final

from fastapi import Request

from api import summaries
from api.pages.rendering import amount
from api.pages.worlds import World
from api.report import charts
from schemas.answers import Sum, Summary, SumOfDay

PERIODS: Final = {
    "24 hours": timedelta(days=1), "7 days": timedelta(days=7), "30 days": timedelta(days=30)
}  # fmt: skip
CHARTS_MAX: Final = 3
"""Currencies that are drawn: those with the most orders."""
_EARNED: Final = ("paid",)
_COUNTED_REFUNDS: Final = ("succeeded",)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table: a name, and a cell for each period."""

    name: str
    cells: list[str]


@dataclass(frozen=True, slots=True)
class Sales:
    """The tables by period, and a chart of the orders by day for each of the main currencies."""

    periods: list[str]
    orders: list[Line]
    paid: list[Line]
    refunded: list[Line]
    charts: list[charts.Stacked]
    statuses: list[str]


def sales(request: Request, world: World) -> Sales:
    """Return what was sold in *world* in each of the periods that end now."""
    now = datetime.now(UTC)
    found = [_summary(request, world, now - length) for length in PERIODS.values()]
    days = summaries.summarize_days(request, now - PERIODS["30 days"], now, world.account, world.livemode).data
    return Sales(
        periods=list(PERIODS),
        orders=_counts(found),
        paid=_money([each.orders if each else [] for each in found], _EARNED),
        refunded=_money([each.refunds if each else [] for each in found], _COUNTED_REFUNDS),
        charts=_charts(days),
        statuses=_in_order({each.status or "" for each in days if each.amount}),
    )


def _summary(request: Request, world: World, since: datetime) -> Summary | None:
    found = summaries.summarize(request, since, None, world.account, world.livemode).data
    return found[0] if found else None


def _in_order(statuses: Iterable[str]) -> list[str]:
    known = set(statuses)
    return [*(each for each in charts.STATUSES if each in known), *sorted(known.difference(charts.STATUSES))]


def _counts(found: Sequence[Summary | None]) -> list[Line]:
    """Return the number of orders of each status, in each period."""
    counts = [Counter({each.status or "": each.count for each in one.orders_by_status} if one else {}) for one in found]
    names = _in_order({name for each in counts for name in each})
    return [Line(name or "not known", [f"{each[name]:,}" for each in counts]) for name in names]


def _money(found: Sequence[Sequence[Sum]], statuses: Sequence[str]) -> list[Line]:
    """Return the sum of each currency of what has one of *statuses*, in each period."""
    sums: list[Counter[str]] = []
    for several in found:
        own: Counter[str] = Counter()
        for each in several:
            if each.status in statuses and each.currency is not None and each.amount is not None:
                own[each.currency] += each.amount
        sums.append(own)
    names = sorted({name for each in sums for name in each})
    return [Line(name.upper(), [amount(each[name], name) if name in each else "" for each in sums]) for name in names]


def _charts(days: Sequence[SumOfDay]) -> list[charts.Stacked]:
    orders: Counter[str] = Counter()
    for each in days:
        if each.currency is not None and each.amount:
            orders[each.currency] += each.count
    return [_chart(currency, days) for currency, _ in orders.most_common(CHARTS_MAX)]


def _chart(currency: str, days: Sequence[SumOfDay]) -> charts.Stacked:
    amounts: Counter[tuple[date, str]] = Counter()
    for each in days:
        if each.currency == currency and each.amount:
            amounts[each.day, each.status or ""] += each.amount
    return charts.stacked(f"{currency.upper()} by day", currency, "day", _in_order({s for _, s in amounts}), amounts)
