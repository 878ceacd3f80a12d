"""For any history an export is complete, a rebuild equals the live tables, and lost events are found and repaired."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from deploy.sandbox.history import shop_history
from schemas import database
from tests import histories, ledger
from tests.stage import stage
from worker.logs.export import export
from worker.logs.replay import replay
from worker.logs.selection import ALL_EVENTS, Reading
from worker.proof import rebuild, reconcile, shadow, swap
from worker.proof.digest import digests
from worker.proof.reconcile import LOG, REBUILD, ReconcileRequest
from worker.stripe_jobs import gaps

HISTORIES = 25
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture
def other(another_database_url: str) -> Iterator[Engine]:
    """Return an engine on another empty database."""
    opened = database.engine(another_database_url)
    yield opened
    opened.dispose()


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Return a random source with the seed that the run prints."""
    return random.Random(int(request.config.getoption("hypothesis_seed")))


def happen(engine: Engine, chance: random.Random) -> None:
    """Record small, nasty histories, each in a world of its own, and fold them in their order of arrival."""
    for number in range(HISTORIES):
        bodies = histories.bodies_of(chance.randrange(10**6))
        chance.shuffle(bodies)
        ledger.record(engine, [ledger.delivery(body, account=f"acct_{number}") for body in bodies])
        ledger.fold(engine, limit=chance.randint(1, 50))


def exported(engine: Engine, path: Path) -> str:
    """Export the inbox to *path*."""
    path.write_bytes(b"".join(export(engine, filters=ALL_EVENTS)))
    return str(path)


def ids(engine: Engine) -> list[tuple[str, str]]:
    """Return the events of the inbox."""
    with database.transaction(engine) as connection:
        found = connection.execute(text("SELECT account, id FROM inbox ORDER BY seq"))
        return [(row.account, row.id) for row in found]


def test_an_export_is_complete(engine: Engine, other: Engine, chance: random.Random, tmp_path: Path) -> None:
    """An export replayed into an empty database gives the same digest, and exports the same lines again."""
    happen(engine, chance)
    log = exported(engine, tmp_path / "log")

    done = replay(other, Reading([log], NOW))

    assert done.counts["new"] == len(ids(engine)) == done.counts["seen"]
    assert digests(other) == digests(engine)
    again = Path(exported(other, tmp_path / "again")).read_bytes()
    before = Path(log).read_bytes().replace(b'"source":"webhook"', b'"source":"replay"')
    assert sorted(again.splitlines()) == sorted(before.splitlines())


def test_a_rebuild_equals_the_live_tables(engine: Engine, chance: random.Random) -> None:
    """Folding step by step and folding at once give the same tables."""
    happen(engine, chance)

    with shadow.shadow(engine) as made:
        rebuild.rebuild(made)
        differences = swap.compare(made, on_difference=print).drift

    assert differences == 0


def test_lost_events_are_found_and_repaired(
    engine: Engine, other: Engine, chance: random.Random, tmp_path: Path
) -> None:
    """A comparison with a log finds exactly the lost events; a repair restores them, and the tables are the same."""
    happen(engine, chance)
    log = exported(engine, tmp_path / "log")
    lines = Path(log).read_bytes().splitlines(keepends=True)
    known = ids(engine)
    lost = set(chance.sample(range(len(lines)), chance.randint(1, len(lines) // 2)))
    (tmp_path / "rest").write_bytes(b"".join(line for at, line in enumerate(lines) if at not in lost))
    replay(other, Reading([str(tmp_path / "rest")], NOW))

    found = reconcile.run(other, [LOG, REBUILD], ReconcileRequest(logs=[log]))
    closed = reconcile.run(other, [LOG, REBUILD], ReconcileRequest(logs=[log], repair=True))

    assert {(each["account"], each["id"]) for each in found["drift"]} == {known[at] for at in lost}
    assert {(each["check"], each["kind"]) for each in found["drift"]} == {("log", "missing")}
    assert (closed["drift_total"], closed["repaired"]["events_recorded"]) == (0, len(lost))
    assert digests(other) == digests(engine)


def test_events_that_never_came_are_fetched(
    database_url: str, redis_url: str, chance: random.Random, tmp_path: Path
) -> None:
    """A comparison with a log finds exactly the events that never came; a gap fill fetches those that Stripe keeps."""
    with stage(database_url, redis_url, history=lambda: shop_history(chance.randrange(1000), 40, money=True)) as at:
        at.account.advance(300)
        kept = (at.now - gaps.KEPT + timedelta(hours=1)).timestamp()
        asked = [e for e in at.account.events if e.type in gaps.wanted_types() and e.created > kept]
        lost = {event.id for event in chance.sample(asked, chance.randint(1, len(asked) // 2))}
        ledger.record(at.engine, [ledger.delivery(e.body) for e in at.account.events if e.id not in lost])
        at.fold()
        path = tmp_path / "log"
        path.write_bytes(b"\n".join(event.body for event in at.account.events))

        found = reconcile.run(at.engine, [LOG, REBUILD], ReconcileRequest(logs=[str(path)]))
        gaps.run_once(at.context(), since=at.now - gaps.KEPT)
        at.fold()
        closed = reconcile.run(at.engine, [LOG, REBUILD], ReconcileRequest(logs=[str(path)]))

    assert {each["id"] for each in found["drift"]} == lost
    assert {(each["check"], each["kind"]) for each in found["drift"]} == {("log", "missing")}
    assert closed["drift_total"] == 0
