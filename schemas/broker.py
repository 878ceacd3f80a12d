"""The door to the broker, and the messages that go through it.

Note [The broker is a hint]
    A message says that there may be work and carries none: what is to be done is in PostgreSQL. So a message
    may be lost, sent twice or arrive late, and losing all of them costs only the time to the next sweep.
"""

import ssl
import threading
from typing import Any, Final

import structlog
from celery import Celery
from celery.exceptions import CeleryError, OperationalError
from redis import Redis
from redis.exceptions import RedisError

from schemas import background
from schemas.settings import Settings

FOLD: Final = "payfold.fold"
SWEEP: Final = "payfold.sweep"
EXPIRE_SESSIONS: Final = "payfold.expire_sessions"
POLL_SESSIONS: Final = "payfold.poll_sessions"
FETCH: Final = "payfold.fetch"
FILL_GAPS: Final = "payfold.fill_gaps"
RECONCILE: Final = "payfold.reconcile"
FOLD_QUEUE: Final = "fold"
STRIPE_QUEUE: Final = "stripe"

SOCKET_SECONDS_MAX: Final = 2
RETRY_SECONDS: Final = 1.0
WAKE_SECONDS_MIN: Final = 0.005
"""Between two messages of one process: a delivery waits for no longer than this to be told of."""
_AWAY = (RedisError, OperationalError, CeleryError, OSError)

_log = structlog.get_logger()


def celery(settings: Settings) -> Celery:
    """Return the Celery application on the broker that *settings* name."""
    app = Celery("payfold", broker=settings.broker, set_as_current=True)
    app.conf.update(
        task_default_queue=FOLD_QUEUE,
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_timeout": SOCKET_SECONDS_MAX * 5,
            "socket_connect_timeout": SOCKET_SECONDS_MAX,
            # A message of a killed worker comes back after this; the sweep is there long before.
            "visibility_timeout": 60,
        },
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        enable_utc=True,
    )
    if settings.broker.startswith("rediss://"):
        app.conf.broker_use_ssl = {"ssl_cert_reqs": _certificate_check(settings)}
    app.set_default()
    return app


def _certificate_check(settings: Settings) -> ssl.VerifyMode:
    return ssl.CERT_REQUIRED if settings.redis_tls_verify else ssl.CERT_NONE


def redis(settings: Settings) -> Redis:
    """Return a client of the broker's server."""
    options: dict[str, Any] = {}
    if settings.broker.startswith("rediss://"):
        options["ssl_cert_reqs"] = "required" if settings.redis_tls_verify else "none"
    return Redis.from_url(
        settings.broker, socket_timeout=SOCKET_SECONDS_MAX, socket_connect_timeout=SOCKET_SECONDS_MAX, **options
    )


class Waker:
    """Tells the workers that there is work, from a thread of its own, so that no request waits for the broker.

    However often it is asked, one message waits at most: a worker that takes it sees all that was committed
    before.
    """

    def __init__(self, settings: Settings, *, app: Celery | None = None) -> None:
        self._app = celery(settings) if app is None else app
        self._redis = redis(settings)
        self._asked = threading.Event()
        self._over = threading.Event()
        self._thread = background.start("waker", self._work)

    def wake(self) -> None:
        """Ask for a message to be sent, soon; never waits and never fails."""
        self._asked.set()

    def stop(self) -> None:
        """Send what is asked for and end the thread."""
        self._over.set()
        self._asked.set()
        self._thread.join(timeout=SOCKET_SECONDS_MAX * 2)

    def _work(self) -> None:
        is_away = False
        while not self._over.is_set():
            # While the broker is away it is asked again without being woken, so that its return is noticed.
            self._asked.wait(RETRY_SECONDS if is_away else None)
            was_away, is_away = is_away, not self._send()
            if is_away != was_away:
                _log.warning("broker.away") if is_away else _log.info("broker.back")
            # Who asks meanwhile is served by the next message: a busy minute is not to ask the broker all the time.
            self._over.wait(WAKE_SECONDS_MIN)
        if self._asked.is_set():
            self._send()

    def _send(self) -> bool:
        self._asked.clear()
        try:
            if self._redis.llen(FOLD_QUEUE) == 0:
                self._app.send_task(FOLD, queue=FOLD_QUEUE, retry=False)
        except _AWAY:
            return False
        except Exception:
            # The thread begins again, and what was asked for is still to be sent.
            self._asked.set()
            raise
        return True
