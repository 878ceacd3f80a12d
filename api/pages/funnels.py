"""How far the sessions of payment links came, laid out as bars: opened, completed, paid, and those that expired."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from fastapi import Request
from sqlalchemy import Text, any_, literal, select
from sqlalchemy.dialects.postgresql import ARRAY

from api import reads
from api.pages.worlds import World
from schemas import tables

_STEPS: Final = {"opened": "open", "completed": "complete", "paid": "paid", "expired": "expired"}
"""By step, the status whose colour it has."""


@dataclass(frozen=True, slots=True)
class Step:
    """One bar: how many sessions came so far, and their share of all that were opened, in percent."""

    name: str
    colour: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Funnel:
    """The sessions of one payment link in one currency. *amount_paid* is in the currency's smallest unit."""

    currency: str | None
    steps: list[Step]
    amount_paid: int

    @property
    def words(self) -> str:
        """The bars in words."""
        return ", ".join(f"{step.count:,} {step.name}" for step in self.steps)


def funnels(request: Request, world: World, links: Collection[str]) -> dict[str, list[Funnel]]:
    """Return the funnels of *links* by link, the currency with most sessions first."""
    view = tables.payment_link_funnel
    query = (
        select(view)
        .where(view.c.account == world.account, view.c.livemode == world.livemode)
        .where(view.c.payment_link == any_(literal(list(links), ARRAY(Text))))
        .order_by(view.c.opened.desc(), view.c.currency)
    )
    found: dict[str, list[Funnel]] = defaultdict(list)
    with reads.reading(request.app.state.engine) as connection:
        for row in connection.execute(query).mappings():
            counts = {name: row[name] for name in _STEPS}
            found[row["payment_link"]].append(Funnel(row["currency"], steps(counts), row["amount_paid"]))
    return found


def steps(counts: dict[str, int]) -> list[Step]:
    """Return the bars of *counts*, which has a count of sessions for each step."""
    whole = max(counts["opened"], 1)
    return [Step(name, colour, counts[name], round(100 * counts[name] / whole, 1)) for name, colour in _STEPS.items()]
