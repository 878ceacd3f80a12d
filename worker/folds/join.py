"""How the events of one object become its row.

Note [The row depends on the set alone]
    The events of an object have one order, computed from the events: rank, then stamp, then the chain of the
    states that they report. The object's row is the left fold of its events in that order. Arrival, batching and
    duplication have no influence. An event strictly above the row by rank and stamp is the last in that order, so it
    can be laid over the row as it stands (``advance``). For any other event the row is folded again from all the
    object's events (``fold_all``). Both take the same step, ``_lay``.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """Return an anomaly where *row* has a status that is not *known*; a row without a status has none."""
    status = row["status"]
    return [] if status is None or status in known else [Anomaly(UNKNOWN_STATUS, {"status": status})]


def _infer_nothing(_: Row) -> None:
    """Leave the row with the values that its events report."""


def _follow_nothing(_row: Row, _step: Facts, _laid: Row) -> bool:
    """Leave the row with the values that the step reports."""
    return True


@dataclass(frozen=True)
class RowSpec:
    """How the join treats the rows of one *table*.

    ``subject`` is the name of the row's kind in changes and anomalies. ``empty`` is the row before any event.
    ``key`` names the columns of the row's key beyond its world.

    ``rank_of`` and ``stamp_of`` return the rank and the stamp of the row's deciding event, read from the row; neither
    is ever below the true one. ``infer`` sets the columns that follow from other columns of the row. ``anomalies`` and
    ``changes`` report on the row. ``steps`` reports on each new child, if the new children lead all the way from the
    row before; otherwise on none. ``clock_rank`` is the rank of our clock's events, and ``clock_moment`` the moment
    that counts only while such an event decides. ``prefer`` ranks the last states where the events leave several
    possible. ``keeps_all`` is false where the row does not keep all that ``infer`` needs. Such a row is always folded
    from all its events, a new one from its batch if that has all, and the values that have no column are dropped at the
    end.

    ``child`` is a table with rows that belong to this one's, by the columns ``child_key``. ``child_of`` returns the
    child of a step, twins left out. Where it is None, the children are the parts of the last step that lists parts.

    ``leader`` is the table of another object, if the row shares that object's order; ``is_led`` picks the rows that
    have a leader. ``order`` orders the facts of a row and its leader where the chain alone does not.

    ``ranks`` are those of the object by its ``status``, where previous attributes may report a lower one.

    With ``announces_steps`` the last step that implies a change is announced, even if later steps imply none.

    ``follow`` gets the row before a step, the step, and the row with the step laid over. In the last it sets what the
    step means for columns that the step does not carry. It returns whether the row before, as it is kept, was enough
    to set them and to find all their anomalies.
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
    ranks: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def names(self) -> frozenset[str]:
        """The columns of a row. Other values that a step carries are dropped at the end."""
        return frozenset(self.empty) | {"account", "livemode", *self.key, "event_id", "as_of"}


class Joined(Struct, frozen=True):
    """A row with its anomalies and the source of its deciding event.

    ``children`` are rows that belong to it; with ``replace_all`` they are all of them. ``is_whole`` is true where all
    its events were read; a row that was only advanced lacks the anomalies that only all the events show.
    ``decided_by`` is the event of another object that brought the row to its state, if one did. Where ``announced``
    is set, it is the event of that step: a step to announce although later steps followed. With ``is_at_rest`` no
    event of the row was read, so doubts about their order stay as they were. ``opening`` is the row's state before its
    first change, where that is not an empty row; it counts until a change of the row is announced.
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


def advance(spec: RowSpec, row: Row, facts: Sequence[Facts]) -> Joined | None:
    """Return *row* with *facts* laid over it; None where the row can be computed only from all the object's events."""
    if not spec.keeps_all or (len(facts) > 1 and leader_of(spec, facts[0].subject) is not None):
        return None
    # After an observation it is uncertain with which of several events the chain goes on: see Note [A reading may be of
    # the next second] in worker/folds/chain.py.
    if len(facts) > 1 and _is_after_a_reading(row, facts):
        return None
    steps = facts if len(facts) == 1 else _in_order_from(spec, row, facts)
    if steps is None or steps[0].position <= (spec.rank_of(row), spec.stamp_of(row)):
        return None
    advanced = dict(row)
    for step in steps:
        if _disagreements(advanced, step) or _may_be_of_a_reading(advanced, step) or not _lay(spec, advanced, step):
            return None
    spec.infer(advanced)
    has_parts = spec.child_of is None and any(step.parts is not None for step in facts)
    anomalies = tuple(spec.anomalies(advanced))
    _drop_what_no_column_keeps(spec, advanced)
    children = _children(spec, steps)
    joined = Joined(advanced, anomalies, children, steps[-1].source, is_whole=False, replace_all=has_parts)
    return _announcing(spec, joined, row, steps) if spec.announces_steps else joined


def _is_after_a_reading(row: Row, facts: Sequence[Facts]) -> bool:
    return str(row["event_id"]).startswith(OBSERVED) or any(step.is_observation for step in facts)


def _in_order_from(spec: RowSpec, row: Row, facts: Sequence[Facts]) -> list[Facts] | None:
    """Return *facts*, all later than *row*, in order; None where the order depends on all the object's events."""
    steps: list[Facts] = []
    for group in chain.by_position(facts):
        ordered = group if len(group) == 1 else _without_a_gap(spec, row, steps, group)
        if ordered is None:
            return None
        steps += ordered
    return steps


def _without_a_gap(spec: RowSpec, row: Row, steps: Sequence[Facts], group: Sequence[Facts]) -> list[Facts] | None:
    """Return *group*, of one position, as the one chain that begins at the state after *row* and *steps*, or None."""
    state = {**row, **{name: value for step in steps for name, value in step.columns.items()}}
    # That state is known only if every value in it was set by a step, not inferred or kept from an earlier reference.
    is_told = spec.infer is _infer_nothing and not any(step.references for step in group)
    return chain.only_order(group, state) if is_told else None


def fold_all(spec: RowSpec, facts: Iterable[Facts]) -> Joined | None:
    """Return the row that *facts* make. They come in any order, each event once, and include those of the leader.

    Return None if none of them is an event of the row itself: a row is never made up.
    """
    known = list(facts)
    own = _own_subject(spec, known)
    if own is None:
        return None
    if len(known) == 1 and spec.order is None:
        return _alone(spec, known[0])
    path = in_order(spec, known)
    row = _empty(spec, own)
    anomalies = list(path.anomalies)
    for step in real_moments(path.steps):
        anomalies += [_two_references(step, name, row) for name in _disagreements(row, step)]
        _lay(spec, row, step)
    spec.infer(row)
    anomalies += spec.anomalies(row)
    _drop_what_no_column_keeps(spec, row)
    if path.is_ambiguous:
        anomalies.append(Anomaly(AMBIGUOUS_ORDER, {"as_of": row["as_of"]}))
    # Twins report one step, so that step has one child. But of two twins, only one may list the parts.
    real = [step for step in path.steps if step.event_id not in path.twins] if spec.child_of else path.steps
    opening = None if path.opening is None else dict(path.opening)
    children, source = _children(spec, real), path.steps[-1].source
    joined = Joined(row, tuple(anomalies), children, source, is_whole=True, replace_all=True, opening=opening)
    return _announcing(spec, joined, None, path.steps) if spec.announces_steps else joined


def _own_subject(spec: RowSpec, facts: Iterable[Facts]) -> Subject | None:
    for each in facts:
        if each.subject.table == spec.table and not each.is_witness:
            return each.subject
    return None


def _alone(spec: RowSpec, step: Facts) -> Joined:
    """Return the row of an object with one event, which no other event can contradict: most objects have one."""
    row = _empty(spec, step.subject)
    _lay(spec, row, step)
    spec.infer(row)
    anomalies = tuple(spec.anomalies(row))
    _drop_what_no_column_keeps(spec, row)
    joined = Joined(row, anomalies, _children(spec, (step,)), step.source, is_whole=True, replace_all=True)
    return _announcing(spec, joined, None, (step,)) if spec.announces_steps else joined


def _announcing(spec: RowSpec, joined: Joined, row: Row | None, steps: Sequence[Facts]) -> Joined:
    """Return *joined* with the last of *steps* that implies a change, if one does; *row* is the row before them."""
    before = row
    for step in steps:
        after = dict(before) if before is not None else _empty(spec, step.subject)
        _lay(spec, after, step)
        if spec.changes(before, after):
            by = Witness(step.event_id, step.source, step.created)
            joined = structs.replace(joined, announced=after, decided_by=by)
        before = after
    return joined


def in_order(spec: RowSpec, facts: Iterable[Facts]) -> Path:
    """Return the facts of one row in the order in which they are laid. *facts* are its own and its leader's."""
    known = list(facts)
    if spec.order is not None:
        return spec.order(known)
    leading = [each for each in known if each.subject.table == spec.leader]
    if not leading:
        return chain.order(known, Rules(spec.names, prefer=spec.prefer, ranks=spec.ranks))
    rows = {each.event_id: each for each in known if each.subject.table == spec.table}
    rules = Rules(spec.names, rows=rows, ranks=spec.ranks)
    led_by = {each.event_id for each in leading}
    alone = [each for each in rules.rows.values() if each.event_id not in led_by]
    return chain.of_rows(chain.order([*leading, *alone], rules), rules)


def leader_of(spec: RowSpec, subject: Subject) -> Subject | None:
    """Return the row that leads *subject*; None where *subject* has an order of its own."""
    if not spec.leader or not spec.is_led(subject):
        return None
    return Subject(spec.leader, subject.account, subject.livemode, subject.source)


def with_leader(spec: RowSpec, subject: Subject, reported: Mapping[Subject, Sequence[Facts]]) -> list[Facts]:
    """Return the facts in *reported* about the row *subject* and about its leader."""
    leader = leader_of(spec, subject)
    return [*reported.get(subject, ()), *(reported.get(leader, ()) if leader is not None else ())]


def _drop_what_no_column_keeps(spec: RowSpec, row: Row) -> None:
    # A row always has all the names that it keeps, so a row with no more names than those has nothing to drop.
    if len(row) > len(spec.names):
        for name in row.keys() - spec.names:
            del row[name]


def _children(spec: RowSpec, steps: Sequence[Facts]) -> tuple[Row, ...]:
    if spec.child_of is None:
        for step in reversed(steps):
            if step.parts is not None:
                return step.parts
        return ()
    return tuple(child for child in map(spec.child_of, steps) if child is not None)


def _empty(spec: RowSpec, subject: Subject) -> Row:
    row: Row = {**spec.empty, "account": subject.account, "livemode": subject.livemode}
    row.update(zip(spec.key, subject.key, strict=True))
    return row


def _lay(spec: RowSpec, row: Row, step: Facts) -> bool:
    """Lay *step* over *row*. The step comes after all steps that made the row. Return what ``spec.follow`` returns."""
    before = None if spec.follow is _follow_nothing else dict(row)
    is_by_clock = spec.clock_rank is not None and "as_of" in row and spec.rank_of(row) == spec.clock_rank
    row.update(step.columns)
    row["event_id"], row["as_of"] = step.event_id, step.created
    if is_by_clock:
        row[spec.clock_moment] = None
    for name, reference in step.references.items():
        if reference is not None:
            row[name] = reference
    for name, moment in step.moments.items():
        known = row[name]
        row[name] = moment if known is None else min(known, moment)  # type: ignore[type-var]  # moments hold times only
    return before is None or spec.follow(before, step, row)


def real_moments(steps: Sequence[Facts]) -> Sequence[Facts]:
    """Return *steps* without the moments of readings that an event of Stripe's dates a few seconds later.

    A reading carries a lower bound as its time (see schemas/stripe_api.py), so the event's time is better. A reading
    long before the event keeps its moment: the event of what it shows was missed.
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
    """Return whether *row* and *step* share a moment that ``real_moments`` might take from a reading.

    The row does not show which of its moments come from readings. A reading later than the known moment changes
    nothing.
    """
    for name, at in step.moments.items():
        known = row[name]
        if isinstance(known, datetime):
            later = known - at if step.is_observation else at - known
            if timedelta() < later <= chain.READING_TIME_MAX:
                return True
    return False


def _disagreements(row: Row, step: Facts) -> list[str]:
    """Return the names of the references that both *step* and *row* have, with different values."""
    if not step.references:
        return []
    return [
        name
        for name, reference in step.references.items()
        if reference is not None and row[name] is not None and row[name] != reference
    ]


def _two_references(step: Facts, name: str, row: Row) -> Anomaly:
    return Anomaly(TWO_REFERENCES, {"column": name, "values": sorted([str(row[name]), str(step.references[name])])})
