"""A command loads what it needs and no more: modules are counted, since times differ from machine to machine."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer.main

from deploy.cli import app
from deploy.commands.listed import COMMANDS
from tests.command import ROOT, SECONDS_MAX, environment

_RUN = "import atexit, pathlib, runpy, sys\natexit.register(lambda: pathlib.Path(sys.argv.pop()).write_text('\\n'.join(sys.modules)))\n"


def whole() -> Any:  # noqa: ANN401 - typer's copy of click has no public types
    """Return the payfold command."""
    return typer.main.get_command(app)


def test_the_list_is_the_commands_own() -> None:
    """The list names every command of every module, each with the first paragraph of its help."""
    listed = {name: each.help for name, each in COMMANDS.items()}

    assert listed == {name: " ".join(each.help.split("\n\n")[0].split()) for name, each in whole().commands.items()}
