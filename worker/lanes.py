"""Folding in two threads of one process: while PostgreSQL saves one batch, the next is read and joined.

Note [Who saves is not to wait for who computes]
    A thread that saves a batch asks PostgreSQL a dozen times, and each time wants its turn of the interpreter back
    from the one that reads the next batch. Python hands it over every five milliseconds, so that a save would wait
    for sixty of them; every half a millisecond costs nothing that can be measured.
"""

import gc
import math
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import Engine

from worker import projection

LANES: Final = 2
"""Batches that are folded at once; two processors have no use for more."""
SWITCH_SECONDS: Final = 0.0005
YOUNG_OBJECTS_MAX: Final = 50_000
"""New objects at which the collector looks for cycles; a batch makes about as many, and none of them is in one."""


def settle_down() -> None:
    """Let this process fold as fast as it can: hand over turns quickly, and leave what is loaded to no collector."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, 20, 20)


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class _Lane:
    engine: Engine
    now: Callable[[], datetime]
    until: float
    turn: threading.Lock = field(default_factory=threading.Lock)

    def run_once(self) -> int:
        return projection.run_once(self.engine, now=self.now(), turn=self.turn)

    def run(self) -> int:
        folded = 0
        while time.monotonic() < self.until and (batch := self.run_once()):
            folded += batch
        return folded


def fold(engine: Engine, *, now: Callable[[], datetime] = _now, until: float = math.inf) -> int:
    """Fold batches until nothing is pending, or *until* a time of the monotonic clock; return how many events.

    Raises:
        DatabaseAway: what is folded until then is saved.
    """
    lane = _Lane(engine, now, until)
    # Who was woken for a few events is done after one batch; behind a full one there is more.
    folded = lane.run_once()
    if folded == projection.FOLD_BATCH_MAX:
        with ThreadPoolExecutor(LANES) as lanes:
            return folded + sum(lanes.map(_Lane.run, [lane] * LANES))
    return folded + (lane.run() if folded else 0)
