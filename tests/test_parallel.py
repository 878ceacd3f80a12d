"""Two processes fold at once: each has objects of its own, and one takes over if the other fails."""

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
    """Return a fold process that has not started yet."""
    with closing(FoldProcess(database_url)) as made:
        yield made


WHO_IS_BUSY = (
    "SELECT FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    " AND state <> 'idle'"
)


def record_shop(engine: Engine, *, seed: int) -> int:
    """Record the events of a shop, which fill several batches, and return their number."""
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


def pid_of_fold_process() -> int:
    """Return the id of the one running fold process."""
    (process,) = [each for each in multiprocessing.active_children() if each.name == "fold process"]
    assert process.pid is not None
    return process.pid


def pending(engine: Engine) -> int:
    """Return how many events are pending."""
    (row,) = ledger.rows(engine, "SELECT count(*) AS found FROM pending")
    return int(row["found"])


def claimed_of(engine: Engine, shard: Shard | None, *, limit: int) -> list[tuple[int, str | None]]:
    """Return number and object of each event that a shard would take, and release them."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        claimed = claim(cursor, limit=limit, shard=shard)
        connection.rollback()
    return [(each.event.seq, each.event.object_id) for each in claimed]


def test_a_fold_process_folds_its_shard(engine: Engine, fold_process: FoldProcess) -> None:
    """A fold process folds the events of its objects, returns their number, and leaves the others."""
    count = record_shop(engine, seed=2)
    wanted = len(claimed_of(engine, Shard(1, FOLD_PROCESSES), limit=count))

    fold_process.begin(FoldRequest(Shard(1, FOLD_PROCESSES)))

    assert fold_process.end() == wanted
    assert fold_process.end() == 0
    assert 0 < pending(engine) == count - wanted


def test_two_processes_give_the_tables_of_one(engine: Engine, fold_process: FoldProcess) -> None:
    """A backlog that two processes fold at once gives the same tables as folding it step by step."""
    fold_process.start()
    count = record_shop(engine, seed=8)

    assert parallel.fold(engine, partner=fold_process) == count

    live = ledger.digest_of(engine)
    with refolded(engine, seed=9) as made:
        assert ledger.digest_of(engine, made.schema) == live
    assert ledger.rows(engine, "SELECT seq FROM outcomes WHERE state = 'parked'") == []


def test_every_event_and_object_is_in_one_shard(engine: Engine, request: pytest.FixtureRequest) -> None:
    """The shards together hold all pending events, oldest first, and no object is in two shards."""
    count = record_shop(engine, seed=int(request.config.getoption("hypothesis_seed")))

    found = [claimed_of(engine, Shard(number, FOLD_PROCESSES), limit=count) for number in range(FOLD_PROCESSES)]

    assert sorted(each for shard in found for each in shard) == claimed_of(engine, None, limit=count)
    assert all(shard and shard == sorted(shard) for shard in found)
    assert not set.intersection(*({of for _, of in shard} for shard in found))


def test_a_shard_takes_its_oldest_batch(engine: Engine) -> None:
    """With a smaller limit a shard takes the oldest of the events that it takes with a larger limit."""
    count = record_shop(engine, seed=3)

    whole = claimed_of(engine, Shard(1, FOLD_PROCESSES), limit=count)

    assert claimed_of(engine, Shard(1, FOLD_PROCESSES), limit=20) == whole[:20]


def test_a_shard_scans_few_events_of_another(engine: Engine) -> None:
    """A shard takes nothing if the oldest pending events are the other shard's, even if it has later ones."""
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


def test_a_shard_looks_again_if_others_took_what_it_had_found(engine: Engine) -> None:
    """What was found ahead may be folded by others; then the shard takes the oldest that is pending."""
    record_links(engine, 400)
    shard = Shard(0, FOLD_PROCESSES)
    first = claimed_of(engine, shard, limit=5)
    found = list(shard.ahead)
    assert found[0] > first[-1][0]
    assert [seq for seq, _ in claimed_of(engine, shard, limit=5)] == found[:5]

    ledger.execute(engine, "DELETE FROM pending WHERE seq = ANY (:found)", found=found)

    assert claimed_of(engine, shard, limit=5) == first


def test_a_killed_fold_process_is_replaced(engine: Engine, fold_process: FoldProcess) -> None:
    """After a kill the parent folds the shard of its fold process, and starts a new one for the next backlog."""
    fold_process.start()
    killed = pid_of_fold_process()
    os.kill(killed, signal.SIGKILL)
    count = record_shop(engine, seed=4)
    with capture_logs() as logged:
        assert parallel.fold(engine, partner=fold_process) == count
    assert [(each["event"], each["exitcode"]) for each in logged if each["log_level"] == "error"] == [
        ("fold_process.ended", -signal.SIGKILL)
    ]
    assert pid_of_fold_process() != killed


def test_a_kill_while_folding_loses_no_event(engine: Engine, fold_process: FoldProcess) -> None:
    """The batch of a fold process that is killed is pending again, and its parent folds it."""
    fold_process.start()
    count = record_shop(engine, seed=5)
    fold_process.begin(FoldRequest())
    while pending(engine) == count:
        assert fold_process.is_folding
    os.kill(pid_of_fold_process(), signal.SIGKILL)

    by_fold_process = fold_process.end()

    while ledger.rows(engine, WHO_IS_BUSY):
        pass  # The server notices when it next writes to the fold process.
    left = pending(engine)
    # The process may have been killed between a batch and its report.
    assert count - left - FOLD_BATCH_MAX <= by_fold_process <= count - left
    assert parallel.fold(engine) == left
    assert ledger.rows(engine, "SELECT count(*) AS found FROM outcomes") == [{"found": count}]


def test_a_hanging_fold_process_is_replaced(engine: Engine, database_url: str) -> None:
    """A fold process without a report for longer than a batch may take is replaced, and its events are folded."""
    with closing(FoldProcess(database_url, report_seconds_max=1)) as fold_process:
        fold_process.start()
        hung = pid_of_fold_process()
        os.kill(hung, signal.SIGSTOP)
        count = record_shop(engine, seed=14)
        with capture_logs() as lines:
            assert parallel.fold(engine, partner=fold_process) == count
        fold_process.start()
        assert pid_of_fold_process() != hung

    errors = [(each["event"], each["reason"]) for each in lines if each["log_level"] == "error"]
    assert errors == [("fold_process.ended", "TimeoutError")]


def test_closing_ends_a_hanging_fold_process(engine: Engine, database_url: str) -> None:
    """Closing a hanging fold process takes seconds and ends it."""
    with closing(FoldProcess(database_url)) as fold_process:
        fold_process.start()
        os.kill(pid_of_fold_process(), signal.SIGSTOP)

    assert [each for each in multiprocessing.active_children() if each.name == "fold process"] == []


def test_a_stopped_fold_process_ends_after_its_batch(engine: Engine, fold_process: FoldProcess) -> None:
    """A fold process that is stopped ends after its current batch; the other events stay pending."""
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


def test_an_interrupted_fold_stops_its_fold_process(engine: Engine, fold_process: FoldProcess) -> None:
    """An interrupted fold ends after the current batches, and not after its fold process has folded the whole shard."""
    fold_process.start()
    record_links(engine, 20 * FOLD_BATCH_MAX)
    # All but the first batches are the fold process's, which would otherwise fold to the end.
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


def test_without_a_fold_process_the_parent_folds_alone(engine: Engine) -> None:
    """A fold process that cannot start is an error line, and the parent folds alone; each backlog tries again."""
    count = record_shop(engine, seed=7)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(FoldProcess("postgres://nobody:x@127.0.0.1:1/none")) as fold_process, capture_logs() as logged:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # all of which are in use
        try:
            fold_process.begin(FoldRequest())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not fold_process.is_folding
        assert parallel.fold(engine, partner=fold_process) == count

    assert [(each["event"], each["reason"]) for each in logged if each["log_level"] == "error"] == [
        ("fold_process.ended", "OSError")
    ] * 2


def test_a_fold_process_stops_at_the_time_limit(engine: Engine, fold_process: FoldProcess) -> None:
    """Both processes stop at the time limit of the task."""
    record_links(engine, 3 * FOLD_BATCH_MAX)
    fold_process.begin(FoldRequest(until=time.monotonic()))

    assert fold_process.end() == 0
    assert parallel.fold(engine, until=time.monotonic(), partner=fold_process) == FOLD_BATCH_MAX
    assert pending(engine) == 2 * FOLD_BATCH_MAX


def test_a_fold_process_without_a_database_leaves_the_error_to_its_parent(engine: Engine) -> None:
    """A fold process without a database folds nothing and stays; the parent raises the error."""
    away = database.engine("postgres://nobody:x@127.0.0.1:1/none")
    with closing(FoldProcess("postgres://nobody:x@127.0.0.1:1/none")) as fold_process:
        fold_process.begin(FoldRequest())
        assert fold_process.end() == 0
        with pytest.raises(DatabaseAway):
            parallel.fold(away, partner=fold_process)
        count = record_shop(engine, seed=6)
        assert parallel.fold(engine, partner=fold_process) == count
