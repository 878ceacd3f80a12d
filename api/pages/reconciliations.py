"""Reconciliations: their history, the report of each, and asking for one."""

from typing import Annotated, Final, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from api import reconciliations
from api.pages.entry import Form
from api.pages.forms import Text, filters_of
from api.pages.rendering import PageRoute, PersonRoute, back, link_within, page
from api.pages.viewers import Reader, Viewer, require
from api.pages.worlds import Shown
from api.reconciliations import ReconciliationFilters
from schemas import tables

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)
reports: Final = APIRouter(route_class=PersonRoute, include_in_schema=False)
"""Reports are whole documents, which are also kept as files, with a look and a policy of their own."""


@router.get("/reconciliations")
def list_reconciliations(
    request: Request,
    viewer: Reader,
    worlds: Shown,
    outcome: Text = "",
    cursor: str | None = None,
    done: Annotated[Literal["asked"] | None, Query(description="what an act has just done")] = None,
) -> Response:
    """List reconciliations, newest first. Each is of all accounts and modes together."""
    given = {"outcome": outcome}
    found = reconciliations.list_reconciliations(request, filters_of(ReconciliationFilters, given, None, cursor))
    return page(
        request, "reconciliations.html.j2", viewer, worlds,
        found=found, given=given, done=done, outcomes=tables.RECONCILED,
        has_key=bool(request.app.state.settings.api_keys),
    )  # fmt: skip


@router.post("/reconciliations")
def start_reconciliation(
    request: Request, viewer: Annotated[Viewer, Depends(require("admin"))], worlds: Shown, form: Form
) -> Response:
    """Ask for a reconciliation."""
    asks_stripe = form.get("stripe") == "true"
    reconciliations.ask_for_reconciliation(request, Response(), viewer.token, asks_stripe)
    return back(link_within(worlds)("reconciliations", done="asked"))


@reports.get("/reconciliations/{number}/report", dependencies=[Depends(require("read"))])
def show_report(request: Request, number: reconciliations.Number) -> Response:
    """Show the report of a reconciliation."""
    return reconciliations.show_report(request, number)
