"""Follows the list of one kind of object, and asks for the rows that no page listed."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, Final

import structlog
from psycopg import sql

from schemas import checkout, tables
from schemas.budget import Lane
from schemas.database import Cursor
from schemas.errors import CallDeclined, MissingAtStripe, NotAnObject, PayfoldError
from schemas.observations import World
from schemas.stripe_api import PAGE_ROWS, Page
from worker.proof import audits, in_flight, kinds, matching, witness
from worker.proof.audits import Audit, Walk
from worker.proof.difference import EXTRA, Difference
from worker.proof.kinds import Kind, Listed
from worker.proof.walks import Step
from worker.stripe_jobs.rounds import JobContext

_log = structlog.get_logger()

_OF_ID: Final = tables.of_object("i", "%s", "%s", "k.id")
WINDOW_PAGES: Final = 50
"""After so many pages the rows of the time that they span are searched for rows that no page listed."""


def audit_kind(audit: Audit, world: World, kind: Kind, walk: Walk) -> Iterator[Difference]:
    """Compare all objects of *kind*, from where *walk* is, and yield the differences."""
    lowest: datetime | None = None
    for number, (page, is_chosen) in enumerate(_pages(audit, world, kind, walk), start=1):
        # Before the comparison, since a repair records the objects.
        walk.is_known = walk.is_known or _is_known(audit, world, kind, page)
        found = matching.compared(audit, world, walk.tally, page.objects, page=page)
        step = audits.step_of(kind, walk, is_known=walk.is_known, ids=audits.ids_of(page.objects), starts=walk.starts)
        step.after = None if is_chosen or not step.ids else step.ids[-1]
        created = _created(page)
        lowest = min(created) if created and not is_chosen else lowest
        if is_chosen and created:
            _look_at(audit, world, kind, walk, step, min(created), max(created), above=walk.above)
        elif kind.by_age and lowest is not None and _is_end_of_window(walk, page, number):
            _look_at(audit, world, kind, walk, step, lowest, walk.above, above=lowest)
        yield from audits.taken(audit, walk, step, found)
    if not walk.is_listed:
        is_short = walk.tally.cut_short
        rest = audits.step_of(kind, walk, open=sorted(walk.open), above=walk.above, is_listed=True)
        yield from audits.taken(audit, walk, rest if is_short else _bottom(audit, world, kind, walk), [])
    yield from _ask_for_open(audit, world, kind, walk)


def _is_known(audit: Audit, world: World, kind: Kind, page: Page) -> bool:
    """Return whether Stripe itself has sent an event of one of the sessions on *page*."""
    if kind is not kinds.SESSIONS:
        return True
    ids = audits.ids_of(page.objects)

    def read(cursor: Cursor) -> bool:
        cursor.execute(
            f"SELECT EXISTS (SELECT FROM unnest(%s::text[]) AS k (id) JOIN inbox AS i ON {_OF_ID}"
            " WHERE i.source <> 'observation')",
            (ids, world.account, world.livemode),
        )
        return cursor.fetchone() == (True,)

    return audit.context.within(read)


def _is_end_of_window(walk: Walk, page: Page, number: int) -> bool:
    return not page.has_more or walk.is_sample or number % WINDOW_PAGES == 0


def _created(page: Page) -> list[datetime]:
    moments = (witness.moment(each.body.get("created")) for each in page.objects)
    return [moment for moment in moments if isinstance(moment, datetime)]


def _pages(audit: Audit, world: World, kind: Kind, walk: Walk) -> Iterator[tuple[Page, bool]]:
    """Yield the remaining pages of a list, newest first, and whether each is a page of a sample."""
    if walk.is_listed:
        return
    if not walk.is_sample:
        for page in _followed(audit, world, kind, walk):
            is_enough = kind.is_sampled and page.has_more and _choose(audit, world, kind, walk, page)
            yield page, False
            if is_enough:
                break
    while walk.starts:
        start, walk.starts = walk.starts[0], walk.starts[1:]
        with suppress(CallDeclined, MissingAtStripe):
            yield next(pages_after(audit, world, kind, start)), True


def pages_after(audit: Audit, world: World, kind: Kind, after: str | None) -> Iterator[Page]:
    """Call the list of *kind*, page by page, behind the object *after*."""
    params = dict(kind.params)
    if audit.since is not None and kind.by_age:
        params["created"] = {"gte": int(audit.since.timestamp())}
    if after is not None:
        params["starting_after"] = after
    return audit.context.api.pages(world, *kind.path, lane=Lane.BACKFILL, **params)


def _followed(audit: Audit, world: World, kind: Kind, walk: Walk) -> Iterator[Page]:
    """Follow a list from where the walk is.

    If the object to go on after was deleted, the list goes on after an earlier one of its page. If all objects of the
    page were deleted, the list begins again at the top, once. A list that cannot be followed to its end is cut short.
    """
    while True:
        try:
            yield from pages_after(audit, world, kind, walk.after)
        except NotAnObject as error:
            _cut_short(walk, error)
        except (CallDeclined, MissingAtStripe) as error:
            if walk.after is not None and walk.go_back():
                continue
            if walk.after is not None and not walk.has_restarted:
                _begin_again(audit, kind, walk)
                continue
            _cut_short(walk, error)
        return


def _cut_short(walk: Walk, error: PayfoldError) -> None:
    """Note that the rest of the list is not known. Its rows are not asked for one by one: there may be many."""
    walk.tally.cut_short, walk.tally.reason = 1, str(error)
    _log.warning("audit.cut_short", object=walk.tally.object, reason=str(error))


def _begin_again(audit: Audit, kind: Kind, walk: Walk) -> None:
    """Forget the listed objects, but not the differences found."""
    walk.restart(audit.kept.begun - in_flight.SETTLED)
    audit.kept.add(audits.step_of(kind, walk, is_restart=True), [], now=audit.context.now())


def _choose(audit: Audit, world: World, kind: Kind, walk: Walk, page: Page) -> bool:
    """Choose sample pages after *page* if half of the allowed objects are listed and more exist; False otherwise."""
    half, listed = audit.customers_max // 2, walk.tally.listed
    if not listed < half <= listed + len(page.items):
        return False
    known = sql.SQL("FROM {} WHERE (account, livemode) = (%s, %s) AND {} AND {} >= %s").format(
        sql.Identifier(kind.table), sql.SQL(kind.rows), sql.SQL(kind.created)
    )
    older = sql.SQL("{} < %s ORDER BY md5(id || %s) LIMIT %s").format(sql.SQL(kind.created))
    bounds = (world.account, world.livemode, audit.since or kinds.LONG_AGO)
    sample = (min(_created(page), default=walk.above), str(audit.kept.seed), max(1, half // PAGE_ROWS))

    def choose(cursor: Cursor) -> tuple[int, list[str]]:
        cursor.execute(sql.SQL("SELECT count(*) {}").format(known), bounds)
        (count,) = cursor.fetchone() or (0,)
        cursor.execute(sql.SQL("SELECT id {} AND {}").format(known, older), (*bounds, *sample))
        return count, [id_ for (id_,) in cursor.fetchall()]

    count, starts = audit.context.within(choose)
    if count > audit.customers_max:
        walk.tally.sampled_of, walk.starts = count, starts
    return walk.is_sample


def _look_at(
    audit: Audit,
    world: World,
    kind: Kind,
    walk: Walk,
    step: Step,
    low: datetime,
    high: datetime,
    *,
    above: datetime,
) -> None:
    """Note in *step* the rows created after *low* and until *high* that no page has listed so far.

    A row without a creation time is searched by a later time, so an older page, which comes later, may list it.
    """
    rows = audit.context.within(partial(_between, world=world, kind=kind, low=low, high=high))
    listed = {*walk.ids, *walk.edge, *step.ids}
    step.open = sorted((walk.open | rows) - listed)
    step.above = above


def _between(
    cursor: Cursor, *, world: World, kind: Kind, low: datetime, high: datetime, is_bottom: bool = False
) -> set[str]:
    statement = sql.SQL("SELECT id FROM {} WHERE (account, livemode) = (%s, %s) AND {} AND {} <= %s AND {} {} %s")
    created = sql.SQL(kind.created)
    cursor.execute(
        statement.format(
            sql.Identifier(kind.table), sql.SQL(kind.rows), created, created, sql.SQL(">=" if is_bottom else ">")
        ),
        (world.account, world.livemode, high, low),
    )
    return {id_ for (id_,) in cursor.fetchall()}


def _bottom(audit: Audit, world: World, kind: Kind, walk: Walk) -> Step:
    """Return the step that ends a list, with the rows to ask for: those older than the list, and all if it is empty."""
    since = audit.since if kind.by_age else None
    rows = walk.open
    if not walk.is_sample:
        low = since or kinds.LONG_AGO
        below = audit.context.within(
            partial(_between, world=world, kind=kind, low=low, high=walk.above, is_bottom=True)
        )
        rows = rows | (below - walk.ids - walk.edge)
    if since is not None:
        rows = rows - audit.context.within(partial(_created_before, world=world, ids=rows, since=since))
    return audits.step_of(kind, walk, above=walk.above, open=sorted(rows), is_listed=True)


def _created_before(cursor: Cursor, *, world: World, ids: set[str], since: datetime) -> set[str]:
    """Return those of *ids* that have an event before *since*."""
    cursor.execute(
        f"SELECT DISTINCT k.id FROM unnest(%s::text[]) AS k (id) JOIN inbox AS i ON {_OF_ID} WHERE i.created < %s",
        (sorted(ids), world.account, world.livemode, since),
    )
    return {id_ for (id_,) in cursor.fetchall()}


def _ask_for_open(audit: Audit, world: World, kind: Kind, walk: Walk) -> Iterator[Difference]:
    """Ask for the object of each row that no page listed, and yield the differences."""
    while walk.open:
        asked = sorted(walk.open)[:PAGE_ROWS]
        found = [each for id_ in asked for each in asked_for(audit, world, kind, walk, walk.tally, id_)]
        yield from audits.taken(audit, walk, audits.step_of(kind, walk, ids=asked, is_listed=True), found)
    audits.taken(audit, walk, audits.step_of(kind, walk, is_listed=True, is_done=True), [])


def asked_for(audit: Audit, world: World, kind: Kind, walk: Walk, tally: Listed, id_: str) -> list[Difference]:
    """Ask for one object, and return the differences of its rows."""
    try:
        answer = audit.context.api.call(world, "get", *kind.path, id_, lane=Lane.BACKFILL, **_expanded(kind))
    except MissingAtStripe:
        return _missing(audit, world, kind, id_, is_known=walk.is_known)
    except CallDeclined:
        tally.unreadable += 1
        return []
    # An object outside of the state that the list was narrowed to, or a deleted one, is compared as if it were listed.
    return matching.compared(audit, world, tally, [answer])


def _expanded(kind: Kind) -> dict[str, Any]:
    """Return the parameters by which a single object is as complete as in its list."""
    names = [name.removeprefix("data.") for name in kind.params.get("expand", ())]
    return {"expand": names} if names else {}


def _missing(audit: Audit, world: World, kind: Kind, id_: str, *, is_known: bool) -> list[Difference]:
    if kind.name == "invoice" and _is_draft(audit.context, world, id_):
        return []  # A draft may be deleted at Stripe, and its row stays as it was.
    if audit.repair and is_known and kind is kinds.SESSIONS:
        matching.record(audit.context, checkout.missing(world, id_, now=audit.context.now()))
    return [Difference(kind.table, EXTRA, world.account, world.livemode, id_)]


def _is_draft(context: JobContext, world: World, invoice: str) -> bool:
    """Return whether *invoice* is a draft by its row, so that nothing was owed yet."""

    def read(cursor: Cursor) -> bool:
        cursor.execute(
            "SELECT status = 'draft' FROM invoices WHERE (account, livemode, id) = (%s, %s, %s)",
            (world.account, world.livemode, invoice),
        )
        return cursor.fetchone() == (True,)

    return context.within(read)
