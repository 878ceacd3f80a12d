"""Finds the objects whose order of events is in doubt, where a reading at Stripe may still end the doubt.

Note [A doubt is read once]
    A reading that is later than all other events of the object shows its last state, and so ends a doubt about that. A
    reading carries the earliest time at which Stripe may have answered. Directly after the events that is often their
    own second, where it decides nothing. Then the object is read again after a pause, which grows with each reading, up
    to ``READINGS_MAX`` times.

    If a single reading is the last event of an object, another one of the same content adds nothing. So the object is
    not read again for the doubt, even if that remains, until another event comes.

    No reading of a customer shows how often its balance moved within a second. The ledger shows it, if it was read
    after that second: see Note [Two witnesses of a balance] in worker/folds/balance.py. So the ledger of a balance in
    doubt is listed whole. The newest transaction of the balance is recorded even if it is known, since its reading
    dates the ledger.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from schemas import tables
from schemas.database import Cursor
from schemas.own_events import observed
from worker.folds import balance, join
from worker.stripe_jobs.queue import Call

READINGS_MAX: Final = 8
"""Readings for one doubt that come too early to end it: a few minutes of pauses."""
_KINDS: Final = (join.AMBIGUOUS_ORDER, "expired_and_complete")

_IS_READING: Final = f"e.type LIKE '{observed('%%')}'"
_EVENTS: Final = f"inbox AS e WHERE {tables.of_object('e', 'a.account', 'a.livemode', 'a.object_id')}"
_LAST: Final = f"(SELECT max(e.created) FROM {_EVENTS})"
_IS_UNDECIDED: Final = f"""
a.kind = ANY (%(kinds)s) AND a.resolved_at IS NULL AND (
    SELECT count(*) > 1 OR NOT bool_and({_IS_READING}) FROM {_EVENTS} AND e.created = {_LAST}
)
"""
# A customer that has no event but readings has a ledger that is late enough at any time.
_LAST_OF_CUSTOMER: Final = f"(SELECT coalesce(max(e.created), to_timestamp(0)) FROM {_EVENTS} AND NOT {_IS_READING})"
_CURRENCY: Final = "split_part(a.subject_id, ' ', 2)"
_IS_UNEXPLAINED: Final = f"""
a.kind = %(ambiguous)s AND a.subject = %(balance)s AND a.resolved_at IS NULL AND NOT EXISTS (
    SELECT FROM balance_transactions AS t
    WHERE (t.account, t.livemode, t.customer, t.currency) = (a.account, a.livemode, a.object_id, {_CURRENCY})
        AND t.as_of > {_LAST_OF_CUSTOMER}
)
"""
_VALUES: Final[Mapping[str, Any]] = {
    "kinds": list(_KINDS),
    "ambiguous": join.AMBIGUOUS_ORDER,
    "balance": balance.ROW_SPEC.subject,
}

# The object has the type of its latest event. A balance is read with its customer, and with its ledger.
_TO_READ: Final = f"""
SELECT 'object', a.object_id, i.object_type, %(refetch)s
FROM anomalies AS a
JOIN inbox AS i ON (i.account, i.livemode, i.id) = (a.account, a.livemode, a.event_id)
WHERE (a.account, a.livemode) = (%(account)s, %(livemode)s) AND a.seen_at >= %(thin_since)s
    AND i.object_type = ANY (%(types)s) AND i.object_id = a.object_id AND {_IS_UNDECIDED}
UNION ALL
SELECT 'ledger', a.object_id, 'customer', %(refetch)s
FROM anomalies AS a
WHERE (a.account, a.livemode) = (%(account)s, %(livemode)s) AND a.seen_at >= %(thin_since)s AND {_IS_UNEXPLAINED}
"""
_OF_CALL: Final = "(a.account, a.livemode, a.object_id) = (%(account)s, %(livemode)s, %(object_id)s)"
_UNDECIDED: Final = f"SELECT max({_LAST}) FROM anomalies AS a WHERE {_OF_CALL} AND {_IS_UNDECIDED}"
_UNEXPLAINED: Final = (
    f"SELECT {_CURRENCY}, max({_LAST_OF_CUSTOMER}) FROM anomalies AS a"
    f" WHERE {_OF_CALL} AND {_IS_UNEXPLAINED} GROUP BY 1"
)


def to_read(cursor: Cursor, values: Mapping[str, Any]) -> Sequence[tuple[str, str, str, int]]:
    """Return what to read because of doubts: purpose, id, type and lane; *values* are those of the round."""
    cursor.execute(_TO_READ, {**_VALUES, **values})
    return cursor.fetchall()


def undecided_until(cursor: Cursor, call: Call) -> datetime | None:
    """Return the time that a reading of the object must be later than to end a doubt; None without such a doubt."""
    cursor.execute(_UNDECIDED, _of(call))
    row = cursor.fetchone()
    last: datetime | None = None if row is None else row[0]
    return last


def unexplained_until(cursor: Cursor, call: Call) -> dict[str, datetime]:
    """Return the time that a reading of the ledger must be later than, by the currency of each balance in doubt."""
    cursor.execute(_UNEXPLAINED, _of(call))
    return dict(cursor.fetchall())


def is_to_be_repeated(call: Call) -> bool:
    """Return whether a *call* that came too early to end a doubt is made again."""
    return call.attempts + 1 < READINGS_MAX


def _of(call: Call) -> Mapping[str, Any]:
    world = call.world
    return {**_VALUES, "account": world.account, "livemode": world.livemode, "object_id": call.object_id}
