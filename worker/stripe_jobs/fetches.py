"""Reads objects from Stripe that its events leave out, and records them as observations.

There are four reasons to read an object. The change feed shows that an order was completed, or a customer's balance
moved. An anomaly shows that the order of events is in doubt: see worker/stripe_jobs/doubts.py. A thin event names an
object without its content. A charge has moved since its payment's session was last seen. The change feed is read from
the number where the round before ended, so the cost depends on the new changes only.
"""

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from schemas import checkout, events, observations, tables
from schemas.budget import Lane
from schemas.database import Cursor
from schemas.errors import CallDeclined, MissingAtStripe, NotAnObject, Refused
from schemas.inbox import Delivery
from schemas.observations import Answer, World
from worker.folds import payment
from worker.stripe_jobs import doubts, expiry, gaps, queue, rounds
from worker.stripe_jobs.queue import Call, CallRequest, JobProgress
from worker.stripe_jobs.rounds import CallResult, JobContext, JobResult, TimeBudget

JOB: Final = "fetch"
PURPOSES: Final = ("session", "ledger", "credit_note", "object", "event")
THIN_EVENTS_READ: Final = 500
"""Thin events with payloads in memory at once."""
CHANGES_MAX: Final = 5_000
"""Changes that one round looks at."""
AGE_MAX: Final = timedelta(days=30)
"""Objects of older changes (from a replayed log) are not read, since Stripe may not have them any more."""
RECENT: Final = timedelta(hours=1)
"""Objects of older changes are read after all others."""
OVERLAP: Final = timedelta(minutes=1)

_PATHS: Final = {
    "billing_portal.configuration": ("billing_portal", "configurations"),
    "charge": ("charges",),
    "checkout.session": ("checkout", "sessions"),
    "credit_note": ("credit_notes",),
    "customer": ("customers",),
    "dispute": ("disputes",),
    "invoice": ("invoices",),
    "invoice_payment": ("invoice_payments",),
    "payment_link": ("payment_links",),
    "refund": ("refunds",),
}
"""By type of object, the path at which Stripe returns one."""


def run_once(context: JobContext) -> JobResult:
    """Read the objects that are due, in every world that a key serves."""
    return rounds.run_job(context, JOB, lambda *step: _fetch(context, *step))


def _fetch(context: JobContext, world: World, progress: JobProgress, found: JobResult, time_left: TimeBudget) -> None:
    started = context.now()
    reached = progress.reached_seq or 0
    newest = context.within(lambda opened: plan(opened, context, world, progress))
    context.within(lambda opened: queue.reach(opened, world, JOB, at=started, seq=newest))
    found.is_more = found.is_more or newest >= reached + CHANGES_MAX
    rounds.work_off(context, world, PURPOSES, lambda call: _make(context, call), found, time_left)


def plan(cursor: Cursor, context: JobContext, world: World, progress: JobProgress) -> int:
    """Queue the objects to read of *world*, and return the number of the last change that was looked at."""
    values = {
        "account": world.account,
        "livemode": world.livemode,
        "seq": progress.reached_seq or 0,
        "limit": CHANGES_MAX,
        "oldest": context.now() - AGE_MAX,
        "recent": context.now() - RECENT,
        "refetch": int(Lane.REFETCH),
        "backfill": int(Lane.BACKFILL),
        "open_lines": context.settings.payfold_open_session_lines,
        "thin_since": (progress.reached_at or context.now() - AGE_MAX) - OVERLAP,
        "types": list(_PATHS),
    }
    wanted: dict[tuple[str, str], CallRequest] = {}
    cursor.execute(_FROM_CHANGES, values)
    found = cursor.fetchall()
    found += doubts.to_read(cursor, values)
    cursor.execute(_FROM_CHARGES, values)
    found += cursor.fetchall()
    found += _of_thin_events(cursor, values)
    for purpose, object_id, object_type, lane in found:
        wanted[purpose, object_id] = CallRequest(purpose, object_id, object_type, Lane(lane))
    if wanted:
        queue.want(cursor, world, list(wanted.values()), now=context.now())
    cursor.execute(
        "SELECT coalesce(max(seq), %(seq)s)"
        " FROM (SELECT seq FROM changes WHERE seq > %(seq)s ORDER BY seq LIMIT %(limit)s) AS looked_at",
        values,
    )
    (newest,) = cursor.fetchone() or (0,)
    return int(newest)


_LANE: Final = "CASE WHEN c.at < %(recent)s THEN %(backfill)s ELSE %(refetch)s END"
_FROM_CHANGES: Final = f"""
WITH c AS MATERIALIZED (
    SELECT * FROM (SELECT * FROM changes WHERE seq > %(seq)s ORDER BY seq LIMIT %(limit)s) AS looked_at
    WHERE (account, livemode) = (%(account)s, %(livemode)s) AND at >= %(oldest)s
)
-- The lines of an order that was completed, or has expired, or is open and of interest.
SELECT 'session', o.id, 'checkout.session', {_LANE}
FROM c JOIN orders AS o ON (o.account, o.livemode, o.id) = (c.account, c.livemode, c.subject_id)
WHERE c.subject = 'order' AND NOT o.lines_complete AND o.mode IS DISTINCT FROM 'setup'
    AND (o.status <> 'open' OR %(open_lines)s = 'all' OR (%(open_lines)s = 'shop' AND o.payment_link IS NULL))
UNION ALL
-- The session again, now that its charge has paid it, or failed.
SELECT 'object', o.id, 'checkout.session', {_LANE}
FROM c JOIN orders AS o ON (o.account, o.livemode, o.id) = (c.account, c.livemode, c.subject_id)
WHERE c.kind IN ('order.paid', 'order.failed') AND o.as_of < c.at AND {payment.OF_ORDER_OPEN}
UNION ALL
-- Why a balance moved, which only the ledger tells. What the ledger itself told needs no reading.
SELECT 'ledger', c.subject_id, 'customer', {_LANE}
FROM c WHERE c.kind = 'balance.changed' AND c.source <> 'observation'
UNION ALL
SELECT 'ledger', n.customer, 'customer', {_LANE}
FROM c JOIN credit_notes AS n ON (n.account, n.livemode, n.id) = (c.account, c.livemode, c.subject_id)
WHERE c.subject = 'credit_note' AND n.customer IS NOT NULL AND n.customer_balance_transaction IS NOT NULL
UNION ALL
SELECT 'ledger', i.customer, 'customer', {_LANE}
FROM c JOIN invoices AS i ON (i.account, i.livemode, i.id) = (c.account, c.livemode, c.subject_id)
WHERE c.subject = 'invoice' AND i.customer IS NOT NULL AND i.ending_balance <> i.starting_balance
UNION ALL
SELECT 'credit_note', n.id, 'credit_note', {_LANE}
FROM c JOIN credit_notes AS n ON (n.account, n.livemode, n.id) = (c.account, c.livemode, c.subject_id)
WHERE c.subject = 'credit_note' AND NOT n.lines_complete
"""

# A session that left its payment open is read once per event that moved its charge since: what is read is then later
# than that event.
_FROM_CHARGES: Final = f"""
WITH moved AS MATERIALIZED (
    SELECT id, object_id, created, received_at FROM inbox
    WHERE received_at >= %(thin_since)s AND (account, livemode) = (%(account)s, %(livemode)s)
        AND object_type = 'charge' AND created >= %(oldest)s
)
SELECT 'object', o.id, 'checkout.session', CASE WHEN m.created < %(recent)s THEN %(backfill)s ELSE %(refetch)s END
FROM moved AS m
JOIN charges AS c ON (c.account, c.livemode, c.id) = (%(account)s, %(livemode)s, m.object_id) AND c.event_id = m.id
CROSS JOIN LATERAL (
    SELECT id, as_of FROM orders
    WHERE (orders.account, orders.livemode, orders.payment_intent) = (c.account, c.livemode, c.payment_intent)
        AND {payment.OF_ORDER_OPEN}
    OFFSET 0
) AS o
WHERE o.as_of < m.created AND NOT EXISTS (
    SELECT FROM inbox AS i WHERE {tables.of_object("i", "%(account)s", "%(livemode)s", "o.id")}
        AND i.source = 'observation' AND i.received_at >= m.received_at
)
"""

_THIN_EVENTS: Final = """
SELECT t.seq, t.object_id, t.object_type, t.received_at, b.payload FROM inbox AS t JOIN payloads AS b USING (seq)
WHERE t.type LIKE 'v_.%%' AND t.received_at >= %(thin_since)s
    AND (t.account, t.livemode) = (%(account)s, %(livemode)s) AND t.seq > %(behind)s
ORDER BY t.seq LIMIT %(thin_limit)s
"""
_THIN_COLUMNS: Final = ("object_ids", "object_types", "received", "twins")
# If a thin event names a full event of the same change, that event is read; otherwise the object that it is about.
_UNREAD: Final = f"""
SELECT CASE WHEN t.twin IS NULL THEN 'object' ELSE 'event' END, coalesce(t.twin, t.object_id),
    CASE WHEN t.twin IS NULL THEN t.object_type ELSE 'event' END, %(refetch)s
FROM unnest(%(object_ids)s::text[], %(object_types)s::text[], %(received)s::timestamptz[], %(twins)s::text[])
    AS t (object_id, object_type, received_at, twin)
WHERE (t.twin IS NOT NULL OR t.object_type = ANY (%(types)s))
    AND NOT EXISTS (
        SELECT FROM inbox AS i WHERE (i.account, i.livemode, i.id) = (%(account)s, %(livemode)s, t.twin)
    )
    AND NOT EXISTS (
        SELECT FROM inbox AS o WHERE {tables.of_object("o", "%(account)s", "%(livemode)s", "t.object_id")}
            AND o.source = 'observation' AND o.received_at >= t.received_at AND t.twin IS NULL
    )
"""


def _of_thin_events(cursor: Cursor, values: dict[str, Any]) -> Iterator[tuple[str, str, str, int]]:
    """Yield what to read because of thin events. Python parses their payloads, since PostgreSQL may reject them."""
    behind = 0
    while True:
        cursor.execute(_THIN_EVENTS, values | {"behind": behind, "thin_limit": THIN_EVENTS_READ})
        known = [(seq, *row, events.twin_of(bytes(payload))) for seq, *row, payload in cursor.fetchall()]
        if not known:
            return
        seqs, *columns = map(list, zip(*known, strict=True))
        cursor.execute(_UNREAD, values | dict(zip(_THIN_COLUMNS, columns, strict=True)))
        yield from cursor.fetchall()
        behind = seqs[-1]


def _make(context: JobContext, call: Call) -> CallResult:
    try:
        return _MAKE[call.purpose](context, call)
    except MissingAtStripe:
        return CallResult(counted="missing", given_up="Stripe knows no such object")
    except CallDeclined as error:
        return CallResult(counted="declined", given_up=str(error))
    except (NotAnObject, Refused) as error:
        return CallResult(counted="unreadable", given_up=str(error))


def _read_ledger(context: JobContext, call: Call) -> CallResult:
    """List the customer's balance transactions, down to the known ones; record all of them or none.

    If some have no readable id and type, the others are recorded, and the call is given up, so that a person sees it.
    """
    until = context.within(lambda opened: doubts.unexplained_until(opened, call))
    known = context.within(lambda opened: _known_transactions(opened, call)) if not until else set[str]()
    listed, found, items = _listed(context, call, known)
    # A list begins with the newest transactions.
    newest = {each.body.get("currency"): delivery for each, delivery in reversed(found)}
    late = [currency for currency, last in until.items() if currency in newest and listed > last.timestamp()]
    unreadable = items - len(found)
    return CallResult(
        tuple(delivery for _, delivery in found),
        "ledgers",
        is_to_be_repeated=len(late) < len(until) and doubts.is_to_be_repeated(call),
        given_up=f"{unreadable} of its transactions have no readable id and type." if unreadable else "",
        settling=tuple(newest[currency] for currency in late),
    )


def _listed(context: JobContext, call: Call, known: Collection[str]) -> tuple[int, list[tuple[Answer, Delivery]], int]:
    """Return the time of a list of transactions down to the *known* ones, the readable ones, and how many it has."""
    found: list[tuple[Answer, Delivery]] = []
    items = 0
    at: int | None = None
    path = ("customers", call.object_id, "balance_transactions")
    for page in context.api.pages(call.world, *path, lane=call.lane):
        items += len(page.items)
        # All pages count as read at the time of the first one, which is the earliest.
        at = page.at if at is None else at
        for each in page.objects:
            with suppress(NotAnObject):
                found.append((each, _observed(replace(each, at=at), call, context.now())))
        if any(each.id in known for each in page.objects):
            break
    return at or 0, found, items


def _known_transactions(cursor: Cursor, call: Call) -> set[str]:
    """Return the known transactions; none if the chain of the ledger has a gap, so that all of it is listed."""
    values = {"account": call.world.account, "livemode": call.world.livemode, "customer": call.object_id}
    cursor.execute(
        """
        SELECT t.id FROM balance_transactions AS t
        WHERE (t.account, t.livemode, t.customer) = (%(account)s, %(livemode)s, %(customer)s)
            AND NOT EXISTS (
                SELECT FROM anomalies AS a WHERE (a.account, a.livemode) = (%(account)s, %(livemode)s)
                    AND a.kind = 'broken_chain' AND a.resolved_at IS NULL
                    AND a.object_id = %(customer)s
            )
        """,
        values,
    )
    return {row[0] for row in cursor.fetchall()}


def _read_credit_note(context: JobContext, call: Call) -> CallResult:
    answer = context.api.call(call.world, "get", "credit_notes", call.object_id, lane=call.lane)
    lines = answer.body.get("lines")
    if isinstance(lines, dict) and lines.get("has_more"):
        data = context.api.whole(call.world, "credit_notes", call.object_id, "lines", lane=call.lane)
        if data is not None:
            answer = Answer({**answer.body, "lines": {**lines, "data": data, "has_more": False}}, answer.at)
    return CallResult((_observed(answer, call, context.now()),), "credit_notes")


def _read_object(context: JobContext, call: Call) -> CallResult:
    until = context.within(lambda opened: doubts.undecided_until(opened, call))
    if call.object_type == "checkout.session":
        answer = checkout.read(context.api, call.world, call.object_id, lane=call.lane)
    else:
        answer = context.api.call(call.world, "get", *_PATHS[call.object_type], call.object_id, lane=call.lane)
    read = (_observed(answer, call, context.now()),)
    if until is not None and answer.at <= until.timestamp():
        return CallResult(read, "objects", is_to_be_repeated=doubts.is_to_be_repeated(call))
    # It is recorded even if the inbox has the same content, since it settles what the events left in doubt.
    return CallResult(read, "objects", is_news=True)


def _read_event(context: JobContext, call: Call) -> CallResult:
    body = context.api.event(call.world, call.object_id, lane=call.lane)
    return CallResult((gaps.event_of(body, call.world, now=context.now()),), "events", is_news=True)


_MAKE: Final = {
    "session": expiry.read,
    "ledger": _read_ledger,
    "credit_note": _read_credit_note,
    "object": _read_object,
    "event": _read_event,
}


def _observed(answer: Answer, call: Call, now: datetime) -> Delivery:
    return observations.of_answer(observations.kind_of(answer), answer, call.world, now=now)
