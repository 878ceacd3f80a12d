"""The worker process: ``python -m worker``. Folding has a slot of its own, and so have calls to Stripe.

Note [Two slots are two processes]
    A fold keeps a processor busy and a call to Stripe waits for somebody else, so neither may stand in the
    other's way. The second slot is forked before anything is opened: it shares what is loaded, and nothing that
    runs. If either ends, so does the other, and whoever started the worker starts it again.
"""

import os
import signal
import sys
import threading
import time

import structlog
from celery import Celery
from celery.signals import worker_shutting_down

from schemas.broker import FOLD_QUEUE, STRIPE_QUEUE
from schemas.settings import Settings
from worker.lanes import Lane
from worker.process import run

WATCH_SECONDS = 1.0

_log = structlog.get_logger()


def start(app: Celery, settings: Settings, lane: Lane) -> None:
    """Take messages until told to stop; the task at hand is finished first."""
    if not settings.api_keys:
        _log.info(
            "stripe.idle", reason="STRIPE_API_KEY is not set, so nothing is asked of Stripe and nothing expired there"
        )
    if not settings.api_keys and settings.payfold_reconcile_at is None:
        lane.start("fork")
        _take(app, FOLD_QUEUE, STRIPE_QUEUE)
        return
    parent = os.getpid()
    slot = os.fork()
    if slot == 0:
        threading.Thread(target=_stop_with_parent, args=(parent,), name="parent", daemon=True).start()
        _take(app, STRIPE_QUEUE)
        return
    # After the slot, which would keep its line open.
    lane.start("fork")
    is_ending, is_alone = threading.Event(), threading.Event()
    worker_shutting_down.connect(lambda **_: is_ending.set(), weak=False)
    threading.Thread(target=_stop_with_slot, args=(slot, is_ending, is_alone), name="slot", daemon=True).start()
    try:
        _take(app, FOLD_QUEUE)
    finally:
        if not is_alone.is_set():
            _end(slot)
    if is_alone.is_set():
        sys.exit(1)


def _take(app: Celery, *queues: str) -> None:
    app.worker_main(
        ["worker", "--pool", "solo", "--queues", ",".join(queues), "--loglevel", "WARNING",
         "--without-gossip", "--without-mingle", "--without-heartbeat", "--hostname", f"{queues[0]}@%h"]
    )  # fmt: skip


def _stop_with_parent(parent: int) -> None:
    """Stop this slot when the worker that forked it is gone, however that came."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _stop_with_slot(slot: int, is_ending: threading.Event, is_alone: threading.Event) -> None:
    """Stop the worker, which is then *alone*, when its slot for Stripe has ended, unless it is ending anyway."""
    while not is_ending.wait(WATCH_SECONDS):
        if os.waitpid(slot, os.WNOHANG) != (0, 0):
            _log.error("worker.slot_ended", queue=STRIPE_QUEUE)
            is_alone.set()
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _end(slot: int) -> None:
    try:
        os.kill(slot, signal.SIGTERM)
        os.waitpid(slot, 0)
    except (ProcessLookupError, ChildProcessError):
        return


if __name__ == "__main__":
    run(start)
