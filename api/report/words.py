"""Amounts, counts and times as a person writes them."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from schemas import currencies
from schemas.visible import visible

TEXT_MAX: Final = 300
"""A longer value is cut in a table."""


def amount(minor: int, currency: str) -> str:
    """Return *minor* units as a person writes them, with a minus that is one."""
    return currencies.written(minor, currency).replace("-", "−")  # noqa: RUF001 - not a hyphen


def figure(minor: int, currency: str) -> str:
    """Return *minor* units without the name of their currency, which stands above them."""
    return amount(minor, currency).rpartition(" ")[0]


def signed(minor: int, currency: str) -> str:
    """Return *minor* units, with a plus sign if they are more than 0."""
    return f"{'+' if minor > 0 else ''}{amount(minor, currency)}"


def number(count: int) -> str:
    """Return *count* with its thousands apart."""
    return f"{count:,}"


def counted(count: int, thing: str) -> str:
    """Return how many of *thing*: 1 order, 2 orders."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    """Return *names*, of which there is one at least, as a sentence lists them."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def shown(value: object) -> str:
    """Return *value* as a table shows it, without invisible characters."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    text = msgspec.json.encode(value).decode() if isinstance(value, (dict, list)) else str(value)
    return visible(text)


def in_one_line(value: object) -> str:
    """Return *value* as a table shows it, without line breaks: an id with one could look like two rows."""
    return shown(value).replace("\n", "\\n")


def cut(value: object) -> str:
    """Return *value* as a table shows it; of a long one the beginning, and how long it is."""
    text = shown(value)
    return text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]}… (of {len(text):,} characters)"


def moment(text: str) -> str:
    """Return a time of the result, in UTC."""
    return f"{_utc(text):%Y-%m-%d %H:%M:%S}"


def moment_in_words(text: str) -> str:
    """Return a time of the result in UTC, to the minute."""
    at = _utc(text)
    return f"{at.day} {at:%B %Y, %H:%M} UTC"


def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def first_up(name: str) -> str:
    """Return *name* with its first letter as a capital."""
    return name[:1].upper() + name[1:]


def world(row: Mapping[str, Any]) -> str:
    """Return the account and the mode of a *row* of the result."""
    mode = {True: "live", False: "test"}.get(row["livemode"])
    return ", ".join(filter(None, (row["account"], mode)))
