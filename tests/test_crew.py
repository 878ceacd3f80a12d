"""Work that is divided among processes gives the same results, fails loudly, and leaves no process behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys

import psutil
import pytest
from sqlalchemy import Engine

from schemas.progress import do_nothing
from tests import ledger
from tests.command import environment
from tests.waiting import until
from worker.proof import processes, shadow
from worker.proof.processes import ProcessLost

SECONDS_MAX = 30


def double(number: int) -> tuple[int, bool]:
    """Return twice *number*, and whether the collector of cycles rests."""
    return 2 * number, not gc.isenabled()


def fail(number: int) -> None:
    """Refuse the last of five numbers."""
    if number == 4:
        raise ValueError(number)


def be_killed(number: int) -> int:
    """Kill this process at the third number, as a machine without memory would."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order(count: int) -> None:
    """Each part is dealt with once, in its order, while the collector rests; afterwards the collector is as before."""
    with processes.crew(count, do_nothing) as crew:
        assert list(crew.each(double, range(20))) == [(2 * number, True) for number in range(20)]

    assert gc.isenabled()


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_ends_the_work(count: int) -> None:
    """The error of one part is raised as it is, however many processes there are."""
    with processes.crew(count, do_nothing) as crew, pytest.raises(ValueError, match="4"):
        list(crew.each(fail, range(20)))


def test_a_killed_process_fails_loudly() -> None:
    """The results of a process that was killed are missed, and never left out."""
    with pytest.raises(ProcessLost), processes.crew(2, do_nothing) as crew:
        list(crew.each(be_killed, range(20)))


def wait_for_ever(_: int) -> None:
    """Wait, as for a long statement."""
    signal.pause()


def _interrupted() -> None:
    with processes.crew(2, do_nothing) as crew:
        crew.begin(wait_for_ever, 1)
        raise KeyboardInterrupt


def test_an_interruption_waits_for_no_task() -> None:
    """Ctrl-C ends the processes in the middle of what they do."""
    with pytest.raises(KeyboardInterrupt):
        _interrupted()

    assert multiprocessing.active_children() == []


WAITING = """
import os, sys, time
from schemas.progress import do_nothing
from worker.proof import processes
def wait(_):
    print(os.getpid(), flush=True)
    time.sleep(600)
with processes.crew(2, do_nothing) as crew:
    list(crew.each(wait, range(2)))
"""


def test_processes_end_with_their_parent() -> None:
    """If the parent is killed, its processes end, though they are in the middle of a task."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, env=environment({}), start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        parent.kill()

    gone, alive = psutil.wait_procs(children, timeout=SECONDS_MAX)
    for each in alive:
        each.kill()
    assert (len(gone), alive) == (2, [])


CONNECTED = """
import os, threading
from schemas import database
from schemas.progress import do_nothing
from schemas.settings import Settings
from tests.test_crew import parent_of
from worker.proof import processes
def are_own():
    with processes.crew(2, do_nothing) as crew:
        return set(crew.each(parent_of, range(2))) == {os.getpid()}
with database.transaction(database.engine(Settings.load().postgresql)):
    print(threading.active_count(), are_own())
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(threading.active_count(), are_own())
"""


def parent_of(_: int) -> int:
    """Return which process forked this one."""
    return os.getppid()


def test_what_has_connections_forks(database_url: str) -> None:
    """The thread that watches connections stops no fork; with any other thread, a server forks."""
    command, settings = [sys.executable, "-c", CONNECTED], environment({"DATABASE_URL": database_url})
    done = subprocess.run(command, capture_output=True, env=settings, timeout=SECONDS_MAX, check=True)

    assert done.stdout.split() == [b"2", b"True", b"3", b"False"]


FILLING = """
import os, time
from schemas import database
from schemas.settings import Settings
from worker.proof import shadow
engine = database.engine(Settings.load().postgresql)
with shadow.shadow(engine) as made, database.transaction(engine, may_idle=True) as holding:
    with database.cursor(holding) as holder, shadow.being_filled(made, holder):
        print(made.schema, flush=True)
        time.sleep(600)
"""


LOCKED = """
SELECT FROM pg_locks JOIN pg_database AS d ON d.oid = database
WHERE locktype = 'advisory' AND datname = current_database()
"""


def test_what_a_killed_rebuild_leaves_is_dropped_by_the_next(engine: Engine, database_url: str) -> None:
    """The tables of a rebuild are dropped by the next one once its process is gone, and not before."""
    command, settings = [sys.executable, "-c", FILLING], environment({"DATABASE_URL": database_url})
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=settings) as filling:
        assert filling.stdout is not None
        schema = filling.stdout.readline().decode().strip()
        with shadow.shadow(engine):
            assert schema in _schemas(engine)
        filling.kill()
    until(lambda: not ledger.rows(engine, LOCKED))

    with shadow.shadow(engine) as made:
        assert _schemas(engine) == {made.schema}


def _schemas(engine: Engine) -> set[str]:
    named = "SELECT nspname FROM pg_namespace WHERE starts_with(nspname, :prefix)"
    return {row["nspname"] for row in ledger.rows(engine, named, prefix=shadow.SCHEMA_PREFIX)}
