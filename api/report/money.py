"""What orders come to by currency, period and status: the layout of the charts and tables of a report."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final

from api.report import charts
from api.report.verdict import Row
from api.report.words import amount, counted, figure

CURRENCIES_MAX: Final = 24
"""At most this many currencies are drawn, those with the most orders."""

_STATUSES_MAX: Final = 4
"""A table of more statuses is printed smaller, so that no amount is cut off."""

# Amounts before and after the years of a chart are counted under these dates.
_BEFORE: Final = date.min
_AFTER: Final = date.max


@dataclass(frozen=True, slots=True)
class Entry:
    """A status in the legend of a chart, with its sum and its number of orders."""

    status: str
    colour: str
    amount: str
    orders: str


@dataclass(frozen=True, slots=True)
class Period:
    """A line of a table: the orders of a period, and their sum in each status."""

    name: str
    orders: int
    amounts: list[str]


@dataclass(frozen=True, slots=True)
class Currency:
    """The orders of one currency."""

    title: str
    legend: list[Entry]
    chart: charts.Stacked | None
    note: str
    caption: str
    columns: list[str]
    lines: list[Period]
    total: Period
    kind: str


@dataclass(frozen=True, slots=True)
class Money:
    """The orders of all currencies, and sentences on those that are not shown."""

    about: str
    currencies: list[Currency]
    notes: list[str]


def money(rows: Sequence[Row], now: date) -> Money:
    """Return the layout of *rows*, the sums of a result by day, status and currency."""
    of_currency: dict[str, list[Row]] = {}
    for row in rows:
        if row["day"] and row["currency"]:
            of_currency.setdefault(row["currency"], []).append(row)
    orders = {currency: sum(row["orders"] for row in own) for currency, own in of_currency.items()}
    most_first = sorted(orders, key=lambda currency: (-orders[currency], currency))
    others = [orders[currency] for currency in most_first[CURRENCIES_MAX:]]
    left = sum(row["orders"] for row in rows if not (row["day"] and row["currency"]))
    about = "What orders come to, as the tables hold it, by the day (UTC) they were completed or, until then, made."
    return Money(
        about=about if of_currency else "The tables hold no order with an amount.",
        currencies=[_currency(each, of_currency[each], now) for each in sorted(most_first[:CURRENCIES_MAX])],
        notes=list(_notes(others, left)),
    )


def _notes(others: Sequence[int], left: int) -> Iterator[str]:
    """Yield sentences on orders that are not shown: of *others* by their currency, and *left* without a day or one."""
    if others:
        orders = sum(others)
        currencies = "1 more currency" if len(others) == 1 else f"{len(others):,} more currencies"
        yield (
            f"The {CURRENCIES_MAX} currencies of most orders are shown. {counted(orders, 'order')} of {currencies} "
            f"{'is' if orders == 1 else 'are'} in the result alone, in this page's source."
        )
    if left:
        yield f"{counted(left, 'order')} without a day or a currency {'is' if left == 1 else 'are'} not shown here."


def _currency(currency: str, rows: Sequence[Row], now: date) -> Currency:
    first_year, last_year = charts.years_drawn(now)
    unit = _unit(rows, first_year, last_year)
    amounts: Counter[tuple[date, str]] = Counter()
    orders: Counter[date] = Counter()
    for row in rows:
        start = _start(date.fromisoformat(row["day"]), unit, first_year, last_year)
        amounts[start, row["status"]] += row["amount"] or 0
        orders[start] += row["orders"]
    drawn = {key: minor for key, minor in amounts.items() if key[0] not in (_BEFORE, _AFTER)}
    not_drawn = orders[_BEFORE] + orders[_AFTER]
    names = {_BEFORE: f"before {first_year}", _AFTER: f"after {last_year}"}
    periods = {each: names.get(each) or charts.period(each, unit) for each in sorted(orders) if orders[each]}
    seen = {row["status"] for row in rows}
    statuses = [*(each for each in charts.STATUSES if each in seen), *sorted(seen.difference(charts.STATUSES))]
    title = f"{currency.upper()} by {unit}"
    years = f"The chart is of the years {first_year} to {last_year}, without {counted(not_drawn, 'order')}."
    return Currency(
        title=title,
        legend=[_entry(status, [row for row in rows if row["status"] == status], currency) for status in statuses],
        chart=charts.stacked(title, currency, unit, statuses, drawn) if any(drawn.values()) else None,
        note=years if not_drawn else "",
        caption=f"Orders by {f'{unit} from Monday' if unit == 'week' else unit}, amounts in {currency.upper()}",
        columns=[unit, "Orders", *statuses],
        lines=[
            Period(name, orders[start], _cells(amounts, start, statuses, currency)) for start, name in periods.items()
        ],
        total=Period("Together", sum(orders.values()), _sums(amounts, periods, statuses, currency)),
        kind="many" if len(statuses) > _STATUSES_MAX else "",
    )


def _unit(rows: Sequence[Row], first_year: int, last_year: int) -> str:
    """Return the period by which a chart of these years shows *rows*."""
    days = [date.fromisoformat(row["day"]) for row in rows]
    within = [day for day in days if first_year <= day.year <= last_year]
    return charts.unit_of(min(within), max(within)) if within else "year"


def _start(day: date, unit: str, first_year: int, last_year: int) -> date:
    """Return the start of the period of *day*, by which its orders are counted."""
    return _BEFORE if day.year < first_year else _AFTER if day.year > last_year else charts.start_of(day, unit)


def _cells(amounts: Mapping[tuple[date, str], int], start: date, statuses: Sequence[str], currency: str) -> list[str]:
    """Return the sum of each status in one period, empty where it has no order."""
    return [figure(amounts[start, each], currency) if (start, each) in amounts else "" for each in statuses]


def _sums(
    amounts: Mapping[tuple[date, str], int], periods: Iterable[date], statuses: Sequence[str], currency: str
) -> list[str]:
    """Return the sum of each status in all *periods*."""
    starts = list(periods)
    return [figure(sum(amounts.get((start, each), 0) for start in starts), currency) for each in statuses]


def _entry(status: str, rows: Sequence[Row], currency: str) -> Entry:
    return Entry(
        status=status,
        colour=charts.colour(status),
        amount=amount(sum(row["amount"] or 0 for row in rows), currency),
        orders=counted(sum(row["orders"] for row in rows), "order"),
    )
