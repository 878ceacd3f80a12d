"""Joins two names of one account: all that was recorded under the old name moves to the new one.

Note [A rename leaves one world]
    1. The new name is written while no one can record or fold (see Note [An account is recorded under its newest
       name]). From then on all deliveries are recorded under the new name. Until the rename is finished no one else
       folds events of either name (``claim.claim``), so that no fold sees half of an object.
    2. The rows of every table are relabelled. If both names have a row with the same key, the new name's row stays.
    3. Events are relabelled, some objects at a time. If both names have an event, it becomes one event with the copies
       of both, as if it had been recorded under one name. If both names have folded events of an object, the object is
       folded again, in the same transaction; the rows of other objects are right as they are. The changes that this
       makes are about the past, so they are withheld.
    4. Charges and refunds of one name may belong to orders of the other. The changes of these orders are withheld too.
       Then the rename is finished.

    Recording stops only while the name is written. All else is done in steps, each in a transaction. A step that was
    done before finds nothing to do, so the same command finishes a rename that was killed. Until then nothing is lost:
    events of the two names wait.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql
from sqlalchemy import Engine, Table

from schemas import accounts, database, inbox, tables
from schemas.accounts import shown
from schemas.database import Cursor, boolean_array, integer_array, text_array
from schemas.errors import ConfigurationError, ConflictError, NotFoundError
from schemas.locks import keep_others_from_appending, keep_others_from_folding, taken_in_time
from schemas.own_events import EVENT_IGNORED
from schemas.progress import Progress, do_nothing
from worker.folding import order_refunds, projection
from worker.folding.batch import Claimed
from worker.folding.changes import append_changes
from worker.folding.claim import claim
from worker.logs import restore

OBJECTS_AT_ONCE: Final = 500
ROWS_AT_ONCE: Final = 5_000
LOCK_SECONDS_MAX: Final = 1
"""How long one try waits for the processes that record; others wait behind it for as long."""
TRIES_MAX: Final = 40

MOVED: Final = (
    tables.inbox, tables.renderings, tables.mentions, tables.unsettled, tables.stripe_calls, tables.stripe_jobs,
    tables.anomalies, tables.changes, *tables.PROJECTIONS,
)  # fmt: skip
"""Every table that names an account."""

_Object = tuple[bool, str]
"""Mode and id of an object."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The effects that a rename would have.

    *events* and *orders* would be relabelled. *doubled* is how many events both names have. *objects* that have folded
    events of both names would be folded again. *archived* is how many of their events have archived payloads.
    """

    events: int
    orders: int
    doubled: int
    objects: int
    archived: int


@dataclass(frozen=True, slots=True)
class Renamed:
    """The effects of a rename: how many events it relabelled, how many it joined, and how many changes it withheld."""

    events: int
    joined: int
    withheld: int


# ---- What can be renamed ----


def plan(engine: Engine, old: str, new: str, *, is_one: bool = False) -> Plan:
    """Return the effects that renaming *old* to *new* by ``rename`` would have; nothing is written.

    Raises:
        ConfigurationError, ConflictError, NotFoundError: the rename makes no sense.
    """
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        _require_sense(cursor, old, new, is_one=is_one)
        names = {"old": old, "new": new}
        cursor.execute(_PLANNED, names)
        events, orders, doubled = cursor.fetchone() or (0, 0, 0)
        both = _all_of_both(cursor, names)
        return Plan(events, orders, doubled, len(both), len(_archived(cursor, names, both)))


_PLANNED: Final = """
SELECT (SELECT count(*) FROM inbox WHERE account = %(old)s), (SELECT count(*) FROM orders WHERE account = %(old)s),
    (SELECT count(*) FROM inbox AS o JOIN inbox AS n USING (livemode, id)
        WHERE o.account = %(old)s AND n.account = %(new)s)
"""


def _require_sense(cursor: Cursor, old: str, new: str, *, is_one: bool) -> None:
    if old == new:
        raise ConfigurationError("OLD and NEW are the same name.")
    renamed = accounts.names(cursor)
    cursor.execute(
        "SELECT old, new FROM account_names WHERE finished_at IS NULL AND (old, new) <> (%s, %s)", (old, new)
    )
    if unfinished := cursor.fetchone():
        one, other = map(shown, unfinished)
        raise ConflictError(
            f"The rename of {one} to {other} did not come to its end: `payfold accounts rename {one} {other} --yes`."
        )
    if renamed.get(old) == new:
        return
    if old in renamed:
        raise ConflictError(f"{shown(old)} is called {shown(renamed[old])} by now: rename that.")
    if renamed.get(new, old) != old:
        raise ConflictError(
            f"{shown(new)} is an old name of {shown(renamed[new])}, under which its events are recorded: rename"
            f" {shown(old)} to that."
        )
    if old and old not in {*accounts.known(cursor), *renamed.values()}:
        there = ", ".join(map(shown, accounts.known(cursor))) or "nothing at all"
        raise NotFoundError(f"Nothing is recorded under {shown(old)}. What is recorded is under: {there}.")
    _require_one_account(cursor, old, new, is_one=is_one)


def _require_one_account(cursor: Cursor, old: str, new: str, *, is_one: bool) -> None:
    """Raise ConflictError if deliveries under the two names are of two accounts, or may be, unless it *is_one*."""
    seen = accounts.look(cursor, (old, new))
    of_old, of_new = seen[old].own, seen[new].own
    if of_old and of_new and of_old.isdisjoint(of_new):
        raise ConflictError(
            f"Stripe's own events under {shown(old)} name {_listed(of_old)}, and those under {shown(new)} name"
            f" {_listed(of_new)}: these are two accounts, which never meet."
        )
    unknown = [shown(name) for name, its in seen.items() if not its.is_known]
    if unknown and not is_one and all(its.own or not its.is_known for its in seen.values()):
        raise ConflictError(
            f"Every delivery under {' and '.join(unknown)} that was looked at is archived, so whether the two names are"
            f" of one account is not known: `payfold accounts rename {shown(old)} {shown(new)} --archive DIR --yes`"
            " reads some of them. Where you know that they are, --same-account does without."
        )


def _listed(found: Iterable[str]) -> str:
    return ", ".join(sorted(found))


# ---- Renaming ----


def rename(
    engine: Engine,
    old: str,
    new: str,
    *,
    now: datetime,
    archive: Path | None = None,
    is_one: bool = False,
    progress: Progress = do_nothing,
    objects_at_once: int = OBJECTS_AT_ONCE,
) -> Renamed:
    """Rename *old* to *new*: see Note [A rename leaves one world].

    Archived payloads that are needed to fold an object again, or to find their account, are brought back from the logs
    in the folder *archive*. With *is_one* the operator states that the names are of one account, if no payload shows
    it.

    Raises:
        ConfigurationError, ConflictError, NotFoundError: the rename makes no sense, or payloads are archived and no
            *archive* is given, or other processes held a lock for too long. The message states whether the rename has
            begun, so that events of both names wait until the same command ends it, or nothing has changed.
    """
    _bring_back(engine, old, new, archive, is_one=is_one)
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("SELECT count(*) FROM inbox WHERE account = %s", (old,))
        (count,) = cursor.fetchone() or (0,)
    _retrying(engine, lambda cursor: _write_name(cursor, old, new, now, is_one=is_one))
    work = _Work(old, new, now, int(count), progress, objects_at_once)
    for step in work.steps():
        work.take(engine, step)
    return Renamed(work.counts["moved"], work.counts["joined"], work.counts["withheld"])


def _retrying(engine: Engine, step: Callable[[Cursor], None], *, prepare: Callable[[], None] = lambda: None) -> None:
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


def _bring_back(engine: Engine, old: str, new: str, archive: Path | None, *, is_one: bool) -> None:
    """Bring back the payloads that are needed from the *archive*, or raise ConflictError if there is none."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        is_begun = accounts.names(cursor).get(old) == new
        unread = [seq for its in accounts.look(cursor, (old, new)).values() for seq in its.archived]
    if unread and archive is not None and not is_begun:
        restore.bring_back(engine, unread, archive)
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        _require_sense(cursor, old, new, is_one=is_one)
        names = {"old": old, "new": new}
        archived = _archived(cursor, names, _all_of_both(cursor, names))
    if archived and archive is None:
        raise _wanted(archived, names, is_begun=is_begun)
    if archived and archive is not None:
        restore.bring_back(engine, archived, archive)


def _wanted(archived: Sequence[int], names: Mapping[str, str], *, is_begun: bool) -> ConflictError:
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


def _write_name(cursor: Cursor, old: str, new: str, now: datetime, *, is_one: bool) -> None:
    """Write the name while nothing is recorded or folded.

    Raises:
        ConflictError: recording did not pause in time; nothing has changed.
    """
    _pause(cursor)
    _require_sense(cursor, old, new, is_one=is_one)
    # Older names of OLD become names of NEW. If NEW was an old name itself, as in a rename back, it no longer is.
    cursor.execute("DELETE FROM account_names WHERE old = %s", (new,))
    cursor.execute("UPDATE account_names SET new = %s WHERE new = %s", (new, old))
    cursor.execute(
        "INSERT INTO account_names (old, new, renamed_at) VALUES (%s, %s, %s)"
        " ON CONFLICT (old) DO UPDATE SET finished_at = NULL",
        (old, new, now),
    )


def _pause(cursor: Cursor) -> None:
    def take() -> None:
        keep_others_from_folding(cursor)
        # The tables are in the order in which others write to them.
        cursor.execute("LOCK TABLE inbox, renderings, stripe_calls, stripe_jobs IN SHARE ROW EXCLUSIVE MODE")

    for _ in range(TRIES_MAX):
        if taken_in_time(cursor, take, seconds_max=LOCK_SECONDS_MAX):
            cursor.execute("SET LOCAL lock_timeout = 0")
            return
    raise ConflictError(
        "Those who record and fold did not pause in time: is a transaction left open? Nothing has changed; try again."
    )


class _Work:
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
        # Objects up to this one are done. A search from the start would have to step over their dead rows each time.
        self._after: _Object = (False, "")

    def take(self, engine: Engine, step: Callable[[Cursor], None]) -> None:
        """Take *step*, and count its effects once, however often it is tried."""
        before = self.counts.copy()

        def prepare() -> None:
            self.counts = before.copy()

        def take(cursor: Cursor) -> None:
            # Archiving waits for this lock, too, before it drops payloads.
            keep_others_from_folding(cursor)
            step(cursor)

        _retrying(engine, take, prepare=prepare)

    def steps(self) -> Iterator[Callable[[Cursor], None]]:
        """Yield the steps one by one; each has to be done before the next is asked for."""
        yield self._executing(_JOBS)
        yield self._executing(_ANOMALIES)
        for table in (tables.stripe_calls, tables.unsettled, *tables.PROJECTIONS):
            yield from self._again_and_again(_mover_of(table))
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
            cursor.execute(_BOUNDS, self._names)
            bounds[:] = cursor.fetchone() or (0, -1)

        def move(cursor: Cursor) -> None:
            values = {**self._names, "first": bounds[0], "last": bounds[0] + ROWS_AT_ONCE - 1}
            for statement in _CHANGES:
                cursor.execute(statement, values)
            bounds[0] += ROWS_AT_ONCE

        yield find
        while bounds[0] <= bounds[1]:
            yield move

    def _move_some(self, cursor: Cursor, names: dict[str, str]) -> int:
        """Relabel the events of some objects, fold again the objects of both names, and return how much was done."""
        objects, seqs = _next(cursor, names, self._after, self._limit)
        if not objects and not seqs:
            return 0
        after = objects[-1] if objects else self._after
        objects = _with_neighbours(cursor, names, objects, seqs)
        both = _both_of(cursor, names, objects)
        if archived := _archived(cursor, names, both):
            raise _wanted(archived, names, is_begun=True)
        seqs = [*seqs, *_events_of(cursor, names, objects)]
        pairs = _pairs(cursor, names["new"], seqs)
        again = _join(cursor, pairs, names)
        values = {**names, **_arrays(objects), "seqs": integer_array(seqs)}
        _move_renderings(cursor, values)
        cursor.execute("UPDATE inbox SET account = %(new)s WHERE seq = ANY (%(seqs)s::bigint[])", values)
        cursor.execute(_RELABEL_MENTIONS, values)
        self._fold(cursor, sorted({*again, *_folded_of(cursor, names, both)}))
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
        cursor.execute(_SET_ASIDE, self._names)
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


# ---- Rows ----


def _mover_of(table: Table) -> Callable[[Cursor, dict[str, str]], int]:
    """Return a function that relabels some rows of *table*, and drops rows that the new name has too."""
    keys = [column.name for column in table.primary_key if column.name != "account"]
    statement = sql.SQL(
        """
        WITH few AS MATERIALIZED (SELECT {keys} FROM {table} WHERE account = %(old)s ORDER BY {keys} LIMIT {limit}),
        doubled AS (
            DELETE FROM {table} AS t USING few AS s WHERE t.account = %(old)s AND {same}
                AND EXISTS (SELECT FROM {table} AS n WHERE n.account = %(new)s AND {same_as_new})
        ), moved AS (
            UPDATE {table} AS t SET account = %(new)s FROM few AS s WHERE t.account = %(old)s AND {same}
                AND NOT EXISTS (SELECT FROM {table} AS n WHERE n.account = %(new)s AND {same_as_new})
        )
        SELECT count(*) FROM few
        """
    ).format(
        table=sql.Identifier(table.name),
        keys=sql.SQL(", ").join(map(sql.Identifier, keys)),
        limit=sql.Literal(ROWS_AT_ONCE),
        same=_equal("t", "s", keys),
        same_as_new=_equal("n", "t", keys),
    )

    def move(cursor: Cursor, names: dict[str, str]) -> int:
        cursor.execute(statement, names)
        (count,) = cursor.fetchone() or (0,)
        return int(count)

    return move


def _equal(one: str, other: str, names: Sequence[str]) -> sql.Composed:
    pairs = (sql.SQL("{} = {}").format(sql.Identifier(one, name), sql.Identifier(other, name)) for name in names)
    return sql.SQL(" AND ").join(pairs)


# Each job is set back to the lesser progress of the two names, and looks again at all that comes after it. If a name
# has no row, its job had not begun: it has seen none of its changes, though the other name's job is past their numbers.
_JOBS: Final = (
    """
    INSERT INTO stripe_jobs (account, livemode, job)
    SELECT %(old)s, n.livemode, n.job FROM stripe_jobs AS n WHERE n.account = %(new)s AND n.job = 'fetch'
    ON CONFLICT DO NOTHING
    """,
    """
    UPDATE stripe_jobs AS n SET
        reached_at = CASE WHEN n.reached_at IS NOT NULL AND o.reached_at IS NOT NULL
            THEN least(n.reached_at, o.reached_at) END,
        reached_seq = CASE WHEN n.reached_seq IS NOT NULL THEN least(n.reached_seq, coalesce(o.reached_seq, (
            SELECT min(c.seq) - 1 FROM changes AS c WHERE (c.account, c.livemode) = (%(old)s, o.livemode)
        ))) END,
        done_at = greatest(n.done_at, o.done_at), found = n.found + o.found
    FROM stripe_jobs AS o
    WHERE n.account = %(new)s AND o.account = %(old)s AND (n.livemode, n.job) = (o.livemode, o.job)
    """,
    """
    DELETE FROM stripe_jobs AS o USING stripe_jobs AS n
    WHERE n.account = %(new)s AND o.account = %(old)s AND (n.livemode, n.job) = (o.livemode, o.job)
    """,
    "UPDATE stripe_jobs SET account = %(new)s, leased_until = NULL WHERE account = %(old)s",
)
# If an anomaly is in force under either name, it stays in force until its row is folded again.
_ANOMALIES: Final = (
    """
    UPDATE anomalies AS n SET
        resolved_at = CASE WHEN o.resolved_at IS NOT NULL THEN n.resolved_at END, seen_at = least(n.seen_at, o.seen_at)
    FROM anomalies AS o
    WHERE n.account = %(new)s AND o.account = %(old)s AND (n.livemode, n.id) = (o.livemode, o.id)
    """,
    """
    DELETE FROM anomalies AS o USING anomalies AS n
    WHERE n.account = %(new)s AND o.account = %(old)s AND (n.livemode, n.id) = (o.livemode, o.id)
    """,
    "UPDATE anomalies SET account = %(new)s WHERE account = %(old)s",
)
_BOUNDS: Final = "SELECT coalesce(min(seq), 0), coalesce(max(seq), -1) FROM changes WHERE account = %(old)s"
_ONE_SHOT: Final = f"""
o.seq BETWEEN %(first)s AND %(last)s AND o.account = %(old)s AND n.account = %(new)s
AND (n.livemode, n.subject, n.subject_id, n.kind) = (o.livemode, o.subject, o.subject_id, o.kind)
AND (
    n.kind IN ({", ".join(f"'{kind}'" for kind in tables.ONE_SHOT_KINDS)})
    OR n.kind = '{tables.DISPUTE_CLOSED}' AND n.after ->> 'status' = o.after ->> 'status'
)
"""
# If both names have a change that may happen only once, the one that was announced stays.
_CHANGES: Final = (
    f"DELETE FROM changes AS n USING changes AS o WHERE {_ONE_SHOT} AND n.withheld IS NOT NULL AND o.withheld IS NULL",
    f"DELETE FROM changes AS o USING changes AS n WHERE {_ONE_SHOT}",
    "UPDATE changes SET account = %(new)s WHERE seq BETWEEN %(first)s AND %(last)s AND account = %(old)s",
)


# ---- Events ----


def _arrays(objects: Sequence[_Object]) -> dict[str, str]:
    return {
        "modes": boolean_array(livemode for livemode, _ in objects),
        "objects": text_array([each for _, each in objects]),
    }


# Each key is one probe of an index: see Note [A row is found by its key, whatever the planner believes] in
# worker/folding/rows.py.
_OBJECTS: Final = "unnest(%(modes)s::boolean[], %(objects)s::text[]) AS k (livemode, object_id)"
_EVENTS: Final = """
(SELECT * FROM inbox WHERE account = ANY (ARRAY[{accounts}])
    AND (inbox.livemode, inbox.object_id) = (k.livemode, k.object_id) OFFSET 0) AS i
"""
_MENTIONS: Final = """
(SELECT * FROM mentions WHERE account = ANY (ARRAY[{accounts}])
    AND (mentions.livemode, mentions.object_id) = (k.livemode, k.object_id) OFFSET 0) AS m
"""
_OLD: Final = {"accounts": "%(old)s"}
_NEW: Final = {"accounts": "%(new)s"}
_EITHER: Final = {"accounts": "%(old)s, %(new)s"}


def _next(cursor: Cursor, names: dict[str, str], after: _Object, limit: int) -> tuple[list[_Object], list[int]]:
    """Return the next objects of the old name or, if there are none, the numbers of its events without an object."""
    values = {**names, "mode": after[0], "object": after[1], "limit": limit}
    for table, condition in (("inbox", "(livemode, object_id) > (%(mode)s, %(object)s)"), ("mentions", "true")):
        cursor.execute(
            f"SELECT DISTINCT livemode, object_id FROM {table} WHERE account = %(old)s AND object_id IS NOT NULL"
            f" AND {condition} ORDER BY livemode, object_id LIMIT %(limit)s",
            values,
        )
        if objects := cursor.fetchall():
            return objects, []
    cursor.execute("SELECT seq FROM inbox WHERE account = %(old)s LIMIT %(limit)s", values)
    return [], [seq for (seq,) in cursor.fetchall()]


def _with_neighbours(
    cursor: Cursor, names: dict[str, str], objects: Sequence[_Object], seqs: Sequence[int]
) -> list[_Object]:
    """Return *objects*, and the objects that have to be moved with them.

    These are the objects of events that mention one of *objects*, since it could not be folded without these events,
    and the objects that an event of theirs has under the other name, if that copy is of another object.
    """
    found, news = set(objects), list(objects)
    while news or seqs:
        cursor.execute(_NEIGHBOURS, {**names, **_arrays(news), "seqs": integer_array(seqs)})
        news, seqs = [each for each in cursor.fetchall() if each not in found], ()
        found.update(news)
    return sorted(found)


_NEIGHBOURS: Final = f"""
WITH k AS MATERIALIZED (SELECT * FROM {_OBJECTS}), own AS MATERIALIZED (
    SELECT i.account, i.livemode, i.id FROM k CROSS JOIN LATERAL {_EVENTS.format(**_EITHER)}
    UNION ALL
    SELECT account, livemode, id FROM inbox WHERE seq = ANY (%(seqs)s::bigint[])
)
SELECT i.livemode, i.object_id FROM k CROSS JOIN LATERAL {_MENTIONS.format(**_EITHER)}
CROSS JOIN LATERAL (SELECT * FROM inbox WHERE inbox.seq = m.seq OFFSET 0) AS i
WHERE i.object_id IS NOT NULL
UNION
SELECT i.livemode, i.object_id FROM own CROSS JOIN LATERAL (
    SELECT * FROM inbox
    WHERE account = CASE own.account WHEN %(old)s THEN %(new)s ELSE %(old)s END
        AND (inbox.livemode, inbox.id) = (own.livemode, own.id) OFFSET 0
) AS i WHERE i.object_id IS NOT NULL
"""


def _both_of(cursor: Cursor, names: dict[str, str], objects: Sequence[_Object]) -> list[_Object]:
    """Return those of *objects* that are folded from events of both names."""
    cursor.execute(_BOTH.format(objects=_OBJECTS), {**names, **_arrays(objects)})
    return cursor.fetchall()


def _all_of_both(cursor: Cursor, names: dict[str, str]) -> list[_Object]:
    """Return all objects that are folded from events of both names."""
    cursor.execute(_BOTH.format(objects=f"({_OF_BOTH}) AS k"), names)
    return cursor.fetchall()


_IS_FOLDED: Final = """
(EXISTS (SELECT FROM {events} JOIN outcomes USING (seq)) OR EXISTS (SELECT FROM {mentions}))
"""
_FOLDED_OF_OLD: Final = _IS_FOLDED.format(events=_EVENTS.format(**_OLD), mentions=_MENTIONS.format(**_OLD))
_FOLDED_OF_NEW: Final = _IS_FOLDED.format(events=_EVENTS.format(**_NEW), mentions=_MENTIONS.format(**_NEW))
_BOTH: Final = f"SELECT DISTINCT k.livemode, k.object_id FROM {{objects}} WHERE {_FOLDED_OF_OLD} AND {_FOLDED_OF_NEW}"
_OF_ONE: Final = """
(SELECT livemode, object_id FROM inbox WHERE account = {0} AND object_id IS NOT NULL
UNION SELECT livemode, object_id FROM mentions WHERE account = {0})
"""
_OF_BOTH: Final = f"{_OF_ONE.format('%(old)s')} INTERSECT {_OF_ONE.format('%(new)s')}"


def _seqs_of(cursor: Cursor, names: dict[str, str], objects: Sequence[_Object], condition: str) -> list[int]:
    cursor.execute(_SEQS.format(condition=condition), {**names, **_arrays(objects)})
    return [seq for (seq,) in cursor.fetchall()]


_SEQS: Final = f"""
WITH k AS MATERIALIZED (SELECT * FROM {_OBJECTS})
SELECT seq FROM (
    SELECT i.seq FROM k CROSS JOIN LATERAL {_EVENTS.format(**_EITHER)}
    UNION
    SELECT m.seq FROM k CROSS JOIN LATERAL {_MENTIONS.format(**_EITHER)}
) AS found WHERE {{condition}} ORDER BY seq
"""


def _archived(cursor: Cursor, names: dict[str, str], objects: Sequence[_Object]) -> list[int]:
    """Return the archived events that are needed to fold *objects* again."""
    return _seqs_of(cursor, names, objects, "NOT EXISTS (SELECT FROM payloads AS b WHERE b.seq = found.seq)")


def _folded_of(cursor: Cursor, names: dict[str, str], objects: Sequence[_Object]) -> list[int]:
    """Return the events that *objects* were folded from."""
    is_folded = "EXISTS (SELECT FROM outcomes AS o WHERE o.seq = found.seq AND o.state <> 'parked')"
    return _seqs_of(cursor, names, objects, is_folded) if objects else []


def _events_of(cursor: Cursor, names: dict[str, str], objects: Sequence[_Object]) -> list[int]:
    """Return the events of *objects* that the old name has."""
    cursor.execute(
        f"SELECT i.seq FROM {_OBJECTS} CROSS JOIN LATERAL {_EVENTS.format(**_OLD)}", {**names, **_arrays(objects)}
    )
    return [seq for (seq,) in cursor.fetchall()]


_RELABEL_MENTIONS: Final = f"""
UPDATE mentions AS m SET account = %(new)s FROM {_OBJECTS}
WHERE m.account = %(old)s AND (m.livemode, m.object_id) = (k.livemode, k.object_id)
"""
# An event that an operator ignored under one name may have been folded under the other.
_SET_ASIDE: Final = f"""
SELECT i.seq FROM inbox AS w JOIN inbox AS i ON (i.account, i.livemode, i.id) = (w.account, w.livemode, w.object_id)
JOIN outcomes AS o ON o.seq = i.seq
WHERE w.type = '{EVENT_IGNORED}' AND w.account = %(new)s AND o.cause IS DISTINCT FROM 'set_aside'
"""


# ---- Events that both names have ----


def _move_renderings(cursor: Cursor, values: Mapping[str, str]) -> None:
    """Relabel the other copies of the old name's events *seqs*, except those that the new name has too."""
    for statement in _MOVE_RENDERINGS:
        cursor.execute(statement, values)


_SAME_COPY: Final = """
EXISTS (
    SELECT FROM renderings AS n
    WHERE (n.account, n.livemode, n.id, n.payload_sha256) = (%(new)s, r.livemode, r.id, r.payload_sha256)
)
"""
_MOVE_RENDERINGS: Final = (
    f"""
    DELETE FROM renderings AS r USING inbox AS i
    WHERE i.seq = ANY (%(seqs)s::bigint[]) AND r.account = %(old)s AND (r.livemode, r.id) = (i.livemode, i.id)
        AND {_SAME_COPY}
    """,
    """
    UPDATE renderings AS r SET account = %(new)s FROM inbox AS i
    WHERE i.seq = ANY (%(seqs)s::bigint[]) AND r.account = %(old)s AND (r.livemode, r.id) = (i.livemode, i.id)
    """,
)


@dataclass(frozen=True, slots=True)
class _Pair:
    """One event under both names: the number that is *kept*, and the one that is *gone*."""

    kept: int
    gone: int


def _pairs(cursor: Cursor, new: str, seqs: Sequence[int]) -> list[_Pair]:
    """Return those of the old name's events *seqs* that the *new* one has too."""
    cursor.execute(_DOUBLED, {"new": new, "seqs": integer_array(seqs)})
    return [_Pair(*row) for row in cursor.fetchall()]


_DOUBLED: Final = """
SELECT least(o.seq, n.seq), greatest(o.seq, n.seq)
FROM (SELECT livemode, id, seq FROM inbox WHERE seq = ANY (%(seqs)s::bigint[])) AS o
CROSS JOIN LATERAL (
    SELECT seq FROM inbox
    WHERE account = %(new)s AND (inbox.livemode, inbox.id) = (o.livemode, o.id) OFFSET 0
) AS n
"""


def _join(cursor: Cursor, pairs: Sequence[_Pair], names: Mapping[str, str]) -> list[int]:
    """Make one event of each pair, with the copies of both, and return the numbers of those that were folded."""
    if not pairs:
        return []
    values = {
        **names,
        "kept": integer_array(pair.kept for pair in pairs),
        "gone": integer_array(pair.gone for pair in pairs),
        "seqs": integer_array(seq for pair in pairs for seq in (pair.kept, pair.gone)),
    }
    _move_renderings(cursor, values)
    for statement in _JOIN:
        cursor.execute(statement, values)
    cursor.execute("SELECT seq FROM outcomes WHERE seq = ANY (%(kept)s::bigint[])", values)
    return [seq for (seq,) in cursor.fetchall()]


_PAIRS: Final = "unnest(%(kept)s::bigint[], %(gone)s::bigint[]) AS p (kept, gone)"
_GONE: Final = "seq = ANY (%(gone)s::bigint[])"
_COPY_SHA256: Final = inbox.COPY_SHA256.format(
    signed="g.signature IS NOT NULL AND g.verified", sha256="g.payload_sha256", payload="b.payload"
)
_JOIN: Final = (
    # As when a copy arrives, it is compared when the event is folded. If both are archived, only the kept one counts.
    f"""
    INSERT INTO renderings (account, livemode, id, type, api_version, created, object_type, object_id, redacted,
        payload_sha256, signature, verified, source, received_at, payload)
    SELECT %(new)s, g.livemode, g.id, g.type, g.api_version, g.created, g.object_type, g.object_id, g.redacted,
        {_COPY_SHA256}, g.signature, g.verified, g.source, g.received_at, b.payload
    FROM {_PAIRS} JOIN inbox AS g ON g.seq = p.gone JOIN inbox AS k ON k.seq = p.kept
    JOIN payloads AS b ON b.seq = p.gone
    WHERE g.payload_sha256 <> k.payload_sha256 OR cardinality(g.redacted) > 0
        OR (g.signature IS NOT NULL AND g.verified AND (k.signature IS NULL OR NOT k.verified))
    ON CONFLICT (account, livemode, id, payload_sha256) DO NOTHING
    """,
    f"""
    INSERT INTO outcomes (seq, state, reason, attempts, folded_at, fold_version, cause)
    SELECT p.kept, o.state, o.reason, o.attempts, o.folded_at, o.fold_version, o.cause
    FROM {_PAIRS} JOIN outcomes AS o ON o.seq = p.gone
    ON CONFLICT (seq) DO NOTHING
    """,
    f"DELETE FROM outcomes WHERE {_GONE}",
    f"DELETE FROM pending WHERE {_GONE}",
    f"DELETE FROM payloads WHERE {_GONE}",
    f"DELETE FROM contents WHERE {_GONE}",
    f"DELETE FROM inbox WHERE {_GONE}",
)
