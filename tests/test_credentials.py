"""`payfold up` keeps a secret and a token with its data: the same at every start, readable by this user alone."""

import hashlib
import os
from pathlib import Path

import pytest

from deploy.local import credentials
from schemas.errors import ConfigurationError
from schemas.settings import Settings

TOKENS = "shop:read:" + "0" * 64
NOTHING = Settings.load({})


def test_kept(tmp_path: Path) -> None:
    """A second start uses the secret and the token of the first; the file is private, and settings hold only a hash."""
    folder = tmp_path / "data" / "up"
    first = credentials.ensured(folder, NOTHING, port=8000)
    again = credentials.ensured(folder, NOTHING, port=8001)

    assert (again.signing_secret, again.token, again.port) == (first.signing_secret, first.token, 8001)
    assert credentials.kept(folder) == again
    assert (folder.stat().st_mode & 0o777, (folder / credentials.FILE).stat().st_mode & 0o777) == (0o700, 0o600)
    assert [each.name for each in folder.iterdir()] == [credentials.FILE]
    assert first.token is not None
    (token,) = Settings.load(first.environment()).tokens
    assert (token.name, token.sha256) == ("local", hashlib.sha256(first.token.encode()).hexdigest())
    assert token.scopes == {"read", "personal", "register", "admin"}
    assert first.token not in repr(first) + str(first.environment())


def test_two_folders(tmp_path: Path) -> None:
    """Each data folder has a secret and a token of its own."""
    one, two = (credentials.ensured(tmp_path / name, NOTHING, port=8000) for name in ("one", "two"))

    assert one.signing_secret != two.signing_secret
    assert one.token != two.token


def test_a_configured_secret_is_not_kept(tmp_path: Path) -> None:
    """A configured secret or token is not kept; one that was kept before is used again without the setting."""
    secret, token = {"STRIPE_WEBHOOK_SECRETS": "whsec_hunter2"}, {"PAYFOLD_TOKENS": TOKENS}

    both = credentials.ensured(tmp_path, Settings.load(secret | token), port=8000)
    assert (both.signing_secret, both.token) == (None, None)
    assert both.environment() == {"PORT": "8000"}
    assert (tmp_path / credentials.FILE).read_text() == '{"port":8000}\n'

    made = credentials.ensured(tmp_path, Settings.load(secret), port=8000)
    assert (made.signing_secret, made.token is None) == (None, False)
    assert "hunter2" not in (tmp_path / credentials.FILE).read_text()

    assert credentials.ensured(tmp_path, Settings.load(token), port=8000).token is None
    assert credentials.ensured(tmp_path, NOTHING, port=8000).token == made.token


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"token": 1}', '{"password": "x"}', '{"signing_secret": "hunter2"}', '{"port": 70000}', "\xff"],
)
def test_damaged(tmp_path: Path, text: str) -> None:
    """A damaged file is an error with a remedy, and is not changed."""
    path = tmp_path / credentials.FILE
    path.write_bytes(text.encode("latin-1"))
    path.chmod(0o600)

    with pytest.raises(ConfigurationError) as raised:
        credentials.ensured(tmp_path, NOTHING, port=8000)

    assert str(raised.value).startswith(f"{path}: this is not what `payfold up` wrote, or it is damaged. Restore it")
    assert "hunter2" not in str(raised.value)
    assert path.read_bytes() == text.encode("latin-1")


def test_open_to_others(tmp_path: Path) -> None:
    """A file that others can read is not used, until its permissions are private."""
    made = credentials.ensured(tmp_path, NOTHING, port=8000)
    path = tmp_path / credentials.FILE
    path.chmod(0o640)

    with pytest.raises(ConfigurationError, match=r"others can read it, and it holds a secret. Type: chmod 600"):
        credentials.kept(tmp_path)

    path.chmod(0o600)
    assert credentials.kept(tmp_path) == made


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_no_file_of_ours(tmp_path: Path, kind: str) -> None:
    """A path that is no regular file of this user is neither read nor replaced."""
    path = tmp_path / credentials.FILE
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        (tmp_path / "other").write_text("{}")
        path.symlink_to("other")
    else:
        os.mkfifo(path)

    with pytest.raises(ConfigurationError, match=r"this is not a file of this user's, so it is not read. Move it away"):
        credentials.ensured(tmp_path, NOTHING, port=8000)
