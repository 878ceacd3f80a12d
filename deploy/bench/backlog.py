"""A backlog of mixed events, folded by one worker and by two: what they wait for, and how many locks a batch takes.

The locks are looked at while the workers fold, on a connection of its own: see schemas/locks.py.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import psycopg

from deploy.bench import events
from deploy.bench.figures import SEED, Announce, Sizes
from deploy.bench.report import Figure, Run
from deploy.bench.stand import SECOND_WORKER, Site, Stand
from schemas import locks

NAME: Final = "backlog"
LOOK_SECONDS: Final = 0.02
PERCENT: Final = 100


@dataclass(slots=True)
class Seen:
    """The sum over many looks of the *batches* that were seen, and of those that *held* a lock or waited for one.

    *entries* is the most that one batch had in the lock table.
    """

    batches: int = 0
    held: int = 0
    waits_to_append: int = 0
    waits_for_objects: int = 0
    entries: int = 0

    def add(self, batches: int, held: int, waits_to_append: int, waits_for_objects: int, entries: int) -> None:
        """Add what one look at the locks has shown."""
        self.batches += batches
        self.held += held
        self.waits_to_append += waits_to_append
        self.waits_for_objects += waits_for_objects
        self.entries = max(self.entries, entries)


@dataclass(slots=True)
class Folded:
    """A backlog that was folded at a *rate* of events a second."""

    rate: float
    seen: Seen


def backlog(site: Site, sizes: Sizes, announce: Announce) -> list[Figure]:
    """Measure how one worker and two fold the same backlog, in turns."""
    bodies = events.take(events.history(SEED + 5, payments=True), sizes.history)
    ones: list[Folded] = []
    twos: list[Folded] = []
    for run in range(sizes.runs):
        for kept, workers in ((ones, ("worker",)), (twos, ("worker", SECOND_WORKER))):
            announce(f"backlog of {len(bodies):,} events, {len(workers)} of 2 workers, run {run + 1} of {sizes.runs}")
            with site.stand() as stand:
                kept.append(_fold(stand, bodies, workers))
    return figures_of(ones, twos)


def _fold(stand: Stand, bodies: Sequence[bytes], workers: Sequence[str]) -> Folded:
    stand.run(*workers)
    count = events.record(stand.engine, bodies)
    with Watch(stand.settings.libpq) as watch:
        for _ in workers[1:]:
            stand.wake()
        seconds = stand.seconds_to_fold()
    return Folded(count / seconds, watch.seen)


class Watch:
    """Looks at the locks of the folding sessions, until the block ends."""

    def __init__(self, libpq: str) -> None:
        self.seen = Seen()
        self._libpq = libpq
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="locks", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        with psycopg.connect(self._libpq, autocommit=True) as connection:
            while not self._is_over.wait(LOOK_SECONDS):
                look(connection, self.seen)


def look(connection: "psycopg.Connection[tuple[int, ...]]", seen: Seen) -> None:
    """Add to *seen* what the folding sessions hold and wait for at this moment."""
    seen.add(*(connection.execute(_LOOK).fetchone() or ()))


# Locks of the fast path take no entry of the table that all sessions share.
_LOOK: Final = f"""
WITH held AS MATERIALIZED (
    SELECT pid, granted, fastpath,
        CASE locktype WHEN 'advisory' THEN classid::bigint << 32 | objid::bigint END AS number
    FROM pg_locks
    WHERE pid <> pg_backend_pid() AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
), names AS (
    SELECT {locks.FOLDING} AS folding, {locks.APPENDING} AS appending
)
SELECT count(*) FILTER (WHERE number = folding AND granted)::int,
    count(*) FILTER (WHERE number = appending AND granted)::int,
    count(*) FILTER (WHERE number = appending AND NOT granted)::int,
    count(*) FILTER (WHERE number NOT IN (folding, appending) AND NOT granted)::int,
    coalesce((SELECT max(entries) FROM (
        SELECT count(*) FILTER (WHERE NOT fastpath) AS entries FROM held GROUP BY pid
    ) AS each), 0)::int
FROM held CROSS JOIN names
"""  # noqa: S608 - of our own constants


def figures_of(ones: Sequence[Folded], twos: Sequence[Folded]) -> list[Figure]:
    """Return the figures of two workers, with one worker as their limit."""

    def figure(name: str, title: str, unit: str, of: Iterable[Sequence[float]], note: str = "") -> Figure:
        runs = tuple(Run(two, one) for one, two in of)
        return Figure(
            name=f"{NAME}_{name}" if name else NAME,
            title=title,
            unit=unit,
            runs=runs,
            limit_name="one worker",
            note=note,
        )

    pairs = list(zip(ones, twos, strict=True))

    def share(name: str, title: str, part: Callable[[Seen], int], note: str = "") -> Figure:
        of = [tuple(PERCENT * part(each.seen) / max(each.seen.batches, 1) for each in pair) for pair in pairs]
        return figure(name, f"of a batch's time it {title}", "%", of, note)

    return [
        figure("", "two workers fold a backlog", "/s", [(one.rate, two.rate) for one, two in pairs]),
        share(
            "append",
            "holds the lock to append",
            lambda seen: seen.held,
            "a worker folds in two processes; with 100 % divided by this share of them the lock is always held",
        ),
        share("append_waits", "waits for the lock to append", lambda seen: seen.waits_to_append),
        share("object_waits", "waits for the lock of an object", lambda seen: seen.waits_for_objects),
        figure(
            "entries",
            "entries of a batch in the lock table, at most",
            "",
            [(one.seen.entries, two.seen.entries) for one, two in pairs],
        ),
    ]
