"""The worker process: ``python -m worker``. Folding has its own slot; calls to Stripe and reconciliations have another.

Note [Each slot is a process]
    A fold keeps a processor busy and a call to Stripe waits for its answer, so neither may hold up the other. The
    worker's first process only forks the slots (see Note [The parent does nothing else]), which share the modules that
    were loaded before. Each slot takes its own messages, and has a timer and a watchdog of its own.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Final

import structlog
from celery.exceptions import SecurityWarning as RunsAsRoot
from celery.signals import worker_ready, worker_shutting_down

from schemas import accounts, broker, stopping, watchdog
from schemas.broker import FOLD_QUEUE, STRIPE_QUEUE
from schemas.heartbeats import Heart
from schemas.slots import Parent
from schemas.watchdog import Limits, Timer, Watchdog
from worker import app
from worker.folding import parallel
from worker.process import Parts, run

# The modules that Celery loads when a worker starts. Loaded before the fork, the slots share them.
_SHARED: Final = (
    "celery.app.control",
    "celery.app.events",
    "celery.app.log",
    "celery.apps.worker",
    "celery.backends.base",
    "celery.bin.celery",
    "celery.concurrency.solo",
    "celery.worker.autoscale",
    "celery.worker.components",
    "celery.worker.consumer.delayed_delivery",
    "celery.worker.strategy",
)

_log = structlog.get_logger()


def start(parts: Parts, limits: Limits = Limits()) -> int:  # noqa: B008 - it is frozen
    """Keep the slots running until the worker is asked to stop. A running task is finished first."""
    settings = parts.settings
    if not settings.api_keys:
        _log.info(
            "stripe.idle", reason="STRIPE_API_KEY is not set, so nothing is asked of Stripe and nothing expired there"
        )
    # Without a key too: a reconciliation that is asked for takes minutes, in which folding goes on.
    queues = {"fold": (FOLD_QUEUE,), "stripe": (STRIPE_QUEUE,)}
    # Celery warns of running as root because of pickled messages, but here only JSON messages are read.
    warnings.filterwarnings("ignore", category=RunsAsRoot)
    for module in _SHARED:
        importlib.import_module(module)
    parallel.settle_down()
    parent = os.getpid()
    slots = {name: partial(_serve, parts, limits, parent, of) for name, of in queues.items()}
    return Parent(slots).run()


def _serve(parts: Parts, limits: Limits, parent: int, queues: tuple[str, ...]) -> int:
    """Take the messages of *queues* until this process is asked to stop, and return its exit code."""
    if FOLD_QUEUE in queues:
        # The fold process is forked before any thread is started, because a fork must not have threads.
        parts.fold_process.start("fork")
        accounts.log_faults(parts.engine, parts.settings)
    stopping.begin_with_end_of(parent)
    # Celery sends this from its signal handler, so it comes even while the consumer waits.
    worker_shutting_down.connect(
        lambda **_: stopping.begin(shut_down_seconds=limits.shut_down, end_seconds=limits.end), weak=False
    )
    heart = _look_after(parts, limits, queues)
    try:
        # Contrary to its types this function returns, with an exit code if Celery cannot recover from an error.
        take: Callable[[list[str]], object] = parts.app.worker_main
        code = take(
            ["--quiet", "worker", "--pool", "solo", "--queues", ",".join(queues), "--loglevel", "WARNING",
             "--without-gossip", "--without-mingle", "--without-heartbeat", "--hostname", f"{queues[0]}@%h"]
        )  # fmt: skip
        return code if isinstance(code, int) else 0
    finally:
        heart.stop()
        parts.fold_process.close()
        parts.engine.dispose()


def _look_after(parts: Parts, limits: Limits, queues: tuple[str, ...]) -> Heart:
    """Start the timer and the watchdog of the consumer, and return the started heart, which reports their beats."""
    jobs = app.periodic(parts.app, *queues)
    timer = Timer(parts.turns, jobs, silent_seconds=limits.intervals * jobs[0].every)
    dog = Watchdog(parts.turns, broker.ear, broker.redis(parts.settings), deaf_seconds=limits.deaf)
    worker_ready.connect(dog.attend, weak=False)
    watchdog.start("timer", timer.look, every=limits.look)
    watchdog.start("watchdog", dog.look, every=limits.look)
    heart = Heart(parts.engine, lambda: [*parts.turns.beats(), *dog.beats(queues)], every=limits.beat)
    parts.turns.outcome_changed = heart.hurry
    heart.start()
    return heart


if __name__ == "__main__":
    run(start)
