"""Puts the pages into the application."""

from typing import Final

from fastapi import FastAPI

from api.pages import entry, events, orders, overview, retrying
from api.pages.viewers import Attempts

ROUTERS: Final = (entry.router, overview.router, orders.router, events.router, retrying.router)


def install(app: FastAPI) -> None:
    """Serve the pages of *app*."""
    app.state.attempts = Attempts()
    app.mount("/static", entry.STATIC)
    for router in ROUTERS:
        app.include_router(router)
