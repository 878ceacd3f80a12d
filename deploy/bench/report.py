"""The report of the measurements against their targets: medians, ratios, the table and the JSON."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final

from msgspec import Struct
from rich.console import Console
from rich.table import Table

MARGIN: Final = 2.0
"""A ratio may be this many times worse than its target before ``--check`` complains, unless the target has a floor."""
NOT_MEASURED: Final = "not measured"


class Target(Struct, frozen=True):
    """A bound that is to be reached: from above, or from below with *at_least*.

    The *floor* is for a target that is not reached yet: it is about half of the result on two quiet processors, so that
    a regression is noticed all the same. Machines are noisy, and CI's more so.
    """

    bound: float
    at_least: bool = True
    aim: float | None = None
    floor: float | None = None

    def is_met(self, value: float) -> bool:
        """Return whether *value* reaches it."""
        return value >= self.bound if self.at_least else value <= self.bound

    def is_far_from(self, value: float) -> bool:
        """Return whether *value* is so far off that noise does not explain it."""
        if self.at_least:
            return value < (self.bound / MARGIN if self.floor is None else self.floor)
        return value > self.bound * MARGIN


class Run(Struct, frozen=True, omit_defaults=True):
    """One measurement, with those of its limit and of the plain alternative that were taken in turns with it."""

    measured: float
    limit: float | None = None
    plain: float | None = None
    detail: dict[str, float | str] = {}


class Figure(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One figure over its runs.

    *target* bounds the ratio to the limit, or the measured value where there is no limit. *fault* is the reason why
    the figure is worthless, if it is.
    """

    name: str
    title: str
    unit: str
    runs: tuple[Run, ...] = ()
    limit_name: str = ""
    target: Target | None = None
    plain_target: Target | None = None
    note: str = ""
    fault: str = ""

    @property
    def measured(self) -> float | None:
        """The median of what was measured."""
        return _median(run.measured for run in self.runs)

    @property
    def limit(self) -> float | None:
        """The median of the limit."""
        return _median(run.limit for run in self.runs)

    @property
    def plain(self) -> float | None:
        """The median of the plain alternative."""
        return _median(run.plain for run in self.runs)

    @property
    def ratio(self) -> float | None:
        """The median of the ratios to the limit, pair by pair."""
        return _median(run.measured / run.limit for run in self.runs if run.limit)

    @property
    def plain_ratio(self) -> float | None:
        """The median of the ratios to the plain alternative, pair by pair."""
        return _median(run.measured / run.plain for run in self.runs if run.plain)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is no target, or no value to compare with it."""
        value = self.ratio if self.limit_name else self.measured
        if self.fault:
            return False
        return None if self.target is None or value is None else self.target.is_met(value)

    @property
    def plain_met(self) -> bool | None:
        """Whether the target against the plain alternative is reached, None as above."""
        unknown = self.plain_target is None or self.plain_ratio is None
        return None if unknown else self.plain_target.is_met(self.plain_ratio)  # type: ignore[union-attr,arg-type]  # known


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def below_floor(figures: Sequence[Figure]) -> list[str]:
    """Return the faults beyond noise, a line each: ratios far from their targets, and figures that are worthless.

    Absolute figures are never judged.
    """
    found = [f"{figure.name}: {figure.fault}" for figure in figures if figure.fault]
    for figure in figures:
        for what, ratio, target in (
            (figure.limit_name, figure.ratio, figure.target),
            ("the plain alternative", figure.plain_ratio, figure.plain_target),
        ):
            if what and ratio is not None and target is not None and target.is_far_from(ratio):
                found.append(f"{figure.name}: {ratio:.2f} of {what}, where {_bound(target)} is the target")
    return found


def document(figures: Sequence[Figure], machine: Mapping[str, Any], mode: str, events: int) -> dict[str, Any]:
    """Return the whole run as JSON values; *events* is the length of the longest history, 0 where none grew."""
    return {
        "mode": mode,
        "events": events,
        "machine": dict(machine),
        "figures": [_reading(figure) for figure in figures],
    }


def _reading(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "title": figure.title,
        "measured": figure.measured,
        "unit": figure.unit,
        "limit": figure.limit,
        "limit_name": figure.limit_name or None,
        "ratio": figure.ratio,
        "target": _target(figure.target),
        "met": figure.met,
        "plain": figure.plain,
        "plain_ratio": figure.plain_ratio,
        "plain_target": _target(figure.plain_target),
        "plain_met": figure.plain_met,
        "note": figure.note or None,
        "fault": figure.fault or None,
        "runs": [
            {"measured": run.measured, "limit": run.limit, "plain": run.plain, "detail": run.detail}
            for run in figure.runs
        ],
    }


def _target(target: Target | None) -> dict[str, Any] | None:
    if target is None:
        return None
    return {"at_least" if target.at_least else "at_most": target.bound, "aim": target.aim}


# ---- The table ----


def show(figures: Sequence[Figure], machine: Mapping[str, Any], console: Console) -> None:
    """Print the figures with targets, those against the plain alternative, the others, and the machine."""
    judged = [figure for figure in figures if figure.target is not None]
    partner = [figure for figure in figures if figure.plain_target is not None]
    others = [figure for figure in figures if figure.target is None]
    if judged:
        _print(
            console,
            "Beside the machine's limits; ratios count, absolute figures are for orientation",
            ("figure", "measured", "limit", "ratio", "target", "met"),
            [_judged(figure) for figure in judged],
        )
    if partner:
        _print(
            console,
            "Beside the plain alternative",
            ("figure", "measured", "plain", "ratio", "target", "met"),
            [_next_to(figure) for figure in partner],
        )
    if others:
        _print(
            console,
            "For orientation",
            ("figure", "measured", "limit", "ratio"),
            [_judged(figure)[:4] for figure in others],
        )
    for figure in figures:
        for line in filter(None, (figure.fault and f"FAILED: {figure.fault}", figure.note)):
            console.print(f"{figure.name}: {line}")
    console.print()
    console.print(", ".join(f"{name} {value}" if name else str(value) for name, value in machine.items()))


def _judged(figure: Figure) -> tuple[str, ...]:
    limit = f"{amount(figure.limit, figure.unit)}  {figure.limit_name}" if figure.limit_name else ""
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    return (
        figure.title,
        amount(figure.measured, figure.unit),
        limit,
        ratio,
        _bound(figure.target, "" if figure.limit_name else figure.unit),
        _yes(figure.met),
    )


def _next_to(figure: Figure) -> tuple[str, ...]:
    ratio = "" if figure.plain_ratio is None else f"{figure.plain_ratio:.1f}"
    measured, plain = (amount(value, figure.unit) for value in (figure.measured, figure.plain))
    return figure.title, measured, plain, ratio, _bound(figure.plain_target), _yes(figure.plain_met)


def _bound(target: Target | None, unit: str = "") -> str:
    if target is None:
        return ""
    bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}{f' {unit}' if unit else ''}"
    return bound if target.aim is None else f"{bound} (aim {target.aim:g})"


def _yes(met: bool | None) -> str:  # noqa: FBT001 - a cell
    return "" if met is None else "yes" if met else "NO"


_WHOLE_FROM: Final = 100


def amount(value: float | None, unit: str) -> str:
    """Return *value* as a table shows it."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f} {unit}" if value >= _WHOLE_FROM else f"{value:,.2f} {unit}"


def _print(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        right = name in ("measured", "ratio", "plain")
        table.add_column(name, justify="right" if right else "left", header_style="", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()
