"""Runs the payfold command as a person does: in a process of its own, configured by its environment alone."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).parent.parent
SECONDS_MAX = 120


@dataclass(frozen=True)
class Ran:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401 - any JSON
        """The value of the one JSON text that the command printed."""
        return msgspec.json.decode(self.out)


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return an environment of *settings* and the variables that every process needs."""
    kept = {name: value for name in ("PATH", "HOME", "LANG", "TMPDIR") if (value := os.environ.get(name)) is not None}
    return {**kept, "PYTHONPATH": str(ROOT), "PAYFOLD_DATA_DIR": "no-such-folder", **settings}


def python(module: str, *arguments: str, stdin: bytes = b"", settings: Mapping[str, str] = {}) -> Ran:
    """Run a module to its end, with *settings* as its environment."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, input=stdin, capture_output=True, env=environment(settings), timeout=SECONDS_MAX, check=False
    )
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


def payfold(*arguments: str, stdin: bytes = b"", **settings: str) -> Ran:
    """Run the command to its end, with *settings* as its environment."""
    return python("deploy", *arguments, stdin=stdin, settings=settings)


@contextmanager
def started(*arguments: str, stdout: Path, stderr: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command in the background, and kill it at the end if it is still running."""
    with stdout.open("wb") as out, stderr.open("wb") as err:
        command = [sys.executable, "-m", "deploy", *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment(settings), start_new_session=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
