"""The broker's server by Redis's own client, and the names of the messages and queues in it.

It stands apart from ``schemas.broker``, since a command that asks the server alone starts sooner without Celery.

Note [Two lengths need no client]
    Redis's client takes a fifth of the time in which `payfold status` starts, for asking how long two lists are. So
    that command writes the few bytes itself where the address is plain. With TLS, or with options in the address, the
    client is loaded, which knows all of them.
"""

import socket
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from schemas.settings import Settings

if TYPE_CHECKING:
    from redis import Redis
    from redis import asyncio as redis_asyncio

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
_ANSWER_BYTES_MAX: Final = 1000


def short_name(message: str) -> str:
    """Return the name of the job that *message* asks for, as rows and answers have it."""
    return message.removeprefix("payfold.")


def redis(settings: Settings) -> "Redis":
    """Return a client of the broker's server."""
    from redis import Redis

    return Redis.from_url(settings.broker, **_client_options(settings))


def redis_async(settings: Settings) -> "redis_asyncio.Redis":
    """Return a client of the broker's server for asyncio."""
    from redis import asyncio as redis_asyncio

    return redis_asyncio.Redis.from_url(settings.broker, **_client_options(settings))


def _client_options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {"socket_timeout": SOCKET_SECONDS_MAX, "socket_connect_timeout": SOCKET_SECONDS_MAX}
    if settings.broker.startswith("rediss://"):
        options["ssl_cert_reqs"] = "required" if settings.redis_tls_verify else "none"
    return options


class Plain:
    """Asks Redis how long a list is, over a connection without TLS: see Note [Two lengths need no client]."""

    def __init__(self, address: str) -> None:
        url = urlsplit(address)
        self._place = (unquote(url.hostname or "localhost"), url.port or 6379)
        user, password = (unquote(each or "") for each in (url.username, url.password))
        self._first = [["AUTH", *([user] if user else []), password]] if user or password else []
        if database := url.path.strip("/"):
            self._first.append(["SELECT", str(int(database))])

    def llen(self, queue: str) -> int:
        """Return how long the list *queue* is.

        Raises:
            OSError: Redis does not answer, or refuses to.
        """
        asked = [*self._first, ["LLEN", queue]]
        with (
            socket.create_connection(self._place, SOCKET_SECONDS_MAX) as connection,
            connection.makefile("rb") as answers,
        ):
            connection.sendall(b"".join(map(_written, asked)))
            for _ in asked:
                answer = answers.readline(_ANSWER_BYTES_MAX)
                if not answer.startswith((b"+", b":")) or not answer.endswith(b"\r\n"):
                    raise ConnectionRefusedError("Redis refuses this, or does not answer in full.")
        if not answer[1:-2].isdigit():
            raise ConnectionRefusedError("Redis answers with no length.")
        return int(answer[1:-2])

    def close(self) -> None:
        """Do nothing: each answer is waited for, and its connection closed."""


def _written(command: list[str]) -> bytes:
    """Return *command* as Redis reads it (https://redis.io/docs/latest/develop/reference/protocol-spec/)."""
    words = [word.encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def lengths(settings: Settings) -> "Plain | Redis":
    """Return what a command asks how long the queues are, and closes then."""
    is_plain = settings.broker.startswith("redis://") and not urlsplit(settings.broker).query
    return Plain(settings.broker) if is_plain else redis(settings)
