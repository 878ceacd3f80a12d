"""Does a reconciliation that was asked for: see Note [A reconciliation is leased]."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog
from sqlalchemy import Engine

from schemas import background, database, reconciliations
from schemas.database import BATCH, Cursor
from schemas.errors import PayfoldError
from schemas.heartbeats import WRITE
from schemas.reconciliations import STRIPE, Request
from worker.proof import reconcile
from worker.proof.rebuild import IN_ONE_PROCESS
from worker.proof.reconcile import ReconcileRequest
from worker.stripe_jobs.rounds import JobContext

EXTEND_SECONDS: Final = 10.0
"""Between two extensions of the lease."""

_log = structlog.get_logger()


def run_once(
    context: JobContext, *, stepped_at: Callable[[], float], extend_seconds: float = EXTEND_SECONDS
) -> dict[str, Any] | None:
    """Do the reconciliation that waits, if any, and return its result.

    *stepped_at* returns when it last came further, by the monotonic clock. What ends it is kept with it, and raised.
    """
    request = _within(context.engine, _taken)
    if request is None:
        return None
    with _leased(context.engine, request, stepped_at, extend_seconds):
        return reconcile.run(context.engine, request.checks, _wanted(request, context))


def _taken(cursor: Cursor) -> Request | None:
    reconciliations.give_up_lost(cursor)
    return reconciliations.take(cursor)


def _wanted(request: Request, context: JobContext) -> ReconcileRequest:
    return ReconcileRequest(
        number=request.id,
        context=context if STRIPE in request.checks else None,
        sizes=IN_ONE_PROCESS,
        progress=lambda *_: context.step(),
    )


@contextmanager
def _leased(engine: Engine, request: Request, stepped_at: Callable[[], float], every: float) -> Iterator[None]:
    """Extend the lease of *request* while its work goes on, and let it be failed if that raises."""
    over = threading.Event()

    def extend() -> None:
        while not over.wait(every):
            if time.monotonic() - stepped_at() <= reconciliations.STEP_SECONDS_MAX:
                with database.transaction(engine, WRITE) as connection, database.cursor(connection) as cursor:
                    reconciliations.extend(cursor, request.id)

    # It begins again where PostgreSQL did not answer.
    background.start("lease", extend, restart_seconds=every)
    try:
        yield
    except Exception as error:
        kind, words = database.condition(error), str(error) if isinstance(error, PayfoldError) else None
        _log.warning("reconcile.failed", run=request.id, kind=kind)
        _within(engine, lambda cursor: reconciliations.fail(cursor, request.id, kind, words))
        raise
    finally:
        over.set()


def _within(engine: Engine, work: Callable[[Cursor], Any]) -> Any:  # noqa: ANN401 - the result of the work
    with database.transaction(engine, BATCH) as connection, database.cursor(connection) as cursor:
        return work(cursor)
