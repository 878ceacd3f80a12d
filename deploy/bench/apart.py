"""Measures work in a process of its own, and the memory and processor time that processes take (Linux).

``python -m deploy.bench.apart`` folds the inbox of the database that DATABASE_URL names again, and prints how
long it took.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import psutil
from msgspec import Struct

from deploy.bench.errors import ApartError
from deploy.local.leash import leashed
from schemas import database
from schemas.settings import Settings

ROOT: Final = Path(__file__).parent.parent.parent
IS_LINUX: Final = sys.platform == "linux"
LOOK_SECONDS: Final = 0.2

Reading = TypeVar("Reading")


class Inside(Struct, frozen=True):
    """The report of a process on its own work."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Taken:
    """The memory and time of a whole process.

    *pss_bytes* is the peak of the proportional set sizes of the process and its children together, None where unknown.
    *rss_bytes* has the peak of the resident set of each of them, the process's own first. Both are looked at five times
    a second.
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
    return _taken([sys.executable, "-m", "deploy.bench.apart"], environment)


def decoded_and_loaded(environment: Mapping[str, str], folder: Path) -> Taken:
    """Decode the events of *environment*, and load the rows in *folder*: see ``limits.decode_and_load_seconds``."""
    return _taken([sys.executable, "-m", "deploy.bench.limits", str(folder)], environment)


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
                peaks |= {pid: max(size, peaks.get(pid, 0)) for pid, size in rss_bytes(pids).items()}
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
    children = _each([pid], lambda process: process.children(recursive=True))
    return [pid, *(each.pid for each in children.get(pid, ()))]


def processor_seconds(pids: Iterable[int]) -> float:
    """Return the processor time that *pids* have used."""
    times = _each(pids, psutil.Process.cpu_times)
    return sum(each.user + each.system for each in times.values())


def pss_bytes(pids: Iterable[int]) -> int:
    """Return the memory of *pids* together; memory that several share counts once."""
    return sum(_each(pids, lambda process: process.memory_full_info().pss).values())


def rss_bytes(pids: Iterable[int]) -> dict[int, int]:
    """Return the resident set of each of *pids*."""
    return _each(pids, lambda process: process.memory_info().rss)


def _each(pids: Iterable[int], read: Callable[[psutil.Process], Reading]) -> dict[int, Reading]:
    """Return what *read* finds of each of *pids*; a process that has ended is absent."""
    found: dict[int, Reading] = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found[pid] = read(psutil.Process(pid))
    return found


# ---- In the process ----


def hand_over(found: object) -> None:
    """Print *found* as JSON, for the process that measures. A stream of Python's own may be one that writes a part."""
    with open(1, "wb", closefd=False) as out:
        out.write(msgspec.json.encode(found))


def main() -> None:
    """Fold the inbox again and print how long it took."""
    from worker.proof import rebuild  # noqa: PLC0415 - the measuring process needs none of it

    engine = database.engine(Settings.load().postgresql)
    started = time.monotonic()
    with rebuild.rebuilt(engine):
        seconds = time.monotonic() - started
    hand_over(Inside(seconds))


if __name__ == "__main__":
    main()
