"""The signing secret and the API token that `payfold up` makes where none are configured.

They stay in the data folder of the servers, with what they protect, so that a restart has the same ones and a command
in another terminal finds them. A configured secret or token comes first, and then none is made.
"""

import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import Final

import msgspec

from deploy.local.private_files import private_folder, write_private
from schemas.errors import ConfigurationError
from schemas.settings import Settings

FILE: Final = "credentials.json"
SCOPES: Final = "admin+personal"
_NAME: Final = "local"


class Credentials(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The credentials in a folder; the port is the one on which the web process was started last."""

    signing_secret: str | None = None
    token: str | None = None
    port: int | None = None

    def __repr__(self) -> str:
        return f"Credentials(signing_secret=hidden, token=hidden, port={self.port!r})"

    def environment(self) -> dict[str, str]:
        """Return these as settings, of the token only its hash."""
        found = {} if self.signing_secret is None else {"STRIPE_WEBHOOK_SECRETS": self.signing_secret}
        if self.token is not None:
            found["PAYFOLD_TOKENS"] = f"{_NAME}:{SCOPES}:{hashlib.sha256(self.token.encode()).hexdigest()}"
        return found if self.port is None else {**found, "PORT": str(self.port)}


def kept(folder: Path) -> Credentials:
    """Return the credentials in *folder*, empty ones where there is no file.

    Raises:
        ConfigurationError: the file is damaged, another user's, or open to others; with what to do.
    """
    path = folder.absolute() / FILE
    if not _is_there(path):
        return Credentials()
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Credentials)
        Settings.load(found.environment())
    except (msgspec.DecodeError, ConfigurationError, OSError):
        raise ConfigurationError(
            f"{path}: this is not what `payfold up` wrote, or it is damaged. Restore it from a backup, or remove it:"
            " `payfold up` then makes a new signing secret and token, and the old ones no longer work."
        ) from None
    return found


def ensured(folder: Path, settings: Settings, *, port: int) -> Credentials:
    """Return the credentials in *folder* that *settings* do not configure; missing ones are made. Raises as `kept`.

    A kept credential stays in the folder while another one is configured, and is used again afterwards.
    """
    before = kept(folder)
    secret, token = before.signing_secret, before.token
    if not settings.signing_secrets:
        secret = secret or f"whsec_{secrets.token_urlsafe(24)}"
    if not settings.tokens:
        token = token or f"pf_{secrets.token_urlsafe(24)}"
    if (after := Credentials(secret, token, port)) != before:
        write_private(private_folder(folder) / FILE, msgspec.json.encode(after).decode() + "\n")
    return Credentials(None if settings.signing_secrets else secret, None if settings.tokens else token, port)


def _is_there(path: Path) -> bool:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise ConfigurationError(f"{path}: this is not a file of this user's, so it is not read. Move it away.")
    if found.st_mode & 0o077:
        raise ConfigurationError(f"{path}: others can read it, and it holds a secret. Type: chmod 600 '{path}'")
    return True
