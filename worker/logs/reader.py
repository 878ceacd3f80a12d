"""Reads event logs: files of Stripe's events that others wrote, and our own.

A log is JSON, however it is laid out: events, arrays of them, Stripe's list pages and lines of our own (see
logs/writer.py), each on a line of its own (NDJSON), spread over many lines, or one after the other; plain, gzip or
Zstandard.

Note [What cannot be read can be put right and read again]
    An entry with a fault carries the text that could not be read, in pieces, since it may be long. Such texts can be
    written to a file, each below a remark that gives its place and its fault (``remark``). The reader skips these
    remarks, so once the texts are corrected, the file can be read like any other log.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

import msgspec
from msgspec import Struct

from schemas import events, own_events, signature
from schemas.errors import NotAnEvent, Refused
from schemas.inbox import Delivery
from schemas.listing import UNREADABLE
from schemas.progress import do_nothing
from schemas.settings import SigningSecret
from worker.logs import compression, json_values, layout
from worker.logs.lines import Lines
from worker.logs.writer import OWN_LINE, OwnLine

HAS_MORE: Final = "this page of a list says has_more: there are older events that it does not hold"
NO_NAMES: Final[Mapping[str, str]] = {}


class _Signers:
    """The secrets that may have made the signatures in a log; accounts are compared by their newest *names*."""

    def __init__(self, secrets: Sequence[SigningSecret], names: Mapping[str, str]) -> None:
        self._secrets = secrets
        self._names = names

    def of(self, own: str | None, account: str) -> list[SigningSecret]:
        """Return the secrets that may have signed an event recorded under *account*.

        *own* is the account that the event itself names, or None. A secret without a label may be of any account. If
        it gets a label later, the events that it signed before are recorded without an account.
        """
        return [each for each in self._secrets if self._newest(own or each.account or account) == self._newest(account)]

    def _newest(self, account: str) -> str:
        return self._names.get(account, account)


class _Line(OwnLine, kw_only=True):
    """A line of our own log, which has to name itself."""

    object: Literal["payfold.delivery"]


class _Kind(Struct):
    name: object = msgspec.field(name="object", default=None)


_OWN_LINE: Final = OWN_LINE.encode()
_decode_line: Final = msgspec.json.Decoder(_Line).decode


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of a log, or why it cannot be read; ``place`` is the file and the line, from 1.

    ``text`` is the text that cannot be read, in pieces. They can be read until the next entry is asked for.
    """

    place: str
    delivery: Delivery | None
    fault: str | None = None
    text: Iterable[bytes] = ()


# ---- Reading ----


def read(
    path: str,
    *,
    account: str,
    now: datetime,
    progress: Callable[[int], None] = do_nothing,
    warn: Callable[[str], None] = do_nothing,
    secrets: Sequence[SigningSecret] = (),
    names: Mapping[str, str] = NO_NAMES,
) -> Iterator[Entry]:
    """Yield the entries of the log at *path*, one by one; ``-`` is standard input.

    *account* stands for events that name none. *now* is when events are received, unless the log has that time. If the
    file breaks off or cannot be opened, the last entry reports this as its fault. *progress* is called with the number
    of bytes that each step read of the file, compressed as it is. *warn* is called with the place of each list page
    that has more. A signature in the log counts where the payload is the one that was signed, and one of *secrets*, of
    the line's account, verifies it. *names* maps each old name of an account to its newest.
    """
    by_whom = _Signers(secrets, names)
    name = "standard input" if path == compression.STANDARD_INPUT else path
    with ExitStack() as stack:
        try:
            lines = Lines(stack.enter_context(compression.opened(path, progress)))
        except OSError as error:
            yield Entry(name, None, f"it cannot be read: {compression.reason_of(error)}")
            return
        for item in layout.items(lines):
            place = f"{name}: line {item.number}"
            if item.fault is None:
                yield _entry(item.text, place, account, now, by_whom)
            else:
                yield Entry(place, None, item.fault, item.refused)
        for number in lines.pages_with_more:
            warn(f"{name}: line {number}: {HAS_MORE}")
        if lines.damage is not None:
            yield Entry(
                f"{name}: line {lines.number + 1}", None, f"the file breaks off: {compression.reason_of(lines.damage)}"
            )


def _entry(item: bytes, place: str, account: str, now: datetime, signers: _Signers) -> Entry:
    try:
        return Entry(place, _delivery(item, account, now, signers))
    except Refused as refusal:
        return Entry(place, None, json_values.fault_of_item(item, refusal), (item,))


def _delivery(item: bytes, account: str, now: datetime, signers: _Signers) -> Delivery:
    if _OWN_LINE in item and (line := _own_line(item)) is not None:
        return _own(line, signers)
    envelope = events.read(item)
    if "." not in envelope.type:
        _require_event(item)
    _require_single_keys(item)
    return Delivery(
        envelope=envelope,
        account=envelope.account or account,
        sha256=hashlib.sha256(item).digest(),
        signature=None,
        # Other programs' logs hold what Stripe sent, so it counts as replayed. An observation remains an observation.
        source="observation" if own_events.is_own(envelope.type) else "replay",
        received_at=now,
    )


def _kind(item: bytes) -> object:
    try:
        return msgspec.json.decode(item, type=_Kind).name
    except UNREADABLE:
        return None


def _require_event(item: bytes) -> None:
    """Raise NotAnEvent where an object that has a type of its own, as a credit note has, stands without its event."""
    kind = _kind(item)
    if isinstance(kind, str) and kind != "event":
        raise NotAnEvent(events.OBJECT_ALONE)


def _require_single_keys(item: bytes) -> None:
    """Raise NotAnEvent where an object has a key twice: it is then not known which of the values is meant."""
    try:
        # Each key is followed by one such pair, so counting them is cheap. Only a quotation mark that is written as
        # \u0022 can mislead the count.
        again = msgspec.json.encode(msgspec.json.decode(item))
        packed = msgspec.json.format(item, indent=-1) if _SPACED.search(item) else item
        if packed.count(b'":') != again.count(b'":'):
            json.loads(item, object_pairs_hook=_unique)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return  # the fold judges it


_SPACED: Final = re.compile(rb'"[ \t\r\n]+:')


def _unique(pairs: list[tuple[str, object]]) -> None:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise NotAnEvent(f"it has the key {key[:40]!r} twice")


def _own_line(item: bytes) -> OwnLine | None:
    """Return the line of our own log in *item*, None where it is something else.

    Raises:
        NotAnEvent: it names itself a line of our log, and is none.
    """
    try:
        return _decode_line(item)
    except UNREADABLE as error:
        if _kind(item) == OWN_LINE:
            raise NotAnEvent(f"it is no line of our log: {error}") from None
        return None


def _own(line: OwnLine, signers: _Signers) -> Delivery:
    try:
        sha256 = bytes.fromhex(line.payload_sha256)
    except ValueError as error:
        raise NotAnEvent(f"it is no line of our log: {error}") from None
    payload = line.payload.encode()
    if not line.redacted and hashlib.sha256(payload).digest() != sha256:
        raise NotAnEvent("its payload is not the one that was exported: the hash differs")
    envelope = events.read(payload)
    return Delivery(
        envelope=msgspec.structs.replace(envelope, redacted=tuple(dict.fromkeys((*line.redacted, *envelope.redacted)))),
        account=line.account,
        sha256=sha256,
        signature=line.signature,
        source="observation" if line.source == "observation" else "replay",
        received_at=line.received_at,
        verified=_is_verified(line, payload, signers.of(envelope.account, line.account)),
    )


def _is_verified(line: OwnLine, payload: bytes, secrets: Sequence[SigningSecret]) -> bool:
    """Return whether one of *secrets* signed *payload*, of which no credential is blanked."""
    return line.signature is not None and not line.redacted and signature.is_by_any(line.signature, payload, secrets)
