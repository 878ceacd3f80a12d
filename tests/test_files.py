"""A command that reads or writes a file accepts a regular one, and refuses devices, pipes and sockets at once."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from deploy.cli import app
from deploy.commands.base import require_writable
from schemas.errors import ConfigurationError
from tests.command import environment
from worker.logs import restore

READ = {
    "replay FILES": ["replay"],
    "rebuild --from": ["rebuild", "--from"],
    "reconcile --log": ["reconcile", "--log"],
}
WRITTEN = {
    "replay --rejects": ["replay", "file", "--rejects"],
    "reconcile --report": ["reconcile", "--report"],
    "reconcile --csv": ["reconcile", "--csv"],
    "events export --output": ["events", "export", "--output"],
}
SETTINGS = {"--env-file"}
"""Tested with its file, in tests/test_envfile.py."""
FOLDERS = {
    "accounts rename --archive",
    "rebuild --archive",
    "reconcile --archive",
    "events retry --archive",
    "events export --archive",
    "events archive --to",
    "bench --keep",
}
KINDS = {"a device": "/dev/zero", "a pipe": "pipe", "a socket": "socket", "a folder": "folder"}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one of each kind, in the working folder of the test."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("file").touch()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")


def options_of(command: Any, name: str = "") -> set[str]:  # noqa: ANN401 - of an untyped tree
    """Return the options and arguments that name a file or a folder, prefixed with their commands."""
    found = {
        f"{name} {option.opts[0] if option.param_type_name == 'option' else option.name.upper()}".strip()
        for option in command.params
        if "Path" in str(option.type_descriptor.annotation) or "file" in f"{option.metavar} {option.name}".lower()
    }
    more = getattr(command, "commands", {}).items()
    return found.union(*(options_of(each, f"{name} {key}".strip()) for key, each in more))


def test_every_file_is_known() -> None:
    """The tests below cover every option that names a file or a folder."""
    assert options_of(get_command(app)) == {*READ, *WRITTEN, *SETTINGS, *FOLDERS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", [*READ, *WRITTEN])
@pytest.mark.usefixtures("made")
def test_only_a_file(option: str, kind: str) -> None:
    """A path that is no regular file is refused by its kind without being opened, so that the command never blocks."""
    ran = CliRunner().invoke(app, [*(READ | WRITTEN)[option], KINDS[kind]])

    assert isinstance(ran.exception, ConfigurationError), ran.exception
    assert kind in str(ran.exception)
    assert KINDS[kind] in str(ran.exception)
    if kind == "a pipe" and option in READ:
        assert "pipe it in, and name it -" in str(ran.exception)


@pytest.mark.usefixtures("made")
def test_an_archive_of_files_alone() -> None:
    """A pipe with the name of an archive's log is refused, and not waited for."""
    Path("pipe").rename("folder/payfold-events-1-2.ndjson")

    with pytest.raises(ConfigurationError, match=r"payfold-events-1-2\.ndjson is a pipe"):
        restore.logs_in(Path("folder"))


@pytest.mark.usefixtures("made")
def test_the_null_device() -> None:
    """Output may be written to the null device, which is never replaced by a file."""
    require_writable(Path("/dev/null"), "--rejects")
    require_writable(Path("new.csv"), "--csv")

    with pytest.raises(ConfigurationError, match="a device"):
        require_writable(Path("/dev/null"), "--output", is_replaced=True)
    with pytest.raises(ConfigurationError, match="there is no folder none"):
        require_writable(Path("none/new.csv"), "--csv")


@pytest.mark.parametrize(
    ("device", "code", "words"), [("/dev/zero", 2, "Standard input is a device"), ("/dev/null", 0, "")]
)
def test_standard_input(database_url: str, device: str, code: int, words: str) -> None:
    """Standard input may be a file, a pipe, a terminal or empty; other devices, which may be endless, are refused."""
    with Path(device).open("rb") as stdin:
        ran = subprocess.run(
            [sys.executable, "-m", "deploy", "replay", "-"],
            stdin=stdin,
            capture_output=True,
            env=environment({"DATABASE_URL": database_url}),
            timeout=60,
            check=False,
        )

    assert (ran.returncode, words in ran.stderr.decode()) == (code, True)


@pytest.mark.parametrize(
    ("closed", "words"),
    [("<&-", "Standard input is closed: give it a file"), (">&-", "Standard output is closed, and data goes there.")],
)
def test_a_closed_stream(closed: str, words: str) -> None:
    """A standard stream that the shell closed is reported as a usage error."""
    command = f'exec "{sys.executable}" -m deploy replay - {closed}'
    ran = subprocess.run(["/bin/sh", "-c", command], capture_output=True, env=environment({}), timeout=60, check=False)

    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr.decode().startswith(words)
    assert b"Traceback" not in ran.stderr
