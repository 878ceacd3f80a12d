"""The heartbeat of a web process: its event loop notes each second that it turns."""

import asyncio
from typing import Final

from api import tasks
from schemas import database
from schemas.heartbeats import Heart, Mark

NOTE_SECONDS: Final = 1.0


class Pulse:
    """Writes the heartbeat of this web process from now on.

    It has a connection of its own, because all connections for reads may be in use.
    """

    def __init__(self, database_url: str) -> None:
        self._engine = database.engine(database_url, connections_max=1)
        self._mark = Mark("web")
        self._heart = Heart(self._engine, self._mark.beats)
        self._task = tasks.start("pulse", self._note)
        self._heart.start()

    async def stop(self) -> None:
        """End the task and the thread, and close the connection."""
        self._task.cancel()
        await asyncio.to_thread(self._heart.stop)
        self._engine.dispose()

    async def _note(self) -> None:
        while True:
            self._mark.note()
            await asyncio.sleep(NOTE_SECONDS)
