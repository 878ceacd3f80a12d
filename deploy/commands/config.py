"""The settings that hold, and where each comes from."""

import os
from typing import Final

import typer

from deploy import output
from deploy.commands.base import FormatOption
from deploy.local import discovery
from deploy.output import Format
from schemas import envfile
from schemas.settings import Settings

app: Final = typer.Typer()


@app.command()
def config(form: FormatOption = Format.TABLE) -> None:
    """Show the effective settings, and where each comes from; of a secret only that it is set."""
    settings = discovery.settings()
    provided = discovery.provided(settings)
    found = [
        {
            "setting": name.upper(),
            "value": value,
            "source": provided[name].source if name in provided else envfile.source_of(name, os.environ) or "default",
            "meaning": Settings.model_fields[name.lower()].description,
        }
        for name, value in discovery.here(settings).shown().items()
    ]
    output.rows(found, ["setting", "value", "source", "meaning"], form, empty="")
