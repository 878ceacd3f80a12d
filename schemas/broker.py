"""The door to the broker, and the messages that go through it.

Note [The broker is a hint]
    A message means that there may be work, and carries none: the work itself is in PostgreSQL. So a message may be
    lost, sent twice or arrive late, and losing all messages costs only the time to the next sweep.

Note [A consumer may go deaf]
    A message that is acknowledged over a lost connection stays among kombu's unacknowledged ones. Celery logs that and
    goes on, and with a prefetch of one kombu then never asks Redis for a message again, although the process runs and
    its event loop turns. So our transport gives the credit back in any case, and notes when Redis last answered the
    consumer's BRPOP: with a message, or each second with nil. The worker's watchdog looks at that.
"""

import queue
import ssl
import threading
import time
from typing import Any, Final, Self

import kombu
import structlog
from celery import Celery
from celery.exceptions import CeleryError, OperationalError
from kombu.transport import redis as kombu_redis
from redis.exceptions import RedisError

from schemas import background
from schemas.queues import (
    EXPIRE_SESSIONS,
    FETCH,
    FILL_GAPS,
    FOLD,
    FOLD_QUEUE,
    POLL_SESSIONS,
    RECONCILE,
    RECONCILE_ASKED,
    SOCKET_SECONDS_MAX,
    STRIPE_QUEUE,
    SWEEP,
    redis,
    redis_async,
    short_name,
)
from schemas.settings import Settings

__all__ = [
    "EXPIRE_SESSIONS",
    "FETCH",
    "FILL_GAPS",
    "FOLD",
    "FOLD_QUEUE",
    "POLL_SESSIONS",
    "RECONCILE",
    "RECONCILE_ASKED",
    "SOCKET_SECONDS_MAX",
    "STRIPE_QUEUE",
    "SWEEP",
    "redis",
    "redis_async",
    "short_name",
]

CONSUMER_SOCKET_SECONDS_MAX: Final = 5
"""For so long a consumer, or a task that sends a message, waits for one answer of Redis."""
HEALTH_SECONDS: Final = 10
"""A BRPOP without an answer for this, and a second, has lost its connection."""
RECONNECT_SECONDS_MAX: Final = 3
"""Between two tries of a consumer to connect."""
RETRY_SECONDS: Final = 1.0
WAKE_SECONDS_MIN: Final = 0.005
"""Between two messages of one process while deliveries are few: none waits longer for the one that announces it."""
WAKE_SECONDS_BUSY: Final = 0.05
"""The same in a busy time, when each look at the broker holds up the deliveries themselves."""
BUSY_RATE: Final = 2_000
"""So many wake-ups in a second are a busy time; with fewer, the pause is shorter in proportion."""
_AWAY = (RedisError, OperationalError, CeleryError, OSError)

_log = structlog.get_logger()


class Ear:
    """When Redis last answered a BRPOP of this process, by the monotonic clock."""

    def __init__(self) -> None:
        self.answered_at = time.monotonic()

    def note(self) -> None:
        """Note an answer."""
        self.answered_at = time.monotonic()


ear: Final = Ear()


class _QoS(kombu_redis.QoS):
    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message; if that fails, Redis delivers it again, and the consumer may take another.

        See Note [A consumer may go deaf].
        """
        try:
            super().ack(delivery_tag)
        except BaseException:
            kombu.transport.virtual.QoS.ack(self, delivery_tag)
            raise


class Channel(kombu_redis.Channel):
    """A channel that notes when a BRPOP was answered."""

    QoS = _QoS

    def _brpop_read(self, **options: Any) -> bool:  # noqa: ANN401 - kombu's own
        # What is raised in the work that a message starts is no matter of the broker's.
        answered: bool = False
        try:
            answered = super()._brpop_read(**options)  # type: ignore[misc]  # private, and so not in the stubs
        except queue.Empty:
            answered = True
            raise
        finally:
            if answered:
                ear.note()
        return answered


class Transport(kombu_redis.Transport):
    """Celery's way to Redis, with our channels."""

    Channel = Channel


class _Connection(kombu.Connection):
    """A connection by our transport, tried again after seconds where kombu's own waits for up to half a minute."""

    def get_transport_cls(self) -> type[kombu.transport.base.Transport]:
        """Return our transport in place of kombu's for Redis."""
        named = super().get_transport_cls()
        return Transport if named is kombu_redis.Transport else named

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401 - kombu's own
        often = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": RECONNECT_SECONDS_MAX}
        super().ensure_connection(*args, **(often | kwargs))
        return self


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
        broker_connection_timeout=SOCKET_SECONDS_MAX,
        broker_transport_options={
            "socket_timeout": CONSUMER_SOCKET_SECONDS_MAX,
            "socket_connect_timeout": SOCKET_SECONDS_MAX,
            "socket_keepalive": True,
            "health_check_interval": HEALTH_SECONDS,
            # For senders of messages: a consumer tries for as long as it takes.
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 0.2,
            # A message of a killed worker comes back after this; the sweep is there long before.
            "visibility_timeout": 60,
        },
        # The clock looks at its timetable at least this often, so that a look that is late means something.
        beat_max_loop_interval=5,
        # Messages of a lost connection come again, and a task that still runs is not disturbed: it is in this thread.
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        enable_utc=True,
    )
    app.amqp.Connection = _Connection
    if settings.broker.startswith("rediss://"):
        app.conf.broker_use_ssl = {"ssl_cert_reqs": _certificate_check(settings)}
    app.set_default()
    return app


def send(app: Celery, task: str, **options: Any) -> bool:  # noqa: ANN401 - Celery's own
    """Send the message *task* and return whether the broker took it; never fails, and waits for seconds at most.

    See Note [The broker is a hint].
    """
    try:
        app.send_task(task, retry=False, **options)
    except Exception as error:  # noqa: BLE001 - for any error the work that sends it is done
        _log.info("broker.message_lost", task=task, kind=type(error).__name__)
        return False
    return True


def _certificate_check(settings: Settings) -> ssl.VerifyMode:
    return ssl.CERT_REQUIRED if settings.redis_tls_verify else ssl.CERT_NONE


def pause_after(shared: int, seconds: float) -> float:
    """Return the seconds of the next pause between two messages, after *shared* wake-ups in the last, of *seconds*."""
    share = shared / seconds / BUSY_RATE
    return min(max(WAKE_SECONDS_MIN, share * WAKE_SECONDS_BUSY), WAKE_SECONDS_BUSY)


class Waker:
    """Wakes the workers by a message, from a thread of its own, so that no request waits for the broker.

    At most one message waits, no matter how often it is asked for: the worker that takes it sees all work that was
    committed before.
    """

    def __init__(self, settings: Settings, *, app: Celery | None = None) -> None:
        self._app = celery(settings) if app is None else app
        self._redis = redis(settings)
        self._asked = threading.Event()
        self._shared = 0
        self._over = threading.Event()
        self._thread = background.start("waker", self._work)

    def wake(self) -> None:
        """Ask for a message to be sent, soon; never waits and never fails."""
        self._shared += 1
        if not self._asked.is_set():
            self._asked.set()

    def stop(self) -> None:
        """Send what is asked for and end the thread."""
        self._over.set()
        self._asked.set()
        self._thread.join(timeout=SOCKET_SECONDS_MAX * 2)

    def _work(self) -> None:
        is_away, pause = False, WAKE_SECONDS_MIN
        while not self._over.is_set():
            # While the broker is away it is asked again without being woken, so that its return is noticed.
            self._asked.wait(RETRY_SECONDS if is_away else None)
            was_away, is_away = is_away, not self._send()
            if is_away != was_away:
                _log.warning("broker.away") if is_away else _log.info("broker.back")
            # Requests in this pause share the next message, so that a busy minute does not load the broker.
            self._shared = 0
            self._over.wait(pause)
            pause = pause_after(self._shared, pause)
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
