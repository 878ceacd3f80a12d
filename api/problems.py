"""Errors as RFC 9457 problem documents: the fault and the remedy, and nothing about our own process."""

import traceback
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route

from schemas import database
from schemas.errors import (
    CallDeclined,
    ConflictError,
    CountDiffers,
    CursorBeyond,
    KeyRefused,
    MissingAtStripe,
    NotAnObject,
    NotFoundError,
    NotServed,
    PayfoldError,
    Permanent,
    Refused,
    Transient,
)
from schemas.logs import Seldom

MEDIA_TYPE: Final = "application/problem+json"
_REFERENCES: Final = "#/components/schemas/{model}"
RETRY_AFTER_SECONDS: Final = 5
UNEXPECTED: Final = "Something went wrong here; it is logged."

_seldom: Final = Seldom()


class InvalidValue(BaseModel):
    """A value of the request that cannot be used."""

    place: str = Field(description="where it stands, as query.limit or body.id")
    fault: str


class Problem(BaseModel):
    """What is wrong and what to do, as RFC 9457 has it."""

    type: str = Field(description="about:blank, or urn:payfold:problem: and a word for programs")
    title: str
    status: int
    detail: str
    errors: list[InvalidValue] | None = Field(None, description="of a 422: each value that cannot be used")


def _schemas() -> dict[str, Any]:
    problem = Problem.model_json_schema(ref_template=_REFERENCES)
    return {**problem.pop("$defs"), Problem.__name__: problem}


SCHEMAS: Final = _schemas()
"""The schemas of a problem document, by their names on the OpenAPI page."""
_DECLARED: Final = {
    401: "No bearer token, or none that is known here.",
    403: "The token lacks the scope.",
    404: "There is no such thing here, or none at Stripe.",
    408: "The body did not arrive in time.",
    409: "Several accounts or modes know this id, or the state does not allow it.",
    410: "What was asked for is gone.",
    413: "The body is too large.",
    422: "The request has values that cannot be used.",
    502: "Stripe refuses our key, or its answer cannot be used.",
    503: "Not now: ask again after as many seconds as Retry-After has.",
}


def declaration(description: str) -> dict[str, Any]:
    """Return how the OpenAPI page describes an answer that is a problem document."""
    schema = {"$ref": _REFERENCES.format(model=Problem.__name__)}
    return {"description": description, "content": {MEDIA_TYPE: {"schema": schema}}}


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the problem documents that a route answers with, for its ``responses``."""
    return {status: declaration(_DECLARED[status]) for status in statuses}


class Unauthorized(HTTPException, Permanent):
    """The request has no token that is known here."""

    def __init__(self, detail: str) -> None:
        super().__init__(401, detail, headers={"WWW-Authenticate": "Bearer"})


def document(status: int, detail: str, *, reason: str | None = None, **more: Any) -> bytes:  # noqa: ANN401 - further members, as the standard allows
    """Return the problem document of *status*; *reason* names the problem for programs."""
    kind = f"urn:payfold:problem:{reason}" if reason else "about:blank"
    return msgspec.json.encode(
        {"type": kind, "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    )


def _response(status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> Response:  # noqa: ANN401 - as above
    return Response(document(status, detail, **more), status, headers=headers, media_type=MEDIA_TYPE)


def _place(error: Exception) -> str:
    """Return the line of ours where *error* came up: its message may quote data, its place does not."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and frame.filename != database.__file__
    ]
    return f"{Path(frames[-1].filename).stem}:{frames[-1].lineno}" if frames else "unknown"


def postponed(detail: str) -> Response:
    """Return the answer to a request that should be repeated in a while."""
    return _response(503, detail, {"Retry-After": str(RETRY_AFTER_SECONDS)})


_KNOWN: Final = {
    ConflictError: (409, "conflict"),
    NotServed: (409, "not_served"),
    CallDeclined: (422, "declined_by_stripe"),
    MissingAtStripe: (404, "missing_at_stripe"),
    NotAnObject: (502, "answer_unreadable"),
    # Our own credentials are wrong, and not those of the client.
    KeyRefused: (502, "key_refused"),
}
_COUNTED: Final[dict[type[PayfoldError], tuple[int, str, tuple[str, ...]]]] = {
    CursorBeyond: (410, "cursor_beyond", ("last",)),
    CountDiffers: (409, "count_differs", ("count", "until")),
}
"""By error: its status, its name for programs, and the numbers that its answer has as further members."""


def _not_allowed(routes: Sequence[BaseRoute], request: Request) -> Response | None:
    """Return the refusal of a request by a method that its address does not have, with those that it has; else None.

    An address of an act is also one of an object with an id that ends like an act, and is then no less an act's.
    """
    acts, objects = set[str](), set[str]()
    for route in routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            (objects if route.path.endswith("}") else acts).update(route.methods or ())
    methods = acts or objects
    if not methods or request.method in methods:
        return None
    allowed = ", ".join(sorted(methods))
    return _response(405, f"This address takes {allowed} only.", {"Allow": allowed})


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer every error of *app* with a problem document; *routes* are those of the OpenAPI page."""

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        # Starlette names the methods of the first route that has the address, and not of all.
        refused = _not_allowed(routes, request) if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED else None
        return refused or _response(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Response:
        faults = [{"place": ".".join(map(str, each["loc"])), "fault": each["msg"]} for each in error.errors()]
        return _response(422, "The request has values that cannot be used.", errors=faults)

    @app.exception_handler(NotFoundError)
    def missing(request: Request, error: NotFoundError) -> Response:
        return _not_allowed(routes, request) or _response(404, str(error))

    @app.exception_handler(CursorBeyond)
    @app.exception_handler(CountDiffers)
    def counted(_: Request, error: PayfoldError) -> Response:
        status, reason, members = _COUNTED[type(error)]
        return _response(status, str(error), reason=reason, **{name: getattr(error, name) for name in members})

    @app.exception_handler(ConflictError)
    @app.exception_handler(NotServed)
    @app.exception_handler(CallDeclined)
    @app.exception_handler(MissingAtStripe)
    @app.exception_handler(NotAnObject)
    @app.exception_handler(KeyRefused)
    def known(_: Request, error: PayfoldError) -> Response:
        status, reason = next(_KNOWN[each] for each in type(error).__mro__ if each in _KNOWN)
        return _response(status, str(error), reason=reason)

    @app.exception_handler(Refused)
    def refused(_: Request, error: Refused) -> Response:
        return _response(error.status, str(error), reason=error.reason)

    @app.exception_handler(Transient)
    def transient(_: Request, error: Transient) -> Response:
        return postponed(str(error))

    @app.exception_handler(Exception)
    def unexpected(_: Request, error: Exception) -> Response:
        _seldom.error("request.failed", kind=type(error).__name__, at=_place(error))
        return _response(500, UNEXPECTED)
