"""The errors of the benchmark; ``schemas.errors`` draws them with all others."""

from schemas.errors import PayfoldError


class BenchError(PayfoldError):
    """A figure cannot be measured."""


class ApartError(BenchError):
    """A process that was to be measured failed."""


class LoadError(BenchError):
    """The load could not be sent."""
