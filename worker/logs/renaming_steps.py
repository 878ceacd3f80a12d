"""The steps of a rename, each a transaction that can be repeated: see logs/renaming.py."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final

import psycopg
from sqlalchemy import Engine

from schemas import database, tables
from schemas.accounts import shown
from schemas.database import Cursor, integer_array
from schemas.errors import ConflictError
from schemas.locks import keep_others_from_appending, keep_others_from_folding
from schemas.progress import Progress
from worker.folding import order_refunds, projection
from worker.folding.batch import Claimed
from worker.folding.changes import append_changes
from worker.folding.claim import claim
from worker.logs.renamed_events import (
    RELABEL_MENTIONS,
    SET_ASIDE,
    EventKey,
    archived_of,
    arrays_of,
    both_of,
    events_of,
    folded_of,
    join_pairs,
    move_renderings,
    next_objects,
    pairs_of,
    with_neighbours,
)
from worker.logs.renamed_rows import ANOMALIES, BOUNDS, CHANGES, JOBS, ROWS_AT_ONCE, SUMS, mover_of

OBJECTS_AT_ONCE: Final = 500
TRIES_MAX: Final = 40


def retrying(engine: Engine, step: Callable[[Cursor], None], *, prepare: Callable[[], None] = lambda: None) -> None:
    """Take *step* in a transaction, after *prepare*, and try both again if another transaction conflicts.

    There is a conflict if two transactions wait for each other, or if an event that the step relabels has just arrived
    under the new name.
    """
    for _ in range(TRIES_MAX):
        prepare()
        try:
            with database.transaction(engine) as connection, database.cursor(connection) as cursor:
                step(cursor)
        except (psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation):
            time.sleep(random.uniform(0, 0.05))  # noqa: S311 - jitter
        else:
            return
    raise ConflictError(
        f"Others were in the way {TRIES_MAX} times over. Run the same command again: what is done stays done. Where"
        " `payfold status` shows that the rename is begun, events of both names wait until it is finished."
    )


def archive_wanted(archived: Sequence[int], names: Mapping[str, str], *, is_begun: bool) -> ConflictError:
    """Return the error that *archived* events are needed, and the command that brings them back."""
    old, new = shown(names["old"]), shown(names["new"])
    command = f"`payfold accounts rename {old} {new} --archive DIR --yes`"
    state = (
        f"The rename is begun, and events of both names wait until it is finished: {command} ends it."
        if is_begun
        else f"Nothing has changed: {command} brings them back."
    )
    return ConflictError(
        f"{len(archived):,} events of objects that both names have are archived, and these objects are to be folded"
        f" again. {state}"
    )


class RenamingSteps:
    """The steps of one rename, each of which can be repeated without harm, and their counts."""

    def __init__(self, old: str, new: str, now: datetime, total: int, progress: Progress, objects_at_once: int) -> None:
        self.counts = Counter[str]()
        """How many events the steps ``moved`` and ``joined``, and how many changes they ``withheld``."""
        self._names = {"old": old, "new": new}
        self._now = now
        self._total = total
        self._progress = progress
        self._limit = objects_at_once
        self._rows = 0
        # Events up to this one are done. A search from the start would have to step over their dead rows each time.
        self._after: EventKey = (False, "")

    def take(self, engine: Engine, step: Callable[[Cursor], None]) -> None:
        """Take *step*, and count its effects once, however often it is tried."""
        before = self.counts.copy()

        def prepare() -> None:
            self.counts = before.copy()

        def take(cursor: Cursor) -> None:
            # Archiving waits for this lock, too, before it drops payloads.
            keep_others_from_folding(cursor)
            step(cursor)

        retrying(engine, take, prepare=prepare)

    def steps(self) -> Iterator[Callable[[Cursor], None]]:
        """Yield the steps one by one; each has to be done before the next is asked for."""
        yield self._executing(JOBS)
        yield self._executing(ANOMALIES)
        for table in (tables.stripe_calls, tables.unsettled, *tables.PROJECTIONS):
            yield from self._again_and_again(mover_of(table))
        yield self._executing(SUMS)
        yield from self._changes()
        yield from self._again_and_again(self._move_some)
        yield self._finish

    def _again_and_again(self, step: "Callable[[Cursor, dict[str, str]], int]") -> Iterator[Callable[[Cursor], None]]:
        """Yield *step* until it has nothing more to do."""

        def once(cursor: Cursor) -> None:
            self._rows = step(cursor, self._names)

        self._rows = 1
        while self._rows:
            yield once

    def _executing(self, statements: Sequence[str]) -> Callable[[Cursor], None]:
        def execute(cursor: Cursor) -> None:
            for statement in statements:
                cursor.execute(statement, self._names)

        return execute

    def _changes(self) -> Iterator[Callable[[Cursor], None]]:
        bounds = [0, 0]

        def find(cursor: Cursor) -> None:
            cursor.execute(BOUNDS, self._names)
            bounds[:] = cursor.fetchone() or (0, -1)

        def move(cursor: Cursor) -> None:
            values = {**self._names, "first": bounds[0], "last": bounds[0] + ROWS_AT_ONCE - 1}
            for statement in CHANGES:
                cursor.execute(statement, values)
            bounds[0] += ROWS_AT_ONCE

        yield find
        while bounds[0] <= bounds[1]:
            yield move

    def _move_some(self, cursor: Cursor, names: dict[str, str]) -> int:
        """Relabel the events of some objects, fold again the objects of both names, and return how much was done."""
        objects, seqs, after = next_objects(cursor, names, self._after, self._limit)
        if not objects and not seqs:
            return 0
        objects = with_neighbours(cursor, names, objects, seqs)
        both = both_of(cursor, names, objects)
        if archived := archived_of(cursor, names, both):
            raise archive_wanted(archived, names, is_begun=True)
        seqs = [*seqs, *events_of(cursor, names, objects)]
        pairs = pairs_of(cursor, names["new"], seqs)
        again = join_pairs(cursor, pairs, names)
        values = {**names, **arrays_of(objects), "seqs": integer_array(seqs)}
        move_renderings(cursor, values)
        cursor.execute("UPDATE inbox SET account = %(new)s WHERE seq = ANY (%(seqs)s::bigint[])", values)
        cursor.execute(RELABEL_MENTIONS, values)
        self._fold(cursor, sorted({*again, *folded_of(cursor, names, both)}))
        self._after = after
        self.counts["joined"] += len(pairs)
        self.counts["moved"] += len(seqs)
        self._progress("Renaming", self.counts["moved"], max(self._total, self.counts["moved"]))
        return len(seqs) + len(objects)

    def _fold(self, cursor: Cursor, seqs: Sequence[int]) -> None:
        """Fold the events numbered *seqs* again, and withhold the changes that this makes."""
        if not seqs:
            return
        keep_others_from_appending(cursor)
        last = _last_change(cursor)
        cursor.execute(
            "INSERT INTO pending (seq, again) SELECT unnest(%s::bigint[]), true"
            " ON CONFLICT (seq) DO UPDATE SET again = true",
            (integer_array(seqs),),
        )
        for at in range(0, len(seqs), projection.FOLD_BATCH_MAX):
            self._fold_or_divide(cursor, seqs[at : at + projection.FOLD_BATCH_MAX])
        self._withhold(cursor, last)

    def _fold_or_divide(self, cursor: Cursor, seqs: Sequence[int]) -> None:
        """Fold *seqs*, and park each event that fails by itself because of its data: see ``projection.run_once``."""
        claimed: list[Claimed] = []
        try:
            with cursor.connection.transaction():
                claimed = claim(cursor, limit=len(seqs), only=seqs, though_renamed=True)
                projection.project(cursor, claimed, now=self._now)
        except Exception as error:
            failure = projection.failure_of(error)
            if not claimed or not failure.is_of_data:
                raise
            if len(seqs) == 1:
                projection.park(cursor, claimed[0], failure, now=self._now)
                return
            half = len(seqs) // 2
            self._fold_or_divide(cursor, seqs[:half])
            self._fold_or_divide(cursor, seqs[half:])

    def _withhold(self, cursor: Cursor, last: int) -> None:
        """Withhold the changes numbered above *last*; no one else could append any."""
        cursor.execute("UPDATE changes SET withheld = 'rename' WHERE seq > %s AND withheld IS NULL", (last,))
        self.counts["withheld"] += cursor.rowcount

    def _finish(self, cursor: Cursor) -> None:
        cursor.execute(SET_ASIDE, self._names)
        self._fold(cursor, [seq for (seq,) in cursor.fetchall()])
        keep_others_from_appending(cursor)
        last = _last_change(cursor)
        projection.settle_all(cursor, now=self._now, account=self._names["new"])
        append_changes(cursor, order_refunds.unannounced_of(cursor, self._names["new"]))
        self._withhold(cursor, last)
        cursor.execute(
            "DELETE FROM mentions AS m WHERE account = %(new)s AND NOT EXISTS"
            " (SELECT FROM inbox AS i WHERE i.seq = m.seq)",
            self._names,
        )
        cursor.execute("UPDATE account_names SET finished_at = %s WHERE finished_at IS NULL", (self._now,))


def _last_change(cursor: Cursor) -> int:
    cursor.execute("SELECT coalesce(max(seq), 0) FROM changes")
    (last,) = cursor.fetchone() or (0,)
    return int(last)
