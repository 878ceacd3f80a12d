"""Anomalies: what about a row should not be, what it means, and the page of the row."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from fastapi import APIRouter, Request, Response

from api import reads
from api.pages.forms import Text, filters_of
from api.pages.rendering import PageRoute, page
from api.pages.viewers import Reader
from api.pages.worlds import Shown
from schemas import tables
from schemas.answers import Anomaly

IN_FORCE, OVER, ALL = "false", "true", "all"
"""Values of the parameter ``resolved``; the first is that of a page without it."""

_PLACES: Final = {
    "order": "orders",
    "customer": "customers",
    "balance": "customers",
    "payment_link": "payment-links",
    "event": "events",
}
"""By subject, the pages of such objects; any other is searched for."""

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/anomalies")
def list_anomalies(
    request: Request,
    viewer: Reader,
    worlds: Shown,
    kind: Text = "",
    subject: Text = "",
    resolved: Text = IN_FORCE,
    cursor: str | None = None,
) -> Response:
    """List the anomalies of a world, last seen first: those in force, unless others are asked for."""
    given = {"kind": kind, "subject": subject, "resolved": resolved or IN_FORCE}
    asked = {name: value for name, value in given.items() if value != ALL}
    filters = filters_of(reads.AnomalyFilters, asked, worlds.shown, cursor)
    found = reads.list_anomalies(request, filters, viewer.sees)
    return page(
        request, "anomalies.html.j2", viewer, worlds,
        found=found, lines=[_line(each) for each in found.data], given=given,
        kinds=tables.ANOMALY_KINDS, subjects=tables.ANOMALY_SUBJECTS,
        states={IN_FORCE: "in force", OVER: "over", ALL: "all"},
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """An anomaly as the page shows it. *place* is the folder of its subject's page; None is searched for."""

    anomaly: Anomaly
    meaning: str
    place: str | None
    name: str
    currency: str | None
    detail: dict[str, Any]


def _line(anomaly: Anomaly) -> Line:
    name, currency = anomaly.subject_id, None
    if anomaly.subject == "balance":
        name, currency = tables.key_of_name(anomaly.subject_id)
    meaning = tables.ANOMALY_MEANINGS.get(anomaly.kind, "A newer release of Payfold knows what this is.")
    detail = {name: _readable(value) for name, value in anomaly.detail.items()}
    return Line(anomaly, meaning, _PLACES.get(anomaly.subject), name, currency, detail)


def _readable(value: object) -> object:
    """Return *value*, and a time where it is a text that is one."""
    if not isinstance(value, str):
        return value
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        return value
    return value if at.tzinfo is None else at
