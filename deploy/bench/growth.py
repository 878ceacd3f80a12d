"""Draws how each rate changed while the inbox grew, from the output of full runs with ``--json``.

    python -m deploy.bench.growth growth.json [FILE…] >growth.svg

Each file is a run to another size; a line begins at 1.0, with the short history of its run.
"""

import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import msgspec

from deploy.bench.run import GROWTH, SMALL_EVENTS
from deploy.report.markup import Html, tag

WIDTH: Final = 720
HEIGHT: Final = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 270, 20, 40
_RATIO_MAX: Final = 1.5
_COLOURS: Final = ("#1b6ca8", "#c2571a", "#2f855a", "#8a3ffc", "#b0235f", "#6b6b00", "#555555")
_PREFIX: Final = "growth_"


def drawn(documents: list[dict[str, Any]]) -> Html:
    """Return the picture of *documents*, as a full run prints them."""
    lines = _lines(documents)
    sizes = sorted({SMALL_EVENTS, *(events for points in lines.values() for events in points)})
    parts = [_axis_x(events, sizes) for events in sizes]
    parts += [_axis_y(ratio) for ratio in (0.0, 0.5, 1.0, 1.5)]
    parts.append(_level(GROWTH.bound))
    ends = sorted(lines, key=lambda title: lines[title][max(lines[title])], reverse=True)
    for place, title in enumerate(ends):
        parts += _line(title, {SMALL_EVENTS: 1.0} | lines[title], sizes, _COLOURS[place % len(_COLOURS)], place)
    words = "Rates with a long history in the inbox, as a share of those with 100,000 events."
    return tag(
        "svg",
        tag("title", words),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        font_family="sans-serif",
        font_size=12,
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


def _axis_x(events: int, sizes: list[int]) -> Html:
    return tag("text", f"{events:,} events", x=f"{_x(events, sizes):.1f}", y=HEIGHT - 14, text_anchor="middle")


def _axis_y(ratio: float) -> Html:
    y = f"{_y(ratio):.1f}"
    return tag(
        "g",
        tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, stroke="#dddddd"),
        tag("text", f"{ratio:.1f}", x=_LEFT - 10, y=y, text_anchor="end", dominant_baseline="middle"),
    )


def _level(ratio: float) -> Html:
    y = f"{_y(ratio):.1f}"
    return tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, stroke="#999999", stroke_dasharray="4 4")


def _line(title: str, points: dict[int, float], sizes: list[int], colour: str, place: int) -> list[Html]:
    at = [(_x(events, sizes), _y(ratio)) for events, ratio in sorted(points.items())]
    # Names stand below each other, since lines may end in one place.
    y = _TOP + 14 + place * 18
    last = points[max(points)]
    return [
        tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in at), fill="none", stroke=colour, stroke_width=2),
        *(tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, fill=colour) for x, y in at),
        tag("text", f"{title}: {last:.2f}", x=WIDTH - _RIGHT + 20, y=y, fill=colour),
    ]


def main() -> None:
    """Read the files that are named and write the picture."""
    documents = [msgspec.json.decode(Path(name).read_bytes()) for name in sys.argv[1:]]
    if not documents:
        sys.exit("Name what a full run printed: payfold bench --full --json >growth.json")
    sys.stdout.write(f"{drawn(documents)}\n")


if __name__ == "__main__":
    main()
