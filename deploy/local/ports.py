"""Ports of loopback: a free one, whether one is taken, and one that is kept for the web process."""

import contextlib
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from deploy.local.errors import PortLost, StartError

LOOPBACK: Final = "127.0.0.1"
# Below the range from which the kernel gives clients their ports: a server that restarts finds its port free, and a
# client that reconnects while the server is down cannot be connected to itself.
PORTS: Final = range(20_000, 32_000)
PORT_SECONDS_MAX: Final = 1.0
"""A listener on a port has this long to take a connection, before the port is tried by binding it."""


def free_port() -> int:
    """Return a port of loopback without a listener, below those that the kernel gives to clients."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            # As the servers do, so that a stopped server's connections in TIME_WAIT are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((LOOPBACK, port))
                return port


def is_taken(port: int) -> bool:
    """Return whether another program listens on a port of loopback."""
    with socket.socket() as client:
        client.settimeout(PORT_SECONDS_MAX)
        if client.connect_ex((LOOPBACK, port)) == 0:
            return True
    with socket.socket() as probe:
        # As the web process does: connections that have just ended are no listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen()
        except OSError:
            return True
    return False


@contextmanager
def claimed_port(port: int) -> Iterator[None]:
    """Keep other Payfolds on this machine from taking *port* for their web processes, until the block ends.

    Raises:
        StartError: it may not be opened, or, as a PortLost, it is taken.
    """
    # The web process binds the port seconds from now. Until the end, this socket holds the datagram port of the same
    # number, so that another Payfold that is just starting finds it taken.
    with socket.socket(type=socket.SOCK_DGRAM) as claim:
        try:
            claim.bind((LOOPBACK, port))
        except PermissionError:
            raise StartError(f"Port {port} may not be opened by this user. Example: --port 8000") from None
        except OSError:
            raise PortLost(port) from None
        if is_taken(port):
            raise PortLost(port)
        yield
