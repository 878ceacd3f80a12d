"""Payfold on one machine: the Procfile's processes on embedded servers, for `payfold up` and `payfold demo`."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TextIO, TypeVar

from deploy.local import credentials, services
from deploy.local.discovery import DEMO_PREFIX, is_configured
from deploy.local.errors import PortLost, StartError
from deploy.local.ports import LOOPBACK, claimed_port, free_port
from deploy.local.processes import Ended, Processes
from deploy.local.server import START_SECONDS_MAX
from schemas import accounts, envfile, migrate
from schemas.settings import Settings

READY_SECONDS_MAX: Final = 60
READY_POLL_SECONDS: Final = 0.05
BENCH_PREFIX: Final = "bench-"
PORTS_TRIED: Final = 2
"""Where any port will do, a second one is tried if another program takes the first before it is bound."""
ADDRESS_IN_USE: Final = "address already in use"

Started = TypeVar("Started")


@dataclass(frozen=True, slots=True)
class Running:
    """Payfold as it runs here; *token* is None where some are configured.

    *secret* is the first signing secret; it may be shown where it *is_secret_ours*, made by `payfold up`.
    """

    address: str
    environment: Mapping[str, str]
    settings: Settings
    processes: Processes
    token: str | None
    secret: str
    is_secret_ours: bool


@contextmanager
def temporary_folder(settings: Settings, *, prefix: str = DEMO_PREFIX) -> Iterator[Path]:
    """Make a data folder for one demo, and remove it afterwards.

    Folders with the same *prefix* that killed runs left behind are removed first.
    """
    parent = settings.payfold_data_dir.absolute()
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in parent.glob(f"{prefix}*"):
        if services.running_services(left) is None and _is_old(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_old(folder: Path) -> bool:
    """A folder may belong to a demo that is just starting."""
    return time.time() - folder.stat().st_mtime > START_SECONDS_MAX


@contextmanager
def running(
    settings: Settings,
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    output: TextIO | None = None,
    may_take_another_port: bool = False,
) -> Iterator[Running]:
    """Run the servers that the settings do not name, the migrations, and every process, until the block ends.

    *environment* is added to this process's own, for the started processes alone. A port that is taken is an error.
    Where no port is configured and it *may_take_another_port*, it takes a random free one.

    Raises:
        StartError, ServicesError, ConfigurationError: with the remedy.
    """
    named = services.embedded_services(
        folder,
        database_url=settings.database_url.get_secret_value() if settings.database_url else None,
        redis_url=settings.redis_url.get_secret_value() if settings.redis_url else None,
    )
    with named as found:
        start = partial(_started, settings, folder, found, environment=environment or {}, output=output)
        is_free_to_choose = may_take_another_port and not is_configured("PORT")
        ports = [free_port() for _ in range(PORTS_TRIED)] if is_free_to_choose else [settings.port]
        with on_first_free(ports, start) as started:
            yield started


@contextmanager
def on_first_free(ports: Sequence[int], start: Callable[[int], AbstractContextManager[Started]]) -> Iterator[Started]:
    """Enter what *start* returns for the first of *ports* that no other program takes before it is bound.

    Raises:
        PortLost: the last one is taken, too.
    """
    with ExitStack() as opened:
        for port in ports[:-1]:
            with suppress(PortLost):
                started = opened.enter_context(start(port))
                break
        else:
            started = opened.enter_context(start(ports[-1]))
        yield started


@contextmanager
def _started(
    settings: Settings,
    folder: Path,
    found: services.Services,
    port: int,
    *,
    environment: Mapping[str, str],
    output: TextIO | None,
) -> Iterator[Running]:
    """Run the processes on the servers *found*, and the web process on *port*; arguments and errors as `running`."""
    with claimed_port(port):
        own = credentials.ensured(folder, settings, port=port)
        environment = {**_absolute(os.environ), **environment}
        environment |= {"DATABASE_URL": found.database_url, "REDIS_URL": found.redis_url}
        environment |= {"PAYFOLD_HOST": LOOPBACK, **own.environment()}
        if not is_configured("PAYFOLD_LOG_FORMAT"):
            environment["PAYFOLD_LOG_FORMAT"] = "console"
        complete = Settings.load(envfile.completed(environment))
        migrate_here(complete, output or sys.stderr)
        with Processes(environment, output=output) as processes:
            address = f"http://{LOOPBACK}:{complete.port}"
            wait_until_ready(address, processes, token=own.token)
            secret, is_ours = complete.signing_secrets[0].secret.decode(), own.signing_secret is not None
            yield Running(address, environment, complete, processes, own.token, secret, is_ours)


def _absolute(environment: Mapping[str, str]) -> dict[str, str]:
    """Return *environment* for processes in another working folder: files and folders of settings as absolute paths."""
    files = {f"{name.upper()}_FILE" for name in Settings.model_fields} | {envfile.ENV_FILE}
    found = {
        name: str(Path(value).absolute()) if value and name.upper() in files else value
        for name, value in environment.items()
    }
    return {**found, envfile.DATA_DIR: str(envfile.data_folder(environment))}


def migrate_here(settings: Settings, output: TextIO) -> None:
    """Bring the schema to this release, and write what splits an account to *output*, as warnings.

    The release phase of a deployment fails on a split account. Here the rename that mends it needs the servers, which
    run no longer than everything else does.
    """
    migrate.upgrade(settings.postgresql)
    output.writelines(f"Warning: {fault.detail}\n  {fault.command}\n" for fault in accounts.faults_here(settings))


def wait_until_ready(address: str, processes: Processes, *, token: str | None = None) -> None:
    """Return once the web process at *address* is ready; another program that answers there does not know *token*.

    Raises:
        PortLost: another program took the port first.
        StartError: a process has ended for another reason, or the time is up.
    """
    import httpx  # noqa: PLC0415 - a command that starts nothing starts sooner without it

    deadline = time.monotonic() + READY_SECONDS_MAX
    authorization = {} if token is None else {"Authorization": f"Bearer {token}"}
    paths = ["/health/ready"] if token is None else ["/health/ready", "/v1/status"]
    with httpx.Client(base_url=address, headers=authorization, timeout=2) as client:
        while time.monotonic() < deadline:
            if any(processes.returncode(name) is not None for name in processes.names):
                raise _fault_of(processes.wait(), client.base_url.port)
            with suppress(httpx.TransportError):
                if all(client.get(path).is_success for path in paths):
                    return
            time.sleep(READY_POLL_SECONDS)
    raise StartError(f"The web process did not become ready within {READY_SECONDS_MAX} seconds.")


def _fault_of(ended: Ended | None, port: int | None) -> StartError:
    if ended is None:
        return StartError("A process was asked to stop before all of them had started.")
    if port is not None and ADDRESS_IN_USE in ended.last_lines.lower():
        return PortLost(port)
    return StartError(f"The {ended.name} process ended at once; its own words are above.")
