"""Jinja2 for our pages and pictures: every value that a template inserts is escaped, and a missing one is an error."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from api.report import words


def environment(folder: Path) -> Environment:
    """Return the environment of the templates in *folder*."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible(value: object) -> object:
    # Invisible characters are spelled out, since a stranger may have put them there to mislead.
    return value if hasattr(value, "__html__") else words.shown(value)
