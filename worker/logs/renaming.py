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

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from sqlalchemy import Engine

from schemas import accounts, database
from schemas.accounts import shown
from schemas.database import Cursor
from schemas.errors import ConfigurationError, ConflictError, NotFoundError
from schemas.locks import keep_others_from_folding, taken_in_time
from schemas.progress import Progress, do_nothing
from worker.logs import restore
from worker.logs.renamed_events import all_of_both, archived_of
from worker.logs.renaming_steps import OBJECTS_AT_ONCE, TRIES_MAX, RenamingSteps, archive_wanted, retrying

LOCK_SECONDS_MAX: Final = 1
"""How long one try waits for the processes that record; others wait behind it for as long."""


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
        both = all_of_both(cursor, names)
        return Plan(events, orders, doubled, len(both), len(archived_of(cursor, names, both)))


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
    retrying(engine, lambda cursor: _write_name(cursor, old, new, now, is_one=is_one))
    work = RenamingSteps(old, new, now, int(count), progress, objects_at_once)
    for step in work.steps():
        work.take(engine, step)
    return Renamed(work.counts["moved"], work.counts["joined"], work.counts["withheld"])


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
        archived = archived_of(cursor, names, all_of_both(cursor, names))
    if archived and archive is None:
        raise archive_wanted(archived, names, is_begun=is_begun)
    if archived and archive is not None:
        restore.bring_back(engine, archived, archive)


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
