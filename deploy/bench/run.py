"""A whole run: which figures are measured, how much of each, and what an interrupted run has left to do."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from random import SystemRandom
from typing import Final

import msgspec
from msgspec import Struct

from deploy.bench import events, figures
from deploy.bench.figures import Sizes, Tell
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
)
SMALL_EVENTS: Final = 100_000
"""The history beside which a long one is measured."""
FULL_EVENTS: Final = 3_000_000
DISK_BYTES_PER_EVENT: Final = 6_000
DISK_SPARE: Final = 1.6
GROWN: Final = "grown"

NAMES: Final = ("acks", "latency", "fold", "delivered", "rebuild", "replay", "reads", "idle", "growth")
"""What ``--only`` takes; ``growth`` is part of a full run alone."""

GROWTH: Final = Target(0.85)
PASSES: Final = Target(1.5, at_least=False)
SAME_MEMORY: Final = Target(1.25, at_least=False)


class _Plan(Struct, frozen=True):
    """What a folder's steps belong to."""

    mode: str
    events: int


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
    def kept_in(cls, path: Path, *, mode: str, count: int) -> "Steps":
        """Return the steps that are kept at *path*, which belong to a run of this *mode* with *count* events.

        Raises:
            ConfigurationError: they belong to another.
        """
        plan = _Plan(mode, count)
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
    """One run of the command: *only* is the one figure that is wanted, "" for all."""

    site: Site
    sizes: Sizes
    steps: Steps
    tell: Tell
    only: str = ""

    def wants(self, *names: str) -> bool:
        """Tell whether one of *names* is to be measured."""
        return not self.only or self.only in names

    def usual(self) -> list[Figure]:
        """Measure everything on small histories."""
        found = self._on_empty_tables()
        if self.wants("rebuild", "reads"):
            found += self.steps.figures("history", self._history)
        if self.wants("replay"):
            found += self.steps.figures("replay", lambda: figures.replay(self.site, self.sizes, self.tell))
        return self._wanted(found)

    def full(self, count: int) -> list[Figure]:
        """Measure everything, and what becomes of it while the inbox grows to *count* events."""
        found = self._on_empty_tables()
        if self.wants("rebuild", "replay", "reads", "growth"):
            small, large = self._grow(min(SMALL_EVENTS, count), count)
            found += [each for each in large if each.name not in _COMPARED]
            found += grown(small, large)
        return self._wanted(found)

    def _wanted(self, found: list[Figure]) -> list[Figure]:
        return [each for each in found if not self.only or each.name.startswith(_PREFIXES[self.only])]

    def _on_empty_tables(self) -> list[Figure]:
        measured: tuple[tuple[str, Callable[[Site, Sizes, Tell], list[Figure]]], ...] = (
            ("acks", figures.acks),
            ("fold", figures.fold),
            ("delivered", figures.delivered),
        )
        found = []
        for name, measure in measured:
            if self.wants(name, *_BESIDE.get(name, ())):
                found += self.steps.figures(name, partial(measure, self.site, self.sizes, self.tell))
        return found

    def _history(self) -> list[Figure]:
        count = self.sizes.history
        self.tell(f"fold rate of {count:,} mixed events")
        with self.site.stand() as stand:
            found = [figures.load_history(stand, count)]
            if self.wants("rebuild"):
                found += figures.rebuild(stand, self.sizes.runs, self.tell)
            if self.wants("reads"):
                found += figures.reads(stand, self.sizes, self.tell)
        return found

    # ---- Growing ----

    def _grow(self, few: int, many: int) -> tuple[list[Figure], list[Figure]]:
        with self.site.stand(GROWN, is_kept=True) as stand:
            self._fill(stand, few)
        # A copy, since measuring adds events of its own.
        with self.site.stand(template=GROWN) as copy:
            small = self._at_size(copy, few)
        with self.site.stand(GROWN, is_kept=True) as stand:
            self._fill(stand, many)
            return small, self._at_size(stand, many)

    def _fill(self, stand: Stand, count: int) -> None:
        """Record a history until *count* events are in the inbox and folded; what an interrupted run did counts."""
        held, number = 0, 0
        while held < count:
            add = partial(self._add_shop, stand, number, held, count)
            held += self.steps.count(f"shop {number} up to {count}", add)
            number += 1

    def _add_shop(self, stand: Stand, number: int, held: int, count: int) -> int:
        """Record the events of one shop, or as many as are wanted, and have them folded; return how many they are."""
        self.tell(f"filling: {held:,} of {count:,} events")
        stand.run("worker")
        bodies = next(events.shops(figures.SEED + 4, payments=True, first_shop=number))
        added = events.record(stand.engine, islice(bodies, count - held))
        stand.seconds_to_fold()
        return added

    def _at_size(self, stand: Stand, count: int) -> list[Figure]:
        """Measure on *stand*, which holds *count* events or some more."""
        # Events that were sent before an interruption may not be sent again.
        seed = SystemRandom().randrange(10**9)
        mixed = events.history(seed, payments=True)
        found = []
        for name, measure in (
            ("passes", partial(_passes, stand, self.sizes)),
            ("rebuild", partial(figures.rebuild, stand, 1, self.tell)),
            ("replay", lambda: [figures.replay_of(self.site, stand, 1, self.tell)]),
            ("reads", partial(figures.reads, stand, self.sizes, self.tell)),
            ("fold", partial(_fold, stand, self.sizes, self.tell, seed + 1)),
            ("acks", partial(figures.acks_on, stand, self.sizes, self.tell, mixed, alone=True)),
            ("delivered", partial(figures.delivered_on, stand, self.sizes, self.tell, mixed)),
        ):
            self.tell(f"{name} at {count:,} events")
            found += self.steps.figures(f"{name} at {count}", measure)
        return found


_PASSES: Final = ("sweep", "expiry")
_COMPARED: Final = frozenset(("acks", "latency_p50", "latency_p99", "fold", "delivered_p50", "delivered_p99", *_PASSES))
"""What is measured on a long history only to be held against a short one."""
_NOT_COMPARED: Final = ("rebuild_quick",)
_TARGETS: Final = {"sweep": PASSES, "expiry": PASSES, "rebuild_memory": SAME_MEMORY}
_BESIDE: Final = {"acks": ("latency",), "delivered": ("idle",)}
"""What else is measured with a figure, since the same processes are wanted."""
_PREFIXES: Final = {
    **{name: (name,) for name in NAMES},
    "fold": ("fold", "commit"),
    "reads": ("read_",),
}


def _fold(stand: Stand, sizes: Sizes, tell: Tell, seed: int) -> list[Figure]:
    bodies = events.history(seed, payments=False)
    stand.run("worker")
    stand.seconds_to_fold()  # what an interrupted run left
    runs = []
    for run in range(sizes.runs):
        tell(f"fold rate, run {run + 1} of {sizes.runs}")
        runs.append(Run(figures.fold_rate(stand, events.take(bodies, sizes.fold))))
    return [Figure(name="fold", title="fold rate", unit="/s", runs=tuple(runs))]


def _passes(stand: Stand, sizes: Sizes) -> list[Figure]:
    found = [figures.passes(stand) for _ in range(sizes.runs)]
    return [
        Figure(
            name=name, title=f"a pass of the {name}", unit="ms", runs=tuple(Run(each[name] * 1000) for each in found)
        )
        for name in _PASSES
    ]


def grown(small: list[Figure], large: list[Figure]) -> list[Figure]:
    """Return what became of each figure while the inbox grew: the ratio of its rates, or of what it takes."""
    before = {figure.name: figure for figure in small}
    found = []
    for figure in large:
        was, now = _comparable(before[figure.name]), _comparable(figure)
        if was is None or now is None or figure.name in _NOT_COMPARED:
            continue
        is_rate = figure.unit == "/s" or figure.name == "replay"
        found.append(
            Figure(
                name=f"growth_{figure.name}",
                title=f"growth: {figure.title}",
                unit="/s" if is_rate else figure.unit,
                runs=(Run(now, was),),
                limit_name="with a short history",
                target=GROWTH if is_rate else _TARGETS.get(figure.name),
            )
        )
    return found


def _comparable(figure: Figure) -> float | None:
    """Return what is measured, where that does not depend on how much there was to do."""
    if figure.name == "replay":
        return _events(figure) / figure.measured if figure.measured else None
    return figure.measured


def _events(figure: Figure) -> float:
    return float(figure.runs[0].detail["events"])


def require_disk(
    folder: Path, count: int, *, free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
) -> str:
    """Return how much disk a full run of *count* events needs in *folder*, in words.

    Raises:
        ConflictError: so much is not there.
    """
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    need = int(count * DISK_BYTES_PER_EVENT * DISK_SPARE)
    left = free(folder) + held
    words = f"{count:,} events need about {_gb(need)} of disk in {folder}"
    if left < need:
        raise ConflictError(f"{words}, and {_gb(left)} are there: name another folder with --keep, or fewer --events.")
    return f"{words}; {_gb(left)} are there."


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
