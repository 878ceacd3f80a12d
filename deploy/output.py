"""How the command shows rows: a table to read, or JSON to pass on."""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from api.report import words
from schemas import currencies

PIPE_COLUMNS: Final = 1000
"""A table's width without a terminal, so that no line in a file, a pipe or a copy is broken."""

_UNBOUNDED: Final = 1_000_000
"""More columns than any row has."""


def _console(**options: Any) -> Console:  # noqa: ANN401 - the library's options
    # The text may come from a stranger: a payload's brackets are no markup, and its colons no pictures.
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)


_HAS_TERMINAL: Final = sys.stdout is not None and sys.stdout.isatty()  # None where it was closed before the start
out: Final = _console(width=None if _HAS_TERMINAL else PIPE_COLUMNS)
err: Final = _console(stderr=True)

money: Final = currencies.written
shown: Final = words.shown
in_one_line: Final = words.in_one_line


class Format(StrEnum):
    """How rows are printed."""

    TABLE = "table"
    JSON = "json"
    NDJSON = "ndjson"


def rows(
    found: Iterable[Mapping[str, Any]], columns: Sequence[str], form: Format, *, empty: str, to: Console = out
) -> None:
    """Print *columns* of the rows *found*, or *empty* instead of a table without rows."""
    if form is Format.NDJSON:
        for row in found:
            print(_json({name: row[name] for name in columns}))  # noqa: T201 - data goes to stdout
    elif form is Format.JSON:
        print(_json([{name: row[name] for name in columns} for row in found]))  # noqa: T201 - as above
    else:
        _table(list(found), columns, empty, to)


def stream(
    found: Sequence[Mapping[str, Any]], columns: Sequence[str], form: Format, line: Callable[[Mapping[str, Any]], Text]
) -> None:
    """Print some rows of a list that goes on, at once: as JSON, or each as the *line* that a person reads."""
    if form is Format.NDJSON:
        rows(found, columns, form, empty="")
    else:
        for each in found:
            out.print(line(each))
    sys.stdout.flush()


def _table(found: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str, to: Console) -> None:
    if not found:
        err.print(empty)
        return
    numbers = [name for name in columns if any(_is_number(row[name]) for row in found)]
    table(columns, [[in_one_line(row[name]) for name in columns] for row in found], numbers=numbers, to=to)


def table(
    columns: Sequence[str],
    found: Sequence[Sequence[str]],
    *,
    numbers: Collection[str] = (),
    title: str | None = None,
    to: Console = out,
) -> None:
    """Print a line for each row, or a block of lines for each where the terminal is too narrow to show them whole."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False)
    for name in columns:
        made.add_column(name, no_wrap=True, justify="right" if name in numbers else "left")
    for cells in found:
        made.add_row(*cells)
    made.width = Measurement.get(to, to.options.update(max_width=_UNBOUNDED), made).maximum
    if not to.is_terminal or made.width <= to.width:
        to.print(made)
        return
    if title is not None:
        to.print(title, style="bold")
    for place, cells in enumerate(found):
        if place:
            to.print()
        _block(dict(zip(columns, cells, strict=True)), to)


def _block(values: Mapping[str, str], to: Console) -> None:
    """Print a line for each value, which is to be copied and so is never broken."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        to.print(Text(f"{name:<{width}}  ", "bold").append(value, "not bold"))


def one(row: Mapping[str, Any], form: Format) -> None:
    """Print one row, a column a line where it is a table."""
    if form is not Format.TABLE:
        print(_json(dict(row)))  # noqa: T201 - data goes to stdout
        return

    def currency_of(name: str) -> object:
        return row.get("presentment_currency" if name == "presentment_amount" else "currency")

    values = {name: amount(name, value, currency_of(name)) for name, value in row.items()}
    _block({name: value if name in _IN_LINES else in_one_line(value) for name, value in values.items()}, out)


def amount(column: str, value: object, currency: object) -> str:
    """Return *value* as a table shows it, as money where *column* is an amount."""
    is_money = column.startswith(("amount", "presentment_amount")) and isinstance(value, int) and currency
    return money(value, str(currency)) if is_money and isinstance(value, int) else shown(value)


def plain(value: object) -> Any:  # noqa: ANN401 - JSON values
    """Return *value* as a reader of its JSON gets it."""
    return msgspec.json.decode(_json(value))


def _json(value: object) -> str:
    return msgspec.json.encode(_in_utc(value)).decode()


def _in_utc(value: object) -> object:
    """Return *value* with its times in UTC, for a database session in any zone."""
    if isinstance(value, datetime):
        return value.astimezone(UTC)
    if isinstance(value, dict):
        return {key: _in_utc(each) for key, each in value.items()}
    return [_in_utc(each) for each in value] if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def lasting(seconds: float) -> str:
    """Return a duration in its largest unit, as a person reads it."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


_IN_LINES: Final = ("payload",)
