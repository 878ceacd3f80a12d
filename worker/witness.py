"""What the columns mean, stated a second time: where Stripe's JSON holds each, apart from the folds.

Note [A witness of its own]
    A column that the folds read from the wrong place agrees with itself in every rebuild. So what a column means
    stands here again, as paths in Stripe's objects, written from Stripe's documentation. Nothing of the folds is
    imported here.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeAlias

from msgspec import Struct

Value: TypeAlias = str | int | bool | datetime | dict[str, Any] | list[Any] | None
"""The value of a column, as PostgreSQL gives it back."""


class Statement(Struct, frozen=True):
    """What one object of Stripe's says of one row: the *columns* that it carries, by name.

    *currency* is a part of the key of balances alone, elsewhere ''. A column that the object does not carry is absent.
    """

    table: str
    id: str
    columns: Mapping[str, Value]
    currency: str = ""


def statements(body: Mapping[str, Any]) -> list[Statement]:
    """Return what *body*, an object as Stripe gives it, of any API version, says of each row that it speaks of."""
    raise NotImplementedError(body.get("object"))
