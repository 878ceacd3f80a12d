"""The line items of a Checkout Session, which no webhook ever carries.

They are drawn from the session's id and not from the account's chance, so that asking for them does not change a
history. Source: https://docs.stripe.com/api/checkout/sessions/line_items.
"""

from collections.abc import Sequence
from typing import Any, Final

from deploy.sandbox.chance import Chance
from deploy.sandbox.journal import Object

_NAMES: Final = ("Field notebook", "Enamel mug", "Linen apron", "Walnut tray", "Brass hook", "Wool blanket")
MANY: Final = 13
"""More than Stripe shows on a first page."""


def line_items(session: Object) -> list[Object]:
    """Return the line items of *session*; with its shipping they add up to its totals. Setup mode has none."""
    totals = session["total_details"]
    if session["mode"] == "setup" or totals is None:
        return []
    chance = Chance(f"line items {session['id']}", now=lambda: session["created"])
    subtotals = _split(session["amount_subtotal"], _count(chance), chance)
    discounts = _shares(totals["amount_discount"], subtotals)
    taxes = _shares(totals["amount_tax"], subtotals)
    return [
        _line(chance, session["currency"], subtotal, discount, tax)
        for subtotal, discount, tax in zip(subtotals, discounts, taxes, strict=True)
    ]


def _count(chance: Chance) -> int:
    if chance.flip(0.04):
        return MANY
    return 1 + chance.flip(0.4) + chance.flip(0.2)


def _split(amount: int, parts: int, chance: Chance) -> list[int]:
    """Return *amount* in up to *parts* parts, none of them zero unless *amount* is."""
    parts = max(1, min(parts, amount))
    usual = amount // parts
    found = [usual - (chance.flip(0.5) and usual // 3) for _ in range(parts - 1)]
    return [*found, amount - sum(found)]


def _shares(amount: int, weights: Sequence[int]) -> list[int]:
    """Return *amount* in shares in proportion to *weights*; the last share takes the rest from rounding."""
    whole = sum(weights)
    found = [amount * weight // whole if whole else 0 for weight in weights[:-1]]
    return [*found, amount - sum(found)]


def _line(chance: Chance, currency: str, subtotal: int, discount: int, tax: int) -> Object:
    quantity = 2 if subtotal and subtotal % 2 == 0 and chance.flip(0.3) else 1
    unit = subtotal // quantity
    return {
        "id": chance.id("li"),
        "object": "item",
        "adjustable_quantity": None,
        "amount_discount": discount,
        "amount_subtotal": subtotal,
        "amount_tax": tax,
        "amount_total": subtotal - discount + tax,
        "currency": currency,
        "description": _NAMES[subtotal % len(_NAMES)],
        "metadata": {},
        "price": _price(chance, currency, unit),
        "quantity": quantity,
    }


def _price(chance: Chance, currency: str, unit: int) -> dict[str, Any]:
    return {
        "id": chance.id("price"),
        "object": "price",
        "active": True,
        "billing_scheme": "per_unit",
        "currency": currency,
        "lookup_key": None,
        "metadata": {},
        "nickname": None,
        "product": chance.short_id("prod"),
        "recurring": None,
        "type": "one_time",
        "unit_amount": unit,
        "unit_amount_decimal": str(unit),
    }
