"""The HTTP application: deliveries in, answers out."""

import asyncio
import gc
import multiprocessing
import threading
import time
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog
from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline

from api import (
    actions,
    addresses,
    bodies,
    changes,
    documentation,
    events,
    expiring,
    explanations,
    headers,
    health,
    pages,
    problems,
    reads,
    reconciliations,
    related,
    search,
    summaries,
    trace,
    webhook,
)
from api.bodies import BODY_SECONDS_MAX, Receive, Room, Scope, Send
from api.counts import DeliveryCounts
from api.metrics import Instance
from api.pulse import Pulse
from api.readiness import Readiness
from api.reads import READ
from api.recorder import ANSWER_SECONDS_MAX, Recorder
from api.status import StatusReader
from api.webhook import Webhook
from schemas import accounts, broker, database, heartbeats, logs, migrate, stopping
from schemas.database import Bounds
from schemas.settings import Settings
from schemas.stripe_api import StripeApi

DATABASE_CONNECTIONS_MAX: Final = 5
"""For reads and acts. Five more record, beat, read the status, try to record and write counts."""
REQUEST_SECONDS_MAX: Final = 60
"""The change feed waits for 25 seconds, and reads before and after; an act calls Stripe, and records."""

_log = structlog.get_logger()


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
            docs_url=None,
            redoc_url=None,
            lifespan=self._lifespan,
            generate_unique_id_function=lambda route: route.name,
        )
        self.fastapi.state.settings = settings
        self.fastapi.state.room = self._room = Room()
        self.fastapi.state.body_seconds_max = body_seconds_max
        known = Depends(addresses.known_parameters)
        shown = (explanations.router, trace.router, events.router, related.router, expiring.router, reads.router)
        more = (search.router, summaries.router, actions.router, changes.router, health.operations)
        guarded = (*shown, *more, reconciliations.router)
        for router in guarded:
            self.fastapi.include_router(router, dependencies=[known], responses=problems.declared(401, 403, 422, 503))
        self.fastapi.include_router(health.probes)
        problems.install(self.fastapi, [route for each in (*guarded, health.probes) for route in each.routes])
        documentation.install(self.fastapi)
        pages.install(self.fastapi)
        self._webhook: Webhook | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or run the application's life."""
        if scope["type"] != "http":
            await self.fastapi(scope, receive, send)
        elif self._webhook is not None and scope["path"] in webhook.PATHS:
            await self._webhook(scope, receive, send)
        else:
            addresses.encode_segments(scope)
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
            # The error is answered and logged. The server would log it again with the driver's words, which quote rows.
            if not exchange.is_answered:
                raise

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        settings = self.settings
        _end_in_time()
        engine = database.engine(
            settings.postgresql, connections_max=DATABASE_CONNECTIONS_MAX, prepare_after=database.NEVER
        )
        app.state.engine = reads.bounded(engine, self._read_bounds)
        app.state.redis = broker.redis(settings)
        app.state.feed_watcher = changes.FeedWatcher(app.state.engine)
        app.state.stripe = StripeApi(settings, app.state.redis)
        app.state.celery = broker.celery(settings)
        app.state.waker = waker = broker.Waker(settings, app=app.state.celery)
        recorder = Recorder(settings.libpq, answer_seconds_max=self._answer_seconds_max)
        app.state.instance = Instance(heartbeats.instance_name(), time.time())
        app.state.counts = counts = DeliveryCounts(settings.libpq)
        counts.start()
        redis_async = broker.redis_async(settings)
        app.state.status = status = StatusReader(settings, app.state.redis)
        app.state.readiness = readiness = Readiness(
            settings.libpq, redis_async, recorder, status, has_stripe_key=bool(settings.api_keys)
        )
        app.state.recorder = recorder
        self._webhook = Webhook(
            settings.signing_secrets, recorder, waker.wake, self._room, counts, body_seconds_max=self._body_seconds_max
        )
        pulse = Pulse(settings.postgresql)
        if not settings.signing_secrets:
            _log.warning("webhook.closed", reason="STRIPE_WEBHOOK_SECRETS is not set, so every delivery is refused")
        # Read once, and not when the first one asks whether the process is ready.
        migrate.revisions()
        accounts.log_faults(engine, settings)
        # Everything loaded by now stays, so the collector of cycles need not look at it again.
        gc.collect()
        gc.freeze()
        try:
            # The server's own refusals are counted too, and it hands over deliveries that came whole.
            yield {"counts": counts, "webhook": self._webhook}
        finally:
            await pulse.stop()
            await recorder.stop()
            await readiness.stop()
            status.stop()
            await counts.stop()
            await redis_async.aclose()
            await app.state.feed_watcher.stop()
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
            closing = [bodies.CLOSE] if self._is_unread else []
            given = headers.completed(self.scope["path"], message.get("headers", ()))
            message = {**message, "headers": [*given, *closing]}
        await self._send(message)


def _end_in_time() -> None:
    """Bound the time that a signal leaves this process, and end one of several web processes with their parent."""
    if threading.current_thread() is not threading.main_thread():
        return  # served by a test
    stopping.begin_at_sigterm()
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        stopping.begin_with_end_of(parent.pid)
