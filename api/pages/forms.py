"""The fields of forms that are kept in the address: one left empty is no filter."""

from collections.abc import Mapping
from typing import Annotated, TypeVar

from fastapi import Query
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from api.addresses import NO_NUL
from api.pages.worlds import World

Text = Annotated[str, Query(max_length=255, pattern=NO_NUL)]
"""A field of a form that was left empty is an empty text."""
Model = TypeVar("Model", bound=BaseModel)


def read(model: type[Model], given: Mapping[str, object]) -> Model:
    """Return the fields *given* as *model* has them, without those that were left empty.

    Raises:
        RequestValidationError: they have values that cannot be used.
    """
    # The account without a name is asked for by an empty text.
    filled = {name: value for name, value in given.items() if value not in ("", None) or name == "account"}
    try:
        return model.model_validate(filled)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError([{**each, "loc": ("query", *each["loc"])} for each in faults]) from None


def filters_of(
    model: type[Model], given: Mapping[str, object], world: World | None, cursor: str | None = None
) -> Model:
    """Return the filters *given* of a list, within *world* where the list has worlds, from *cursor* on.

    Raises:
        RequestValidationError: a value that the list does not know.
    """
    return read(model, {**given, **({} if world is None else world.asked), "cursor": cursor})
