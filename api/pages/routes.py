"""Puts the pages into the application."""

from fastapi import FastAPI

from api.pages import anomalies, customers, entry, expiring, orders, overview, payment_links
from api.pages.viewers import Attempts


def install(app: FastAPI) -> None:
    """Serve the pages of *app*."""
    app.state.attempts = Attempts()
    app.mount("/static", entry.STATIC)
    for each in (entry, overview, orders, payment_links, customers, anomalies, expiring):
        app.include_router(each.router)
