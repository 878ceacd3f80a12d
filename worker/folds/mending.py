"""Reads JSON that a program in another language has rewritten, guided by the wanted types.

Note [What a copy may change]
    A log often went through another program before it came here. PHP does not distinguish the empty list from the empty
    object, so it writes ``{}`` as ``[]``. Others write 1500 as ``1500.0`` or ``"1500"``. A name that was cut in the
    middle of a character ends in half of a surrogate pair, which JSON can write and PostgreSQL's text cannot hold. That
    half becomes U+FFFD, as Unicode advises for text that cannot be decoded. If the wanted type is known, each of these
    has only one meaning. Any other value stays as it is, and its reader refuses it. Only payloads that a strict decoder
    refused come here.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import msgspec
from msgspec import inspect

_EXACT_FLOAT: Final = 2.0**53
"""Up to this number, each float without a fraction stands for exactly one whole number."""
_INTEGER_CHARACTERS_MAX: Final = 4_000
_INTEGER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
_HALF_A_PAIR: Final = re.compile("[\ud800-\udfff]")


def decode(text: bytes) -> Any:  # noqa: ANN401 - any JSON
    """Return the JSON in *text*, which may hold halves of surrogate pairs.

    A whole number with more digits than Python converts is cut to a smaller one, which is still too large for a column.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_int=_integer, parse_constant=_refuse)


def _integer(digits: str) -> int:
    return int(digits[:_INTEGER_CHARACTERS_MAX])


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def convert(value: Any, wanted: Any) -> Any:  # noqa: ANN401 - any JSON, and any type
    """Return *value*, decoded JSON, as the type *wanted*, with the changes of a copy undone.

    Raises:
        msgspec.ValidationError: with the place and the kind of the fault, never the value.
    """
    return msgspec.convert(_mended(value, _type_of(wanted)), wanted)


@cache
def _type_of(wanted: Any) -> inspect.Type:  # noqa: ANN401 - any type
    return inspect.type_info(wanted)


def _mended(value: Any, wanted: inspect.Type) -> Any:  # noqa: ANN401 - any JSON
    choices = wanted.types if isinstance(wanted, inspect.UnionType) else (wanted,)
    if value == [] and isinstance(value, list):
        value = [] if _one(choices, inspect.ListType) else {} if _one(choices, _OBJECTS) else value
    if isinstance(value, dict):
        return _object(value, _one(choices, _OBJECTS))
    if isinstance(value, list):
        found = _one(choices, inspect.ListType)
        return [_mended(each, found.item_type if found else _ANYTHING) for each in value]
    if isinstance(value, str):
        if _one(choices, inspect.IntType) and not _one(choices, inspect.StrType) and _INTEGER.fullmatch(value):
            return int(value)
        return _HALF_A_PAIR.sub("\ufffd", value)
    if isinstance(value, float) and _one(choices, (inspect.IntType, inspect.AnyType)):
        return int(value) if value.is_integer() and abs(value) <= _EXACT_FLOAT else value
    return value


_OBJECTS: Final = (inspect.StructType, inspect.DictType)
_ANYTHING: Final = inspect.AnyType()


def _one(choices: tuple[inspect.Type, ...], kind: Any) -> Any:  # noqa: ANN401 - the classes of msgspec.inspect
    return next((each for each in choices if isinstance(each, kind)), None)


def _object(value: Mapping[str, Any], wanted: inspect.Type | None) -> dict[str, Any]:
    if isinstance(wanted, inspect.StructType):
        types = {field.encode_name: field.type for field in wanted.fields}
        return {key: _mended(value[key], types[key]) for key in types if key in value}
    inner = wanted.value_type if isinstance(wanted, inspect.DictType) else _ANYTHING
    return {_HALF_A_PAIR.sub("\ufffd", key): _mended(each, inner) for key, each in value.items()}
