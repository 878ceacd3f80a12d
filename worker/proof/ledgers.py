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
from worker.proof import audits, difference, in_flight, kinds, matching
from worker.proof.audits import Audit, Walk
from worker.proof.difference import Difference, Pair
from worker.proof.kinds import Listed

CUSTOMERS: Final = 500
"""Customers that are looked up at once, to list their ledgers."""


def audit_ledgers(audit: Audit, world: World, walk: Walk) -> Iterator[Difference]:
    """List the ledger of every customer who has a balance, or a row of a ledger."""
    while customers := audit.context.within(partial(_customers, world=world, after=walk.after or "")):
        for customer in customers:
            found = differing_in_ledger(audit, world, walk.tally, customer)
            yield from audits.taken(audit, walk, audits.step_of(kinds.LEDGERS, walk, after=customer), found)
        walk.after = customers[-1]
    audits.taken(audit, walk, audits.step_of(kinds.LEDGERS, walk, is_done=True), [])


def differing_in_ledger(audit: Audit, world: World, tally: Listed, customer: str) -> list[Difference]:
    """Return the differences of a customer's rows from the ledger at Stripe; count a ledger that cannot be read."""
    objects: list[Answer] = []
    before, asked_at = tally.unreadable, audit.context.now()
    try:
        for page in audit.context.api.pages(world, "customers", customer, "balance_transactions", lane=Lane.BACKFILL):
            tally.listed += len(page.items)
            tally.unreadable += page.unreadable
            # All pages count as read at the time of the first one, which is the earliest.
            objects += [replace(each, at=objects[0].at if objects else page.at) for each in page.objects]
    except MissingAtStripe:
        # A deleted customer has no ledger any more.
        tally.unreadable += not audit.context.within(partial(_is_deleted, world=world, customer=customer))
        return []
    except (CallDeclined, NotAnObject):
        tally.unreadable += 1
    is_whole = tally.unreadable == before
    found = matching.compared(audit, world, tally, objects)
    if is_whole:
        read = partial(
            _invented, world=world, customer=customer, listed=audits.ids_of(objects), until=asked_at - in_flight.SETTLED
        )
        found += audit.context.within(read)
    return found


def _is_deleted(cursor: Cursor, *, world: World, customer: str) -> bool:
    cursor.execute(
        "SELECT deleted FROM customers WHERE (account, livemode, id) = (%s, %s, %s)",
        (world.account, world.livemode, customer),
    )
    return cursor.fetchone() == (True,)


def _invented(cursor: Cursor, *, world: World, customer: str, listed: list[str], until: datetime) -> list[Difference]:
    """Return the rows of a ledger, created until *until*, that Stripe has not *listed*."""
    table = tables.balance_transactions
    names = [str(column.name) for column in table.columns]
    cursor.execute(
        sql.SQL(
            "SELECT {} FROM {} WHERE (account, livemode, customer) = (%s, %s, %s) AND id <> ALL (%s) AND {} <= %s"
            " ORDER BY id"
        ).format(
            sql.SQL(", ").join(map(sql.Identifier, names)), sql.Identifier(table.name), sql.SQL(kinds.LEDGERS.created)
        ),
        (world.account, world.livemode, customer, listed, until),
    )
    rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    return [each for row in rows for each in difference.differences(Pair(table, row, None))]


def _customers(cursor: Cursor, *, world: World, after: str) -> list[str]:
    cursor.execute(
        """
        SELECT customer FROM balances
            WHERE (account, livemode) = (%(account)s, %(livemode)s) AND customer > %(after)s
        UNION
        SELECT customer FROM balance_transactions
            WHERE (account, livemode) = (%(account)s, %(livemode)s) AND customer > %(after)s
        ORDER BY customer LIMIT %(limit)s
        """,
        {"account": world.account, "livemode": world.livemode, "after": after, "limit": CUSTOMERS},
    )
    return [customer for (customer,) in cursor.fetchall()]
