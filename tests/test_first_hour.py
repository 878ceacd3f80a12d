"""The README's commands work on a fresh checkout: a signed event, a second terminal and a restart."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.command import ROOT
from tests.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.skipif(sys.platform != "linux", reason="starts real servers")]

SECONDS_MAX = 120
_BLOCK = re.compile(r"^### The first hour\n.*?^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return the lines of the README's block, without comments."""
    found = _BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None, "the README has no block under The first hour"
    return [line.partition("  #")[0].strip() for line in found[1].splitlines() if not line.startswith("#")]


class Terminal:
    """A shell in the checkout with no other setting than a fresh data folder."""

    def __init__(self, folder: Path, **more: str) -> None:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self._environment = {**kept, "PAYFOLD_DATA_DIR": str(folder / ".payfold"), **more}

    def run(self, command: str) -> str:
        """Run *command* successfully to its end, and return its output."""
        done = subprocess.run(
            shlex.split(command), cwd=ROOT, env=self._environment, capture_output=True, timeout=SECONDS_MAX, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    @contextmanager
    def running(self, command: str, log: Path) -> Iterator[dict[str, str]]:
        """Run *command* until the block ends, and yield its four printed lines by their labels."""
        with log.open("wb") as err:
            process = subprocess.Popen(
                shlex.split(command), cwd=ROOT, env=self._environment, stderr=err, start_new_session=True
            )
        try:
            yield _lines(log, process)
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS_MAX) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def _lines(log: Path, process: "subprocess.Popen[bytes]") -> dict[str, str]:
    def is_written() -> bool:
        assert process.poll() is None, log.read_text()
        return "signing secret" in log.read_text() and log.read_text().endswith("\n")

    until(is_written, SECONDS_MAX, why_not=log.read_text)
    return dict(re.findall(r"^  (webhook|API|bearer token|signing secret) +(\S+)$", log.read_text(), re.MULTILINE))


def orders(printed: dict[str, str], curl: str) -> list[dict[str, str]]:
    """Repeat the README's curl request, with the printed token and address, until there is an order."""
    _, _, header, url = shlex.split(curl)
    name, _, value = header.replace("$TOKEN", printed["bearer token"]).partition(": ")
    path = httpx.URL(url).raw_path.decode()
    found: list[dict[str, str]] = []

    def has_found() -> bool:
        answer = httpx.get(printed["API"].removesuffix("/docs") + path, headers={name: value})
        assert answer.status_code == 200, answer.text
        found[:] = next(value for value in answer.json().values() if isinstance(value, list))
        return bool(found)

    until(has_found, SECONDS_MAX, why_not=lambda: "the order did not appear")
    return found


def test_from_any_folder(tmp_path: Path) -> None:
    """deploy/dev finds its checkout through a link and from any folder, and runs the command in that folder."""
    link, kept = tmp_path / "payfold", {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    link.symlink_to(os.path.relpath(ROOT / "deploy" / "dev", tmp_path))
    shown = 'pwd; echo "$PAYFOLD_DATA_DIR"; command -v payfold'

    done = subprocess.run([link, "run", "sh", "-c", shown], cwd=tmp_path, env=kept, capture_output=True, check=True)

    root = ROOT.resolve()
    assert done.stdout.decode().splitlines() == [str(tmp_path), f"{root}/.payfold", f"{root}/.venv/bin/payfold"]


def test_without_words() -> None:
    """deploy/dev alone lists its own verbs, one a line, then the product's commands, and ends as `payfold` does."""
    done = subprocess.run(
        [ROOT / "deploy" / "dev"], env={**os.environ, "COLUMNS": "200"}, capture_output=True, check=False
    )

    own, usage, commands = done.stdout.decode().partition("Usage: payfold")
    assert re.findall(r"^ +deploy/dev (\S+) .* {2,}\S", own, re.MULTILINE) == [
        "test",
        "lint",
        "shell",
        "run",
        "lock",
        "COMMAND…",
    ]
    assert usage
    assert re.search(r"^. reconcile +\S", commands, re.MULTILINE)
    assert done.returncode == 2


def free_port() -> int:
    """Return a port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_first_hour(tmp_path: Path) -> None:
    """`up` accepts a signed event from a second terminal and serves its order; a restart keeps secret and token."""
    up, emit, events, init, curl = commands()
    # The usual port may be in use on the test's machine; the second terminal finds the chosen one by itself.
    first, second = Terminal(tmp_path, PORT=str(free_port())), Terminal(tmp_path)

    with first.running(up, tmp_path / "up.err") as printed:
        assert "200" in second.run(emit)
        (order,) = orders(printed, curl)
        assert order["status"] == "paid"
        assert "checkout.session.completed" in second.run(events)
        assert "stripe listen --print-secret" in second.run(init)

    with first.running(up, tmp_path / "again.err") as again:
        assert again["bearer token"] == printed["bearer token"]
        assert again["signing secret"] == printed["signing secret"]
        assert orders(again, curl) == [order]
        assert "200" in second.run(emit)
