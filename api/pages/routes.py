"""Puts the pages into the application."""

from typing import Final

from fastapi import FastAPI

from api.pages import (
    anomalies,
    customers,
    entry,
    events,
    expiring,
    orders,
    overview,
    payment_links,
    reconciliations,
    retrying,
)
from api.pages.viewers import Attempts

ROUTERS: Final = (
    entry.router,
    overview.router,
    orders.router,
    events.router,
    retrying.router,
    payment_links.router,
    customers.router,
    anomalies.router,
    reconciliations.router,
    reconciliations.reports,
    expiring.router,
)


def install(app: FastAPI) -> None:
    """Serve the pages of *app*."""
    app.state.attempts = Attempts()
    app.mount("/static", entry.STATIC)
    for router in ROUTERS:
        app.include_router(router)
