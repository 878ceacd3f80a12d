"""Reads what the checks judge, each part in a thread of its own and for a bounded time.

Note [A part that hangs is left behind]
    Most reads have bounds of their own, but some waits cannot be bounded from within: the look-up of a host's name, for
    example. So each part is read in a daemon thread, which writes each value as soon as it is known. When the time is
    over, the values that are there are judged, the others count as unread, and the thread ends with the process.
"""

import threading
import time
from collections.abc import Callable
from copy import copy
from typing import Final, Generic, TypeVar

from deploy.doctor.findings import Unread, give_up, reason_of

SECONDS_MAX: Final = 20.0
"""For each part. All parts are read at the same time."""

Part = TypeVar("Part")


class Reading(Generic[Part]):
    """A *part* that is being read: *fill* writes its values into it. See Note [A part that hangs is left behind]."""

    def __init__(self, part: Part, fill: Callable[[Part], None], *, seconds_max: float = SECONDS_MAX) -> None:
        self._part = part
        self._until = time.monotonic() + seconds_max
        self._fill = fill
        self._thread = threading.Thread(target=self._run, name="doctor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._fill(self._part)
        except Exception as error:  # noqa: BLE001 - an address that no library can read, for example
            give_up(self._part, Unread(reason_of(error)))

    def result(self) -> Part:
        """Return the part as it is when its time is over, or when all of it is read."""
        self._thread.join(max(0.0, self._until - time.monotonic()))
        return copy(self._part)
