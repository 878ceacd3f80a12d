"""The JSON that a request posts: read in bounded time and size once the token is accepted, then checked."""

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from api import bodies

Body = TypeVar("Body", bound=BaseModel)


def body(bytes_max: int) -> Callable[[Request], AsyncIterator[bytes]]:
    """Return a dependency that reads a body.

    FastAPI reads a declared body before any dependency, and so before the token is checked.
    """

    async def read(request: Request) -> AsyncIterator[bytes]:
        app = request.app.state
        async with bodies.taken(
            request.scope, request.receive, app.room, bytes_max=bytes_max, seconds_max=app.body_seconds_max
        ) as body:
            yield body

    return read


def object_in(body: bytes) -> dict[str, Any]:
    """Return the JSON object in *body*.

    Raises:
        RequestValidationError: there is none, or it holds a character that is not kept.
    """
    if b"\\u0000" in body:
        raise fault((), "it holds a NUL character, which is not kept")
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise fault((), "it is not JSON") from None
    if not isinstance(found, dict):
        raise fault((), "it is not a JSON object")
    return found


def read(model: type[Body], body: dict[str, Any]) -> Body:
    """Return *body* as *model* has it.

    Raises:
        RequestValidationError: it has values that cannot be used.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in faults]) from None


def fault(place: tuple[str, ...], text: str) -> RequestValidationError:
    """Return the error that the value at *place* of a body cannot be used, with the reason in *text*."""
    return RequestValidationError([{"type": "value_error", "loc": ("body", *place), "msg": text, "input": None}])
