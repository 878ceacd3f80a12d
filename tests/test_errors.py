"""Every error that our packages raise on purpose is in one tree, which is drawn at the top of its module."""

import importlib
import pkgutil
import re
from collections.abc import Iterator

import api
import deploy
import schemas
import worker
from schemas import errors
from schemas.errors import ConfigurationError, PayfoldError

PACKAGES = (api, deploy, schemas, worker)
MIGRATIONS = "schemas.migrations."
"""Only alembic can import them."""
INDENT = 4


def modules() -> Iterator[str]:
    """Yield the name of every module of ours."""
    for package in PACKAGES:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.startswith(MIGRATIONS):
                yield found.name


def descendants(kind: type[BaseException]) -> set[type[BaseException]]:
    """Return every class below *kind* that is loaded."""
    below = set(kind.__subclasses__())
    return below.union(*map(descendants, below))


def ours() -> dict[str, type[BaseException]]:
    """Return the errors of our packages by their names; those of one module alone are left out."""
    for name in modules():
        importlib.import_module(name)
    names = {package.__name__ for package in PACKAGES}
    found = [each for each in descendants(BaseException) if each.__module__.partition(".")[0] in names]
    public = [each for each in found if not each.__name__.startswith("_")]
    assert len({each.__name__ for each in public}) == len(public), "two errors have one name"
    return {each.__name__: each for each in public}


def drawn() -> dict[str, tuple[str | None, int]]:
    """Return the parent and the exit code of each error of the drawing."""
    found: dict[str, tuple[str | None, int]] = {}
    path: list[str] = []
    lines = (errors.__doc__ or "").partition("::\n")[2].splitlines()
    for line in filter(str.strip, lines):
        place, names, words = re.fullmatch(r"    ([│├└─ ]*)(\w+(?:, \w+)*)(?: {2,}(.*))?", line).groups()  # type: ignore[union-attr]  # a line that fits no drawing fails the test
        depth = len(place) // INDENT
        code = re.search(r"exit (\d)", words or "")
        for name in names.split(", "):
            assert name not in found, f"{name} is drawn twice"
            found[name] = (path[depth - 1] if depth else None, int(code[1]) if code else 1)
        path[depth:] = [names]
    return found


def test_every_error_is_drawn_at_its_place() -> None:
    """The drawing has every error of our packages and no other, each below its parent and with its exit code."""
    actual: dict[str, tuple[str | None, int]] = {}
    for name, kind in ours().items():
        assert issubclass(kind, PayfoldError), f"{name} stands outside the tree"
        parents = [each.__name__ for each in kind.__bases__ if issubclass(each, PayfoldError)]
        assert len(parents) == (kind is not PayfoldError), name
        actual[name] = (parents[0] if parents else None, kind.exit_code)

    assert drawn() == actual


def test_every_error_has_words() -> None:
    """The docstring of an error is its message where none is given, so none inherits that of its parent."""
    assert [name for name, kind in ours().items() if not kind.__dict__.get("__doc__")] == []
    assert str(ConfigurationError()) == "A setting is missing or cannot be used."
