"""Compares objects as Stripe lists them with the rows at rest, in two ways: by joining, and by a map.

Note [An object differs when it would change its row]
    An object as Stripe lists it is turned into the observation that would be recorded of it. This is joined with all
    events that the inbox has of the object. If the result is another row than the existing one, the existing one is
    wrong. Events that were recorded after the list was made are therefore no difference, nor are values that a list
    does not show. This comparison finds missing rows, and a repair corrects what it finds.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from schemas import checkout, database, events, observations, tables
from schemas.database import Cursor
from schemas.errors import NotAnObject
from schemas.events import Key
from schemas.inbox import Delivery
from schemas.observations import Answer, World
from worker import folds
from worker.folding import settling
from worker.folding.claim import event_of_delivery
from worker.folding.joining import facts_at_hand
from worker.folding.rows import load_rows
from worker.folds import join
from worker.folds.facts import Facts, Row, Subject, object_of
from worker.folds.join import Joined
from worker.proof import explanations, in_flight, older_renderings
from worker.proof.by_map import pairs_by_map
from worker.proof.difference import Difference, Pair
from worker.proof.pairs import differences_of, key_of, name_of, row_of
from worker.stripe_jobs.rounds import JobContext


@dataclass(slots=True)
class Compared:
    """The result of comparing some objects: the *differences*, and the numbers of objects that were not compared.

    *archived* objects have rows that are folded from archived payloads; *unreadable* ones have no id or cannot be
    folded. *only_by_map* counts differing rows that would stay the same if the objects were folded. *unstated* counts
    Stripe's values that are absent from the API version of the events. *deliveries* are the observations that a repair
    may record, by the ids of their objects. *wrong* maps the id of each row that a repair changes to the object that
    the row is folded from.
    """

    differences: list[Difference] = field(default_factory=list)
    archived: int = 0
    unreadable: int = 0
    only_by_map: int = 0
    unstated: int = 0
    deliveries: dict[str, Delivery] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


def compare(context: JobContext, world: World, objects: Sequence[Answer], *, by_map: bool = True) -> Compared:
    """Compare *objects* of *world* with their rows by joining them and, if wanted, *by_map*.

    It takes a fixed number of queries, however many objects there are.
    """
    found = Compared()
    for each in objects:
        try:
            found.deliveries[str(each.id)] = _observed(each, world, context.now())
        except NotAnObject:
            found.unreadable += 1
    context.within(lambda opened: _compare(opened, world, objects, found, by_map=by_map))
    return found


def _observed(answer: Answer, world: World, now: datetime) -> Delivery:
    if answer.body.get("object") == "checkout.session":
        return checkout.observed(_without_lines(answer), world, now=now)
    return observations.of_answer(observations.kind_of(answer), answer, world, now=now)


def _without_lines(session: Answer) -> Answer:
    """Return *session* without its lines: another job reads them, and the map compares them."""
    odd, span = session.odd, events.span_of(session.odd, "line_items") if session.odd else None
    if span is not None:
        odd = odd[: span[0]] + b"null" + odd[span[1] :]
    return Answer({name: value for name, value in session.body.items() if name != "line_items"}, session.at, odd)


def _compare(cursor: Cursor, world: World, objects: Sequence[Answer], found: Compared, *, by_map: bool) -> None:
    # An event that is recorded or folded between two of the queries would look like a difference.
    database.take_snapshot(cursor, read_only=False)
    joined = _by_joining(cursor, found)
    pairs = list(joined.pairs.values())
    changed = {row_of(pair) for pair in pairs if differences_of(pair)}
    if by_map:
        pairs = [*pairs_by_map(cursor, world, [each for each in objects if str(each.id) in joined.readable]), *pairs]
    known = {name_of(each): each for pair in pairs for each in differences_of(pair)}
    unstated = older_renderings.unstated(cursor, world, pairs) if by_map else set()
    captured = explanations.captured(cursor, world, joined.pairs)
    explained = explanations.explained(cursor, world, list(known.values()), joined.pairs, captured)
    for id_ in captured:
        found.deliveries.pop(id_, None)
    found.differences = [each for name, each in known.items() if name not in unstated | explained]
    found.archived, found.unstated = len(joined.archived), len(unstated)
    rows = {(each.table, each.id) for each in found.differences}
    found.only_by_map = sum(
        table in folds.ROW_SPECS and (*key_of(world), id_.split(" ")[0]) not in joined.archived
        for table, id_ in rows - changed
    )
    found.wrong = {
        subject.id: subject.source for subject, pair in joined.pairs.items() if row_of(pair) in rows & changed
    }


class _Joinings(NamedTuple):
    """Rows as they are and as joining makes them; objects with archived payloads; ids that a fold can read."""

    pairs: dict[Subject, Pair]
    archived: set[Key]
    readable: set[str]


def _by_joining(cursor: Cursor, found: Compared) -> _Joinings:
    """See Note [An object differs when it would change its row]."""
    at_hand, readable = _facts(found)
    known = load_rows(cursor, at_hand)
    own = settling.at_rest(cursor, [subject for subject in known if subject.table == "orders"])
    on_the_way = in_flight.on_the_way(cursor, map(object_of, at_hand))
    joined: dict[Subject, Joined] = {}
    archived: set[Key] = set()
    for subject, facts in facts_at_hand(cursor, set(at_hand)):
        if facts is None:
            row = own[subject][1].row if subject in own else known.get(subject)
            made = _laid_over(subject, row, at_hand[subject])
        else:
            made = _joined(subject, facts, at_hand)
        if made is None and facts is None:
            archived.add(object_of(subject))
        elif made is not None and object_of(subject) not in on_the_way:
            joined[subject] = made
    joined |= settling.settled(cursor, settling.open_rows(joined))
    pairs = {
        subject: Pair(tables.metadata.tables[subject.table], known.get(subject), made.row)
        for subject, made in joined.items()
    }
    return _Joinings(pairs, archived, readable)


def _facts(found: Compared) -> tuple[dict[Subject, list[Facts]], set[str]]:
    at_hand: dict[Subject, list[Facts]] = defaultdict(list)
    readable: set[str] = set()
    for id_, delivery in found.deliveries.items():
        verdict = folds.judge(event_of_delivery(delivery))
        if verdict.state == "parked":
            found.unreadable += 1
        else:
            readable.add(id_)
        for one in verdict.facts:
            at_hand[one.subject].append(one)
    return at_hand, readable


def _laid_over(subject: Subject, row: Row | None, facts: Sequence[Facts]) -> Joined | None:
    """Return *row* with *facts* applied to it; None if the archived payloads would be needed to know."""
    return None if row is None else join.advance(folds.ROW_SPECS[subject.table], row, facts)


def _joined(subject: Subject, facts: Iterable[Facts], at_hand: Mapping[Subject, list[Facts]]) -> Joined | None:
    spec = folds.ROW_SPECS[subject.table]
    # If the inbox has the same answer already, it is used once.
    read = {(one.subject, one.event_id): one for one in (*join.with_leader(spec, subject, at_hand), *facts)}
    return join.fold_all(spec, read.values())
