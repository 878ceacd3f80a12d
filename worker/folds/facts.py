"""The arguments and the results of a fold.

Note [A fold infers nothing]
    A fold reads one event and reports the values that this event carries. For an absent key it reports nothing, for a
    null it reports null. The join finds what several events mean together. Inferences are made from the joined row, so
    that no rule depends on which event was read first.

The types are msgspec's structs, because one is made for every event that is folded, and structs are made, hashed and
compared several times as fast as dataclasses. Those that a rebuild keeps in files are written as arrays.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import Struct

from schemas.events import Key
from schemas.kinds import Kind

if TYPE_CHECKING:
    Value: TypeAlias = bool | int | str | datetime | Mapping[str, Any] | None
else:
    Value = Any  # msgspec, which reads facts from files, has no union of a text and a time
Row: TypeAlias = dict[str, Value]


class Event(Struct, frozen=True):
    """An event from the inbox. ``created`` is aware and UTC; ``payload`` is the body with its credentials blanked."""

    seq: int
    account: str
    livemode: bool
    id: str
    type: str
    created: datetime
    object_type: str | None
    object_id: str | None
    payload: bytes
    source: str


class Subject(Struct, frozen=True, order=True, cache_hash=True, array_like=True):
    """The table and the key of one row.

    The key of a balance is its customer's *id* and a *currency*, because a customer has one balance in each currency.
    *root* is the id of the object that has the row's events, if it is not *id*.
    """

    table: str
    account: str
    livemode: bool
    id: str
    root: str = ""
    currency: str = ""

    @property
    def source(self) -> str:
        """The id of the object that has the row's events."""
        return self.root or self.id

    @property
    def key(self) -> tuple[str, ...]:
        """The values of the row's key beyond its world."""
        return (self.id, self.currency) if self.currency else (self.id,)


def object_of(subject: Subject) -> Key:
    """Return the object that has the events of the row *subject*."""
    return (subject.account, subject.livemode, subject.source)


class Facts(Struct, frozen=True, array_like=True):
    """The values that one event reports about one row.

    ``stamp`` orders events of one rank: a tuple of times, compared from the left. ``columns`` and ``references`` hold
    the keys that the event carries. ``before`` holds the values of both before the event, under the same names; None
    where the event does not report them. ``moments`` are the times at which the states that it reports began.
    ``is_first`` marks a ``.created`` event, which no event precedes. ``is_witness`` marks an event of another object,
    which adds to the row but does not make one. ``parts`` are rows of another table that belong to this row; None
    where the event does not list all of them.
    """

    subject: Subject
    event_id: str
    source: str
    created: datetime
    rank: int
    stamp: tuple[datetime, ...]
    columns: Mapping[str, Value]
    references: Mapping[str, str | None] = {}
    moments: Mapping[str, datetime] = {}
    before: Mapping[str, Value] | None = None
    is_first: bool = False
    is_witness: bool = False
    parts: tuple[Row, ...] | None = None

    @property
    def position(self) -> tuple[int, tuple[datetime, ...]]:
        """The event's place in the order of its row's events, before the chain orders events of one place."""
        return (self.rank, self.stamp)

    @property
    def is_observation(self) -> bool:
        """Whether the event is our own, made from a reading or a decision, and not Stripe's."""
        return self.source == "observation"

    @property
    def after(self) -> Mapping[str, Value]:
        """The state after the event, under the names of ``before``."""
        return {**self.columns, **self.references} if self.references else self.columns


class Witness(Struct, frozen=True):
    """An event that a change names: its id, the *source* that delivered it, and the time of its creation."""

    event_id: str
    source: str
    at: datetime


class Anomaly(Struct, frozen=True):
    """A fault of a row. ``detail`` holds no personal data."""

    kind: str
    detail: Mapping[str, Value | list[str]]


class Change(Struct, frozen=True):
    """A step for the consumers of the change feed, with the values that they act on. It holds no personal data.

    ``lines`` of an order are an empty list where all lines are known; they are filled in later from their own table.
    """

    kind: Kind
    before: Mapping[str, Value] | None
    after: Mapping[str, Value | list[Row]]


def event_of(row: Mapping[str, Any]) -> Event:
    """Return the event of a *row* of ``events``, whose payload is not archived."""
    return Event(*(row[name] for name in Event.__struct_fields__))


def utc(seconds: int) -> datetime:
    """Return the aware time of *seconds*, in Unix time."""
    return datetime.fromtimestamp(seconds, UTC)
