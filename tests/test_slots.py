"""A worker has a slot for folding and one for calls to Stripe and long work, and forks a slot that ends again."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from deploy.sandbox.history import shop_history
from deploy.sandbox.server import Fault
from schemas import broker
from tests import command, ledger
from tests.stage import HOUR, Stage, stage
from tests.waiting import until
from worker.folding import projection
from worker.stripe_jobs import queue as call_queue

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

SECONDS_MAX = 30


@pytest.fixture
def at(database_url: str, redis_url: str) -> Iterator[Stage]:
    """Return a shop at the sandbox's Stripe, with a clock close to that of the processes."""
    with stage(database_url, redis_url, start=int(time.time()) - 2 * HOUR) as made:
        yield made


@contextmanager
def worker(at: Stage, module: str = "worker", **settings: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run ``python -m worker`` during the test, and kill it at the end if it still runs."""
    environment = command.environment(at.environment | settings)
    process = subprocess.Popen([sys.executable, "-m", module], env=environment, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@dataclass(frozen=True)
class Forked:
    """The child processes of a worker: the fold slot, the slot for Stripe, and the fold process of the fold slot."""

    fold: int
    stripe: int
    fold_process: int


def forked_by(process: "subprocess.Popen[bytes]") -> Forked:
    """Return the processes of a worker, once they are started."""
    until(lambda: len(children(process.pid)) == 2 and len(children(children(process.pid)[0])) == 1)
    fold, stripe = children(process.pid)
    (fold_process,) = children(fold)
    return Forked(fold, stripe, fold_process)


def children(pid: int) -> list[int]:
    """Return the processes that the main thread of a process started, in that order."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_gone(process_id: int) -> bool:
    """Return whether a process has ended."""
    try:
        return "State:\tZ" in Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:
        return True


def send(at: Stage, task: str, queue: str) -> None:
    """Send a message as the clock does."""
    broker.celery(at.settings).send_task(task, queue=queue)


def test_folding_goes_on_while_stripe_is_silent(at: Stage) -> None:
    """A call that Stripe does not answer delays no event: only the slot for calls waits."""
    (session,) = at.open()
    called = threading.Event()
    at.faults.add(Fault.TIMED_OUT, "*/expire", before=called.set)
    link = at.account.create_payment_link()
    with worker(at):
        send(at, broker.EXPIRE_SESSIONS, broker.STRIPE_QUEUE)
        assert called.wait(SECONDS_MAX)

        ledger.record(
            at.engine, [ledger.delivery(event.body) for event in at.account.events if event.object_id == link]
        )
        send(at, broker.FOLD, broker.FOLD_QUEUE)
        until(lambda: at.rows("SELECT FROM payment_links WHERE id = :id", id=link) != [])

        assert at.status(session) == "open"
        assert at.rows("SELECT FROM stripe_calls WHERE leased_until IS NOT NULL") != []


def test_a_worker_with_a_key_expires_and_folds(at: Stage) -> None:
    """The slot for calls records Stripe's answer and wakes the fold slot, which folds it."""
    sessions = at.open(3)
    with worker(at):
        send(at, broker.EXPIRE_SESSIONS, broker.STRIPE_QUEUE)

        until(lambda: {at.status(session) for session in sessions} == {"expired"})

    assert at.api.count("*/expire", "POST") == len(sessions)


def test_two_clocks_and_four_workers(at: Stage) -> None:
    """With several clocks and workers each session is expired by one call, and changes once."""
    sessions = at.open(40)
    with ExitStack() as running:
        for _ in range(4):
            running.enter_context(worker(at))
        for _ in range(2):
            running.enter_context(worker(at, "worker.clock", PAYFOLD_EXPIRE_SECONDS="1", PAYFOLD_SWEEP_SECONDS="1"))
        # Ten processes start slowly.
        until(lambda: at.rows("SELECT FROM orders WHERE status = 'open'") == [], seconds=4 * SECONDS_MAX)

    assert sorted(made.path.split("/")[-2] for made in at.api.calls if made.method == "POST") == sorted(sessions)
    assert at.rows("SELECT count(*) AS changes FROM changes WHERE kind = 'order.expired'") == [{"changes": 40}]


def test_a_worker_that_dies_between_an_answer_and_its_commit(at: Stage) -> None:
    """After Stripe expires a session and the worker is killed, another worker reads it once the lease has ended."""
    (session,) = at.open()
    with worker(at) as process:
        forked = forked_by(process)
        at.faults.add(None, "*/expire", after=lambda: os.kill(forked.stripe, signal.SIGKILL))
        send(at, broker.EXPIRE_SESSIONS, broker.STRIPE_QUEUE)
        until(lambda: forked.stripe not in children(process.pid) and len(children(process.pid)) == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS_MAX) == 0
    at.deliver()
    at.account.advance(2 * int(call_queue.LEASE.total_seconds()))
    while at.rows("SELECT FROM stripe_calls"):
        at.expire(at.context())

    assert [made.method for made in at.api.calls] == ["POST", "GET"]
    assert at.status(session) == "expired"
    assert at.kinds(session) == ["order.opened", "order.expired"]


def test_a_worker_without_a_key_logs_it_once_and_takes_both_queues(at: Stage) -> None:
    """Without a key the worker folds, and our clock expires sessions that must have ended."""
    (session,) = at.open(ago=0)
    at.account.advance(HOUR)
    with worker(at, STRIPE_API_KEY="", PAYFOLD_EXPIRY_GRACE_MINUTES="0") as process:
        for _ in range(2):
            send(at, broker.EXPIRE_SESSIONS, broker.STRIPE_QUEUE)
        link = at.account.create_payment_link()
        ledger.record(at.engine, [ledger.delivery(event.body) for event in at.account.events])
        send(at, broker.FOLD, broker.FOLD_QUEUE)
        until(lambda: at.rows("SELECT FROM payment_links WHERE id = :id", id=link) != [])
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS_MAX)

    assert err.count(b"stripe.idle") == 1
    assert at.status(session) == "open"  # for a day
    assert at.api.calls == []


def test_a_worker_that_is_asked_to_stop_ends_its_slots(at: Stage) -> None:
    """SIGTERM ends all four processes, with exit 0."""
    with worker(at) as process:
        forked = forked_by(process)
        send(at, broker.POLL_SESSIONS, broker.STRIPE_QUEUE)
        until(lambda: at.api.calls != [])

        process.send_signal(signal.SIGTERM)

        assert process.wait(SECONDS_MAX) == 0
        assert is_gone(forked.fold)
        assert is_gone(forked.stripe)
        assert is_gone(forked.fold_process)


def test_a_killed_worker_leaves_no_slot_behind(at: Stage) -> None:
    """After a kill -9 of the parent its slots end by themselves, and so does the fold process."""
    with worker(at) as process:
        forked = forked_by(process)
        send(at, broker.POLL_SESSIONS, broker.STRIPE_QUEUE)
        until(lambda: at.api.calls != [])

        process.kill()

        until(lambda: is_gone(forked.fold) and is_gone(forked.stripe) and is_gone(forked.fold_process))


def test_the_parent_has_one_thread_and_no_connection(at: Stage) -> None:
    """The parent only forks and cannot hang: it has no other thread and no socket."""
    with worker(at) as process:
        forked_by(process)
        send(at, broker.POLL_SESSIONS, broker.STRIPE_QUEUE)
        until(lambda: at.api.calls != [])

        files = [str(each.readlink()) for each in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) == 1
        assert [each for each in files if each.startswith(("socket", "anon_inode"))] == []


@pytest.mark.parametrize("name", ["fold", "stripe"])
def test_a_slot_that_is_killed_is_forked_again(at: Stage, name: str) -> None:
    """Either slot is replaced when it ends, and its queue is processed; the other slot goes on."""
    with worker(at) as process:
        forked = forked_by(process)
        os.kill(getattr(forked, name), signal.SIGKILL)
        until(lambda: getattr(forked, name) not in children(process.pid) and len(children(process.pid)) == 2)
        send(at, broker.POLL_SESSIONS, broker.STRIPE_QUEUE)
        until(lambda: at.api.calls != [])
        link = at.account.create_payment_link()
        ledger.record(at.engine, [ledger.delivery(event.body) for event in at.account.events])
        send(at, broker.FOLD, broker.FOLD_QUEUE)
        until(lambda: at.rows("SELECT FROM payment_links WHERE id = :id", id=link) != [])
        until(lambda: is_gone(forked.fold_process) == (name == "fold"))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS_MAX)

    (line,) = (line for line in map(msgspec.json.decode, logged(err)) if line["event"] == "worker.slot_ended")
    assert (line["slot"], line["ended"], line["times"]) == (name, "by SIGKILL", 1)
    assert process.returncode == 0


def test_a_slot_that_ends_three_times_ends_the_worker(at: Stage) -> None:
    """A slot that ends three times ends the worker and all of its processes with exit 1 and a line with the reason."""
    with worker(at) as process:
        until(lambda: len(children(process.pid)) == 2)
        other, _ = children(process.pid)
        for _ in range(3):
            until(lambda: len(children(process.pid)) == 2)
            # Process ids wrap around, so the newest process need not have the greatest id.
            (slot,) = set(children(process.pid)) - {other}
            os.kill(slot, signal.SIGKILL)
            # Until its parent reaps it the process is still among the children.
            until(lambda slot=slot: slot not in children(process.pid))  # type: ignore[misc]  # its default
        assert process.wait(SECONDS_MAX) == 1
        assert process.stderr is not None
        events = [msgspec.json.decode(line)["event"] for line in logged(process.stderr.read())]

    assert events.count("worker.slot_ended") == 3
    assert events.count("worker.given_up") == 1


def logged(err: bytes) -> list[bytes]:
    """Return the lines of our log, without those that Python writes itself."""
    return [line for line in err.splitlines() if line.startswith(b"{")]


def test_a_worker_replaces_a_killed_fold_process(at: Stage) -> None:
    """At the next backlog a worker logs that its fold process was killed, folds the events, and starts another."""
    account = shop_history(seed=8, orders=400, money=True)
    with worker(at) as process:
        forked = forked_by(process)
        os.kill(forked.fold_process, signal.SIGKILL)
        ledger.record(at.engine, [ledger.delivery(event.body) for event in account.events])
        send(at, broker.FOLD, broker.FOLD_QUEUE)
        until(lambda: at.rows("SELECT FROM pending") == [])
        assert forked.fold_process not in children(forked.fold)
        another = children(forked.fold)[-1]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS_MAX)

    assert len(account.events) > 2 * projection.FOLD_BATCH_MAX
    assert err.count(b"fold_process.ended") == 1
    assert is_gone(another)
