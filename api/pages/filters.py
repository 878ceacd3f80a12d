"""The filters of a list, read from the address of its page."""

from collections.abc import Mapping
from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from api.pages.worlds import World

Kind = TypeVar("Kind", bound=BaseModel)


def filters_of(kind: type[Kind], given: Mapping[str, str], world: World | None, cursor: str | None = None) -> Kind:
    """Return the filters *given* within *world*, or of a list without worlds; an empty field of a form is none.

    Raises:
        RequestValidationError: a value that the list does not know.
    """
    asked = {name: value for name, value in given.items() if value}
    try:
        return kind.model_validate({**asked, **({} if world is None else world.asked), "cursor": cursor})
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError([{**fault, "loc": ("query", *fault["loc"])} for fault in faults]) from None
