"""Files and folders that only their owner can read."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.errors import FolderNotOurs


def private_folder(folder: Path) -> Path:
    """Return *folder* as an absolute path. It is created if it is missing, and only its owner can open it.

    Raises:
        FolderNotOurs: another user owns it.
    """
    folder = folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (owner := folder.stat().st_uid) != os.geteuid():
        raise FolderNotOurs(f"{folder} belongs to the user with id {owner}: run as that user, or name another folder.")
    folder.chmod(0o700)
    return folder


def write_private(path: Path, text: str) -> None:
    """Write a file that is whole or absent, and 0600 from its first byte."""
    with _draft(path, text) as draft:
        draft.replace(path)


def write_new_private(path: Path, text: str) -> None:
    """Write a file as `write_private` does, and never in the place of another.

    Raises:
        FileExistsError: something is there.
    """
    with _draft(path, text) as draft:
        path.hardlink_to(draft)


@contextmanager
def _draft(path: Path, text: str) -> Iterator[Path]:
    """Yield a file in the same folder with *text* in it, on disk, which is removed if it still has its own name."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def kept_password(path: Path) -> str:
    """Return the password in the file, made at random on first use."""
    if not path.exists():
        write_private(path, secrets.token_hex(24))
    return path.read_text()
