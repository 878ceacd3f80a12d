"""The rules of joining, written plainly and slowly, to hold the quick ones against.

Orders within a second are found by trying every permutation, and twins by trying to leave out every set of equal
steps. Nothing of ``worker.folds.chain`` and ``worker.folds.join`` is used; what a single event says, and what follows
from a joined row, is.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, permutations
from typing import Any

from schemas import events
from worker import folds
from worker.folds.facts import Event, Facts, Row, Subject, utc
from worker.folds.join import Shape

NOTHING = object()
TOTALS = ("amount_subtotal", "amount_total", "currency")
SECOND_EVENTS_MAX = 6
"""Of one object in one second: more would take too many permutations."""


class TooMany(Exception):
    """A second holds more events of one object than every order of can be tried."""


def event_of(body: bytes, *, account: str = "", source: str = "webhook") -> Event:
    """Return the event in *body* as it comes out of the inbox."""
    envelope = events.read(body)
    return Event(
        seq=0,
        account=envelope.account or account,
        livemode=envelope.livemode,
        id=envelope.id,
        type=envelope.type,
        created=utc(envelope.created),
        object_type=envelope.object_type,
        object_id=envelope.object_id,
        payload=envelope.payload,
        source=source,
    )


def tables_of(bodies: Iterable[bytes], *, account: str = "") -> dict[Subject, Row]:
    """Return the rows that the events in *bodies* come to; the first rendering of each id counts."""
    known: dict[tuple[str, bool, str], Event] = {}
    for body in bodies:
        event = event_of(body, account=account)
        known.setdefault((event.account, event.livemode, event.id), event)
    facts = by_row(each for event in known.values() for each in folds.judge(event).facts)
    found: dict[Subject, Row] = {}
    for subject, several in facts.items():
        if all(each.is_witness for each in several):
            continue
        result = fold(subject, facts)
        ordered, found[subject] = result.order, result.row
        shape = folds.SHAPES[subject.table]
        real = [step for step in ordered if step.event_id not in result.twins]
        # One alone of two that tell one state may list the parts.
        for child in children(shape, ordered if shape.child_of is None else real):
            found[Subject(shape.child, subject.account, subject.livemode, str(child["id"]))] = child
    for subject, row in found.items():
        if subject.table == "orders":
            row.update(settlement(row, found))
    return found


def settlement(order: Row, rows: Mapping[Subject, Row]) -> Row:
    """Return what the charges among *rows* make of *order*, where its own events leave that open.

    The rule is the first paragraph of rule 10; a canceled intent holds nothing.
    """
    if order["session_status"] != "complete" or order["payment_status"] not in (None, "unpaid"):
        return {}
    intent = order["payment_intent"]
    if intent is None or order["mode"] == "setup":
        return {}
    world = (order["account"], order["livemode"])

    def of(table: str) -> list[Row]:
        return [row for key, row in rows.items() if key.table == table and (key.account, key.livemode) == world]

    charges = [row for row in of("charges") if row["payment_intent"] == intent]
    captured = [row["captured_at"] for row in charges if row["captured_at"] and row["status"] == "succeeded"]
    if captured:
        return {"status": "paid", "paid_at": min(captured)}  # type: ignore[type-var]  # a moment holds times only
    ids = [row["id"] for row in charges]
    releases = [
        row
        for row in of("refunds")
        if row["reason"] == "expired_uncaptured_charge" and (row["payment_intent"] == intent or row["charge"] in ids)
    ]
    cancellations = [row["canceled_at"] for row in of("payment_intents") if row["id"] == intent]
    freed: list[Any] = []
    for row in charges:
        named = [each["created"] for each in releases if each["charge"] in (None, row["id"])]
        if row["status"] != "failed":
            freed.append(next((at for at in (row["released_at"], *named, *cancellations) if at), None))
    freed = freed or [each["created"] for each in releases] or cancellations
    if order["status"] == "failed" or not freed or None in freed:
        return {}
    return {"status": "failed", "failed_at": max(freed)}


def children(shape: Shape, steps: Sequence[Facts]) -> list[Row]:
    """Return the rows that belong to a row: one for each step, or the parts that were listed last."""
    if shape.child_of is not None:
        return [child for child in map(shape.child_of, steps) if child is not None]
    listings = [step.parts for step in steps if step.parts is not None]
    return list(listings[-1]) if listings else []


def by_row(facts: Iterable[Facts]) -> dict[Subject, list[Facts]]:
    """Return *facts* by the row that they are about."""
    found: dict[Subject, list[Facts]] = {}
    for each in facts:
        found.setdefault(each.subject, []).append(each)
    return found


@dataclass(frozen=True)
class Folded:
    """A row, the order of what is said of it, the ids of the twins, and whether the row is in doubt."""

    row: Row
    order: list[Facts]
    twins: set[str]
    is_ambiguous: bool


def fold(subject: Subject, facts: Mapping[Subject, Sequence[Facts]]) -> Folded:
    """Return what *facts* come to for one row: rule 4 for the events of its object, and rule 9 for a balance."""
    own = facts[subject]
    if subject.table == "balances":
        return _balance(subject, own, facts.get(_object_of("customers", subject), ()))
    if subject.table == "credit_note_lines":
        courses = _courses(facts[_object_of("credit_notes", subject)], {each.event_id: each for each in own})
    elif subject.table == "invoice_payments" and (invoice := facts.get(_object_of("invoices", subject))):
        courses = _courses(invoice, {each.event_id: each for each in own})
    else:
        courses = _courses(own, {each.event_id: each for each in own})
    return _folded(courses)


def _object_of(table: str, subject: Subject) -> Subject:
    return Subject(table, subject.account, subject.livemode, subject.root or subject.id)


def _folded(courses: Sequence["Course"]) -> Folded:
    """Return the row of the first of *courses*, in doubt where another one gives another row."""
    best = courses[0]
    rows = [joined(course.laid) for course in courses]
    names = rows[0].keys() - {"event_id", "as_of"}
    is_ambiguous = any(row[name] != rows[0][name] for row in rows for name in names)
    return Folded(rows[0], best.laid, best.twins, is_ambiguous)


def joined(ordered: Sequence[Facts]) -> Row:
    """Return the row of events that are in their order: rule 5, one column after the other."""
    subject, last = ordered[0].subject, ordered[-1]
    shape = folds.SHAPES[subject.table]
    key = dict(zip(shape.key, subject.key, strict=True))
    row: Row = {**shape.empty, "account": subject.account, "livemode": subject.livemode, **key}
    for facts in ordered:
        row.update(facts.columns)
        row.update({name: value for name, value in facts.references.items() if value is not None})
    told = [(name, at) for facts in ordered if not facts.by_clock for name, at in facts.moments.items()]
    told += last.moments.items() if last.by_clock else ()
    for name in {name for name, _ in told}:
        row[name] = min(at for other, at in told if other == name)
    row |= {"event_id": last.event_id, "as_of": last.created}
    if shape.table == "orders":
        row["lines_complete"] = lines_are_complete(ordered)
    shape.infer(row)
    return {name: value for name, value in row.items() if not name.startswith("_")}


def lines_are_complete(ordered: Sequence[Facts]) -> bool:
    """Return whether an order's lines were listed, and no later event carries another total: rule 11."""
    known: dict[str, object] = {}
    listed: dict[str, object] = {}
    is_complete = False
    for facts in ordered:
        totals = {name: facts.columns[name] for name in TOTALS if name in facts.columns}
        known |= totals
        if facts.parts is not None:
            is_complete, listed = True, dict(known)
        elif any(total != listed.get(name) for name, total in totals.items()):
            is_complete = False
    return is_complete


# ---- Rule 4: the chain, and the courses that a doubt leaves open ----


@dataclass(frozen=True)
class Course:
    """One way in which an object's events may have come about: *laid* are the facts of the row, in that order."""

    events: list[Facts]
    laid: list[Facts]
    twins: set[str]


@dataclass(frozen=True)
class Listing:
    """What a ledger lists of one second: how often each step was taken, and whether it was read after the second."""

    steps: Mapping[tuple[object, object], int]
    end: object
    is_whole: bool


def _courses(
    events: Sequence[Facts], rows: Mapping[str, Facts], ledger: Mapping[Any, Listing] | None = None
) -> list[Course]:
    """Return the courses of *events* that are left, the chosen one first; *rows* are what is laid, by event."""
    courses = [Course([], [], set())]
    for _, group in groupby(sorted(events, key=lambda each: each.position), lambda each: each.position):
        second = list(group)
        listing = (ledger or {}).get(second[0].stamp)
        found = [each for course in courses for each in _ends(second, course, rows, listing)]
        fewest = min(gaps for gaps, *_ in found)
        left = [each for each in found if each[0] == fewest]
        if listing is not None and listing.is_whole:
            left = [each for each in left if _carried(each[-1].laid).get("amount") == listing.end] or left
        left.sort(key=lambda each: each[1], reverse=True)
        by_state: dict[str, Course] = {}
        for *_, course in left:
            by_state.setdefault(_text(_state_of(course, rows)), course)
        courses = list(by_state.values())
    return courses


def _state_of(course: Course, rows: Mapping[str, Facts]) -> dict[str, Any]:
    return _carried([*course.events, *(rows[each.event_id] for each in course.events if each.event_id in rows)])


def _carried(events: Sequence[Facts]) -> dict[str, Any]:
    carried: dict[str, Any] = {}
    for each in events:
        carried |= each.after
    return carried


def _text(state: object) -> str:
    return json.dumps(state, sort_keys=True, default=str)


Key = tuple[bool, int, bool, str]


def _ends(
    second: list[Facts], course: Course, rows: Mapping[str, Facts], listing: Listing | None
) -> list[tuple[int, Key, Course]]:
    """Return where *second* may end after *course*: the gaps, how much the end is preferred, and the course."""
    if len(second) > SECOND_EVENTS_MAX:
        raise TooMany
    common = set.intersection(*({*each.after} & {*(each.before or each.after)} for each in second))
    after = {each.event_id: _text({name: each.after[name] for name in common}) for each in second}
    before = {
        each.event_id: NOTHING if each.is_first else _text({name: (each.before or each.after)[name] for name in common})
        for each in second
    }
    equal: dict[tuple[object, object], list[Facts]] = {}
    for each in sorted(second, key=_seniority):
        equal.setdefault((before[each.event_id], after[each.event_id]), []).append(each)
    sets = [kept for kept in _kept_sets(equal) if listing is None or _fits(kept, second, listing, rows)]
    found: list[tuple[int, Key, Course]] = []
    for start in _starts(second, course, common, before, after):
        orders = {tuple(each.event_id for each in kept): _best_orders(kept, before, after, start) for kept in sets}
        fewest = min(gaps for gaps, _ in orders.values())
        fitting = [kept for kept in sets if orders[tuple(each.event_id for each in kept)][0] == fewest]
        # As few are left out as do, and of several those of the step with the greatest id.
        chosen = max(fitting, key=lambda kept: (len(kept), _greatest_left_out(second, kept, equal)))
        for kept in fitting:
            for order in orders[tuple(each.event_id for each in kept)][1]:
                laid, twins = _with_twins(order, second, before, after)
                steps = [rows[each.event_id] for each in laid if each.event_id in rows]
                key = (kept is chosen, *_preference(order[-1]))
                whole = Course([*course.events, *laid], [*course.laid, *steps], course.twins | twins)
                found.append((fewest + (start is None), key, whole))
    fewest = min(gaps for gaps, *_ in found)
    # To begin anywhere is worse than to begin where it is known to, and better than a gap.
    return [(gaps, key, each) for gaps, key, each in found if gaps == fewest]


def _kept_sets(equal: Mapping[tuple[object, object], list[Facts]]) -> Iterator[list[Facts]]:
    """Yield what may be kept of a second's events: of equal steps any number, those with the greatest ids."""
    kept: list[list[Facts]] = [[]]
    for same in equal.values():
        kept = [[*each, *same[less:]] for each in kept for less in range(len(same))]
    yield from kept


def _fits(kept: Sequence[Facts], second: Sequence[Facts], listing: Listing, rows: Mapping[str, Facts]) -> bool:
    """Return whether *kept* holds each step at least as often as it is listed, or just as often where all are."""
    counts, reported = (_balance_steps(events, rows) for events in (kept, second))
    least = _balance_steps(list({_text([each.before, each.after]): each for each in second}.values()), rows)
    for step, times in listing.steps.items():
        wanted = min(times, reported[step])
        if counts[step] < wanted or (listing.is_whole and counts[step] > max(wanted, least[step])):
            return False
    return True


def _balance_steps(events: Sequence[Facts], rows: Mapping[str, Facts]) -> Counter[tuple[object, object]]:
    steps = [rows[each.event_id] for each in events if each.event_id in rows]
    return Counter((each.before["amount"], each.after["amount"]) for each in steps if each.before is not None)


def _greatest_left_out(
    second: Sequence[Facts], kept: Sequence[Facts], equal: Mapping[tuple[object, object], list[Facts]]
) -> list[tuple[bool, str]]:
    out = [each for each in second if each not in kept]
    return sorted((_seniority(same[-1]) for same in equal.values() for each in same if each in out), reverse=True)


def _starts(
    second: Sequence[Facts],
    course: Course,
    common: set[str],
    before: Mapping[str, object],
    after: Mapping[str, object],
) -> list[object]:
    """Return the states in which a second may begin, None for any: where the last event not later in time ended."""
    stamp, rank = second[0].stamp, second[0].rank
    earlier = [each for each in course.events if each.stamp <= stamp]
    nothing = [NOTHING] if any(each.is_first for each in second) else []
    if not earlier:
        return nothing or [None]
    carried = _carried(earlier)
    shared = {name for name in common if name in carried}
    known = _text({name: carried[name] for name in shared})
    fitting = [
        before[each.event_id]
        for each in second
        if not each.is_first and _text({name: (each.before or each.after)[name] for name in shared}) == known
    ]
    moving = [
        after[each.event_id]
        for each in second
        if earlier[-1].rank < rank and not each.before and each.source != "observation"
    ]
    return list(dict.fromkeys([*nothing, *(fitting or [known]), *moving]))


def _best_orders(
    kept: Sequence[Facts], before: Mapping[str, object], after: Mapping[str, object], start: object
) -> tuple[int, list[list[Facts]]]:
    """Return the fewest gaps of any order of *kept*, and for each state it may end in the most preferred such order."""
    # From the end: the first, where the most preferred come first, is the one that is wanted.
    fewest, ends = len(kept) + 1, dict[object, list[Facts]]()
    for backwards in permutations(sorted(kept, key=_preference, reverse=True)):
        order = list(backwards[::-1])
        gaps = _gaps(order, before, after, start)
        if gaps < fewest:
            fewest, ends = gaps, {}
        if gaps == fewest:
            ends.setdefault(after[order[-1].event_id], order)
    return fewest, list(ends.values())


def _with_twins(
    order: Sequence[Facts], second: Sequence[Facts], before: Mapping[str, object], after: Mapping[str, object]
) -> tuple[list[Facts], set[str]]:
    """Return *order* with the events that it leaves out next to the last step that they repeat, and their ids."""
    laid = list(order)
    twins = [each for each in sorted(second, key=_seniority) if each not in order]
    for twin in twins:
        step = (before[twin.event_id], after[twin.event_id])
        laid.insert(
            max(
                i
                for i, each in enumerate(laid)
                if each in order and (before[each.event_id], after[each.event_id]) == step
            ),
            twin,
        )
    return laid, {each.event_id for each in twins}


def _gaps(order: Sequence[Facts], before: Mapping[str, object], after: Mapping[str, object], start: object) -> int:
    gaps, state = 0, start
    for index, each in enumerate(order):
        if before[each.event_id] != state and not (index == 0 and start is None):
            gaps += 1
        state = after[each.event_id]
    return gaps


def _seniority(facts: Facts) -> tuple[bool, str]:
    return (facts.source != "observation", facts.event_id)


def _preference(facts: Facts) -> tuple[int, bool, str]:
    prefer: Callable[[Facts], int] = folds.SHAPES[facts.subject.table].prefer
    return (prefer(facts), *_seniority(facts))


# ---- Rule 9: a balance has two witnesses ----


def _balance(subject: Subject, own: Sequence[Facts], customer: Sequence[Facts]) -> Folded:
    """Return the balance as the customer says in its default currency, and as the newer of the two says in others."""
    own_events = {each.event_id for each in customer}
    by_customer = {each.event_id: each for each in own if each.event_id in own_events}
    readings: dict[object, Facts] = {}
    for each in sorted(
        (each for each in own if each.event_id not in own_events), key=lambda each: (each.created, each.event_id)
    ):
        readings[each.columns["_transaction"]] = each
    transactions = list(readings.values())
    ledger = _ledger_order(transactions)
    read_at = ledger[-1].created if ledger else None
    listings = {
        stamp: _listing(list(group), stamp[0] < read_at) for stamp, group in groupby(ledger, lambda each: each.stamp)
    }
    courses = _courses(customer, by_customer, listings)
    result = _folded(courses) if by_customer else None
    if result is None or (
        ledger
        and read_at > result.order[-1].created  # type: ignore[operator]  # as above
        and _carried(courses[0].events).get("currency") != subject.currency
    ):
        laid = [*(result.order if result else []), *ledger]
        return Folded(joined(laid), laid, result.twins if result else set(), is_ambiguous=False)
    laid = [*ledger, *result.order]
    return Folded(joined(laid), laid, result.twins, result.is_ambiguous)


def _listing(steps: Sequence[Facts], is_whole: bool) -> Listing:  # noqa: FBT001 - named by its place
    counts = Counter[tuple[object, object]](((each.before or {})["amount"], each.after["amount"]) for each in steps)
    return Listing(counts, steps[-1].after["amount"], is_whole)


def _ledger_order(transactions: Sequence[Facts]) -> list[Facts]:
    """Return *transactions* in the order with the fewest breaks, second by second from 0; none is a twin."""
    laid: list[Facts] = []
    for _, group in groupby(sorted(transactions, key=lambda each: each.stamp), lambda each: each.stamp):
        second = sorted(group, key=_preference, reverse=True)
        if len(second) > SECOND_EVENTS_MAX:
            raise TooMany
        known = laid[-1].after["amount"] if laid else 0
        orders = [list(order[::-1]) for order in permutations(second)]
        laid += min(orders, key=lambda order: _breaks(order, known))
    return laid


def _breaks(order: Iterable[Facts], known: object) -> int:
    states = [(None, known), *((each.before["amount"], each.after["amount"]) for each in order if each.before)]
    return sum(before != reached for (_, reached), (before, _) in pairwise(states))
