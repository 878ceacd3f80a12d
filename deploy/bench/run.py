"""A whole run: which figures are measured, how much of each, and what an interrupted run has left to do."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from random import SystemRandom
from typing import Final

import msgspec
from msgspec import Struct, structs

from deploy.bench import backlog, events, figures
from deploy.bench.figures import Announce, Sizes
from deploy.bench.pages import pages
from deploy.bench.report import Figure, Run, Target
from deploy.bench.stand import Site, Stand
from schemas.errors import ConfigurationError, ConflictError

QUICK: Final = Sizes(
    runs=1,
    acks=5_000,
    plain_acks=500,
    latency_seconds=2,
    fold=5_000,
    plain_tasks=400,
    delivered_seconds=3,
    history=20_000,
    replayed=5_000,
    idle_seconds=5,
    reads=200,
    credit_notes=5_000,
)
USUAL: Final = Sizes(
    runs=3,
    acks=15_000,
    plain_acks=1_000,
    latency_seconds=4,
    fold=20_000,
    plain_tasks=1_000,
    delivered_seconds=5,
    history=100_000,
    replayed=20_000,
    idle_seconds=10,
    reads=300,
    credit_notes=40_000,
)
SMALL_EVENTS: Final = 100_000
"""Events in the short history against which a long one is measured."""
GROWN_BACKLOG: Final = 200_000
"""Events that are folded, or replayed, at a time into a short and a long history, and at most a tenth of the long one.

PostgreSQL logs all of a page that it changes for the first time after a checkpoint. With many more events than pages of
an index, as between two real checkpoints, these first times are a part of the measured time and not all of it.
"""
GROWN_TURNS: Final = 2
"""Times that each is done, on a short history of its own."""
SHOP_EVENTS_MIN: Final = 20_000
"""A shop of the history has at least so many events."""
FULL_EVENTS: Final = 3_000_000
DISK_BYTES_PER_EVENT: Final = 6_500
THIN_BYTES_PER_EVENT: Final = 5_500
"""What an event takes of the disk in all: payload, envelope, rows and indexes, and a rebuild's second set of rows."""
DISK_SPARE: Final = 1.1
GROWN: Final = "grown"
SHORT: Final = "short"

NAMES: Final = (
    *("acks", "latency", "fold", "delivered", "rebuild", "replay", "reads", "pages", "idle", "credit_notes"),
    *("backlog", "growth"),
)
"""What ``--only`` takes; ``growth`` is part of a full run alone, and ``backlog`` of none."""

GROWTH: Final = Target(0.9)
PASSES: Final = Target(1.5, at_least=False)


class _Plan(Struct, frozen=True):
    """The run that the steps in a folder belong to."""

    mode: str
    events: int
    is_thin: bool = False


class _Step(Struct, frozen=True):
    step: str
    figures: list[Figure] = []
    events: int = 0


@dataclass(slots=True)
class Steps:
    """The steps that are finished, by name; a *path* keeps them for a run that is interrupted."""

    path: Path | None = None
    _done: dict[str, _Step] = field(default_factory=dict)

    @classmethod
    def kept_in(cls, path: Path, *, mode: str, count: int, is_thin: bool = False) -> "Steps":
        """Return the steps that are kept at *path*, which belong to a run of this *mode* with *count* events.

        Raises:
            ConfigurationError: the steps belong to another run.
        """
        plan = _Plan(mode, count, is_thin)
        if not path.exists():
            path.write_bytes(msgspec.json.encode(plan) + b"\n")
            return cls(path)
        # A line without an end was being written when the run was killed.
        whole = path.read_bytes().rpartition(b"\n")[0]
        path.write_bytes(whole + b"\n")
        first, *others = whole.splitlines()
        if msgspec.json.decode(first, type=_Plan) != plan:
            raise ConfigurationError(
                f"--keep: {path.parent} holds another run. Name another folder, or repeat that run."
            )
        done = [msgspec.json.decode(line, type=_Step) for line in others]
        return cls(path, {each.step: each for each in done})

    def figures(self, step: str, measure: Callable[[], list[Figure]]) -> list[Figure]:
        """Return the figures of *step*, measured now unless they are there."""
        if step not in self._done:
            self._add(_Step(step, figures=measure()))
        return self._done[step].figures

    def count(self, step: str, work: Callable[[], int]) -> int:
        """Return the events of *step*, made now unless they are there."""
        if step not in self._done:
            self._add(_Step(step, events=work()))
        return self._done[step].events

    def _add(self, step: _Step) -> None:
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(msgspec.json.encode(step) + b"\n")
        self._done[step.step] = step


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of the command: *only* is the one figure that is wanted, "" for all; *is_thin* grows on less disk."""

    site: Site
    sizes: Sizes
    steps: Steps
    announce: Announce
    only: str = ""
    is_thin: bool = False

    def wants(self, *names: str) -> bool:
        """Return whether one of *names* is to be measured."""
        return not self.only or self.only in names

    def usual(self) -> list[Figure]:
        """Measure everything on small histories."""
        found = self._on_empty_tables()
        if self.wants("rebuild", "reads", "pages"):
            found += self.steps.figures("history", self._history)
        if self.wants("replay"):
            found += self.steps.figures("replay", lambda: figures.replay(self.site, self.sizes, self.announce))
        return self._wanted(found)

    def full(self, count: int) -> list[Figure]:
        """Measure everything, and how it changes while the inbox grows to *count* events."""
        found = self._on_empty_tables()
        if self.wants("rebuild", "replay", "reads", "pages", "growth"):
            found += self._grow(min(SMALL_EVENTS, count), count)
        return self._wanted(found)

    def _wanted(self, found: list[Figure]) -> list[Figure]:
        return [each for each in found if not self.only or each.name.startswith(_PREFIXES[self.only])]

    def _on_empty_tables(self) -> list[Figure]:
        measured: tuple[tuple[str, Callable[[Site, Sizes, Announce], list[Figure]]], ...] = (
            ("acks", figures.acks),
            ("fold", figures.fold),
            ("delivered", figures.delivered),
            ("credit_notes", figures.credit_notes),
        )
        found = []
        for name, measure in measured:
            if self.wants(name, *_BESIDE.get(name, ())):
                found += self.steps.figures(name, partial(measure, self.site, self.sizes, self.announce))
        if self.only == backlog.NAME:
            found += backlog.backlog(self.site, self.sizes, self.announce)
        return found

    def _history(self) -> list[Figure]:
        count = self.sizes.history
        self.announce(f"fold rate of {count:,} mixed events")
        with self.site.stand() as stand:
            found = [figures.load_history(stand, count)]
            if self.wants("rebuild"):
                found += figures.rebuild(stand, self.sizes.runs, self.announce)
            if self.wants("reads"):
                found += figures.reads(stand, self.sizes, self.announce)
            if self.wants("pages"):
                self.announce("pages")
                found += pages(stand)
        return found

    # ---- Growing ----

    def _grow(self, few: int, many: int) -> list[Figure]:
        """Let an inbox grow to *many* events, and measure it against one of *few*; measuring adds some to both."""
        with self.site.stand(GROWN, is_kept=True) as growing:
            self._fill(growing, few)
        with ExitStack() as stack:
            short, *copies = [
                stack.enter_context(self.site.stand(name, template=template, is_kept=True))
                for name, template in ((SHORT, GROWN), *((f"{SHORT}_{turn}", SHORT) for turn in range(2 * GROWN_TURNS)))
            ]
            growing = stack.enter_context(self.site.stand(GROWN, is_kept=True))
            self._fill(growing, many)
            growing.run()
            return self._next_to(short, copies, few, growing, many)

    def _fill(self, stand: Stand, count: int) -> None:
        """Record a history until *count* events are in the inbox, and fold it; what an interrupted run did counts."""
        held, number = 0, 0
        while held < count:
            add = partial(self._add_shop, stand, number, held, count)
            held += self.steps.count(f"shop {number} up to {count}", add)
            number += 1
        self.steps.count(f"folded up to {count}", partial(self._fold_all, stand, count))

    def _add_shop(self, stand: Stand, number: int, held: int, count: int) -> int:
        """Record the events of one shop, or as many as are wanted; return how many they are.

        The worker folds in the same time, since recording keeps one core busy.
        """
        self.announce(f"recording: {held:,} of {count:,} events")
        bodies = islice(next(events.shops(figures.SEED + 4, payments=True, first_shop=number)), count - held)
        stand.start("worker")
        added = events.record(stand.engine, events.thinned(bodies) if self.is_thin else bodies)
        stand.wake()
        return added

    def _fold_all(self, stand: Stand, count: int) -> int:
        """Have everything that is recorded folded; return the most that this can have been."""
        self.announce(f"folding up to {count:,} events")
        stand.start("worker")
        stand.seconds_to_fold()
        return count

    def _next_to(self, short: Stand, copies: list[Stand], few: int, grown: Stand, many: int) -> list[Figure]:
        """Measure everything with *few* events and with *many* in turn: the machine may change within the hour.

        A figure that takes long with a long history is measured there once, between two runs on the short one. What
        adds many events has one of *copies* of the short history for each turn. No database is made or dropped in
        between: that forces a checkpoint, after which each page is logged whole once more.
        """
        # Events that were sent before an interruption may not be sent again.
        seed = SystemRandom().randrange(10**9)
        # Of shops behind all that are in the inbox, since a new id lies behind all others in its index.
        shop = many // SHOP_EVENTS_MIN
        mixed = events.history(seed, payments=True, first_shop=shop)
        sold = events.history(seed + 1, payments=False, first_shop=shop)
        once = replace(self.sizes, runs=1)
        backlog_events = min(GROWN_BACKLOG, many // 10)
        found = []
        for name, turns, measure in (
            ("passes", self.sizes.runs, _passes),
            ("reads", self.sizes.runs, lambda stand: figures.reads(stand, once, self.announce)),
            ("pages", 1, pages),
            ("replay", GROWN_TURNS, lambda stand: [figures.replay_into(stand, mixed, backlog_events)]),
            ("fold", GROWN_TURNS, lambda stand: _fold(stand, sold, backlog_events)),
            ("acks", self.sizes.runs, lambda stand: figures.acks_on(stand, once, self.announce, mixed, alone=True)),
            ("delivered", self.sizes.runs, lambda stand: figures.delivered_on(stand, once, self.announce, mixed)),
            ("rebuild", 1, lambda stand: figures.rebuild(stand, 1, self.announce)),
        ):
            shorts: list[list[Figure]] = []
            longs: list[list[Figure]] = []
            for turn in range(turns):
                small = copies.pop() if name in ("replay", "fold") else short
                for stand, length, count, kept in ((small, SHORT, few, shorts), (grown, GROWN, many, longs)):
                    self.announce(f"{name} at {count:,} events, turn {turn + 1} of {turns}")
                    work = partial(_warmed, measure) if length == GROWN and name in _WRITES else measure
                    kept.append(self.steps.figures(f"{name}, {length}, turn {turn}", partial(work, stand)))
                    stand.run()
            if turns == 1:
                self.announce(f"{name} at {few:,} events, again")
                shorts.append(self.steps.figures(f"{name}, {SHORT}, again", partial(measure, short)))
                short.run()
            found += [figure for figure in _together(longs) if figure.name not in _COMPARED]
            found += compared(shorts, longs)
        return found


_PASSES: Final = ("sweep", "expiry")
_COMPARED: Final = frozenset(("acks", "latency_p50", "latency_p99", "fold", "delivered_p50", "delivered_p99", *_PASSES))
"""Figures that are measured on a long history only to be compared with a short one."""
_NOT_COMPARED: Final = ("rebuild_quick",)
_TARGETS: Final = {"sweep": PASSES, "expiry": PASSES}
_BESIDE: Final = {"acks": ("latency",), "delivered": ("idle",)}
"""Other figures that are measured with a figure, since they need the same processes."""
_PREFIXES: Final = {
    **{name: (name,) for name in NAMES},
    "fold": ("fold", "commit"),
    "reads": ("read_", "search"),
}


_WRITES: Final = ("replay", "fold", "acks", "delivered")


def _warmed(measure: Callable[[Stand], list[Figure]], stand: Stand) -> list[Figure]:
    """Measure a *stand* once its indexes are in memory again, from which another history's turn has pushed them."""
    figures.warm(stand)
    return measure(stand)


def _fold(stand: Stand, bodies: Iterator[bytes], count: int) -> list[Figure]:
    stand.run("worker")
    stand.seconds_to_fold()  # what an interrupted run left
    rate = figures.fold_rate(stand, events.take(bodies, count))
    return [Figure(name="fold", title="fold rate", unit="/s", runs=(Run(rate),))]


def _passes(stand: Stand) -> list[Figure]:
    taken = figures.passes(stand)
    return [
        Figure(name=name, title=f"a pass of the {name}", unit="ms", runs=(Run(taken[name] * 1000),)) for name in _PASSES
    ]


def _together(several: Sequence[list[Figure]]) -> list[Figure]:
    """Return each figure once, with the runs of all *several* times that it was measured."""
    return [
        structs.replace(same[0], runs=tuple(run for figure in same for run in figure.runs))
        for same in zip(*several, strict=True)
    ]


def compared(shorts: Sequence[list[Figure]], longs: Sequence[list[Figure]]) -> list[Figure]:
    """Return how each figure changes with a long history, pair by pair: the ratio of the rates, or of the costs.

    One of *longs* may be compared with several of *shorts*.
    """
    longs = [longs[0]] * len(shorts) if len(longs) == 1 else longs
    found = []
    for few, many in zip(zip(*shorts, strict=True), zip(*longs, strict=True), strict=True):
        pairs = [(now.measured, was.measured) for now, was in zip(many, few, strict=True)]
        runs = tuple(Run(now, was) for now, was in pairs if now is not None and was is not None)
        figure = many[0]
        if not runs or figure.name in _NOT_COMPARED:
            continue
        is_rate = figure.unit == "/s"
        found.append(
            Figure(
                name=f"growth_{figure.name}",
                title=f"growth: {figure.title}",
                unit="/s" if is_rate else figure.unit,
                runs=runs,
                limit_name="with a short history",
                target=GROWTH if is_rate else _TARGETS.get(figure.name),
            )
        )
    return found


def require_disk(
    folder: Path,
    count: int,
    *,
    is_thin: bool = False,
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> str:
    """Return how much disk a full run of *count* events needs in *folder*, in words.

    Raises:
        ConflictError: the disk has less.
    """
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    need = int(count * (THIN_BYTES_PER_EVENT if is_thin else DISK_BYTES_PER_EVENT) * DISK_SPARE)
    left = free(folder) + held
    words = f"{count:,} events need about {_gb(need)} of disk in {folder}"
    if left < need:
        raise ConflictError(
            f"{words}, and {_gb(left)} are there: name another folder with --keep, --thin, or fewer --events."
        )
    return f"{words}; {_gb(left)} are there."


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
