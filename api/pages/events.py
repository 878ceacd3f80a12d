"""Events: listed by filters, each with all that is known of it, and the acts on one."""

from datetime import UTC, datetime
from typing import Annotated, Final, Literal

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from api import events, reads
from api.addresses import Id
from api.pages import causes, forms
from api.pages.entry import Form
from api.pages.forms import Text
from api.pages.rendering import PageRoute, back, link_within, page
from api.pages.viewers import Reader, Viewer, require
from api.pages.worlds import Shown, World, Worlds
from api.trace import trace_event
from schemas import lookup, tables
from schemas.errors import NotFoundError
from schemas.event_acts import OPEN_STATES, REASON_CHARACTERS_MAX

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)

ROWS: Final = 50
"""On a page of the list."""
Given = dict[str, str]
Done = Annotated[Literal["retry", "ignore"] | None, "the act that has led here"]
_MOMENTS: Final = ("received_from", "received_before")
_CAUSES: Final = {
    "parked": tables.PARKED_CAUSES,
    "pending": tables.PENDING_CAUSES,
    "ignored": tables.IGNORED_CAUSES,
}


def given_filters(
    state: Text = "",
    cause: Text = "",
    type: Text = "",  # noqa: A002 - the parameter's name in the address
    object_id: Text = "",
    source: Text = "",
    received_from: Text = "",
    received_before: Text = "",
) -> Given:
    """Return the filters in the address as a person wrote them."""
    given = {
        "state": state,
        "cause": cause,
        "type": type,
        "object_id": object_id,
        "source": source,
        "received_from": received_from,
        "received_before": received_before,
    }
    return {name: value.strip() for name, value in given.items()}


Filters = Annotated[Given, Depends(given_filters)]


def asked(given: Given, world: World) -> dict[str, object]:
    """Return the filters *given* within *world*, as the routes take them: a time without an offset is in UTC."""
    return {**given, **{name: _in_utc(given[name]) for name in _MOMENTS}, **world.asked}


def _in_utc(text: str) -> str:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text
    return text if at.tzinfo else at.replace(tzinfo=UTC).isoformat()


def in_fields(given: Given) -> Given:
    """Return the filters *given* as the fields of the form take them: times without their offset, in UTC."""
    return {**given, **{name: _in_field(given[name]) for name in _MOMENTS}}


def _in_field(text: str) -> str:
    try:
        return datetime.fromisoformat(_in_utc(text)).astimezone(UTC).replace(tzinfo=None, microsecond=0).isoformat()
    except (ValueError, OverflowError):
        return ""


def state_to_retry(given: Given) -> str | None:
    """Return the state of those events, of the ones that match *given*, that can be tried again; None for none."""
    state, cause = given["state"], given["cause"]
    by_cause = next((name for name in OPEN_STATES if cause in _CAUSES[name]), None)
    if not state:
        return by_cause if cause else "parked"
    return state if state in OPEN_STATES and (not cause or by_cause == state) else None


@router.get("/events")
def list_events(request: Request, viewer: Reader, worlds: Shown, given: Filters, cursor: str | None = None) -> Response:
    """List the events of a world, newest received first."""
    wanted = forms.read(events.ListedEvents, {**asked(given, worlds.shown), "limit": ROWS, "cursor": cursor})
    found = events.list_events(request, wanted, viewer.sees)
    return page(
        request, "events.html.j2", viewer, worlds,
        found=found, given=given, fields=in_fields(given), retries=state_to_retry(given),
        states=tables.STATES, causes=_CAUSES, sources=tables.SOURCES, request_host=request.url.netloc,
    )  # fmt: skip


@router.get("/events/{event_id:id}")
def show_event(request: Request, viewer: Reader, worlds: Shown, event_id: Id, done: Done = None) -> Response:
    """Show an event: its state, what it did, its payload, and the acts on it."""
    world = worlds.shown
    try:
        event = events.show_event(request, event_id, viewer.sees, world.account, world.livemode)
    except NotFoundError:
        return _missing(request, viewer, worlds, event_id)
    return page(
        request, "event.html.j2", viewer, worlds,
        event=event, trace=trace_event(request, event_id, world.account, world.livemode), done=done,
        advice=causes.ADVICE.get(event.cause or ""), is_open=event.state in OPEN_STATES,
        secrets=len(request.app.state.settings.signing_secrets), reason_characters_max=REASON_CHARACTERS_MAX,
    )  # fmt: skip


def _missing(request: Request, viewer: Viewer, worlds: Worlds, event_id: str) -> Response:
    """Return the page of an event that this world has not, with the worlds that have it."""
    with reads.reading(request.app.state.engine) as connection:
        rows = lookup.by_id(connection, tables.events, event_id, account=None, livemode=None)
    elsewhere = [World(row["account"], row["livemode"]) for row in rows]
    return page(
        request, "event_missing.html.j2", viewer, worlds, status=404, event_id=event_id, elsewhere=elsewhere
    )  # fmt: skip


@router.post("/events/{event_id:id}/retry", dependencies=[Depends(require("admin"))])
def retry_event(request: Request, worlds: Shown, event_id: Id) -> Response:
    """Let a worker fold a parked or pending event again, now."""
    world = worlds.shown
    events.retry_event(request, event_id, world.account, world.livemode)
    return back(link_within(worlds)("events", event_id, done="retry"))


@router.post("/events/{event_id:id}/ignore")
def ignore_event(
    request: Request,
    operator: Annotated[Viewer, Depends(require("admin"))],
    worlds: Shown,
    event_id: Id,
    form: Form,
) -> Response:
    """Ignore a parked or pending event from now on, for a reason."""
    world = worlds.shown
    body = msgspec.json.encode({"reason": form.get("reason", "").strip()})
    events.ignore_event(request, event_id, operator.token, body, world.account, world.livemode)
    return back(link_within(worlds)("events", event_id, done="ignore"))


@router.get("/parked")
def list_parked(request: Request, viewer: Reader, worlds: Shown) -> Response:
    """Show the parked events of a world by their causes."""
    world = worlds.shown
    found = events.list_parked(request, world.account, world.livemode)
    by_cause = {
        cause: [group for group in found.data if group.cause == cause]
        for cause in dict.fromkeys(group.cause for group in found.data)
    }
    return page(
        request, "parked.html.j2", viewer, worlds,
        by_cause=by_cause, is_cut=found.is_cut, advice=causes.ADVICE, unknown=causes.UNKNOWN,
    )  # fmt: skip
