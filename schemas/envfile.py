"""The ``.env`` file that `payfold init` writes: settings that the environment leaves open.

It stands in the data folder, or where ``PAYFOLD_ENV_FILE`` names it. The environment comes first, then this file, then
the defaults. A file that does not begin with ``MARKER`` is another program's, and is an error rather than a source.
"""

import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dotenv.parser import parse_stream

from schemas import files
from schemas.errors import ConfigurationError

MARKER: Final = "# Payfold's settings, begun by `payfold init`."
"""The first line of a file that is read."""
NAME: Final = ".env"
ENV_FILE: Final = "PAYFOLD_ENV_FILE"
"""The variable that names another file than the data folder's."""
DATA_DIR: Final = "PAYFOLD_DATA_DIR"
DATA_DIR_DEFAULT: Final = ".payfold"
ENV_FILE_BYTES_MAX: Final = 1024 * 1024
_FILE: Final = "_FILE"
_FOUND_BY: Final = (ENV_FILE, DATA_DIR)


def place(environment: Mapping[str, str]) -> Path:
    """Return where the file is, or would be."""
    named = _value(environment, ENV_FILE)
    return Path(named).absolute() if named else data_folder(environment) / NAME


def data_folder(environment: Mapping[str, str]) -> Path:
    """Return the data folder as the environment names it."""
    return Path(_value(environment, DATA_DIR) or DATA_DIR_DEFAULT).absolute()


def read(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings in the file, by name in capitals; none where there is no file.

    A ``*_FILE`` in it that is a relative path is relative to the file's own folder.

    Raises:
        ConfigurationError: it was named and is not there, was found and another user can change it, is no regular
            file, is another program's, or has a line that cannot be used.
    """
    path, is_named = place(environment), bool(_value(environment, ENV_FILE))
    text = _text_of(path, is_named=is_named)
    if text is None:
        if is_named:
            raise ConfigurationError(f"{path}: there is no such file. `payfold --env-file {path} init` writes it.")
        return {}
    found = _parsed(path, text)
    return {name: _settled(name, value, path.parent) for name, value in found.items() if value}


def completed(environment: Mapping[str, str]) -> dict[str, str]:
    """Return *environment* with those settings of the file that it does not set by ``NAME`` or by ``NAME_FILE``."""
    given = {name.upper(): value for name, value in environment.items() if value != ""}
    ours = {name: value for name, value in read(environment).items() if not _is_set(name.removesuffix(_FILE), given)}
    return {**environment, **ours}


def source_of(name: str, environment: Mapping[str, str]) -> str | None:
    """Return where the setting *name* comes from; None where neither the environment nor the file sets it."""
    given = {each.upper(): value for each, value in environment.items() if value != ""}
    if name in given:
        return "environment"
    if name + _FILE in given:
        return f"file {given[name + _FILE]}"
    ours = read(environment)
    if name in ours:
        return str(place(environment))
    return f"file {ours[name + _FILE]}" if name + _FILE in ours else None


def is_ours(path: Path) -> bool:
    """Return whether a file is there and begins as `payfold init` begins it.

    Raises:
        ConfigurationError: another program's file is there, or one that cannot be read.
    """
    return _text_of(path, is_named=True) is not None


def open_to_others(environment: Mapping[str, str]) -> str | None:
    """Return a warning where other users can read the file, which may hold secrets; None where there is none."""
    path = place(environment)
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    if not stat.S_ISREG(mode) or not mode & 0o044:
        return None
    return f"{path}: others can read this file, and it may hold secrets. Type: chmod 600 '{path}'"


def _text_of(path: Path, *, is_named: bool) -> str | None:
    """Return the text of a file that is ours, None where there is none."""
    try:
        _require_regular(path, path)
        with open(path, encoding="utf-8-sig", opener=_without_waiting) as file:
            # The open file is checked, so that the same file is read even if the name leads elsewhere by then.
            _require_regular(path, file.fileno())
            if not is_named:
                _require_ours(path, os.fstat(file.fileno()))
            text = file.read(ENV_FILE_BYTES_MAX + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, PermissionError) and not os.access(path.parent, os.X_OK):
            return None  # another user's data folder is none of this user's
        fault = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigurationError(f"{path}: it cannot be read: {fault}.") from None
    if text.partition("\n")[0].rstrip() != MARKER:
        raise ConfigurationError(
            f"{path}: `payfold init` did not begin this file, so it is neither read nor changed. Move it away, or name"
            f" another file: payfold --env-file FILE init. (A file of Payfold's begins with the line {MARKER})"
        )
    if len(text) > ENV_FILE_BYTES_MAX:
        raise ConfigurationError(f"{path}: it is larger than {ENV_FILE_BYTES_MAX:,} bytes.")
    return text


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _require_regular(path: Path, found: Path | int) -> None:
    """Refuse a file without an end or that has to be waited for; *found* is its path or the number of the open file."""
    if kind := files.irregular(found):
        raise ConfigurationError(
            f"{path}: it is {kind}, and settings are read from a regular file alone. Name one:"
            " payfold --env-file FILE init"
        )


def _require_ours(path: Path, found: os.stat_result) -> None:
    """Refuse a file that was found, wherever the command is called, and that another user can change."""
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise ConfigurationError(
            f"{path}: another user can change this file, so it is not read. Type: chmod 600 '{path}'. Or, if it is"
            f" meant as it is, name it: PAYFOLD_ENV_FILE={path}"
        )


def _parsed(path: Path, text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text)):
        if binding.key is None and not binding.error:
            continue
        # A statement's text begins with the empty lines before it.
        blank = len(binding.original.string) - len(binding.original.string.lstrip())
        line = binding.original.line + binding.original.string[:blank].count("\n")
        if binding.error or binding.key is None or binding.value is None:
            raise ConfigurationError(f"{path}: line {line} cannot be read: it wants NAME=value. Example: PORT=8000")
        name = binding.key.upper()
        if name in found:
            raise ConfigurationError(f"{path}: line {line} sets {name} a second time: keep one of them.")
        if name.removesuffix(_FILE) in _FOUND_BY or name in _FOUND_BY:
            raise ConfigurationError(
                f"{path}: line {line} sets {name}, by which this file is found: set it in the environment instead."
            )
        found[name] = binding.value
    return found


def _settled(name: str, value: str, folder: Path) -> str:
    return str(folder / value) if name.endswith(_FILE) else value


def _is_set(name: str, given: Mapping[str, str]) -> bool:
    return name in given or name + _FILE in given


def _value(environment: Mapping[str, str], name: str) -> str:
    return next((value for each, value in environment.items() if each.upper() == name), "")
