"""How the command shows rows: a table to read, or JSON to pass on."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

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


def shown(value: object) -> str:
    """Return *value* as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    text = msgspec.json.encode(value).decode() if isinstance(value, (dict, list)) else str(value)
    # A buyer's name could otherwise send control codes to the terminal.
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


def lasting(seconds: float) -> str:
    """Return a duration in its largest unit, as a person reads it."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


_IN_LINES: Final = ("payload",)


def in_one_line(value: object) -> str:
    """Return *value* as a table shows it, without line breaks: an id with one could look like two rows."""
    return shown(value).replace("\n", "\\n")


def percent_proven(rules: Iterable[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Return the share of the rows checked by *rules* that is proven, in whole percent, and the count of these rows.

    A row counts once for each rule that is about it, and is proven where the rule holds or is broken. The percentage is
    rounded down, so that 100 means all. None where no row was checked.
    """
    counts = [(rule["checked"], rule["not_provable"]) for rule in rules]
    checked, unproven = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return ((checked - unproven) * 100 // checked, checked) if checked else None


def in_part(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the parts that a reconciliation did not look at, by the check; a complete check is absent."""
    archived = (result.get("logs") or {}).get("archived")
    of_logs = [f"{archived:,} events of the logs are archived here"] if archived else []
    of_stripe = list(_left_at_stripe(result))
    return {check: left for check, left in (("log", of_logs), ("stripe", of_stripe)) if left}


def _left_at_stripe(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of Stripe's data that were not looked at, each once.

    The reason why a kind of object was not compared is a flag of its tally (``is_forbidden``), or stands in place of
    the kind's name.
    """
    tallies, since = result.get("stripe") or (), result["run"].get("since")
    if since is not None and (tallies or "stripe_error" in result):
        moment = since if isinstance(since, datetime) else datetime.fromisoformat(since)
        yield f"only what was created since {shown(moment)} UTC"
    yield from dict.fromkeys(words for tally in tallies for words in _left_of(tally))
    if "stripe_error" in result:
        yield f"stopped by {result['stripe_error']['kind']}"


_NOT_ASKED: Final = "not asked"


def _left_of(tally: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of one *tally*'s objects that were not looked at."""
    kind = str(tally["object"])
    if kind.startswith(_NOT_ASKED):
        account, mode = tally["account"], "live" if tally["livemode"] else "test"
        yield f"{f'{account}, {mode}' if account else f'{mode} mode'}: {kind}"
    if known := tally.get("sampled_of"):
        looked_at, what = (tally["sampled"], " customers") if "sampled" in tally else (tally["listed"], "")
        yield f"{kind}: {looked_at:,} of {known:,}{what}"
    if without := tally.get("without_lines"):
        yield f"{kind}: lines of {without:,} not compared"
    if tally.get("cut_short"):
        yield f"{kind}: cut short"
    if unreadable := tally.get("unreadable"):
        yield f"{kind}: without {unreadable:,} that could not be read"
    for name, value in tally.items():
        if value is True and name.startswith("is_"):
            yield f"{kind}: {name.removeprefix('is_').replace('_', ' ')}"
        elif isinstance(value, str) and name != "object" and value.startswith(_NOT_ASKED):
            yield f"{kind}: {value}"


def why_not_provable(rule: Mapping[str, Any]) -> str:
    """Return for how many rows a *rule* could not be proven, and the reasons; empty where it was for all."""
    if not rule["not_provable"]:
        return ""
    why = ", ".join(f"{each['rows']:,} {each['reason']}" for each in rule.get("reasons", ()))
    return f"{rule['not_provable']:,} of {rule['checked']:,} not provable" + (f": {why}" if why else "")
