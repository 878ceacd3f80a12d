"""The parts of a page: elements that escape their text, tables, and figures as a person writes them."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Final

from deploy import output

TEXT_MAX: Final = 300
"""A longer value is cut in a table."""
_WHOLE_LINES_MAX: Final = 15
"""A table with more lines than this may go over to the next page of paper."""


class Html(str):
    """Text that is markup already; any other text is escaped where it enters the page, so that none is forgotten."""

    __slots__ = ()


# ---- Elements ----


def tag(name: str, *children: str, **attributes: object) -> Html:
    """Return the element *name*; an attribute called `class_` is class, and `aria_label` is aria-label."""
    named = "".join(f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"' for key, value in attributes.items())
    held = "".join(each if isinstance(each, Html) else _escaped(each) for each in children)
    return Html(f"<{name}{named}>{held}</{name}>")


def _escaped(value: object) -> str:
    # Invisible characters are spelled out, since a stranger may have put them there to mislead.
    return escape(output.shown(value))


def section(name: str, title: str, *children: str) -> Html:
    """Return a part of the page that can be linked to as *name*."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def code(text: str) -> Html:
    """Return *text* in the type of code."""
    return tag("code", text)


def below(text: str) -> Html:
    """Return *text* in a small line of its own."""
    return tag("span", text, class_="below")


def nothing(text: str = "–") -> Html:  # noqa: RUF001 - a dash that is as wide as a figure
    """Return *text* marked as unimportant."""
    return tag("span", text, class_="none")


def fault(text: str) -> Html:
    """Return *text* marked as a fault."""
    return tag("strong", text, class_="fault")


def faults(*counts: int) -> list[Html]:
    """Return counts that ought to be zero."""
    return [fault(f"{count:,}") if count else nothing("0") for count in counts]


# ---- Tables ----


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | int]],
    *,
    texts: int | None = None,
    has_total: bool = False,
    kind: str = "",
) -> Html:
    """Return a table: its first *texts* columns (by default all) are words, and the others figures.

    With *has_total* its last row is the sum of the others.
    """
    first_figure = len(columns) if texts is None else texts
    sides = ["text" if place < first_figure else "figure" for place in range(len(columns))]
    lines = [_line(row, sides) for row in rows]
    total = tag("tfoot", lines.pop()) if has_total else ""
    heads = (tag("th", _first_up(name), scope="col", class_=side) for name, side in zip(columns, sides, strict=True))
    whole = tag(
        "table", tag("caption", caption), tag("thead", tag("tr", *heads)), tag("tbody", *lines), total, class_=kind
    )
    is_short = len(lines) <= _WHOLE_LINES_MAX
    # On a narrow screen the table scrolls by itself, also by keyboard.
    return tag("div", whole, class_="wide whole" if is_short else "wide", role="region", aria_label=caption, tabindex=0)


def _line(row: Sequence[str | int], sides: Sequence[str]) -> Html:
    cells = [
        tag("td", each if isinstance(each, str) else f"{each:,}", class_=side)
        for each, side in zip(row, sides, strict=True)
    ]
    if sides[0] == "text":
        cells[0] = tag("th", str(row[0]) if isinstance(row[0], int) else row[0], scope="row", class_="text")
    return tag("tr", *cells)


def _first_up(name: str) -> str:
    return name[:1].upper() + name[1:]


# ---- Words and figures ----


def amount(minor: int, currency: str) -> str:
    """Return *minor* units as a person writes them, with a minus that is one."""
    return output.money(minor, currency).replace("-", "−")  # noqa: RUF001 - not a hyphen


def figure(minor: int, currency: str) -> str:
    """Return *minor* units without the name of their currency, which stands above them."""
    return amount(minor, currency).rpartition(" ")[0]


def signed(minor: int, currency: str) -> str:
    """Return *minor* units, with a plus sign if they are more than 0."""
    return f"{'+' if minor > 0 else ''}{amount(minor, currency)}"


def counted(count: int, thing: str) -> str:
    """Return how many of *thing*: 1 order, 2 orders."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    """Return *names*, of which there is one at least, as a sentence lists them."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def cut(text: str) -> str:
    """Return *text*, or its beginning and how long it is."""
    return text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]}… (of {len(text):,} characters)"


def moment(text: str | None, *, in_words: bool = False) -> Html:
    """Return a time of the result, in UTC."""
    if text is None:
        return nothing()
    at = datetime.fromisoformat(text).astimezone(UTC)
    return tag("time", f"{at.day} {at:%B %Y, %H:%M} UTC" if in_words else f"{at:%Y-%m-%d %H:%M:%S}", datetime=text)
