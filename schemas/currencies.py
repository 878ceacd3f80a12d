"""Amounts as people write them, and as Stripe counts them: in the currency's smallest unit.

Source: https://docs.stripe.com/currencies#zero-decimal and #three-decimal.
"""

import re
from decimal import Decimal
from typing import Final, NamedTuple

_ZERO_DECIMAL: Final = frozenset(
    ("bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "mga", "pyg", "rwf", "vnd", "vuv", "xaf", "xof", "xpf")
)
_THREE_DECIMAL: Final = frozenset(("bhd", "jod", "kwd", "omr", "tnd"))
AMOUNT_MAX: Final = 2**63 - 1
TEXT_MAX: Final = 64
"""Characters of a text that is read as an amount."""
_WRITTEN: Final = re.compile(r"(?:([a-z]{3})\s*)?([0-9](?:[0-9.,' ]*[0-9])?)\s*([a-z]{3})?", re.IGNORECASE | re.ASCII)
_SEPARATORS: Final = ".,' "


class Amount(NamedTuple):
    """An amount in the smallest unit of *currency*, a code in lower case."""

    minor: int
    currency: str


def decimals(currency: str) -> int:
    """Return how many digits an amount of *currency* has after the point."""
    name = currency.lower()
    return 0 if name in _ZERO_DECIMAL else 3 if name in _THREE_DECIMAL else 2


def written(minor: int, currency: str) -> str:
    """Return an amount as people write it: ``1,234.50 EUR``."""
    places = decimals(currency)
    return f"{Decimal(minor).scaleb(-places):,.{places}f} {currency.upper()}"


def read(text: str) -> Amount | None:
    """Return the amount that *text* states with its currency, as ``49.99 eur`` or ``EUR 1.234,50``; else None.

    The last separator is the decimal one where no more digits follow it than the currency has; the others group.
    """
    found = _WRITTEN.fullmatch(text.strip()) if len(text) <= TEXT_MAX else None
    if found is None or (found[1] is None) == (found[3] is None):
        return None
    currency = (found[1] or found[3]).lower()
    minor = _minor(found[2], decimals(currency))
    return None if minor > AMOUNT_MAX else Amount(minor, currency)


def _minor(number: str, places: int) -> int:
    last = max(number.rfind(each) for each in ".,")
    fraction = number[last + 1 :] if last >= 0 and len(number) - last - 1 <= places else ""
    digits = "".join(each for each in (number[:last] if fraction else number) if each not in _SEPARATORS)
    return int(digits + fraction.ljust(places, "0"))
