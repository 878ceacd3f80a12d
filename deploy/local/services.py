"""The servers behind `payfold up`, `payfold demo` and the tests: a real PostgreSQL and a real Redis-protocol server.

They listen on loopback only, on free ports, with passwords, and keep everything in one data folder:

    owner.lock           held by the one process that owns the folder
    services.json        the URLs, while that process runs
    postgres/cluster     PostgreSQL's own data folder; its password and log are next to it
    valkey               the configuration with its password, and the log

The process that starts a server is the only owner of its folder: `embedded_services` holds a lock for that. So a server
that already runs in a folder when the lock is taken belongs to a dead owner, and is stopped.
"""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from deploy.local.errors import FolderInUse
from deploy.local.postgres import Postgres
from deploy.local.private_files import private_folder, write_private
from deploy.local.valkey import Valkey

OWNER_WAIT_SECONDS: Final = 1.0  # longer than `running_services` holds the lock to look


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
    announced = {"pid": os.getpid(), "database_url": services.database_url, "redis_url": services.redis_url}
    write_private(_announcement(folder), json.dumps(announced))
    try:
        yield
    finally:
        _announcement(folder).unlink(missing_ok=True)


def _lock(folder: Path, timeout_seconds: float) -> AbstractContextManager[object]:
    """Take the folder's lock, which the system gives back when its holder dies, however it dies.

    Raises:
        FolderInUse: another process holds it.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415 - a command that finds no servers starts sooner without it

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
