"""What each cause of an event's state means, and what a person does about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Advice:
    """A cause in words, what to do about it, and the command for that where no page does it."""

    meaning: str
    remedy: str
    command: str | None = None


UNKNOWN: Final = Advice("A release that kept no causes parked these.", "Retry them: the cause is known after that.")
_BY_ITSELF: Final = "It is tried again by itself, ever later, at most every 5 minutes; a retry does not wait for that."
_OUT_OF_THE_WAY: Final = (
    "Retry once a release reads it. Ignore it if nothing is to come of it: its object then keeps what is known so far."
)
ADVICE: Final[Mapping[str, Advice]] = {
    "payload_unreadable": Advice("A field has a value that its column cannot hold.", _OUT_OF_THE_WAY),
    "object_unexpected": Advice("The object is of another type than events of this type carry.", _OUT_OF_THE_WAY),
    "row_refused": Advice(
        "PostgreSQL refuses the row, as a constraint of your own does.", "Mend what refuses it, then retry."
    ),
    "fold_failed": Advice("The code that reads it fails.", "Report that; retry with the release that mends it."),
    "payload_archived": Advice(
        "Older events of its object are archived, and are needed to fold it.",
        "Bring them back from the archive; that folds it too.",
        "payfold events retry ID --archive DIR",
    ),
    "database_busy": Advice("A lock or a statement took too long.", _BY_ITSELF),
    "database_refused": Advice("The database lacks a right or a column.", f"Mend that. {_BY_ITSELF}"),
    "machine_short": Advice("The machine is short of memory or disk.", f"Make room. {_BY_ITSELF}"),
    "set_aside": Advice("An operator ignored it.", "Nothing is left to do."),
    "thin_event": Advice("It only names its object, which is read from Stripe.", "Nothing is left to do."),
    "type_unwanted": Advice("No table is made of events of this type.", "Nothing is left to do."),
}
