"""The web process: ``python -m api``."""

import asyncio
import logging
import sys
from functools import lru_cache, partial
from typing import Any, Final

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from api import app, bodies, problems, webhook
from api.counts import CONNECTION
from api.webhook import Answer, Webhook
from schemas import logs
from schemas.errors import ConfigurationError, Refused
from schemas.logs import Seldom
from schemas.settings import Settings

STOP_SECONDS_MAX: Final = 25
"""A dyno is killed 30 seconds after it is asked to stop."""
HEAD_BYTES_MAX: Final = 128 * 1024
"""Bytes of a request's line and headers together."""
HEADERS_MAX: Final = 256
URL_BYTES_MAX: Final = 16 * 1024
HEAD_SECONDS_MAX: Final = 10.0
IDLE_SECONDS_MAX: Final = 5
"""Between two requests on one connection."""
SEND_SECONDS_MAX: Final = 30.0
"""How long a client may take to read the bytes that were sent, before there is room for more."""
START_SECONDS_MAX: Final = 30
"""One of several web processes that does not answer its parent for this long is killed: slow machines import slowly."""
PIPELINED_MAX: Final = 16
"""Requests on one connection that wait for the answers before theirs."""
CONNECTIONS_MAX: Final = 1000
"""Connections of one process, so that its heads and buffers are bounded together as well."""

_DELIVERIES: Final = frozenset(path.encode() for path in webhook.PATHS)
_seldom: Final = Seldom()


class _Seldom(logging.Filter):
    """Lets one line a second of each kind through, of those that uvicorn logs about the requests of strangers."""

    def filter(self, record: logging.LogRecord) -> bool:
        return _lines_of_uvicorn.left_out(f"{record.lineno} {record.exc_info and record.exc_info[0]}") is not None


_lines_of_uvicorn: Final = Seldom()


logging.getLogger("uvicorn.error").addFilter(_Seldom())


class _HeadRefused(Exception):
    """Raised to stop the parser: the request is answered already."""


class _Whole:
    """Stands for uvicorn's cycle of a delivery that came whole: see Note [A delivery that came whole needs no task]."""

    __slots__ = ("disconnected", "keep_alive", "response_complete")
    more_body = False
    message_event: Final = asyncio.Event()
    """Nothing waits for it."""

    def __init__(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.disconnected = self.response_complete = False


@lru_cache(maxsize=64)
def _written(answer: Answer, *, keep_alive: bool) -> bytes:
    headers = answer.headers if keep_alive else (*answer.headers, bodies.CLOSE)
    lines = [b"%b: %b\r\n" % header for header in headers]
    return b"".join([STATUS_LINE[answer.status], *lines, b"\r\n", answer.body])


class BoundedHttp(HttpToolsProtocol):
    """HTTP/1.1 on connections that are bounded in bytes and seconds in every state; uvicorn bounds few of them.

    A head has a time and a size, a connection between two requests has a time, and so has an answer that the client
    does not read. The application bounds the body and the answer. If a body was not read to its end, the connection
    ends with the answer.
    """

    head_seconds_max = HEAD_SECONDS_MAX
    send_seconds_max = SEND_SECONDS_MAX
    connections_max = CONNECTIONS_MAX
    _head_bytes = 0
    _bytes_left = HEAD_BYTES_MAX
    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _webhook: Webhook | None = None
    _parts: list[bytes] | None = None
    """The body of a delivery, of which this read may have the whole."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the parent
        """Give the first request its time."""
        super().connection_made(transport)
        self._webhook = self.app_state.get("webhook")
        if len(self.connections) > self.connections_max:
            self._refuse(503, "too_many_connections", "Too many connections are open: try again.")
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers of the connection."""
        self._head_is_here()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse *data*, but no more of a head that has grown too long."""
        if self.timeout_keep_alive_task is not None:
            # A byte between two requests ends the idle time, and begins that of a head.
            self._unset_keepalive_if_required()
            self._expect_head()
        self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # no other protocol is spoken here, and the request is answered as any other
        except httptools.HttpParserError:
            self._refuse(400, "not_http", "This is not an HTTP/1.1 request.")
        else:
            self._hand_over()
            # Counted here as well, since the parser shows no header before its end.
            if self._deadline is not None and self._head_bytes > HEAD_BYTES_MAX:
                self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin to measure a request."""
        super().on_message_begin()
        self._head_bytes = 0
        self._bytes_left = HEAD_BYTES_MAX
        if self._deadline is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        """Take a part of the address."""
        super().on_url(url)
        self._bytes_left -= len(url)
        if len(self.url) > URL_BYTES_MAX:
            self._refuse(414, "url_too_long", f"The address is longer than {URL_BYTES_MAX} bytes.")
            raise _HeadRefused

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer after the last chunk of a body."""
        self._bytes_left -= len(name) + len(value)
        if self._bytes_left < 0 or len(self.headers) == HEADERS_MAX:
            self._refuse_head()
            raise _HeadRefused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        self._head_is_here()
        if len(self.pipeline) >= PIPELINED_MAX:
            self._refuse(429, "too_many_pipelined", "Too many requests were sent before their answers.")
            raise _HeadRefused
        if self._is_delivery():
            self._parts = []
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        if self._parts is None:
            super().on_body(body)
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        """Take a delivery that came whole, or go on with another request."""
        if self._parts is not None and self._take_whole(b"".join(self._parts)):
            self._parts = None
            return
        self._hand_over()
        super().on_message_complete()

    def _is_delivery(self) -> bool:
        """Return whether the request may be taken without a task, if it comes whole."""
        return (
            self._webhook is not None
            and self.url in _DELIVERIES
            and self.parser.get_method() == b"POST"
            and (self.cycle is None or self.cycle.response_complete)
            and not (self.expect_100_continue or self.flow.write_paused or self.parser.should_upgrade())
        )

    def _take_whole(self, body: bytes) -> bool:
        """Return whether the delivery in *body* is taken."""
        assert self._webhook is not None, "it is a delivery"  # noqa: S101 - for the types alone
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        cycle = _Whole(keep_alive=keep_alive)
        try:
            self._webhook.take(dict(self.headers).get(b"stripe-signature"), body, partial(self._answer, cycle))
        except Refused:
            return False
        self.cycle = cycle  # type: ignore[assignment]  # it has all that is asked of one
        return True

    def _answer(self, cycle: _Whole, answer: Answer) -> None:
        cycle.response_complete = True
        if not self.transport.is_closing():
            self.transport.write(_written(answer, keep_alive=cycle.keep_alive))
            if not cycle.keep_alive:
                self.transport.close()
            self.on_response_complete()

    def _hand_over(self) -> None:
        """Let the application read what may have been a whole delivery, and is not."""
        if self._parts is not None:
            parts, self._parts = self._parts, None
            super().on_headers_complete()
            for part in parts:
                super().on_body(part)

    def on_response_complete(self) -> None:
        """Go on with the connection, if its request was read to the end."""
        if self.cycle.response_complete and self.cycle.more_body:
            self.transport.close()
        super().on_response_complete()
        if self.transport.is_closing():
            self._bound_what_is_unread()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that is idle."""
        super().timeout_keep_alive_handler()
        self._bound_what_is_unread()

    def shutdown(self) -> None:
        """Close the connection, after its answer if there is one to come."""
        super().shutdown()
        if self.transport.is_closing():
            self._bound_what_is_unread()

    def pause_writing(self) -> None:
        """Give a client that does not read its time."""
        super().pause_writing()
        self._bound_what_is_unread()

    def resume_writing(self) -> None:
        """Stop the time of a client that reads again; the next pause begins a new one."""
        super().resume_writing()
        if self._unread is not None and not self.transport.is_closing():
            self._unread.cancel()
            self._unread = None

    def _bound_what_is_unread(self) -> None:
        if self._unread is None and self.transport.get_write_buffer_size() > 0:
            self._unread = self.loop.call_later(self.send_seconds_max, self.transport.abort)

    def _expect_head(self) -> None:
        self._head_is_here()
        self._deadline = self.loop.call_later(self.head_seconds_max, self._head_is_late)

    def _head_is_here(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _head_is_late(self) -> None:
        self._refuse(408, "head_too_slow", "The request's headers did not arrive in time.")

    def _refuse_head(self) -> None:
        detail = f"The request's headers are longer than {HEAD_BYTES_MAX} bytes, or more than {HEADERS_MAX}."
        self._refuse(431, "head_too_large", detail)

    def _refuse(self, status: int, reason: str, detail: str) -> None:
        self._head_is_here()
        self._hand_over()
        if self.transport.is_closing():
            return
        self.app_state["counts"].add(CONNECTION, reason)
        _seldom.warning("request.refused", reason=reason)
        # In the middle of another answer this one would be taken for a part of it.
        if self.cycle is None or self.cycle.response_complete:
            body = problems.document(status, detail, reason=reason)
            head = (
                f"HTTP/1.1 {status} Refused\r\ncontent-type: {problems.MEDIA_TYPE}\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n"
                "cache-control: no-store\r\nx-content-type-options: nosniff\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
        self._bound_what_is_unread()


def server_options(settings: Settings) -> dict[str, Any]:
    """Return how uvicorn is to serve the application."""
    return {
        "host": settings.payfold_host,
        "port": settings.port,
        "workers": settings.web_concurrency,
        # By name, since several web processes are started apart and import it each.
        "http": "api.__main__:BoundedHttp",
        "ws": "none",
        "timeout_keep_alive": IDLE_SECONDS_MAX,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "proxy_headers": False,
        "timeout_graceful_shutdown": STOP_SECONDS_MAX,
        "timeout_worker_healthcheck": START_SECONDS_MAX,
    }


def main() -> None:
    """Serve until a signal stops the process; a setting that cannot be used ends it with 2."""
    try:
        settings = Settings.load()
        app.create(settings)
        logs.report_unknown()
        _ = settings.postgresql, settings.broker
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    uvicorn.run("api.app:create", factory=True, **server_options(settings))


if __name__ == "__main__":
    main()
