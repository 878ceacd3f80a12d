"""The queue of calls to Stripe, their leases, and the progress of each job. Nothing here calls Stripe.

Note [A rename meets a round]
    New calls and jobs are written under the account's newest name, as in the inbox, since a rename may happen during a
    round. If a round began under the old name, the rename has dropped its lease, and its progress is lost, since the
    job under the new name has its own. No round begins under an old name. A call that was leased under the old name is
    concluded under both names, since the rename may or may not have relabelled it.

Note [A lease, not a lock]
    A call to Stripe may take long, so no transaction is held open for it. A worker leases a call before it makes it,
    and no other worker takes the call during the lease. If the worker dies, the lease runs out. The next worker sees
    from the attempts that the call may have been made, and reads the object before it makes the call again.

Note [What ended a job is kept]
    A round that fails may fail again and again, and its checkpoint would stand still without anyone noticing. So
    ``failed_at`` is the time since which no round has ended well, and ``failure`` is the reason, for `status` and
    health. They show it at once where trying again may not help (Stripe declines the call, or we failed), and after ten
    minutes where it usually does (Stripe or Redis away, the budget spent). A round that ends well clears both. A
    refused key is kept as ``stopped``.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from schemas.budget import Lane
from schemas.database import Cursor
from schemas.observations import World

LEASE: Final = timedelta(minutes=5)
"""Longer than one call can take, with all its tries and reads."""
RETRY_SECONDS_MIN: Final = 2
RETRY_SECONDS_MAX: Final = 900
STOPPED: Final = timedelta(minutes=10)
"""A job that Stripe refused is tried again after this time, with one call."""
PERSISTS: Final = timedelta(minutes=10)
"""A fault that passes by itself counts as a failure of the job once it has lasted this long."""
FAILURE_CHARACTERS_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Call:
    """A call to make at Stripe; *attempts* counts the attempts with an unknown outcome."""

    world: World
    purpose: str
    object_id: str
    object_type: str
    lane: Lane
    asked_at: datetime
    attempts: int


@dataclass(frozen=True, slots=True)
class CallRequest:
    """An object to make a call for, at once, or in its turn among those that are due since *due_at*."""

    purpose: str
    object_id: str
    object_type: str
    lane: Lane
    due_at: datetime | None = None


def worlds(cursor: Cursor) -> list[World]:
    """Return every account and mode that the inbox holds, without reading all of it."""
    cursor.execute(
        """
        WITH RECURSIVE each AS (
            (SELECT account, livemode FROM inbox ORDER BY account, livemode LIMIT 1)
            UNION ALL
            SELECT following.* FROM each CROSS JOIN LATERAL (
                SELECT i.account, i.livemode FROM inbox AS i
                WHERE (i.account, i.livemode) > (each.account, each.livemode)
                ORDER BY i.account, i.livemode LIMIT 1
            ) AS following
        )
        SELECT * FROM each
        """
    )
    return [World(*row) for row in cursor.fetchall()]


def want(cursor: Cursor, world: World, wanted: Sequence[CallRequest], *, now: datetime) -> int:
    """Queue a call for each of *wanted*, one however often it is wanted, and return how many calls were new.

    A call that is leased at the time is made once more afterwards, since it may have been made too early. A call that
    was given up stays given up.
    """
    cursor.execute(
        """
        INSERT INTO stripe_calls AS known
            (account, livemode, purpose, object_id, object_type, lane, asked_at, due_at)
        SELECT coalesce((SELECT new FROM account_names WHERE old = %s), %s), %s,
            purpose, object_id, object_type, min(lane), %s, min(due_at)
        FROM unnest(%s::text[], %s::text[], %s::text[], %s::smallint[], %s::timestamptz[])
            AS t (purpose, object_id, object_type, lane, due_at)
        GROUP BY purpose, object_id, object_type ORDER BY purpose, object_id
        ON CONFLICT (account, livemode, purpose, object_id) DO UPDATE SET
            asked_at = excluded.asked_at, lane = least(known.lane, excluded.lane)
            WHERE known.given_up IS NULL
        RETURNING known.xmax = 0
        """,
        (
            world.account,
            world.account,
            world.livemode,
            now,
            [each.purpose for each in wanted],
            [each.object_id for each in wanted],
            [each.object_type for each in wanted],
            [int(each.lane) for each in wanted],
            [each.due_at or now for each in wanted],
        ),
    )
    return sum(is_new for (is_new,) in cursor.fetchall())


def lease(
    cursor: Cursor, world: World, purposes: Sequence[str], *, limit: int, now: datetime
) -> list[Call]:  # fmt: skip
    """Lease up to *limit* due calls to this worker, the most urgent first.

    The attempt is counted here, before it is made. If a call has a counted attempt and is still queued, it is not known
    whether that attempt was made.
    """
    cursor.execute(
        """
        WITH taken AS MATERIALIZED (
            SELECT account, livemode, purpose, object_id, attempts FROM stripe_calls
            WHERE (account, livemode) = (%(account)s, %(livemode)s) AND purpose = ANY (%(purposes)s)
                AND given_up IS NULL AND due_at <= %(now)s AND coalesce(leased_until, '-infinity') <= %(now)s
            ORDER BY lane, due_at, asked_at, object_id LIMIT %(limit)s FOR UPDATE SKIP LOCKED
        )
        UPDATE stripe_calls AS c SET leased_until = %(until)s, attempts = least(c.attempts + 1, 32767)
        FROM taken WHERE (c.account, c.livemode, c.purpose, c.object_id)
            = (taken.account, taken.livemode, taken.purpose, taken.object_id)
        RETURNING c.purpose, c.object_id, c.object_type, c.lane, c.asked_at, taken.attempts, c.due_at
        """,
        {
            "account": world.account,
            "livemode": world.livemode,
            "purposes": list(purposes),
            "limit": limit,
            "now": now,
            "until": now + LEASE,
        },
    )
    found = sorted(cursor.fetchall(), key=lambda row: (row[3], row[6], row[4], row[1]))
    return [Call(world, row[0], row[1], row[2], Lane(row[3]), row[4], row[5]) for row in found]


_ONE: Final = """account IN (%s, (SELECT new FROM account_names WHERE old = %s))
AND (livemode, purpose, object_id) = (%s, %s, %s)
"""


def _key(call: Call) -> tuple[str, str, bool, str, str]:
    return (call.world.account, call.world.account, call.world.livemode, call.purpose, call.object_id)


def done(cursor: Cursor, call: Call) -> None:
    """Remove *call* from the queue, unless it was asked for again while it was made."""
    cursor.execute(f"DELETE FROM stripe_calls WHERE {_ONE} AND asked_at <= %s", (*_key(call), call.asked_at))
    if not cursor.rowcount:
        cursor.execute(f"UPDATE stripe_calls SET leased_until = NULL, attempts = 0 WHERE {_ONE}", _key(call))


def put_off(cursor: Cursor, call: Call, *, now: datetime, is_known: bool) -> None:
    """Have *call* made again later; the delay grows with each attempt.

    *is_known* means that it is known that nothing was done at Stripe, so that the attempt does not count.
    """
    delay = min(RETRY_SECONDS_MAX, RETRY_SECONDS_MIN * 2 ** min(call.attempts, 10)) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
    cursor.execute(
        f"UPDATE stripe_calls SET leased_until = NULL, due_at = %s, attempts = %s WHERE {_ONE}",
        (
            now + (timedelta(0) if is_known else timedelta(seconds=delay)),
            call.attempts if is_known else min(call.attempts + 1, 32767),
            *_key(call),
        ),
    )


def give_up(cursor: Cursor, call: Call, reason: str) -> None:
    """Never make *call* again."""
    cursor.execute(f"UPDATE stripe_calls SET leased_until = NULL, given_up = %s WHERE {_ONE}", (reason, *_key(call)))


# Jobs: rounds that the clock starts, one for each world.


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job has come; a value is None where the job has never run."""

    reached_at: datetime | None
    reached_seq: int | None


def begin(
    cursor: Cursor, world: World, job: str, *, now: datetime, though_stopped: bool = False
) -> JobProgress | None:  # fmt: skip
    """Lease a round of *job* to this worker; None if another worker has it, or Stripe has refused it for now.

    Also None if the account has a newer name: the next round begins under that one. With *though_stopped* the job is
    tried again although Stripe has refused it.
    """
    cursor.execute(
        """
        INSERT INTO stripe_jobs AS known (account, livemode, job, leased_until)
        SELECT %s, %s, %s, %s WHERE NOT EXISTS (SELECT FROM account_names WHERE old = %s)
        ON CONFLICT (account, livemode, job) DO UPDATE SET leased_until = excluded.leased_until
            WHERE coalesce(known.leased_until, '-infinity') <= %s
                AND (%s OR coalesce(known.stopped_until, '-infinity') <= %s)
        RETURNING known.reached_at, known.reached_seq
        """,
        (world.account, world.livemode, job, now + LEASE, world.account, now, though_stopped, now),
    )
    row = cursor.fetchone()
    return None if row is None else JobProgress(*row)


_JOB: Final = "(account, livemode, job) = (%s, %s, %s)"


def reach(
    cursor: Cursor, world: World, job: str, *, at: datetime | None = None, seq: int | None = None, found: int = 0
) -> None:
    """Record the progress of *job*, and add the number of events that it *found*."""
    cursor.execute(
        f"UPDATE stripe_jobs SET reached_at = coalesce(%s, reached_at), reached_seq = coalesce(%s, reached_seq),"
        f" found = found + %s WHERE {_JOB}",
        (at, seq, found, world.account, world.livemode, job),
    )


def end(cursor: Cursor, world: World, job: str, *, now: datetime) -> None:
    """Give the lease of *job* back: the round has ended well."""
    cursor.execute(
        "UPDATE stripe_jobs SET leased_until = NULL, done_at = %s, stopped = NULL, stopped_until = NULL,"
        f" failed_at = NULL, failure = NULL WHERE {_JOB}",
        (now, world.account, world.livemode, job),
    )


def pause(cursor: Cursor, world: World, job: str) -> None:
    """Give the lease of *job* back: its slice is over without a fault, and the next round goes on from here."""
    cursor.execute(
        f"UPDATE stripe_jobs SET leased_until = NULL, failed_at = NULL, failure = NULL WHERE {_JOB}",
        (world.account, world.livemode, job),
    )


def release(cursor: Cursor, world: World, job: str) -> None:
    """Give the lease of *job* back, and record nothing about how its round ended."""
    cursor.execute(f"UPDATE stripe_jobs SET leased_until = NULL WHERE {_JOB}", (world.account, world.livemode, job))


def fail(cursor: Cursor, world: World, job: str, failure: str, *, now: datetime, may_pass: bool) -> None:
    """Give the lease of *job* back, and keep what ended its round; see Note [What ended a job is kept].

    A fault that *may_pass* by itself is kept only once no round has ended well for ``PERSISTS``.
    """
    cursor.execute(
        """
        INSERT INTO stripe_jobs AS known (account, livemode, job, failed_at, failure)
        VALUES (coalesce((SELECT new FROM account_names WHERE old = %(account)s), %(account)s), %(livemode)s, %(job)s,
            %(now)s, CASE WHEN NOT %(may_pass)s THEN %(failure)s END)
        ON CONFLICT (account, livemode, job) DO UPDATE SET leased_until = NULL,
            failed_at = coalesce(known.failed_at, excluded.failed_at),
            failure = CASE WHEN NOT %(may_pass)s OR known.failure IS NOT NULL OR known.failed_at <= %(persists)s
                THEN %(failure)s END
        """,
        {
            "account": world.account,
            "livemode": world.livemode,
            "job": job,
            "failure": failure[:FAILURE_CHARACTERS_MAX],
            "may_pass": may_pass,
            "now": now,
            "persists": now - PERSISTS,
        },
    )


def stop(cursor: Cursor, world: World, job: str, reason: str, *, now: datetime) -> None:
    """Stop *job*, since Stripe refuses the key: it is not tried again for a while."""
    cursor.execute(
        "UPDATE stripe_jobs SET leased_until = NULL, stopped = %s, stopped_until = %s,"
        f" failed_at = coalesce(failed_at, %s), failure = NULL WHERE {_JOB}",
        (reason, now + STOPPED, now, world.account, world.livemode, job),
    )
