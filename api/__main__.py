"""The web process: ``python -m api``."""

import asyncio
import sys
from typing import Any, Final

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api import app, metrics, problems
from schemas.errors import ConfigurationError
from schemas.settings import Settings

STOP_SECONDS_MAX: Final = 25
"""A dyno is killed 30 seconds after it is asked to stop."""
HEAD_BYTES_MAX: Final = 128 * 1024
"""Of a request's line and headers together; the one that we read is measured again by who reads it."""
HEAD_SECONDS_MAX: Final = 10.0

_log = structlog.get_logger()


class BoundedHttp(HttpToolsProtocol):
    """HTTP/1.1 whose requests have to begin soon and cannot begin without end; uvicorn bounds neither."""

    head_seconds_max = HEAD_SECONDS_MAX
    _head_bytes = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the parent
        """Give the first request its time."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave no timer behind."""
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what came, and no more of a head that has grown too long."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._deadline is not None and self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(431, "head_too_large", f"The request's headers are longer than {HEAD_BYTES_MAX} bytes.")

    def on_message_begin(self) -> None:
        """Begin to measure a request."""
        super().on_message_begin()
        self._head_bytes = 0
        self._expect_head()

    def on_headers_complete(self) -> None:
        """Leave the request to who answers it."""
        self._head_is_here()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_is_here()
        self._deadline = self.loop.call_later(self.head_seconds_max, self._head_is_late)

    def _head_is_here(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _head_is_late(self) -> None:
        self._refuse(408, "head_too_slow", "The request's headers did not arrive in time.")

    def _refuse(self, status: int, reason: str, detail: str) -> None:
        self._head_is_here()
        if self.transport.is_closing():
            return
        metrics.REFUSED.labels(reason).inc()
        _log.warning("request.refused", reason=reason)
        body = problems.document(status, detail, reason=reason)
        head = (
            f"HTTP/1.1 {status} Refused\r\ncontent-type: {problems.MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def server_options(settings: Settings) -> dict[str, Any]:
    """Return how uvicorn is to serve the application."""
    return {
        "host": settings.payfold_host,
        "port": settings.port,
        "workers": settings.web_concurrency,
        # By name, since several web processes are started apart and import it each.
        "http": "api.__main__:BoundedHttp",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "proxy_headers": False,
        "timeout_graceful_shutdown": STOP_SECONDS_MAX,
    }


def main() -> None:
    """Serve until told to stop; a setting that cannot be used ends the process with 2."""
    try:
        settings = Settings.load()
        app.create(settings)
        _ = settings.postgresql, settings.broker
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    uvicorn.run("api.app:create", factory=True, **server_options(settings))


if __name__ == "__main__":
    main()
