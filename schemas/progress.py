"""How long work reports what it has done."""

from collections.abc import Callable
from typing import Final, TypeAlias

STEP_SECONDS_MAX: Final = 600.0
"""How long one step of a reconciliation may take, such as a query over a whole table."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Gets the name of a step, how much of it is done, and how much there is to do."""


def do_nothing(*_: object) -> None:
    """Do nothing with a report of any kind."""
