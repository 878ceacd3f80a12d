"""Reads an event's payload into a typed object with only the fields that a fold keeps.

Every field of a Stripe object may be absent, because of an older API version or a partial rendering. So each has the
default ``UNSET``. A value of another type, a number beyond 64 bits or a text that PostgreSQL cannot hold makes the
event unfoldable.
"""

from collections.abc import Mapping
from copy import copy
from datetime import datetime
from typing import Annotated, Any, Final, Generic, TypeAlias, TypeVar, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, defstruct, structs

from schemas.errors import Unfoldable
from schemas.events import CREATED_MAX, CREDENTIALS, TEXT_CHARACTERS_MAX
from worker.folds import mending
from worker.folds.facts import Event, Facts, Subject, Value, utc

Whole: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""An amount in the currency's smallest unit, in the range of a BIGINT."""
Seconds: TypeAlias = Annotated[int, Meta(ge=0, le=CREATED_MAX)]
"""A time in Unix seconds."""
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=TEXT_CHARACTERS_MAX)]
"""An id or a code from Stripe."""


class Expanded(Struct):
    """A whole object in a place that elsewhere has only the object's id."""

    id: Name


Reference: TypeAlias = Name | Expanded | None
Metadata: TypeAlias = dict[str, str]

ObjectType = TypeVar("ObjectType", bound=Struct)


class Reported(Struct, frozen=True):
    """The columns and the references that an object carries."""

    columns: dict[str, Value]
    references: dict[str, str | None] = {}


class Data(Struct, Generic[ObjectType]):
    """The object after the event, and the values of its changed keys before the event."""

    object: ObjectType
    previous_attributes: dict[str, Any] | None = None


class Snapshot(Struct, Generic[ObjectType]):
    """An event with its object. The envelope is checked again, so that an event with a malformed one is parked."""

    id: Name
    type: Name
    created: Seconds
    data: Data[ObjectType]
    livemode: bool = False
    account: Name | None = None
    api_version: str | None = None


class _Loose(Struct, Generic[ObjectType]):
    """The data of an event with an object of which only some keys are decoded, of any type each."""

    object: ObjectType


class _LooseSnapshot(Struct, Generic[ObjectType]):
    data: _Loose[ObjectType]


def _loose_type(wanted: type[Struct]) -> type[Struct]:
    """Return a type with the keys that *wanted* reads, and ``object``, each with any value."""
    names = {field.encode_name for field in structs.fields(wanted)} | {"object"}
    made = [(f"key_{number}", Any, UNSET) for number in range(len(names))]
    return defstruct(
        f"Loose{wanted.__name__}", made, rename=dict(zip((name for name, *_ in made), sorted(names), strict=True))
    )


class Reader(Generic[ObjectType]):
    """Reads the payloads of events with objects of one type."""

    def __init__(self, object_type: type[ObjectType]) -> None:
        self._type = object_type
        self._names = {field.encode_name: field.name for field in structs.fields(object_type)}
        self._snapshot = cast("type[Snapshot[ObjectType]]", Snapshot[object_type])  # type: ignore[valid-type]  # a type made at run time
        self._decode = msgspec.json.Decoder(self._snapshot).decode
        loose = _loose_type(object_type)
        self._keys = [(field.name, field.encode_name) for field in structs.fields(loose)]
        self._decode_loose = msgspec.json.Decoder(_LooseSnapshot[loose]).decode  # type: ignore[valid-type]  # a type made at run time

    def read(self, payload: bytes) -> tuple[ObjectType, ObjectType | None]:
        """Return the object after the event and the object before it, None where the event does not report that.

        Raises:
            Unfoldable: with the place and the kind of the fault, never the value.
        """
        try:
            data = self._data(payload)
            # Few payloads have a backslash, and one character is looked for twenty times as fast as several.
            if b"\\" in payload and b"\\u0000" in payload:
                _require_storable(msgspec.to_builtins(data.object))
            previous = data.previous_attributes
            return data.object, self._before(payload, data.object, previous) if previous else None
        except RecursionError:
            raise Unfoldable("The event is nested too deeply to be read.") from None
        except msgspec.DecodeError as error:
            raise Unfoldable(f"The event cannot be read: {error}") from None

    def _data(self, payload: bytes) -> Data[ObjectType]:
        try:
            return self._decode(payload).data
        except msgspec.DecodeError:
            copied = _untyped(payload)
            if copied is None:
                raise
            return cast("Snapshot[ObjectType]", mending.convert(copied, self._snapshot)).data

    def _before(self, payload: bytes, found: ObjectType, previous: dict[str, Any]) -> ObjectType | None:
        before = self._without_nested(found, previous)
        if before is not None:
            return before
        try:
            after = self._loose(payload)
            return msgspec.convert(overlay(after, previous), self._type) if _reports(after, previous) else None
        except msgspec.DecodeError:
            after = mending.decode(payload)["data"]["object"]
            if not _reports(after, previous):
                return None
            return cast("ObjectType", mending.convert(overlay(after, previous), self._type))

    def _without_nested(self, found: ObjectType, previous: dict[str, Any]) -> ObjectType | None:
        """Return *found* with its *previous* values; None where one of these belongs into a nested object, or is odd.

        Most events change plain values only, and then the payload need not be decoded again.
        """
        if previous.keys() <= _ALL_CREDENTIALS:
            return None
        changed = {key: value for key, value in previous.items() if key in self._names}
        if not _NESTED.isdisjoint(map(type, changed.values())):
            return None
        try:
            read = msgspec.convert({"id": found.id, **changed}, self._type)  # type: ignore[attr-defined]  # all have one
        except msgspec.ValidationError:
            return None
        before = copy(found)
        for key in changed:
            setattr(before, self._names[key], getattr(read, self._names[key]))
        return before

    def _loose(self, payload: bytes) -> dict[str, Any]:
        """Return the keys of the object that its type reads; the others are most of it, and are only skipped."""
        found = self._decode_loose(payload).data.object
        return {key: value for name, key in self._keys if (value := getattr(found, name)) is not UNSET}


_NESTED: Final = frozenset({dict, list})
_ALL_CREDENTIALS: Final = frozenset().union(*CREDENTIALS.values())


def _reports(after: Mapping[str, Any], previous: Mapping[str, Any]) -> bool:
    """Return whether *previous* has any key but credentials, which do not count: see schemas/contents.py."""
    kind = after.get("object")
    return bool(previous.keys() - set(CREDENTIALS.get(kind, ()) if isinstance(kind, str) else ()))


def _untyped(payload: bytes) -> Any:  # noqa: ANN401 - any JSON
    """Return the JSON in *payload*, decoded without types by ``mending.decode``; None if it is not JSON."""
    try:
        return mending.decode(payload)
    except ValueError:
        return None


def _require_storable(value: object) -> None:
    if isinstance(value, dict):
        for each in (*value, *value.values()):
            _require_storable(each)
    elif isinstance(value, list):
        for each in value:
            _require_storable(each)
    elif isinstance(value, str) and "\0" in value:
        raise Unfoldable("A field that is kept holds a NUL character, which PostgreSQL's text cannot.")


def overlay(after: Mapping[str, Any], previous: Mapping[str, Any]) -> dict[str, Any]:
    """Return *after* as it was before the event.

    *previous* holds only the changed keys of a nested object, and null for a metadata key that was absent.
    """
    before = dict(after)
    for key, value in previous.items():
        known = before.get(key)
        if value == [] and isinstance(known, Mapping):
            continue  # an empty object, as some languages write it: none of its keys changed
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            before[key] = overlay(known, value)
        else:
            before[key] = value
        if key == "metadata" and isinstance(before[key], dict):
            before[key] = {name: text for name, text in before[key].items() if text is not None}
    return before


def carried(**fields: Any) -> dict[str, Value]:  # noqa: ANN401 - values, and UNSET
    """Return those of *fields* that the object carries."""
    return {name: value for name, value in fields.items() if value is not UNSET}


def references(**fields: Reference | UnsetType) -> dict[str, str | None]:
    """Return the ids of those of *fields* that the object carries. A field holds an id or a whole object."""
    return {
        name: value.id if type(value) is Expanded else value  # type: ignore[misc]  # UNSET is left out
        for name, value in fields.items()
        if value is not UNSET
    }


def moment(value: int | UnsetType | None) -> Value | UnsetType:
    """Return the aware time of *value*, in Unix seconds."""
    return utc(value) if isinstance(value, int) else value


def make_facts(
    event: Event,
    table: str,
    key: str,
    *,
    after: Reported,
    before: Reported | None,
    root: str = "",
    currency: str = "",
    rank: int = 0,
    stamp: tuple[datetime, ...] | None = None,
    moments: Mapping[str, datetime] | None = None,
    is_first: bool = False,
) -> Facts:
    """Return the facts of *event* about the row *key* of *table*. The default *stamp* is the event's time."""
    return Facts(
        subject=Subject(table, event.account, event.livemode, key, root, currency),
        event_id=event.id,
        source=event.source,
        created=event.created,
        rank=rank,
        stamp=stamp or (event.created,),
        columns=after.columns,
        references=after.references,
        moments=moments or {},
        before=None if before is None else {**before.columns, **before.references},
        is_first=is_first or event.type.endswith(".created"),
    )
