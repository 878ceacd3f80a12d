"""A process that is asked to stop, or that loses its parent, ends in time, even if a thread is blocked."""

import os
import signal
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from schemas import database, logs, stopping
from schemas.errors import DatabaseAway
from schemas.settings import Settings
from tests.command import SECONDS_MAX, environment, python
from tests.waiting import until

FOREVER = 3600


def wait_for_postgres() -> None:
    """Wait in a thread for an answer that never comes, in a process that is asked to stop."""
    engine = database.engine(os.environ["DATABASE_URL"])
    stopping.begin(shut_down_seconds=0.3, end_seconds=FOREVER)
    try:
        with database.transaction(engine) as connection:
            connection.exec_driver_sql(f"SELECT pg_sleep({FOREVER})")
    except DatabaseAway:
        print("away")  # noqa: T201 - what the test reads


def wait_for_ever() -> None:
    """Wait for ever; a second request to stop gives the process no more time."""
    stopping.begin(shut_down_seconds=0.1, end_seconds=0.3)
    stopping.begin(shut_down_seconds=FOREVER, end_seconds=FOREVER)
    threading.Event().wait()


def ignore_signals() -> None:
    """Wait for ever, and at SIGTERM only start the time limit."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    stopping.begin_at_sigterm(shut_down_seconds=0.1, end_seconds=0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(1)


def fork() -> None:
    """Ask this process to stop, and then a process that is forked from it."""
    stopping.begin(shut_down_seconds=FOREVER, end_seconds=FOREVER)
    child = os.fork()
    if child == 0:
        wait_for_ever()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + 10)


def start_child() -> None:
    """Start a process that ends with this one, and wait."""
    child = subprocess.Popen([sys.executable, "-m", "tests.test_stopping", "be_child", str(os.getpid())])
    child.wait()


def be_child() -> None:
    """Wait for the parent to be gone."""
    stopping.begin_with_end_of(int(sys.argv[2]))
    print(os.getpid(), flush=True)  # noqa: T201 - what the test reads
    threading.Event().wait()


if __name__ == "__main__":
    logs.configure(Settings.load())
    globals()[sys.argv[1]]()


def test_shuts_connections_down(database_url: str) -> None:
    """A thread that waits for PostgreSQL gets an error, and the process ends in its own way."""
    ran = python("tests.test_stopping", "wait_for_postgres", settings={"DATABASE_URL": database_url})

    assert (ran.code, ran.out) == (0, "away\n")


@pytest.mark.parametrize("waiting", ["wait_for_ever", "ignore_signals"])
def test_ends(waiting: str) -> None:
    """A process that waits for anything else ends too, with one line; a second request gives it no more time."""
    ran = python("tests.test_stopping", waiting)

    assert ran.code == 1
    (line,) = (msgspec.json.decode(line) for line in ran.err.splitlines())
    assert (line["event"], line["seconds"]) == ("process.stop_overdue", 0.3)


def test_forked() -> None:
    """A process forked from a stopping one gets its time limit when it is asked to stop itself."""
    assert python("tests.test_stopping", "fork").code == 11


def test_ends_with_a_full_log() -> None:
    """A log that is full because its reader has stopped does not prevent the process from ending."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    try:
        while True:
            os.write(writes, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writes, True)
    command = [sys.executable, "-m", "tests.test_stopping", "wait_for_ever"]
    try:
        running = subprocess.Popen(command, env=environment({}), stderr=writes)
        assert running.wait(SECONDS_MAX) == 1
    finally:
        os.close(reads)
        os.close(writes)


def test_ends_with_its_parent() -> None:
    """A process ends when its parent is killed, and not before."""
    command = [sys.executable, "-m", "tests.test_stopping", "start_child"]
    parent = subprocess.Popen(command, env=environment({}), stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)

    parent.kill()
    parent.wait()
    until(lambda: not is_running(child))
    parent.stdout.close()


def test_ends_without_its_parent() -> None:
    """A process ends even if its parent had ended before the process asked to end with it."""
    command = [sys.executable, "-m", "tests.test_stopping", "be_child", "1"]
    running = subprocess.Popen(command, env=environment({}), stdout=subprocess.DEVNULL)

    assert running.wait(SECONDS_MAX) == -signal.SIGTERM


def is_running(process: int) -> bool:
    """Return whether a process runs and is no zombie."""
    try:
        with open(f"/proc/{process}/stat") as stat:  # noqa: PTH123 - no more than a line
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
