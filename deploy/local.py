"""Payfold on one machine: the Procfile's processes on embedded servers, for `payfold up` and `payfold demo`."""

import asyncio
import hashlib
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO, TypeVar

import httpx
import uvloop

from deploy import services
from deploy.processes import Processes, run_release
from schemas.errors import PayfoldError
from schemas.settings import Settings

LOOPBACK: Final = "127.0.0.1"
READY_SECONDS_MAX: Final = 60
UP_FOLDER: Final = "up"
DEMO_PREFIX: Final = "demo-"
BENCH_PREFIX: Final = "bench-"
STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Result = TypeVar("Result")


class StartError(PayfoldError):
    """Payfold did not start."""


@dataclass(frozen=True, slots=True)
class Running:
    """Payfold as it runs here; *token* is None where some are configured.

    *secret* is the first signing secret, which is nobody's yet, and may be shown, where it *is_secret_new*.
    """

    address: str
    environment: Mapping[str, str]
    settings: Settings
    processes: Processes
    token: str | None
    secret: str
    is_secret_new: bool


def here(settings: Settings) -> Settings:
    """Return *settings*, completed with the embedded servers that run in the data folder, where none are named."""
    if settings.database_url is not None:
        return settings
    folders = [settings.payfold_data_dir / UP_FOLDER, *sorted(settings.payfold_data_dir.glob(f"{DEMO_PREFIX}*"))]
    for folder in folders:
        found = services.running_services(folder)
        if found is not None:
            return Settings.load({**os.environ, "DATABASE_URL": found.database_url, "REDIS_URL": found.redis_url})
    return settings


@contextmanager
def stop_when_told() -> Iterator[None]:
    """Raise KeyboardInterrupt here at the first SIGINT, SIGTERM or SIGHUP, and leave what then ends in peace."""

    def stop(*_: object) -> None:
        end_in_peace()
        raise KeyboardInterrupt

    with _handlers_restored():
        for each in STOP_SIGNALS:
            signal.signal(each, stop)
        yield


def end_in_peace() -> None:
    """Within ``stop_when_told``, let no signal disturb what ends from here on."""
    for each in STOP_SIGNALS:
        signal.signal(each, lambda *_: None)


def wait_until_told() -> NoReturn:
    """Do nothing until ``stop_when_told`` ends that."""
    while True:
        signal.pause()


def run_until_told(work: Coroutine[Any, Any, Result]) -> Result:
    """Run *work* in an event loop of its own and return its result; ``stop_when_told`` ends it too.

    Raises:
        KeyboardInterrupt: it was told to stop, and is cancelled.
    """

    async def cancellable() -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.create_task(work)
        for each in STOP_SIGNALS:
            loop.add_signal_handler(each, task.cancel)
        return await task

    # A handler that raises may do so within a callback of a transport, and there the loop swallows it.
    with suppress(asyncio.CancelledError), _handlers_restored():
        return uvloop.run(cancellable())
    signal.raise_signal(signal.SIGINT)
    raise KeyboardInterrupt


@contextmanager
def _handlers_restored() -> Iterator[None]:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    try:
        yield
    finally:
        for each, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(each, handler)


@contextmanager
def temporary_folder(settings: Settings, *, prefix: str = DEMO_PREFIX) -> Iterator[Path]:
    """Make a data folder for one demo, and remove it and what killed demos, or whoever has *prefix*, left behind."""
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
    settings: Settings, folder: Path, *, environment: Mapping[str, str] | None = None, output: TextIO | None = None
) -> Iterator[Running]:
    """Run the servers that the environment does not name, the release phase, and every process, until the block ends.

    *environment* is laid over the one here, for the processes alone.

    Raises:
        StartError, ServicesError: with what to do.
    """
    named = services.embedded_services(
        folder,
        database_url=settings.database_url.get_secret_value() if settings.database_url else None,
        redis_url=settings.redis_url.get_secret_value() if settings.redis_url else None,
    )
    with named as found, _claimed_port(settings) as port:
        token = None if settings.tokens else f"pf_{secrets.token_urlsafe(24)}"
        environment = {**os.environ, **(environment or {})}
        environment |= {"DATABASE_URL": found.database_url, "REDIS_URL": found.redis_url}
        environment |= {"PORT": str(port), "PAYFOLD_HOST": LOOPBACK}
        if not settings.signing_secrets:
            environment["STRIPE_WEBHOOK_SECRETS"] = f"whsec_{secrets.token_urlsafe(24)}"
        if token is not None:
            environment["PAYFOLD_TOKENS"] = f"local:admin+personal:{hashlib.sha256(token.encode()).hexdigest()}"
        environment.setdefault("PAYFOLD_LOG_FORMAT", "console")
        complete = Settings.load(environment)
        if run_release(environment, output=output) != 0:
            raise StartError("The database could not be migrated; its own words are above.")
        with Processes(environment, output=output) as processes:
            address = f"http://{LOOPBACK}:{complete.port}"
            wait_until_ready(address, processes)
            secret, is_new = complete.signing_secrets[0].secret.decode(), not settings.signing_secrets
            yield Running(address, environment, complete, processes, token, secret, is_new)


@contextmanager
def _claimed_port(settings: Settings) -> Iterator[int]:
    """Yield a port for the web process, and keep other Payfolds on this machine from taking it too."""
    # The web process binds it seconds from now. Until the end, the datagram port of the same number tells another
    # Payfold, which may be starting just now, that this one is spoken for.
    with socket.socket(type=socket.SOCK_DGRAM) as claim:
        try:
            claim.bind((LOOPBACK, settings.port))
        except OSError:
            yield free_port(settings, is_spoken_for=True)
        else:
            yield free_port(settings)


def free_port(settings: Settings, *, is_spoken_for: bool = False) -> int:
    """Return the configured port, or a free one where nobody asked for it by name."""
    if "PORT" in os.environ:
        return settings.port
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, 0 if is_spoken_for else settings.port))
        except OSError:
            probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def wait_until_ready(address: str, processes: Processes) -> None:
    """Return once the web process at *address* is ready.

    Raises:
        StartError: a process has ended, or the time is up.
    """
    deadline = time.monotonic() + READY_SECONDS_MAX
    with httpx.Client(base_url=address, timeout=2) as client:
        while time.monotonic() < deadline:
            ended = [name for name in processes.names if processes.returncode(name) is not None]
            if ended:
                raise StartError(f"The {ended[0]} process ended at once; its own words are above.")
            try:
                if client.get("/health/ready").is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
    raise StartError(f"The web process did not become ready within {READY_SECONDS_MAX} seconds.")
