"""Folding in two processes: each lane has objects of its own, and what one cannot do the other does."""

import itertools
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from sqlalchemy import Engine, event
from structlog.testing import capture_logs

from deploy.sandbox.account import Account
from deploy.sandbox.history import shop_history
from schemas import database
from schemas.errors import DatabaseAway
from tests import ledger
from worker.folding import parallel
from worker.folding.claim import LOOK_AHEAD_BATCHES, Shard, claim
from worker.folding.parallel import FOLD_PROCESSES, FoldProcess, FoldRequest
from worker.folding.projection import FOLD_BATCH_MAX
from worker.proof.rebuild import refolded

pytestmark = pytest.mark.integration


@pytest.fixture
def fold_process(database_url: str) -> Iterator[FoldProcess]:
    """Return a lane that has not begun yet."""
    with closing(FoldProcess(database_url)) as made:
        yield made


WHO_IS_BUSY = (
    "SELECT FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    " AND state <> 'idle'"
)


def record_shop(engine: Engine, *, seed: int) -> int:
    """Record the events of a shop, several batches of them, and return how many they are."""
    events = shop_history(seed=seed, orders=400, money=True).events
    assert len(events) > 2 * FOLD_BATCH_MAX
    ledger.record(engine, [ledger.delivery(event.body) for event in events])
    return len(events)


def record_links(engine: Engine, count: int) -> None:
    """Record the creation of *count* payment links."""
    account = Account(seed=41)
    for _ in range(count):
        account.create_payment_link()
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])


def pid_of_lane() -> int:
    """Return the process of the one lane that runs."""
    (process,) = [each for each in multiprocessing.active_children() if each.name == "fold process"]
    assert process.pid is not None
    return process.pid


def pending(engine: Engine) -> int:
    """Return how many events are pending."""
    (row,) = ledger.rows(engine, "SELECT count(*) AS found FROM pending")
    return int(row["found"])


def claimed_of(engine: Engine, shard: Shard | None, *, limit: int) -> list[tuple[int, str | None]]:
    """Return the number and the object of what a share would take, and leave it."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        claimed = claim(cursor, limit=limit, shard=shard)
        connection.rollback()
    return [(each.event.seq, each.event.object_id) for each in claimed]


def test_a_lane_folds_its_share(engine: Engine, fold_process: FoldProcess) -> None:
    """It folds the events of its objects, says how many, and leaves the others."""
    count = record_shop(engine, seed=2)
    wanted = len(claimed_of(engine, Shard(1, FOLD_PROCESSES), limit=count))

    fold_process.begin(FoldRequest(Shard(1, FOLD_PROCESSES)))

    assert fold_process.end() == wanted
    assert fold_process.end() == 0
    assert 0 < pending(engine) == count - wanted


def test_two_lanes_leave_what_one_leaves(engine: Engine, fold_process: FoldProcess) -> None:
    """A backlog that is folded by two processes at once gives the tables that folding it step by step gives."""
    fold_process.start()
    count = record_shop(engine, seed=8)

    assert parallel.fold(engine, partner=fold_process) == count

    live = ledger.digest_of(engine)
    with refolded(engine, seed=9) as made:
        assert ledger.digest_of(engine, made.schema) == live
    assert ledger.rows(engine, "SELECT seq FROM outcomes WHERE state = 'parked'") == []


def test_every_event_is_of_one_share_and_every_object_too(engine: Engine, request: pytest.FixtureRequest) -> None:
    """The shares together are all that is pending, oldest first, and no object is dealt to two."""
    count = record_shop(engine, seed=int(request.config.getoption("hypothesis_seed")))

    found = [claimed_of(engine, Shard(number, FOLD_PROCESSES), limit=count) for number in range(FOLD_PROCESSES)]

    assert sorted(each for shard in found for each in shard) == claimed_of(engine, None, limit=count)
    assert all(shard and shard == sorted(shard) for shard in found)
    assert not set.intersection(*({of for _, of in shard} for shard in found))


def test_a_share_takes_its_oldest_and_no_more_than_a_batch(engine: Engine) -> None:
    """What a share takes of many is the beginning of what it would take of few."""
    count = record_shop(engine, seed=3)

    whole = claimed_of(engine, Shard(1, FOLD_PROCESSES), limit=count)

    assert claimed_of(engine, Shard(1, FOLD_PROCESSES), limit=20) == whole[:20]


def test_a_share_does_not_look_through_all_that_is_of_another(engine: Engine) -> None:
    """Where all that is near is of the other share there is nothing to take, however much comes later."""
    limit = 5
    record_links(engine, 400)
    of_each = {
        number: {seq for seq, _ in claimed_of(engine, Shard(number, FOLD_PROCESSES), limit=400)}
        for number in range(FOLD_PROCESSES)
    }
    near = sorted(of_each[0])[: limit * LOOK_AHEAD_BATCHES]
    ledger.execute(engine, "DELETE FROM pending WHERE seq < :last AND seq <> ALL (:near)", last=near[-1], near=near)

    assert claimed_of(engine, Shard(1, FOLD_PROCESSES), limit=limit) == []
    assert [seq for seq, _ in claimed_of(engine, Shard(0, FOLD_PROCESSES), limit=limit)] == near[:limit]


def test_a_lane_that_is_killed_is_replaced(engine: Engine, fold_process: FoldProcess) -> None:
    """What it was to fold is folded all the same, and the next backlog has a lane again."""
    fold_process.start()
    killed = pid_of_lane()
    os.kill(killed, signal.SIGKILL)
    count = record_shop(engine, seed=4)
    with capture_logs() as said:
        assert parallel.fold(engine, partner=fold_process) == count
    assert [(each["event"], each["exitcode"]) for each in said if each["log_level"] == "error"] == [
        ("fold_process.ended", -signal.SIGKILL)
    ]
    assert pid_of_lane() != killed


def test_a_lane_that_is_killed_as_it_folds_loses_nothing(engine: Engine, fold_process: FoldProcess) -> None:
    """Its batch is pending again, and whoever waits for it folds that."""
    fold_process.start()
    count = record_shop(engine, seed=5)
    fold_process.begin(FoldRequest())
    while pending(engine) == count:
        assert fold_process.is_folding
    os.kill(pid_of_lane(), signal.SIGKILL)

    by_lane = fold_process.end()

    while ledger.rows(engine, WHO_IS_BUSY):
        pass  # The server notices when it next writes to the fold process.
    left = pending(engine)
    # It may have been killed between a batch and its report.
    assert count - left - FOLD_BATCH_MAX <= by_lane <= count - left
    assert parallel.fold(engine) == left
    assert ledger.rows(engine, "SELECT count(*) AS found FROM outcomes") == [{"found": count}]


def test_a_lane_that_hangs_is_killed_and_replaced(engine: Engine, database_url: str) -> None:
    """A lane that reports nothing for longer than a batch may take is replaced: its events are folded."""
    with closing(FoldProcess(database_url, report_seconds_max=1)) as fold_process:
        fold_process.start()
        hung = pid_of_lane()
        os.kill(hung, signal.SIGSTOP)
        count = record_shop(engine, seed=14)
        with capture_logs() as lines:
            assert parallel.fold(engine, partner=fold_process) == count
        fold_process.start()
        assert pid_of_lane() != hung

    errors = [(each["event"], each["reason"]) for each in lines if each["log_level"] == "error"]
    assert errors == [("fold_process.ended", "TimeoutError")]


def test_a_lane_that_hangs_does_not_outlast_its_parent(engine: Engine, database_url: str) -> None:
    """Closing a lane that hangs takes seconds, and then it is gone."""
    with closing(FoldProcess(database_url)) as fold_process:
        fold_process.start()
        os.kill(pid_of_lane(), signal.SIGSTOP)

    assert [each for each in multiprocessing.active_children() if each.name == "fold process"] == []


def test_a_lane_ends_after_the_batch_at_hand(engine: Engine, fold_process: FoldProcess) -> None:
    """Who is interrupted does not wait until all is folded; what is left is pending."""
    fold_process.start()
    record_links(engine, 20 * FOLD_BATCH_MAX)
    fold_process.begin(FoldRequest())
    while pending(engine) == 20 * FOLD_BATCH_MAX:
        assert fold_process.is_folding

    fold_process.close()

    left = pending(engine)
    assert left > 0
    assert left % FOLD_BATCH_MAX == 0
    assert parallel.fold(engine) == left


def test_an_interrupted_fold_leaves_no_lane_at_work(engine: Engine, fold_process: FoldProcess) -> None:
    """Whoever is interrupted goes after the batches at hand, and not when the lane has folded all of its share."""
    fold_process.start()
    record_links(engine, 20 * FOLD_BATCH_MAX)
    # Beyond the beginning all is the lane's, so that it would go on to the end.
    others = [seq for seq, _ in claimed_of(engine, Shard(0, FOLD_PROCESSES), limit=20 * FOLD_BATCH_MAX)][
        2 * FOLD_BATCH_MAX :
    ]
    ledger.execute(engine, "DELETE FROM pending WHERE seq = ANY (:others)", others=others)
    commits = itertools.count()

    def interrupt(_: object) -> None:
        if next(commits) == 1:
            raise KeyboardInterrupt

    event.listen(engine, "commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        parallel.fold(engine, partner=fold_process)

    assert not fold_process.is_folding
    left = pending(engine)
    assert left > 5 * FOLD_BATCH_MAX
    assert parallel.fold(engine, partner=fold_process) == left


def test_where_no_process_can_be_had_the_fold_is_alone(engine: Engine) -> None:
    """A lane that cannot be begun is missed, and said to be; each backlog tries again."""
    count = record_shop(engine, seed=7)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(FoldProcess("postgres://nobody:x@127.0.0.1:1/none")) as fold_process, capture_logs() as said:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # which have long been taken
        try:
            fold_process.begin(FoldRequest())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not fold_process.is_folding
        assert parallel.fold(engine, partner=fold_process) == count

    assert [(each["event"], each["reason"]) for each in said if each["log_level"] == "error"] == [
        ("fold_process.ended", "OSError")
    ] * 2


def test_a_lane_stops_when_its_time_is_up(engine: Engine, fold_process: FoldProcess) -> None:
    """Both share the time that the task has."""
    record_links(engine, 3 * FOLD_BATCH_MAX)
    fold_process.begin(FoldRequest(until=time.monotonic()))

    assert fold_process.end() == 0
    assert parallel.fold(engine, until=time.monotonic(), partner=fold_process) == FOLD_BATCH_MAX
    assert pending(engine) == 2 * FOLD_BATCH_MAX


def test_a_lane_that_finds_no_database_leaves_it_to_its_parent(engine: Engine) -> None:
    """It folds nothing and stays; the error is raised where the fold was asked for."""
    away = database.engine("postgres://nobody:x@127.0.0.1:1/none")
    with closing(FoldProcess("postgres://nobody:x@127.0.0.1:1/none")) as fold_process:
        fold_process.begin(FoldRequest())
        assert fold_process.end() == 0
        with pytest.raises(DatabaseAway):
            parallel.fold(away, partner=fold_process)
        count = record_shop(engine, seed=6)
        assert parallel.fold(engine, partner=fold_process) == count
