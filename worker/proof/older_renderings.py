"""Finds the differences from what Stripe lists that come from an older API version of the events.

Note [An older API version carries less]
    Stripe lists objects in the newest version of its API, and an endpoint may send events of an older version, which
    lacks some keys. The column of such a key is null, which means not known, and so are columns that are inferred from
    it, such as an order's status. Features of a portal that were added later are also absent. The map decides whether
    the deciding event states a column, and not the folds. So if a fold reads a column from the wrong place, and finds
    nothing there, that is still a difference.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
from msgspec import Struct

from schemas import inbox
from schemas.database import Cursor
from schemas.observations import World
from worker import folds
from worker.proof import witness
from worker.proof.difference import Pair
from worker.proof.pairs import Name, Place, differences_of, key_of, place_of, row_of
from worker.proof.witness import Statement

_MAPPED: Final = {(each.table, each.column) for each in witness.MAP}


def unstated(cursor: Cursor, world: World, pairs: Sequence[Pair]) -> set[Name]:
    """See Note [An older API version carries less]."""
    doubted = [pair for pair in pairs if pair.held is not None and pair.expected is not None and differences_of(pair)]
    events_of = {str(pair.held["event_id"]) for pair in doubted if pair.held is not None}
    stated = _stated_by_old_events(cursor, world, events_of) if events_of else {}
    return {
        (*row_of(pair), name)
        for pair in doubted
        if pair.held is not None and pair.expected is not None
        for name in pair.held
        if (statement := stated.get((str(pair.held["event_id"]), row_of(pair)))) is not None
        and _is_unstated(statement, name, pair.held, pair.expected)
    }


_INFERRED_FROM: Final = {
    ("orders", "status"): ("session_status", "payment_status", "mode"),
    ("orders", "completed_at"): ("session_status",),
    ("orders", "expired_at"): ("session_status",),
    ("orders", "paid_at"): ("session_status", "payment_status", "mode"),
    ("refunds", "failed_at"): ("status",),
    ("charges", "captured_at"): ("captured", "status"),
}
"""By table and column that no object has, the mapped columns from which the folds infer it."""


def _is_unstated(statement: Statement, name: str, held: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Return whether a column differs from Stripe's list because its deciding event is of an older API version."""
    if (statement.table, name) == ("credit_notes", "refund"):
        # Only versions before basil state it. It is null where the parts of the note are known.
        return held[name] is not None and expected[name] is None
    if (statement.table, name) == ("portal_configurations", "features"):
        was, now = held[name], expected[name]
        return was != now and statement.columns.get(name) == was and _is_part(_without_removed(was), now)
    if held[name] is not None or expected[name] is None:
        return False
    inputs = _INFERRED_FROM.get((statement.table, name), ())
    return _is_lacking(statement, name) or any(
        held[each] is None and expected[each] is not None and _is_lacking(statement, each) for each in inputs
    )


def _is_lacking(statement: Statement, name: str) -> bool:
    return (statement.table, name) in _MAPPED and name not in statement.columns


_REMOVED_FEATURES: Final = ("subscription_pause",)
"""Features of a portal until 2024-04-10. Since 2026-10-28 another feature has this name; no version has both."""


def _without_removed(features: object) -> object:
    """Return the *features* of a portal in an older version, without those that the newest version lacks."""
    if not isinstance(features, dict):
        return features
    return {name: value for name, value in features.items() if name not in _REMOVED_FEATURES}


def _is_part(held: object, whole: object) -> bool:
    """Return whether *whole* equals *held*, except for keys that only *whole* has."""
    if isinstance(held, dict) and isinstance(whole, dict):
        return all(key in whole and _is_part(value, whole[key]) for key, value in held.items())
    return held == whole


def _stated_by_old_events(
    cursor: Cursor, world: World, ids: Iterable[str]
) -> dict[tuple[str, Place], Statement]:  # fmt: skip
    """Return what the events *ids* state of each row, of those events with an older API version than the folds have."""
    cursor.execute(
        "SELECT id, seq FROM inbox"
        " WHERE (account, livemode) = (%s, %s) AND id = ANY (%s) AND left(api_version, 10) < %s",
        (*key_of(world), sorted(ids), folds.API_VERSION[:10]),
    )
    seqs: dict[str, int] = dict(cursor.fetchall())
    payloads = inbox.payloads_of(cursor, list(seqs.values())) if seqs else {}
    found: dict[tuple[str, Place], Statement] = {}
    for id_, seq in seqs.items():
        with suppress(msgspec.DecodeError, KeyError, RecursionError):
            body = msgspec.json.decode(payloads[seq], type=_Event).data.object
            found |= {(id_, place_of(statement)): statement for statement in witness.statements(body)}
    return found


class _Data(Struct):
    object: dict[str, Any]


class _Event(Struct):
    data: _Data
