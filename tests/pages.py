"""The pages (every ``.md`` file), and those of their tables that follow from the code.

``python -m tests.pages`` writes these tables; ``tests/test_pages.py`` fails while one of them is not current.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import typer.main

from api.app import create
from deploy.cli import app
from schemas.settings import Settings
from tests.command import ROOT

FOLDERS: Final = (".ci", ".github", "api", "deploy", "schemas", "tests", "worker")
EXAMPLE_LENGTH_MAX: Final = 40
ON_MOST_ROUTES: Final = ("limit", "cursor", "account", "livemode")
ON_MOST_COMMANDS: Final = ("--format", "--account", "--live")
"""Named in the text above the tables, and left out of their rows."""
_MARKED: Final = re.compile(r"(<!-- (\w+): written by .*? -->\n).*?(<!-- end -->)", re.DOTALL)

Command = Any
"""Typer carries a copy of click that has no public types."""


def pages() -> Iterator[Path]:
    """Yield every page."""
    yield from ROOT.glob("*.md")
    for folder in FOLDERS:
        yield from (ROOT / folder).rglob("*.md")


@cache
def commands() -> Mapping[str, Command]:
    """Return each command that can be run by its words, as ``events archive``."""
    return dict(_commands(typer.main.get_command(app)))


def _commands(command: Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Command]]:
    subcommands = getattr(command, "commands", {})
    if not subcommands or command.invoke_without_command:
        yield " ".join(words), command
    for name, each in subcommands.items():
        yield from _commands(each, (*words, name))


def settings() -> list[str]:
    """Return each setting by its variable's name."""
    return [name.upper() for name in Settings.model_fields]


@cache
def routes() -> Mapping[str, Mapping[str, Any]]:
    """Return each route's OpenAPI operation by method and path, as ``GET /v1/orders``."""
    nowhere = Settings.load({"DATABASE_URL": "postgres://user@host/name", "REDIS_URL": "redis://host"})
    paths = create(nowhere).fastapi.openapi()["paths"]
    return {f"{method.upper()} {path}": operation for path, by in paths.items() for method, operation in by.items()}


def _table_of_commands() -> list[str]:
    rows = [
        [f"`{' '.join(('payfold', words, *arguments(command)))}`", _first_line(command.help), _codes(_options(command))]
        for words, command in commands().items()
    ]
    return _table(("command", "does", "options"), rows)


def arguments(command: Command) -> list[str]:
    """Return the names of a command's arguments as its help shows them, such as ``EVENT_ID``."""
    return [each.metavar or each.name.upper() for each in command.params if each.param_type_name == "argument"]


def options(command: Command) -> Iterator[list[str]]:
    """Yield the names of each option of a command; of a switch those that turn it off, too."""
    for each in command.params:
        if each.param_type_name == "option":
            yield [*each.opts, *each.secondary_opts]


def _options(command: Command) -> list[str]:
    long = ([name for name in names if name.startswith("--")] for names in options(command))
    return ["|".join(names) for names in long if names[0] not in ON_MOST_COMMANDS]


def _table_of_settings() -> list[str]:
    defaults = Settings.load({}).shown()
    rows = [
        [f"`{name}`", _default(defaults[name]), f"{field.description}{_example(field.examples, defaults[name])}"]
        for name, field in zip(settings(), Settings.model_fields.values(), strict=True)
    ]
    return _table(("setting", "default", "meaning"), rows)


def _default(shown: str) -> str:
    return "" if shown == "not set" else f"`{shown}`"


def _example(examples: Sequence[object] | None, default: str) -> str:
    text = str((examples or [default])[0])
    short = text if len(text) <= EXAMPLE_LENGTH_MAX else f"{text[:EXAMPLE_LENGTH_MAX]}…"
    return "" if text == default else f"; example: `{short}`"


def _table_of_routes() -> list[str]:
    rows = [
        [f"`{route}`", _first_sentence(operation["description"]), _codes(_filters(operation))]
        for route, operation in routes().items()
    ]
    return _table(("route", "does", "parameters"), rows)


def _filters(operation: Mapping[str, Any]) -> list[str]:
    queries = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"]
    return [name for name in queries if name not in ON_MOST_ROUTES]


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _first_sentence(text: str) -> str:
    return f"{_first_line(text).partition('. ')[0].removesuffix('.')}."


def _codes(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in cells]
    return [lines[0], f"|{'---|' * len(head)}", *lines[1:]]


_TABLES: Final = {"commands": _table_of_commands, "settings": _table_of_settings, "routes": _table_of_routes}


def current(text: str) -> str:
    """Return a page's *text* with its marked tables as the code has them now."""
    return _MARKED.sub(lambda found: "\n".join((found[1], *_TABLES[found[2]](), "", found[3])), text)


def write() -> None:
    """Write the marked tables of every page."""
    for page in pages():
        page.write_text(current(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
