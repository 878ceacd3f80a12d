"""A batch of events on its way into the tables: the claimed events, their outcomes, and which changes are news."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from msgspec import Struct

from schemas.events import Key
from worker import folds
from worker.folding.renderings import Choice
from worker.folds.facts import Event, Facts, Row, Subject, object_of
from worker.folds.join import Joined

REASON_CHARACTERS_MAX: Final = 500


class Claimed(Struct, frozen=True):
    """An event taken for folding.

    ``is_refold`` is true where it had an outcome before. ``ignored_because`` is the reason where an operator ignores
    it. ``attempts`` is how often it has failed alone since it became pending. ``choice`` is the choice among its
    copies, if it has copies with other contents. ``stands`` is true where it keeps its outcome, because only copies
    came and none of them was chosen.
    """

    event: Event
    is_refold: bool
    ignored_because: str | None
    attempts: int = 0
    choice: Choice | None = None
    stands: bool = False


class Outcome(Struct):
    """The outcome of an event after a number of *attempts*."""

    seq: int
    state: str
    reason: str | None
    cause: str | None
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """Events of a batch with their verdicts, *judged*.

    *facts* are the facts of the verdicts. The rows *refold* and the rows of *objects* are to be folded from all their
    events, because some of the events had an outcome before.
    """

    judged: Sequence[tuple[Claimed, folds.Verdict]]
    facts: dict[Subject, list[Facts]]
    refold: set[Subject]
    objects: set[Key]

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes of the events."""
        return [
            Outcome(each.event.seq, verdict.state, shortened(verdict.reason), verdict.cause, each.attempts + 1)
            for each, verdict in self.judged
        ]


@dataclass
class Saved:
    """The result of one batch: the new *rows*, the rows *known* before, and the rows that are *gone*."""

    rows: dict[Subject, Joined]
    known: dict[Subject, Row]
    gone: list[Subject]
    judged: Sequence[tuple[Claimed, folds.Verdict]] = ()
    is_alone: bool = False
    """Whether others are already kept from appending to the feed."""

    @cached_property
    def fresh(self) -> dict[Key, str]:
        """The sources of the events that had no outcome before."""
        events = [each.event for each, _ in self.judged if not each.is_refold]
        return {(event.account, event.livemode, event.id): event.source for event in events}


class Reasons:
    """Why changes are withheld from the feed.

    All changes of a part may be *withheld* for one reason. Changes that come only from copies of known events are
    withheld as well.
    """

    def __init__(self, part: Part, withheld: str | None) -> None:
        self.of_all = withheld
        history = [each for each, _ in part.judged if each.choice is not None and each.choice.is_history]
        self._events = {(each.event.account, each.event.livemode, each.event.id) for each in history}
        self._objects = {object_of(subject) for each in history for subject in rows_before(each)}
        for subject, several in part.facts.items() if history else ():
            if any(event_key_of(one) not in self._events for one in several):
                self._objects.discard(object_of(subject))
            else:
                self._objects.add(object_of(subject))

    @property
    def is_one(self) -> bool:
        """Whether all changes have the same reason, or all have none."""
        return not self._events and not self._objects

    def of(self, subject: Subject, joined: Joined | None) -> str | None:
        """Return why changes of *subject* are withheld; None for news. *joined* is its row, None where it is gone."""
        if self.is_one:
            return self.of_all
        by = None if joined is None else joined.decided_by
        is_by_history = by is not None and (subject.account, subject.livemode, by.event_id) in self._events
        is_history = is_by_history or object_of(subject) in self._objects
        return self.of_all or ("rendering" if is_history else None)


NOTHING: Final = Part((), {}, set(), set())
NEWS: Final = Reasons(NOTHING, None)
"""No change is withheld."""


def event_key_of(one: Facts) -> Key:
    """Return the key of the event that reports *one*."""
    return (one.subject.account, one.subject.livemode, one.event_id)


def every_copy(claimed: Claimed) -> list[Event]:
    """Return the event and the events of its other copies."""
    return [claimed.event, *(copy.event for copy in (claimed.choice.kept if claimed.choice else ()))]


def rows_before(claimed: Claimed) -> set[Subject]:
    """Return the rows that an earlier fold of the event, or of another copy of it, may have made."""
    found = {subject for event in every_copy(claimed) for subject in _own_subjects(event)}
    kept = claimed.choice.kept if claimed.choice else ()
    return found | {one.subject for copy in kept for one in copy.verdict.facts}


def shortened(reason: str | None) -> str | None:
    """Return *reason*, shortened to the length that is kept."""
    return reason[:REASON_CHARACTERS_MAX] if reason else None


def _own_subjects(event: Event) -> list[Subject]:
    """Return the rows with the id of *event*'s object, which an earlier fold may have made."""
    if event.object_type is None or event.object_id is None:
        return []
    names = folds.TABLES_OF_OBJECT.get(event.object_type, ())
    return [Subject(table, event.account, event.livemode, event.object_id) for table in names]
