"""The Procfile's processes run here as they would in production, and each can be killed and started alone."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.processes import PROCFILE, Ended, Processes, read_procfile
from tests.waiting import until

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux tells of a parent's death")

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
from deploy.processes import Processes
with Processes(os.environ, procfile=pathlib.Path(sys.argv[1])) as processes:
    sys.stdin.read()
"""


@pytest.fixture
def procfile(tmp_path: Path) -> Path:
    """Return a Procfile whose processes say that they run by a file of their name."""
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
    """Return where the lines go."""
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
    """Say whether a process is gone, or gone but for its parent's notice."""
    try:
        return "State:\tZ" in Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:
        return True


def test_our_procfile() -> None:
    """Payfold's own Procfile has a release phase, a web process, a worker and a clock, and is the one of the top."""
    assert sorted(read_procfile(PROCFILE)) == ["clock", "release", "web", "worker"]
    assert PROCFILE.resolve() == Path(__file__).parent.parent / "Procfile"


def test_lines(processes: Processes, output: io.StringIO) -> None:
    """`python` is this interpreter, the environment is the given one, and each line comes under its name."""
    processes.stop()

    lines = sorted(line.partition(" ")[2] for line in output.getvalue().splitlines())
    assert lines == [f"web    | {sys.executable} open web", f"worker | {sys.executable} open worker"]


def test_the_release_phase_is_no_process(processes: Processes) -> None:
    """What runs for long is all but the release phase."""
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
    """The id is that of the program itself, not of a shell around it."""
    assert procfile.with_name("web").read_text() == str(processes.pid("web"))


@on_linux
def test_kill_takes_children(procfile: Path) -> None:
    """A kill takes the children along, of the whole process group."""
    procfile.write_text("worker: python program.py worker parent")
    with Processes({}, procfile=procfile, output=io.StringIO()) as processes:
        until_up(procfile, "worker")
        processes.kill("worker")

        until(lambda: has_ended(int(procfile.with_name("child").read_text())))


@on_linux
def test_stop_takes_children(procfile: Path) -> None:
    """A process that ends without its children leaves none of them."""
    procfile.write_text("worker: python program.py worker parent")
    with Processes({}, procfile=procfile, output=io.StringIO()):
        until_up(procfile, "worker")

    until(lambda: has_ended(int(procfile.with_name("child").read_text())))


def test_stop(processes: Processes) -> None:
    """Every process is asked to end, and has ended when the stop returns."""
    processes.stop()

    assert [processes.returncode(name) for name in processes.names] == [-signal.SIGTERM, -signal.SIGTERM]


def test_stubborn(procfile: Path) -> None:
    """What does not end in the grace is killed."""
    procfile.write_text("web: python program.py web stubborn")
    with Processes({}, procfile=procfile, output=io.StringIO(), grace_seconds=0.1) as processes:
        until_up(procfile, "web")

    assert processes.returncode("web") == -signal.SIGKILL


def test_wait_for_an_end(procfile: Path) -> None:
    """A process that ends by itself ends the wait, which returns how it ended and what it wrote last."""
    procfile.write_text("web: python program.py web\nworker: python program.py worker brief")
    with Processes({}, procfile=procfile, output=io.StringIO()) as processes:
        ended = processes.wait()

    assert ended == Ended("worker", 3, f"{sys.executable} None worker")
    assert str(ended) == f"The worker process ended with exit 3; its last lines:\n{sys.executable} None worker"


def test_wait_until_asked(processes: Processes) -> None:
    """A stop that is asked for ends the wait, and a kill of ours does not."""
    processes.kill("worker")
    processes.ask_to_stop()

    assert processes.wait() is None


def test_running_already(processes: Processes) -> None:
    """A process that runs is not started twice."""
    with pytest.raises(RuntimeError, match="web runs already"):
        processes.start_one("web")


@on_linux
def test_owner_killed(procfile: Path) -> None:
    """A kill -9 of the process that started them ends them."""
    command = [sys.executable, "-c", OWNER, str(procfile)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        until_up(procfile, "web", "worker")
        os.kill(owner.pid, signal.SIGKILL)

    started = [int(procfile.with_name(name).read_text()) for name in ("web", "worker")]
    until(lambda: all(map(has_ended, started)))
