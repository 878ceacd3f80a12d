"""The commands by name, so that `payfold --help` lists them all and a command loads no other.

``tests/test_starting.py`` holds the table against the commands' own help.
"""

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

Command = Any
Context = Any
"""Typer carries a copy of click that has no public types."""


class Listed(NamedTuple):
    """A command as the list shows it: the first paragraph of its help."""

    help: str
    module: str
    is_group: bool


def _single(summary: str, module: str) -> Listed:
    return Listed(summary, module, is_group=False)


def _group(summary: str, module: str) -> Listed:
    return Listed(summary, module, is_group=True)


COMMANDS: Final = {
    "init": _single("Write a .env file for the settings, if there is none, and show how to connect Stripe.", "init"),
    "config": _single(
        "Show the effective settings, and where each comes from; of a secret only that it is set.", "config"
    ),
    "up": _single("Run everything on this machine, with embedded servers where no URL is given, until Ctrl-C.", "up"),
    "demo": _single(
        "Run everything with a sandbox Stripe that sells, and prove the tables; exit 0 only if the proof holds.", "demo"
    ),
    "doctor": _single(
        "Check this deployment, and name the fix for each finding; exit 1 if there is a fault.", "doctor"
    ),
    "status": _single("Show how everything is.", "status"),
    "summary": _single(
        "Count the orders, refunds and disputes of a period, rounded outward to whole hours, with their money.",
        "summary",
    ),
    "funnel": _single("Show how far the sessions of each payment link came, by currency.", "summary"),
    "emit": _single("Send a signed sample delivery; exit 1 unless it is accepted.", "emit"),
    "replay": _single(
        "Record what the inbox lacks of the logs, then fold it; exit 1 if a line is refused or an event not folded.",
        "replay",
    ),
    "digest": _single(
        "Print one line per projection table and one for all: its name, its rows, and the hash of them.", "digest"
    ),
    "rebuild": _single(
        "Fold the inbox next to the live tables and print every difference; exit 3 if there is one and no --swap.",
        "rebuild",
    ),
    "bench": _single(
        "Measure each figure next to the machine's limit and the plain way, on servers of its own; ratios count.",
        "bench",
    ),
    "migrate": _group("Bring the schema to this release.", "migrate"),
    "events": _group("The inbox.", "events"),
    "changes": _group("The change feed.", "changes"),
    "orders": _group("The order table.", "orders"),
    "credit-notes": _group("The credit notes.", "credit_notes"),
    "payment-links": _group("The payment links.", "payment_links"),
    "customers": _group("The customers and their balances.", "customers"),
    "reconcile": _group("Are the tables right?", "reconcile"),
    "sessions": _group("Open sessions at Stripe: find them, expire them.", "sessions"),
    "gaps": _group("Events that never came.", "gaps"),
    "accounts": _group("The names of accounts.", "accounts"),
    "endpoints": _group("Stripe's webhook endpoint and its event types.", "endpoints"),
    "roles": _group("Roles in PostgreSQL that read the tables.", "roles"),
    "tokens": _group("Bearer tokens of the API.", "tokens"),
}


class _Loaded(MutableMapping[str, Command]):
    """The commands themselves: each is loaded when it is asked for, so that only its names are known before."""

    def __init__(self) -> None:
        self._found: dict[str, Command] = {}

    def __getitem__(self, name: str) -> Command:
        if name not in self._found:
            self._found[name] = _load(name)
        return self._found[name]

    def __setitem__(self, name: str, command: Command) -> None:
        self._found[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name} cannot be taken away")

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def _load(name: str) -> Command:
    listed = COMMANDS[name]
    holder = typer.Typer(add_completion=False)
    own = import_module(f"deploy.commands.{listed.module}").app
    holder.add_typer(own, name=name if listed.is_group else None)
    whole: Command = typer.main.get_command(holder)
    return whole.commands[name]


class Commands(TyperGroup):
    """The whole command, which loads the one that is run, and lists the others by the table alone."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - typer's own
        super().__init__(**options)
        self.commands = _Loaded()

    def list_commands(self, _: Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(self.commands)

    def get_command(self, _: Context, name: str) -> Command:
        """Return what the list shows of a command; None where there is none of that name."""
        listed = COMMANDS.get(name)
        return None if listed is None else TyperCommand(name, help=listed.help)

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command, list[str]]:
        """Return the command that is run, and what is left of the words after its name."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else self.commands[name], rest
