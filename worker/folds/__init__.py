"""What each event means: pure functions from an event to facts, and from facts to a row.

Nothing here reads a clock, opens a connection or writes a line of log. ``FOLD_VERSION`` rises whenever a fold
would say something else of an event already folded; the clock then folds again what an older one folded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from schemas.errors import Unfoldable
from worker.folds import checkout_session, payment_link
from worker.folds.facts import Event, Facts
from worker.folds.join import Shape

FOLD_VERSION: Final = 1

EVENT_IGNORED: Final = "payfold.event.ignored"
"""An operator's word that an event is to be left aside; it is about an event, and has no row of its own."""

Fold: TypeAlias = Callable[[Event], tuple[Facts, ...]]

FOLDS: Final[Mapping[str, tuple[str, Fold]]] = {
    **dict.fromkeys(checkout_session.TYPES, ("checkout.session", checkout_session.fold)),
    **dict.fromkeys(payment_link.TYPES, ("payment_link", payment_link.fold)),
}
"""By event type: the type of object that it must carry, and the fold that reads it."""

SHAPES: Final[Mapping[str, Shape]] = {shape.table: shape for shape in (checkout_session.SHAPE, payment_link.SHAPE)}
"""By table, how its rows are joined."""

TABLES_OF_OBJECT: Final[Mapping[str, tuple[str, ...]]] = {
    "checkout.session": ("orders",),
    "payment_link": ("payment_links",),
}
"""By type of object, the tables in which the object's own id is the key of a row."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one event: facts where it is folded, else a reason."""

    state: str
    reason: str | None = None
    facts: tuple[Facts, ...] = ()


def judge(event: Event) -> Verdict:
    """Return what *event* says, or why it says nothing."""
    if event.type == EVENT_IGNORED:
        return Verdict("folded")
    wanted = FOLDS.get(event.type)
    if wanted is None:
        return Verdict("ignored", f"no fold wants the type {event.type}")
    object_type, fold = wanted
    if event.object_type != object_type:
        return Verdict("parked", f"its object is {event.object_type or 'unnamed'}, where {object_type} is wanted")
    try:
        return Verdict("folded", facts=fold(event))
    except Unfoldable as error:
        return Verdict("parked", str(error))
    except Exception as error:  # noqa: BLE001 - a fault of a fold parks its event, and holds up no other
        # The error's own words could quote the event, so only its kind is kept.
        return Verdict("parked", f"the fold failed with {type(error).__name__}")


__all__ = ["EVENT_IGNORED", "FOLDS", "FOLD_VERSION", "SHAPES", "TABLES_OF_OBJECT", "Verdict", "judge"]
