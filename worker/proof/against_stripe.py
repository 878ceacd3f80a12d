"""Compares the tables with Stripe itself: lists its objects, and finds the rows that are not what it lists.

How an object and its row are compared is in proof/comparison.py. Payment intents are not asked for: of these only
canceled ones have rows, and Stripe's list cannot be narrowed to them. Portal sessions cannot be read at Stripe at all.

Note [What has just changed is on its way]
    Stripe lists a refund at once, and its webhook is a second away. So where objects differ, Stripe is also asked for
    its events since a minute before the objects were listed. Objects that such an event is of, or names as its charge
    or its payment, are no more compared than those that were just created, nor does a repair record them: the next
    audit compares them. A busy shop has more events than are asked for, and a restricted key may not list any; then
    what differs is reported.
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
from sqlalchemy import Engine

from schemas import checkout, database, inbox, tables
from schemas.budget import Lane
from schemas.database import Cursor
from schemas.errors import CallDeclined, KeyRefused, MissingAtStripe, NotAnObject, NotServed, Refused
from schemas.inbox import Delivery
from schemas.observations import Answer, World
from schemas.stripe_api import PAGE_ROWS, Page
from schemas.version import version
from worker import folds
from worker.folding import projection
from worker.folding.claim import event_of_delivery
from worker.proof import comparison, difference, walks, witness
from worker.proof.comparison import Found
from worker.proof.difference import EXTRA, Difference, Pair
from worker.proof.rebuild import Progress, nobody
from worker.proof.walks import Step, Walks
from worker.stripe_jobs import gaps, rounds
from worker.stripe_jobs.rounds import Desk

NOT_ASKED: Final = "not asked, since no key serves it"
REFUSED: Final = "not asked any more, since Stripe refuses it"
ANOTHER_SANDBOX: Final = (
    "Stripe lists no session that an event here is of: is the API key of another account or sandbox? --repair records"
    " no session as missing."
)
CUSTOMERS: Final = 500
"""Customers whose ledgers are looked up at once."""
CUSTOMERS_MAX: Final = 10_000
"""Customers that a run looks at: of more, the newest half of these, and pages of a hundred at random among the rest."""
WINDOW_PAGES: Final = 50
"""After so many pages the rows of the time that they span are looked at, for those that no page listed."""
SETTLED: Final = timedelta(minutes=1)
"""What is younger may be on its way."""
EVENT_PAGES_MAX: Final = 20
"""So many pages of a hundred events, the newest, are asked for where objects differ."""
_LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)

_log = structlog.get_logger()


@dataclass(slots=True)
class Listed:
    """What came of the objects of one kind in one world: how many Stripe listed, and how many rows differ.

    Not compared are *archived* ones, whose rows are folded from payloads that are not at hand, and *unreadable* ones,
    which have no readable id in Stripe's answer, or which no fold can read. *only_by_map* counts the different rows
    that folding what Stripe lists would leave as they are, *unstated* the values that the API version of the recorded
    events lacks. Where only a sample was looked at, the tables hold
    *sampled_of* objects. Where the key may not list the kind, it *is_forbidden*. A world that Stripe does not let us
    look at has a tally of its own, with the *reason*; one of sessions has it where all of them are another's.
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
"""Counted once for a page, however its objects compare."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of object: its *name*, the *table* of its rows, the *path* of its list, and whether that is *by_age*.

    Payment links do not tell when they were created, and lists of portal configurations cannot be narrowed by it; there
    are few of both, so all are looked at. *params* narrow the list to what has rows; *rows* are those that it can have.
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
        """The time by which a row is looked for: never before its object was created."""
        return "coalesce(created, as_of)" if "created" in tables.metadata.tables[self.table].columns else "as_of"


_SESSIONS: Final = _Kind("checkout.session", "orders", ("checkout", "sessions"), params={"expand": ["data.line_items"]})
_KINDS: Final = (
    _SESSIONS,
    _Kind("payment_link", "payment_links", ("payment_links",), by_age=False),
    # A draft that was deleted is not listed.
    _Kind("invoice", "invoices", ("invoices",), rows="NOT deleted"),
    _Kind("credit_note", "credit_notes", ("credit_notes",)),
    _Kind("refund", "refunds", ("refunds",)),
    _Kind("charge", "charges", ("charges",)),
    _Kind("dispute", "disputes", ("disputes",)),
    # Others have no events, and the payments that invoices before basil report have no id of their own.
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
    """What an audit was asked for, and how far it has come."""

    desk: Desk
    since: datetime | None
    repair: bool
    customers_max: int
    kept: Walks
    shown: _Shown


@dataclass(slots=True)
class _Walk:
    """How far the list of a kind was followed: see ``walks.Step``.

    *ids* were listed since *above*, and *edge* on the page before that. *page* are those of the last page, of which
    *after* is the last that is not known to be deleted.
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
    """What of the tally is in steps that were kept."""
    page: list[str] = field(default_factory=list)
    is_known: bool = False
    """Whether an object was listed that an event here is of."""
    has_restarted: bool = False
    yielded: set[tuple[str, str, str, str | None]] = field(default_factory=set)

    @property
    def place(self) -> tuple[str, bool, str]:
        """The world and the kind."""
        return (self.tally.account, self.tally.livemode, self.tally.object)

    @property
    def uncounted(self) -> Counter[str]:
        """What of the tally is in no step yet."""
        return Counter({name: getattr(self.tally, name) for name in _COUNTS}) - self.kept

    def count(self, came: Mapping[str, int]) -> None:
        """Add to the tally what a step came to."""
        for name, count in came.items():
            setattr(self.tally, name, getattr(self.tally, name) + count)
        self.kept.update(came)

    def news(self, found: Iterable[Difference]) -> list[Difference]:
        """Return what of *found* was not yielded yet, which is once for each row and column."""
        fresh = {(each.table, each.kind, each.id, each.column): each for each in found}
        fresh = {name: each for name, each in fresh.items() if name not in self.yielded}
        self.yielded.update(fresh)
        return list(fresh.values())

    def go_back(self) -> bool:
        """Go on behind the object before *after* on its page; False where there is none."""
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
        """Return the object behind which the page of the next *step* began."""
        return self.starts[-1 - len(step.starts or ())] if self.starts else self.after

    @property
    def is_sample(self) -> bool:
        """Whether the rest of the list is only looked at in pages that were chosen."""
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
    desk: Desk,
    *,
    since: datetime | None = None,
    progress: Progress = nobody,
    repair: bool = False,
    seed: int | None = None,
    customers_max: int = CUSTOMERS_MAX,
) -> Generator[Listed | Difference, None, None]:
    """List what Stripe has that was created *since*, and yield each difference, and a tally of each kind of object.

    One that was interrupted goes on where it was: see Note [An audit goes on where it was]. *seed* chooses the sample
    of *customers_max* customers, without one the day does.

    With *repair* what differs is recorded as it was listed, its rows are folded again, and sessions that Stripe does
    not know are recorded as missing; the map is left out, since it puts nothing right.

    Raises:
        KeyRefused, NotServed: Stripe lets us look at no world; what was found until then stands.
        Transient: Stripe does not let us look now; the same.
    """
    _fold(desk.engine)
    for world in rounds.unserved(desk):
        yield Listed(world.account, world.livemode, NOT_ASKED)
    worlds = rounds.served(desk)
    place = desk.engine.url
    arguments = [
        *(version(), place.host, place.port, place.database, [str(world) for world in worlds]),
        *(desk.settings.stripe_api_base, _fingerprint(desk)),
        *(since, repair, seed, customers_max),
    ]
    kept = walks.opened(
        desk.settings.payfold_data_dir, arguments, seed=desk.now().toordinal() if seed is None else seed, now=desk.now()
    )
    if kept.taken:
        _log.info("audit.resumed", begun=kept.begun.isoformat(), steps=sum(map(len, kept.taken.values())))
    try:
        shown = _Shown(progress, len(worlds) * len(_WALKED))
        yield from _go(_Audit(desk, since, repair, customers_max, kept, shown), worlds)
        kept.end()
    finally:
        kept.write()
        if kept.is_kept:
            _log.warning("audit.interrupted", reason="the same command goes on from here, within a day")
        kept.close()


def _fingerprint(desk: Desk) -> str:
    """Return a hash that differs for another set of keys, and shows none of them."""
    keys = ((key.account, key.livemode, key.secret) for key in desk.settings.api_keys)
    return hashlib.sha256(repr(sorted(keys)).encode()).hexdigest()


def repair(desk: Desk, *, since: datetime | None = None, progress: Progress = nobody, seed: int | None = None) -> int:
    """Put right what an audit finds, and return how many differences that were."""
    with closing(audit(desk, since=since, progress=progress, repair=True, seed=seed)) as found:
        return sum(isinstance(each, Difference) for each in found)


def _fold(engine: Engine) -> None:
    while projection.run_once(engine, now=datetime.now(UTC)):
        pass


def _go(audit: _Audit, worlds: Sequence[World]) -> Iterator[Listed | Difference]:
    """Audit each of the *worlds*; one that Stripe refuses costs the others nothing, and all of them end the audit."""
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
            # Without customers who have a ledger none is asked for.
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
    """Let *walk* go on by the steps that an interrupted audit kept of it, and yield what differs of what they found."""
    for step in walks.since_restart(audit.kept.taken.get(walk.place, [])):
        if not step.differences or audit.repair:
            # What a repair found, it has put right.
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
    """Ask again for all that the next *step* of *walk* is of, and return what differs by now."""
    if kind is _LEDGERS:
        return _differing_in_ledger(audit, world, tally, str(step.after))
    ids, found = set(step.ids), []
    if not step.is_listed:
        with suppress(CallDeclined, MissingAtStripe):
            page = next(_list(audit, world, kind, walk.behind(step)))
            objects = [each for each in page.objects if each.id in ids]
            ids.difference_update(str(each.id) for each in objects)
            found = _compared(audit, world, tally, objects)
    # By now others may be on the page, and it may be gone.
    return [*found, *(each for id_ in sorted(ids) for each in _asked(audit, world, kind, walk, tally, id_))]


def _audited(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Iterator[Difference]:
    if not walk.is_done:
        yield from _audit_ledgers(audit, world, walk) if kind is _LEDGERS else _audit_kind(audit, world, kind, walk)
    if kind is _SESSIONS and walk.tally.extra and not walk.is_known:
        walk.tally.reason = ANOTHER_SANDBOX


def _audit_kind(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Iterator[Difference]:
    lowest: datetime | None = None
    for number, (page, is_chosen) in enumerate(_pages(audit, world, kind, walk), start=1):
        # Asked first, since a repair records what was not known.
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
    """Return the ids that a row can have: neither a file nor PostgreSQL takes half of a surrogate pair, or a NUL."""
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

    return audit.desk.within(read)


def _is_end_of_window(walk: _Walk, page: Page, number: int) -> bool:
    return not page.has_more or walk.is_sample or number % WINDOW_PAGES == 0


def _step(kind: _Kind, walk: _Walk, **values: Any) -> Step:  # noqa: ANN401 - of a step's own
    world = (walk.tally.account, walk.tally.livemode)
    return Step(*world, kind.name, {}, **values)


def _taken(audit: _Audit, walk: _Walk, step: Step, found: Sequence[Difference]) -> Sequence[Difference]:
    """Keep a *step* with what was *found*, go on by it, and return what was found."""
    _count(walk.tally, found)
    step.tally = dict(walk.uncounted)
    walk.kept.update(step.tally)
    audit.kept.add(step, found, now=audit.desk.now())
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
    """Yield the pages of a list that are left, newest first, and whether each is one of a sample."""
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
    return audit.desk.api.pages(world, *kind.path, lane=Lane.BACKFILL, **params)


def _followed(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Iterator[Page]:
    """Follow a list from where the walk is.

    Where that object was deleted, an earlier one of its page is gone on behind. Where all were, so is the list's top.
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
    """Forget what was listed, but not what was found."""
    walk.restart(audit.kept.begun - SETTLED)
    audit.kept.add(_step(kind, walk, is_restart=True), [], now=audit.desk.now())


def _choose(audit: _Audit, world: World, kind: _Kind, walk: _Walk, page: Page) -> bool:
    """Choose pages of a sample behind *page* where half of what may be listed was and there is too much; else False."""
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

    count, starts = audit.desk.within(choose)
    if count > audit.customers_max:
        walk.tally.sampled_of, walk.starts = count, starts
    return walk.is_sample


def _compared(
    audit: _Audit, world: World, tally: Listed, objects: Sequence[Answer], *, page: Page | None = None
) -> list[Difference]:
    """Compare *objects*, put right what is wrong where that is wanted, and return what differs."""
    if page is not None:
        tally.listed += len(page.items)
        tally.unreadable += page.unreadable
    settled = [each for each in objects if not _is_young(each, audit.desk)]
    found = comparison.compare(audit.desk, world, settled, by_map=not audit.repair)
    # An entry of a ledger never changes, so one that is on its way was just created.
    is_fixed = tally.object == _LEDGERS.name
    if found.differences and not is_fixed and (moved := _moved(audit.desk, world, settled)):
        settled = [each for each in settled if not moved & _names_of(each)]
        found = comparison.compare(audit.desk, world, settled, by_map=not audit.repair)
    tally.archived += found.archived
    tally.unreadable += found.unreadable
    tally.only_by_map += found.only_by_map
    tally.unstated += found.unstated
    if found.wrong and audit.repair:
        audit.desk.within(lambda opened: _put_right(opened, audit.desk, world, found))
        _fold(audit.desk.engine)
    return found.differences


def _is_young(answer: Answer, desk: Desk) -> bool:
    """Return whether the object was created so short a time before Stripe answered that it may be on its way.

    No event reports an open session: the poll finds it.
    """
    created = answer.body.get("created")
    if not isinstance(created, int):
        return False
    is_polled = answer.body.get("object") == "checkout.session" and answer.body.get("status") == "open"
    young = SETTLED + timedelta(seconds=desk.settings.payfold_poll_seconds if is_polled else 0)
    # Objects of a test clock may be created far ahead, and others while the call was made, as of whose begin it is.
    return -SETTLED.total_seconds() < answer.at - created < young.total_seconds()


def _moved(desk: Desk, world: World, objects: Sequence[Answer]) -> set[str]:
    """Return what events speak of that are no older than a minute: see Note [What has just changed is on its way]."""
    since = min(each.at for each in objects) - int(SETTLED.total_seconds())
    found: set[str] = set()
    try:
        pages = desk.api.pages(world, "events", lane=Lane.BACKFILL, created={"gte": since})
        for page in islice(pages, EVENT_PAGES_MAX):
            for item in page.items:
                with suppress(Refused):
                    found |= _spoken_of(gaps.event_of(item, world, now=desk.now()))
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
    """Return the ids by which an event may speak of an object: a payment moves its session."""
    is_session = answer.body.get("object") == "checkout.session"
    named = (answer.body.get("id"), answer.body.get("payment_intent") if is_session else None)
    return {each for each in named if isinstance(each, str)}


def _put_right(cursor: Cursor, desk: Desk, world: World, found: Found) -> None:
    """Record what is news of the wrong rows' objects, and let all that the inbox says of them be folded again."""
    sources = set(found.wrong.values()) | set(found.wrong)
    desk.record(
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
    """Return whose ledger a balance transaction is of: its rows are folded from the customer's events."""
    for one in folds.judge(event_of_delivery(delivery)).facts:
        if one.subject.table == "balances":
            return one.subject.source
    return None


def _audit_ledgers(audit: _Audit, world: World, walk: _Walk) -> Iterator[Difference]:
    """List the ledger of every customer who has a balance, or a row of a ledger."""
    while customers := audit.desk.within(partial(_customers, world=world, after=walk.after or "")):
        for customer in customers:
            found = _differing_in_ledger(audit, world, walk.tally, customer)
            yield from _taken(audit, walk, _step(_LEDGERS, walk, after=customer), found)
        walk.after = customers[-1]
    _taken(audit, walk, _step(_LEDGERS, walk, is_done=True), [])


def _differing_in_ledger(audit: _Audit, world: World, tally: Listed, customer: str) -> list[Difference]:
    """Return how a customer's rows differ from the ledger at Stripe; one that cannot be read counts as unreadable."""
    objects: list[Answer] = []
    before, asked_at = tally.unreadable, audit.desk.now()
    try:
        for page in audit.desk.api.pages(world, "customers", customer, "balance_transactions", lane=Lane.BACKFILL):
            tally.listed += len(page.items)
            tally.unreadable += page.unreadable
            # All as of the first page, which is the earliest.
            objects += [replace(each, at=objects[0].at if objects else page.at) for each in page.objects]
    except MissingAtStripe:
        # A deleted customer has no ledger any more.
        tally.unreadable += not audit.desk.within(partial(_is_deleted, world=world, customer=customer))
        return []
    except (CallDeclined, NotAnObject):
        tally.unreadable += 1
    is_whole = tally.unreadable == before
    found = _compared(audit, world, tally, objects)
    if is_whole:
        read = partial(_invented, world=world, customer=customer, listed=_ids(objects), until=asked_at - SETTLED)
        found += audit.desk.within(read)
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

    A row without the time at which its object was created is looked for by a later one, and listed by a later page.
    """
    rows = audit.desk.within(partial(_between, world=world, kind=kind, low=low, high=high))
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
    """Return the step that ends a list: older than all of it, or all where nothing was listed, are rows to ask for."""
    since = audit.since if kind.by_age else None
    rows = walk.open
    if not walk.is_sample:
        low = since or _LONG_AGO
        below = audit.desk.within(partial(_between, world=world, kind=kind, low=low, high=walk.above, is_bottom=True))
        rows = rows | (below - walk.ids - walk.edge)
    if since is not None:
        rows = rows - audit.desk.within(partial(_created_before, world=world, ids=rows, since=since))
    return _step(kind, walk, above=walk.above, open=sorted(rows), is_listed=True)


def _created_before(cursor: Cursor, *, world: World, ids: set[str], since: datetime) -> set[str]:
    """Return those of *ids* that an event before *since* is of."""
    cursor.execute(
        "SELECT DISTINCT object_id FROM inbox WHERE (account, livemode) = (%s, %s) AND object_id = ANY (%s)"
        " AND created < %s",
        (world.account, world.livemode, sorted(ids), since),
    )
    return {id_ for (id_,) in cursor.fetchall()}


def _ask_for_open(audit: _Audit, world: World, kind: _Kind, walk: _Walk) -> Iterator[Difference]:
    """Ask for each row that no page listed, and yield what differs."""
    while walk.open:
        asked = sorted(walk.open)[:PAGE_ROWS]
        found = [each for id_ in asked for each in _asked(audit, world, kind, walk, walk.tally, id_)]
        yield from _taken(audit, walk, _step(kind, walk, ids=asked, is_listed=True), found)
    _taken(audit, walk, _step(kind, walk, is_listed=True, is_done=True), [])


def _asked(audit: _Audit, world: World, kind: _Kind, walk: _Walk, tally: Listed, id_: str) -> list[Difference]:
    try:
        answer = audit.desk.api.call(world, "get", *kind.path, id_, lane=Lane.BACKFILL, **_expanded(kind))
    except MissingAtStripe:
        return _missing(audit, world, kind, id_, is_known=walk.is_known)
    except CallDeclined:
        tally.unreadable += 1
        return []
    # One that is not in the state that the list was narrowed to, or was deleted, is as a list would have shown it.
    return _compared(audit, world, tally, [answer])


def _expanded(kind: _Kind) -> dict[str, Any]:
    """Return what makes a single object as whole as its list shows it."""
    names = [name.removeprefix("data.") for name in kind.params.get("expand", ())]
    return {"expand": names} if names else {}


def _missing(audit: _Audit, world: World, kind: _Kind, id_: str, *, is_known: bool) -> list[Difference]:
    if kind.name == "invoice" and _is_draft(audit.desk, world, id_):
        return []  # A draft may be deleted at Stripe, and its row stays what it last was.
    if audit.repair and is_known and kind is _SESSIONS:
        _record(audit.desk, checkout.missing(world, id_, now=audit.desk.now()))
    return [Difference(kind.table, EXTRA, world.account, world.livemode, id_)]


def _is_draft(desk: Desk, world: World, invoice: str) -> bool:
    """Return whether the row of *invoice* is one of which nothing was owed yet."""

    def read(cursor: Cursor) -> bool:
        cursor.execute(
            "SELECT status = 'draft' FROM invoices WHERE (account, livemode, id) = (%s, %s, %s)",
            (world.account, world.livemode, invoice),
        )
        return cursor.fetchone() == (True,)

    return desk.within(read)


def _record(desk: Desk, delivery: Delivery) -> None:
    with database.transaction(desk.engine) as connection, database.cursor(connection) as cursor:
        inbox.record(cursor, [delivery])
    _fold(desk.engine)
