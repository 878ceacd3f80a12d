"""Servers that a dead owner left behind, which are found by the folder that they work in."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

STOP_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.005


def _working_folders() -> Iterator[tuple[int, str, str]]:
    """Yield the process id, program name and working folder of every process that may be looked at."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or is not ours to look at
            yield int(process.name), (process / "comm").read_text().strip(), str((process / "cwd").readlink())


def _working_folders_by_lsof(program: str) -> Iterator[tuple[int, str, str]]:
    """Yield the same where there is no /proc, from lsof's lines: p<process id>, then n<working folder>."""
    command = ["lsof", "-w", "-a", "-c", program, "-d", "cwd", "-F", "pn"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed command
    process_id = 0
    for line in listed.stdout.splitlines():
        if line.startswith("p"):
            process_id = int(line[1:])
        elif line.startswith("n"):
            yield process_id, program, line[1:]


def processes_in(folder: Path, program: str) -> list[int]:
    """Return the ids of the processes of *program* that have *folder* as their working folder, as a server has.

    The folder is safer than a remembered process id, which another program may have by now. It also finds the children
    of a server that was killed.
    """
    processes = _working_folders() if sys.platform == "linux" else _working_folders_by_lsof(program)
    here = str(folder.resolve())
    return [process_id for process_id, name, place in processes if (name, place) == (program, here)]


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
