"""The state of an audit: its arguments, its progress, and how far the list of each kind was followed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from schemas.observations import Answer, World
from schemas.progress import Progress
from worker.proof import in_flight, kinds
from worker.proof.difference import Difference
from worker.proof.kinds import Kind, Listed
from worker.proof.walks import Step, Walks
from worker.stripe_jobs.rounds import JobContext

CUSTOMERS_MAX: Final = 10_000
"""Customers that a run looks at. If there are more, half are the newest, half are random pages of a hundred others."""
LEDGERS_MAX: Final = 2_000
"""Ledgers that a run looks at: each costs a call. Of more, half are the last that moved, half are random others."""
LINES_MAX: Final = 1_000
"""Objects with so many lines that a list shows only a part, of which a run reads the rest: each costs a call."""


@dataclass(slots=True)
class Shown:
    """Reports how many of *count* kinds are done, and how many objects were listed so far."""

    progress: Progress
    count: int
    rows: int = 0

    def kinds(self, done: int) -> None:
        """Report how many kinds are *done*."""
        self.progress("Asking Stripe", done, self.count)

    def listed(self, rows: int) -> None:
        """Report so many more *rows*."""
        self.rows += rows
        if rows:
            self.progress("Objects listed", self.rows, self.rows)


@dataclass(frozen=True, slots=True)
class Audit:
    """The arguments of an audit, and its progress."""

    context: JobContext
    since: datetime | None
    repair: bool
    customers_max: int
    ledgers_max: int
    kept: Walks
    shown: Shown
    spent: Counter[str] = field(default_factory=Counter)
    """By table of lines, the number of objects with lines that were asked for."""


@dataclass(slots=True)
class Walk:
    """How far the list of a kind was followed: see ``walks.Step``.

    *ids* were listed since *above*, and *edge* on the page before that. *page* are the ids of the last page; *after* is
    the last of them that is not known to be deleted.
    """

    tally: Listed
    above: datetime
    after: str | None = None
    ids: set[str] = field(default_factory=set)
    edge: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    starts: list[str] | None = None
    is_listed: bool = False
    is_done: bool = False
    kept: Counter[str] = field(default_factory=Counter)
    """The part of the tally that is in kept steps."""
    page: list[str] = field(default_factory=list)
    is_known: bool = False
    """Whether the list had an object that Stripe has sent an event of."""
    has_restarted: bool = False
    yielded: set[tuple[str, str, str, str | None]] = field(default_factory=set)

    @property
    def place(self) -> tuple[str, bool, str]:
        """The world and the kind."""
        return (self.tally.account, self.tally.livemode, self.tally.object)

    @property
    def uncounted(self) -> Counter[str]:
        """The part of the tally that is in no step yet."""
        return Counter({name: getattr(self.tally, name) for name in kinds.COUNTS}) - self.kept

    def count(self, came: Mapping[str, int]) -> None:
        """Add the tally of a step."""
        for name, count in came.items():
            setattr(self.tally, name, getattr(self.tally, name) + count)
        self.kept.update(came)

    def news(self, found: Iterable[Difference]) -> list[Difference]:
        """Return the differences of *found* that were not yielded yet; each row and column is yielded once."""
        fresh = {(each.table, each.kind, each.id, each.column): each for each in found}
        fresh = {name: each for name, each in fresh.items() if name not in self.yielded}
        self.yielded.update(fresh)
        return list(fresh.values())

    def go_back(self) -> bool:
        """Let the list go on after the object before *after* on its page; False if there is none."""
        self.page = self.page[:-1]
        if self.page:
            self.after = self.page[-1]
        return bool(self.page)

    def restart(self, above: datetime) -> None:
        """Begin again at the top of the list."""
        self.tally, self.kept, self.above, self.after = Listed(*self.place), Counter(), above, None
        self.ids, self.edge, self.open = set(), set(), set()
        self.has_restarted = True

    def behind(self, step: Step) -> str | None:
        """Return the object after which the page of the next *step* began."""
        return self.starts[-1 - len(step.starts or ())] if self.starts else self.after

    @property
    def is_sample(self) -> bool:
        """Whether only chosen pages of the rest of the list are looked at."""
        return self.starts is not None

    def take(self, step: Step) -> None:
        """Go on by a step."""
        if step.after is not None:
            self.after, self.page = step.after, list(step.ids)
        self.starts, self.is_known = step.starts, self.is_known or step.is_known
        self.is_listed, self.is_done = step.is_listed, step.is_done
        self.ids.update(step.ids)
        self.open.difference_update(step.ids)
        if step.above is not None:
            self.above, self.open = step.above, set(step.open)
            self.edge, self.ids = set(step.ids), set()


def begun(audit: Audit, world: World, kind: Kind) -> Walk:
    """Return the walk over the list of *kind* at its start."""
    return Walk(Listed(world.account, world.livemode, kind.name), audit.kept.begun - in_flight.SETTLED)


def ids_of(objects: Sequence[Answer]) -> list[str]:
    """Return the ids that a row can have: files and PostgreSQL take neither half of a surrogate pair nor a NUL."""
    return [each.id for each in objects if each.id is not None and each.id.isprintable()]


def step_of(kind: Kind, walk: Walk, **values: Any) -> Step:  # noqa: ANN401 - of a step's own
    """Return a step of *walk* with these *values*."""
    world = (walk.tally.account, walk.tally.livemode)
    return Step(*world, kind.name, {}, **values)


def taken(audit: Audit, walk: Walk, step: Step, found: Sequence[Difference]) -> Sequence[Difference]:
    """Keep a *step* with the differences *found*, let the walk go on by it, and return the new ones."""
    add_up(walk.tally, found)
    step.tally = dict(walk.uncounted)
    walk.kept.update(step.tally)
    audit.kept.add(step, found, now=audit.context.now())
    audit.shown.listed(step.tally.get("listed", 0))
    walk.take(step)
    return walk.news(found)


def add_up(tally: Listed, found: Sequence[Difference]) -> None:
    """Count the differing rows in *tally*, each once."""
    for kind, _, __ in {(each.kind, each.table, each.id) for each in found}:
        setattr(tally, kind, getattr(tally, kind) + 1)
