"""One signed sample delivery."""

import time
from typing import Annotated, Any, Final

import msgspec
import typer

from deploy import output
from deploy.commands.base import FAILED, settings_here
from deploy.output import Format, err
from schemas.errors import ConfigurationError, ConflictError

app: Final = typer.Typer()


@app.command()
def emit(
    kind: Annotated[str, typer.Argument(metavar="TYPE", help="The event's type, as checkout.session.completed.")],
    override: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of the object; the value as JSON or text.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="Where to send it; the webhook here by default.")] = None,
) -> None:
    """Send a signed sample delivery; exit 1 unless it is accepted."""
    import httpx

    from deploy.sandbox import SandboxError
    from deploy.sandbox.samples import sample
    from deploy.sandbox.signing import sign

    settings = settings_here()
    if not settings.signing_secrets:
        raise ConfigurationError(
            "STRIPE_WEBHOOK_SECRETS: it is not set, so nothing can be signed. Set it to the endpoint's signing secret, "
            "which `payfold up` prints. Example: STRIPE_WEBHOOK_SECRETS=whsec_a"
        )
    try:
        event = sample(kind, dict(_override(each) for each in override or []), now=int(time.time()))
    except SandboxError as error:
        raise ConfigurationError(str(error)) from None
    url = to or f"http://127.0.0.1:{settings.port}/webhooks/stripe"
    header = sign(event.body, settings.signing_secrets[0].secret.decode(), int(time.time()))
    try:
        answer = httpx.post(url, content=event.body, headers={"Stripe-Signature": header}, timeout=20)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigurationError(f"--to is no address to post to: {error} Example: http://127.0.0.1:8000") from None
    except httpx.HTTPError as error:
        raise ConflictError(
            f"{url} does not answer ({type(error).__name__}): does the web process run there?"
        ) from None
    output.one({"id": event.id, "type": event.type, "sent_to": url, "status": answer.status_code}, Format.TABLE)
    if not answer.is_success:
        err.print(answer.text)
        raise typer.Exit(FAILED)


def _override(given: str) -> tuple[str, Any]:
    key, equals, value = given.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"--override wants KEY=VALUE, as amount_total=500; {given} is not that.")
    try:
        return key, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return key, value
