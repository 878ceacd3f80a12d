"""`payfold up` and `payfold demo` migrate the schema and choose a port before they start the processes."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sqlalchemy import Engine

from deploy.local.errors import PortLost
from deploy.local.processes import Processes
from deploy.local.running import migrate_here, on_first_free, wait_until_ready
from schemas.settings import Settings
from tests import ledger

EVENT = b'{"id": "evt_1", "object": "event", "type": "coupon.created", "created": 1790000000, "data": {"object": {}}}'


def test_a_split_account_hinders_no_start(engine: Engine, database_url: str) -> None:
    """A label that splits an account is only a warning: the rename that mends it needs the servers of `up`."""
    ledger.record(engine, [ledger.delivery(EVENT)])
    output = io.StringIO()

    migrate_here(Settings.load({"DATABASE_URL": database_url, "STRIPE_WEBHOOK_SECRETS": "acct_1=whsec_a"}), output)

    assert output.getvalue().startswith("Warning: Events were recorded without an account")
    assert output.getvalue().endswith("\n  payfold accounts rename '' acct_1 --yes\n")


# ---- The port ----

LOSER = """
import os, pathlib, socket, time
while not pathlib.Path("asked").exists():
    time.sleep(0.01)
socket.socket().bind(("127.0.0.1", int(os.environ["PORT"])))
"""


class _Stranger(BaseHTTPRequestHandler):
    """Another Payfold, or a similar program: it answers that it is ready, and does not know our tokens."""

    folder: Path

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(HTTPStatus.OK if self.path == "/health/ready" else HTTPStatus.UNAUTHORIZED)
        self.end_headers()
        if self.path != "/health/ready":
            (self.folder / "asked").touch()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[int]:
    """Return the port of another program's server."""
    _Stranger.folder = tmp_path
    with ThreadingHTTPServer(("127.0.0.1", 0), _Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_stranger_is_not_ready_for_us(tmp_path: Path, stranger: int) -> None:
    """The answer of another program on the port does not count; the end of our own process ends the start."""
    (tmp_path / "web.py").write_text(LOSER)
    (tmp_path / "Procfile").write_text("web: python web.py")
    output = io.StringIO()

    with (
        Processes({"PORT": str(stranger)}, procfile=tmp_path / "Procfile", output=output) as processes,
        pytest.raises(PortLost, match=f"Port {stranger} is taken by another program") as raised,
    ):
        wait_until_ready(f"http://127.0.0.1:{stranger}", processes, token="pf_ours")

    assert f"--port {stranger + 1}" in str(raised.value)
    assert "Address already in use" in output.getvalue()


@contextmanager
def _start(port: int) -> Iterator[int]:
    if port < 3:
        raise PortLost(port)
    yield port


def test_another_port_is_tried() -> None:
    """After the loss of a port the next one is tried; only the loss of the last one is an error."""
    with on_first_free([1, 3], _start) as started:
        assert started == 3
    with on_first_free([3, 1], _start) as started:
        assert started == 3
    with pytest.raises(PortLost, match="Port 2 is taken"), on_first_free([1, 2], _start):
        pass
    with pytest.raises(PortLost, match="Port 7 is taken"), on_first_free([3, 4], _start):
        raise PortLost(7)  # to another program, which is not started again
