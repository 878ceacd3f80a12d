"""The parked events in groups of one cause and one type, with the money that they concern."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct
from sqlalchemy import CTE, Connection, RowMapping, Select, func, select, true

from schemas import tables

GROUPS_MAX: Final = 100
EVENTS_MAX: Final = 100_000
"""Parked events that are looked at, the last recorded ones."""
PAYLOADS_MAX: Final = 1_000
PAYLOADS_OF_GROUP_MAX: Final = 100
PAYLOAD_BYTES_MAX: Final = 32 * 1024
"""Longer payloads are not read."""
PAYLOADS_AT_ONCE: Final = 50
"""In memory."""


class GroupKey(NamedTuple):
    """What the events of a group have in common."""

    account: str
    livemode: bool
    cause: str | None
    type: str


@dataclass(frozen=True, slots=True)
class Money:
    """An amount in minor units of a currency, and of how many objects it is the sum."""

    currency: str
    amount: int
    objects: int


@dataclass(frozen=True, slots=True)
class Group:
    """The parked events of one account, mode, cause and type.

    *money* has the amount of each object once, by its last event; None where no amount is known. Of *unknown* events
    the payload has no amount, or was not read.
    """

    account: str
    livemode: bool
    cause: str | None
    type: str
    count: int
    first_received_at: datetime
    last_received_at: datetime
    money: Sequence[Money] | None
    unknown: int


@dataclass(frozen=True, slots=True)
class ParkedGroups:
    """The largest groups; *is_cut* where there are more groups, or more events, than are looked at."""

    groups: Sequence[Group]
    is_cut: bool


class _Valued(Struct):
    currency: str | None = None
    amount_total: int | None = None
    total: int | None = None
    amount: int | None = None


class _ValuedData(Struct):
    object: _Valued


class _ValuedEvent(Struct):
    data: _ValuedData


_decode: Final = msgspec.json.Decoder(_ValuedEvent).decode


def groups(
    connection: Connection,
    *,
    account: str | None = None,
    livemode: bool | None = None,
    events_max: int = EVENTS_MAX,
    groups_max: int = GROUPS_MAX,
    payloads_max: int = PAYLOADS_MAX,
) -> ParkedGroups:
    """Return the groups of parked events, the largest first, of one *account* and one mode if given."""
    parked = _parked(account, livemode, events_max).cte("parked")
    rows = connection.execute(_counts(parked).limit(groups_max + 1)).mappings().all()
    known = _amounts(connection, parked, payloads_max)
    found = [_group(dict(row), known.get(_key(row), {})) for row in rows[:groups_max]]
    return ParkedGroups(found, len(rows) > groups_max or _is_more(connection, events_max))


def _parked(account: str | None, livemode: bool | None, events_max: int) -> Select[Any]:  # noqa: FBT001 - a part of the world
    """Return the query of the events that are parked still, of the last *events_max* outcomes of parked events."""
    inbox, pending, last = tables.inbox, tables.pending, _last(events_max).subquery()
    shown = (inbox.c[name] for name in ("account", "livemode", "type", "object_id", "received_at"))
    # The offsets keep these at one look for each event, however many others are in the inbox or pending.
    event = select(*shown).where(inbox.c.seq == last.c.seq).offset(0).lateral("event")
    is_queued = select(pending.c.seq).where(pending.c.seq == last.c.seq).offset(0).exists()
    world = {"account": account, "livemode": livemode}
    wanted = (event.c[name] == value for name, value in world.items() if value is not None)
    return select(last.c.seq, last.c.cause, *event.c).select_from(last.join(event, true())).where(~is_queued, *wanted)


def _last(events_max: int) -> Select[Any]:
    """Return the query of the last outcomes of parked events, also of those that are to be folded again."""
    seq, cause, state = (tables.outcomes.c[name] for name in ("seq", "cause", "state"))
    return select(seq, cause).where(state == "parked").order_by(seq.desc()).limit(events_max)


def _is_more(connection: Connection, events_max: int) -> bool:
    some = _last(events_max + 1).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one() > events_max


def _counts(parked: CTE) -> Select[Any]:
    key = [parked.c[name] for name in GroupKey._fields]
    count, at = func.count().label("count"), parked.c.received_at
    times = (func.min(at).label("first_received_at"), func.max(at).label("last_received_at"))
    return select(*key, count, *times).group_by(*key).order_by(count.desc(), *key)


def _key(row: RowMapping) -> GroupKey:
    return GroupKey(*(row[name] for name in GroupKey._fields))


_Amounts = dict[int, tuple[object, str, int]]
"""By number of an event: what names its object, the currency and the amount."""


def _amounts(connection: Connection, parked: CTE, payloads_max: int) -> dict[GroupKey, _Amounts]:
    """Return the amounts that the payloads of the last events of each group have, the last recorded first."""
    key, seq = [parked.c[name] for name in GroupKey._fields], parked.c.seq
    place = func.row_number().over(partition_by=key, order_by=seq.desc()).label("place")
    ranked = select(*key, seq, parked.c.object_id, place).subquery()
    chosen = select(ranked).where(ranked.c.place <= PAYLOADS_OF_GROUP_MAX).order_by(ranked.c.place, ranked.c.seq.desc())
    rows = connection.execute(chosen.limit(payloads_max)).mappings().all()
    found: dict[GroupKey, _Amounts] = {}
    for start in range(0, len(rows), PAYLOADS_AT_ONCE):
        chunk = rows[start : start + PAYLOADS_AT_ONCE]
        valued = _read(connection, [row["seq"] for row in chunk])
        for row in chunk:
            if row["seq"] in valued:
                found.setdefault(_key(row), {})[row["seq"]] = (row["object_id"] or row["seq"], *valued[row["seq"]])
    return found


def _read(connection: Connection, seqs: Sequence[int]) -> dict[int, tuple[str, int]]:
    """Return the currency and the amount of the objects of the events *seqs*, of those that have both."""
    payloads = tables.payloads
    is_short = func.octet_length(payloads.c.payload) <= PAYLOAD_BYTES_MAX
    query = select(payloads.c.seq, payloads.c.payload).where(payloads.c.seq.in_(seqs), is_short)
    found = ((seq, _valued(payload)) for seq, payload in connection.execute(query))
    return {seq: valued for seq, valued in found if valued is not None}


def _valued(payload: bytes) -> tuple[str, int] | None:
    try:
        object_ = _decode(payload).data.object
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    amount = tables.worth_of({name: getattr(object_, name) for name in tables.MAIN_AMOUNTS})
    return None if object_.currency is None or amount is None else (object_.currency, amount)


def _group(row: Mapping[str, Any], known: _Amounts) -> Group:
    of_objects: dict[object, tuple[str, int]] = {}
    for name, currency, amount in known.values():
        of_objects.setdefault(name, (currency, amount))
    sums: dict[str, list[int]] = {}
    for currency, amount in of_objects.values():
        sums.setdefault(currency, []).append(amount)
    money = [Money(currency, sum(amounts), len(amounts)) for currency, amounts in sorted(sums.items())]
    return Group(**row, money=money or None, unknown=row["count"] - len(known))
