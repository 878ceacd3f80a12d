"""A command loads what it needs and no more: modules are counted, since times differ from machine to machine."""

import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer.main
from alembic.config import Config
from alembic.script import ScriptDirectory
from redis import Redis
from sqlalchemy import Engine

from deploy.cli import app
from deploy.commands.listed import COMMANDS
from schemas import database, lookup, migrate, queues, single, status, tables
from tests import ledger
from tests.command import ROOT, SECONDS_MAX, environment, payfold

HELP_MODULES_MAX = 400
"""`payfold --help` loads 343: typer, rich and what rich needs to show a help."""
READ_MODULES_MAX = 540
"""`payfold orders show` loads 488, most of them of typer, pydantic and the driver of PostgreSQL."""
STATUS_MODULES_MAX = 550
"""`payfold status` loads 500."""
_NOTED = """
import atexit, pathlib, runpy, sys
noted = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: noted.write_text("\\n".join(sys.modules)))
runpy.run_module("deploy", run_name="__main__")
"""


def loaded(arguments: str, noted: Path, **settings: str) -> list[str]:
    """Return the modules that a payfold command has loaded at its end, which is one without a fault."""
    command = [sys.executable, "-c", _NOTED, str(noted), *arguments.split()]
    subprocess.run(
        command, cwd=ROOT, env=environment(settings), timeout=SECONDS_MAX, check=True, stdout=subprocess.DEVNULL
    )
    return noted.read_text().split()


def packages(modules: list[str]) -> set[str]:
    """Return the packages that *modules* are of."""
    return {module.partition(".")[0] for module in modules}


def test_the_collector_rests() -> None:
    """At the end of a command the collector of cycles has nothing left to look through."""
    run = "import atexit, gc, runpy; atexit.register(lambda: print(len(gc.get_objects()), gc.get_freeze_count()))\n"
    command = [sys.executable, "-c", f"{run}runpy.run_module('deploy', run_name='__main__')", "--version"]
    ran = subprocess.run(command, cwd=ROOT, env=environment({}), timeout=SECONDS_MAX, check=True, capture_output=True)

    left, frozen = map(int, ran.stdout.splitlines()[-1].split())
    assert left < 1_000 < frozen


def test_the_help_loads_no_command(tmp_path: Path) -> None:
    """`payfold --help` loads no command, no library that speaks with a server, and few modules."""
    modules = loaded("--help", tmp_path / "modules")

    assert not packages(modules) & {"sqlalchemy", "psycopg", "pydantic", "redis", "celery", "worker", "alembic"}
    assert sorted(each for each in modules if each.startswith("deploy.commands.")) == ["deploy.commands.listed"]
    assert len(modules) <= HELP_MODULES_MAX


HEAVY = {
    "sqlalchemy",
    "alembic",
    "celery",
    "kombu",
    "stripe",
    "fastapi",
    "starlette",
    "structlog",
    "worker",
    "pygments",
}


@pytest.mark.parametrize(
    ("arguments", "modules_max"), [("status", STATUS_MODULES_MAX), ("orders show cs_1", READ_MODULES_MAX)]
)
def test_what_reads_a_little_loads_a_little(
    engine: Engine, database_url: str, redis_url: str, tmp_path: Path, arguments: str, modules_max: int
) -> None:
    """`status` and `orders show` load the driver, and none of what they do not need."""
    add_order(engine, account="")

    modules = loaded(arguments, tmp_path / "modules", DATABASE_URL=database_url, REDIS_URL=redis_url)

    assert not packages(modules) & HEAVY
    assert len(modules) <= modules_max


def test_a_list_loads_its_own(engine: Engine, database_url: str, tmp_path: Path) -> None:
    """A command that lists rows loads SQLAlchemy, and none of Celery, Stripe's client, the web server and alembic."""
    for arguments in ("events list", "orders list", "migrate status", "summary"):
        modules = loaded(arguments, tmp_path / "modules", DATABASE_URL=database_url)

        assert not packages(modules) & HEAVY - {"sqlalchemy", "structlog", "pygments"}, arguments


def test_the_queues_are_asked_without_a_client(database_url: str, redis_url: str) -> None:
    """A plain connection reads the lengths that Redis's client reads; one that Redis refuses is one that is away."""
    url = urlsplit(redis_url)
    wrong = redis_url.replace(f":{url.password}@", ":wrong@")
    with Redis.from_url(redis_url) as client:
        client.rpush("fold", "a", "b", "c")
        client.rpush("stripe", "a")

    assert status.broker_state(queues.Plain(redis_url)) == status.Broker(state="ok", fold_waiting=3, stripe_waiting=1)
    assert status.broker_state(queues.Plain(wrong)) == status.Broker(state="away")
    assert status.broker_state(queues.Plain("redis://127.0.0.1:1")) == status.Broker(state="away")
    # Whom Redis asks for no password, and a number that is written at length.
    plain = url._replace(netloc=f"bob@{url.hostname}:{url.port}", path=f"/0{url.path.strip('/')}").geturl()
    with Redis.from_url(redis_url) as client:
        client.acl_setuser("bob", enabled=True, nopass=True, keys="*", commands=["+@all"])
        assert status.broker_state(queues.Plain(plain)).fold_waiting == 3
        client.acl_deluser("bob")
    ran = payfold("status", "--format=json", DATABASE_URL=database_url, REDIS_URL=f"{redis_url}?socket_timeout=1")
    assert ran.json["broker"] == {"state": "ok", "fold_waiting": 3, "stripe_waiting": 1}


@pytest.mark.parametrize("answer", [b":5", b":", b":x\r\n", b"+OK\r\n", b""])
def test_an_odd_answer_of_the_broker(answer: bytes) -> None:
    """An answer that is cut off, or no number, is no length."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"redis://127.0.0.1:{server.getsockname()[1]}"
        assert status.broker_state(queues.Plain(address)) == status.Broker(state="away")
        thread.join()


def add_order(engine: Engine, *, account: str) -> None:
    """Add an order, `cs_1`, with little in it."""
    ledger.execute(
        engine,
        "INSERT INTO orders (account, livemode, id, metadata, lines_complete, event_id, as_of)"
        " VALUES (:account, false, 'cs_1', '{\"a\": 1}', false, 'evt_1', now())",
        account=account,
    )


def test_one_row_is_found_in_both_ways(engine: Engine) -> None:
    """The driver alone finds the rows that the other commands find, with the same columns in the same order."""
    for each in ("", "acct_1", "acct_2"):
        add_order(engine, account=each)

    assert list(single.ORDER) == tables.orders.c.keys()
    with database.transaction(engine) as connection:
        driver = database.driver_of(connection)
        cases: list[tuple[str, str | None, bool | None, int]] = [
            ("cs_1", None, None, 2),
            ("cs_1", "acct_1", None, 1),
            ("cs_1", "acct_1", True, 0),
            ("cs_1", "acct_3", None, 0),
            ("cs_2", None, None, 0),
        ]
        for key, account, livemode, count in cases:
            found = single.by_id(driver, "orders", single.ORDER, key, account=account, livemode=livemode)
            others = lookup.by_id(connection, tables.orders, key, account=account, livemode=livemode)

            assert len(found) == len(others) == count
            assert account is None or [list(row.items()) for row in found] == [list(row.items()) for row in others]


def test_the_revisions_are_those_of_alembic() -> None:
    """The files' names have the revisions in alembic's order, and what is pending after one comes after it."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "schemas" / "migrations"))
    chain = [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()]

    assert list(migrate.revisions()) == chain[::-1]
    assert [migrate.pending_after(given) for given in ((), ("0002",), ("9999",))] == [
        migrate.revisions(),
        migrate.revisions()[2:],
        (),
    ]


def whole() -> Any:  # noqa: ANN401 - typer's copy of click has no public types
    """Return the payfold command."""
    return typer.main.get_command(app)


def test_the_list_is_the_commands_own() -> None:
    """The list names every command of every module, each with the first paragraph of its help."""
    listed = {name: each.help for name, each in COMMANDS.items()}
    modules = {
        path.stem
        for path in (ROOT / "deploy" / "commands").glob("*.py")
        if "app: Final = typer.Typer(" in path.read_text()
    }

    assert listed == {name: " ".join(each.help.split("\n\n")[0].split()) for name, each in whole().commands.items()}
    assert {each.module for each in COMMANDS.values()} == modules
