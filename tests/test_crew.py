"""Work that is divided among processes gives the same results, fails loudly, and leaves no process behind."""

import gc
import os
import signal
import subprocess
import sys

import psutil
import pytest

from schemas.progress import do_nothing
from tests.command import environment
from worker.proof import processes
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
