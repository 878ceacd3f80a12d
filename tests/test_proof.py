"""For any history: an export is the whole of it, a rebuild is what is there, and what was lost is found and closed."""

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
    """Return an engine on another one."""
    opened = database.engine(another_database_url)
    yield opened
    opened.dispose()


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Return what decides, by the seed that the run prints."""
    return random.Random(int(request.config.getoption("hypothesis_seed")))


def happen(engine: Engine, chance: random.Random) -> None:
    """Let small, nasty histories arrive, each in a world of its own, and be folded in the order in which they came."""
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


def test_an_export_is_the_whole_of_it(engine: Engine, other: Engine, chance: random.Random, tmp_path: Path) -> None:
    """Replayed into an empty database an export gives the same digest, and then the same lines are exported."""
    happen(engine, chance)
    log = exported(engine, tmp_path / "log")

    done = replay(other, Reading([log], NOW))

    assert done.counts["new"] == len(ids(engine)) == done.counts["seen"]
    assert digests(other) == digests(engine)
    again = Path(exported(other, tmp_path / "again")).read_bytes()
    before = Path(log).read_bytes().replace(b'"source":"webhook"', b'"source":"replay"')
    assert sorted(again.splitlines()) == sorted(before.splitlines())


def test_a_rebuild_is_what_is_there(engine: Engine, chance: random.Random) -> None:
    """Nothing differs between what was folded step by step and what is folded at once."""
    happen(engine, chance)

    with shadow.shadow(engine) as made:
        rebuild.rebuild(made)
        differences = swap.compare(made, on_difference=print).drift

    assert differences == 0


def test_what_was_lost_is_found_and_closed(
    engine: Engine, other: Engine, chance: random.Random, tmp_path: Path
) -> None:
    """Of any events that were lost a log tells exactly those; a repair brings them in, and the tables are the same."""
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


def test_what_never_came_is_found_and_fetched(
    database_url: str, redis_url: str, chance: random.Random, tmp_path: Path
) -> None:
    """Of any events that never came, of those that Stripe keeps, a log tells just those; a gap fill closes them."""
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
