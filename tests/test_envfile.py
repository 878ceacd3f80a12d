"""The .env file: its place, the precedence of the environment, and the refusal of other programs' files."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from schemas import envfile
from schemas.errors import ConfigurationError
from schemas.settings import Settings, unknown

SECRET = "whsec_hunter2"
Write = Callable[[str], dict[str, str]]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """Return a function that writes lines into the data folder's file, and returns an environment that leads to it."""

    def write(lines: str, *, first: str = envfile.MARKER) -> dict[str, str]:
        (tmp_path / ".env").write_text(f"{first}\n{lines}\n")
        (tmp_path / ".env").chmod(0o600)
        return {"PAYFOLD_DATA_DIR": str(tmp_path)}

    return write


def loaded(environment: dict[str, str]) -> Settings:
    """Return the settings of a process with *environment*."""
    return Settings.load(envfile.completed(environment))


def fault_of(environment: dict[str, str]) -> str:
    """Return the error message of an unusable file."""
    with pytest.raises(ConfigurationError) as raised:
        envfile.completed(environment)
    assert SECRET not in str(raised.value)
    return str(raised.value)


def test_values_in_the_file(written: Write) -> None:
    """Values may be quoted, exported and followed by a comment; variables in them are not expanded."""
    at = written(f"""
        # a comment
        PORT=81 # a port
        export PAYFOLD_HOST='127.0.0.1'
        STRIPE_WEBHOOK_SECRETS="{SECRET}"
        DATABASE_URL=postgres://u:$HOME@h/d
        REDIS_URL=
    """)

    settings = loaded(at)

    assert (settings.port, settings.payfold_host, settings.redis_url) == (81, "127.0.0.1", None)
    assert settings.signing_secrets[0].secret == SECRET.encode()
    assert settings.libpq == "postgresql://u:$HOME@h/d"


@pytest.mark.parametrize(
    ("environment", "port", "source"),
    [
        ({}, 81, ".env"),
        ({"PORT": ""}, 81, ".env"),
        ({"PORT": "82"}, 82, "environment"),
        ({"port": "82"}, 82, "environment"),
        ({"PORT_FILE": "port"}, 83, "file port"),
    ],
)
def test_the_environment_comes_first(
    written: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    port: int,
    source: str,
) -> None:
    """A variable of the environment, or its _FILE variant, wins over the file; an empty variable does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "port").write_text("83\n")
    at = written("PORT=81") | environment

    assert loaded(at).port == port
    assert str(envfile.source_of("PORT", at)).endswith(source)
    assert envfile.source_of("WEB_CONCURRENCY", at) is None


def test_a_file_in_the_file(written: Write, tmp_path: Path) -> None:
    """A relative path in the file is relative to the file's folder, in any working folder."""
    (tmp_path / "secret").write_text(SECRET)
    at = written("STRIPE_WEBHOOK_SECRETS_FILE=secret")

    assert loaded(at).signing_secrets[0].secret == SECRET.encode()
    assert envfile.source_of("STRIPE_WEBHOOK_SECRETS", at) == f"file {tmp_path / 'secret'}"


def test_a_file_that_is_named(written: Write, tmp_path: Path) -> None:
    """PAYFOLD_ENV_FILE names another file, which has to exist."""
    written("PORT=81")
    named = {"PAYFOLD_ENV_FILE": str(tmp_path / ".env")}

    assert loaded(named).port == 81
    assert "there is no such file" in fault_of({"PAYFOLD_ENV_FILE": str(tmp_path / "none")})


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666, 0o660])
def test_a_file_that_others_can_change(written: Write, tmp_path: Path, mode: int) -> None:
    """A file that another user can change is read only if it is named, and not if it was only found."""
    at = written("PORT=81")
    (tmp_path / ".env").chmod(mode)

    assert "another user can change this file" in fault_of(at)
    assert f"chmod 600 '{tmp_path / '.env'}'" in fault_of(at)
    assert loaded(at | {"PAYFOLD_ENV_FILE": str(tmp_path / ".env")}).port == 81


@pytest.mark.parametrize(("mode", "is_open"), [(0o600, False), (0o640, True), (0o604, True), (0o644, True)])
def test_a_file_that_others_can_read(written: Write, tmp_path: Path, mode: int, *, is_open: bool) -> None:
    """A file that others can read is used, with one warning per command, which shows none of its lines."""
    at = written(f"STRIPE_WEBHOOK_SECRETS={SECRET}")
    (tmp_path / ".env").chmod(mode)

    ran = CliRunner().invoke(app, ["tokens", "new", "shop"], env=at)

    assert loaded(at).signing_secrets
    assert ran.exit_code == 0
    assert ran.stderr.count(f"{tmp_path / '.env'}: others can read this file") == is_open
    assert SECRET not in ran.output


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a socket", "a device"])
def test_no_regular_file(tmp_path: Path, kind: str, *, is_named: bool) -> None:
    """A path that is no regular file, found or named, is refused by its kind and not opened: a pipe would block."""
    path = tmp_path / ".env"
    with socket.socket(socket.AF_UNIX) as bound:
        make: dict[str, Callable[[Path], object]] = {"a pipe": os.mkfifo, "a folder": os.mkdir}
        make |= {"a socket": lambda at: bound.bind(str(at)), "a device": lambda at: at.symlink_to("/dev/zero")}
        make[kind](path)

    fault = fault_of({"PAYFOLD_ENV_FILE": str(path)} if is_named else {"PAYFOLD_DATA_DIR": str(tmp_path)})

    assert fault.startswith(f"{path}: it is {kind}, and settings are read from a regular file alone.")


def test_no_file(tmp_path: Path) -> None:
    """Without a file or a data folder only the environment is read."""
    for folder in (tmp_path, tmp_path / "none"):
        assert envfile.completed({"PAYFOLD_DATA_DIR": str(folder)}) == {"PAYFOLD_DATA_DIR": str(folder)}


@pytest.mark.parametrize("first", ["PORT=82", "", "# Payfold's settings", "#!/bin/sh"])
def test_a_file_of_another_program(tmp_path: Path, first: str) -> None:
    """A file without Payfold's first line is an error, and none of its lines is used or shown."""
    (tmp_path / ".env").write_text(f"{first}\nSTRIPE_WEBHOOK_SECRETS={SECRET}\n{envfile.MARKER}\n")

    fault = fault_of({"PAYFOLD_DATA_DIR": str(tmp_path)})

    assert fault.startswith(f"{tmp_path / '.env'}: `payfold init` did not begin this file")
    assert "--env-file FILE init" in fault


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (f"PORT=81\n\n{SECRET}", "line 4 cannot be read"),
        (f"PORT=81\nHOST = '{SECRET}", "line 3 cannot be read"),
        ("PORT=81\n\n# x\nPORT=82", "line 5 sets PORT a second time"),
        ("PORT=81\nPAYFOLD_DATA_DIR=/srv", "line 3 sets PAYFOLD_DATA_DIR, by which this file is found"),
        ("export payfold_data_dir_file=folder", "line 2 sets PAYFOLD_DATA_DIR_FILE, by which this file is found"),
        ("PAYFOLD_ENV_FILE=other", "line 2 sets PAYFOLD_ENV_FILE, by which this file is found"),
    ],
)
def test_a_line_that_cannot_be_read(written: Write, lines: str, fault: str) -> None:
    """A broken line, or a repeated name, is an error with the line's number and without its text."""
    assert fault in fault_of(written(lines))


def test_too_large(written: Write) -> None:
    """A file over the size limit is an error."""
    at = written("#" * (envfile.ENV_FILE_BYTES_MAX - len(envfile.MARKER) - 2))
    assert envfile.read(at) == {}

    assert "it is larger than 1,048,576 bytes" in fault_of(written("#" * envfile.ENV_FILE_BYTES_MAX))


# ---- Unknown names ----


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("PAYFOLD_TOKEN", "PAYFOLD_TOKENS"),
        ("PAYFOLD_LOGLEVEL", "PAYFOLD_LOG_LEVEL"),
        ("PAYFOLD_STRIPE_API_KEY", "STRIPE_API_KEY"),
        ("PAYFOLD_DATABASE_URL_FILE", "DATABASE_URL"),
        ("payfold_sweep_second", "PAYFOLD_SWEEP_SECONDS"),
    ],
)
def test_unknown_name(tmp_path: Path, name: str, nearest: str) -> None:
    """An unknown name that begins with PAYFOLD_ is an error with the nearest setting, and without the value."""
    (found,) = unknown({"PAYFOLD_DATA_DIR": str(tmp_path), name: SECRET})

    assert found == f"{name.upper()}: there is no such setting; the nearest is {nearest}."


def test_unknown_name_in_the_file(written: Write) -> None:
    """In the file every unknown name is an error, also one without PAYFOLD_."""
    (found,) = unknown(written("STRIPE_WEBHOOK_SECRET=whsec_a\nPORT_FILE=x\nPAYFOLD_TOKENS="))

    assert found == "STRIPE_WEBHOOK_SECRET: there is no such setting; the nearest is STRIPE_WEBHOOK_SECRETS."


def test_names_that_are_known(tmp_path: Path) -> None:
    """Settings, their _FILE variants, variables of the repository's tools, and those of Kubernetes are no error."""
    settings = {each.upper() for each in Settings.model_fields}
    others = {"PAYFOLD_ENV_FILE", "PAYFOLD_CALLED_AS", "PAYFOLD_DEPLOYED", "PAYFOLD_TEST_POSTGRES_BIN"}
    kubernetes = {
        "PAYFOLD_SERVICE_HOST": "10.0.0.1",
        "PAYFOLD_WEB_SERVICE_PORT_HTTP": "80",
        "PAYFOLD_PORT": "tcp://10.0.0.1:80",
        "PAYFOLD_WEB_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    (tmp_path / ".env").write_text(f"{envfile.MARKER}\n")
    given = dict.fromkeys(settings | {f"{each}_FILE" for each in settings} | others, "x") | kubernetes

    assert unknown(given | {"PAYFOLD_DATA_DIR": str(tmp_path), "PAYFOLD_ENV_FILE": str(tmp_path / ".env")}) == []
