"""The worker process: ``python -m worker``."""

from celery import Celery

from schemas.broker import FOLD_QUEUE, STRIPE_QUEUE
from schemas.settings import Settings
from worker.process import run


def start(app: Celery, settings: Settings) -> None:
    """Take messages until told to stop; the task at hand is finished first."""
    del settings
    # One slot, in this process: a fold keeps a processor busy, and more of them are more processes.
    app.worker_main(
        ["worker", "--pool", "solo", "--queues", f"{FOLD_QUEUE},{STRIPE_QUEUE}", "--loglevel", "WARNING",
         "--without-gossip", "--without-mingle", "--without-heartbeat"]
    )  # fmt: skip


if __name__ == "__main__":
    run(start)
