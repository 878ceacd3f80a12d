"""Servers that a dead owner left behind, which are found by the folder that they work in."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

STOP_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.005


def processes_in(folder: Path, program: str) -> list[int]:
    """Return the ids of the processes of *program* that have *folder* as their working folder, as a server has.

    The folder is safer than a remembered process id, which another program may have by now. It also finds the children
    of a server that was killed.
    """
    import psutil  # noqa: PLC0415 - a command that starts nothing starts sooner without it

    # The folder of a process that has ended, or that belongs to another user, is None.
    seen = psutil.process_iter(["name", "cwd"])
    wanted = {"name": program, "cwd": str(folder.resolve())}
    return [process.pid for process in seen if process.info == wanted]


def signal_all(process_ids: Iterable[int], *signals: signal.Signals) -> None:
    """Send *signals*, in this order, to each process that is still there."""
    for process_id in process_ids:
        with contextlib.suppress(ProcessLookupError):
            for each in signals:
                os.kill(process_id, each)


def end_leftovers(folder: Path, program: str, stop_signal: signal.Signals) -> None:
    """Stop all processes of *program* in *folder*: ask first, kill those that take too long, and wait for the end."""
    # A paused process must be continued to act on the signal.
    signal_all(processes_in(folder, program), stop_signal, signal.SIGCONT)
    impatient_at = time.monotonic() + STOP_SECONDS_MAX
    while leftovers := processes_in(folder, program):
        if time.monotonic() > impatient_at:
            signal_all(leftovers, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
