"""On a host that ends transactions which wait for their client, long work ends well however slow its reader is."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Engine, text

from deploy.sandbox.history import shop_history
from schemas import database
from tests import ledger
from worker.logs import archive, export, replay
from worker.logs.selection import LogFilters, Reading
from worker.proof import rebuild, reconcile, shadow, swap
from worker.proof.digest import digests

SHOP = shop_history(31, 30, money=True)
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
LATER = datetime(2099, 1, 1, tzinfo=UTC)
PATIENCE_MS = 300

Linger = Callable[..., None]


@pytest.fixture
def shop(engine: Engine, database_url: str) -> Iterator[Engine]:
    """Return an engine on a shop's tables, in a database that ends a session that idles in a transaction for 0.3 s."""
    ledger.record(engine, [ledger.delivery(event.body) for event in SHOP.events])
    ledger.fold(engine)
    name = conninfo_to_dict(database_url)["dbname"]
    with database.transaction(engine) as connection:
        connection.execute(text(f"ALTER DATABASE {name} SET idle_in_transaction_session_timeout = {PATIENCE_MS}"))
    made = database.engine(database_url)
    yield made
    made.dispose()


@pytest.fixture
def linger(engine: Engine) -> Linger:
    """Return a callback that waits longer than the host's idle limit, by the host's own clock.

    Of the many calls within one step of a rebuild, the first and the last wait: between them nothing else begins.
    """
    begun: set[object] = set()

    def wait(*about: object) -> None:
        match about:
            case (str(step), int(done), int(total)) if step in begun and done < total:
                return
            case (str(step), int(), int()):
                begun.add(step)
        with database.transaction(engine) as connection:
            connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": 2.5 * PATIENCE_MS / 1000})

    return wait


@pytest.fixture
def log(tmp_path: Path) -> str:
    """Return a log of the shop's events."""
    path = tmp_path / "log"
    path.write_bytes(b"\n".join(event.body.replace(b"\n", b"") for event in SHOP.events))
    return str(path)


def waiting(engine: Engine) -> list[str]:
    """Return the last statement of each session that idles in a transaction."""
    return [
        row["query"]
        for row in ledger.rows(
            engine,
            "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND state LIKE 'idle in transaction%'",
        )
    ]


def test_archive(shop: Engine, engine: Engine, linger: Linger, tmp_path: Path) -> None:
    """An archive leaves no transaction idle, between its steps or within them."""
    seen: list[str] = []

    def look(*_: object) -> None:
        linger()
        seen.extend(waiting(engine))

    with archive.alone(tmp_path):
        parts = archive.plan(shop, before=LATER)
        look()
        (done,) = [archive.archive(shop, part, before=LATER, folder=tmp_path, progress=look) for part in parts]
        look()

    assert (done.dropped, done.stayed, done.gone, seen) == (len(SHOP.events), 0, 0, [])


def test_export(shop: Engine, engine: Engine, linger: Linger) -> None:
    """An export into a slowly read pipe leaves no transaction idle, and is complete."""
    lines = export.export(shop, filters=LogFilters())
    first = next(lines)
    linger()
    held = waiting(engine)

    assert held == []
    assert len([first, *lines]) == len(SHOP.events)


def test_replay(shop: Engine, linger: Linger, log: str) -> None:
    """A log that arrives slowly is replayed."""
    replayed = replay.replay(shop, Reading([log], NOW, progress=linger))

    assert replayed.counts["duplicate"] == len(SHOP.events)


def test_rebuild(shop: Engine, linger: Linger) -> None:
    """A rebuild, its comparison and its swap keep their snapshot of the tables, however slow their callbacks are."""
    right = digests(shop)
    ledger.execute(shop, "UPDATE orders SET amount_total = amount_total + 1 WHERE id = (SELECT min(id) FROM orders)")

    with shadow.shadow(shop) as made:
        rebuild.rebuild(made, progress=linger)
        assert swap.compare(made, on_difference=linger).drift == 1
        found, _ = swap.swap(made, on_difference=linger)

    assert found.drift == 1
    assert digests(shop) == right


def test_reconcile(shop: Engine, linger: Linger, log: str) -> None:
    """A reconciliation by rules and by a log ends well, however slowly its findings are consumed."""
    ledger.execute(shop, "DELETE FROM inbox WHERE seq = (SELECT max(seq) - 1 FROM inbox)")

    wanted = reconcile.ReconcileRequest(logs=[log], each=linger, progress=linger)
    found = reconcile.run(shop, [reconcile.RULES, reconcile.LOG], wanted)

    assert [each["check"] for each in found["drift"]] == ["log"]
