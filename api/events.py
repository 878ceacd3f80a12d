"""The inbox: its events listed and shown, those that are parked in groups, and the acts of an operator on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, StringConstraints
from sqlalchemy import Connection

from api import posted, problems, reads
from api.addresses import NO_NUL, Id
from api.reads import ONE, ROWS_DEFAULT, ROWS_MAX, Account, FilterMoment, FilterText, Livemode, only
from api.tokens import SeesPersonalData, require
from schemas import answers, database, event_acts, event_filters, lookup, parked, tables
from schemas.answers import Page
from schemas.database import Bounds, transaction
from schemas.errors import CountDiffers
from schemas.event_acts import REASON_CHARACTERS_MAX
from schemas.event_filters import TYPE_HELP, EventFilters, Position
from schemas.settings import Token

REASON_BYTES_MAX: Final = 16 * 1024
SEQ_MAX: Final = 2**63 - 1
ACT: Final = Bounds(statement=15, lock=5, whole=20)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_ENVELOPE: Final = [column for column in tables.events.c if column.name not in ("payload", "signature")]

router: Final = APIRouter(prefix="/v1", route_class=reads.Route)

_READER: Final = [Depends(require("read"))]
Operator = Annotated[Token, Depends(require("admin"))]


def _is_type(value: str) -> str:
    if (fault := event_filters.type_fault(value)) is not None:
        raise ValueError(fault)
    return value


class WantedEvents(BaseModel):
    """The filters of events."""

    model_config = ConfigDict(extra="forbid")

    cause: Annotated[answers.Cause, only(tables.CAUSES)] | None = None
    type: Annotated[str, StringConstraints(pattern=NO_NUL), AfterValidator(_is_type)] | None = Field(
        None, description=TYPE_HELP
    )
    object_id: FilterText = None
    source: Annotated[answers.Source, only(tables.SOURCES)] | None = None
    received_from: FilterMoment = Field(None, description="a time with its offset, as 2026-11-01T00:00:00Z")
    received_before: FilterMoment = None
    account: FilterText = Field(None, description="only events of this account")
    livemode: bool | None = Field(None, description="only live events, or only test events")

    def filters(self) -> EventFilters:
        """Return the filters that were asked for."""
        return EventFilters(**self.model_dump(exclude={"limit", "cursor", "confirm", "until"}))


class ListedEvents(WantedEvents):
    """The events of a page."""

    state: Annotated[answers.State, only(tables.STATES)] | None = None
    limit: int = Field(ROWS_DEFAULT, ge=1, le=ROWS_MAX, description="rows on a page")
    cursor: str | None = Field(None, max_length=1024, description="`next_cursor` of the page before")


class RetriedEvents(WantedEvents):
    """The events to fold again, and the count to confirm."""

    state: Literal["parked", "pending"] = "parked"
    confirm: int | None = Field(None, ge=0, le=SEQ_MAX, description="the `count` that was answered")
    until: int | None = Field(None, ge=0, le=SEQ_MAX, description="the `until` that was answered with it")


@router.get("/events", tags=["events"], dependencies=_READER)
def list_events(
    request: Request, wanted: Annotated[ListedEvents, Query()], sees: SeesPersonalData
) -> Page[answers.Event]:
    """List the inbox, newest received first, without payloads; behind a page with few rows, or none, may be more."""
    after = None if wanted.cursor is None else _place(wanted.cursor)
    with reads.reading(request.app.state.engine) as connection:
        found = event_filters.page(connection, wanted.filters(), _ENVELOPE, after=after, limit=wanted.limit)
    following = None if found.following is None else _cursor(found.following)
    return Page[answers.Event](data=[answers.Event.of(row, personal=sees) for row in found.rows], next_cursor=following)


def _cursor(place: Position) -> str:
    return reads.cursor_of((place.received_at - _EPOCH) // _MICROSECOND, place.seq)


def _place(cursor: str) -> Position:
    at, seq = reads.read_cursor(cursor, int, 2)
    try:
        return Position(_EPOCH + at * _MICROSECOND, seq)
    except OverflowError:
        raise reads.no_cursor() from None


# Before the route of one event, which would take the word for an id.
@router.get("/events/parked", tags=["events"], dependencies=_READER)
def list_parked(request: Request, account: Account = None, livemode: Livemode = None) -> answers.ParkedGroups:
    """List the parked events in groups of one account, mode, cause and type, with the money that they concern."""
    with reads.reading(request.app.state.engine) as connection:
        found = parked.groups(connection, account=account, livemode=livemode)
    data = [answers.ParkedGroup.model_validate(asdict(group)) for group in found.groups]
    return answers.ParkedGroups(data=data, is_cut=found.is_cut)


@router.get("/events/{event_id:id}", tags=["events"], responses=ONE, dependencies=_READER)
def show_event(
    request: Request, event_id: Id, sees: SeesPersonalData, account: Account = None, livemode: Livemode = None
) -> answers.EventWithPayload:
    """Show one event, and to a token with the scope personal its payload."""
    with reads.reading(request.app.state.engine) as connection:
        row = reads.row_of(connection, tables.events, event_id, account, livemode)
        others = lookup.renderings_of(connection, row)
    payload = row["payload"]
    text = None if payload is None else payload.decode(errors="replace")
    shown = [answers.Rendering.of(other, personal=sees) for other in others]
    found = {**row, "payload": text, "archived": payload is None, "renderings": shown}
    return answers.EventWithPayload.of(found, personal=sees)


# ---- Acts ----


@contextmanager
def _acting(request: Request) -> Iterator[Connection]:
    """Open a transaction that is bounded in time, and wake the worker once it is committed."""
    with reads.in_time(), transaction(request.app.state.engine, ACT) as connection:
        yield connection
    request.app.state.waker.wake()


@router.post(
    "/events/retry", tags=["events"], dependencies=[Depends(require("admin"))], responses=problems.declared(409)
)
def retry_events(request: Request, wanted: Annotated[RetriedEvents, Query()]) -> answers.MatchingEvents:
    """Count the parked events that match; with `confirm` and `until` as they were answered, fold these again.

    If another number of events matches by then, nothing is done, and the answer is 409 with that number as `count`.
    """
    if (wanted.confirm is None) != (wanted.until is None):
        raise _incomplete("until" if wanted.until is None else "confirm")
    if wanted.confirm is None or wanted.until is None:
        with reads.in_time(), transaction(request.app.state.engine, ACT) as connection:
            found = event_acts.matching(connection, wanted.filters())
        event_acts.require_not_too_many(found)
        return answers.MatchingEvents(count=found.count, until=found.until, queued=None)
    with _acting(request) as connection:
        done = event_acts.retry_matching(connection, wanted.filters(), confirm=wanted.confirm, until=wanted.until)
    event_acts.require_not_too_many(done)
    if done.count != wanted.confirm:
        raise CountDiffers(done.count, done.until)
    return answers.MatchingEvents(count=done.count, until=done.until, queued=len(done.queued))


def _incomplete(name: str) -> RequestValidationError:
    fault = "`confirm` and `until` go together, as they were answered"
    return RequestValidationError([{"type": "missing", "loc": ("query", name), "msg": fault, "input": None}])


@router.post(
    "/events/{event_id:id}/retry",
    tags=["events"],
    status_code=202,
    responses=ONE,
    dependencies=[Depends(require("admin"))],
)
def retry_event(
    request: Request, event_id: Id, account: Account = None, livemode: Livemode = None
) -> answers.EventState:
    """Let a worker fold a parked or pending event again, now."""
    with _acting(request) as connection, database.cursor(connection) as cursor:
        found = event_acts.find(connection, event_id, account=account, livemode=livemode)
        queued = event_acts.retry(cursor, found)
    return answers.EventState.model_validate(queued, from_attributes=True)


class IgnoreRequest(BaseModel):
    """Why an event is ignored."""

    model_config = ConfigDict(extra="forbid")

    reason: Annotated[StrictStr, Field(min_length=1, max_length=REASON_CHARACTERS_MAX)] = Field(
        description="why, for those who look later"
    )


@router.post(
    "/events/{event_id:id}/ignore",
    tags=["events"],
    status_code=202,
    responses=ONE | problems.declared(408, 413),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": IgnoreRequest.model_json_schema()}},
        }
    },
)
def ignore_event(
    request: Request,
    event_id: Id,
    operator: Operator,
    body: Annotated[bytes, Depends(posted.body(REASON_BYTES_MAX))],
    account: Account = None,
    livemode: Livemode = None,
) -> answers.IgnoredEvent:
    """Ignore a parked or pending event from now on, by an observation with the reason and the name of the token."""
    wanted = posted.read(IgnoreRequest, posted.object_in(body))
    now = datetime.now(UTC)
    with _acting(request) as connection, database.cursor(connection) as cursor:
        found = event_acts.find(connection, event_id, account=account, livemode=livemode)
        word = event_acts.ignore(cursor, found, reason=wanted.reason, by=operator.name, now=now)
    shown = {**asdict(found), "observation_id": word}
    return answers.IgnoredEvent.model_validate(shown)
