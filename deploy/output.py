"""How the command shows rows: a table to read, or JSON to pass on."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

out: Final = Console(highlight=False, soft_wrap=True)
err: Final = Console(stderr=True, highlight=False)

# Source: https://docs.stripe.com/currencies#zero-decimal and #three-decimal.
_ZERO_DECIMAL: Final = frozenset(
    ("bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "mga", "pyg", "rwf", "vnd", "vuv", "xaf", "xof", "xpf")
)
_THREE_DECIMAL: Final = frozenset(("bhd", "jod", "kwd", "omr", "tnd"))


class Format(StrEnum):
    """How rows are printed."""

    TABLE = "table"
    JSON = "json"
    NDJSON = "ndjson"


def rows(found: Iterable[Mapping[str, Any]], columns: Sequence[str], form: Format, *, empty: str) -> None:
    """Print *columns* of the rows *found*; *empty* is said where a table would have none."""
    if form is Format.NDJSON:
        for row in found:
            print(msgspec.json.encode({name: row[name] for name in columns}).decode())  # noqa: T201 - data goes to stdout
    elif form is Format.JSON:
        print(msgspec.json.encode([{name: row[name] for name in columns} for row in found]).decode())  # noqa: T201 - as above
    else:
        _table(list(found), columns, empty)


def _table(found: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> None:
    if not found:
        err.print(empty)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if _is_number(found[0][name]) else "left")
    for row in found:
        table.add_row(*(shown(row[name]) for name in columns))
    out.print(table)


def one(row: Mapping[str, Any], form: Format) -> None:
    """Print one row, a column a line where it is a table."""
    if form is not Format.TABLE:
        print(msgspec.json.encode(dict(row)).decode())  # noqa: T201 - data goes to stdout
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    currency = row.get("currency")
    for name, value in row.items():
        is_money = name.startswith("amount") and isinstance(value, int) and currency
        table.add_row(name, money(value, str(currency)) if is_money else shown(value))
    out.print(table)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: object) -> str:
    """Return *value* as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, (dict, list)):
        return msgspec.json.encode(value).decode()
    return str(value)


def money(amount: int, currency: str) -> str:
    """Return *amount*, in the smallest unit, as a person writes it: 2000 usd is 20.00 USD."""
    digits = 0 if currency in _ZERO_DECIMAL else 3 if currency in _THREE_DECIMAL else 2
    return f"{Decimal(amount).scaleb(-digits):,.{digits}f} {currency.upper()}"
