"""Stripe's webhook endpoint and its event types."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import urlsplit

import typer

from deploy import output
from deploy.commands.base import FAILED, USAGE, AccountOption, FormatOption, ModeOption
from deploy.local import discovery
from deploy.output import Format, err
from schemas.errors import ConfigurationError
from schemas.settings import Settings

if TYPE_CHECKING:
    from schemas.observations import World


app: Final = typer.Typer(help="Stripe's webhook endpoint and its event types.", no_args_is_help=True)
UrlOption = Annotated[str | None, typer.Option("--url", help="The address of the webhook, as Stripe reaches it.")]
_COLUMNS: Final = ("account", "livemode", "id", "url", "status", "api_version", "missing", "superfluous")


@app.command("check")
def endpoints_check(
    url: UrlOption = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Compare Stripe's endpoints for --url, or for any /webhooks/stripe, with our event types; exit 1 if one lacks."""
    from deploy import endpoints

    settings = discovery.here(discovery.settings())
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


@app.command("create")
def endpoints_create(
    url: Annotated[str, typer.Option("--url", help="The address of the webhook, as Stripe reaches it.")],
    account: AccountOption = None,
    livemode: ModeOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only show what would be done.")] = False,
) -> None:
    """Make an endpoint with exactly our event types, and print its signing secret, this once; exit 2 without --yes."""
    from deploy import endpoints
    from worker.folds import STRIPE_TYPES

    settings = discovery.here(discovery.settings())
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
