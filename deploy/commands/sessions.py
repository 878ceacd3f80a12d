"""Open sessions at Stripe: find them, expire them."""

from typing import Annotated, Final

import typer

from deploy import output
from deploy.commands.base import FormatOption
from deploy.commands.jobs import opened_context, run_job
from deploy.output import Format

app: Final = typer.Typer(help="Open sessions at Stripe: find them, expire them.", no_args_is_help=True)


@app.command("expire")
def sessions_expire(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Expire nothing; list what would be expired, and why.")
    ] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Expire the open sessions that are stale, now; by our clock where no key serves them."""
    from worker.stripe_jobs import expiry

    with opened_context(wants_key=False) as context:
        if dry_run:
            found = expiry.listed(context)
            output.rows(found, expiry.LISTED, form, empty="No open session is stale.")
            return
        run_job(context, expiry.run_once, form, "Expiring stale sessions")


@app.command("poll")
def sessions_poll(form: FormatOption = Format.TABLE) -> None:
    """Ask Stripe for its open sessions, now, and record those that are not known."""
    from worker.stripe_jobs import discovery

    with opened_context() as context:
        run_job(context, discovery.run_once, form, "Asking for open sessions")
