"""How far the sessions of payment links came, laid out as bars: opened, completed, paid, and those that expired."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fastapi import Request
from sqlalchemy import Connection

from api import reads
from api.pages.worlds import World
from schemas import summary
from schemas.summary import LinkFunnel

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
    """The sessions of one payment link in one currency, and their bars."""

    row: LinkFunnel
    steps: list[Step]

    @property
    def words(self) -> str:
        """The bars in words."""
        return ", ".join(f"{step.count:,} {step.name}" for step in self.steps)


def funnels(request: Request, world: World, links: Iterable[str]) -> dict[str, list[Funnel]]:
    """Return the funnels of those of *links* that have sessions, the currency with most of them first."""
    with reads.reading(request.app.state.engine) as connection:
        found = {link: _of_link(connection, world, link) for link in links}
    return {link: drawn for link, drawn in found.items() if drawn}


def _of_link(connection: Connection, world: World, link: str) -> list[Funnel]:
    found = summary.funnel(connection, account=world.account, livemode=world.livemode, payment_link=link).rows
    return [Funnel(row, _steps(row)) for row in sorted(found, key=lambda row: -row.opened)]


def _steps(row: LinkFunnel) -> list[Step]:
    counts = {name: int(getattr(row, name)) for name in _STEPS}
    return [Step(name, _STEPS[name], count, round(100 * count / row.opened, 1)) for name, count in counts.items()]
