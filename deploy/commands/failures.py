"""The last words of a command that fails. It is loaded by one that does, since it knows the driver's errors."""

from typing import Final

from schemas import database
from schemas.errors import DatabaseAway, PayfoldError

FAILED: Final = PayfoldError.exit_code


def explained(error: Exception) -> tuple[str, int] | None:
    """Return what to print about *error* and the exit code; None where it is a fault of ours, to be shown whole."""
    if isinstance(error, DatabaseAway):
        words = f"PostgreSQL does not answer, so check DATABASE_URL: {database.first_line(error.__cause__)}"
        return words, FAILED
    if isinstance(error, PayfoldError):
        return str(error), error.exit_code
    if isinstance(error, database.refusals()):
        return f"PostgreSQL refused this: {_refusal(error)}", FAILED
    return None


def _refusal(error: Exception) -> str:
    if database.is_short_of_locks(error):
        return f"{database.LOCKS_MORE}."
    # The message of a fault in data may quote the data.
    return database.condition(error) if database.is_fault_of_data(error) else database.first_line(error)
