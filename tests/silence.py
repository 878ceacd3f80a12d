"""A way to PostgreSQL that can fall silent: bytes stop, nothing closes, and TCP goes on acknowledging."""

import selectors
import socket
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

_BYTES: int = 65_536


class Way:
    """Passes bytes between a port of this machine's and a server, until it is silenced."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@{host}").geturl()
        self._is_silent = False
        self._ends = threading.Event()
        self._silenced: set[socket.socket] = set()
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def silence(self) -> None:
        """Pass no byte from now on, of the connections that there are and of new ones; what is sent is taken in."""
        self._is_silent = True
        self._silenced |= self._open

    def speak(self) -> None:
        """Pass bytes again, of new connections; those that were silenced stay so."""
        self._is_silent = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._ends.is_set():
            with suppress(TimeoutError):
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._open.add(client)
                if self._is_silent:
                    self._silenced.add(client)
                threading.Thread(target=self._pass, args=(client, server), daemon=True).start()

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, selectors.DefaultSelector() as ready, suppress(OSError):
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while not self._ends.is_set():
                for key, _ in ready.select(0.1):
                    source: socket.socket = key.fileobj  # type: ignore[assignment]  # a socket was registered
                    data = source.recv(_BYTES)
                    if not data:
                        return
                    if client not in self._silenced:
                        key.data.sendall(data)
