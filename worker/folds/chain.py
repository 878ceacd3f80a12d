"""The one order of an object's events, computed from the events alone.

Note [The chain is an Eulerian path]
    Several events may share a rank and a second. Each reports a state after it and, through its previous
    attributes, the state before it: states are nodes and events are edges, and an order without a gap is a
    path that takes every edge once. Whether there is one, and where it ends, follows from the nodes' degrees,
    so nothing is searched. Where there is none, the fewest gaps are counted from the degrees as well.

Note [A doubt is several courses]
    A second may leave several ends possible: a circle that may begin anywhere, or an equal step that may be a
    twin. Each end is kept as a course of its own, the preferred one first. The courses that fit the next second
    with the fewest gaps go on, so a later event decides what came before it. The object is in doubt where the
    courses that are left at the end would give different rows.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import groupby
from typing import Final, TypeAlias

from worker.folds.facts import Anomaly, Facts, Value

Position: TypeAlias = tuple[int, tuple[object, ...]]
Stamp: TypeAlias = tuple[object, ...]

COURSES_MAX: Final = 8
"""How many courses are kept. The object is in doubt with two as with more; of more the least preferred are dropped."""
ENDINGS_MAX: Final = 64
"""How many ends of one second are looked at: a circle of hundreds of states may end in any of them."""
CHAIN_STEPS_MAX: Final = 64
"""How many steps from the end a chain is put in order: earlier ones of the same second cannot reach the row,
unless sixty-four later ones all leave out a key that they carry."""

_NOTHING: Final = "nothing comes before a .created event"


@dataclass(frozen=True, slots=True)
class Path:
    """Events in their order, the ids of those left out as twins, and whether their end is a choice between rows.

    *anomalies* are what the order itself shows.
    """

    steps: list[Facts]
    twins: set[str]
    is_ambiguous: bool
    anomalies: tuple[Anomaly, ...] = ()


@dataclass(frozen=True, slots=True)
class Testimony:
    """What another source lists of one second: the *steps* of a row, as a state before and after, and their *end*.

    The end is None where that source may not have seen the whole second. *name* is the column that it speaks of.
    """

    name: str
    steps: Counter[tuple[Value, Value]]
    end: Value

    def step_of(self, row: Facts) -> tuple[Value, Value]:
        """Return the step that *row* reports, as far as this speaks of it."""
        return ((row.before or {}).get(self.name), row.after.get(self.name))


def _no_preference(_: Facts) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides beyond the events' states.

    *names* are the columns that a doubt has to reach. *prefer* ranks last states where several are possible.
    *rows* holds, by event, the facts of another row of the object that shares its order. *testimony* is what
    another source lists, by stamp. The chain begins in *start*, where that fits. Without *may_repeat* no event
    is the twin of another.
    """

    names: Collection[str]
    prefer: Callable[[Facts], int] = _no_preference
    rows: Mapping[str, Facts] = field(default_factory=dict)
    testimony: Mapping[Stamp, Testimony] = field(default_factory=dict)
    start: Mapping[str, Value] = field(default_factory=dict)
    may_repeat: bool = True

    def carried(self, facts: Facts) -> dict[str, Value]:
        """Return the state after an event, with that of the row that shares its order."""
        row = self.rows.get(facts.event_id)
        return facts.after if row is None else {**facts.after, **row.after}


def order(facts: Iterable[Facts], rules: Rules) -> Path:
    """Return *facts*, all of one object and each once, in their one order."""
    groups = list(by_position(facts))
    if all(len(group) == 1 for group in groups):
        return Path([group[0] for group in groups], set(), is_ambiguous=False)
    courses = [_Course(None, [], dict(rules.start))]
    for group in groups:
        courses = _follow(courses, group, rules)
    best, *others = courses
    steps, twins = best.unwound(rules)
    is_ambiguous = any(best.carried.get(name) != each.carried.get(name) for each in others for name in rules.names)
    return Path(steps, twins, is_ambiguous)


def of_rows(path: Path, rules: Rules) -> Path:
    """Return the order of the facts in ``rules.rows``, where *path* is that of the events that order them."""
    steps = [rules.rows[step.event_id] for step in path.steps if step.event_id in rules.rows]
    return Path(steps, path.twins, path.is_ambiguous)


def by_position(facts: Iterable[Facts]) -> Iterator[list[Facts]]:
    """Yield *facts* by rank and stamp, the lowest first; those of one position by their ids."""
    ordered = sorted(facts, key=lambda each: (each.position, each.event_id))
    for _, group in groupby(ordered, lambda each: each.position):
        yield list(group)


def only_order(group: Sequence[Facts], state: Mapping[str, Value]) -> list[Facts] | None:
    """Return *group*, of one position, as the one chain that begins in *state*.

    None where *state* does not hold all of it, where it has a gap or several ends, or two of its steps may be one.
    """
    names = _common_names(group)
    if any(state.get(name) is None for name in names):
        return None
    edges, start = _edges(group, names), _state(state, names)
    gaps, ends = _survey(edges, start)
    if gaps or len(ends) > 1 or _spare(edges):
        return None
    return [edge.facts for edge in _in_order(_Ending(edges, start, gaps, ends.pop()), _no_preference)]


# ---- Courses of events ----


@dataclass(frozen=True, slots=True, eq=False)
class _Edge:
    """An event between two states, each reduced to what all events of its group carry."""

    before: Hashable
    after: Hashable
    facts: Facts

    @property
    def step(self) -> tuple[Hashable, Hashable]:
        return (self.before, self.after)


@dataclass(frozen=True)
class _Ending:
    """One way through the events of a position: *edges* from *start*, with so many *gaps*, until the state *end*.

    *left_out* are twins; where the edges need not lose all of them, the ending *is_doubtful*.
    """

    edges: Sequence[_Edge]
    start: Hashable | None
    gaps: int
    end: Hashable
    left_out: tuple[_Edge, ...] = ()
    is_doubtful: bool = False


@dataclass(frozen=True)
class _Course:
    """One way in which the events came about until the last one of *group*; *carried* is the state after it."""

    before: "_Course | None"
    group: Sequence[Facts]
    carried: Mapping[str, Value]
    ending: _Ending | None = None

    @cached_property
    def state(self) -> Hashable:
        """What is carried, to compare courses by."""
        return _hashable(self.carried)

    def earlier_than(self, position: Position) -> "_Course | None":
        """Return the course until the last event that came before *position* in time, None where none did."""
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
    """Return the courses on which *group* follows *courses* with the fewest gaps, the preferred first."""
    if len(group) == 1 and len(courses) == 1:
        return [_Course(courses[0], group, {**courses[0].carried, **rules.carried(group[0])})]
    names, testimony = _common_names(group), rules.testimony.get(group[0].stamp)
    edges = _edges(group, names)
    found = [(course, each) for course in courses for each in _endings(edges, names, course, testimony, rules)]
    fewest = min(ending.gaps for _, ending in found)
    found = [(course, ending) for course, ending in found if ending.gaps == fewest]
    if len(found) > ENDINGS_MAX:
        found = sorted(found, key=lambda each: _roughly(each[1], rules), reverse=True)[:ENDINGS_MAX]
    followed = [_followed(course, group, ending, rules) for course, ending in found]
    if testimony is not None and testimony.end is not None:
        followed = [each for each in followed if each.carried.get(testimony.name) == testimony.end] or followed
    if len(followed) == 1:
        return followed
    followed.sort(key=lambda each: _rank_of(each, rules), reverse=True)
    distinct: dict[Hashable, _Course] = {}
    for each in followed:
        distinct.setdefault(each.state, each)
    return list(distinct.values())[:COURSES_MAX]


def _rank_of(course: _Course, rules: Rules) -> tuple[bool, int, tuple[bool, str]]:
    ending = course.ending
    assert ending is not None, "what follows has an ending"  # noqa: S101 - for the types alone
    last = _last(ending, rules.prefer).facts
    return (not ending.is_doubtful, rules.prefer(last), _seniority(last))


def _roughly(ending: _Ending, rules: Rules) -> tuple[bool, tuple[int, tuple[bool, str]]]:
    """Return ``_rank_of`` without asking whether the preferred of the edges into the end may be the last."""
    into = [edge.facts for edge in ending.edges if edge.after == ending.end]
    return (not ending.is_doubtful, max((rules.prefer(facts), _seniority(facts)) for facts in into))


def _followed(course: _Course, group: list[Facts], ending: _Ending, rules: Rules) -> _Course:
    told = [rules.carried(facts) for facts in group]
    if all(each.keys() == told[0].keys() for each in told):
        # Each says all, so that the order of those before the last makes no difference.
        laid = [_last(ending, rules.prefer).facts]
    else:
        laid = _laid_out(ending, rules)
    carried = dict(course.carried)
    for facts in laid:
        carried |= rules.carried(facts)
    return _Course(course, group, carried, ending)


def _laid_out(ending: _Ending, rules: Rules) -> list[Facts]:
    """Return the events of *ending* in their order, each twin next to the last step that it repeats."""
    twins: dict[tuple[Hashable, Hashable], list[Facts]] = defaultdict(list)
    for edge in ending.left_out:
        twins[edge.step].append(edge.facts)
    laid: list[Facts] = []
    for edge in reversed(_in_order(ending, rules.prefer)):
        laid += (edge.facts, *twins.pop(edge.step, ()))
    return laid[::-1]


# ---- Where the events of one position begin and end ----


def _endings(
    edges: Sequence[_Edge], names: Sequence[str], course: _Course, testimony: Testimony | None, rules: Rules
) -> list[_Ending]:
    """Return every end that *edges* may have after *course*, by an order with the fewest gaps.

    *names* are what their states hold.
    """
    kept, left_out, floor = _by_testimony(edges, testimony, rules)
    found: list[_Ending] = []
    for start in _starts(edges, names, course):
        ways = _without_twins(kept, start, floor) if rules.may_repeat else [(kept, ())]
        for number, (rest, twins) in enumerate(ways):
            gaps, ends = _survey(rest, start)
            found += [_Ending(rest, start, gaps, end, (*left_out, *twins), number > 0) for end in ends]
            found += _with_less(found[-1], ends, floor) if rules.may_repeat else ()
    fewest = min(each.gaps for each in found)
    found = [each for each in found if each.gaps == fewest]
    # Where it begins is a guess only where nothing that is known to come before fits as well.
    return [each for each in found if each.start is not None] or found


def _starts(edges: Sequence[_Edge], names: Sequence[str], course: _Course) -> list[Hashable | None]:
    """Return the states in which *edges* may begin; None stands for any."""
    found: list[Hashable | None] = [_NOTHING] if any(edge.before is _NOTHING for edge in edges) else []
    earlier = course.earlier_than(edges[0].facts.position)
    if earlier is None:
        begun = course.carried if course.before is None else {}
        found += [_state(begun, names)] if begun and begun.keys() >= set(names) else []
        return found if _NOTHING in found else [*found, None]
    shared = [name for name in names if name in earlier.carried]
    known = _state(earlier.carried, shared)
    fitting = [
        edge.before for edge in edges if edge.before is not _NOTHING and _state(_before(edge.facts), shared) == known
    ]
    found += fitting or [known]
    if earlier.group[0].rank < edges[0].facts.rank:
        found += _movers(edges)
    return list(dict.fromkeys(found))


def _movers(edges: Sequence[_Edge]) -> Iterator[Hashable]:
    """Yield the states after events that may have moved the rank, but do not report what was before."""
    for edge in edges:
        if edge.facts.before is None and edge.facts.source != "observation":
            yield edge.after


def _edges(group: Sequence[Facts], names: Sequence[str]) -> list[_Edge]:
    return [
        _Edge(_NOTHING if facts.is_first else _state(_before(facts), names), _state(facts.after, names), facts)
        for facts in group
    ]


def _before(facts: Facts) -> Mapping[str, Value]:
    return facts.after if facts.before is None else facts.before


def _common_names(group: Sequence[Facts]) -> list[str]:
    common = set(group[0].after)
    for facts in group:
        common &= facts.after.keys() & _before(facts).keys()
    return sorted(common)


def _state(values: Mapping[str, Value], names: Sequence[str]) -> Hashable:
    return tuple(_hashable(values[name]) for name in names)


def _hashable(value: object) -> Hashable:
    # The usual ones first: to ask whether something is a mapping takes long.
    if value is None or isinstance(value, (str, int, datetime)):
        # True and 1 are the same key to Python, and not the same state.
        return (type(value).__name__, value)
    if isinstance(value, Mapping):
        return tuple(sorted((key, _hashable(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return (type(value).__name__, value)


# ---- Twins ----

_Step: TypeAlias = tuple[Hashable, Hashable]


@dataclass(frozen=True, slots=True)
class _Floor:
    """What is known to have happened: by event the step of a row that it reports, and by step how often it did."""

    steps: Mapping[str, tuple[Value, Value]]
    least: Mapping[tuple[Value, Value], int]


_NO_FLOOR: Final = _Floor({}, {})


def _spare(edges: Sequence[_Edge], floor: _Floor = _NO_FLOOR) -> list[_Edge]:
    """Return of each step that several *edges* report the least senior, the step with the greatest id first.

    A step that is reported only as often as it is known to have happened has none to spare.
    """
    if len({edge.step for edge in edges}) == len(edges):
        return []
    reported: dict[_Step, list[_Edge]] = defaultdict(list)
    for edge in edges:
        reported[edge.step].append(edge)
    counts = Counter(floor.steps.get(edge.facts.event_id) for edge in edges)
    several = [sorted(same, key=_seniority_of) for same in reported.values() if len(same) > 1]
    several.sort(key=lambda same: _seniority_of(same[-1]), reverse=True)
    steps = [(floor.steps.get(same[0].facts.event_id), same[0]) for same in several]
    return [edge for step, edge in steps if step is None or counts[step] > floor.least.get(step, 0)]


def _without(edges: Sequence[_Edge], left_out: Collection[_Edge]) -> list[_Edge]:
    return [edge for edge in edges if edge not in left_out]


def _without_twins(
    edges: Sequence[_Edge], start: Hashable | None, floor: _Floor
) -> list[tuple[list[_Edge], tuple[_Edge, ...]]]:
    """Return *edges* without the twins that make gaps, and those twins: in every way there is, the chosen one first."""
    found: list[tuple[list[_Edge], tuple[_Edge, ...]]] = [(list(edges), ())]
    while gaps := _gaps(found[0][0], start):
        fewer: dict[Hashable, tuple[list[_Edge], tuple[_Edge, ...]]] = {}
        for rest, twins in found:
            for way in _ways_between(rest, start, floor):
                left, more = _without(rest, way), (*twins, *way)
                if len(fewer) < COURSES_MAX and _gaps(left, start) < gaps:
                    fewer.setdefault(frozenset(Counter(edge.step for edge in more).items()), (left, more))
        if not fewer:
            break
        found = list(fewer.values())
    return found


def _ways_between(edges: Sequence[_Edge], start: Hashable | None, floor: _Floor) -> list[tuple[_Edge, ...]]:
    """Return the ways by equal steps from states left too often to those entered too often, the first to lose first."""
    spare = _spare(edges, floor)
    if not spare:
        return []
    left, entered = _excess(edges, start)
    ways = [way for end in entered for state, way in _ways(spare, [end]).items() if state in left]
    return sorted(ways, key=lambda way: (len(way), [spare.index(edge) for edge in way]))


def _with_less(ending: _Ending, ends: set[Hashable], floor: _Floor) -> Iterator[_Ending]:
    """Yield endings elsewhere than in *ends*, where more equal steps are left out and there are no more gaps."""
    ways = _ways(spare, ends) if (spare := _spare(ending.edges, floor)) else {}
    for way in ways.values():
        rest = _without(ending.edges, way)
        gaps, ends_left = _survey(rest, ending.start)
        if gaps == ending.gaps:
            left_out = (*ending.left_out, *way)
            yield from (
                replace(ending, edges=rest, end=end, left_out=left_out, is_doubtful=True) for end in ends_left - ends
            )
            ends = ends | ends_left


def _ways(spare: Sequence[_Edge], ends: Collection[Hashable]) -> dict[Hashable, tuple[_Edge, ...]]:
    """Return, by state, the fewest *spare* edges from it to one of *ends*: without them a chain ends there."""
    ways: dict[Hashable, tuple[_Edge, ...]] = dict.fromkeys(ends, ())
    while True:
        further: dict[Hashable, tuple[_Edge, ...]] = {}
        for edge in spare:
            if edge.after in ways and edge.before not in ways:
                further.setdefault(edge.before, (edge, *ways[edge.after]))
        if not further:
            return ways
        ways |= further


def _excess(edges: Sequence[_Edge], start: Hashable | None) -> tuple[set[Hashable], set[Hashable]]:
    """Return the states that are left more often than entered, and those entered more often, counting the start."""
    excess = Counter({start: 1} if start is not None else {})
    for edge in edges:
        excess[edge.after] += 1
        excess[edge.before] -= 1
    return {state for state, times in excess.items() if times < 0}, {s for s, times in excess.items() if times > 0}


def _by_testimony(
    edges: Sequence[_Edge], testimony: Testimony | None, rules: Rules
) -> tuple[list[_Edge], tuple[_Edge, ...], _Floor]:
    """Return *edges* without what *testimony* shows to be twins, these, and what it shows to have happened."""
    if testimony is None:
        return list(edges), (), _NO_FLOOR
    rows = [row for edge in edges if (row := rules.rows.get(edge.facts.event_id)) is not None]
    steps = {row.event_id: testimony.step_of(row) for row in rows if row.before is not None}
    floor = _Floor(steps, testimony.steps)
    left_out: tuple[_Edge, ...] = ()
    kept = list(edges)
    while testimony.end is not None and (
        spare := [edge for edge in _spare(kept, floor) if steps.get(edge.facts.event_id) in testimony.steps]
    ):
        left_out, kept = (*left_out, spare[0]), _without(kept, spare[:1])
    return kept, left_out, floor


# ---- The Eulerian path ----


def _seniority(facts: Facts) -> tuple[bool, str]:
    """Where nothing else decides: an event over an observation, then the greatest id."""
    return (facts.source != "observation", facts.event_id)


def _seniority_of(edge: _Edge) -> tuple[bool, str]:
    return _seniority(edge.facts)


def _gaps(edges: Sequence[_Edge], start: Hashable | None) -> int:
    return _survey(edges, start)[0]


def _preferred(edges: Sequence[_Edge], prefer: Callable[[Facts], int]) -> list[_Edge]:
    return sorted(edges, key=lambda edge: (prefer(edge.facts), _seniority_of(edge)), reverse=True)


def _last(ending: _Ending, prefer: Callable[[Facts], int]) -> _Edge:
    """Return the edge that *ending* ends with: of several that may be the last, the preferred one."""
    left = _preferred(ending.edges, prefer)
    return left[_index_of_last(left, ending.gaps, ending.start, {ending.end})]


def _in_order(ending: _Ending, prefer: Callable[[Facts], int]) -> list[_Edge]:
    """Return the edges of *ending* in an order with its gaps.

    The order is found from its end: a step may be the last if what is left can be ordered up to it without a
    gap more. Where several may, the preference and then seniority decide.
    """
    left, gaps, ends = _preferred(ending.edges, prefer), ending.gaps, {ending.end}
    backwards: list[_Edge] = []
    while left and len(backwards) < CHAIN_STEPS_MAX:
        last = left.pop(_index_of_last(left, gaps, ending.start, ends))
        backwards.append(last)
        gaps, ends = _survey(left, ending.start) if len(left) > 1 else (gaps, {edge.after for edge in left})
    return [*reversed(left), *reversed(backwards)]


def _index_of_last(edges: Sequence[_Edge], gaps: int, start: Hashable | None, ends: Collection[Hashable]) -> int:
    """Return which of *edges* comes last, in one of the states *ends*."""
    able = [index for index, edge in enumerate(edges) if edge.after in ends]
    # One of them is the last, so that the only one needs no look.
    return able[0] if len(able) == 1 else next(index for index in able if _may_be_last(edges, index, gaps, start))


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
