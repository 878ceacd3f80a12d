"""Holds the tables against Stripe itself: lists its objects, and says which rows they would change.

Note [An object differs when it would change its row]
    Nothing is compared field by field. An object as Stripe lists it is turned into the observation that would be
    recorded of it, and joined with all that the inbox says of the object: where that comes to another row than the
    one that is there, the row is wrong. So what an event told after the list was made is no difference, nor is what
    a list does not show.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

from psycopg import sql
from sqlalchemy import Engine

from schemas import checkout, database, inbox, observations, tables
from schemas.budget import Lane
from schemas.database import Cursor
from schemas.errors import CallDeclined, MissingAtStripe, NotAnObject
from schemas.inbox import Delivery
from schemas.observations import Answer, World
from worker import folds
from worker.folding import projection, settling
from worker.folding.claim import event_of_delivery
from worker.folding.joining import facts_at_hand
from worker.folding.rows import load_rows
from worker.folds import join
from worker.folds.facts import Facts, Subject, utc
from worker.folds.join import Joined
from worker.proof import difference
from worker.proof.difference import EXTRA, Difference, Pair
from worker.proof.rebuild import Progress, nobody
from worker.stripe_jobs import rounds
from worker.stripe_jobs.rounds import Desk

NOT_ASKED: Final = "not asked, since no key serves it"
CUSTOMERS: Final = 500
"""Customers whose ledgers are looked up at once."""
DECIDED_BY: Final = ("event_id", "as_of")
"""Columns that say who decided, and not what."""
SETTLED: Final = timedelta(minutes=1)
"""What is younger may be on its way."""


@dataclass(slots=True)
class Listed:
    """What came of the objects of one kind in one world: how many Stripe listed, and how many rows differ.

    Not compared are *archived* ones, whose rows are folded from payloads that are not at hand, and *unreadable* ones,
    which have no readable id in Stripe's answer, or which no fold can read.
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


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of object: its *name*, the *table* of its rows, the *path* of its list, and whether that is *by_age*.

    Payment links do not tell when they were created; there are few of them, so all are looked at.
    """

    name: str
    table: str
    path: tuple[str, ...]
    by_age: bool = True


_KINDS: Final = (
    _Kind("checkout.session", "orders", ("checkout", "sessions")),
    _Kind("payment_link", "payment_links", ("payment_links",), by_age=False),
    _Kind("invoice", "invoices", ("invoices",)),
    _Kind("credit_note", "credit_notes", ("credit_notes",)),
    _Kind("refund", "refunds", ("refunds",)),
)
_LEDGER: Final = "customer_balance_transaction"


def audit(
    desk: Desk, *, since: datetime | None = None, progress: Progress = nobody, repair: bool = False
) -> Iterator[Listed | Difference]:
    """List what Stripe has that was created *since*, and yield each difference, and a tally of each kind of object.

    With *repair* what differs is recorded as it was listed, its rows are folded anew, and sessions that Stripe does
    not know are recorded as missing.

    Raises:
        KeyRefused, NotServed, Transient: Stripe does not let us look; what was found until then stands.
    """
    _fold(desk.engine)
    for world in rounds.unserved(desk):
        yield Listed(world.account, world.livemode, NOT_ASKED)
    worlds = rounds.served(desk)
    for number, world in enumerate(worlds):
        progress("Asking Stripe", number, len(worlds))
        for kind in _KINDS:
            yield from _audit_kind(desk, world, kind, since, repair=repair)
        yield from _audit_ledgers(desk, world, repair=repair)
    progress("Asking Stripe", len(worlds), len(worlds))


def repair(desk: Desk, *, since: datetime | None = None, progress: Progress = nobody) -> int:
    """Put right what an audit finds, and return how many differences that were."""
    return sum(isinstance(each, Difference) for each in audit(desk, since=since, progress=progress, repair=True))


def _fold(engine: Engine) -> None:
    while projection.run_once(engine, now=datetime.now(UTC)):
        pass


def _audit_kind(
    desk: Desk, world: World, kind: _Kind, since: datetime | None, *, repair: bool
) -> Iterator[Listed | Difference]:
    tally = Listed(world.account, world.livemode, kind.name)
    params = {"created": {"gte": int(since.timestamp())}} if since is not None and kind.by_age else {}
    started = desk.now() - SETTLED
    seen: set[str] = set()
    above: datetime | None = None
    for page in desk.api.pages(world, *kind.path, lane=Lane.BACKFILL, **params):
        tally.listed += len(page.items)
        tally.unreadable += page.unreadable
        yield from _counted(tally, _compare(desk, world, tally, page.objects, repair=repair))
        ids = {str(each.id) for each in page.objects}
        times = [each.body["created"] for each in page.objects if isinstance(each.body.get("created"), int)]
        if not kind.by_age or not times:
            seen |= ids
        else:
            lowest = utc(min(times))
            rows = _between(desk, world, kind, lowest, above or started) - ids - seen
            yield from _counted(tally, _unlisted(desk, world, kind, tally, rows, repair=repair))
            seen, above = ids, lowest
    # What is older than the last, or everything where nothing was listed.
    rows = _between(desk, world, kind, since, above or started, is_last=True) - seen
    yield from _counted(tally, _unlisted(desk, world, kind, tally, rows, repair=repair))
    yield tally


def _counted(tally: Listed, found: Sequence[Difference]) -> Sequence[Difference]:
    for kind, _, __ in {(each.kind, each.table, each.id) for each in found}:
        setattr(tally, kind, getattr(tally, kind) + 1)
    return found


def _audit_ledgers(desk: Desk, world: World, *, repair: bool) -> Iterator[Listed | Difference]:
    """List the ledger of every customer who has a balance."""
    tally = Listed(world.account, world.livemode, _LEDGER)
    last = ""
    while customers := desk.within(lambda opened: _customers(opened, world, after=last)):  # noqa: B023 - called at once
        for customer in customers:
            objects: list[Answer] = []
            try:
                for page in desk.api.pages(world, "customers", customer, "balance_transactions", lane=Lane.BACKFILL):
                    tally.listed += len(page.items)
                    tally.unreadable += page.unreadable
                    # All as of the first page, which is the earliest.
                    objects += [replace(each, at=objects[0].at if objects else page.at) for each in page.objects]
            except MissingAtStripe:
                continue
            except (CallDeclined, NotAnObject):
                tally.unreadable += 1
            yield from _counted(tally, _compare(desk, world, tally, objects, repair=repair))
        last = customers[-1]
    yield tally


def _customers(cursor: Cursor, world: World, *, after: str) -> list[str]:
    cursor.execute(
        "SELECT DISTINCT customer FROM balances WHERE (account, livemode) = (%s, %s) AND customer > %s"
        " ORDER BY customer LIMIT %s",
        (world.account, world.livemode, after, CUSTOMERS),
    )
    return [customer for (customer,) in cursor.fetchall()]


# ---- What Stripe has ----


def _compare(desk: Desk, world: World, tally: Listed, objects: Sequence[Answer], *, repair: bool) -> list[Difference]:
    told: dict[str, Delivery] = {}
    for each in objects:
        try:
            told[str(each.id)] = _observed(each, world, desk.now())
        except NotAnObject:
            tally.unreadable += 1
    found, archived = desk.within(lambda opened: _differing(opened, tally, list(told.values())))
    tally.archived += archived
    if found and repair:
        wrong = {subject.id: subject.source for subject, _ in found}
        desk.within(lambda opened: _put_right(opened, desk, world, told, wrong))
        _fold(desk.engine)
    return [one for _, pair in found for one in _differences(pair)]


def _observed(answer: Answer, world: World, now: datetime) -> Delivery:
    if answer.body.get("object") == "checkout.session":
        return checkout.observed(answer, world, now=now)
    return observations.of_answer(observations.kind_of(answer), answer, world, now=now)


def _differing(
    cursor: Cursor, tally: Listed, told: Sequence[Delivery]
) -> tuple[list[tuple[Subject, Pair]], int]:  # fmt: skip
    """Return the rows that *told* would change, with what they would be, and of how many objects that is not known."""
    at_hand: dict[Subject, list[Facts]] = defaultdict(list)
    for delivery in told:
        verdict = folds.judge(event_of_delivery(delivery))
        tally.unreadable += verdict.state == "parked"
        for one in verdict.facts:
            at_hand[one.subject].append(one)
    known = load_rows(cursor, at_hand)
    own = settling.at_rest(cursor, [subject for subject in known if subject.table == "orders"])
    on_the_way = _on_the_way(cursor, at_hand)
    found: dict[Subject, Joined] = {}
    archived: set[_Object] = set()
    for subject, facts in facts_at_hand(cursor, set(at_hand)):
        shape = folds.SHAPES[subject.table]
        if facts is None:
            # What is told now is laid over the row, unless only all that was told before could tell.
            row = own[subject][1].row if subject in own else known.get(subject)
            joined = None if row is None else join.advance(shape, row, at_hand[subject])
            if joined is None:
                archived.add(_object_of(subject))
        else:
            # An answer that is in the inbox already is read once.
            read = {(one.subject, one.event_id): one for one in (*join.with_leader(shape, subject, at_hand), *facts)}
            joined = join.fold_all(shape, read.values())
        if joined is not None and _object_of(subject) not in on_the_way:
            found[subject] = joined
    found |= settling.settled(cursor, settling.open_rows(found))
    pairs = {
        subject: Pair(tables.metadata.tables[subject.table], known.get(subject), joined.row)
        for subject, joined in found.items()
    }
    return [(subject, pair) for subject, pair in pairs.items() if _differences(pair)], len(archived)


_Object: TypeAlias = tuple[str, bool, str]
"""Account, mode and id."""


def _object_of(subject: Subject) -> _Object:
    return (subject.account, subject.livemode, subject.source)


def _on_the_way(cursor: Cursor, subjects: Iterable[Subject]) -> set[_Object]:
    """Return the objects of which an event is not folded yet: what their rows will say is not known."""
    wanted = sorted({_object_of(subject) for subject in subjects})
    cursor.execute(
        """
        SELECT DISTINCT account, livemode, object_id
        FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, object_id)
        JOIN inbox AS i USING (account, livemode, object_id) JOIN pending USING (seq)
        """,
        [list(column) for column in zip(*wanted, strict=True)] or [[], [], []],
    )
    return {(account, livemode, object_id) for account, livemode, object_id in cursor.fetchall()}


def _differences(pair: Pair) -> list[Difference]:
    return [each for each in difference.differences(pair) if each.column not in DECIDED_BY]


def _put_right(cursor: Cursor, desk: Desk, world: World, told: dict[str, Delivery], wrong: dict[str, str]) -> None:
    """Record what is news of the *wrong* rows' objects, and let all that the inbox says of them be folded anew."""
    sources = set(wrong.values()) | set(wrong)
    desk.record(
        cursor,
        [delivery for id_, delivery in told.items() if id_ in sources or _customer_of(delivery) in sources],
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


# ---- What Stripe does not list ----


def _between(
    desk: Desk, world: World, kind: _Kind, low: datetime | None, high: datetime, *, is_last: bool = False
) -> set[str]:
    """Return the rows created after *low*, or at it if that *is_last*, and until *high*."""
    table = tables.metadata.tables[kind.table]
    statement = sql.SQL(
        "SELECT id FROM {} WHERE (account, livemode) = (%s, %s) AND coalesce(created, as_of) <= %s"
        " AND coalesce(created, as_of) {} %s"
    ).format(sql.Identifier(table.name), sql.SQL(">=" if is_last else ">"))
    bounds: tuple[Any, ...] = (world.account, world.livemode, high, low or datetime(1970, 1, 1, tzinfo=UTC))

    def read(cursor: Cursor) -> set[str]:
        cursor.execute(statement, bounds)
        return {id_ for (id_,) in cursor.fetchall()}

    return desk.within(read)


def _unlisted(
    desk: Desk, world: World, kind: _Kind, tally: Listed, rows: set[str], *, repair: bool
) -> list[Difference]:
    """Ask for each of *rows*, which a list did not have, and return what differs."""
    found: list[Difference] = []
    for id_ in sorted(rows):
        try:
            answer = desk.api.call(world, "get", *kind.path, id_, lane=Lane.BACKFILL)
        except MissingAtStripe:
            if kind.name == "invoice" and _is_draft(desk, world, id_):
                continue  # A draft may be deleted at Stripe, and its row stays what it last was.
            found.append(Difference(kind.table, EXTRA, world.account, world.livemode, id_))
            if repair and kind.name == "checkout.session":
                _record(desk, checkout.missing(world, id_, now=desk.now()))
        except CallDeclined:
            tally.unreadable += 1
        else:
            if not answer.body.get("deleted"):
                found += _compare(desk, world, tally, [answer], repair=repair)
    return found


def _is_draft(desk: Desk, world: World, invoice: str) -> bool:
    """Tell whether the row of *invoice* says that nobody owed it yet."""

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
