"""Computes the one order of an object's events, from the events alone.

Note [The chain is an Eulerian path]
    Several events may share a rank and a second. Each reports the state after it and, through its previous attributes,
    the state before it. So states are nodes and events are edges, and an order without a gap is a path that takes every
    edge once. Whether there is such a path, and where it ends, follows from the nodes' degrees, so nothing is searched.
    If there is none, the fewest gaps follow from the degrees as well.

Note [A doubt is several courses]
    The events of a second may have several possible ends: a circle may begin anywhere, and an equal step may be a twin.
    Each end is kept as a course of its own, the preferred one first. The courses that fit the next second with the
    fewest gaps go on, so a later event decides the order of earlier ones. The object is in doubt if the courses that
    are left at the end would give different rows.

Note [A reading may be of the next second]
    An observation carries the earliest time at which Stripe may have answered, often a second before the state that it
    saw. Suppose that a reading came shortly before a second, that its state is one of this second, and that the events
    before the reading did not lead to that state. Then it was read between two of the second's own events, and the
    second does not begin with it. If that leaves more gaps, however, an event was missed, and the second does begin
    with the reading. If no event came before the reading, it is not known where the second begins.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Final, TypeAlias

from msgspec import Struct

from worker.folds.facts import Anomaly, Facts, Value

Position: TypeAlias = tuple[int, tuple[object, ...]]
Stamp: TypeAlias = tuple[object, ...]

COURSES_MAX: Final = 8
"""Courses that are kept; of more, the least preferred are dropped. The object is in doubt with two as with more."""
ENDINGS_MAX: Final = 64
"""Ends of one second that are examined, because a circle of hundreds of states may end in any of them. With more events
than this fewer ends are examined, but never fewer than ``COURSES_MAX``."""
PLAIN_STEPS_MAX: Final = 16
"""Up to this many events of a second, states are compared with each other. Beyond it they are hashed."""
CHAIN_STEPS_MAX: Final = 64
"""Steps of a second that are ordered, counted from the end. Earlier steps of the same second cannot affect the row,
unless sixty-four later ones all lack a key that they carry."""

LOOKS_MAX: Final = 16_384
"""Looks at single events that the order of one second may take. All its events are looked at once for each state in
which the second may begin, and for each gap that a twin may make. If that takes more looks (as with 250 equal pairs,
none of which fits another), the second is not ordered: seniority decides, and each state after an event is a possible
end."""

READING_TIME_MAX: Final = timedelta(seconds=5)
"""How much earlier than the state that it saw a reading may be dated: the call's duration plus less than a second."""

SPARE_MAX: Final = 16
"""Spare equal steps of a second up to which we try whether leaving out some of them adds no gap. With more of them we
assume that it is possible."""

_NOTHING: Final = "nothing comes before a .created event"


class Path(Struct, frozen=True):
    """Events in their order, the ids of those left out as twins, and whether different rows are possible at the end.

    *anomalies* are those that the order itself shows. *opening* is the row's state before its first change that is to
    be announced, if the order shows it.
    """

    steps: list[Facts]
    twins: set[str]
    is_ambiguous: bool
    anomalies: tuple[Anomaly, ...] = ()
    opening: Mapping[str, Value] | None = None


@dataclass(frozen=True, slots=True)
class Testimony:
    """The steps that another source lists of one second, each by its state before and after, and their *end*.

    The end is None if that source may not have seen the whole second. *name* is the column of these states.
    """

    name: str
    steps: Counter[tuple[Value, Value]]
    end: Value

    def step_of(self, row: Facts) -> tuple[Value, Value]:
        """Return the step that *row* reports in the column *name*."""
        return ((row.before or {}).get(self.name), row.after.get(self.name))


def _no_preference(_: Facts) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides the order, in addition to the events' states.

    *names* are the columns in which courses must differ for a doubt. *prefer* ranks last states where several are
    possible. *rows* holds, by event, the facts of another row of the object that shares its order. *testimony* holds,
    by stamp, the steps that another source lists. The chain begins in the state *start*, if that fits. Without
    *may_repeat* no event is the twin of another. With *counts* there is also a doubt if it is uncertain how often that
    other row was moved. *ranks* are the ranks of the states, by their ``status``.
    """

    names: Collection[str]
    prefer: Callable[[Facts], int] = _no_preference
    rows: Mapping[str, Facts] = field(default_factory=dict)
    testimony: Mapping[Stamp, Testimony] = field(default_factory=dict)
    start: Mapping[str, Value] = field(default_factory=dict)
    may_repeat: bool = True
    counts: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)

    def shows_rise(self, facts: Facts) -> bool:
        """Return whether the previous attributes of an event show that it raised the rank."""
        if facts.before is None:
            return False
        rank = self.ranks.get(str(facts.before.get("status")))
        return rank is not None and rank < facts.rank

    def moves(self, facts: Facts) -> bool:
        """Return whether an event moved the row that shares its order; False if that is not to be counted."""
        row = self.rows.get(facts.event_id) if self.counts else None
        return (
            row is not None
            and row.before is not None
            and any(row.before[name] != row.after[name] for name in self.names)
        )

    def carried(self, facts: Facts) -> Mapping[str, Value]:
        """Return the state after an event, together with that of the row that shares its order.

        The row's values have names of their own, because both may have a status or a currency, with other values.
        """
        row = self.rows.get(facts.event_id)
        return facts.after if row is None else {**facts.after, **{_of_row(name): row.after[name] for name in row.after}}


def _of_row(name: str) -> str:
    return f"row: {name}"


def order(facts: Iterable[Facts], rules: Rules) -> Path:
    """Return *facts* in their one order. They are all of one object, each event once."""
    groups = list(by_position(facts))
    plain = _plain_order(groups, rules)
    if plain is not None:
        return Path(plain, set(), is_ambiguous=False)
    courses = [_Course(None, [], dict(rules.start))]
    for group in groups:
        courses = _follow(courses, group, rules)
    best, *others = courses
    steps, twins = best.unwound(rules)
    names = [_of_row(name) for name in rules.names] if rules.rows else rules.names
    is_ambiguous = any(best.carried.get(name) != each.carried.get(name) for each in others for name in names)
    is_ambiguous |= not best.is_countable or any(each.moves != best.moves for each in others)
    return Path(steps, twins, is_ambiguous)


def of_rows(path: Path, rules: Rules) -> Path:
    """Return the facts in ``rules.rows`` in the order of *path*, which is that of their events."""
    steps = [rules.rows[step.event_id] for step in path.steps if step.event_id in rules.rows]
    return Path(steps, path.twins, path.is_ambiguous)


def by_position(facts: Iterable[Facts]) -> Iterator[list[Facts]]:
    """Yield *facts* in groups of one rank and stamp, the lowest first. Each group is sorted by the events' ids."""
    placed = sorted([(each.position, each.event_id, number, each) for number, each in enumerate(facts)])
    for _, group in groupby(placed, itemgetter(0)):
        yield [facts for *_, facts in group]


def only_order(group: Sequence[Facts], state: Mapping[str, Value]) -> list[Facts] | None:
    """Return *group*, of one position, as the one chain that begins in *state*.

    Return None if *state* lacks a value, if the chain has a gap or several ends, or if two of its steps are equal.
    """
    names = _common_names(group)
    if any(state.get(name) is None for name in names):
        return None
    edges, start = _edges(group, names), _state(state, names)
    gaps, ends = _survey(edges, start)
    if gaps or len(ends) > 1 or len({edge.step for edge in edges}) < len(edges):
        return None
    return [edge.facts for edge in _in_order(_Ending(edges, start, gaps, ends.pop()), _no_preference)]


# ---- The usual seconds ----


def _plain_order(groups: Sequence[list[Facts]], rules: Rules) -> list[Facts] | None:
    """Return the events of *groups* in order where each group is one walk that goes on from the one before.

    A walk never returns to a state that it has left. Return None where ``_follow`` may find more than one course: it
    finds this order as well, and takes ten times as long.
    """
    steps: list[Facts] = []
    carried: dict[str, Value] = {}
    until = 0
    for group in groups:
        ordered: list[Facts] | None = group
        if len(group) > 1:
            if rules.testimony or rules.start or len(group) > PLAIN_STEPS_MAX:
                return None
            # After an event of a later second, or a reading, the state before this second is found by other rules.
            if steps and (steps[-1].stamp > group[0].stamp or _is_reading(steps[-1])):
                return None
            for step in steps[until:]:
                carried.update(step.after)
            until = len(steps)
            ordered = _plain_walk(group, carried, rules)
        if ordered is None:
            return None
        steps += ordered
    return steps


def _plain_walk(group: Sequence[Facts], earlier: Mapping[str, Value], rules: Rules) -> list[Facts] | None:
    """Return *group*, of one position, as one walk that goes on from the state *earlier*; None if it is none.

    *earlier* is empty where no event came before. All of *group* must carry the same keys.
    """
    states: list[Mapping[str, Value]] = []
    onward: dict[int, tuple[int, Facts]] = {}
    staying: dict[int, list[Facts]] = {}
    for facts in group:
        after = _number_of(facts.after, states)
        before = after if facts.before is None else _number_of(facts.before, states)
        if facts.is_first:
            before = _BEFORE_ALL
        if before == after:
            staying.setdefault(after, []).append(facts)
        elif before in onward:
            return None
        else:
            onward[before] = after, facts
    keys = states[0].keys()
    if (staying and rules.counts) or any(state.keys() != keys for state in states):
        return None
    walk = _states_of(onward, staying)
    if walk is None or not (walk[0] == _BEFORE_ALL or _goes_on(states[walk[0]], earlier)):
        return None
    steps: list[Facts] = []
    for number in walk:
        if number in staying:
            steps += _preferred_last(staying[number], rules.prefer)
        if number in onward:
            steps.append(onward[number][1])
    return steps


_BEFORE_ALL: Final = -1
"""Stands for the state before a ``.created`` event."""


def _number_of(state: Mapping[str, Value], states: list[Mapping[str, Value]]) -> int:
    """Return the index of *state* in *states*, and append it if it is not there."""
    for number, known in enumerate(states):
        if known == state and _is_same(known, state):
            return number
    states.append(state)
    return len(states) - 1


def _is_same(one: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    """Return whether the equal states *one* and *other* are the same to ``_state`` as well.

    A column's own values are of one type, but in the JSON of a column may be True and 1, which are equal for Python.
    """
    nested = [name for name, value in one.items() if value and type(value) is dict]
    return not nested or all(_hashable(one[name]) == _hashable(other[name]) for name in nested)


def _states_of(onward: Mapping[int, tuple[int, Facts]], staying: Collection[int]) -> list[int] | None:
    """Return the states of the one walk that takes each of the steps *onward* and passes all states *staying*."""
    entered = {after for after, _ in onward.values()}
    firsts = onward.keys() - entered if onward else set(staying)
    if len(entered) < len(onward) or len(firsts) != 1:
        return None
    walk = [*firsts]
    while (step := onward.get(walk[-1])) is not None:
        walk.append(step[0])
    # A circle next to the walk is left over.
    return walk if len(walk) == len(onward) + 1 and all(number in walk for number in staying) else None


def _goes_on(state: Mapping[str, Value], earlier: Mapping[str, Value]) -> bool:
    """Return whether *state* fits what is known from *earlier*."""
    if state.items() <= earlier.items():
        return _is_same(state, earlier)
    shared = [name for name in state if name in earlier]
    return len(shared) < len(state) and _state(state, shared) == _state(earlier, shared)


def _preferred_last(several: Sequence[Facts], prefer: Callable[[Facts], int]) -> Sequence[Facts]:
    return several if len(several) == 1 else sorted(several, key=lambda facts: (prefer(facts), _seniority(facts)))


# ---- Courses of events ----


@dataclass(frozen=True, slots=True, eq=False)
class _Edge:
    """An event between two states, each reduced to the keys that all events of its group carry."""

    before: Hashable
    after: Hashable
    facts: Facts

    @property
    def step(self) -> tuple[Hashable, Hashable]:
        return (self.before, self.after)


@dataclass(frozen=True)
class _Ending:
    """One way through the events of a position: *edges* from *start* to *end*, with a number of *gaps*.

    The edges *left_out* are twins. The ending *is_doubtful* if not all of them have to be left out. It is not
    *is_countable* if more could be left out with the same end. If it *is_unordered*, only its last edge is known, which
    leads to *end*. *walk* has the edges from the last to the first where their order is known already.
    """

    edges: Sequence[_Edge]
    start: Hashable | None
    gaps: int
    end: Hashable
    left_out: tuple[_Edge, ...] = ()
    is_doubtful: bool = False
    is_unordered: bool = False
    is_countable: bool = True
    walk: Sequence[_Edge] = ()


@dataclass(frozen=True)
class _Course:
    """One possible order of the events up to the last one of *group*. *carried* is the state after that event.

    *moves* counts how often the row that shares the order was moved; the number is uncertain without *is_countable*.
    """

    before: "_Course | None"
    group: Sequence[Facts]
    carried: Mapping[str, Value]
    ending: _Ending | None = None
    moves: int = 0
    is_countable: bool = True

    @cached_property
    def state(self) -> Hashable:
        """The state *carried*, in a form to compare courses by."""
        return _hashable(self.carried)

    def earlier_than(self, position: Position) -> "_Course | None":
        """Return the course up to the last event that came before *position* in time, None if none did."""
        course: _Course | None = self
        while course is not None and course.group and course.group[0].stamp > position[1]:
            course = course.before
        return course if course is not None and course.group else None

    def unwound(self, rules: Rules) -> tuple[list[Facts], set[str]]:
        """Return all the events in their order, and the ids of the twins."""
        parts: list[list[Facts]] = []
        twins: set[str] = set()
        course: _Course | None = self
        while course is not None:
            parts.append(list(course.group) if course.ending is None else _laid_out(course.ending, rules))
            if course.ending is not None:
                twins |= {edge.facts.event_id for edge in course.ending.left_out}
            course = course.before
        return [step for part in reversed(parts) for step in part], twins


def _follow(courses: Sequence[_Course], group: list[Facts], rules: Rules) -> list[_Course]:
    """Return *courses* continued by *group* in the ways with the fewest gaps, the preferred course first."""
    if len(group) == 1 and len(courses) == 1:
        (course,), (facts,) = courses, group
        moves = course.moves + rules.moves(facts)
        carried = {**course.carried, **rules.carried(facts)}
        return [_Course(course, group, carried, moves=moves, is_countable=course.is_countable)]
    names, testimony = _common_names(group), rules.testimony.get(group[0].stamp)
    edges = _edges(group, names)
    begun = [(course, starts) for course in courses for starts in [_beginnings(edges, names, course, rules)]]
    if _is_too_much(edges, sum(len(starts) for _, several in begun for starts in several)):
        found = [(course, each) for course in courses for each in _unordered(edges)]
    elif (only := _only_ending(edges, begun, testimony, rules)) is not None:
        found = [(begun[0][0], only)]
    else:
        ended = [(course, [_endings(edges, each, testimony, rules) for each in several]) for course, several in begun]
        found = [(course, each) for course, several in ended for each in _chosen(several)]
    fewest = min(ending.gaps for _, ending in found)
    found = [(course, ending) for course, ending in found if ending.gaps == fewest]
    endings_max = ENDINGS_MAX if len(group) <= ENDINGS_MAX else max(COURSES_MAX, ENDINGS_MAX**2 // len(group))
    if len(found) > endings_max:
        found = _most_preferred(found, edges, endings_max, rules)
    followed = [_followed(course, group, ending, rules) for course, ending in found]
    if testimony is not None and testimony.end is not None:
        followed = [each for each in followed if each.carried.get(_of_row(testimony.name)) == testimony.end] or followed
    if len(followed) == 1:
        return followed
    followed.sort(key=lambda each: _rank_of(each, rules), reverse=True)
    # An event after a reading may go on from the state before the reading, so that state distinguishes courses too.
    befores = [each.before for each in followed] if all(map(_is_reading, group)) else [None] * len(followed)
    distinct: dict[Hashable, _Course] = {}
    for each, before in zip(followed, befores, strict=True):
        key = (each.state, None if before is None else before.state)
        chosen = distinct.setdefault(key, each)
        if chosen.moves != each.moves or not each.is_countable:
            distinct[key] = replace(chosen, is_countable=False)
    return list(distinct.values())[:COURSES_MAX]


def _chosen(several: Sequence[Sequence[_Ending]]) -> Sequence[_Ending]:
    """Return the endings of *several* with the fewest gaps; if more than one has as few, the first.

    The first may begin in any state, if no event came before a reading. Then the reading's state is the likeliest
    beginning.
    """
    fewest = min(each.gaps for endings in several for each in endings)
    first, *others = [endings for endings in several if min(each.gaps for each in endings) == fewest]
    if others and all(each.start is None for each in first):
        return [*others[0], *(replace(each, is_doubtful=True) for each in first)]
    return first


def _rank_of(course: _Course, rules: Rules) -> tuple[bool, int, tuple[bool, str]]:
    ending = course.ending
    assert ending is not None, "what follows has an ending"  # noqa: S101 - for the types alone
    last = _last(ending, rules.prefer).facts
    return (not ending.is_doubtful, rules.prefer(last), _seniority(last))


def _most_preferred(
    found: Sequence[tuple[_Course, _Ending]], edges: Sequence[_Edge], number: int, rules: Rules
) -> list[tuple[_Course, _Ending]]:
    """Return the first *number* of *found* by ``_rank_of``.

    Of the edges into an end, the preferred one is taken for the last edge.
    """
    best: dict[Hashable, tuple[int, tuple[bool, str]]] = {}
    for edge in edges:
        key = (rules.prefer(edge.facts), _seniority_of(edge))
        best[edge.after] = max(key, best.get(edge.after, key))
    return sorted(found, key=lambda each: (not each[1].is_doubtful, best[each[1].end]), reverse=True)[:number]


def _followed(course: _Course, group: list[Facts], ending: _Ending, rules: Rules) -> _Course:
    names = set().union(*map(rules.carried, group))
    carried: dict[str, Value] = {}
    for facts in _from_end(ending, rules):
        carried = {**rules.carried(facts), **carried}
        if len(carried) == len(names):
            # All names have a value now, so earlier events make no difference.
            break
    moves = course.moves + sum(rules.moves(edge.facts) for edge in _without(ending.edges, ending.left_out))
    is_countable = course.is_countable and ending.is_countable
    return _Course(course, group, {**course.carried, **carried}, ending, moves, is_countable)


def _laid_out(ending: _Ending, rules: Rules) -> list[Facts]:
    """Return the events of *ending* in their order."""
    return [*_from_end(ending, rules)][::-1]


def _from_end(ending: _Ending, rules: Rules) -> Iterator[Facts]:
    """Yield the events of *ending* from the last to the first. Twins come next to the last step that they repeat."""
    twins: dict[tuple[Hashable, Hashable], list[Facts]] = defaultdict(list)
    for edge in ending.left_out:
        twins[edge.step].append(edge.facts)
    for edge in _backwards(ending, rules.prefer):
        yield edge.facts
        yield from twins.pop(edge.step, ())


# ---- Where the events of one position begin and end ----


def _is_too_much(edges: Sequence[_Edge], starts: int) -> bool:
    """Return whether ordering *edges* from each of *starts* takes more looks than ``LOOKS_MAX``."""
    looks = len(edges) * starts
    if looks * len(edges) <= LOOKS_MAX:
        return False
    copies = len(edges) - len({edge.step for edge in edges})
    return looks * (1 + min(copies, _Degrees(edges, None).gaps)) > LOOKS_MAX


def _unordered(edges: Sequence[_Edge]) -> list[_Ending]:
    """Return an ending in each state that one of *edges* leads to."""
    ends = dict.fromkeys(edge.after for edge in edges)
    return [_Ending(edges, None, 0, end, is_unordered=True) for end in ends]


def _only_ending(
    edges: Sequence[_Edge],
    begun: Sequence[tuple[_Course, Sequence[Sequence[Hashable | None]]]],
    testimony: Testimony | None,
    rules: Rules,
) -> _Ending | None:
    """Return what ``_endings`` finds where *edges* are one walk that never returns to a state that it has left.

    This is the usual second. Return None for any other, and where it is not known to begin where the walk does.
    """
    if testimony is not None or len(begun) > 1 or len(begun[0][1]) > 1 or len(edges) > CHAIN_STEPS_MAX:
        return None
    staying = [edge for edge in edges if edge.before == edge.after]
    if staying and rules.counts:
        return None  # whether a twin moved another row is to be counted
    walk = _walk([edge for edge in edges if edge.before != edge.after] if staying else edges, staying)
    if walk is None:
        return None
    path, (starts,) = _with_staying(walk, staying, rules), begun[0][1]
    start = next((each for each in starts if each is not None and each == path[-1].before), None)
    if start is None and None not in starts:
        return None
    return _Ending(edges, start, 0, path[0].after, walk=path)


def _walk(moving: Sequence[_Edge], staying: Sequence[_Edge]) -> list[_Edge] | None:
    """Return *moving* as one walk through states that all differ and include those of *staying*; None if it is none."""
    after = {edge.before: edge for edge in moving}
    entered = {edge.after for edge in moving}
    firsts = after.keys() - entered
    if len(after) < len(moving) or len(entered) < len(moving) or len(firsts) != min(len(moving), 1):
        return None
    stayed = {edge.before for edge in staying}
    if not moving:
        return [] if len(stayed) == 1 else None
    walk = [after[firsts.pop()]]
    while (further := after.get(walk[-1].after)) is not None:
        walk.append(further)
    return walk if len(walk) == len(moving) and stayed <= after.keys() | entered else None


def _with_staying(walk: Sequence[_Edge], staying: Sequence[_Edge], rules: Rules) -> list[_Edge]:
    """Return *walk* from its last edge to the first, with the edges *staying* in a state after the one that enters it.

    Of those that stay in one state the preferred edge is the last.
    """
    if not staying:
        return [*reversed(walk)]
    at: dict[Hashable, list[_Edge]] = defaultdict(list)
    for edge in _preferred(staying, rules.prefer):
        at[edge.after].append(edge)
    path: list[_Edge] = []
    for edge in reversed(walk):
        path += [*at.pop(edge.after, ()), edge]
    return [*path, *(edge for left in at.values() for edge in left)]


def _endings(
    edges: Sequence[_Edge], starts: Sequence[Hashable | None], testimony: Testimony | None, rules: Rules
) -> list[_Ending]:
    """Return an ending for every end that an order of *edges* from one of *starts* with the fewest gaps may have."""
    kept, left_out, floor = _by_testimony(edges, testimony, rules)
    twins = _Twins(kept, floor) if rules.may_repeat else _NO_TWINS
    found: list[_Ending] = []
    for start in starts:
        ways = _without_twins(kept, start, twins)
        for number, way in enumerate(ways):
            degrees, left = _Degrees(_without(kept, way), start), (*left_out, *way)
            gaps, ends = degrees.survey()
            less = _ends_with_less_moves(degrees, twins.spare(way), rules)
            found += [_Ending(edges, start, gaps, end, left, number > 0, is_countable=end not in less) for end in ends]
            found += _with_less(found[-1], degrees, twins, way, rules)
    fewest = min(each.gaps for each in found)
    found = [each for each in found if each.gaps == fewest]
    # A guessed beginning counts only if no known earlier state fits as well.
    return [each for each in found if each.start is not None] or found


def _beginnings(
    edges: Sequence[_Edge], names: Sequence[str], course: _Course, rules: Rules
) -> list[list[Hashable | None]]:
    """Return the states in which *edges* may begin after *course*: without the last readings in it, and with them.

    There is a second list only if readings may show states of *edges*. It counts only if it leaves fewer gaps.
    """
    earlier = course.earlier_than(edges[0].facts.position)
    before = _before_readings(earlier, edges, names, rules)
    ways = [earlier] if before is earlier else [before, earlier]
    return [_starts(edges, names, course, each, rules) for each in ways]


def _starts(
    edges: Sequence[_Edge], names: Sequence[str], course: _Course, earlier: _Course | None, rules: Rules
) -> list[Hashable | None]:
    """Return the states in which *edges* of *course* may begin after *earlier*. None stands for any state."""
    found: list[Hashable | None] = [_NOTHING] if any(edge.before is _NOTHING for edge in edges) else []
    if earlier is None:
        begun = course.carried if course.before is None else {}
        found += [_state(begun, names)] if begun and begun.keys() >= set(names) else []
        return found if _NOTHING in found else [*found, None]
    shared = [name for name in names if name in earlier.carried]
    known = _state(earlier.carried, shared)
    if len(shared) == len(names):
        fitting = [edge.before for edge in edges if edge.before == known]
    else:
        fitting = [
            edge.before
            for edge in edges
            if edge.before is not _NOTHING and _state(_before(edge.facts), shared) == known
        ]
    found += fitting or [known]
    if earlier.group[0].rank < edges[0].facts.rank and not any(rules.shows_rise(edge.facts) for edge in edges):
        found += _movers(edges)
    return list(dict.fromkeys(found))


def _before_readings(
    course: _Course | None, edges: Sequence[_Edge], names: Sequence[str], rules: Rules
) -> _Course | None:
    """Return *course* without its last readings if these may show states of *edges*, otherwise *course*.

    See Note [A reading may be of the next second].
    """
    position = edges[0].facts.position
    before, read = course, list[Facts]()
    while before is not None and _may_be_of(before, position) and _is_reading(_last_of(before, rules)):
        steps = list(before.group) if before.ending is None else _laid_out(before.ending, rules)
        until = max((number for number, step in enumerate(steps, 1) if not _is_reading(step)), default=0)
        read += steps[until:]
        before = _with_group(before, steps[:until], position, rules)
    carried = before.carried if before is not None else {}
    seen = {_known_of({**carried, **each.after}, names) for each in read}
    if seen <= {_known_of(carried, names)}:
        return course
    states = {state for edge in edges for state in (edge.before, edge.after)}
    is_of_second = any(each.stamp == position[1] for each in read)
    return before if is_of_second or seen & states else course


def _is_reading(facts: Facts) -> bool:
    """Return whether *facts* carry the time of their reading. Transactions of a ledger have a time of their own."""
    return facts.is_observation and facts.before is None


def _may_be_of(course: _Course, position: Position) -> bool:
    """Return whether a reading at the end of *course* is new enough to show the second of *position*."""
    dated, begun = course.group[0].stamp[0], position[1][0]
    # Stamps begin with a time.
    return isinstance(dated, datetime) and isinstance(begun, datetime) and begun - dated <= READING_TIME_MAX


def _last_of(course: _Course, rules: Rules) -> Facts:
    return course.group[-1] if course.ending is None else next(_from_end(course.ending, rules))


def _with_group(course: _Course, group: Sequence[Facts], position: Position, rules: Rules) -> _Course | None:
    """Return *course* with its last group replaced by the ordered *group*; without that group if *group* is empty."""
    if not group:
        return None if course.before is None else course.before.earlier_than(position)
    carried = dict(course.before.carried) if course.before is not None else {}
    for facts in group:
        carried |= rules.carried(facts)
    return _Course(course.before, group, carried)


def _known_of(carried: Mapping[str, Value], names: Sequence[str]) -> Hashable | None:
    """Return the state *carried*, None if it lacks one of *names*."""
    return _state(carried, names) if carried.keys() >= set(names) else None


def _movers(edges: Sequence[_Edge]) -> Iterator[Hashable]:
    """Yield the states after events that may have raised the rank, but do not report the state before.

    They are needed only where no event shows that it raised the rank.
    """
    for edge in edges:
        if edge.facts.before is None and not edge.facts.is_observation:
            yield edge.after


def _edges(group: Sequence[Facts], names: Sequence[str]) -> list[_Edge]:
    return [_edge(facts, names) for facts in group]


def _edge(facts: Facts, names: Sequence[str]) -> _Edge:
    after = _state(facts.after, names)
    if facts.is_first:
        return _Edge(_NOTHING, after, facts)
    return _Edge(after if facts.before is None else _state(facts.before, names), after, facts)


def _before(facts: Facts) -> Mapping[str, Value]:
    return facts.after if facts.before is None else facts.before


def _common_names(group: Sequence[Facts]) -> list[str]:
    common = set(group[0].after)
    for facts in group:
        common &= facts.after.keys() & _before(facts).keys()
    return sorted(common)


def _state(values: Mapping[str, Value], names: Sequence[str]) -> Hashable:
    # Most values are plain, and a call for each takes longer than the rest.
    return tuple([value if type(value) in _PLAIN else _hashable(value) for value in map(values.__getitem__, names)])


_PLAIN: Final = frozenset({str, int, datetime, type(None)})
"""No value of one of these types equals one of another. A bool is none of them: for Python, True equals 1."""


def _hashable(value: object) -> Hashable:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (dict, Mapping)):  # in this order, because the check for a mapping is slow
        return (dict, tuple(sorted((key, _hashable(item)) for key, item in value.items())))
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return (type(value), value)


# ---- Twins ----

_Step: TypeAlias = tuple[Hashable, Hashable]
_RowStep: TypeAlias = tuple[Value, Value]


@dataclass(frozen=True, slots=True)
class _Floor:
    """The steps that are known to have happened: *steps* by the event that reports them, *least* how often each did."""

    steps: Mapping[str, _RowStep]
    least: Mapping[_RowStep, int]


_NO_FLOOR: Final = _Floor({}, {})


def _repeated(edges: Sequence[_Edge]) -> list[list[_Edge]]:
    """Return the edges of each step that several *edges* report, the least senior edge first.

    The steps are ordered by their most senior edges, the greatest first.
    """
    if len({(edge.before, edge.after) for edge in edges}) == len(edges):
        return []
    reported: dict[_Step, list[_Edge]] = defaultdict(list)
    for edge in edges:
        reported[edge.step].append(edge)
    several = [sorted(same, key=_seniority_of) for same in reported.values() if len(same) > 1]
    return sorted(several, key=lambda same: _seniority_of(same[-1]), reverse=True)


class _Twins:
    """The steps that several edges report. All edges of a step but one may be left out.

    If a step is reported only as often as it is known to have happened, it has no edge to spare.
    """

    def __init__(self, edges: Sequence[_Edge], floor: _Floor) -> None:
        self._floor, self._repeated = floor, _repeated(edges)
        self._counts = Counter(map(self._row_step, edges)) if self._repeated and floor.steps else None

    def _row_step(self, edge: _Edge) -> "_RowStep | None":
        return self._floor.steps.get(edge.facts.event_id)

    def spare(self, left_out: Collection[_Edge] = ()) -> list[_Edge]:
        """Return the next edge of each step that may be left out after those *left_out*, the least senior one."""
        if not self._repeated:
            return []
        gone = Counter(edge.step for edge in left_out)
        rest = [same[gone[same[0].step] :] for same in self._repeated]
        able = [same[0] for same in rest if len(same) > 1]
        if self._counts is None:
            return able
        times = self._counts - Counter(map(self._row_step, left_out))
        steps = [(self._row_step(edge), edge) for edge in able]
        return [edge for step, edge in steps if step is None or times[step] > self._floor.least.get(step, 0)]


_NO_TWINS: Final = _Twins((), _NO_FLOOR)


def _without(edges: Sequence[_Edge], left_out: Collection[_Edge]) -> list[_Edge]:
    if not left_out:
        return list(edges)
    gone = set(left_out)
    return [edge for edge in edges if edge not in gone]


def _without_twins(edges: Sequence[_Edge], start: Hashable | None, twins: _Twins) -> list[tuple[_Edge, ...]]:
    """Return every way to leave out twins so that *edges* lose gaps, the chosen way first."""
    found: list[tuple[_Edge, ...]] = [()]
    if not twins.spare():
        return found
    degrees = _Degrees(edges, start)
    while gaps := degrees.gaps_without(found[0]):
        fewer: dict[Hashable, tuple[_Edge, ...]] = {}
        for left_out in found:
            with degrees.without(left_out):
                for way in _ways_between(twins.spare(left_out), degrees):
                    if len(fewer) == COURSES_MAX:
                        break
                    if degrees.gaps_without(way) < gaps:
                        more = (*left_out, *way)
                        fewer.setdefault(frozenset(Counter(edge.step for edge in more).items()), more)
        if not fewer:
            break
        found = list(fewer.values())
    return found


def _ways_between(spare: Sequence[_Edge], degrees: "_Degrees") -> list[tuple[_Edge, ...]]:
    """Return the ways by *spare* edges from states left too often to states entered too often.

    The way that should be left out first comes first.
    """
    if not spare:
        return []
    left, entered = degrees.unequal()
    number = {edge: index for index, edge in enumerate(spare)}
    into = _by_end(spare)
    ways = [way for end in entered for state, way in _ways(into, number, [end]).items() if state in left]
    return sorted(ways, key=lambda way: (len(way), [number[edge] for edge in way]))


def _with_less(
    ending: _Ending, degrees: "_Degrees", twins: _Twins, left_out: tuple[_Edge, ...], rules: Rules
) -> Iterator[_Ending]:
    """Yield endings that leave out more of *twins* than *left_out* does, and so end elsewhere without more gaps."""
    spare = twins.spare(left_out)
    if not spare:
        return
    ends = degrees.survey()[1]
    number = {edge: index for index, edge in enumerate(spare)}
    for way in _ways(_by_end(spare), number, ends.copy()).values():
        with degrees.without(way):
            # The ends of parts that are not connected with the way stay the same.
            others = degrees.ends_around(way[0].before) - ends if way and degrees.gaps == ending.gaps else ()
            less = _ends_with_less_moves(degrees, twins.spare((*left_out, *way)), rules) if others else set()
        if others:
            ends |= others
            out = (*ending.left_out, *way)
            for end in others:
                yield replace(ending, end=end, left_out=out, is_doubtful=True, is_countable=end not in less)


def _ends_with_less_moves(degrees: "_Degrees", spare: Sequence[_Edge], rules: Rules) -> set[Hashable]:
    """Return the possible ends of orders that leave out steps which moved the row, and have no more gaps."""
    if not rules.counts:
        return set()
    if len(spare) > SPARE_MAX:
        return degrees.survey()[1]
    gaps, number, into = degrees.gaps, {edge: index for index, edge in enumerate(spare)}, _by_end(spare)
    found: set[Hashable] = set()
    for last in spare:
        for before in _ways(into, number, [last.before]).values():
            way = (*before, last)
            with degrees.without(way):
                if degrees.gaps <= gaps and any(rules.moves(edge.facts) for edge in way):
                    found |= degrees.survey()[1]
    return found


def _by_end(edges: Iterable[_Edge]) -> dict[Hashable, list[_Edge]]:
    into: dict[Hashable, list[_Edge]] = defaultdict(list)
    for edge in edges:
        into[edge.after].append(edge)
    return into


def _ways(
    into: Mapping[Hashable, Sequence[_Edge]], number: Mapping[_Edge, int], ends: Iterable[Hashable]
) -> dict[Hashable, tuple[_Edge, ...]]:
    """Return, by state, the shortest way of spare edges from it to one of *ends*. Without them a chain ends there.

    *into* holds the edges by the state that they lead to, and *number* holds their order.
    """
    ways: dict[Hashable, tuple[_Edge, ...]] = dict.fromkeys(ends, ())
    reached = list(ways)
    while reached:
        further: dict[Hashable, tuple[_Edge, ...]] = {}
        edges = [edge for state in reached for edge in into.get(state, ()) if edge.before not in ways]
        for edge in sorted(edges, key=number.__getitem__):
            further.setdefault(edge.before, (edge, *ways[edge.after]))
        ways |= further
        reached = list(further)
    return ways


def _by_testimony(
    edges: Sequence[_Edge], testimony: Testimony | None, rules: Rules
) -> tuple[list[_Edge], tuple[_Edge, ...], _Floor]:
    """Return *edges* without the twins that *testimony* shows, these twins, and the steps that it shows to be real."""
    if testimony is None:
        return list(edges), (), _NO_FLOOR
    rows = [row for edge in edges if (row := rules.rows.get(edge.facts.event_id)) is not None]
    steps = {row.event_id: testimony.step_of(row) for row in rows if row.before is not None}
    floor = _Floor(steps, testimony.steps)
    left_out = () if testimony.end is None else tuple(_beyond(edges, floor))
    return _without(edges, left_out), left_out, floor


def _beyond(edges: Sequence[_Edge], floor: _Floor) -> Iterator[_Edge]:
    """Yield the surplus of *edges*: those that report a step of *floor* more often than it happened."""
    counts = Counter(floor.steps.get(edge.facts.event_id) for edge in edges)
    for same in _repeated(edges):
        for edge in same[:-1]:
            step = floor.steps.get(edge.facts.event_id)
            if step is None or step not in floor.least or counts[step] <= floor.least[step]:
                break
            counts[step] -= 1
            yield edge


# ---- The Eulerian path ----


def _seniority(facts: Facts) -> tuple[bool, str]:
    """Return the rank that decides if nothing else does: an event outranks an observation, then the greater id wins."""
    return (not facts.is_observation, facts.event_id)


def _seniority_of(edge: _Edge) -> tuple[bool, str]:
    return _seniority(edge.facts)


def _preferred(edges: Sequence[_Edge], prefer: Callable[[Facts], int]) -> list[_Edge]:
    return sorted(edges, key=lambda edge: (prefer(edge.facts), _seniority_of(edge)), reverse=True)


def _last(ending: _Ending, prefer: Callable[[Facts], int]) -> _Edge:
    """Return the last edge of *ending*. If several edges may be the last, it is the preferred one."""
    return next(_backwards(ending, prefer))


def _in_order(ending: _Ending, prefer: Callable[[Facts], int]) -> list[_Edge]:
    """Return the edges of *ending* in an order that has the ending's number of gaps."""
    return [*_backwards(ending, prefer)][::-1]


def _backwards(ending: _Ending, prefer: Callable[[Facts], int]) -> Iterator[_Edge]:
    """Yield the edges of *ending* from the last to the first.

    The order is found from its end. A step may be the last if the other steps can be ordered before it without a
    further gap. If several steps may be the last, the preference decides, and then seniority.
    """
    if ending.walk:
        yield from ending.walk
        return
    left, gaps, ends = _preferred(_without(ending.edges, ending.left_out), prefer), ending.gaps, {ending.end}
    if ending.is_unordered:
        yield left.pop(next(index for index, edge in enumerate(left) if edge.after == ending.end))
    else:
        for _ in range(min(len(left), CHAIN_STEPS_MAX)):
            yield left.pop(_index_of_last(left, gaps, ending.start, ends))
            gaps, ends = _survey(left, ending.start) if len(left) > 1 else (gaps, {edge.after for edge in left})
    yield from left


def _index_of_last(edges: Sequence[_Edge], gaps: int, start: Hashable | None, ends: Collection[Hashable]) -> int:
    """Return the index of the one of *edges* that comes last. It leads to one of the states *ends*."""
    able = [index for index, edge in enumerate(edges) if edge.after in ends]
    # One of them is the last, so a single one needs no check.
    return able[0] if len(able) == 1 else next(index for index in able if _may_be_last(edges, index, gaps, start))


def _may_be_last(edges: Sequence[_Edge], index: int, gaps: int, start: Hashable | None) -> bool:
    last = edges[index]
    rest = [*edges[:index], *edges[index + 1 :]]
    gaps_of_rest, ends_of_rest = _survey(rest, start)
    follows = last.before in ends_of_rest or (not rest and start is None)
    return gaps_of_rest + 1 == gaps or (gaps_of_rest == gaps and follows)


def _survey(edges: Sequence[_Edge], start: Hashable | None) -> tuple[int, set[Hashable]]:
    """Return the fewest gaps of any order of *edges* from *start*, and the states in which such an order may end."""
    return _Degrees(edges, start).survey() if edges else (0, {start})


class _Degrees:
    """How much more often each state is entered than left by *edges*, and which of the states are connected.

    If all states of a connected part are entered as often as they are left, the part is one closed walk, which may
    begin and end in any of them. Any other part takes as many walks as its states are entered in excess, and the walks
    end in those states. A walk needs no gap before it if it is the first, and begins in *start* or *start* is unknown.
    Equal steps may be left out for a while. One of them always stays, so the parts do not change.
    """

    def __init__(self, edges: Sequence[_Edge], start: Hashable | None) -> None:
        self._edges, self._start = edges, start
        excess: dict[Hashable, int] = defaultdict(int)
        for edge in edges:
            excess[edge.after] += 1
            excess[edge.before] -= 1
        self._excess, self._parts = excess, _parts(edges)
        self._ends = [{state for state in part if excess[state] > 0} for part in self._parts]
        self._walks = [sum([excess[state] for state in ends]) for ends in self._ends]
        self._first = next((number for number, part in enumerate(self._parts) if start in part), None)

    @cached_property
    def _part_of(self) -> dict[Hashable, int]:
        return {state: number for number, part in enumerate(self._parts) for state in part}

    @property
    def gaps(self) -> int:
        """The fewest gaps of any order."""
        return sum([walks or 1 for walks in self._walks]) - (self._start is None or self._begins_at_start())

    def gaps_without(self, way: Sequence[_Edge]) -> int:
        """Return the fewest gaps without the edges of *way*. Each of these edges follows the one before."""
        with self.without(way):
            return self.gaps

    def survey(self) -> tuple[int, set[Hashable]]:
        """Return the fewest gaps, and the states in which an order with that many gaps may end."""
        return self.gaps, set().union(*map(self._ends_of, range(len(self._parts))))

    def ends_around(self, state: Hashable) -> set[Hashable]:
        """Return the possible ends of an order that are connected with *state*."""
        return self._ends_of(self._part_of[state])

    def unequal(self) -> tuple[set[Hashable], set[Hashable]]:
        """Return the states that are left more often than entered, and those entered more often, counting the start."""
        excess = dict(self._excess)
        if self._start is not None:
            excess[self._start] = excess.get(self._start, 0) + 1
        return {state for state, times in excess.items() if times < 0}, {s for s, times in excess.items() if times > 0}

    @contextmanager
    def without(self, left_out: Sequence[_Edge]) -> Iterator[None]:
        """Leave edges out of the count inside the block. Other edges must report the same steps."""
        if not left_out:
            yield
            return
        # A state in the middle of a way loses one edge into it and one out of it, so its excess stays the same.
        breaks = [pair for pair in pairwise(left_out) if pair[0].after != pair[1].before]
        froms = [left_out[0].before, *(edge.before for _, edge in breaks)]
        tos = [*(edge.after for edge, _ in breaks), left_out[-1].after]
        for one, other in zip(froms, tos, strict=True):
            self._count(one, 1)
            self._count(other, -1)
        yield
        for one, other in zip(froms, tos, strict=True):
            self._count(one, -1)
            self._count(other, 1)

    def _count(self, state: Hashable, times: int) -> None:
        part, known = self._part_of[state], self._excess[state]
        self._excess[state] = known + times
        self._walks[part] += max(known + times, 0) - max(known, 0)
        if known + times > 0:
            self._ends[part].add(state)
        else:
            self._ends[part].discard(state)

    def _begins_at_start(self) -> bool:
        return self._first is not None and (not self._ends[self._first] or self._excess[self._start] < 0)

    def _ends_of(self, part: int) -> set[Hashable]:
        ends = self._ends[part]
        if part != self._first:
            return ends or self._parts[part]
        if not self._begins_at_start():
            # An order that begins in the middle of the part, and returns there from the part's own start, has as few
            # gaps.
            return ends | {self._start} if any(edge.before == self._start for edge in self._edges) else ends
        if self._walks[part] > 1:
            return ends
        # The part's only walk is the first of all walks, so it is the last only if there is no other part.
        return (ends or {self._start}) if len(self._parts) == 1 else set()


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
