"""The HTTP application: deliveries in, answers out."""

import asyncio
import gc
import multiprocessing
import threading
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from redis.exceptions import RedisError
from sqlalchemy import Engine, case, func, select
from sqlalchemy.exc import SQLAlchemyError

from api import acts, bodies, changes, metrics, problems, reads, webhook
from api.bodies import BODY_SECONDS_MAX, Receive, Room, Scope, Send
from api.reads import READ
from api.recorder import ANSWER_SECONDS_MAX, Recorder
from api.tokens import require
from api.webhook import Webhook
from schemas import accounts, broker, database, logs, migrate, stopping, tables
from schemas.answers import Health
from schemas.database import Bounds
from schemas.errors import DatabaseAway
from schemas.settings import Settings
from schemas.stripe_api import StripeApi

DATABASE_CONNECTIONS_MAX: Final = 8
REQUEST_SECONDS_MAX: Final = 60
"""The change feed waits for 25 seconds, and reads before and after; an act calls Stripe, and records."""

_log = structlog.get_logger()
_health: Final = APIRouter(prefix="/health", tags=["health"])
_operations: Final = APIRouter(tags=["operations"])


def create(
    settings: Settings | None = None,
    *,
    body_seconds_max: float = BODY_SECONDS_MAX,
    answer_seconds_max: float = ANSWER_SECONDS_MAX,
    request_seconds_max: float = REQUEST_SECONDS_MAX,
    read_bounds: Bounds = READ,
) -> "Application":
    """Return the application; settings come from the environment unless given.

    A body has *body_seconds_max* to arrive, a delivery then *answer_seconds_max* to be committed, and any other
    request *request_seconds_max* to be answered.
    """
    settings = settings or Settings.load()
    logs.configure(settings)
    return Application(
        settings,
        body_seconds_max=body_seconds_max,
        answer_seconds_max=answer_seconds_max,
        request_seconds_max=request_seconds_max,
        read_bounds=read_bounds,
    )


class Application:
    """FastAPI for everything but deliveries, which go straight to their endpoint."""

    def __init__(
        self,
        settings: Settings,
        *,
        body_seconds_max: float,
        answer_seconds_max: float,
        request_seconds_max: float,
        read_bounds: Bounds,
    ) -> None:
        self.settings = settings
        self._request_seconds_max = request_seconds_max
        self._read_bounds = read_bounds
        self._body_seconds_max = body_seconds_max
        self._answer_seconds_max = answer_seconds_max
        self.fastapi: FastAPI = FastAPIOffline(
            title="Payfold",
            summary="Stripe's checkout events, folded into order tables that can be proven right.",
            version="1",
            docs_url="/docs",
            redoc_url=None,
            lifespan=self._lifespan,
        )
        self.fastapi.state.settings = settings
        self.fastapi.state.room = self._room = Room()
        self.fastapi.state.body_seconds_max = body_seconds_max
        for router in (reads.router, acts.router, changes.router, _health, _operations):
            self.fastapi.include_router(router)
        problems.install(self.fastapi)
        _document_webhook(self.fastapi)
        self._webhook: Webhook | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or run the application's life."""
        if scope["type"] != "http":
            await self.fastapi(scope, receive, send)
        elif self._webhook is not None and scope["path"] == webhook.PATH:
            await self._webhook(scope, receive, send)
        else:
            await self._answer(_Exchange(scope, receive, send))

    async def _answer(self, exchange: "_Exchange") -> None:
        try:
            async with asyncio.timeout(self._request_seconds_max):
                await self.fastapi(exchange.scope, exchange.receive, exchange.send)
        except TimeoutError:
            if not exchange.is_answered:
                too_late = problems.postponed("The answer took too long: try again.")
                await too_late(exchange.scope, exchange.receive, exchange.send)
        except Exception:
            # It is answered and logged. The server would log it again with the words of the driver, which quote rows.
            if not exchange.is_answered:
                raise

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        settings = self.settings
        _end_in_time()
        engine = database.engine(settings.postgresql, connections_max=DATABASE_CONNECTIONS_MAX)
        app.state.engine = reads.bounded(engine, self._read_bounds)
        app.state.redis = broker.redis(settings)
        app.state.lookout = changes.Lookout(app.state.engine)
        app.state.stripe = StripeApi(settings, app.state.redis)
        app.state.waker = waker = broker.Waker(settings)
        recorder = Recorder(settings.libpq, answer_seconds_max=self._answer_seconds_max)
        self._webhook = Webhook(
            settings.signing_secrets, recorder, waker.wake, self._room, body_seconds_max=self._body_seconds_max
        )
        if not settings.signing_secrets:
            _log.warning("webhook.closed", reason="STRIPE_WEBHOOK_SECRETS is not set, so every delivery is refused")
        accounts.log_faults(engine, settings)
        # What is loaded stays: the collector of cycles need not look at it again.
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            await recorder.stop()
            await app.state.lookout.stop()
            waker.stop()
            app.state.redis.close()
            app.state.engine.dispose()


class _Exchange:
    """A request and its answer. Where the answer comes before the whole body, it closes the connection."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.is_answered = False
        self._receive = receive
        self._send = send
        self._is_unread = bodies.is_announced(dict(scope["headers"]))

    async def receive(self) -> MutableMapping[str, Any]:
        """Return what comes next of the request."""
        message = await self._receive()
        self._is_unread &= message["type"] != "http.request" or message.get("more_body", False)
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self.is_answered = True
            if self._is_unread:
                message = {**message, "headers": [*message.get("headers", ()), bodies.CLOSE]}
        await self._send(message)


def _end_in_time() -> None:
    """Bound the time that a signal leaves this process, and end one of several web processes with their parent."""
    if threading.current_thread() is not threading.main_thread():
        return  # served by a test
    stopping.begin_at_sigterm()
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        stopping.begin_with_end_of(parent.pid)


def _document_webhook(app: FastAPI) -> None:
    """Put the webhook onto the OpenAPI page, where FastAPI does not look for it."""
    generate: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generate()
        schema["paths"].setdefault(webhook.PATH, webhook.OPERATION)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the page


@_health.head("/live", include_in_schema=False)
@_health.get("/live")
async def live() -> dict[str, str]:
    """Answer that the process runs, without a thread, since reads may keep all of them busy."""
    return {"status": "alive"}


@_health.head("/ready", include_in_schema=False)
@_health.get("/ready", responses={503: {"model": Health}})
def ready(request: Request, response: Response) -> Health:
    """Say whether deliveries can be taken: PostgreSQL answers and the schema is not behind."""
    database_is, migrations_are, jobs = _database_health(request.app.state.engine)
    is_ready = (database_is, migrations_are) == ("ok", "ok")
    response.status_code = 200 if is_ready else 503
    return Health(
        ready=is_ready,
        database=database_is,
        migrations=migrations_are,
        broker=_broker_health(request.app.state.redis),
        stripe=_stripe_health(request.app.state.settings, jobs),
    )


def _database_health(engine: Engine) -> tuple[str, str, Mapping[str, Sequence[str]]]:
    """Return how the database and its schema are, and which jobs Stripe has stopped, and which are failing."""
    jobs = tables.stripe_jobs
    state = case((jobs.c.stopped_until > func.now(), "stopped"), (jobs.c.failure.is_not(None), "failing"))
    in_trouble = select(state, jobs.c.job).where(state.is_not(None)).distinct().order_by(jobs.c.job)
    try:
        with reads.reading(engine) as connection:
            if migrate.pending(connection):
                return "ok", "pending", {}
            found: dict[str, list[str]] = {"stopped": [], "failing": []}
            for how, job in connection.execute(in_trouble):
                found[how].append(job)
            return "ok", "ok", found
    except (DatabaseAway, SQLAlchemyError):
        return "away", "unknown", {}


def _stripe_health(settings: Settings, jobs: Mapping[str, Sequence[str]]) -> str:
    """Return how the jobs at Stripe are; without a key there is one, which ends sessions by our clock."""
    in_trouble = [f"{how}: {', '.join(names)}" for how, names in jobs.items() if names]
    return "; ".join(in_trouble) or ("ok" if settings.api_keys else "no key")


def _broker_health(redis: Any) -> str:  # noqa: ANN401 - the client's type takes no part
    try:
        redis.ping()
    except (RedisError, OSError):
        return "away"
    return "ok"


@_operations.get("/metrics", dependencies=[Depends(require("read"))], response_class=Response)
async def show_metrics() -> Response:
    """Return this process's counters in Prometheus's text format."""
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
