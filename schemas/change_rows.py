"""A row of ``changes``: the one list of its columns, for those who append changes and those who show them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NotRequired, TypedDict

from schemas import tables
from schemas.database import boolean_array, text_array


class DecidingEvent(TypedDict):
    """The event that a change names: its id, its source, and the time at which Stripe created it."""

    # Values of a row, which may have any type.
    event_id: Any
    source: NotRequired[str]
    at: Any


class ChangeRow(DecidingEvent):
    """A change that is about to be appended, and so has no number yet.

    It is withheld from the feed for the reason *withheld*, if that is given and not None. The *source* is left out
    where the statement that appends the row looks it up.
    """

    account: str
    livemode: bool
    subject: str
    subject_id: str
    kind: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any]
    withheld: NotRequired[str | None]


COLUMNS: Final = tuple(column.name for column in tables.changes.columns if column.name != "seq")
"""What is written to append a change; PostgreSQL gives its number."""
LISTED: Final = ", ".join(COLUMNS)
"""``COLUMNS`` as SQL."""
IN_FEED: Final = tuple(name for name in COLUMNS if name != "withheld")
"""What a reader of the feed sees of a change, next to its number."""


def arrays(rows: Sequence[ChangeRow], *names: Literal["subject", "subject_id", "kind"]) -> list[str]:
    """Return the worlds of *rows* and their columns *names*, an array for each column."""
    return [
        text_array([row["account"] for row in rows]),
        boolean_array(row["livemode"] for row in rows),
        *(text_array([row[name] for row in rows]) for name in names),
    ]
