"""Measures work in a process of its own, and the memory and processor time that processes take (Linux).

``python -m deploy.bench.apart rebuild`` folds the inbox again. ``… record LOG`` records a log next to the live tables
and folds that. Both print how long it took. The database is the one that DATABASE_URL names.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from deploy.bench.errors import ApartError
from deploy.local.leash import leashed
from schemas import database
from schemas.settings import Settings

ROOT: Final = Path(__file__).parent.parent.parent
IS_LINUX: Final = sys.platform == "linux"
LOOK_SECONDS: Final = 0.2
_PROC: Final = Path("/proc")
_KIB: Final = 1024


class Inside(Struct, frozen=True):
    """The report of a process on its own work."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Taken:
    """The memory and time of a whole process.

    *pss_bytes* is the peak of the proportional set sizes of the process and its children together, None where unknown.
    *rss_bytes* has the peak resident set of each of them, the process's own first.
    """

    seconds: float
    pss_bytes: int | None
    rss_bytes: list[int]
    out: bytes

    @property
    def inside(self) -> Inside:
        """The report that the process printed, if it runs this file."""
        return msgspec.json.decode(self.out, type=Inside)


# ---- For the measuring process ----


def payfold(environment: Mapping[str, str], *arguments: str) -> Taken:
    """Run the command to its end."""
    return _taken([sys.executable, "-m", "deploy", *arguments], environment)


def rebuilt(environment: Mapping[str, str]) -> Taken:
    """Rebuild the database of *environment*."""
    return _taken([sys.executable, "-m", "deploy.bench.apart", "rebuild"], environment)


def recorded(environment: Mapping[str, str], log: Path) -> Taken:
    """Record *log* next to the live tables of *environment* and fold it at once."""
    return _taken([sys.executable, "-m", "deploy.bench.apart", "record", str(log)], environment)


def _taken(command: Sequence[str], environment: Mapping[str, str]) -> Taken:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        process = subprocess.Popen(  # noqa: S603 - our own command
            leashed(command, signal.SIGTERM), cwd=ROOT, env=dict(environment), stdout=out, stderr=err
        )
        try:
            peak, peaks = 0, dict[int, int]()
            while process.poll() is None:
                pids = family(process.pid) if IS_LINUX else []
                peak = max(peak, pss_bytes(pids))
                peaks |= {pid: size for pid in pids if (size := _reading(pid, "status", "VmHWM:"))}
                time.sleep(LOOK_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
        seconds = time.monotonic() - started
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise ApartError(f"{' '.join(command[2:])} failed: {err.read().decode(errors='replace').strip()}")
        return Taken(seconds, peak or None, list(peaks.values()), out.read())


# ---- Memory and time of processes ----


def family(pid: int) -> list[int]:
    """Return *pid* and the ids of all its descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for each in _PROC.glob("[0-9]*"):
        fields = _stat(int(each.name))
        if fields:
            children[int(fields[1])].append(int(each.name))
    found = [pid]
    for each_pid in found:
        found += children[each_pid]
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields after the name in a process's stat file; none for a process that has ended."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


_USER_TIME, _SYSTEM_TIME = 11, 12


def processor_seconds(pids: Iterable[int]) -> float:
    """Return the processor time that *pids* have used."""
    ticks = 0
    for pid in pids:
        fields = _stat(pid)
        ticks += int(fields[_USER_TIME]) + int(fields[_SYSTEM_TIME]) if fields else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def pss_bytes(pids: Iterable[int]) -> int:
    """Return the memory of *pids* together; memory that several share counts once."""
    return sum(_reading(pid, "smaps_rollup", "Pss:") for pid in pids)


def _reading(pid: int, file: str, name: str) -> int:
    """Return the bytes that *name* has in a process's *file*; 0 for a process that has ended."""
    try:
        lines = (_PROC / str(pid) / file).read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * _KIB for line in lines if line.startswith(name))


# ---- In the process ----


def main(work: str, log: str = "") -> None:
    """Do *work* and print what it took."""
    from worker.proof import rebuild, shadow  # noqa: PLC0415 - the measuring process needs none of it

    engine = database.engine(Settings.load().postgresql)
    started = time.monotonic()
    if work == "rebuild":
        with rebuild.rebuilt(engine):
            seconds = time.monotonic() - started
    else:
        with shadow.shadow(engine, has_inbox=True) as made:
            rebuild.record(made, [log], account="", now=datetime.now(UTC), refuse=_refuse)
            rebuild.rebuild(made)
            seconds = time.monotonic() - started
    sys.stdout.buffer.write(msgspec.json.encode(Inside(seconds)))


def _refuse(entry: object) -> None:
    raise ApartError(f"An event of the log cannot be read: {entry}")


if __name__ == "__main__":
    main(*sys.argv[1:])
