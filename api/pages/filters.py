"""The filters of a list, read from the address of its page."""

from collections.abc import Mapping
from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from api.pages.worlds import World
from api.reads import Filters

Kind = TypeVar("Kind", bound=Filters)


def filters_of(kind: type[Kind], given: Mapping[str, str], world: World, cursor: str | None = None) -> Kind:
    """Return the filters *given* within *world*; a field of a form that was left empty is none.

    Raises:
        RequestValidationError: a value that the list does not know.
    """
    asked = {name: value for name, value in given.items() if value}
    try:
        return kind.model_validate({**asked, **world.asked, "cursor": cursor})
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError([{**fault, "loc": ("query", *fault["loc"])} for fault in faults]) from None
