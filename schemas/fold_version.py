"""The version of the folds, which a status compares with the outcomes without loading the folds themselves."""

from typing import Final

FOLD_VERSION: Final = 8
"""Rises whenever a fold would return other facts for an event that is already folded: see ``worker.folds``."""
