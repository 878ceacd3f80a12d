"""The account and the mode that a page shows: always one of each, so that no page mixes two."""

from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends, Request

from api import reads
from api.reads import Account, Livemode
from schemas import accounts
from schemas.database import cursor

ACCOUNTS_MAX: Final = 50
"""Accounts that a page offers; any other is reached by its name in the address."""


@dataclass(frozen=True, slots=True, order=True)
class World:
    """An account and a mode."""

    account: str
    livemode: bool

    @property
    def mode(self) -> str:
        """The mode as Stripe names it."""
        return "live" if self.livemode else "test"

    @property
    def asked(self) -> dict[str, str]:
        """The parameters by which an address asks for it."""
        return {"account": self.account, "livemode": "true" if self.livemode else "false"}


@dataclass(frozen=True, slots=True)
class Worlds:
    """The one that is shown, and all that could be."""

    shown: World
    known: tuple[World, ...]


def worlds(request: Request, account: Account = None, livemode: Livemode = None) -> Worlds:
    """Return the world that the address asks for; by default the first that there are events of, live before test."""
    with reads.reading(request.app.state.engine) as connection, cursor(connection) as opened:
        known = tuple(World(*each) for each in accounts.worlds(opened, limit=ACCOUNTS_MAX))
    fitting = [
        each for each in known
        if account in {None, each.account} and livemode in {None, each.livemode}
    ]  # fmt: skip
    asked = World(account or "", True if livemode is None else livemode)
    return Worlds(fitting[0] if fitting else asked, known)


Shown = Annotated[Worlds, Depends(worlds)]
