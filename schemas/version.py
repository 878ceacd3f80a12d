"""Which release this is."""

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Final

_NAME: Final = "payfold"


def version(checkout: Path = Path(__file__).parent.parent) -> str:
    """Return the version of the code that runs: that of its *checkout*, else of the installed package, else unknown."""
    # An installed package may be another release than the checkout, from which a Procfile's processes run.
    project = checkout / "pyproject.toml"
    if project.exists():
        described = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if described.get("name") == _NAME:
            return str(described["version"])
    try:
        return metadata.version(_NAME)
    except metadata.PackageNotFoundError:
        return "unknown"
