"""Fixtures for every test: real servers, a fresh migrated database, and a seed that repeats the run.

The servers are those that `DATABASE_URL` and `REDIS_URL` name (a role that may create databases; logical databases from
number 1 on are flushed), else embedded ones, started at first use and once for all of xdist's processes.
`PAYFOLD_TEST_POSTGRES_BIN` (a folder) and `PAYFOLD_TEST_VALKEY_BIN` (a file) name other binaries for the embedded ones.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import pytest
import redis
from hypothesis import settings

from deploy.local.postgres import Postgres
from deploy.local.services import Services
from deploy.local.valkey import Valkey
from tests.databases import TEMPLATE_VARIABLE, copied, migrated

if TYPE_CHECKING:
    from sqlalchemy import Engine

pytest.register_assert_rewrite("tests.literals")

# Tests ignore a developer's own settings: the .env of the checkout and a file that PAYFOLD_ENV_FILE names.
os.environ["PAYFOLD_DATA_DIR"] = "no-such-folder"
os.environ.pop("PAYFOLD_ENV_FILE", None)

MEMORY = Path("/dev/shm")  # noqa: S108 - the folder made there is private
MEMORY_BYTES_MIN = 4_000_000_000
SERVICES = pytest.StashKey[Services]()
SEED_OPTION = "hypothesis_seed"


class Node(Protocol):
    """One process of xdist, as its untyped controller knows it."""

    config: pytest.Config
    workerinput: dict[str, object]


# ---- The run ----


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its option
def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed of the property tests if the command line does not."""
    settings.register_profile("payfold", print_blob=True, derandomize=False, deadline=None)
    settings.load_profile("payfold")
    if config.getoption(SEED_OPTION) is None:
        setattr(config.option, SEED_OPTION, str(secrets.randbelow(2**32)))


def pytest_report_header(config: pytest.Config) -> str:
    """Print the seed, so that a failure can be repeated."""
    return f"repeat this run's random choices with --hypothesis-seed={config.getoption(SEED_OPTION)}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs the long tests."""
    parser.addoption("--long", action="store_true", help="run the tests that take minutes too")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests that use a server, so that they can be run against another one; skip the long tests unless asked."""
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: ask for it with --long"))
        if {"services", "postgres_bin", "valkey_bin"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.integration)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Node) -> None:
    """Pass the addresses of the run's servers to one of its processes."""
    services = _services_of(node.config)
    node.workerinput["services"] = (services.database_url, services.redis_url)


def _services_of(config: pytest.Config) -> Services:
    """Return the run's servers; they start at the first call and stop when the run ends."""
    if SERVICES not in config.stash:
        running = ExitStack()
        config.add_cleanup(running.close)
        config.stash[SERVICES] = _start(running)
    return config.stash[SERVICES]


def _start(running: ExitStack) -> Services:
    folder = running.enter_context(_server_folder())
    return Services(
        os.environ.get("DATABASE_URL") or running.enter_context(_postgres_in(folder)).url,
        os.environ.get("REDIS_URL") or running.enter_context(_valkey_in(folder)).url,
    )


@contextmanager
def _server_folder() -> Iterator[Path]:
    """Make a folder for a server, in memory where that has room: most tests make and drop a database of 300 files."""
    in_memory = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES_MIN else None
    with TemporaryDirectory(prefix="payfold-tests-", dir=in_memory) as folder:
        yield Path(folder)


def _postgres_in(folder: Path) -> Postgres:
    return Postgres(folder / "postgres", durable=False, postgres_bin=_path_in("PAYFOLD_TEST_POSTGRES_BIN"))


def _valkey_in(folder: Path) -> Valkey:
    return Valkey(folder / "valkey", valkey_bin=_path_in("PAYFOLD_TEST_VALKEY_BIN"))


def _path_in(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None


# ---- Shared by all tests ----


@pytest.fixture(scope="session")
def services(request: pytest.FixtureRequest) -> Services:
    """The addresses of the run's servers."""
    handed_down = getattr(request.config, "workerinput", {}).get("services")
    return Services(*handed_down) if handed_down else _services_of(request.config)


@pytest.fixture(scope="session")
def template_database(services: Services) -> Iterator[str]:
    """Return the name of an empty migrated database, from which others are copied."""
    if given := os.environ.get(TEMPLATE_VARIABLE):
        yield given
        return
    with migrated(services.database_url) as name:
        yield name


# ---- A test's own ----


@pytest.fixture
def database_url(services: Services, template_database: str) -> Iterator[str]:
    """Return the URL of a migrated database that no other test has seen."""
    with copied(services.database_url, template_database) as url:
        yield url


@pytest.fixture
def engine(database_url: str) -> Iterator["Engine"]:
    """Return an engine on a migrated database that no other test has seen."""
    from schemas import database  # noqa: PLC0415 - as above

    made = database.engine(database_url)
    yield made
    made.dispose()


@pytest.fixture
def another_database_url(services: Services, template_database: str) -> Iterator[str]:
    """Return the URL of a second such database, for the tests that compare two."""
    with copied(services.database_url, template_database) as url:
        yield url


@pytest.fixture
def redis_url(services: Services, worker_id: str) -> str:
    """Return the URL of an empty logical database that no other process of the run uses."""
    number = 1 if worker_id == "master" else int(worker_id.removeprefix("gw")) + 2
    url = _at_database(services.redis_url, str(number))
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture(scope="session")
def postgres_bin() -> Path | None:
    """Return the folder of PostgreSQL's binaries to test with, None for the installed ones."""
    return _path_in("PAYFOLD_TEST_POSTGRES_BIN")


@pytest.fixture(scope="session")
def valkey_bin() -> Path | None:
    """Return the Valkey binary to test with, None for the installed one."""
    return _path_in("PAYFOLD_TEST_VALKEY_BIN")


@pytest.fixture
def own_postgres(postgres_bin: Path | None) -> Iterator[Postgres]:
    """Return a running PostgreSQL that the test may stop, kill and restart."""
    with (
        _server_folder() as folder,
        Postgres(folder / "postgres", durable=False, postgres_bin=postgres_bin) as server,
    ):
        yield server


@pytest.fixture
def own_valkey(tmp_path: Path, valkey_bin: Path | None) -> Iterator[Valkey]:
    """Return a running Redis-protocol server that the test may stop, kill and flush."""
    with Valkey(tmp_path / "valkey", valkey_bin=valkey_bin) as server:
        yield server


def _at_database(url: str, database: str) -> str:
    return urlsplit(url)._replace(path=f"/{database}").geturl()
