"""The layout of the charts, which a template draws as SVG: amounts by period and status, and counts by name."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final

from api.report.words import amount, figure, listed

STATUSES: Final = ("paid", "processing", "open", "failed", "expired", "complete")
"""From the axis up; each has its colour, and any other status has one together."""
PERIODS_MAX: Final = 36
"""More bars than this are drawn by week, then by month, then by year."""

_LONGEST_DAYS: Final = {"day": 1, "week": 7, "month": 31, "year": 366}
_TOP: Final = 12
_HEIGHT: Final = 200
_BOTTOM: Final = _TOP + _HEIGHT
_TICKS_MAX: Final = 4
_PERIOD_NAMES_MAX: Final = 6
_MIDDLE_PERCENT_MAX: Final = 92
_BAR_PERCENT_MAX: Final = 8
"""Keeps a few bars from being as broad as the page."""
_COUNT_PERCENT_MAX: Final = 84
"""The longest bar leaves room for its number."""
_COUNT_HEIGHT: Final = 44


# ---- Amounts ----


@dataclass(frozen=True, slots=True)
class Line:
    """A line across a chart at *y*, and the amount that it stands for."""

    y: str
    name: str
    is_zero: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """A piece of a bar, its place and size in percent of the width and in pixels of the height."""

    words: str
    colour: str
    x: str
    y: str
    width: str
    height: str


@dataclass(frozen=True, slots=True)
class Label:
    """The name of a period below its bar."""

    name: str
    x: str
    anchor: str


@dataclass(frozen=True, slots=True)
class Stacked:
    """A chart with a bar for each period, with a piece for each status."""

    title: str
    unit: str
    words: str
    height: int
    margin: int
    """How many characters wide the names of the lines are."""
    lines: list[Line]
    bars: list[Bar]
    labels: list[Label]
    labels_y: int


def stacked(
    title: str, currency: str, unit: str, statuses: Sequence[str], amounts: Mapping[tuple[date, str], int]
) -> Stacked:
    """Lay out a bar for each period, with a piece for each status; pieces below zero hang from the axis.

    *amounts* are in the smallest unit of *currency*, by the start of the period and the status.
    """
    days = [start for start, _ in amounts]
    starts = starts_of(min(days), max(days), unit)
    columns = [{status: amounts.get((start, status), 0) for status in statuses} for start in starts]
    ticks = _ticks(
        min(sum(min(each, 0) for each in column.values()) for column in columns),
        max(sum(max(each, 0) for each in column.values()) for column in columns),
    )
    names = _tick_names(ticks, currency)
    slot = 100 / len(starts)
    middles = [slot * (place + 0.5) for place in range(len(starts))]
    width = min(slot * 0.72, _BAR_PERCENT_MAX)
    return Stacked(
        title=title,
        unit=currency.upper(),
        words=(
            f"Bars by {unit} from {period(starts[0], unit)} to {period(starts[-1], unit)}, stacked by status "
            f"({listed(statuses)}), in {currency.upper()}. The table below has the figures."
        ),
        height=_BOTTOM + 28,
        margin=max(map(len, names)) + 2,
        lines=[Line(f"{_y(tick, ticks):.2f}", name, tick == 0) for tick, name in zip(ticks, names, strict=True)],
        bars=[
            bar
            for start, column, middle in zip(starts, columns, middles, strict=True)
            for bar in _bars(period(start, unit), currency, column, ticks, middle, width)
        ],
        labels=_labels(starts, middles, unit),
        labels_y=_BOTTOM + 20,
    )


def _bars(
    name: str, currency: str, pieces: Mapping[str, int], ticks: Sequence[int], middle: float, width: float
) -> Iterator[Bar]:
    up = down = 0
    for status, piece in pieces.items():
        base = up if piece > 0 else down
        top, bottom = _y(max(base, base + piece), ticks), _y(min(base, base + piece), ticks)
        up, down = up + max(piece, 0), down + min(piece, 0)
        if piece:
            yield Bar(
                words=f"{name}, {status}: {amount(piece, currency)}",
                colour=colour(status),
                x=f"{middle - width / 2:.3f}%",
                y=f"{top:.2f}",
                width=f"{width:.3f}%",
                height=f"{bottom - top:.2f}",
            )


def _labels(starts: Sequence[date], middles: Sequence[float], unit: str) -> list[Label]:
    """Return the names of so many periods that they have room."""
    every = -(-len(starts) // _PERIOD_NAMES_MAX)
    found = []
    for start, middle in list(zip(starts, middles, strict=True))[::every]:
        # A name that begins so near to the edge would run over it.
        x, anchor = (f"{middle:.3f}%", "middle") if middle <= _MIDDLE_PERCENT_MAX else ("100%", "end")
        found.append(Label(_short(start, unit), x, anchor))
    return found


def _y(minor: int, ticks: Sequence[int]) -> float:
    return _TOP + _HEIGHT * (ticks[-1] - minor) / (ticks[-1] - ticks[0])


def _ticks(low: int, high: int) -> list[int]:
    """Return round amounts, evenly apart, from *low* or below to *high* or above; zero is one of them."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if high - low <= step * _TICKS_MAX:
                first = low // step * step
                return list(range(first, max(-(-high // step) * step, first + step) + 1, step))
        power *= 10


def _tick_names(ticks: Sequence[int], currency: str) -> list[str]:
    names = [figure(tick, currency) for tick in ticks]
    is_whole = not any(name.partition(".")[2].strip("0") for name in names)
    return [name.partition(".")[0] for name in names] if is_whole else names


def colour(status: str) -> str:
    """Return the class that gives *status* its colour."""
    return f"is-{status}" if status in STATUSES else "is-other"


# ---- Counts ----


@dataclass(frozen=True, slots=True)
class Count:
    """A lying bar at *y*, its name above it and its number at its end."""

    name: str
    number: int
    y: int
    share: str


@dataclass(frozen=True, slots=True)
class Counts:
    """A chart of numbers by name."""

    title: str
    words: str
    height: int
    bars: list[Count]


def counts(title: str, numbers: Mapping[str, int]) -> Counts:
    """Lay out a lying bar for each number."""
    most = max(numbers.values(), default=0) or 1
    return Counts(
        title=title,
        words=listed(f"{name} {number:,}" for name, number in numbers.items()),
        height=_COUNT_HEIGHT * len(numbers),
        bars=[
            Count(name, number, _COUNT_HEIGHT * place, f"{_COUNT_PERCENT_MAX * number / most:.3f}%")
            for place, (name, number) in enumerate(numbers.items())
        ],
    )


# ---- Periods ----


def unit_of(first: date, last: date) -> str:
    """Return the shortest period that does not make too many bars: day, week, month or year."""
    return next((unit for unit in _LONGEST_DAYS if _fits(first, last, unit)), "year")


def _fits(first: date, last: date, unit: str) -> bool:
    # The quotient is a lower bound of the count, and spares making millions of periods to count them.
    at_least = (last - first).days // _LONGEST_DAYS[unit]
    return at_least < PERIODS_MAX and len(starts_of(first, last, unit)) <= PERIODS_MAX


def years_drawn(now: date) -> tuple[int, int]:
    """Return the first and the last year that a chart drawn at *now* shows: the next one is the last."""
    last = now.year + 1
    return last - PERIODS_MAX + 1, last


def start_of(day: date, unit: str) -> date:
    """Return the first day of the period that *day* is in; a week starts on Monday."""
    if unit == "week":
        return day - timedelta(days=day.weekday())
    return day if unit == "day" else day.replace(day=1) if unit == "month" else day.replace(month=1, day=1)


def starts_of(first: date, last: date, unit: str) -> list[date]:
    """Return the starts of all periods from *first* to *last*, those in which nothing happened too."""
    starts = [start_of(first, unit)]
    # A period that would begin after the last possible date begins after *last* too.
    while (within := starts[-1].toordinal() + _LONGEST_DAYS[unit]) <= date.max.toordinal():
        if (following := start_of(date.fromordinal(within), unit)) > last:
            break
        starts.append(following)
    return starts


def period(start: date, unit: str) -> str:
    """Return the name of the period that begins at *start*."""
    if unit in ("day", "week"):
        return f"{start.day} {start:%b %Y}"
    return f"{start:%B %Y}" if unit == "month" else f"{start.year}"


def _short(start: date, unit: str) -> str:
    if unit in ("day", "week"):
        return f"{start.day} {start:%b}"
    return f"{start:%b %Y}" if unit == "month" else f"{start.year}"
