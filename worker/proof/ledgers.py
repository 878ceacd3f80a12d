"""Compares the ledgers of customers, which Stripe lists one by one."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Final

from psycopg import sql

from schemas import tables
from schemas.budget import Lane
from schemas.database import Cursor
from schemas.errors import CallDeclined, MissingAtStripe, NotAnObject
from schemas.observations import Answer, World
from worker.proof import audits, difference, in_flight, kinds, matching, witness
from worker.proof.audits import Audit, Walk
from worker.proof.difference import Difference, Pair
from worker.proof.kinds import Listed


def audit_ledgers(audit: Audit, world: World, walk: Walk) -> Iterator[Difference]:
    """List the ledgers of the customers with a balance or a row of a ledger: see ``_chosen``."""
    count, customers = audit.context.within(partial(_chosen, audit=audit, world=world))
    is_sample = count > len(customers)
    if is_sample:
        walk.tally.sampled_of = count
    for customer in [each for each in customers if walk.after is None or each > walk.after]:
        walk.tally.sampled += is_sample
        found = differing_in_ledger(audit, world, walk.tally, customer)
        yield from audits.taken(audit, walk, audits.step_of(kinds.LEDGERS, walk, after=customer), found)
    audits.taken(audit, walk, audits.step_of(kinds.LEDGERS, walk, is_done=True), [])


def differing_in_ledger(audit: Audit, world: World, tally: Listed, customer: str) -> list[Difference]:
    """Return the differences of a customer's rows from the ledger at Stripe; count a ledger that cannot be read.

    A ledger is compared as a whole, because each entry is a step from the one before it. In an audit with ``since``
    only the differences of newer entries count.
    """
    entries: list[Answer] = []
    before, asked_at = tally.unreadable, audit.context.now()
    try:
        for page in audit.context.api.pages(world, "customers", customer, "balance_transactions", lane=Lane.BACKFILL):
            tally.listed += len(page.items)
            tally.unreadable += page.unreadable
            # All pages count as read at the time of the first one, which is the earliest.
            entries += [replace(each, at=entries[0].at if entries else page.at) for each in page.objects]
    except MissingAtStripe:
        # A deleted customer has no ledger any more.
        is_gone = audit.context.within(partial(_is_deleted, world=world, customer=customer))
        at = int(asked_at.timestamp())
        tally.unreadable += not is_gone and customer not in in_flight.moved(audit.context, world, at)
        return []
    except (CallDeclined, NotAnObject):
        tally.unreadable += 1
    older = {each.id for each in entries if _is_before(each, audit.since)}
    tally.listed -= len(older)
    found = matching.compared(audit, world, tally, entries)
    found = [each for each in found if each.table != kinds.LEDGERS.table or each.id not in older]
    if tally.unreadable == before:
        ids, until = audits.ids_of(entries), asked_at - in_flight.SETTLED
        read = partial(_invented, world=world, customer=customer, listed=ids, since=audit.since, until=until)
        found += audit.context.within(read)
    return found


def _is_before(entry: Answer, since: datetime | None) -> bool:
    created = witness.moment(entry.body.get("created"))
    return since is not None and isinstance(created, datetime) and created < since


def _is_deleted(cursor: Cursor, *, world: World, customer: str) -> bool:
    cursor.execute(
        "SELECT deleted FROM customers WHERE (account, livemode, id) = (%s, %s, %s)",
        (world.account, world.livemode, customer),
    )
    return cursor.fetchone() == (True,)


def _invented(
    cursor: Cursor, *, world: World, customer: str, listed: list[str], since: datetime | None, until: datetime
) -> list[Difference]:
    """Return the rows of a ledger, created *since* and until *until*, that Stripe has not *listed*."""
    table = tables.balance_transactions
    names = [str(column.name) for column in table.columns]
    statement = sql.SQL(
        "SELECT {} FROM {} WHERE (account, livemode, customer) = (%s, %s, %s) AND id <> ALL (%s)"
        " AND {} BETWEEN %s AND %s ORDER BY id"
    ).format(sql.SQL(", ").join(map(sql.Identifier, names)), sql.Identifier(table.name), sql.SQL(kinds.LEDGERS.created))
    cursor.execute(statement, (world.account, world.livemode, customer, listed, since or kinds.LONG_AGO, until))
    rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    return [each for row in rows for each in difference.differences(Pair(table, row, None))]


# A ledger has moved when its last entry was made, or when the last event of its customer's balance was.
_MOVED: Final = """
WITH moved AS (
    SELECT customer, max(at) AS at FROM (
        SELECT customer, as_of AS at FROM balances WHERE (account, livemode) = (%(account)s, %(livemode)s)
        UNION ALL
        SELECT customer, coalesce(created, as_of) FROM balance_transactions
        WHERE (account, livemode) = (%(account)s, %(livemode)s)
    ) AS each GROUP BY customer HAVING max(at) >= %(since)s
), placed AS (
    SELECT customer, count(*) OVER () AS known, row_number() OVER (ORDER BY at DESC, customer) AS age,
        md5(customer || %(seed)s) AS chance
    FROM moved
)
SELECT customer, known FROM placed ORDER BY age > %(max)s / 2, CASE WHEN age > %(max)s / 2 THEN chance END, customer
LIMIT %(max)s
"""


def _chosen(cursor: Cursor, *, audit: Audit, world: World) -> tuple[int, list[str]]:
    """Return how many customers have a ledger that has moved since, and those to ask for, in their order.

    Of too many, half are the last that moved, and the seed chooses the others.
    """
    values = {"account": world.account, "livemode": world.livemode, "since": audit.since or kinds.LONG_AGO}
    cursor.execute(_MOVED, {**values, "seed": str(audit.kept.seed), "max": audit.ledgers_max})
    rows = cursor.fetchall()
    return (int(rows[0][1]) if rows else 0), sorted(customer for customer, _ in rows)
