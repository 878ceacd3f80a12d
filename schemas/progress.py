"""How long work reports what it has done."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Gets the name of a step, how much of it is done, and how much there is to do."""


def do_nothing(*_: object) -> None:
    """Do nothing with a report of any kind."""
