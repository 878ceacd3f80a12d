"""The worker's process as it runs: folding and calls to Stripe have a slot each, and neither outlives the other."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from deploy.sandbox.history import shop_history
from deploy.sandbox.server import Fault
from schemas import broker
from tests import command, ledger
from tests.stage import HOUR, Stage, stage
from worker import calls, projection

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

SECONDS_MAX = 30


@pytest.fixture
def at(database_url: str, redis_url: str) -> Iterator[Stage]:
    """Return a shop at the sandbox's Stripe whose clock is about that of the processes."""
    with stage(database_url, redis_url, start=int(time.time()) - 2 * HOUR) as made:
        yield made


@contextmanager
def worker(at: Stage, module: str = "worker", **settings: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run ``python -m worker`` beside the test, and kill it at the end if it is still there."""
    environment = command.environment(at.environment | settings)
    process = subprocess.Popen([sys.executable, "-m", module], env=environment, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool], seconds: float = SECONDS_MAX) -> None:
    """Return once *condition* holds, and fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def forked_by(process: "subprocess.Popen[bytes]") -> tuple[int, int]:
    """Return the slot for Stripe and the lane that the worker forked, once it has."""
    until(lambda: len(children(process)) == 2)
    slot, lane = children(process)
    return slot, lane


def children(process: "subprocess.Popen[bytes]") -> list[int]:
    """Return the processes that the worker began, in that order."""
    return [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_gone(process_id: int) -> bool:
    """Say whether a process has ended."""
    try:
        return "State:\tZ" in Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:
        return True


def send(at: Stage, task: str, queue: str) -> None:
    """Send a message as the clock does."""
    broker.celery(at.settings).send_task(task, queue=queue)


def test_folding_goes_on_while_stripe_is_silent(at: Stage) -> None:
    """A call that Stripe does not answer holds up no event: the slot for calls waits for it alone."""
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
    """The slot for calls records what Stripe answered and wakes the other, which folds it."""
    sessions = at.open(3)
    with worker(at):
        send(at, broker.EXPIRE_SESSIONS, broker.STRIPE_QUEUE)

        until(lambda: {at.status(session) for session in sessions} == {"expired"})

    assert at.api.count("*/expire", "POST") == len(sessions)


def test_two_clocks_and_four_workers(at: Stage) -> None:
    """However many clocks and workers are there, each session is expired by one call, and changes once."""
    sessions = at.open(40)
    with ExitStack() as running:
        for _ in range(4):
            running.enter_context(worker(at))
        for _ in range(2):
            running.enter_context(worker(at, "worker.clock", PAYFOLD_EXPIRE_SECONDS="1", PAYFOLD_SWEEP_SECONDS="1"))
        # Ten processes take their time to start.
        until(lambda: at.rows("SELECT FROM orders WHERE status = 'open'") == [], seconds=4 * SECONDS_MAX)

    assert sorted(made.path.split("/")[-2] for made in at.api.calls if made.method == "POST") == sorted(sessions)
    assert at.rows("SELECT count(*) AS changes FROM changes WHERE kind = 'order.expired'") == [{"changes": 40}]


def test_a_worker_that_dies_between_an_answer_and_its_commit(at: Stage) -> None:
    """Stripe has expired the session and the worker is killed: when its lease is over another reads it, once."""
    (session,) = at.open()
    with worker(at) as process:
        slot, _ = forked_by(process)
        at.faults.add(None, "*/expire", after=lambda: os.kill(slot, signal.SIGKILL))
        send(at, broker.EXPIRE_SESSIONS, broker.STRIPE_QUEUE)
        assert process.wait(SECONDS_MAX) == 1
    at.deliver()
    at.account.advance(2 * int(calls.LEASE.total_seconds()))
    while at.rows("SELECT FROM stripe_calls"):
        at.expire(at.desk())

    assert [made.method for made in at.api.calls] == ["POST", "GET"]
    assert at.status(session) == "expired"
    assert at.kinds(session) == ["order.opened", "order.expired"]


def test_a_worker_without_a_key_says_so_once_and_takes_both_queues(at: Stage) -> None:
    """Without a key one slot does all there is to do: it folds, and its clock expires what must have ended."""
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
        _, said = process.communicate(timeout=SECONDS_MAX)

    assert said.count(b"stripe.idle") == 1
    assert at.status(session) == "open"  # for a day
    assert at.api.calls == []


def test_a_worker_that_is_told_to_stop_takes_its_slot_along(at: Stage) -> None:
    """SIGTERM ends all three, and that is no failure."""
    with worker(at) as process:
        slot, lane = forked_by(process)
        send(at, broker.POLL_SESSIONS, broker.STRIPE_QUEUE)
        until(lambda: at.api.calls != [])

        process.send_signal(signal.SIGTERM)

        assert process.wait(SECONDS_MAX) == 0
        assert is_gone(slot)
        assert is_gone(lane)


def test_a_killed_worker_leaves_no_slot_behind(at: Stage) -> None:
    """After a kill -9 of the worker its slot ends by itself, and so does its lane."""
    with worker(at) as process:
        slot, lane = forked_by(process)
        send(at, broker.POLL_SESSIONS, broker.STRIPE_QUEUE)
        until(lambda: at.api.calls != [])

        process.kill()

        until(lambda: is_gone(slot) and is_gone(lane))


def test_a_worker_whose_slot_is_gone_ends(at: Stage) -> None:
    """A worker without its slot would look well and never call Stripe: it ends, and is started again by whoever did."""
    with worker(at) as process:
        slot, _ = forked_by(process)
        os.kill(slot, signal.SIGKILL)

        assert process.wait(SECONDS_MAX) == 1
        assert process.stderr is not None
        assert b"worker.slot_ended" in process.stderr.read()


def test_a_worker_whose_lane_is_gone_goes_on(at: Stage) -> None:
    """A lane that was killed is missed at the next backlog: the worker says so, folds it, and has a lane again."""
    account = shop_history(seed=8, orders=400, money=True)
    with worker(at) as process:
        _, lane = forked_by(process)
        os.kill(lane, signal.SIGKILL)
        ledger.record(at.engine, [ledger.delivery(event.body) for event in account.events])
        send(at, broker.FOLD, broker.FOLD_QUEUE)
        until(lambda: at.rows("SELECT FROM pending") == [])
        assert lane not in children(process)
        another = children(process)[-1]
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=SECONDS_MAX)

    assert len(account.events) > 2 * projection.FOLD_BATCH_MAX
    assert said.count(b"lane.ended") == 1
    assert is_gone(another)
