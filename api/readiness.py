"""Whether deliveries can be taken, found out by trying, in a bounded time in every state of PostgreSQL and Redis.

Note [A try is what recording is]
    A try runs the recorder's statement and rolls it back. It uses a new session each time, since a setting that makes a
    database or a role read-only holds for new sessions alone. If no new session can be opened, the session of the last
    try is used once more, as long as the recorder still has a session too.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
from redis.asyncio import Redis

from api.deadlines import within
from api.recorder import Attempt, Recorder
from api.status import StatusReader
from schemas import database, inbox, migrate
from schemas.logs import Seldom
from schemas.status import Health, Overview, Status

TRY_SECONDS_MAX: Final = 1.0
"""Recording has to be possible within this."""
STATEMENT_SECONDS_MAX: Final = 0.9
LOCK_SECONDS_MAX: Final = 0.6
MIGRATIONS_SECONDS_MAX: Final = 0.5
"""For reading the version of the schema."""
BROKER_SECONDS_MAX: Final = 1.0
ROOM_BYTES: Final = 256 * 1024
"""Once a disk was full, a try records this many bytes: a small row would still find a place in the pages there are."""
FRESH_SECONDS: Final = 1.0
"""A finding answers all requests for this long."""
STATUS_SECONDS_MAX: Final = 1.0
STATUS_AGE_SECONDS_MAX: Final = 10.0
"""A worker counts as silent after half a minute, so reading its heartbeats seldom is enough."""

UNKNOWN: Final = "unknown"
_IN_TROUBLE: Final = ("stopped", "failing")

Driver = psycopg.AsyncConnection[Any]
Result = TypeVar("Result")

_seldom: Final = Seldom()
_BOUNDS: Final = (
    f"SET LOCAL statement_timeout = {round(STATEMENT_SECONDS_MAX * 1000)};"
    f" SET LOCAL lock_timeout = {round(LOCK_SECONDS_MAX * 1000)}"
).encode()


@dataclass(frozen=True)
class Finding:
    """The result of a look.

    *database* is ok or the obstacle, as it was at *as_of* by the event loop's clock; *migrations* is unknown where that
    could not be read.
    """

    as_of: float
    database: str
    migrations: str
    broker: str


class Readiness:
    """Looks for all requests together, at most once a second, on a connection of its own."""

    def __init__(
        self, database_url: str, redis: Redis, recorder: Recorder, status: StatusReader, *, has_stripe_key: bool
    ) -> None:
        self._url = database_url
        self._redis = redis
        self._recorder = recorder
        self._status = status
        self._has_stripe_key = has_stripe_key
        self._connection: Driver | None = None
        self._room_since: Attempt | None = None
        """An attempt that found the disk full, since which there was room again."""
        self._migrations = UNKNOWN
        """The migrations' state when it could last be read."""
        self._look: asyncio.Task[Finding] | None = None
        self._fresh_until = 0.0

    async def health(self) -> Health:
        """Return whether this process can take deliveries, and how its neighbours are, within two seconds."""
        found, status = await asyncio.gather(
            self._finding(), self._status.latest(age_max=STATUS_AGE_SECONDS_MAX, wait_max=STATUS_SECONDS_MAX)
        )
        last = self._recorder.last
        attempt = last if last is not None and last.ended_at > found.as_of else None
        database_is = found.database if attempt is None else attempt.database
        if database_is in database.SPEECHLESS:
            status = None
        migrations = self._migrations if database_is == "ok" else found.migrations
        # A delivery was just recorded. So it is no obstacle that the migrations' state could never be read yet.
        is_not_behind = migrations == "ok" or (migrations == UNKNOWN and attempt is not None)
        return Health(
            ready=database_is == "ok" and is_not_behind,
            database=database_is,
            migrations=migrations,
            broker=found.broker,
            stripe=self._stripe(status),
            workers=_state_of("worker", status),
            clock=_state_of("clock", status),
            status=Overview.of_status(status),
        )

    async def stop(self) -> None:
        """Give up a look that is under way, and close the connection."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.wait([self._look])
        if self._connection is not None:
            await self._connection.close()

    async def _finding(self) -> Finding:
        now = asyncio.get_running_loop().time()
        if self._look is None or (self._look.done() and now >= self._fresh_until):
            self._look = asyncio.create_task(self._find(), name="readiness")
        # Other requests may wait for the look too, so it outlasts the request that began it.
        return await asyncio.shield(self._look)

    async def _find(self) -> Finding:
        (as_of, database_is, migrations), broker_is = await asyncio.gather(self._look_at_postgresql(), self._ping())
        self._fresh_until = asyncio.get_running_loop().time() + FRESH_SECONDS
        return Finding(as_of, database_is, migrations, broker_is)

    async def _look_at_postgresql(self) -> tuple[float, str, str]:
        now = asyncio.get_running_loop().time
        began_at = now()
        database_is = await self._try()
        # A try without an answer proves nothing about the time since it began: the recorder may have got one since.
        as_of = began_at if database_is == "silent" else now()
        return as_of, database_is, UNKNOWN if database_is in database.SPEECHLESS else await self._read_migrations()

    async def _try(self) -> str:
        """Return ok, or why nothing can be recorded: see Note [A try is what recording is]."""
        last = self._recorder.last
        was_full = last is not None and last.database == "full" and last != self._room_since
        bytes_min = ROOM_BYTES if was_full else 0
        try:
            await within(TRY_SECONDS_MAX, self._use(partial(inbox.try_to_record, bytes_min=bytes_min), is_new=True))
        except Exception as error:  # noqa: BLE001 - for any error nothing was recorded
            found = database.obstacle(error)
            if found in {"failed", "refused"}:
                _seldom.error("readiness.not_recorded", reason=database.condition(error))
            return found
        if was_full:
            self._room_since = last
        return "ok"

    async def _read_migrations(self) -> str:
        try:
            is_behind = await within(MIGRATIONS_SECONDS_MAX, self._use(_is_behind))
        except (TimeoutError, psycopg.Error):
            return UNKNOWN
        self._migrations = "pending" if is_behind else "ok"
        return self._migrations

    async def _use(self, work: Callable[[Driver], Awaitable[Result]], *, is_new: bool = False) -> Result:
        """Return what *work* returns, and roll back what it did; a failure closes the connection."""
        connection = await self._connect() if is_new or self._connection is None else self._connection
        # The connection is put back once it is known to be good. A try that takes too long keeps it.
        self._connection = None
        try:
            await connection.execute(_BOUNDS)
            result = await work(connection)
            await connection.rollback()
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        return result

    async def _connect(self) -> Driver:
        last = self._connection
        try:
            fresh = await Driver.connect(self._url, **database.connect_options())
        except psycopg.Error:
            if last is None or not self._recorder.is_connected:
                raise
            return last
        if last is not None:
            await last.close()
        return fresh

    async def _ping(self) -> str:
        try:
            await within(BROKER_SECONDS_MAX, _answer_of(self._redis))
        except Exception:  # noqa: BLE001 - whichever it is, it takes no message
            return "away"
        return "ok"

    def _stripe(self, status: Status | None) -> str:
        """Return how the jobs at Stripe are; without a key there is one, which ends sessions by our clock."""
        found = None if status is None else status.stripe
        if found is None:
            return UNKNOWN if self._has_stripe_key else "no key"
        jobs = {state: sorted({each.job for each in found.jobs if each.state == state}) for state in _IN_TROUBLE}
        in_trouble = [f"{state}: {', '.join(names)}" for state, names in jobs.items() if names]
        return "; ".join(in_trouble) or ("ok" if self._has_stripe_key else "no key")


def _state_of(process: str, status: Status | None) -> str:
    """Return how the worker or the clock is, of which the health is reported only."""
    if status is None or status.expected is None or status.silent is None:
        return UNKNOWN
    if any(each.process == process for each in status.silent):
        return "silent"
    return "ok" if process in status.expected else "not_expected"


async def _answer_of(redis: Redis) -> None:
    await redis.ping()


async def _is_behind(connection: Driver) -> bool:
    (table,) = await (await connection.execute("SELECT to_regclass('alembic_version')::text")).fetchone() or (None,)
    if table is None:
        return True
    versions = await (await connection.execute("SELECT version_num FROM alembic_version ORDER BY 1")).fetchall()
    return bool(migrate.pending_after(tuple(version for (version,) in versions)))
