"""Events that never came."""

from datetime import datetime
from typing import Annotated, Final

import typer

from deploy.commands.base import TIMES, FormatOption, utc
from deploy.commands.jobs import opened_context, run_job
from deploy.output import Format

app: Final = typer.Typer(help="Events that never came.", no_args_is_help=True)


@app.command("fill")
def gaps_fill(
    since: Annotated[
        datetime | None,
        typer.Option(formats=TIMES, metavar="TIME", help="From then on, 30 days ago at most; else the checkpoint."),
    ] = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Ask Stripe for the events of the last while, now, and record those that never came."""
    from worker.stripe_jobs import gaps

    start = utc(since)
    with opened_context() as context:
        run_job(context, lambda context: gaps.run_once(context, since=start), form, "Asking for events that never came")
