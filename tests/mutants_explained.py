"""The mutants that behave as the code does, each with what is equal."""

from collections.abc import Mapping
from typing import Final

EXPLAINED: Final[Mapping[str, str]] = {}
"""By name of the mutant, as ``tests.mutants`` gives it: why no test could notice it."""
