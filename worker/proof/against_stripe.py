"""Compares the tables with Stripe itself: lists Stripe's objects, and finds the rows that differ from them.

proof/comparison.py compares an object with its row. Payment intents are not asked for: only canceled ones have rows,
and Stripe's list cannot be narrowed to those. Portal sessions cannot be read at Stripe at all.

Note [What has just changed is on its way]
    Stripe lists a refund at once, but its webhook comes about a second later. So where objects differ, Stripe is also
    asked for its events since a minute before the objects were listed. If such an event is of an object, or names it as
    its charge or its payment, the object is treated like one that was just created: it is not compared, and a repair
    does not record it. The next audit compares it. If a busy shop has more events than are asked for, or a restricted
    key may not list events, the differences are reported.
"""

import hashlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any, Final

import structlog
from psycopg import sql

from schemas import checkout, database, inbox, tables
from schemas.budget import Lane
from schemas.database import Cursor
from schemas.errors import CallDeclined, KeyRefused, MissingAtStripe, NotAnObject, NotServed, Refused
from schemas.inbox import Delivery
from schemas.observations import Answer, World
from schemas.progress import Progress, do_nothing
from schemas.stripe_api import PAGE_ROWS, Page
from schemas.version import version
from worker import folds
from worker.folding import projection
from worker.folding.claim import event_of_delivery
from worker.proof import comparison, difference, walks, witness
from worker.proof.comparison import Compared
from worker.proof.difference import EXTRA, Difference, Pair
from worker.proof.walks import Step, Walks
from worker.stripe_jobs import gaps, rounds
from worker.stripe_jobs.rounds import JobContext

NOT_ASKED: Final = "not asked, since no key serves it"
REFUSED: Final = "not asked any more, since Stripe refuses it"
ANOTHER_SANDBOX: Final = (
    "Stripe lists no session that an event here is of: is the API key of another account or sandbox? --repair records"
    " no session as missing."
)
CUSTOMERS: Final = 500
"""Customers that are looked up at once, to list their ledgers."""
CUSTOMERS_MAX: Final = 10_000
"""Customers that a run looks at. If there are more, half are the newest, half are random pages of a hundred others."""
WINDOW_PAGES: Final = 50
"""After so many pages the rows of the time that they span are searched for rows that no page listed."""
SETTLED: Final = timedelta(minutes=1)
"""The webhook of a younger object may be on its way."""
EVENT_PAGES_MAX: Final = 20
"""Where objects differ, up to so many pages of the newest events are asked for, of a hundred events each."""
_LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)

_log = structlog.get_logger()


@dataclass(slots=True)
class Listed:
    """The tally of one kind of object in one world: how many objects Stripe listed, and how many rows differ.

    Two kinds of objects are not compared: *archived* ones, since payloads that their rows are folded from are archived,
    and *unreadable* ones, which have no readable id in Stripe's answer, or which no fold can read. *only_by_map* counts
    differing rows that would stay the same if the listed objects were folded. *unstated* counts values that are absent
    from the API version of the recorded events. If only a sample was looked at, the tables hold *sampled_of* objects.
    *is_forbidden* is whether the key may not list the kind. If Stripe refuses a world, the world has a tally of its own
    with the *reason*. The tally of sessions has a *reason* if all of them belong to another sandbox.
    """

    account: str
    livemode: bool
    object: str
    listed: int = 0
    missing: int = 0
    extra: int = 0
    different: int = 0
    archived: int = 0
    unreadable: int = 0
    only_by_map: int = 0
    unstated: int = 0
    sampled_of: int = 0
    is_forbidden: bool = False
    reason: str = ""


_COUNTS: Final = tuple(each.name for each in fields(Listed) if each.type is int)
_OF_PAGES: Final = ("listed", "sampled_of", "unreadable")
"""Counted once for a page, when it is first listed, and not when its objects are compared again."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of object: its *name*, the *table* of its rows, the *path* of its list, and whether that is *by_age*.

    Payment links have no creation time, and lists of portal configurations cannot be narrowed by it. There are few of
    both, so all are looked at. *params* narrow the list to objects that have rows, and *rows* is the condition of the
    rows that the list can have.
    """

    name: str
    table: str
    path: tuple[str, ...]
    by_age: bool = True
    params: Mapping[str, Any] = field(default_factory=dict)
    rows: str = "true"
    is_sampled: bool = False

    @property
    def created(self) -> str:
        """The time by which rows are searched, as SQL: never earlier than the creation of the object."""
        return "coalesce(created, as_of)" if "created" in tables.metadata.tables[self.table].columns else "as_of"


_SESSIONS: Final = _Kind("checkout.session", "orders", ("checkout", "sessions"), params={"expand": ["data.line_items"]})
_KINDS: Final = (
    _SESSIONS,
    _Kind("payment_link", "payment_links", ("payment_links",), by_age=False),
    # Stripe does not list a deleted draft.
    _Kind("invoice", "invoices", ("invoices",), rows="NOT deleted"),
    _Kind("credit_note", "credit_notes", ("credit_notes",)),
    _Kind("refund", "refunds", ("refunds",)),
    _Kind("charge", "charges", ("charges",)),
    _Kind("dispute", "disputes", ("disputes",)),
    # Only paid ones have events, and the payments that invoices before basil report have no id of their own.
    _Kind(
        "invoice_payment",
        "invoice_payments",
        ("invoice_payments",),
        params={"status": "paid"},
        rows="id IS DISTINCT FROM invoice",
    ),
    _Kind("customer", "customers", ("customers",), rows="NOT deleted", is_sampled=True),
    _Kind("billing_portal.configuration", "portal_configurations", ("billing_portal", "configurations"), by_age=False),
)
_LEDGERS: Final = _Kind("customer_balance_transaction", "balance_transactions", ("customers",))
_WALKED: Final = (*_KINDS, _LEDGERS)


@dataclass(slots=True)
class _Shown:
    """Reports how many of *count* kinds are done, and how many objects were listed so far."""

    progress: Progress
    count: int
    rows: int = 0

    def kinds(self, done: int) -> None:
        self.progress("Asking Stripe", done, self.count)

    def listed(self, rows: int) -> None:
        self.rows += rows
        if rows:
            self.progress("Objects listed", self.rows, self.rows)


@dataclass(frozen=True, slots=True)
class _Audit:
    """The arguments of an audit, and its progress."""

    context: JobContext
    since: datetime | None
    repair: bool
    customers_max: int
    kept: Walks
    shown: _Shown


@dataclass(slots=True)
class _Walk:
    """How far the list of a kind was followed: see ``walks.Step``.

    *ids* were listed since *above*, and *edge* on the page before that. *page* are the ids of the last page; *after* is
    the last of them that is not known to be deleted.
    """

    tally: Listed
    above: datetime
    after: str | None = None
    ids: set[str] = field(default_factory=set)
    edge: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    starts: list[str] | None = None
    is_listed: bool = False
    is_done: bool = False
    kept: Counter[str] = field(default_factory=Counter)
    """The part of the tally that is in kept steps."""
    page: list[str] = field(default_factory=list)
    is_known: bool = False
    """Whether the list had an object that Stripe has sent an event of."""
    has_restarted: bool = False
    yielded: set[tuple[str, str, str, str | None]] = field(default_factory=set)

    @property
    def place(self) -> tuple[str, bool, str]:
        """The world and the kind."""
        return (self.tally.account, self.tally.livemode, self.tally.object)

    @property
    def uncounted(self) -> Counter[str]:
        """The part of the tally that is in no step yet."""
        return Counter({name: getattr(self.tally, name) for name in _COUNTS}) - self.kept

    def count(self, came: Mapping[str, int]) -> None:
        """Add the tally of a step."""
        for name, count in came.items():
            setattr(self.tally, name, getattr(self.tally, name) + count)
        self.kept.update(came)

    def news(self, found: Iterable[Difference]) -> list[Difference]:
        """Return the differences of *found* that were not yielded yet; each row and column is yielded once."""
        fresh = {(each.table, each.kind, each.id, each.column): each for each in found}
        fresh = {name: each for name, each in fresh.items() if name not in self.yielded}
        self.yielded.update(fresh)
        return list(fresh.values())

    def go_back(self) -> bool:
        """Let the list go on after the object before *after* on its page; False if there is none."""
        self.page = self.page[:-1]
        if self.page:
            self.after = self.page[-1]
        return bool(self.page)

    def restart(self, above: datetime) -> None:
        """Begin again at the top of the list."""
        self.tally, self.kept, self.above, self.after = Listed(*self.place), Counter(), above, None
        self.ids, self.edge, self.open = set(), set(), set()
        self.has_restarted = True

    def behind(self, step: Step) -> str | None:
        """Return the object after which the page of the next *step* began."""
        return self.starts[-1 - len(step.starts or ())] if self.starts else self.after

    @property
    def is_sample(self) -> bool:
        """Whether only chosen pages of the rest of the list are looked at."""
        return self.starts is not None

    def take(self, step: Step) -> None:
        """Go on by a step."""
        if step.after is not None:
            self.after, self.page = step.after, list(step.ids)
        self.starts, self.is_known = step.starts, self.is_known or step.is_known
        self.is_listed, self.is_done = step.is_listed, step.is_done
        self.ids.update(step.ids)
        self.open.difference_update(step.ids)
        if step.above is not None:
            self.above, self.open = step.above, set(step.open)
            self.edge, self.ids = set(step.ids), set()


def audit(
    context: JobContext,
    *,
    since: datetime | None = None,
    progress: Progress = do_nothing,
    repair: bool = False,
    seed: int | None = None,
    customers_max: int = CUSTOMERS_MAX,
) -> Generator[Listed | Difference, None, None]:
    """List Stripe's objects that were created *since*, and yield each difference, and a tally of each kind of object.

    An interrupted audit goes on where it was: see Note [An audit goes on where it was]. *seed* chooses the sample of
    *customers_max* customers; without a seed the date does.

    With *repair* differing objects are recorded as they were listed, their rows are folded again, and sessions that
    Stripe does not know are recorded as missing. The map is then not used, since a repair cannot correct what only the
    map finds.

    Raises:
        KeyRefused, NotServed: Stripe refuses every world; differences that were yielded until then are valid.
        Transient: Stripe cannot be asked now; the same holds.
    """
    projection.fold_pending(context.engine)
    for world in rounds.unserved(context):
        yield Listed(world.account, world.livemode, NOT_ASKED)
    worlds = rounds.served(context)
    place = context.engine.url
    arguments = [
        *(version(), place.host, place.port, place.database, [str(world) for world in worlds]),
        *(context.settings.stripe_api_base, _fingerprint(context)),
        *(since, repair, seed, customers_max),
    ]
    kept = walks.opened(
        context.settings.payfold_data_dir,
        arguments,
        seed=context.now().toordinal() if seed is None else seed,
        now=context.now(),
    )
    if kept.taken:
        _log.info("audit.resumed", begun=kept.begun.isoformat(), steps=sum(map(len, kept.taken.values())))
    try:
        shown = _Shown(progress, len(worlds) * len(_WALKED))
        yield from _run(_Audit(context, since, repair, customers_max, kept, shown), worlds)
        kept.end()
    finally:
        kept.write()
        if kept.is_kept:
            _log.warning("audit.interrupted", reason="the same command goes on from here, within a day")
        kept.close()


def _fingerprint(context: JobContext) -> str:
    """Return a hash of the set of keys, which reveals none of them."""
    keys = ((key.account, key.livemode, key.secret) for key in context.settings.api_keys)
    return hashlib.sha256(repr(sorted(keys)).encode()).hexdigest()


def repair(
    context: JobContext, *, since: datetime | None = None, progress: Progress = do_nothing, seed: int | None = None
) -> int:
    """Correct the differences that an audit finds, and return how many there were."""
    with closing(audit(context, since=since, progress=progress, repair=True, seed=seed)) as found:
        return sum(isinstance(each, Difference) for each in found)


def _run(audit: _Audit, worlds: Sequence[World]) -> Iterator[Listed | Difference]:
    """Audit each of the *worlds*. If Stripe refuses one, the others go on; if it refuses all, the audit ends."""
    refusals: list[KeyRefused | NotServed] = []
    for number, world in enumerate(worlds):
        try:
            yield from _audit_world(audit, world, number * len(_WALKED))
        except (KeyRefused, NotServed) as error:
            refusals.append(error)
            _log.warning("audit.refused", account=world.account, livemode=world.livemode, reason=str(error))
            yield Listed(world.account, world.livemode, REFUSED, reason=str(error))
    if refusals and len(refusals) == len(worlds):
        raise refusals[0]
    audit.shown.kinds(audit.shown.count)


def _audit_world(audit: _Audit, world: World, done: int) -> Iterator[Listed | Difference]:
    """Audit each kind that the key of *world* may list, after so many kinds that were *done* in others.

    Raises:
        KeyRefused, NotServed: the key may list nothing, or is not let in any more.
    """
    tallies: list[Listed] = []
    refusals: list[KeyRefused] = []
    is_let_in = False
    for number, kind in enumerate(_WALKED, start=done):
        audit.shown.kinds(number)
        walk = _begun(audit, world, kind)
        try:
            yield from _kept_of(audit, world, kind, walk)
            yield from _audited(audit, world, kind, walk)
        except KeyRefused as error:
            if not error.is_forbidden:
                raise
            refusals.append(error)
            walk.tally.is_forbidden = True
        else:
            # The ledgers prove no access: if no customer has a ledger, Stripe was not asked.
            is_let_in = is_let_in or kind is not _LEDGERS
        tallies.append(walk.tally)
        if is_let_in:
            yield from tallies
            tallies = []
    if not is_let_in:
        raise refusals[0]


def _begun(audit: _Audit, world: World, kind: _Kind) -> _Walk:
    return _Walk(Listed(world.account, world.livemode, kind.name), audit.kept.begun - SETTLED)


def _kept_of(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Iterator[Difference]:
    """Let *walk* go on by the steps that an interrupted audit kept of it, and yield their differences that remain."""
    for step in walks.since_restart(audit.kept.taken.get(walk.place, [])):
        if not step.differences or audit.repair:
            # A repair has corrected what it found.
            found = walks.found_in(step)
        else:
            again = Listed(*walk.place)
            found = _looked_again(audit, world, kind, walk, again, step)
            _count(again, found)
            step.tally = {**step.tally, **{name: getattr(again, name) for name in _COUNTS if name not in _OF_PAGES}}
        yield from walk.news(found)
        walk.count(step.tally)
        audit.shown.listed(step.tally.get("listed", 0))
        walk.take(step)


def _looked_again(audit: _Audit, world: World, kind: _Kind, walk: _Walk, tally: Listed, step: Step) -> list[Difference]:
    """Ask again for all objects of the next *step* of *walk*, and return the differences that there are now."""
    if kind is _LEDGERS:
        return _differing_in_ledger(audit, world, tally, str(step.after))
    ids, found = set(step.ids), []
    if not step.is_listed:
        with suppress(CallDeclined, MissingAtStripe):
            page = next(_list(audit, world, kind, walk.behind(step)))
            objects = [each for each in page.objects if each.id in ids]
            ids.difference_update(str(each.id) for each in objects)
            found = _compared(audit, world, tally, objects)
    # The page may have other objects by now, or no longer exist, so the rest are asked for one by one.
    return [*found, *(each for id_ in sorted(ids) for each in _asked(audit, world, kind, walk, tally, id_))]


def _audited(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Iterator[Difference]:
    if not walk.is_done:
        yield from _audit_ledgers(audit, world, walk) if kind is _LEDGERS else _audit_kind(audit, world, kind, walk)
    if kind is _SESSIONS and walk.tally.extra and not walk.is_known:
        walk.tally.reason = ANOTHER_SANDBOX


def _audit_kind(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Iterator[Difference]:
    lowest: datetime | None = None
    for number, (page, is_chosen) in enumerate(_pages(audit, world, kind, walk), start=1):
        # Before the comparison, since a repair records the objects.
        walk.is_known = walk.is_known or _is_known(audit, world, kind, page)
        found = _compared(audit, world, walk.tally, page.objects, page=page)
        step = _step(kind, walk, is_known=walk.is_known, ids=_ids(page.objects), starts=walk.starts)
        step.after = None if is_chosen or not step.ids else step.ids[-1]
        created = _created(page)
        lowest = min(created) if created and not is_chosen else lowest
        if is_chosen and created:
            _look_at(audit, world, kind, walk, step, min(created), max(created), above=walk.above)
        elif kind.by_age and lowest is not None and _is_end_of_window(walk, page, number):
            _look_at(audit, world, kind, walk, step, lowest, walk.above, above=lowest)
        yield from _taken(audit, walk, step, found)
    if not walk.is_listed:
        yield from _taken(audit, walk, _bottom(audit, world, kind, walk), [])
    yield from _ask_for_open(audit, world, kind, walk)


def _ids(objects: Sequence[Answer]) -> list[str]:
    """Return the ids that a row can have: files and PostgreSQL take neither half of a surrogate pair nor a NUL."""
    return [each.id for each in objects if each.id is not None and each.id.isprintable()]


def _is_known(audit: _Audit, world: World, kind: _Kind, page: Page) -> bool:
    """Return whether Stripe itself has sent an event of one of the sessions on *page*."""
    if kind is not _SESSIONS:
        return True
    ids = _ids(page.objects)

    def read(cursor: Cursor) -> bool:
        cursor.execute(
            "SELECT EXISTS (SELECT FROM inbox WHERE (account, livemode) = (%s, %s) AND object_id = ANY (%s)"
            " AND source <> 'observation')",
            (world.account, world.livemode, ids),
        )
        return cursor.fetchone() == (True,)

    return audit.context.within(read)


def _is_end_of_window(walk: _Walk, page: Page, number: int) -> bool:
    return not page.has_more or walk.is_sample or number % WINDOW_PAGES == 0


def _step(kind: _Kind, walk: _Walk, **values: Any) -> Step:  # noqa: ANN401 - of a step's own
    world = (walk.tally.account, walk.tally.livemode)
    return Step(*world, kind.name, {}, **values)


def _taken(audit: _Audit, walk: _Walk, step: Step, found: Sequence[Difference]) -> Sequence[Difference]:
    """Keep a *step* with the differences *found*, let the walk go on by it, and return the new ones."""
    _count(walk.tally, found)
    step.tally = dict(walk.uncounted)
    walk.kept.update(step.tally)
    audit.kept.add(step, found, now=audit.context.now())
    audit.shown.listed(step.tally.get("listed", 0))
    walk.take(step)
    return walk.news(found)


def _count(tally: Listed, found: Sequence[Difference]) -> None:
    for kind, _, __ in {(each.kind, each.table, each.id) for each in found}:
        setattr(tally, kind, getattr(tally, kind) + 1)


def _created(page: Page) -> list[datetime]:
    moments = (witness.moment(each.body.get("created")) for each in page.objects)
    return [moment for moment in moments if isinstance(moment, datetime)]


# ---- What Stripe lists ----


def _pages(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Iterator[tuple[Page, bool]]:
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
            yield next(_list(audit, world, kind, start)), True


def _list(audit: _Audit, world: World, kind: _Kind, after: str | None) -> Iterator[Page]:
    params = dict(kind.params)
    if audit.since is not None and kind.by_age:
        params["created"] = {"gte": int(audit.since.timestamp())}
    if after is not None:
        params["starting_after"] = after
    return audit.context.api.pages(world, *kind.path, lane=Lane.BACKFILL, **params)


def _followed(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Iterator[Page]:
    """Follow a list from where the walk is.

    If the object to go on after was deleted, the list goes on after an earlier one of its page. If all objects of the
    page were deleted, the list begins again at the top, once.
    """
    while True:
        try:
            yield from _list(audit, world, kind, walk.after)
        except (CallDeclined, MissingAtStripe):
            if walk.after is None:
                raise
            if not walk.go_back():
                if walk.has_restarted:
                    raise
                _begin_again(audit, kind, walk)
        else:
            return


def _begin_again(audit: _Audit, kind: _Kind, walk: _Walk) -> None:
    """Forget the listed objects, but not the differences found."""
    walk.restart(audit.kept.begun - SETTLED)
    audit.kept.add(_step(kind, walk, is_restart=True), [], now=audit.context.now())


def _choose(audit: _Audit, world: World, kind: _Kind, walk: _Walk, page: Page) -> bool:
    """Choose sample pages after *page* if half of the allowed objects are listed and more exist; False otherwise."""
    half, listed = audit.customers_max // 2, walk.tally.listed
    if not listed < half <= listed + len(page.items):
        return False
    known = sql.SQL("FROM {} WHERE (account, livemode) = (%s, %s) AND {} AND {} >= %s").format(
        sql.Identifier(kind.table), sql.SQL(kind.rows), sql.SQL(kind.created)
    )
    older = sql.SQL("{} < %s ORDER BY md5(id || %s) LIMIT %s").format(sql.SQL(kind.created))
    bounds = (world.account, world.livemode, audit.since or _LONG_AGO)
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


def _compared(
    audit: _Audit, world: World, tally: Listed, objects: Sequence[Answer], *, page: Page | None = None
) -> list[Difference]:
    """Compare *objects*, correct wrong rows if this is a repair, and return the differences."""
    if page is not None:
        tally.listed += len(page.items)
        tally.unreadable += page.unreadable
    settled = [each for each in objects if not _is_young(each, audit.context)]
    found = comparison.compare(audit.context, world, settled, by_map=not audit.repair)
    # An entry of a ledger never changes, so only a new one can be on its way, and those are not compared.
    is_fixed = tally.object == _LEDGERS.name
    if found.differences and not is_fixed and (moved := _moved(audit.context, world, settled)):
        settled = [each for each in settled if not moved & _names_of(each)]
        found = comparison.compare(audit.context, world, settled, by_map=not audit.repair)
    tally.archived += found.archived
    tally.unreadable += found.unreadable
    tally.only_by_map += found.only_by_map
    tally.unstated += found.unstated
    if found.wrong and audit.repair:
        audit.context.within(lambda opened: _put_right(opened, audit.context, world, found))
        projection.fold_pending(audit.context.engine)
    return found.differences


def _is_young(answer: Answer, context: JobContext) -> bool:
    """Return whether the object was created so shortly before Stripe answered that its webhook may be on its way.

    An open session has no event: the poll finds it, so it counts as young for a poll's time longer.
    """
    created = answer.body.get("created")
    if not isinstance(created, int):
        return False
    is_polled = answer.body.get("object") == "checkout.session" and answer.body.get("status") == "open"
    young = SETTLED + timedelta(seconds=context.settings.payfold_poll_seconds if is_polled else 0)
    # ``answer.at`` is when the call began, so an object created during the call is from shortly after that. Objects of
    # a test clock may be created far in the future.
    return -SETTLED.total_seconds() < answer.at - created < young.total_seconds()


def _moved(context: JobContext, world: World, objects: Sequence[Answer]) -> set[str]:
    """Return the ids in the events of the last minute: see Note [What has just changed is on its way]."""
    since = min(each.at for each in objects) - int(SETTLED.total_seconds())
    found: set[str] = set()
    try:
        pages = context.api.pages(world, "events", lane=Lane.BACKFILL, created={"gte": since})
        for page in islice(pages, EVENT_PAGES_MAX):
            for item in page.items:
                with suppress(Refused):
                    found |= _spoken_of(gaps.event_of(item, world, now=context.now()))
    except (CallDeclined, MissingAtStripe):
        pass
    except KeyRefused as error:
        if not error.is_forbidden:
            raise
    return found


def _spoken_of(delivery: Delivery) -> set[str]:
    """Return the ids of the objects that an event is of, and of the charge and the payment that it names."""
    found: set[str] = set()
    for one in folds.judge(event_of_delivery(delivery)).facts:
        named = (one.references.get("charge"), one.references.get("payment_intent"))
        found.update(each for each in (one.subject.id, one.subject.source, *named) if each is not None)
    return found


def _names_of(answer: Answer) -> set[str]:
    """Return the ids by which an event may name an object: a session also by its payment, which moves it."""
    is_session = answer.body.get("object") == "checkout.session"
    named = (answer.body.get("id"), answer.body.get("payment_intent") if is_session else None)
    return {each for each in named if isinstance(each, str)}


def _put_right(cursor: Cursor, context: JobContext, world: World, found: Compared) -> None:
    """Record the new observations of the wrong rows' objects, and queue all events of them to be folded again."""
    sources = set(found.wrong.values()) | set(found.wrong)
    context.record(
        cursor,
        [delivery for id_, delivery in found.deliveries.items() if id_ in sources or _customer_of(delivery) in sources],
    )
    cursor.execute(
        sql.SQL(
            """
            INSERT INTO pending (seq, again)
            SELECT seq, true FROM inbox WHERE (account, livemode) = (%(account)s, %(livemode)s)
                AND object_id = ANY (%(objects)s)
            UNION
            SELECT seq, true FROM mentions WHERE (account, livemode) = (%(account)s, %(livemode)s)
                AND object_id = ANY (%(objects)s)
            ON CONFLICT (seq) DO UPDATE SET again = true
            """
        ),
        {"account": world.account, "livemode": world.livemode, "objects": sorted(sources)},
    )


def _customer_of(delivery: Delivery) -> str | None:
    """Return the customer of a balance transaction; its rows are folded from the customer's events."""
    for one in folds.judge(event_of_delivery(delivery)).facts:
        if one.subject.table == "balances":
            return one.subject.source
    return None


def _audit_ledgers(audit: _Audit, world: World, walk: _Walk) -> Iterator[Difference]:
    """List the ledger of every customer who has a balance, or a row of a ledger."""
    while customers := audit.context.within(partial(_customers, world=world, after=walk.after or "")):
        for customer in customers:
            found = _differing_in_ledger(audit, world, walk.tally, customer)
            yield from _taken(audit, walk, _step(_LEDGERS, walk, after=customer), found)
        walk.after = customers[-1]
    _taken(audit, walk, _step(_LEDGERS, walk, is_done=True), [])


def _differing_in_ledger(audit: _Audit, world: World, tally: Listed, customer: str) -> list[Difference]:
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
    found = _compared(audit, world, tally, objects)
    if is_whole:
        read = partial(_invented, world=world, customer=customer, listed=_ids(objects), until=asked_at - SETTLED)
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
        ).format(sql.SQL(", ").join(map(sql.Identifier, names)), sql.Identifier(table.name), sql.SQL(_LEDGERS.created)),
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


# ---- What Stripe does not list ----


def _look_at(
    audit: _Audit,
    world: World,
    kind: _Kind,
    walk: _Walk,
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
    cursor: Cursor, *, world: World, kind: _Kind, low: datetime, high: datetime, is_bottom: bool = False
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


def _bottom(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Step:
    """Return the step that ends a list, with the rows to ask for: those older than the list, and all if it is empty."""
    since = audit.since if kind.by_age else None
    rows = walk.open
    if not walk.is_sample:
        low = since or _LONG_AGO
        below = audit.context.within(
            partial(_between, world=world, kind=kind, low=low, high=walk.above, is_bottom=True)
        )
        rows = rows | (below - walk.ids - walk.edge)
    if since is not None:
        rows = rows - audit.context.within(partial(_created_before, world=world, ids=rows, since=since))
    return _step(kind, walk, above=walk.above, open=sorted(rows), is_listed=True)


def _created_before(cursor: Cursor, *, world: World, ids: set[str], since: datetime) -> set[str]:
    """Return those of *ids* that have an event before *since*."""
    cursor.execute(
        "SELECT DISTINCT object_id FROM inbox WHERE (account, livemode) = (%s, %s) AND object_id = ANY (%s)"
        " AND created < %s",
        (world.account, world.livemode, sorted(ids), since),
    )
    return {id_ for (id_,) in cursor.fetchall()}


def _ask_for_open(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Iterator[Difference]:
    """Ask for the object of each row that no page listed, and yield the differences."""
    while walk.open:
        asked = sorted(walk.open)[:PAGE_ROWS]
        found = [each for id_ in asked for each in _asked(audit, world, kind, walk, walk.tally, id_)]
        yield from _taken(audit, walk, _step(kind, walk, ids=asked, is_listed=True), found)
    _taken(audit, walk, _step(kind, walk, is_listed=True, is_done=True), [])


def _asked(audit: _Audit, world: World, kind: _Kind, walk: _Walk, tally: Listed, id_: str) -> list[Difference]:
    try:
        answer = audit.context.api.call(world, "get", *kind.path, id_, lane=Lane.BACKFILL, **_expanded(kind))
    except MissingAtStripe:
        return _missing(audit, world, kind, id_, is_known=walk.is_known)
    except CallDeclined:
        tally.unreadable += 1
        return []
    # An object outside of the state that the list was narrowed to, or a deleted one, is compared as if it were listed.
    return _compared(audit, world, tally, [answer])


def _expanded(kind: _Kind) -> dict[str, Any]:
    """Return the parameters by which a single object is as complete as in its list."""
    names = [name.removeprefix("data.") for name in kind.params.get("expand", ())]
    return {"expand": names} if names else {}


def _missing(audit: _Audit, world: World, kind: _Kind, id_: str, *, is_known: bool) -> list[Difference]:
    if kind.name == "invoice" and _is_draft(audit.context, world, id_):
        return []  # A draft may be deleted at Stripe, and its row stays as it was.
    if audit.repair and is_known and kind is _SESSIONS:
        _record(audit.context, checkout.missing(world, id_, now=audit.context.now()))
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


def _record(context: JobContext, delivery: Delivery) -> None:
    with database.transaction(context.engine) as connection, database.cursor(connection) as cursor:
        inbox.record(cursor, [delivery])
    projection.fold_pending(context.engine)
