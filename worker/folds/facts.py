"""What a fold is given, and what it says.

Note [A fold infers nothing]
    A fold reads one event and reports what that event carries: an absent key says nothing, a null says null.
    What several events mean together is the join's to find, and what can be inferred is inferred from the
    joined row, so that no rule depends on which event was read first.

They are msgspec's structs, which are made, hashed and compared several times as fast as dataclasses: one is made for
every event that is folded. Those that a rebuild keeps in files are written as arrays.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

from msgspec import Struct

from schemas.kinds import Kind

Value: TypeAlias = bool | int | str | datetime | Mapping[str, Any] | None
Row: TypeAlias = dict[str, Value]


class Event(Struct, frozen=True):
    """An event out of the inbox. ``created`` is aware and UTC; ``payload`` is the body, credentials blanked."""

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
    """What one row is about: its table and its key.

    A balance has a *currency* beyond its customer's *id*, since a customer has one in each. *root* names the object
    from the events of which the row is folded, where that is another than *id*.
    """

    table: str
    account: str
    livemode: bool
    id: str
    root: str = ""
    currency: str = ""

    @property
    def source(self) -> str:
        """The object whose events the row is folded from."""
        return self.root or self.id

    @property
    def key(self) -> tuple[str, ...]:
        """The values of the row's key beyond its world."""
        return (self.id, self.currency) if self.currency else (self.id,)


class Facts(Struct, frozen=True, array_like=True):
    """What one event says of one row.

    ``stamp`` orders events of one rank, as a tuple of times of which the first differing one decides.
    ``columns`` and ``references`` hold the keys that the event carries; ``before`` holds the values that both
    had before the event, where it tells, by the same names. ``moments`` are the times at which what the event
    says came true. ``is_first`` is said by a ``.created`` event, which nothing comes before; ``by_clock`` by
    our clock, which any real event outranks. ``is_witness`` is said by an event of another object, which knows
    something of the row and does not make one. ``parts`` are rows of another table that belong to this one, where
    the event lists them in whole; None where it does not.
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
    by_clock: bool = False
    is_witness: bool = False
    parts: tuple[Row, ...] | None = None

    @property
    def position(self) -> tuple[int, tuple[datetime, ...]]:
        """Where the event stands among those of its row, but for the chain."""
        return (self.rank, self.stamp)

    @property
    def is_observation(self) -> bool:
        """Whether it is what we read or decided ourselves, and no event of Stripe's."""
        return self.source == "observation"

    @property
    def after(self) -> dict[str, Value]:
        """The state that the event tells, under the names of ``before``."""
        return {**self.columns, **self.references}


class Witness(Struct, frozen=True):
    """An event that a change names: its id, by which *source* it came, and when it was created."""

    event_id: str
    source: str
    at: datetime


class Anomaly(Struct, frozen=True):
    """Something about a row that should not be. ``detail`` holds no personal data."""

    kind: str
    detail: Mapping[str, Value | list[str]]


class Change(Struct, frozen=True):
    """A step that a consumer of the change feed wants to hear of, with what it acts on; it holds no personal data.

    ``lines`` of an order are an empty list where all of them are known: they are filled in from where they are kept.
    """

    kind: Kind
    before: Mapping[str, Value] | None
    after: Mapping[str, Value | list[Row]]


def utc(seconds: int) -> datetime:
    """Return the aware time of *seconds*, in Unix time."""
    return datetime.fromtimestamp(seconds, UTC)
