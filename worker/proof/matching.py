"""Compares the objects of an answer with their rows, and corrects the wrong rows if the audit is a repair."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from schemas import database, inbox, tables
from schemas.budget import Lane
from schemas.database import Cursor
from schemas.errors import CallDeclined, MissingAtStripe, NotAnObject
from schemas.inbox import Delivery
from schemas.observations import Answer, World
from schemas.stripe_api import Page
from worker import folds
from worker.folding import projection
from worker.folding.claim import event_of_delivery
from worker.proof import audits, by_map, comparison, in_flight, kinds
from worker.proof.audits import Audit
from worker.proof.comparison import Compared
from worker.proof.difference import Difference
from worker.proof.kinds import Listed
from worker.stripe_jobs.rounds import JobContext


def compared(
    audit: Audit, world: World, tally: Listed, objects: Sequence[Answer], *, page: Page | None = None
) -> list[Difference]:
    """Compare *objects*, correct wrong rows if this is a repair, and return the differences."""
    if page is not None:
        tally.listed += len(page.items)
        tally.unreadable += page.unreadable
    settled = [each for each in objects if not in_flight.is_young(each, audit.context)]
    settled = settled if audit.repair else _with_all_lines(audit, world, tally, settled)
    found = comparison.compare(audit.context, world, settled, by_map=not audit.repair)
    # An entry of a ledger never changes, so only a new one can be on its way, and those are not compared.
    is_fixed = tally.object == kinds.LEDGERS.name
    if found.differences and not is_fixed and (moved := in_flight.moved(audit.context, world, _earliest(settled))):
        settled = [each for each in settled if not moved & in_flight.names_of(each)]
        found = comparison.compare(audit.context, world, settled, by_map=not audit.repair)
    tally.archived += found.archived
    tally.unreadable += found.unreadable
    tally.only_by_map += found.only_by_map
    tally.unstated += found.unstated
    if found.wrong and audit.repair:
        audit.context.within(lambda opened: _put_right(opened, audit.context, world, found))
        projection.fold_pending(audit.context.engine)
    return found.differences


def _earliest(objects: Sequence[Answer]) -> int:
    return min(each.at for each in objects)


def _with_all_lines(audit: Audit, world: World, tally: Listed, objects: Sequence[Answer]) -> list[Answer]:
    """Return *objects* with the lines that a list leaves out of them, and count those of which they were not read.

    Only objects of which the tables hold all lines are asked for.
    """
    ids = [str(each.id) for each in objects if by_map.lacks_lines(each)]
    if not ids:
        return list(objects)
    known = partial(by_map.with_known_lines, world=world, kind=tally.object, ids=ids)
    wanted = audit.context.within(known)
    whole = [_whole(audit, world, each) if each.id in wanted else each for each in objects]
    tally.without_lines += sum(each.id in wanted and by_map.lacks_lines(each) for each in whole)
    return whole


def _whole(audit: Audit, world: World, answer: Answer) -> Answer:
    """Return *answer* with all its lines; as it is if they cannot be read, or if enough were read."""
    lines = by_map.LINES[str(answer.body["object"])]
    if audit.spent[lines.table] >= audits.LINES_MAX:
        return answer
    audit.spent[lines.table] += 1
    with suppress(CallDeclined, MissingAtStripe, NotAnObject):
        path = (*lines.folder, str(answer.id), lines.listed)
        data = audit.context.api.whole(world, *path, lane=Lane.BACKFILL)
        if data is not None:
            page = {**answer.body[lines.listed], "data": data, "has_more": False}
            return replace(answer, body={**answer.body, lines.listed: page})
    return answer


def _put_right(cursor: Cursor, context: JobContext, world: World, found: Compared) -> None:
    """Record the new observations of the wrong rows' objects, and queue all events of them to be folded again."""
    sources = set(found.wrong.values()) | set(found.wrong)
    context.record(
        cursor,
        [delivery for id_, delivery in found.deliveries.items() if id_ in sources or _customer_of(delivery) in sources],
    )
    cursor.execute(
        f"""
        INSERT INTO pending (seq, again)
        SELECT i.seq, true FROM unnest(%(objects)s::text[]) AS k (id)
        JOIN inbox AS i ON {tables.of_object("i", "%(account)s", "%(livemode)s", "k.id")}
        UNION
        SELECT seq, true FROM mentions WHERE (account, livemode) = (%(account)s, %(livemode)s)
            AND object_id = ANY (%(objects)s)
        ON CONFLICT (seq) DO UPDATE SET again = true
        """,
        {"account": world.account, "livemode": world.livemode, "objects": sorted(sources)},
    )


def _customer_of(delivery: Delivery) -> str | None:
    """Return the customer of a balance transaction; its rows are folded from the customer's events."""
    for one in folds.judge(event_of_delivery(delivery)).facts:
        if one.subject.table == "balances":
            return one.subject.source
    return None


def record(context: JobContext, delivery: Delivery) -> None:
    """Record *delivery*, and fold it."""
    with database.transaction(context.engine) as connection, database.cursor(connection) as cursor:
        inbox.record(cursor, [delivery])
    projection.fold_pending(context.engine)
