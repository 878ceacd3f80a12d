"""A batch of events on its way into the tables: what was claimed, what came of it, and what of it is news."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeAlias

from msgspec import Struct

from worker import folds
from worker.folding.renderings import Choice
from worker.folds.facts import Event, Facts, Row, Subject
from worker.folds.join import Joined

REASON_CHARACTERS_MAX: Final = 500

Object: TypeAlias = tuple[str, bool, str]
"""An object's id in its world."""


class Claimed(Struct, frozen=True):
    """An event taken for folding; ``again`` where it had an outcome before, ``set_aside`` by an operator's word.

    ``attempts`` is how often it has failed alone since it became pending. Of an event of which copies say different
    things ``choice`` is what they come to. Where its outcome ``stands``, only copies came, and none was chosen.
    """

    event: Event
    again: bool
    set_aside: str | None
    attempts: int = 0
    choice: Choice | None = None
    stands: bool = False


class Outcome(Struct):
    """What became of an event, after so many *attempts*."""

    seq: int
    state: str
    reason: str | None
    cause: str | None
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """Events of a batch, as they are *judged*: what they say, and the rows and *objects* to be folded again for it."""

    judged: Sequence[tuple[Claimed, folds.Verdict]]
    facts: dict[Subject, list[Facts]]
    anew: set[Subject]
    objects: set[Object]

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of the events."""
        return [
            Outcome(each.event.seq, verdict.state, shortened(verdict.reason), verdict.cause, each.attempts + 1)
            for each, verdict in self.judged
        ]


@dataclass
class Saved:
    """What one batch of events, as they are *judged*, came to."""

    rows: dict[Subject, Joined]
    known: dict[Subject, Row]
    gone: list[Subject]
    judged: Sequence[tuple[Claimed, folds.Verdict]] = ()

    @cached_property
    def fresh(self) -> dict[Object, str]:
        """The sources of the events that had no outcome before."""
        events = [each.event for each, _ in self.judged if not each.again]
        return {(event.account, event.livemode, event.id): event.source for event in events}


class Reasons:
    """Why changes are not in the feed: all of a part that is *withheld*, and those by copies of what was known."""

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
        """Whether there is one reason, or none, for all changes."""
        return not self._events and not self._objects

    def of(self, subject: Subject, joined: Joined | None) -> str | None:
        """Return why changes of the row *joined* of *subject*, or of one that is gone, are withheld; None for news."""
        if self.is_one:
            return self.of_all
        by = None if joined is None else joined.decided_by
        is_by_history = by is not None and (subject.account, subject.livemode, by.event_id) in self._events
        is_history = is_by_history or object_of(subject) in self._objects
        return self.of_all or ("rendering" if is_history else None)


NOTHING: Final = Part((), {}, set(), set())
NEWS: Final = Reasons(NOTHING, None)
"""Nothing is withheld."""


def object_of(subject: Subject) -> Object:
    """Return the object whose events the row *subject* is folded from."""
    return (subject.account, subject.livemode, subject.source)


def event_key_of(one: Facts) -> Object:
    """Return the key of the event that reports *one*."""
    return (one.subject.account, one.subject.livemode, one.event_id)


def every_copy(claimed: Claimed) -> list[Event]:
    """Return the event with all that its copies say instead."""
    return [claimed.event, *(copy.event for copy in (claimed.choice.kept if claimed.choice else ()))]


def rows_before(claimed: Claimed) -> set[Subject]:
    """Return the rows that the event, or another copy of it, may have made before."""
    found = {subject for event in every_copy(claimed) for subject in _own_subjects(event)}
    kept = claimed.choice.kept if claimed.choice else ()
    return found | {one.subject for copy in kept for one in copy.verdict.facts}


def shortened(reason: str | None) -> str | None:
    """Return *reason* as it is kept."""
    return reason[:REASON_CHARACTERS_MAX] if reason else None


def _own_subjects(event: Event) -> list[Subject]:
    """Return the rows that *event* may have made before, whatever it says now."""
    if event.object_type is None or event.object_id is None:
        return []
    names = folds.TABLES_OF_OBJECT.get(event.object_type, ())
    return [Subject(table, event.account, event.livemode, event.object_id) for table in names]
