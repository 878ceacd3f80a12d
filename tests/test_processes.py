"""The Procfile's processes run here as they would in production, and each can be killed and started alone."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.processes import PROCFILE, Ended, Processes, read_procfile
from tests.waiting import until

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux signals a parent's death")

PROGRAM = """
import os, pathlib, signal, subprocess, sys
name, *habits = sys.argv[1:]
if "stubborn" in habits:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "parent" in habits:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    pathlib.Path("child").write_text(str(child.pid))
print(sys.executable, os.environ.get("SHOP"), name)
pathlib.Path(name).write_text(str(os.getpid()))
if "brief" in habits:
    sys.exit(3)
signal.pause()
"""

OWNER = """
import os, pathlib, sys
from deploy.local.processes import Processes
with Processes(os.environ, procfile=pathlib.Path(sys.argv[1])) as processes:
    sys.stdin.read()
"""


@pytest.fixture
def procfile(tmp_path: Path) -> Path:
    """Return a Procfile of processes that each write a file of their name once they run."""
    (tmp_path / "program.py").write_text(PROGRAM)
    lines = [
        "release: python program.py release",
        "web: python program.py web",
        "worker: python program.py worker",
    ]
    (tmp_path / "Procfile").write_text("\n".join(lines))
    return tmp_path / "Procfile"


@pytest.fixture
def output() -> io.StringIO:
    """Return the stream that receives the lines."""
    return io.StringIO()


@pytest.fixture
def processes(procfile: Path, output: io.StringIO) -> Iterator[Processes]:
    """Return running processes, past their first line."""
    with Processes({"SHOP": "open"}, procfile=procfile, output=output) as running:
        until_up(procfile, *running.names)
        yield running


def until_up(procfile: Path, *names: str) -> None:
    """Return once each of the processes has written its id."""
    files = [procfile.with_name(name) for name in names]
    until(lambda: all(file.exists() and file.read_text() for file in files))


def has_ended(process_id: int) -> bool:
    """Return whether a process has ended, even if its parent has not reaped it."""
    try:
        return "State:\tZ" in Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:
        return True


def test_our_procfile() -> None:
    """Payfold's Procfile has a release phase, a web process, a worker and a clock, and is the one at the top level."""
    assert sorted(read_procfile(PROCFILE)) == ["clock", "release", "web", "worker"]
    assert PROCFILE.resolve() == Path(__file__).parent.parent / "Procfile"


def test_lines(processes: Processes, output: io.StringIO) -> None:
    """`python` is this interpreter, the environment is the given one, and each line begins with its process's name."""
    processes.stop()

    lines = sorted(line.partition(" ")[2] for line in output.getvalue().splitlines())
    assert lines == [f"web    | {sys.executable} open web", f"worker | {sys.executable} open worker"]


def test_the_release_phase_is_no_process(processes: Processes) -> None:
    """The release phase is not among the processes that keep running."""
    assert processes.names == ("web", "worker")


def test_kill_one(processes: Processes, procfile: Path) -> None:
    """A kill ends that process alone, and it can be started again."""
    web, worker = processes.pid("web"), processes.pid("worker")

    processes.kill("worker")
    assert processes.returncode("worker") == -signal.SIGKILL

    procfile.with_name("worker").unlink()
    processes.start_one("worker")
    until_up(procfile, "worker")
    assert processes.pid("worker") != worker
    assert (processes.returncode("worker"), processes.returncode("web")) == (None, None)
    assert processes.pid("web") == web


@on_linux
def test_its_process_id(processes: Processes, procfile: Path) -> None:
    """A process id is that of the program itself, not of a shell around it."""
    assert procfile.with_name("web").read_text() == str(processes.pid("web"))


@on_linux
def test_kill_takes_children(procfile: Path) -> None:
    """A kill ends the whole process group, children included."""
    procfile.write_text("worker: python program.py worker parent")
    with Processes({}, procfile=procfile, output=io.StringIO()) as processes:
        until_up(procfile, "worker")
        processes.kill("worker")

        until(lambda: has_ended(int(procfile.with_name("child").read_text())))


@on_linux
def test_the_children_of_an_ended_process(procfile: Path) -> None:
    """After a process ends its children are ended too."""
    procfile.write_text("worker: python program.py worker parent")
    with Processes({}, procfile=procfile, output=io.StringIO()):
        until_up(procfile, "worker")

    until(lambda: has_ended(int(procfile.with_name("child").read_text())))


def test_stop(processes: Processes) -> None:
    """A stop asks every process to end, and returns once all have ended."""
    processes.stop()

    assert [processes.returncode(name) for name in processes.names] == [-signal.SIGTERM, -signal.SIGTERM]


def test_stubborn(procfile: Path) -> None:
    """A process that does not end within the grace period is killed."""
    procfile.write_text("web: python program.py web stubborn")
    with Processes({}, procfile=procfile, output=io.StringIO(), grace_seconds=0.1) as processes:
        until_up(procfile, "web")

    assert processes.returncode("web") == -signal.SIGKILL


def test_wait_for_an_end(procfile: Path) -> None:
    """The wait ends when a process ends by itself, and returns its exit and its last output."""
    procfile.write_text("web: python program.py web\nworker: python program.py worker brief")
    with Processes({}, procfile=procfile, output=io.StringIO()) as processes:
        ended = processes.wait()

    assert ended == Ended("worker", 3, f"{sys.executable} None worker")
    assert str(ended) == f"The worker process ended with exit 3; its last lines:\n{sys.executable} None worker"


def test_wait_until_asked(processes: Processes) -> None:
    """A requested stop ends the wait, and our own kill of a process does not."""
    processes.kill("worker")
    processes.ask_to_stop()

    assert processes.wait() is None


def test_running_already(processes: Processes) -> None:
    """A running process is not started twice."""
    with pytest.raises(RuntimeError, match="web runs already"):
        processes.start_one("web")


@on_linux
def test_owner_killed(procfile: Path) -> None:
    """A kill -9 of their parent ends the processes."""
    command = [sys.executable, "-c", OWNER, str(procfile)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        until_up(procfile, "web", "worker")
        os.kill(owner.pid, signal.SIGKILL)

    started = [int(procfile.with_name(name).read_text()) for name in ("web", "worker")]
    until(lambda: all(map(has_ended, started)))
