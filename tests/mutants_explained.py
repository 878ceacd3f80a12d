"""The mutants that behave exactly as the code does, each with the reason."""

from collections.abc import Mapping
from typing import Final

_FOLDED_AGAIN: Final = "a rank of the row above the true one only lets it be folded again from all its events"

EXPLAINED: Final[Mapping[str, str]] = {
    'worker/folds/charge.py _rank_of: "released_at" -> "as_of"': _FOLDED_AGAIN,
    'worker/folds/portal.py module: "expired_at" -> "as_of"': _FOLDED_AGAIN,
    "worker/folds/customer.py module: False -> True": "every event of a customer carries whether it is deleted",
}
"""By name of the mutant, as ``tests.mutants`` gives it: why no test could notice it."""
