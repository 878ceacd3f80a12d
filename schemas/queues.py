"""The broker's server by Redis's own client, and the names of the messages and queues in it.

It stands apart from ``schemas.broker``, since a command that asks the server alone starts sooner without Celery.
"""

from typing import Any, Final

from redis import Redis
from redis import asyncio as redis_asyncio

from schemas.settings import Settings

FOLD: Final = "payfold.fold"
SWEEP: Final = "payfold.sweep"
EXPIRE_SESSIONS: Final = "payfold.expire_sessions"
POLL_SESSIONS: Final = "payfold.poll_sessions"
FETCH: Final = "payfold.fetch"
FILL_GAPS: Final = "payfold.fill_gaps"
RECONCILE: Final = "payfold.reconcile"
RECONCILE_ASKED: Final = "payfold.reconcile_asked"
FOLD_QUEUE: Final = "fold"
STRIPE_QUEUE: Final = "stripe"

SOCKET_SECONDS_MAX: Final = 2


def short_name(message: str) -> str:
    """Return the name of the job that *message* asks for, as rows and answers have it."""
    return message.removeprefix("payfold.")


def redis(settings: Settings) -> Redis:
    """Return a client of the broker's server."""
    return Redis.from_url(settings.broker, **_client_options(settings))


def redis_async(settings: Settings) -> redis_asyncio.Redis:
    """Return a client of the broker's server for asyncio."""
    return redis_asyncio.Redis.from_url(settings.broker, **_client_options(settings))


def _client_options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {"socket_timeout": SOCKET_SECONDS_MAX, "socket_connect_timeout": SOCKET_SECONDS_MAX}
    if settings.broker.startswith("rediss://"):
        options["ssl_cert_reqs"] = "required" if settings.redis_tls_verify else "none"
    return options
