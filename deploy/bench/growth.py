"""Draws how each rate changed while the inbox grew, from the output of full runs with ``--json``.

    python -m deploy.bench.growth growth-10m.json [FILE…] >growth.svg

Each file is a run to another size; a line begins at 1.0, with the short history of its run.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from api.report.templates import environment
from deploy.bench.run import GROWTH, SMALL_EVENTS

WIDTH: Final = 720
HEIGHT: Final = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 270, 20, 40
_RATIO_MAX: Final = 1.5
_COLOURS: Final = ("#1b6ca8", "#c2571a", "#2f855a", "#8a3ffc", "#b0235f", "#6b6b00", "#555555")
_PREFIX: Final = "growth_"


@dataclass(frozen=True, slots=True)
class Curve:
    """The shares of one rate that are left, and where its name stands."""

    name: str
    colour: str
    points: list[tuple[str, str]]
    y: int


def drawn(documents: list[dict[str, Any]]) -> str:
    """Return the picture of *documents*, as a full run prints them."""
    lines = _lines(documents)
    sizes = sorted({SMALL_EVENTS, *(events for points in lines.values() for events in points)})
    ends = sorted(lines, key=lambda title: lines[title][max(lines[title])], reverse=True)
    return (
        environment(Path(__file__).parent)
        .get_template("growth.svg.j2")
        .render(
            width=WIDTH,
            height=HEIGHT,
            left=_LEFT,
            right=WIDTH - _RIGHT,
            sizes=[{"name": f"{events:,}", "x": f"{_x(events, sizes):.1f}"} for events in sizes],
            ratios=[{"name": f"{ratio:.1f}", "y": f"{_y(ratio):.1f}"} for ratio in (0.0, 0.5, 1.0, 1.5)],
            level=f"{_y(GROWTH.bound):.1f}",
            curves=[
                _curve(title, {SMALL_EVENTS: 1.0} | lines[title], sizes, place) for place, title in enumerate(ends)
            ],
        )
    )


def _lines(documents: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Return, by the title of a rate, the share of it that is left at each size."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for document in documents:
        for figure in document["figures"]:
            if figure["name"].startswith(_PREFIX) and figure["unit"] == "/s" and figure["ratio"] is not None:
                found[figure["name"].removeprefix(_PREFIX)][document["events"]] = figure["ratio"]
    return found


def _x(events: int, sizes: list[int]) -> float:
    first, last = math.log10(sizes[0]), math.log10(max(sizes[-1], sizes[0] * 10))
    return _LEFT + (math.log10(events) - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)


def _y(ratio: float) -> float:
    return _TOP + (1 - min(ratio, _RATIO_MAX) / _RATIO_MAX) * (HEIGHT - _TOP - _BOTTOM)


def _curve(title: str, points: dict[int, float], sizes: list[int], place: int) -> Curve:
    return Curve(
        name=f"{title}: {points[max(points)]:.2f}",
        colour=_COLOURS[place % len(_COLOURS)],
        points=[(f"{_x(events, sizes):.1f}", f"{_y(ratio):.1f}") for events, ratio in sorted(points.items())],
        # Names stand below each other, since lines may end in one place.
        y=_TOP + 14 + place * 18,
    )


def main() -> None:
    """Read the files that are named and write the picture."""
    documents = [msgspec.json.decode(Path(name).read_bytes()) for name in sys.argv[1:]]
    if not documents:
        sys.exit("Name what a full run printed: payfold bench --full --json >growth.json")
    sys.stdout.write(f"{drawn(documents)}\n")


if __name__ == "__main__":
    main()
