"""The heartbeats of a process: when each of its loops was last seen alive, in one narrow table.

Note [A loop notes, a thread writes]
    A heartbeat proves the life of the loop that it is named after, so the loop itself notes the moment, in memory, at
    the end of a turn. A thread of the process writes what was noted, so that no loop waits for PostgreSQL: a clock must
    tick and a fold must go on while the table is locked. A loop that hangs notes nothing, and its row grows old.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from schemas import background, database
from schemas.database import Bounds, transaction
from schemas.errors import DatabaseAway
from schemas.lines import log

if TYPE_CHECKING:
    from sqlalchemy import Engine

BEAT_SECONDS: Final = 5.0
"""Between two writes of a process, and so how old a heartbeat is at most before it is written."""
HURRY_SECONDS: Final = 1.0
"""Between two writes where the outcome of a job changes, which is written at once."""
WRITE: Final = Bounds(statement=1, lock=1, whole=2)
STOP_SECONDS_MAX: Final = 3.0
KEPT: Final = "1 day"
"""A row that is older is deleted, unless it is the freshest of its kind and name."""
PRUNE_SECONDS: Final = 3600.0
REPEAT_SECONDS: Final = 60.0
"""After which a write that goes on failing is logged again."""
OK: Final = "ok"
RUNNING: Final = "running"
"""The outcome of a job that has not ended yet."""
Kind = Literal["web", "clock", "fold", "consumer", "job"]


class Beat(NamedTuple):
    """A loop was alive at *seen_at*, by the monotonic clock; *outcome* is how its job ended."""

    kind: Kind
    name: str
    seen_at: float
    outcome: str | None = None


Beats = Callable[[], Iterable[Beat]]


class Mark:
    """When one loop was last seen alive."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._seen_at: float | None = None

    def note(self) -> None:
        """Note that the loop is alive."""
        self._seen_at = time.monotonic()

    def beats(self) -> Sequence[Beat]:
        """Return its heartbeat, once there is one."""
        return () if self._seen_at is None else (Beat(self._kind, "", self._seen_at),)


# Times are the database's, so that the clocks of several machines need not agree.
_WRITE: Final = """
INSERT INTO heartbeats AS known (kind, name, instance, at, since, outcome)
SELECT kind, name, %(instance)s, at, at, outcome
FROM unnest(%(kinds)s::text[], %(names)s::text[], %(ages)s::double precision[], %(outcomes)s::text[])
    AS given (kind, name, age, outcome), LATERAL (SELECT clock_timestamp() - make_interval(secs => age) AS at) AS seen
ON CONFLICT (kind, name, instance) DO UPDATE SET at = excluded.at, outcome = excluded.outcome,
    -- An earlier process may have had the same name.
    since = CASE WHEN known.at < excluded.at - interval '1 minute' THEN excluded.at ELSE known.since END
"""
_PRUNE: Final = """
DELETE FROM heartbeats AS old
WHERE at < clock_timestamp() - %(kept)s::interval AND EXISTS (
    SELECT FROM heartbeats AS fresh WHERE (fresh.kind, fresh.name) = (old.kind, old.name) AND fresh.at > old.at
)
"""


class Heart:
    """Writes what the loops of this process noted: see Note [A loop notes, a thread writes]."""

    def __init__(self, engine: "Engine", beats: Beats, *, instance: str = "", every: float = BEAT_SECONDS) -> None:
        self._engine, self._beats, self._every = engine, beats, every
        self._instance = instance or instance_name()
        self._written: dict[tuple[str, str], Beat] = {}
        self._asked, self._over = threading.Event(), threading.Event()
        self._pruned_at = float("-inf")
        self._logged: dict[str, float] = {}
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write every few seconds from now on, in a thread that ends with the process."""
        self._thread = background.start("heartbeats", self._run)

    def hurry(self) -> None:
        """Write soon; never waits and never fails."""
        self._asked.set()

    def stop(self) -> None:
        """End the thread, after the write at hand; a database that is silent is not waited for."""
        self._over.set()
        self._asked.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS_MAX)

    def write(self) -> int:
        """Write what was noted since the last time, prune now and then, and return how many rows were written.

        Raises:
            DatabaseAway, DriverError: nothing is written.
        """
        fresh = [beat for beat in self._beats() if self._written.get((beat.kind, beat.name)) != beat]
        if not fresh:
            return 0
        with transaction(self._engine, WRITE) as connection, database.cursor(connection) as cursor:
            now = time.monotonic()
            cursor.execute(
                _WRITE,
                {
                    "instance": self._instance,
                    "kinds": [beat.kind for beat in fresh],
                    "names": [beat.name for beat in fresh],
                    "ages": [now - beat.seen_at for beat in fresh],
                    "outcomes": [beat.outcome for beat in fresh],
                },
            )
            if prunes := now - self._pruned_at >= PRUNE_SECONDS:
                cursor.execute(_PRUNE, {"kept": KEPT})
        self._written |= {(beat.kind, beat.name): beat for beat in fresh}
        self._pruned_at = now if prunes else self._pruned_at
        return len(fresh)

    def _run(self) -> None:
        while not self._over.is_set():
            self._asked.clear()
            self._try_to_write()
            self._over.wait(min(HURRY_SECONDS, self._every))
            self._asked.wait(self._every - min(HURRY_SECONDS, self._every))

    def _try_to_write(self) -> None:
        try:
            self.write()
        except (DatabaseAway, database.DriverError) as error:
            self._note_failure(database.condition(error.__cause__ or error))

    def _note_failure(self, condition: str) -> None:
        """Log a failed write, seldom: the age of the row shows the effect."""
        now = time.monotonic()
        if now - self._logged.get(condition, float("-inf")) >= REPEAT_SECONDS:
            self._logged[condition] = now
            log.warning("heartbeat.not_written", reason=condition)


def instance_name() -> str:
    """Return the name of this process among those of all machines."""
    return f"{os.environ.get('DYNO') or socket.gethostname()}:{os.getpid()}"
