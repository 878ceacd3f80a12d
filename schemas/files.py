"""The kind of a file: only a regular file has an end, and opens without waiting for another process."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

_KINDS: Final[tuple[tuple[Callable[[int], bool], str], ...]] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def irregular(file: Path | int) -> str | None:
    """Return the kind of *file*, a path or the number of an open file, where it is not a regular one: "a pipe".

    Raises:
        OSError: there is none, or it may not be looked at.
    """
    mode = file.stat().st_mode if isinstance(file, Path) else os.fstat(file).st_mode
    return next((kind for is_of_kind, kind in _KINDS if is_of_kind(mode)), None)
