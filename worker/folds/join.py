"""How the events of one object become its row.

Note [The row depends on the set alone]
    The events of an object have one order, computed from the events: rank, then stamp, then the chain of
    states that they tell. Its row is the left fold of them in that order. Arrival, batching and duplication
    do not enter into it. An event strictly above the row by rank and stamp is the last in that order
    whatever came before, so it may be laid over the row as it stands (``advance``); for any other the row is
    folded anew from all the object's events (``fold_all``). Both take the same step, ``_lay``.

Note [The chain is an Eulerian path]
    Several events may share a rank and a second. Each tells a state after it and, through its previous
    attributes, the state before it: states are nodes and events are edges, and an order without a gap is a
    path that takes every edge once. Whether there is one, and where it ends, follows from the nodes' degrees,
    so nothing is searched. Where there is none, the fewest gaps are counted from the degrees as well.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Final

from worker.folds.facts import Anomaly, Change, Facts, Row, Subject, Value, Witness

AMBIGUOUS_ORDER: Final = "ambiguous_order"
TWO_REFERENCES: Final = "two_references"
BROKEN_CHAIN: Final = "broken_chain"
LINES_DIFFER: Final = "lines_differ"
MISSING_AT_STRIPE: Final = "missing_at_stripe"
UNKNOWN_STATUS: Final = "unknown_status"
SEEN_IN_ALL: Final = (TWO_REFERENCES, BROKEN_CHAIN, LINES_DIFFER, MISSING_AT_STRIPE)
"""Kinds of anomaly that only all of an object's events show."""


def unknown_status(row: Row, known: Collection[str]) -> list[Anomaly]:
    """Return that the status of *row* is none that is *known*, as an anomaly; without a status there is none."""
    status = row["status"]
    return [] if status is None or status in known else [Anomaly(UNKNOWN_STATUS, {"status": status})]


def _infer_nothing(_: Row) -> None:
    """Leave the row as its events tell it."""


def _follow_nothing(_row: Row, _step: Facts, _laid: Row) -> bool:
    """Leave the row as the step tells it."""
    return True


@dataclass(frozen=True)
class Shape:
    """What the join has to know of one kind of row.

    ``subject`` names what a row is about, in changes and anomalies. ``empty`` is the row that no event has
    touched. ``rank_of`` tells the rank of a row's deciding event from the row, never below the true one, and
    ``stamp_of`` its stamp. ``infer`` sets what follows from the row's own columns; ``anomalies`` and
    ``changes`` report on it. ``clock_rank`` is the rank of what our clock says, and ``clock_moment`` the
    moment that only counts while the clock decides. ``prefer`` ranks last states where the events leave
    several possible. Where the row does not keep all that the inference needs, ``keeps_all`` is false: such a
    row is always folded anew, and what it carries beyond its columns is dropped at the end. ``key`` names the
    columns of the row's key beyond its world. ``child`` is a table whose rows belong to this one's, by the columns
    ``child_key``: a row for each step, which ``child_of`` tells, twins left out; or where that is None, the parts
    that the last step told that lists them. ``review`` reports on the whole of the events, in their order.
    ``follow`` sees the row before a step, the step, and the row with it laid over; there it sets what the step means
    for columns that the step does not carry, and returns whether the row before, as it is kept, was enough to know
    that, and all anomalies of it.
    """

    table: str
    subject: str
    empty: Mapping[str, Value]
    rank_of: Callable[[Row], int] = lambda _: 0
    stamp_of: Callable[[Row], tuple[Value, ...]] = lambda row: (row["as_of"],)
    infer: Callable[[Row], None] = _infer_nothing
    anomalies: Callable[[Row], list[Anomaly]] = lambda _: []
    changes: Callable[[Row | None, Row], list[Change]] = lambda _before, _after: []
    clock_rank: int | None = None
    clock_moment: str = ""
    prefer: Callable[[Facts], int] = lambda _: 0
    keeps_all: bool = True
    key: tuple[str, ...] = ("id",)
    child: str = ""
    child_key: tuple[str, ...] = ()
    child_of: Callable[[Facts], Row | None] | None = None
    review: Callable[[Sequence[Facts]], list[Anomaly]] = lambda _: []
    follow: Callable[[Row, Facts, Row], bool] = _follow_nothing

    @cached_property
    def names(self) -> frozenset[str]:
        """The columns of a row: what else a step carries is dropped at the end."""
        return frozenset(self.empty) | {"account", "livemode", *self.key, "event_id", "as_of"}


@dataclass(frozen=True, slots=True)
class Joined:
    """A row, what is wrong with it, and by which source its deciding event came.

    ``children`` are the rows that belong to it, all there are of them where they ``replace_all``. ``is_whole`` tells
    that all its events were read; a row that was only advanced does not know of the anomalies that only they show.
    ``decided_by`` is the event of another object by which the row came to its state, where one decided. No event of its
    own was read where it ``is_at_rest``: what its events' order left in doubt is as it was.
    """

    row: Row
    anomalies: tuple[Anomaly, ...]
    children: tuple[Row, ...]
    source: str
    is_whole: bool
    replace_all: bool
    decided_by: Witness | None = None
    is_at_rest: bool = False


@dataclass(frozen=True, slots=True)
class Path:
    """Events in their order, the ids of those that tell again what another tells, and whether the end is a choice."""

    steps: list[Facts]
    twins: set[str]
    is_ambiguous: bool


def advance(shape: Shape, row: Row, facts: Sequence[Facts]) -> Joined | None:
    """Return *row* with *facts* laid over it; None where only all the object's events can tell."""
    if not shape.keeps_all:
        return None
    steps = facts if len(facts) == 1 else _in_order_from(shape, row, facts)
    if steps is None or steps[0].position <= (shape.rank_of(row), shape.stamp_of(row)):
        return None
    advanced = row
    for step in steps:
        if _disagreements(advanced, step):
            return None
        laid = _lay(shape, advanced, step)
        if not shape.follow(advanced, step, laid):
            return None
        advanced = laid
    shape.infer(advanced)
    has_parts = shape.child_of is None and any(step.parts is not None for step in facts)
    anomalies = tuple(shape.anomalies(advanced))
    _keep_columns(shape, advanced)
    children = _children(shape, steps)
    return Joined(advanced, anomalies, children, steps[-1].source, is_whole=False, replace_all=has_parts)


def _in_order_from(shape: Shape, row: Row, facts: Sequence[Facts]) -> list[Facts] | None:
    """Return *facts*, all later than *row*, in their order; None where only all the object's events can tell it."""
    steps: list[Facts] = []
    for group in _by_position(facts):
        ordered = group if len(group) == 1 else _without_a_gap(shape, row, steps, group)
        if ordered is None:
            return None
        steps += ordered
    return steps


def _without_a_gap(shape: Shape, row: Row, steps: Sequence[Facts], group: Sequence[Facts]) -> list[Facts] | None:
    """Return *group*, of one position, as the one chain that begins where *row* and the *steps* before have ended."""
    names = _common_names(group)
    state = {**row, **{name: value for step in steps for name, value in step.columns.items()}}
    # Where it begins is known only of what nothing but the last word of a step can have set.
    is_told = shape.infer is _infer_nothing and not any(step.references for step in group)
    if not is_told or any(state.get(name) is None for name in names):
        return None
    edges, start = _edges(group), _state(state, names)
    ordered, is_choice = _path(shape, edges, start)
    return None if is_choice or _gaps(edges, start) else [edge.facts for edge in ordered]


def fold_all(shape: Shape, facts: Iterable[Facts]) -> Joined | None:
    """Return the row of the object whose events are *facts*, in any order and each once.

    None where there is no event of the object itself: a row is never made up.
    """
    known = list(facts)
    if all(each.is_witness for each in known):
        return None
    path = in_order(shape, known)
    row = _empty(shape, known[0].subject)
    anomalies: list[Anomaly] = []
    for step in path.steps:
        anomalies += [_two_references(step, name, row) for name in _disagreements(row, step)]
        laid = _lay(shape, row, step)
        shape.follow(row, step, laid)
        row = laid
    shape.infer(row)
    real = [step for step in path.steps if step.event_id not in path.twins]
    anomalies += shape.anomalies(row) + shape.review(real)
    _keep_columns(shape, row)
    if path.is_ambiguous:
        anomalies.append(Anomaly(AMBIGUOUS_ORDER, {"as_of": row["as_of"]}))
    # Twins tell one step, and so one child of it; but of two that tell one state, one alone may list the parts.
    children = _children(shape, path.steps if shape.child_of is None else real)
    return Joined(row, tuple(anomalies), children, path.steps[-1].source, is_whole=True, replace_all=True)


def _keep_columns(shape: Shape, row: Row) -> None:
    """Drop from *row* what its steps carried beyond its columns."""
    for name in row.keys() - shape.names:
        del row[name]


def in_order(shape: Shape, facts: Iterable[Facts]) -> Path:
    """Return *facts*, all about one row, in the one order in which they are laid over each other."""
    if len(known := list(facts)) == 1:
        return Path(known, set(), is_ambiguous=False)
    carried: dict[str, Value] | None = None
    steps: list[Facts] = []
    twins: set[str] = set()
    is_ambiguous = False
    for group in _by_position(known):
        ordered, is_ambiguous, doubles = _in_order(shape, group, carried)
        steps += ordered
        twins |= doubles
        for step in ordered:
            carried = {**(carried or {}), **step.after}
    return Path(steps, twins, is_ambiguous)


def _by_position(facts: Iterable[Facts]) -> Iterator[list[Facts]]:
    """Yield *facts* by rank and stamp, the lowest first; those of one position by their ids."""
    ordered = sorted(facts, key=lambda each: (each.position, each.event_id))
    for _, group in groupby(ordered, lambda each: each.position):
        yield list(group)


def _children(shape: Shape, steps: Sequence[Facts]) -> tuple[Row, ...]:
    if shape.child_of is None:
        return next((step.parts for step in reversed(steps) if step.parts is not None), ())
    return tuple(child for child in map(shape.child_of, steps) if child is not None)


def _empty(shape: Shape, subject: Subject) -> Row:
    key = dict(zip(shape.key, subject.key, strict=True))
    return {**shape.empty, "account": subject.account, "livemode": subject.livemode, **key}


def _lay(shape: Shape, row: Row, step: Facts) -> Row:
    """Return *row* with *step*, which comes after all that made it, laid over it."""
    laid = {**row, **step.columns, "event_id": step.event_id, "as_of": step.created}
    if shape.clock_rank is not None and "as_of" in row and shape.rank_of(row) == shape.clock_rank:
        laid[shape.clock_moment] = None
    laid |= {name: reference for name, reference in step.references.items() if reference is not None}
    for name, moment in step.moments.items():
        known = laid[name]
        laid[name] = moment if known is None else min(known, moment)  # type: ignore[type-var]  # moments hold times only
    return laid


def _disagreements(row: Row, step: Facts) -> list[str]:
    """Return the names of the references on which *step* and *row* both speak and differ."""
    return [
        name
        for name, reference in step.references.items()
        if reference is not None and row[name] is not None and row[name] != reference
    ]


def _two_references(step: Facts, name: str, row: Row) -> Anomaly:
    return Anomaly(TWO_REFERENCES, {"column": name, "values": sorted([str(row[name]), str(step.references[name])])})


# Below: the order of events that share a rank and a stamp.

_NOTHING: Final = "nothing comes before a .created event"


@dataclass(frozen=True, slots=True, eq=False)
class _Edge:
    """An event between two states, each reduced to what all events of its group carry."""

    before: Hashable
    after: Hashable
    facts: Facts


def _in_order(
    shape: Shape, group: list[Facts], carried: Mapping[str, Value] | None
) -> tuple[list[Facts], bool, set[str]]:
    """Return *group* in its order, whether its last state is a choice between several, and the ids of its twins."""
    if len(group) == 1:
        return group, False, set()
    edges = _edges(group)
    start = _start(group, carried)
    if _gaps(edges, start):
        edges, twins = _without_twins(edges)
    else:
        twins = {}
    ordered, ambiguous = _path(shape, edges, start)
    doubles = {facts.event_id for others in twins.values() for facts in others}
    return [facts for edge in ordered for facts in (*twins.get(edge, ()), edge.facts)], ambiguous, doubles


def _edges(group: Sequence[Facts]) -> list[_Edge]:
    names = _common_names(group)
    return [
        _Edge(_NOTHING if facts.is_first else _state(_before(facts), names), _state(facts.after, names), facts)
        for facts in group
    ]


def _before(facts: Facts) -> Mapping[str, Value]:
    return facts.after if facts.before is None else facts.before


def _common_names(group: Sequence[Facts]) -> list[str]:
    common = set(group[0].after)
    for facts in group:
        common &= set(facts.after) & set(_before(facts))
    return sorted(common)


def _start(group: Sequence[Facts], carried: Mapping[str, Value] | None) -> Hashable | None:
    """Return the state in which the chain begins, None where nothing tells."""
    if carried is None:
        return _NOTHING if any(facts.is_first for facts in group) else None
    names = _common_names(group)
    return _state(carried, names) if set(names) <= set(carried) else None


def _state(values: Mapping[str, Value], names: Sequence[str]) -> Hashable:
    return tuple(_hashable(values[name]) for name in names)


def _hashable(value: object) -> Hashable:
    if isinstance(value, Mapping):
        return tuple(sorted((key, _hashable(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    # True and 1 are the same key to Python, and not the same state.
    return (type(value).__name__, value)


def _without_twins(edges: Sequence[_Edge]) -> tuple[list[_Edge], dict[_Edge, list[Facts]]]:
    """Return one edge for each step told, the one with the greatest id, and the others of it."""
    told: dict[tuple[Hashable, Hashable], list[_Edge]] = defaultdict(list)
    for edge in edges:
        told[edge.before, edge.after].append(edge)
    kept = [max(same, key=lambda edge: _seniority(edge.facts)) for same in told.values()]
    return kept, {edge: [other.facts for other in told[edge.before, edge.after] if other is not edge] for edge in kept}


def _seniority(facts: Facts) -> tuple[bool, str]:
    """Where nothing else decides: an event over an observation, then the greatest id."""
    return (facts.source != "observation", facts.event_id)


def _gaps(edges: Sequence[_Edge], start: Hashable | None) -> int:
    return _survey(edges, start)[0]


CHAIN_STEPS_MAX: Final = 64
"""How many steps from the end a chain is put in order: earlier ones of the same second cannot reach the row,
unless sixty-four later ones all leave out a key that they carry."""


def _path(shape: Shape, edges: Sequence[_Edge], start: Hashable | None) -> tuple[list[_Edge], bool]:
    """Return *edges* in the order with the fewest gaps, and whether their last state is a choice.

    The order is found from its end: a step may be the last if what is left can be ordered up to it without a
    gap more. Where several may, the shape's preference and then seniority decide.
    """
    left = sorted(edges, key=lambda edge: (shape.prefer(edge.facts), _seniority(edge.facts)), reverse=True)
    gaps, lasts = _survey(left, start)
    is_choice = len(lasts) > 1
    backwards: list[_Edge] = []
    while left and len(backwards) < CHAIN_STEPS_MAX:
        last = next(index for index in range(len(left)) if _may_be_last(left, index, gaps, start))
        backwards.append(left.pop(last))
        gaps = _gaps(left, start)
    return [*reversed(left), *reversed(backwards)], is_choice


def _may_be_last(edges: Sequence[_Edge], index: int, gaps: int, start: Hashable | None) -> bool:
    last = edges[index]
    rest = [*edges[:index], *edges[index + 1 :]]
    gaps_of_rest, ends_of_rest = _survey(rest, start)
    follows = last.before in ends_of_rest or (not rest and start is None)
    return gaps_of_rest + 1 == gaps or (gaps_of_rest == gaps and follows)


def _survey(edges: Sequence[_Edge], start: Hashable | None) -> tuple[int, set[Hashable]]:
    """Return the fewest gaps of any order of *edges* from *start*, and the states in which such an order may end.

    A connected part whose every state is entered as often as it is left is one closed walk, which may end
    wherever it begins. Any other takes as many walks as its states are entered in excess, and they end there.
    A walk needs no gap before it if it is the first and begins in *start*, or anywhere where that is unknown.
    """
    if not edges:
        return 0, {start}
    excess: Counter[Hashable] = Counter()
    for edge in edges:
        excess[edge.after] += 1
        excess[edge.before] -= 1
    walks, lasts, is_free, ends_at_start = 0, set[Hashable](), start is None, False
    parts = _parts(edges)
    for part in parts:
        ends = {state for state in part if excess[state] > 0}
        needed = sum(excess[state] for state in ends) or 1
        walks += needed
        if start in part and (not ends or excess[start] < 0):
            is_free = True
            # Its one walk is the first of all, so it is the last only where it is alone.
            if needed == 1:
                lasts |= (ends or {start}) if len(parts) == 1 else set()
                continue
        elif start in part:
            # As few gaps are left by beginning in the middle, and coming back to it from the part's true start.
            ends_at_start = any(edge.before == start for edge in edges)
        lasts |= ends or part
    if ends_at_start:
        lasts.add(start)
    return walks - is_free, lasts


def _parts(edges: Sequence[_Edge]) -> list[set[Hashable]]:
    """Return the states of each connected part."""
    part_of: dict[Hashable, set[Hashable]] = {}
    for edge in edges:
        one, other = (part_of.setdefault(state, {state}) for state in (edge.before, edge.after))
        if one is not other:
            small, large = sorted((one, other), key=len)
            large |= small
            part_of.update(dict.fromkeys(small, large))
    return list({id(part): part for part in part_of.values()}.values())
