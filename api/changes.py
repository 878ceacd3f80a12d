"""The change feed: what a shop reads to act once on what happened."""

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, Engine, text
from starlette.concurrency import run_in_threadpool

from api import problems, tasks
from api.reads import ROWS_MAX, FilterText, reading
from api.tokens import SeesPersonalData, require
from schemas import feed, stopping
from schemas.answers import Change, Changes, PersonalData
from schemas.errors import DatabaseAway
from schemas.feed import FeedPage, Selection
from schemas.kinds import Choice, Subject, chosen
from schemas.logs import Seldom

WAIT_SECONDS_MAX: Final = 25
LOOK_SECONDS: Final = 0.2
LOOK_ROWS_MAX: Final = 500
"""New changes that one look compares with the filters of the waiting readers."""
STOP_SECONDS_MAX: Final = 1

_seldom: Final = Seldom()

router: Final = APIRouter(prefix="/v1", dependencies=[Depends(require("read"))])


class _Waiter:
    """A waiting reader, and the number of the last change that was compared with the reader's selection."""

    def __init__(self, after: int, wanted: Selection) -> None:
        self.after = after
        self.wanted = wanted
        self.is_called = asyncio.Event()

    def notice(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """Call the reader if one of *changes*, the next after the last ones, is wanted."""
        if any(change["seq"] > self.after and self.wanted.wants(change) for change in changes):
            self.is_called.set()
        elif changes:
            self.after = max(self.after, changes[-1]["seq"])


class FeedWatcher:
    """Looks for new changes on behalf of all requests that wait for one.

    LISTEN needs a session of its own, which a pooler in transaction mode does not give. One look costs one index
    probe for all waiting requests together, and there is no look while no request waits.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiters: set[_Waiter] = set()
        self._anyone_waits = asyncio.Event()
        self._task = tasks.start("lookout", self._work)

    async def wait(self, after: int, seconds: float, wanted: Selection = feed.ALL) -> None:
        """Return when a change after *after* is *wanted*, when *seconds* are up, or when the process is to stop."""
        waiter = _Waiter(after, wanted)
        self._waiters.add(waiter)
        self._anyone_waits.set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await waiter.is_called.wait()
        finally:
            self._waiters.discard(waiter)

    async def stop(self) -> None:
        """Stop looking, and give up on a look that does not end."""
        self._task.cancel()
        await asyncio.wait([self._task], timeout=STOP_SECONDS_MAX)

    async def _work(self) -> None:
        while True:
            await self._anyone_waits.wait()
            is_more = False
            try:
                is_more = await self._look([waiter for waiter in self._waiters if not waiter.is_called.is_set()])
            except DatabaseAway:
                _seldom.warning("changes.not_looked_at", kind="DatabaseAway")
            if stopping.has_begun():
                # A process that is to stop has 30 seconds, and the reader asks again anyway.
                for waiter in self._waiters:
                    waiter.is_called.set()
            if not self._waiters:
                self._anyone_waits.clear()
            await asyncio.sleep(0 if is_more else LOOK_SECONDS)

    async def _look(self, waiters: Sequence[_Waiter]) -> bool:
        """Wake those of *waiters* that a new change is for, and return whether there are more changes to look at."""
        if not waiters:
            return False
        changes = await run_in_threadpool(self._latest, min(waiter.after for waiter in waiters))
        for waiter in waiters:
            waiter.notice(changes)
        return len(changes) == LOOK_ROWS_MAX

    def _latest(self, after: int) -> Sequence[Mapping[str, Any]]:
        with reading(self._engine) as connection:
            return feed.latest(connection, after, LOOK_ROWS_MAX)


class FeedFilters(BaseModel):
    """What the feed can be asked."""

    model_config = ConfigDict(extra="forbid")

    after: int = Field(0, ge=0, le=2**63 - 1, description="`next_after` of the page before")
    wait: float = Field(0, ge=0, le=WAIT_SECONDS_MAX, description="seconds to wait for a change where there is none")
    limit: int = Field(ROWS_MAX, ge=1, le=ROWS_MAX, description="changes on a page")
    account: FilterText = Field(None, description="only changes of this account")
    livemode: bool | None = Field(None, description="only live changes, or only those of test mode")
    kind: list[Choice] = Field([], description="only these kinds, each a `kind=` of its own")
    subject: Subject | None = Field(None, description="only changes of this kind of object")
    subject_id: FilterText = Field(None, description="only changes of this object")

    @property
    def wanted(self) -> Selection:
        """The changes that are asked for."""
        kinds = chosen(self.kind) if self.kind else None
        return feed.selection(
            account=self.account, livemode=self.livemode, kind=kinds, subject=self.subject, subject_id=self.subject_id
        )


@router.get("/changes", tags=["changes"], response_model_exclude_unset=True, responses=problems.declared(410))
async def list_changes(
    request: Request, filters: Annotated[FeedFilters, Query()], sees_personal_data: SeesPersonalData
) -> Changes:
    """List changes after a cursor, in commit order, waiting for one where none is there yet.

    With filters a page may be empty and `has_more` true: go on after `next_after`, which has moved past what was not
    asked for. A cursor beyond the last number that was ever given is answered 410: the database was restored from an
    older backup.
    """
    engine, wanted, deadline = request.app.state.engine, filters.wanted, time.monotonic() + filters.wait
    after = filters.after
    while True:
        page = await run_in_threadpool(_read, engine, after, filters.limit, wanted, personal=sees_personal_data)
        left, after = deadline - time.monotonic(), page.next_after
        if page.rows or page.has_more or left <= 0 or stopping.has_begun():
            return Changes(
                data=[Change.model_validate(row) for row in page.rows], next_after=after, has_more=page.has_more
            )
        await request.app.state.feed_watcher.wait(after, left, wanted)


def _read(engine: Engine, after: int, limit: int, wanted: Selection, *, personal: bool) -> FeedPage:
    with reading(engine) as connection:
        page = feed.page(connection, after, limit, wanted)
        if not personal or not page.rows:
            return page
        rows = _with_personal_data(connection, page.rows)
    return FeedPage(rows, page.next_after, page.has_more)


# The feed itself holds nothing personal. The present personal data of the object or its customer is joined for a page.
_PERSONAL: Final = text("""
WITH k AS (
    SELECT * FROM unnest(
        CAST(:seqs AS bigint[]), CAST(:subjects AS text[]), CAST(:accounts AS text[]), CAST(:modes AS boolean[]),
        CAST(:ids AS text[])
    ) AS k (seq, subject, account, livemode, id)
)
SELECT k.seq, p.customer_email, p.metadata, p.shipping, p.memo, p.lines FROM k CROSS JOIN LATERAL (
    SELECT o.customer_email, o.metadata, o.shipping, NULL AS memo, CASE WHEN o.lines_complete THEN (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
            'id', l.id, 'description', l.description, 'price', l.price, 'product', l.product, 'quantity', l.quantity
        ) ORDER BY l.id), '[]')
        FROM order_lines AS l WHERE (l.account, l.livemode, l.order_id) = (o.account, o.livemode, o.id)
    ) END AS lines
    FROM orders AS o WHERE k.subject = 'order' AND (o.account, o.livemode, o.id) = (k.account, k.livemode, k.id)
    UNION ALL
    SELECT NULL, l.metadata, NULL, NULL, NULL FROM payment_links AS l
    WHERE k.subject = 'payment_link' AND (l.account, l.livemode, l.id) = (k.account, k.livemode, k.id)
    UNION ALL
    SELECT c.email, c.metadata, NULL, NULL, NULL FROM customers AS c
    WHERE k.subject = 'balance' AND (c.account, c.livemode, c.id) = (k.account, k.livemode, k.id)
    UNION ALL
    SELECT c.email, NULL, NULL, NULL, NULL FROM invoices AS i
    LEFT JOIN customers AS c ON (c.account, c.livemode, c.id) = (i.account, i.livemode, i.customer)
    WHERE k.subject = 'invoice' AND (i.account, i.livemode, i.id) = (k.account, k.livemode, k.id)
    UNION ALL
    SELECT c.email, NULL, NULL, n.memo, CASE WHEN n.lines_complete THEN (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
            'id', l.id, 'description', l.description, 'price', NULL, 'product', NULL, 'quantity', l.quantity
        ) ORDER BY l.id), '[]')
        FROM credit_note_lines AS l WHERE (l.account, l.livemode, l.credit_note) = (n.account, n.livemode, n.id)
    ) END
    FROM credit_notes AS n
    LEFT JOIN customers AS c ON (c.account, c.livemode, c.id) = (n.account, n.livemode, n.customer)
    WHERE k.subject = 'credit_note' AND (n.account, n.livemode, n.id) = (k.account, k.livemode, k.id)
) AS p
""")


def _with_personal_data(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return *rows*, each with its personal data, which is all null if the row is gone."""
    keys = {"seqs": "seq", "subjects": "subject", "accounts": "account", "modes": "livemode", "ids": "subject_id"}
    found = connection.execute(_PERSONAL, {name: [row[of] for row in rows] for name, of in keys.items()}).mappings()
    known = {row["seq"]: {name: value for name, value in row.items() if name != "seq"} for row in found}
    nothing = dict.fromkeys(PersonalData.model_fields)
    return [{**row, "personal": known.get(row["seq"], nothing)} for row in rows]
