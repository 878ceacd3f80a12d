"""Payfold on one machine: the Procfile's processes on embedded servers, for `payfold up` and `payfold demo`."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TextIO, TypeVar

from deploy.local import credentials, services
from deploy.local.processes import Ended, Processes
from schemas import accounts, envfile, migrate
from schemas.errors import ConfigurationError, PayfoldError
from schemas.settings import Settings, unknown

LOOPBACK: Final = "127.0.0.1"
READY_SECONDS_MAX: Final = 60
READY_POLL_SECONDS: Final = 0.05
UP_FOLDER: Final = "up"
DEMO_PREFIX: Final = "demo-"
BENCH_PREFIX: Final = "bench-"
PORT_MAX: Final = 65_535
PORTS_TRIED: Final = 2
"""Where any port will do, a second one is tried if another program takes the first before it is bound."""
ADDRESS_IN_USE: Final = "address already in use"
PORT_SECONDS_MAX: Final = 1.0
"""A listener on a port has this long to take a connection, before the port is tried by binding it."""
STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DROPPED_SECONDS: Final = 0.01
"""After this a request to stop that was dropped within a finalizer is repeated."""

Result = TypeVar("Result")


class StartError(PayfoldError):
    """Payfold did not start."""


class PortLost(StartError):
    """Another program on this machine listens on the port of the web process."""

    def __init__(self, port: int) -> None:
        super().__init__(
            f"Port {port} is taken by another program on this machine. Stop that one, or choose another port."
            f" Example: --port {port + 1 if port < PORT_MAX else port - 1}"
        )


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


def settings() -> Settings:
    """Return the settings of a command, which stops at a name that looks like a setting and is none.

    Raises:
        ConfigurationError: with the nearest right name.
    """
    found = Settings.load()
    refuse_unknown_names()
    return found


def refuse_unknown_names() -> None:
    """Raise ConfigurationError at a name that looks like a setting and is none, with the nearest right name."""
    if faults := unknown():
        raise ConfigurationError("\n".join(faults))


class Laid(NamedTuple):
    """A setting that is not configured and that a running `payfold up` or demo provides."""

    value: str
    source: str


def here(settings: Settings) -> Settings:
    """Return *settings*, completed with those of a Payfold that runs in the data folder: see ``laid``."""
    found = {name: each.value for name, each in laid(settings).items()}
    return Settings.load({**envfile.completed(os.environ), **found}) if found else settings


def laid(settings: Settings) -> dict[str, Laid]:
    """Return the unconfigured settings that a running `up` or demo provides: servers, secret, token, port.

    Where a database is configured, only one that runs on it counts.
    """
    folder = settings.payfold_data_dir
    for each in (folder / UP_FOLDER, *sorted(folder.glob(f"{DEMO_PREFIX}*"))):
        found = services.running_services(each)
        if found is None or (settings.database_url and settings.database_url.get_secret_value() != found.database_url):
            continue
        servers = {} if settings.database_url else {"DATABASE_URL": found.database_url, "REDIS_URL": found.redis_url}
        kept = credentials.kept(each).environment()
        own = str(each.absolute() / credentials.FILE)
        return {
            **{name: Laid(value, "embedded server") for name, value in servers.items()},
            **{name: Laid(value, own) for name, value in kept.items() if not _is_configured(name)},
        }
    return {}


def _is_configured(name: str) -> bool:
    return envfile.source_of(name, os.environ) is not None


@contextmanager
def stop_on_signal() -> Iterator[None]:
    """Raise KeyboardInterrupt here at the first SIGINT, SIGTERM or SIGHUP; later ones do not disturb the shutdown.

    Where Python drops what a signal handler raises, since it ran within a finalizer, it is raised again after that.
    """
    is_stopping = False

    def stop(*_: object) -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            raise KeyboardInterrupt

    def repeat_if_dropped(dropped: "sys.UnraisableHookArgs") -> None:
        nonlocal is_stopping
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            hook(dropped)
            return
        is_stopping = False
        signal.setitimer(signal.ITIMER_REAL, DROPPED_SECONDS)

    hook = sys.unraisablehook
    with _handlers_restored():
        for each in STOP_SIGNALS:
            signal.signal(each, stop)
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        sys.unraisablehook = repeat_if_dropped
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = hook


def end_in_peace() -> None:
    """Within ``stop_on_signal``, ignore signals from here on, so that the shutdown is not disturbed."""
    for each in STOP_SIGNALS:
        signal.signal(each, lambda *_: None)


def wait_for_signal() -> NoReturn:
    """Sleep until ``stop_on_signal`` raises KeyboardInterrupt."""
    while True:
        signal.pause()


def run_until_signal(work: Coroutine[Any, Any, Result]) -> Result:
    """Run *work* in an event loop of its own and return its result; ``stop_on_signal`` ends it too.

    Raises:
        KeyboardInterrupt: a signal asked for a stop, and *work* was cancelled.
    """
    import uvloop  # noqa: PLC0415 - as httpx below

    async def cancellable() -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.create_task(work)
        for each in STOP_SIGNALS:
            loop.add_signal_handler(each, task.cancel)
        return await task

    # A handler that raises may run within a callback of a transport, where the loop swallows the error.
    with suppress(asyncio.CancelledError), _handlers_restored():
        return uvloop.run(cancellable())
    signal.raise_signal(signal.SIGINT)
    raise KeyboardInterrupt


@contextmanager
def _handlers_restored() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in (*STOP_SIGNALS, signal.SIGALRM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


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
    return time.time() - folder.stat().st_mtime > services.START_SECONDS_MAX


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
        is_free_to_choose = may_take_another_port and not _is_configured("PORT")
        ports = [services.free_port() for _ in range(PORTS_TRIED)] if is_free_to_choose else [settings.port]
        with on_first_free(ports, start) as started:
            yield started


@contextmanager
def on_first_free(ports: Sequence[int], start: Callable[[int], AbstractContextManager[Result]]) -> Iterator[Result]:
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
    with _claimed_port(port):
        own = credentials.ensured(folder, settings, port=port)
        environment = {**_absolute(os.environ), **environment}
        environment |= {"DATABASE_URL": found.database_url, "REDIS_URL": found.redis_url}
        environment |= {"PAYFOLD_HOST": LOOPBACK, **own.environment()}
        if not _is_configured("PAYFOLD_LOG_FORMAT"):
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


@contextmanager
def _claimed_port(port: int) -> Iterator[None]:
    """Keep other Payfolds on this machine from taking *port* for their web processes, until the block ends.

    Raises:
        StartError: it may not be opened, or, as a PortLost, it is taken.
    """
    # The web process binds the port seconds from now. Until the end, this socket holds the datagram port of the same
    # number, so that another Payfold that is just starting finds it taken.
    with socket.socket(type=socket.SOCK_DGRAM) as claim:
        try:
            claim.bind((LOOPBACK, port))
        except PermissionError:
            raise StartError(f"Port {port} may not be opened by this user. Example: --port 8000") from None
        except OSError:
            raise PortLost(port) from None
        if is_taken(port):
            raise PortLost(port)
        yield


def is_taken(port: int) -> bool:
    """Return whether another program listens on a port of loopback."""
    with socket.socket() as client:
        client.settimeout(PORT_SECONDS_MAX)
        if client.connect_ex((LOOPBACK, port)) == 0:
            return True
    with socket.socket() as probe:
        # As the web process does: connections that have just ended are no listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen()
        except OSError:
            return True
    return False


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
