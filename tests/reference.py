"""The nine rules of joining, written plainly and slowly, to hold the quick ones against.

Orders within a second are found by trying every permutation. Nothing of ``worker.folds.join`` is used; what a
single event says, and what follows from a joined row, is.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, permutations
from typing import Any

from schemas import events
from worker import folds
from worker.folds.facts import Event, Facts, Row, Subject, utc
from worker.folds.join import Shape

NOTHING = object()
SECOND_EVENTS_MAX = 7
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
    facts = [each for event in known.values() for each in folds.judge(event).facts]
    facts.sort(key=lambda each: each.subject)
    found: dict[Subject, Row] = {}
    for subject, group in groupby(facts, lambda each: each.subject):
        several = list(group)
        if all(each.is_witness for each in several):
            continue
        ordered, twins = ordered_with_twins(several)
        found[subject] = joined(ordered)
        shape = folds.SHAPES[subject.table]
        real = [step for step in ordered if step.event_id not in twins]
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


def row_of(facts: Sequence[Facts]) -> Row:
    """Return the row of the object that *facts* are all about."""
    return joined(ordered_with_twins(facts)[0])


def ordered_with_twins(facts: Sequence[Facts]) -> tuple[list[Facts], set[str]]:
    """Return *facts* in their order, and the ids of those that tell again what another tells."""
    ordered: list[Facts] = []
    twins: set[str] = set()
    in_groups = sorted(facts, key=lambda each: each.position)
    for _, group in groupby(in_groups, lambda each: each.position):
        steps, doubles = order_of(list(group), ordered)
        ordered += steps
        twins |= doubles
    return ordered, twins


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
    shape.infer(row)
    return {name: value for name, value in row.items() if not name.startswith("_")}


def order_of(group: list[Facts], earlier: Sequence[Facts]) -> tuple[list[Facts], set[str]]:
    """Return events of one rank and stamp in the order with the fewest gaps, given those before them, and the twins."""
    if len(group) == 1:
        return group, set()
    if len(group) > SECOND_EVENTS_MAX:
        raise TooMany
    common = set.intersection(*({*each.after} & {*(each.before or each.after)} for each in group))

    def state(values: Mapping[str, Any]) -> str:
        return json.dumps({name: values[name] for name in common}, sort_keys=True, default=str)

    carried: dict[str, Any] = {}
    for each in earlier:
        carried |= each.after
    if earlier:
        start: object = state(carried) if common <= carried.keys() else None
    else:
        start = NOTHING if any(each.is_first for each in group) else None
    before = {
        each.event_id: NOTHING if each.is_first else state(each.after if each.before is None else each.before)
        for each in group
    }
    after = {each.event_id: state(each.after) for each in group}
    best = _best(group, before, after, start)
    if _gaps(best, before, after, start) == 0:
        return best, set()
    twins: dict[tuple[object, object], list[Facts]] = {}
    for each in sorted(group, key=_seniority):
        twins.setdefault((before[each.event_id], after[each.event_id]), []).append(each)
    once = _best([same[-1] for same in twins.values()], before, after, start)
    doubles = {each.event_id for same in twins.values() for each in same[:-1]}
    return [each for kept in once for each in twins[before[kept.event_id], after[kept.event_id]]], doubles


def _best(
    group: Sequence[Facts], before: Mapping[str, object], after: Mapping[str, object], start: object
) -> list[Facts]:
    """Of all orders with the fewest gaps, the one that ends with the most senior event, and so on backwards."""
    # From the end: the first of the best, where the most preferred come first, is the one that is wanted.
    backwards = permutations(sorted(group, key=_preference, reverse=True))
    return list(min(backwards, key=lambda order: _gaps(order[::-1], before, after, start))[::-1])


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
