"""The errors of this room; ``schemas.errors`` draws them with all others."""

from typing import Final

from schemas.errors import PayfoldError

PORT_MAX: Final = 65_535


class ServicesError(PayfoldError):
    """The embedded services cannot run; the message names the remedy."""


class ServerMissing(ServicesError):
    """No binary of a server on this machine."""


class ServerFailed(ServicesError):
    """A server did not start; the message ends with its last log lines."""


class PortTaken(ServerFailed):
    """Another program took the port first."""


class UserRefused(ServicesError):
    """PostgreSQL refuses to run as this user, and cannot be run as another user here."""


class FolderInUse(ServicesError):
    """Another process owns the data folder."""


class FolderNotOurs(ServicesError):
    """The data folder belongs to another user."""


class StartError(PayfoldError):
    """Payfold did not start."""


class PortLost(StartError):
    """Another program on this machine listens on the port of the web process."""

    def __init__(self, port: int) -> None:
        super().__init__(
            f"Port {port} is taken by another program on this machine. Stop that one, or choose another port."
            f" Example: --port {port + 1 if port < PORT_MAX else port - 1}"
        )
