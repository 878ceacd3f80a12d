"""Reconciliations: those that ended, those that were asked for, and how a worker takes one.

Note [A reconciliation is leased]
    One that was asked for is a row in PostgreSQL, so that a lost message costs only the time to the next look at the
    table. The worker that takes it extends its lease every few seconds, while its steps go on. After the lease the row
    counts as failed for everyone who reads it, and another may be asked for. Should the worker finish it after all, the
    result is kept under the same number. One that no worker takes counts as failed after ``WAIT_SECONDS_MAX``, so that
    it does not keep out every other, and is not begun when no one expects it any more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Select, case, func, literal, null, select, union_all
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import BigInteger, DateTime, Text

from schemas import progress, tables
from schemas.database import Cursor
from schemas.errors import ConflictError

RULES: Final = "rules"
REBUILD: Final = "rebuild"
STRIPE: Final = "stripe"
DETAILS_KEPT: Final = 50
"""Of so many of the last runs the differences are kept, and of older ones the sums alone."""
STEP_SECONDS_MAX: Final = progress.STEP_SECONDS_MAX
LEASE_SECONDS: Final = 60
LOST: Final = "lost"
"""The failure of one that a worker took, and neither finished nor gave back: its process ended, or it hangs."""
WAIT_SECONDS_MAX: Final = 3_600
"""How long one may wait for a worker."""
NOT_TAKEN: Final = "not_taken"
"""The failure of one that no worker took in that time."""
_DETAILS: Final = ("drift", "money", "not_provable")
"""The parts of a result that may be long."""


@dataclass(frozen=True, slots=True)
class Request:
    """A reconciliation that a worker has taken: its number and its checks."""

    id: int
    checks: tuple[str, ...]


class _Limit(NamedTuple):
    """When one in a *state* is given up, by SQL and as a *column*, with the code and the words of that failure."""

    state: str
    until: str
    column: ColumnElement[Any]
    failure: str
    words: str


_runs: Final = tables.reconciliations
_asked: Final = tables.reconciliation_requests
_LIMITS: Final = (
    _Limit("running", "leased_until", _asked.c.leased_until, LOST, "The worker that had it ended, or hangs."),
    _Limit(
        "waiting",
        f"asked_at + interval '{WAIT_SECONDS_MAX} seconds'",
        _asked.c.asked_at + timedelta(seconds=WAIT_SECONDS_MAX),
        NOT_TAKEN,
        f"No worker took it within {WAIT_SECONDS_MAX // 60} minutes: check that one runs.",
    ),
)

# ---- Asking for one ----

_GIVE_UP: Final = """
UPDATE reconciliation_requests SET state = 'failed', failed_at = {until}, failure = %s, detail = %s
WHERE state = %s AND {until} < clock_timestamp()
"""
_ASK: Final = """
INSERT INTO reconciliation_requests (id, state, asked_at, asked_by, checks)
VALUES (nextval(pg_get_serial_sequence('reconciliations', 'id')), 'waiting', clock_timestamp(), %s, %s)
ON CONFLICT DO NOTHING RETURNING id
"""


def ask(cursor: Cursor, checks: Sequence[str], *, by: str) -> int:
    """Ask for a reconciliation, in the name *by*, and return its number.

    Raises:
        ConflictError: one waits or runs already.
    """
    give_up_lost(cursor)
    cursor.execute(_ASK, (by, list(checks)))
    row = cursor.fetchone()
    if row is None:
        raise ConflictError("A reconciliation waits or runs already: wait until it has ended.")
    return int(row[0])


def give_up_lost(cursor: Cursor) -> int:
    """Let those be failed that a worker had and did not finish, or that none took, and return their number."""
    return sum(
        cursor.execute(_GIVE_UP.format(until=each.until), (each.failure, each.words, each.state)).rowcount
        for each in _LIMITS
    )


# ---- Doing it ----

_TAKE: Final = """
UPDATE reconciliation_requests SET state = 'running', begun_at = clock_timestamp(),
    leased_until = clock_timestamp() + make_interval(secs => %s)
WHERE id = (
    SELECT id FROM reconciliation_requests WHERE state = 'waiting' ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED
)
RETURNING id, checks
"""
_EXTEND: Final = """
UPDATE reconciliation_requests SET leased_until = clock_timestamp() + make_interval(secs => %s)
WHERE id = %s AND state = 'running'
"""
_FAIL: Final = """
UPDATE reconciliation_requests SET state = 'failed', failed_at = clock_timestamp(), failure = %s, detail = %s
WHERE id = %s AND state = 'running'
"""
_KEEP: Final = """
INSERT INTO reconciliations (id, started_at, finished_at, outcome, checks, drift, result, details)
OVERRIDING SYSTEM VALUE VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
_NEXT: Final = "SELECT nextval(pg_get_serial_sequence('reconciliations', 'id'))"
_DONE: Final = "UPDATE reconciliation_requests SET state = 'done', failed_at = NULL, failure = NULL, detail = NULL"
_FORGET: Final = """
UPDATE reconciliations SET details = NULL
WHERE details IS NOT NULL AND id <= (SELECT id FROM reconciliations ORDER BY id DESC OFFSET %s LIMIT 1)
"""


def take(cursor: Cursor) -> Request | None:
    """Take the reconciliation that waits; None where none does."""
    row = cursor.execute(_TAKE, (LEASE_SECONDS,)).fetchone()
    return None if row is None else Request(row[0], tuple(row[1]))


def extend(cursor: Cursor, number: int) -> None:
    """Extend the lease of the one with this *number*."""
    cursor.execute(_EXTEND, (LEASE_SECONDS, number))


def fail(cursor: Cursor, number: int, failure: str, detail: str | None) -> None:
    """Let the one with this *number* be failed, by a code and words of ours."""
    cursor.execute(_FAIL, (failure, detail, number))


def keep(cursor: Cursor, result: dict[str, Any], *, number: int | None = None) -> int:
    """Keep the *result* of a run, under the *number* by which it was asked for, and return its number."""
    if number is None:
        (number,) = cursor.execute(_NEXT).fetchone() or (0,)
    run = result["run"]
    run["id"] = number
    sums = {name: value for name, value in result.items() if name not in _DETAILS}
    details = {name: value for name, value in result.items() if name in _DETAILS}
    moments = (run["started_at"], run["finished_at"], run["outcome"], run["checks"])
    texts = (msgspec.json.encode(part).decode() for part in (sums, details))
    cursor.execute(_KEEP, (number, *moments, result["drift_total"], *texts))
    cursor.execute(_DONE + " WHERE id = %s", (number,))
    cursor.execute(_FORGET, (DETAILS_KEPT,))
    return number


# ---- Reading them ----


def _is_beyond(limit: _Limit) -> ColumnElement[bool]:
    return (_asked.c.state == limit.state) & (limit.column < func.clock_timestamp())


def _by_limit(values: Callable[[_Limit], Any], otherwise: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the value for the limit that a row is beyond, and *otherwise* for a row that is beyond none."""
    return case(*((_is_beyond(limit), values(limit)) for limit in _LIMITS), else_=otherwise)


def _ended() -> Select[Any]:
    return select(
        _runs.c.id,
        literal("done").label("state"),
        _runs.c.outcome,
        _runs.c.checks,
        _runs.c.drift,
        _asked.c.asked_at,
        _asked.c.asked_by,
        _runs.c.started_at,
        _runs.c.finished_at,
        null().cast(Text).label("failure"),
        null().cast(Text).label("detail"),
        _runs.c.details.is_not(None).label("has_report"),
    ).select_from(_runs.outerjoin(_asked, _asked.c.id == _runs.c.id))


def _open() -> Select[Any]:
    return select(
        _asked.c.id,
        _by_limit(lambda _: "failed", _asked.c.state).label("state"),
        null().cast(Text).label("outcome"),
        _asked.c.checks.cast(ARRAY(Text)),
        null().cast(BigInteger).label("drift"),
        _asked.c.asked_at,
        _asked.c.asked_by,
        _asked.c.begun_at.label("started_at"),
        _by_limit(lambda limit: limit.column, _asked.c.failed_at).cast(DateTime(timezone=True)),
        _by_limit(lambda limit: limit.failure, _asked.c.failure),
        _by_limit(lambda limit: limit.words, _asked.c.detail),
        literal(value=False),
    ).where(_asked.c.state != "done")


def listed(
    *, state: str | None = None, outcome: str | None = None, before: int | None = None, limit: int
) -> Select[Any]:
    """Return the query of those with a *state* and an *outcome*, from *before* a number on, the newest first."""
    every = union_all(_ended(), _open()).subquery()
    wanted: list[ColumnElement[bool]] = []
    wanted += [every.c.state == state] if state is not None else []
    wanted += [every.c.outcome == outcome] if outcome is not None else []
    wanted += [every.c.id < before] if before is not None else []
    return select(every).where(*wanted).order_by(every.c.id.desc()).limit(limit)


def one(number: int) -> Select[Any]:
    """Return the query of the one with this *number*, with the ``result`` and the ``details`` of an ended one."""
    every = union_all(_ended(), _open()).subquery()
    return (
        select(every, _runs.c.result, _runs.c.details)
        .select_from(every.outerjoin(_runs, _runs.c.id == every.c.id))
        .where(every.c.id == number)
    )


def whole(result: dict[str, Any], details: str | None) -> dict[str, Any]:
    """Return the result of a run, of which *details* is the part that may be long."""
    return result | (msgspec.json.decode(details) if details is not None else {})
