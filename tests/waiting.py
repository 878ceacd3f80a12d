"""Waiting until a condition holds, with a limit in time."""

import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import Engine

SECONDS_MAX: Final = 60.0
PAUSE_SECONDS: Final = 0.01

WAITS_FOR_A_LOCK: Final = (
    "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)
"""Gives a row for each session of the database that waits for a lock."""


def until(
    holds: Callable[[], object],
    seconds: float = SECONDS_MAX,
    *,
    pause_seconds: float = PAUSE_SECONDS,
    why_not: Callable[[], object] = lambda: "it did not come to pass",
) -> None:
    """Return once *holds* does; fail with the reason *why_not* when it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why_not()
        time.sleep(pause_seconds)


def until_locked(engine: Engine, *, kind: str = "advisory") -> None:
    """Return once a session of the test's own database waits for a lock of that *kind*, as advisory or relation."""

    def waits() -> bool:
        with engine.connect() as connection:
            return bool(connection.exec_driver_sql(f"{WAITS_FOR_A_LOCK} AND wait_event = '{kind}'").all())

    until(waits)
