"""Runs the Procfile's own processes on this machine, so that what runs here is what runs in production.

honcho reads the Procfile, starts the commands and prints their lines. Its manager is not used: it ends every process as
soon as one has ended, but the acceptance tests kill one with -9 and start it again while the others run.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Final, Self, TextIO

from honcho.environ import parse_procfile
from honcho.printer import Message, Printer
from honcho.process import Popen

from deploy.local.leash import leashed
from schemas.slots import ending

PROCFILE: Final = Path(__file__).parent.with_name("Procfile")
"""In a checkout a link to the Procfile at the top, where Heroku looks for it; the wheel has the file itself here."""
RELEASE: Final = "release"
GRACE_SECONDS: Final = 30.0  # what Heroku gives a process between SIGTERM and SIGKILL
LAST_LINES_MAX: Final = 20  # of a process that ended by itself
LAST_LINES_SECONDS: Final = 2.0  # a process that left the group may hold the pipe open for ever


def read_procfile(procfile: Path = PROCFILE) -> dict[str, str]:
    """Return the commands of a Procfile by name, in its order."""
    return dict(parse_procfile(procfile.read_text()).processes)


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that ended by itself: its exit code, or the negative number of a signal, and its last lines."""

    name: str
    code: int
    last_lines: str

    def __str__(self) -> str:
        lines = f"; its last lines:\n{self.last_lines}" if self.last_lines else " without a word"
        return f"The {self.name} process ended {ending(self.code)}{lines}"


class Processes:
    """Every process of a Procfile but the release phase, as a context manager that starts and stops them.

    *env* is their whole environment, but for a PATH that leads `python` to this interpreter. Each runs in the
    Procfile's folder and in a process group of its own; its lines go to *output* (stderr) under its name. When this
    process is killed they get SIGTERM (Linux), so start them from a thread that lives as long.
    """

    def __init__(
        self,
        env: Mapping[str, str],
        *,
        procfile: Path = PROCFILE,
        grace_seconds: float = GRACE_SECONDS,
        output: TextIO | None = None,
    ) -> None:
        self._env = dict(env)
        self._procfile = procfile
        self._grace_seconds = grace_seconds
        self._commands = {name: command for name, command in read_procfile(procfile).items() if name != RELEASE}
        self._lines = _Lines(output or sys.stderr, width=max(map(len, self._commands), default=0))
        self._running: dict[str, _Running] = {}
        # A SimpleQueue may be put to from a signal handler while this very thread waits on it; an Event may not.
        self._ends: SimpleQueue[_Running | None] = SimpleQueue()
        self.ended: Ended | None = None

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within this, send SIGINT to this very process when one of them ends by itself; then `ended` is which."""

        def interrupt() -> None:
            self.ended = self.wait()
            if self.ended is not None:
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt, name="interrupting", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.ask_to_stop()
            thread.join()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the processes in the Procfile."""
        return tuple(self._commands)

    def start(self) -> None:
        """Start every process that does not run."""
        for name in self._commands:
            if self.returncode(name) is not None or name not in self._running:
                self.start_one(name)

    def start_one(self, name: str) -> None:
        """Start one process, or start it again after its end.

        Raises:
            KeyError: the Procfile has no such process.
            RuntimeError: it still runs.
        """
        command = self._commands[name]
        if name in self._running and self.returncode(name) is None:
            raise RuntimeError(f"{name} runs already, as process {self.pid(name)}")
        process = _popen(command, self._env, self._procfile)
        self._running[name] = _Running(name, process, self._lines, self._ends)

    def stop(self) -> None:
        """Ask every process to end, wait for each, and kill what has not ended in 30 seconds."""
        running = list(self._running.values())
        for each in running:
            each.terminate()
        for each in running:
            each.end(self._grace_seconds)

    def kill(self, name: str) -> None:
        """End one process and its children at once, as kill -9 does, and return when it is gone."""
        running = self._running[name]
        running.expected_to_end = True
        running.kill()
        running.wait()

    def pid(self, name: str) -> int:
        """Return the id of the process last started under *name*, which is also that of its group."""
        return self._running[name].process.pid

    def returncode(self, name: str) -> int | None:
        """Return how the process ended (a signal as a negative number), None while it runs or was never started."""
        running = self._running.get(name)
        return None if running is None else running.process.poll()

    def wait(self) -> Ended | None:
        """Block until a process ends that was not killed here, and return it; None when a stop was asked for."""
        while (ended := self._ends.get()) is not None:
            if not ended.expected_to_end:
                return Ended(ended.name, ended.wait(), ended.last_lines)
        return None

    def ask_to_stop(self) -> None:
        """Let `wait` return; may be called from a signal handler or another thread."""
        self._ends.put(None)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Lines:
    """Prints lines under the name of the process they come from, whole ones, from many threads."""

    def __init__(self, output: TextIO, width: int) -> None:
        self._printer = Printer(output, width=width)
        self._lock = threading.Lock()

    def write(self, name: str, line: bytes) -> None:
        message = Message(type="line", data=line, time=datetime.now().astimezone(), name=name, colour=None)
        # A reader of our output that has gone away must not stop the processes.
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._printer.write(message)


@dataclass(eq=False)
class _Running:
    """One started process, with the two threads that print its lines and report its end."""

    name: str
    process: "subprocess.Popen[bytes]"
    lines: _Lines
    ends: "SimpleQueue[_Running | None]" = field(default_factory=SimpleQueue)
    expected_to_end: bool = False

    def __post_init__(self) -> None:
        self._last_lines: deque[bytes] = deque(maxlen=LAST_LINES_MAX)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._reader = threading.Thread(target=self._print, daemon=True)
        self._watcher.start()
        self._reader.start()

    def terminate(self) -> None:
        """Ask the process to end. Its children are not asked: the process itself decides how they end."""
        self.expected_to_end = True
        self.process.terminate()

    def end(self, grace_seconds: float) -> None:
        """Return when it and its children are gone; what is still there after the grace is killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_seconds)
        self.kill()
        self.wait()

    def kill(self) -> None:
        """Kill the whole group, if the process is there."""
        if self.process.poll() is None:
            self._kill_group()

    def wait(self) -> int:
        """Return its exit code once it and its children have ended and the last line is printed."""
        self._watcher.join()
        self._reader.join(LAST_LINES_SECONDS)
        return self.process.wait()

    def _print(self) -> None:
        if self.process.stdout is not None:
            with self.process.stdout as lines:
                for line in lines:
                    self._last_lines.append(line)
                    self.lines.write(self.name, line)

    @property
    def last_lines(self) -> str:
        """The last lines of the process."""
        return b"".join(self._last_lines).decode(errors="replace").rstrip()

    def _watch(self) -> None:
        self.process.wait()
        self._kill_group()  # at once, while what is left of the group still has the number to itself
        self.ends.put(self)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _popen(command: str, env: Mapping[str, str], procfile: Path) -> "subprocess.Popen[bytes]":
    # The shell replaces itself by the one simple command, so that a signal reaches the command and not a shell.
    process: subprocess.Popen[bytes] = Popen(
        leashed(["/bin/sh", "-c", f"exec {command}"], signal.SIGTERM),
        shell=False,
        cwd=_working_folder(procfile),
        env=_with_our_python(env),
        stdin=subprocess.DEVNULL,
    )
    return process


def _working_folder(procfile: Path) -> Path:
    """Return the Procfile's folder; for our own that is where our packages are, be it a checkout or site-packages."""
    return procfile.parent.parent if procfile == PROCFILE else procfile.parent


def _with_our_python(env: Mapping[str, str]) -> dict[str, str]:
    """Return *env* with `python` leading to this interpreter and its lines coming out as they are written."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    return {**env, "PATH": path, "PYTHONUNBUFFERED": "1"}
