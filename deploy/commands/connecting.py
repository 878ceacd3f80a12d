"""How Payfold and Stripe come together: the .env file, and the webhook endpoint with its event types."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import urlsplit

import typer

from deploy import local, output
from deploy.commands.base import FAILED, USAGE, AccountOption, FormatOption, ModeOption
from deploy.output import Format, err
from deploy.services import write_new_private
from schemas import envfile
from schemas.errors import ConfigurationError
from schemas.settings import Settings

if TYPE_CHECKING:
    from schemas.observations import World

app: Final = typer.Typer()
endpoints_app: Final = typer.Typer(help="Stripe's webhook endpoint and its event types.", no_args_is_help=True)

_FIRST: Final = ("DATABASE_URL", "REDIS_URL", "STRIPE_WEBHOOK_SECRETS", "STRIPE_API_KEY", "PAYFOLD_TOKENS")
"""What a deployment sets; the rest has a default that does."""
_NEVER: Final = ("PAYFOLD_DATA_DIR",)
"""The file is found by it."""


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
    _show_connecting(local.here(local.settings()))


def _write(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_new_private(path, _template())
    except OSError as error:
        raise ConfigurationError(
            f"{path}: it cannot be written: {error.strerror}. Name another file: payfold --env-file FILE init"
        ) from None


def _template() -> str:
    """Return the file's first text: what a deployment sets, empty, and every other setting commented out."""
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


# ---- Endpoints at Stripe ----

UrlOption = Annotated[str | None, typer.Option("--url", help="The address of the webhook, as Stripe reaches it.")]
_COLUMNS: Final = ("account", "livemode", "id", "url", "status", "api_version", "missing", "superfluous")


@endpoints_app.command("check")
def endpoints_check(
    url: UrlOption = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Compare Stripe's endpoints for --url, or for any /webhooks/stripe, with our event types; exit 1 if one lacks."""
    from deploy import endpoints

    settings = local.here(local.settings())
    api, worlds = endpoints.opened(settings), _worlds(settings, account, livemode)
    found = {world: endpoints.listed(api, world, url=url) for world in worlds}
    every = [each for of_world in found.values() for each in of_world]
    output.rows([asdict(each) for each in every], _COLUMNS, form, empty="There is no such endpoint.")
    for sentence in endpoints.advice(every):
        err.print(sentence)
    without = [world for world, of_world in found.items() if not any(each.serves for each in of_world)]
    for world in without:
        if not found[world]:
            err.print(f"{_named(world)} has none for {url or endpoints.PATH}: payfold endpoints create --url URL --yes")
    if without:
        raise typer.Exit(FAILED)


@endpoints_app.command("create")
def endpoints_create(
    url: Annotated[str, typer.Option("--url", help="The address of the webhook, as Stripe reaches it.")],
    account: AccountOption = None,
    livemode: ModeOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only show what would be done.")] = False,
) -> None:
    """Make an endpoint with exactly our event types, and print its signing secret, this once; exit 2 without --yes."""
    from deploy import endpoints
    from worker.folds import STRIPE_TYPES

    settings = local.here(local.settings())
    _require_reachable(url)
    worlds = _worlds(settings, account, livemode)
    if len(worlds) > 1:
        names = ", ".join(map(_named, worlds))
        raise ConfigurationError(f"Several keys are configured: choose by --account, --live or --test ({names}).")
    if not yes:
        err.print(f"{_named(worlds[0])} would get an endpoint for {url} with {len(STRIPE_TYPES)} event types.")
        err.print("Nothing has been done. Add --yes to do it.")
        raise typer.Exit(USAGE)
    made = endpoints.create(endpoints.opened(settings), worlds[0], url)
    err.print(f"Made {made.id}. This is shown once; where secrets are set already, put it behind them and a comma:")
    print(f"STRIPE_WEBHOOK_SECRETS={made.entry}")  # noqa: T201 - data goes to stdout


def _worlds(settings: Settings, account: str | None, livemode: bool | None) -> "Sequence[World]":  # noqa: FBT001 - an option
    from deploy import endpoints

    if not settings.api_keys:
        raise ConfigurationError(
            "STRIPE_API_KEY: it is not set, so Stripe cannot be asked. Set it to a secret or restricted key that may"
            " read and write webhook endpoints. Example: STRIPE_API_KEY=sk_test_a"
        )
    found = endpoints.worlds(settings, account=account, livemode=livemode)
    if not found:
        raise ConfigurationError("No key in STRIPE_API_KEY is of that account and mode.")
    return found


def _named(world: "World") -> str:
    return f"{world.account or 'the default account'} ({'live' if world.livemode else 'test'})"


def _require_reachable(url: str) -> None:
    """Find out before Stripe is asked whether it could reach *url*.

    Raises:
        ConfigurationError: it could not.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname)
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigurationError("--url is no address. Example: --url https://shop.example.com/webhooks/stripe")
    if parts.hostname in {"localhost", "127.0.0.1", "::1", "0.0.0.0"}:  # noqa: S104 - refused, not bound
        raise ConfigurationError(
            f"--url: Stripe cannot reach {parts.hostname}. For this machine use Stripe's CLI, as `payfold init` shows."
        )
