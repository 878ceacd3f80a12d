"""The .env file, and how to connect Stripe."""

import os
from pathlib import Path
from typing import Final

import typer

from deploy import output
from deploy.local import discovery
from deploy.local.private_files import write_new_private
from schemas import envfile
from schemas.errors import ConfigurationError
from schemas.settings import Settings

app: Final = typer.Typer()
_FIRST: Final = ("DATABASE_URL", "REDIS_URL", "STRIPE_WEBHOOK_SECRETS", "STRIPE_API_KEY", "PAYFOLD_TOKENS")
"""The settings of a deployment; the others have a sufficient default."""
_NEVER: Final = ("PAYFOLD_DATA_DIR",)
"""Not in the file, since the file is found by this setting."""


@app.command()
def init() -> None:
    """Write a .env file for the settings, if there is none, and show how to connect Stripe.

    It stands in the data folder, or where --env-file names it. What is there is never changed.
    """
    path = envfile.place(os.environ)
    if envfile.is_ours(path):
        output.out.print(f"{path} is there already and stays as it is.")
    else:
        _write(path)
        output.out.print(f"Wrote {path}, which only this user can read. Set in it what your deployment needs:")
        output.out.print(f"{', '.join(_FIRST)}. The environment comes before it, `payfold config` shows what holds.")
    _show_connecting(discovery.here(discovery.settings()))


def _write(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_new_private(path, _template())
    except OSError as error:
        raise ConfigurationError(
            f"{path}: it cannot be written: {error.strerror}. Name another file: payfold --env-file FILE init"
        ) from None


def _template() -> str:
    """Return the file's first text: a deployment's settings, empty, and every other setting commented out."""
    lines = [envfile.MARKER, "# The environment comes before this file. A name with nothing behind it is not set.", ""]
    for name in _FIRST:
        lines += [*_about(name), f"{name}=", ""]
    for name in (each.upper() for each in Settings.model_fields):
        if name not in _FIRST and name not in _NEVER:
            lines += [*_about(name), ""]
    return "\n".join(lines)


def _about(name: str) -> list[str]:
    field = Settings.model_fields[name.lower()]
    return [f"# {field.description}", *(f"#{name}={example}" for example in (field.examples or [])[:1])]


def _show_connecting(settings: Settings) -> None:
    """Print the event types, and the three ways to have them sent: Stripe's CLI, its API, and our command."""
    from worker.folds import API_VERSION, STRIPE_TYPES

    here = f"http://127.0.0.1:{settings.port}/webhooks/stripe"
    _print("", f"The {len(STRIPE_TYPES)} event types to choose at Stripe:", "", *(f"  {each}" for each in STRIPE_TYPES))
    _print(
        "",
        "On this machine, with Stripe's CLI. The first line prints the signing secret for STRIPE_WEBHOOK_SECRETS:",
        "",
        "  stripe listen --print-secret",
        f"  stripe listen --events {','.join(STRIPE_TYPES)} --forward-to {here}",
    )
    _print(
        "",
        "On a host: this makes an endpoint with exactly these types, and its answer holds the secret, once. Or set",
        "STRIPE_API_KEY and type: payfold endpoints create --url https://your-host/webhooks/stripe --yes",
        "For the call below, STRIPE_API_KEY in the shell is one key by itself, without a label and without others.",
        "",
        f'  curl {settings.stripe_api_base}/v1/webhook_endpoints -u "$STRIPE_API_KEY:" \\',
        "    -d url=https://your-host/webhooks/stripe \\",
        f"    -d api_version={API_VERSION} \\",
        *(f"    -d 'enabled_events[]={each}' \\" for each in STRIPE_TYPES[:-1]),
        f"    -d 'enabled_events[]={STRIPE_TYPES[-1]}'",
    )


def _print(*lines: str) -> None:
    for line in lines:
        output.out.print(line)
