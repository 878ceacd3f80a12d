"""Retry all events that match: the count to confirm, the act, and how far the worker has come."""

from datetime import UTC, datetime
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import AwareDatetime

from api import events, reads
from api.pages import forms
from api.pages.entry import Form
from api.pages.events import Filters, Given, asked
from api.pages.rendering import PageRoute, back, link_within, page
from api.pages.viewers import Reader, Viewer, require
from api.pages.worlds import Shown, Worlds
from schemas import event_acts
from schemas.errors import CountDiffers

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)

Operator = Annotated[Viewer, Depends(require("admin"))]
Number = Annotated[int, Query(ge=0, le=events.SEQ_MAX)]


@router.get("/retry")
def count_matching(request: Request, operator: Operator, worlds: Shown, given: Filters) -> Response:
    """Show how many events match, to be confirmed."""
    return _to_confirm(request, operator, worlds, given)


@router.post("/retry")
def retry_matching(request: Request, operator: Operator, worlds: Shown, given: Filters, form: Form) -> Response:
    """Queue the events that match, if that are as many as were confirmed."""
    confirmed = {name: form.get(name) for name in ("confirm", "until")}
    wanted = forms.read(events.RetriedEvents, {**asked(given, worlds.shown), **confirmed})
    since = datetime.now(UTC)
    try:
        done = events.retry_events(request, wanted)
    except CountDiffers:
        return _to_confirm(request, operator, worlds, given, confirmed=wanted.confirm, status=409)
    if done.queued is None:
        return _to_confirm(request, operator, worlds, given)
    numbers = {"until": done.until, "queued": done.queued, "since": since.isoformat()}
    return back(link_within(worlds)("retry", "progress", **given, **numbers))


def _to_confirm(
    request: Request, operator: Viewer, worlds: Worlds, given: Given, *, confirmed: int | None = None, status: int = 200
) -> Response:  # fmt: skip
    wanted = forms.read(events.RetriedEvents, asked(given, worlds.shown))
    found = events.retry_events(request, wanted)
    shown = {**given, "state": wanted.state}
    return page(
        request, "retry_all.html.j2", operator, worlds, status=status, found=found, given=shown, confirmed=confirmed
    )  # fmt: skip


@router.get("/retry/progress")
def show_progress(
    request: Request,
    viewer: Reader,
    worlds: Shown,
    given: Filters,
    until: Number = 0,
    queued: Number = 0,
    since: AwareDatetime | None = None,
) -> Response:
    """Show how many of the events that were queued still wait."""
    filters = forms.read(events.RetriedEvents, asked(given, worlds.shown)).filters()
    with reads.reading(request.app.state.engine) as connection:
        left = event_acts.progress(connection, filters, until=until, since=since or datetime.now(UTC))
    # Events that matched and were queued by another act since then are not part of this one.
    waiting = min(left.waiting, queued)
    parked = min(left.parked, queued - waiting)
    return page(
        request, "retry_progress.html.j2", viewer, worlds,
        given=given, waiting=waiting, parked=parked, queued=queued, done=queued - waiting - parked,
    )  # fmt: skip
