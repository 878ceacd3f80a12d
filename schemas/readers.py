"""What every JSON answer is made of: its base, and which readers may see a field.

It stands apart from the answers themselves, since a command that prints one of them starts sooner without the others.

Note [Personal data is left out]
    Each field that holds text is declared as one that every reader may see (``Id``, ``Word``, ``Public``) or as
    ``Personal``: what a buyer or a shop wrote, or what names the buyer. An answer to a token without the scope
    ``personal`` does not have the personal fields. Null would claim that there is nothing. ``Answer.of`` leaves them
    out, and routes show only the fields that were set. ``tests/test_scopes.py`` fails on a text that is not declared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Final, Self, TypeVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue

T = TypeVar("T")


@dataclass(frozen=True)
class Audience:
    """The readers who may see a field, as its annotation declares."""

    wants_personal: bool

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:  # noqa: ANN401
        """Name the scope on the OpenAPI page."""
        found = handler(schema)
        return {**found, "x-payfold-scope": "personal"} if self.wants_personal else found


@dataclass(frozen=True)
class OneOf:
    """A word of ours and not of Stripe's: the OpenAPI page lists the *values*.

    An answer is not checked against them, since a newer release may know more during a deployment.
    """

    values: tuple[str, ...]

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:  # noqa: ANN401
        """Add the values to the schema of a text."""
        return {**handler(schema), "enum": list(self.values)}


EVERY_READER: Final = Audience(wants_personal=False)
PERSONAL: Final = Audience(wants_personal=True)

Public = Annotated[T, EVERY_READER]
Personal = Annotated[T | None, PERSONAL]
"""Its default, None, is never shown: a field that was not set is left out."""
Id = Public[str]
"""Of an object, an event or an account."""
Word = Public[str]
"""A code of ours, or of Stripe's own vocabulary, which is open."""


@cache
def personal_fields(model: type[BaseModel]) -> frozenset[str]:
    """Return the names of the fields of *model* that are personal data."""
    return frozenset(name for name, field in model.model_fields.items() if PERSONAL in field.metadata)


class Answer(BaseModel):
    """The common part of all answers. An answer cannot be changed."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def of(cls, row: Mapping[str, Any], *, personal: bool) -> Self:
        """Return the answer that shows *row*; without *personal* the fields that are personal data are not set."""
        hidden = frozenset[str]() if personal else personal_fields(cls)
        return cls.model_validate({name: value for name, value in row.items() if name not in hidden})
