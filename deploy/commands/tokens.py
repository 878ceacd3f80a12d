"""Bearer tokens of the API."""

import hashlib
import re
import secrets as random_secrets
from typing import Annotated, Final

import typer

from deploy import output
from deploy.local import discovery
from deploy.output import Format, err
from schemas.errors import ConfigurationError
from schemas.settings import SCOPES, Settings

app: Final = typer.Typer(help="Bearer tokens of the API.", no_args_is_help=True)


@app.command("new")
def tokens_new(
    name: Annotated[str, typer.Argument(help="Who holds it: letters, digits and _.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"What it may do: {', '.join(SCOPES)}; several joined by +, or given again; read if absent."),
    ] = None,
) -> None:
    """Make a bearer token: show it once, and the entry for PAYFOLD_TOKENS, which holds only its hash."""
    discovery.refuse_unknown_names()  # and no bad value, since it may be the one that this command is to mend
    given = [each for text in scope or ["read"] for each in text.split("+")]
    if unknown := [each for each in given if each not in SCOPES]:
        raise ConfigurationError(
            f"--scope {unknown[0]}: there is no such scope. It is one of {', '.join(SCOPES)}, or several joined by +."
            " Example: payfold tokens new shop --scope read+personal"
        )
    if not re.fullmatch("[A-Za-z0-9_]{1,255}", name):
        raise ConfigurationError("NAME holds letters, digits and _ only. Example: payfold tokens new shop")
    token = f"pf_{random_secrets.token_urlsafe(24)}"
    entry = f"{name}:{'+'.join(each for each in SCOPES if each in given)}:{hashlib.sha256(token.encode()).hexdigest()}"
    Settings.load({"PAYFOLD_TOKENS": entry})
    if set(given) == {"personal"}:
        err.print("personal opens no route by itself: join it to another scope, as in --scope read+personal.")
    output.one({"token": token, "PAYFOLD_TOKENS": entry}, Format.TABLE)
