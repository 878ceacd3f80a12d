"""The limit of acknowledging: an ASGI application that reads a delivery, does nothing, and answers as Payfold does.

``python -m deploy.bench.bare PORT`` serves it with the very options that the web process has.
"""

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import uvicorn

from api.__main__ import server_options
from schemas.settings import Settings

Message = MutableMapping[str, Any]

_RECEIVED: Final = b'{"received":true}'
_HEADERS: Final = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_RECEIVED))]


async def app(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    """Answer one request, or the server's questions about the application's life."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    parts, is_more = [], True
    while is_more:
        message = await receive()
        parts.append(message.get("body", b""))
        is_more = message.get("more_body", False)
    status = 200 if scope["method"] == "POST" and b"".join(parts) else 405
    await send({"type": "http.response.start", "status": status, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _RECEIVED})


def main(port: int) -> None:
    """Serve until a signal stops the process."""
    uvicorn.run(app, **{**server_options(Settings.load()), "port": port})


if __name__ == "__main__":
    main(int(sys.argv[1]))
