"""How the events of one object become its row.

Note [The row depends on the set alone]
    The events of an object have one order, computed from the events: rank, then stamp, then the chain of
    states that they tell. Its row is the left fold of them in that order. Arrival, batching and duplication
    do not enter into it. An event strictly above the row by rank and stamp is the last in that order
    whatever came before, so it may be laid over the row as it stands (``advance``); for any other the row is
    folded anew from all the object's events (``fold_all``). Both take the same step, ``_lay``.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Final

from msgspec import Struct, structs

from schemas.events import OBSERVED
from worker.folds import chain
from worker.folds.chain import Path, Rules
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
    ``changes`` report on it; ``steps`` on each of the children that are new, where they are all of the way from the row
    before, else on nothing. ``clock_rank`` is the rank of what our clock says, and ``clock_moment`` the
    moment that only counts while the clock decides. ``prefer`` ranks last states where the events leave
    several possible. Where the row does not keep all that the inference needs, ``keeps_all`` is false: such a
    row is always folded anew, and what it carries beyond its columns is dropped at the end. ``key`` names the
    columns of the row's key beyond its world. ``child`` is a table whose rows belong to this one's, by the columns
    ``child_key``: a row for each step, which ``child_of`` tells, twins left out; or where that is None, the parts
    that the last step told that lists them. ``leader`` is the table of the object whose order the row shares, where
    that is another; ``is_led`` picks the rows that have one. ``order`` puts the facts of a row and its leader in
    order where the chain alone does not.
    Where it ``announces_steps``, the last step that implies a change is announced, though later ones imply none.
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
    steps: Callable[[Row | None, Row, Sequence[Row]], list[Change]] = lambda _before, _after, _children: []
    clock_rank: int | None = None
    clock_moment: str = ""
    prefer: Callable[[Facts], int] = lambda _: 0
    keeps_all: bool = True
    key: tuple[str, ...] = ("id",)
    child: str = ""
    child_key: tuple[str, ...] = ()
    child_of: Callable[[Facts], Row | None] | None = None
    leader: str = ""
    is_led: Callable[[Subject], bool] = lambda _: True
    order: Callable[[Sequence[Facts]], Path] | None = None
    announces_steps: bool = False
    follow: Callable[[Row, Facts, Row], bool] = _follow_nothing

    @cached_property
    def names(self) -> frozenset[str]:
        """The columns of a row: what else a step carries is dropped at the end."""
        return frozenset(self.empty) | {"account", "livemode", *self.key, "event_id", "as_of"}


class Joined(Struct, frozen=True):
    """A row, what is wrong with it, and by which source its deciding event came.

    ``children`` are the rows that belong to it, all there are of them where they ``replace_all``. ``is_whole`` tells
    that all its events were read; a row that was only advanced does not know of the anomalies that only they show.
    ``decided_by`` is the event of another object by which the row came to its state, where one decided; or the one that
    reported the row as it was ``announced``, where a step of it is that later ones do not undo. No event of its own was
    read where it ``is_at_rest``: what its events' order left in doubt is as it was. ``opening`` is what the row was
    where its changes begin, unless they were announced before, or begin with an empty row.
    """

    row: Row
    anomalies: tuple[Anomaly, ...]
    children: tuple[Row, ...]
    source: str
    is_whole: bool
    replace_all: bool
    decided_by: Witness | None = None
    is_at_rest: bool = False
    opening: Row | None = None
    announced: Row | None = None


def advance(shape: Shape, row: Row, facts: Sequence[Facts]) -> Joined | None:
    """Return *row* with *facts* laid over it; None where only all the object's events can tell."""
    if not shape.keeps_all or (len(facts) > 1 and leader_of(shape, facts[0].subject) is not None):
        return None
    # Where several events begin is not sure after an observation: see Note [A reading may be of the next second] in
    # worker/folds/chain.py.
    if len(facts) > 1 and _is_after_a_reading(row, facts):
        return None
    steps = facts if len(facts) == 1 else _in_order_from(shape, row, facts)
    if steps is None or steps[0].position <= (shape.rank_of(row), shape.stamp_of(row)):
        return None
    advanced = row
    for step in steps:
        if _disagreements(advanced, step) or _may_be_of_a_reading(advanced, step):
            return None
        laid = _lay(shape, advanced, step)
        if not shape.follow(advanced, step, laid):
            return None
        advanced = laid
    shape.infer(advanced)
    has_parts = shape.child_of is None and any(step.parts is not None for step in facts)
    anomalies = tuple(shape.anomalies(advanced))
    _drop_what_no_column_keeps(shape, advanced)
    children = _children(shape, steps)
    joined = Joined(advanced, anomalies, children, steps[-1].source, is_whole=False, replace_all=has_parts)
    return _announcing(shape, joined, row, steps) if shape.announces_steps else joined


def _is_after_a_reading(row: Row, facts: Sequence[Facts]) -> bool:
    return str(row["event_id"]).startswith(OBSERVED) or any(step.is_observation for step in facts)


def _in_order_from(shape: Shape, row: Row, facts: Sequence[Facts]) -> list[Facts] | None:
    """Return *facts*, all later than *row*, in their order; None where only all the object's events can tell it."""
    steps: list[Facts] = []
    for group in chain.by_position(facts):
        ordered = group if len(group) == 1 else _without_a_gap(shape, row, steps, group)
        if ordered is None:
            return None
        steps += ordered
    return steps


def _without_a_gap(shape: Shape, row: Row, steps: Sequence[Facts], group: Sequence[Facts]) -> list[Facts] | None:
    """Return *group*, of one position, as the one chain that begins where *row* and the *steps* before have ended."""
    state = {**row, **{name: value for step in steps for name, value in step.columns.items()}}
    # Where it begins is known only of what nothing but the last word of a step can have set.
    is_told = shape.infer is _infer_nothing and not any(step.references for step in group)
    return chain.only_order(group, state) if is_told else None


def fold_all(shape: Shape, facts: Iterable[Facts]) -> Joined | None:
    """Return the row of the object whose events are *facts*, in any order and each once, its leader's among them.

    None where there is no event of the row itself: a row is never made up.
    """
    known = list(facts)
    own = next((each.subject for each in known if each.subject.table == shape.table and not each.is_witness), None)
    if own is None:
        return None
    path = in_order(shape, known)
    row = _empty(shape, own)
    anomalies = list(path.anomalies)
    for step in real_moments(path.steps):
        anomalies += [_two_references(step, name, row) for name in _disagreements(row, step)]
        laid = _lay(shape, row, step)
        shape.follow(row, step, laid)
        row = laid
    shape.infer(row)
    anomalies += shape.anomalies(row)
    _drop_what_no_column_keeps(shape, row)
    if path.is_ambiguous:
        anomalies.append(Anomaly(AMBIGUOUS_ORDER, {"as_of": row["as_of"]}))
    # Twins tell one step, and so one child of it; but of two that tell one state, one alone may list the parts.
    real = [step for step in path.steps if step.event_id not in path.twins] if shape.child_of else path.steps
    opening = None if path.opening is None else dict(path.opening)
    children, source = _children(shape, real), path.steps[-1].source
    joined = Joined(row, tuple(anomalies), children, source, is_whole=True, replace_all=True, opening=opening)
    return _announcing(shape, joined, None, path.steps) if shape.announces_steps else joined


def _announcing(shape: Shape, joined: Joined, row: Row | None, steps: Sequence[Facts]) -> Joined:
    """Return *joined* with the last of *steps* after *row* that implies a change, where there is one."""
    before = row
    for step in steps:
        after = _lay(shape, before or _empty(shape, step.subject), step)
        if shape.changes(before, after):
            by = Witness(step.event_id, step.source, step.created)
            joined = structs.replace(joined, announced=after, decided_by=by)
        before = after
    return joined


def in_order(shape: Shape, facts: Iterable[Facts]) -> Path:
    """Return the facts of one row, out of its own and its leader's, in the order in which they are laid."""
    known = list(facts)
    if len(known) == 1 and shape.order is None:
        return Path(known, set(), is_ambiguous=False)
    if shape.order is not None:
        return shape.order(known)
    leading = [each for each in known if each.subject.table == shape.leader]
    if not leading:
        return chain.order(known, Rules(shape.names, prefer=shape.prefer))
    rules = Rules(shape.names, rows={each.event_id: each for each in known if each.subject.table == shape.table})
    led_by = {each.event_id for each in leading}
    alone = [each for each in rules.rows.values() if each.event_id not in led_by]
    return chain.of_rows(chain.order([*leading, *alone], rules), rules)


def leader_of(shape: Shape, subject: Subject) -> Subject | None:
    """Return the row of the object that orders the row *subject*, where that is another."""
    if not shape.leader or not shape.is_led(subject):
        return None
    return Subject(shape.leader, subject.account, subject.livemode, subject.source)


def with_leader(shape: Shape, subject: Subject, told: Mapping[Subject, Sequence[Facts]]) -> list[Facts]:
    """Return what *told* holds of the row *subject*, and of the row that orders it."""
    leader = leader_of(shape, subject)
    return [*told.get(subject, ()), *(told.get(leader, ()) if leader is not None else ())]


def _drop_what_no_column_keeps(shape: Shape, row: Row) -> None:
    # The names that a row keeps come first and are all there, so that one that has no more is whole.
    if len(row) > len(shape.names):
        for name in row.keys() - shape.names:
            del row[name]


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


def real_moments(steps: Sequence[Facts]) -> Sequence[Facts]:
    """Return *steps* without those moments of readings that an event of Stripe's dates, a few seconds later, better.

    A reading is dated by a lower bound: see schemas/stripe_api.py. What it shows long before any event was missed.
    """
    if len(steps) == 1 or not any(step.moments and step.is_observation for step in steps):
        return steps
    real: dict[str, datetime] = {}
    for step in steps:
        if not step.is_observation:
            real |= {name: min(at, real.get(name, at)) for name, at in step.moments.items()}
    return [_without_moments(step, real) if step.is_observation else step for step in steps]


def _without_moments(step: Facts, real: Mapping[str, datetime]) -> Facts:
    kept = {
        name: at for name, at in step.moments.items() if name not in real or real[name] - at > chain.READING_TIME_MAX
    }
    return step if len(kept) == len(step.moments) else structs.replace(step, moments=kept)


def _may_be_of_a_reading(row: Row, step: Facts) -> bool:
    """Return whether it matters, of a moment that *row* and *step* have, which is a reading's: see real_moments.

    The row does not show by what its moments are known. A later reading of what is known is no matter.
    """
    for name, at in step.moments.items():
        known = row[name]
        if isinstance(known, datetime):
            later = known - at if step.is_observation else at - known
            if timedelta() < later <= chain.READING_TIME_MAX:
                return True
    return False


def _disagreements(row: Row, step: Facts) -> list[str]:
    """Return the names of the references on which *step* and *row* both speak and differ."""
    if not step.references:
        return []
    return [
        name
        for name, reference in step.references.items()
        if reference is not None and row[name] is not None and row[name] != reference
    ]


def _two_references(step: Facts, name: str, row: Row) -> Anomaly:
    return Anomaly(TWO_REFERENCES, {"column": name, "values": sorted([str(row[name]), str(step.references[name])])})
