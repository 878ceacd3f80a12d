"""The parts of an address: an id, which may be any text, and the parameters that its route knows.

Note [An id may be any text]
    Stripe's ids are plain, but the inbox keeps every signed event, and an id may hold a slash, a question mark or a
    percent sign. A server decodes the path as a whole, after which ``/v1/orders/a%2Fexpire`` (the order ``a/expire``)
    and ``/v1/orders/a/expire`` (the act on the order ``a``) are the same. So the path of a request to ``/v1`` is
    written again from the bytes that were sent, each segment encoded on its own, and ``Id`` decodes the segment that a
    route took as an id. An id may also hold an unencoded slash, as long as the address then means no other route: a
    route's id is declared as ``{...:id}``, and routes with more segments come before. An event with the id
    ``parked`` is not shown, since that address lists the parked ones.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Final
from urllib.parse import quote, unquote

from fastapi import Depends, Path, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator
from starlette.convertors import Convertor, register_url_convertor

from api.bodies import Scope
from api.tokens import require
from schemas.events import TEXT_CHARACTERS_MAX
from schemas.settings import Token

PREFIX: Final = b"/v1/"
# PostgreSQL's texts hold any character but this one.
NO_NUL: Final = r"^[^\x00]*$"


class _AnyId(Convertor[str]):
    """Some text, with slashes or without."""

    regex = ".+"

    def convert(self, value: str) -> str:
        """Return *value* as it stands in the address."""
        return value

    def to_string(self, value: str) -> str:
        """Return *value* as it is to stand in an address."""
        return value


register_url_convertor("id", _AnyId())

Id = Annotated[str, BeforeValidator(unquote), Path(max_length=TEXT_CHARACTERS_MAX, pattern=NO_NUL)]


def encode_segments(scope: Scope) -> None:
    """Write the path of *scope* again, with each segment percent-encoded, where it is one of ``/v1``."""
    sent: bytes = scope.get("raw_path") or b""
    if sent.startswith(PREFIX):
        scope["path"] = "/".join(quote(unquote(segment), safe="") for segment in sent.decode("ascii").split("/"))


async def known_parameters(request: Request, _: Annotated[Token, Depends(require("read"))]) -> None:
    """Let a request pass if its route knows all its parameters.

    Raises:
        RequestValidationError: a parameter that is ignored would look like a filter that found everything.
    """
    known = sorted(set(_parameters(request.scope["route"].dependant)))
    fault = f"it is no parameter of this route, which knows {', '.join(known) or 'none'}"
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        raise RequestValidationError(
            [{"type": "extra_forbidden", "loc": ("query", name), "msg": fault, "input": None} for name in unknown]
        )


def _parameters(dependant: Any) -> Iterator[str]:  # noqa: ANN401 - FastAPI's own, which it does not export
    """Yield the names of the query parameters of a route: single ones, and those that a model holds together."""
    for field in dependant.query_params:
        kind = field.field_info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from kind.model_fields
        else:
            yield field.alias
    for each in dependant.dependencies:
        yield from _parameters(each)
