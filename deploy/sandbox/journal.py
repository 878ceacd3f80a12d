"""The base of every account of the sandbox: a clock, objects by kind and id, and the events about them.

The subjects (customers, payments, invoices …) are layers above it. Each layer knows only those below.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import msgspec

from deploy.sandbox import shapes
from deploy.sandbox.chance import Chance
from schemas.errors import PayfoldError

LATEST: Final = "2026-10-28.endive"
START: Final = 1_793_491_200  # 2026-11-01T00:00:00Z
DAY_SECONDS: Final = 86_400

NO_REQUEST: Final[dict[str, Any]] = {"id": None, "idempotency_key": None}
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode

Object = dict[str, Any]
"""One of Stripe's objects, decoded from its JSON."""


class SandboxError(PayfoldError):
    """Something that Stripe would refuse."""


class TransitionError(SandboxError):
    """The object's state does not allow this. Contradictory events are made with ``Account.emit``."""


class ParameterError(SandboxError):
    """A parameter has a value that Stripe does not accept."""


class UnknownObjectError(SandboxError):
    """This account has no such object."""


@dataclass(frozen=True, slots=True)
class Event:
    """A snapshot event as one webhook endpoint receives it."""

    id: str
    type: str
    created: int
    """Unix seconds at Stripe."""
    livemode: bool
    account: str | None
    """The connected account that it is about; null for the account's own events."""
    api_version: str
    object_id: str
    body: bytes
    """The JSON exactly as delivered, and therefore as signed."""
    untold: tuple[tuple[str, str | None], ...] = ()
    """Links that this version leaves out of the object and an older version shows, by their old key."""

    def payload(self) -> dict[str, Any]:
        """Return the event decoded, a fresh copy at every call."""
        payload: dict[str, Any] = _decode(self.body)
        return payload


def body_of(payload: dict[str, Any]) -> bytes:
    """Return *payload* in the layout of Stripe's webhooks: UTF-8 and indented by two spaces."""
    return msgspec.json.format(_encode(payload), indent=2)


def copy_of(value: Object) -> Object:
    """Return a copy of *value* that shares nothing with it."""
    copied: Object = _decode(_encode(value))
    return copied


def previous_attributes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the keys changed in *after* had in *before*.

    A nested object has only the keys that changed, an array is given whole, and a new key has null.
    """
    previous: dict[str, Any] = {}
    for key in before.keys() | after.keys():
        was, now = before.get(key), after.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            previous[key] = previous_attributes(was, now)
        else:
            previous[key] = was
    return dict(sorted(previous.items()))


def merged_metadata(before: Mapping[str, str] | None, changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return metadata after an update: merged, and without the keys that now have null or an empty value."""
    merged = dict(before or {}) | dict(changes)
    return {key: value for key, value in merged.items() if value}


class Journal:
    """An account's clock, its objects and its events."""

    events: list[Event]
    """All events in true order."""
    now: int
    """Unix seconds."""

    def __init__(
        self,
        *,
        seed: int,
        start: int = START,
        livemode: bool = False,
        account: str | None = None,
        api_version: str = LATEST,
    ) -> None:
        self.events = []
        self.now = start
        self.livemode = livemode
        self.account = account
        self.api_version = api_version
        self._chance = Chance(f"account {seed}", now=lambda: self.now, owner=account or "")
        self._objects: dict[str, dict[str, Object]] = {}
        # By object, the links that older versions show and this one does not.
        self._untold: dict[str, dict[str, str | None]] = {}
        self._calling = NO_REQUEST

    def advance(self, seconds: int) -> None:
        """Move the clock forward. Nothing happens by itself: a session past its time expires only by a call."""
        if seconds < 0:
            raise ParameterError("time does not run backwards")
        self.now += seconds

    def take_events(self) -> list[Event]:
        """Return the events since the last call and forget them: a long history then needs little memory."""
        taken, self.events = self.events, []
        return taken

    # Objects.

    def object(self, kind: str, object_id: str) -> Object:
        """Return any object as the API does now; *kind* is Stripe's name of it, as in ``"credit_note"``.

        A deleted customer is a tombstone: nothing but id, object and deleted.
        """
        return copy_of(self._find(kind, object_id))

    def object_ids(self, kind: str) -> list[str]:
        """Return the ids of all objects of a *kind*, in the order of their creation."""
        return list(self._objects.get(kind, {}))

    def peek(self, kind: str, object_id: str) -> Object:
        """Return any object as ``object`` does, but the account's own: look at it, and change nothing."""
        return self._find(kind, object_id)

    def newest(self, kind: str) -> Iterator[Object]:
        """Return all objects of a *kind*, newest first, to be looked at only."""
        return reversed(self._objects.get(kind, {}).values())

    def knows(self, kind: str, object_id: str) -> bool:
        """Return whether there is such an object."""
        return self._knows(kind, object_id)

    def _find(self, kind: str, object_id: str) -> Object:
        try:
            return self._objects[kind][object_id]
        except KeyError:
            raise UnknownObjectError(f"No such {kind}: {object_id!r}") from None

    def _knows(self, kind: str, object_id: str | None) -> bool:
        return object_id in self._objects.get(kind, {})

    def _store(self, snapshot: Object) -> None:
        self._objects.setdefault(snapshot["object"], {})[snapshot["id"]] = snapshot

    def _change(self, before: Object, **changes: Any) -> tuple[Object, dict[str, Any]]:  # noqa: ANN401 (JSON values)
        """Lay *changes* over an object, and return it with what the changed keys were."""
        after = before | changes
        previous = previous_attributes(before, after)
        self._store(after)
        return after, previous

    # Events.

    def emit(
        self,
        type: str,  # noqa: A002 (Stripe's name of it)
        object: dict[str, Any],  # noqa: A002 (Stripe's name of it)
        previous_attributes: dict[str, Any] | None = None,
        created: int | None = None,
    ) -> Event:
        """Emit any snapshot event, however contradictory. The account's own objects stay as they are."""
        return self._emit(type, object, previous_attributes, created=created)

    def _emit(
        self,
        event_type: str,
        snapshot: Object,
        previous: dict[str, Any] | None = None,
        *,
        created: int | None = None,
        request: dict[str, Any] | None = None,
    ) -> Event:
        data = {"object": snapshot}
        if previous is not None:
            data["previous_attributes"] = previous
        object_id = str(snapshot.get("id"))
        event_id = self._chance.event_id(object_id)
        created = self.now if created is None else created
        payload = shapes.envelope(
            account=self.account,
            api_version=self.api_version,
            created=created,
            data=data,
            event_id=event_id,
            event_type=event_type,
            livemode=self.livemode,
            request=request or self._calling,
        )
        event = Event(
            id=event_id,
            type=event_type,
            created=created,
            livemode=self.livemode,
            account=self.account,
            api_version=self.api_version,
            object_id=object_id,
            body=body_of(payload),
            untold=tuple(self._untold.get(object_id, {}).items()),
        )
        self.events.append(event)
        return event

    def _request(self) -> dict[str, Any]:
        """Return the ``request`` of an event that a call of the shop caused."""
        return {"id": self._chance.request_id(), "idempotency_key": self._chance.idempotency_key()}


P = ParamSpec("P")
R = TypeVar("R")
J = TypeVar("J", bound=Journal)


def api_call(method: Callable[Concatenate[J, P], R]) -> Callable[Concatenate[J, P], R]:
    """Give all events of *method* the same request: that of the shop's own call."""

    @wraps(method)
    def call(self: J, /, *args: P.args, **kwargs: P.kwargs) -> R:
        outer = self._calling
        if outer is NO_REQUEST:
            self._calling = self._request()
        try:
            return method(self, *args, **kwargs)
        finally:
            self._calling = outer

    return call
