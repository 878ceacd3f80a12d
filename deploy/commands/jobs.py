"""Jobs at Stripe, begun by hand."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deploy import output
from deploy.commands.base import FAILED, opened_database, settings_here
from deploy.output import Format, err
from schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from worker.stripe_jobs.rounds import JobContext, JobResult


@contextmanager
def opened_context(*, wants_key: bool = True) -> Iterator["JobContext"]:
    """Yield the context that the jobs at Stripe need, with a key."""
    from schemas import broker
    from schemas.stripe_api import StripeApi
    from worker.stripe_jobs.rounds import THREADS, JobContext

    settings = settings_here()
    if wants_key and not settings.api_keys:
        raise ConfigurationError(
            "STRIPE_API_KEY: it is not set, so Stripe cannot be asked. Set it to a secret or restricted key. "
            "Example: STRIPE_API_KEY=sk_test_a"
        )
    # All processes draw calls from one budget, which Redis keeps.
    redis = broker.redis(settings) if settings.api_keys else None
    with opened_database(connections_max=THREADS + 1) as engine:
        yield JobContext(engine, StripeApi(settings, redis), settings, is_by_hand=True)


def run_job(context: "JobContext", run_once: "Callable[[JobContext], JobResult]", form: Format, words: str) -> None:
    """Do a job to its end, fold what it recorded, and print the outcome; exit 1 if Stripe did not let us."""
    from worker.folding import projection

    recorded, counted, failed = 0, Counter[str](), list[str]()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(words, total=None)
        while True:
            found = run_once(context)
            recorded += found.recorded
            counted.update(found.counted)
            failed += found.failed
            bar.advance(task, sum(found.counted.values()) or found.recorded)
            projection.fold_pending(context.engine)
            if failed or not found.is_more:
                break
    output.one({"recorded": recorded, **counted}, form)
    for reason in failed:
        err.print(reason, style="red")
    if failed:
        raise typer.Exit(FAILED)
