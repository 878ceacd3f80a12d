"""Rules of joining: the row of an object depends on the set of its events alone."""

import random
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import TypeVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from deploy.sandbox.account import Account
from tests import histories, reference
from worker import folds
from worker.folds import chain, join, payment_link
from worker.folds.facts import Facts, Subject

LINK = Subject("payment_links", "", False, "plink_1")  # noqa: FBT003 - test mode
SECOND = datetime(2026, 11, 1, tzinfo=UTC)

LONG_HISTORIES = 5_000

seeds = st.integers(0, 2**32)
Item = TypeVar("Item")


def step(
    name: str, before: object, after: object, *, second: int = 0, source: str = "webhook", first: bool = False
) -> Facts:
    """Return an event that takes a link's metadata from *before* to *after*."""
    at = SECOND + timedelta(seconds=second)
    return Facts(
        subject=LINK,
        event_id=name,
        source=source,
        created=at,
        rank=0,
        stamp=(at,),
        columns={"metadata": {"step": after}},
        before=None if first else {"metadata": {"step": before}},
        moments={"created": at} if first else {},
        is_first=first,
    )


def arrive(batches: Sequence[Sequence[Facts]], of: Subject | None = None) -> join.Joined:
    """Return the row of the object *of*, or of the first fact's, as the projection joins *batches* one by one."""
    subject = batches[0][0].subject if of is None else of
    shape = folds.ROW_SPECS[subject.table]
    known: dict[Subject, list[Facts]] = defaultdict(list)
    result: join.Joined | None = None
    for batch in batches:
        for facts in batch:
            known[facts.subject].append(facts)
        news = [facts for facts in batch if facts.subject == subject]
        is_sure = result is not None and not any(each.kind == join.AMBIGUOUS_ORDER for each in result.anomalies)
        advanced = join.advance(shape, result.row, news) if result is not None and is_sure and news else None
        result = advanced or join.fold_all(shape, join.with_leader(shape, subject, known)) or result
    assert result is not None
    return result


def folded(*all_facts: Facts) -> join.Joined:
    """Return the row of a link from all of its events at once."""
    result = join.fold_all(payment_link.ROW_SPEC, all_facts)
    assert result is not None
    return result


def split(items: Sequence[Item], rng: random.Random) -> list[list[Item]]:
    """Return *items* in batches of random sizes."""
    batches: list[list[Item]] = []
    for item in items:
        if not batches or rng.random() < 0.5:
            batches.append([])
        batches[-1].append(item)
    return batches


def compare(seed: int, arrivals: int) -> tuple[int, int, int]:
    """Compare a history's rows, in several arrivals, with the reference; return events, arrivals and differences."""
    rng = random.Random(seed)
    bodies = histories.bodies_of(seed)
    tried = differences = 0
    known = histories.facts_of(bodies)
    rows = reference.account_of(bodies)
    assert rows.keys() == {each for each in known if not all(one.is_witness for one in known[each])}
    for subject, expected in rows.items():
        if expected is None:
            continue
        by_event: dict[str, list[Facts]] = defaultdict(list)
        for each in join.with_leader(folds.ROW_SPECS[subject.table], subject, known):
            by_event[each.event_id].append(each)
        events = list(by_event.values())
        for _ in range(arrivals):
            rng.shuffle(events)
            tried += 1
            batches = [[one for event in batch for one in event] for batch in split(events, rng)]
            found = arrive(batches, subject)
            is_ambiguous = join.AMBIGUOUS_ORDER in {each.kind for each in found.anomalies}
            differences += (reference.public(found.row), is_ambiguous) != (expected.row, expected.is_ambiguous)
    return len(bodies), tried, differences


@settings(max_examples=200)
@given(seeds)
@example(2687056214)  # two events without previous values, and one that shows that it paid the invoice, in one second
@example(3323424366)
def test_any_arrival_gives_the_reference_row(seed: int) -> None:
    """In any order and any batches a history's rows are those of the plain reference, twins included."""
    assert compare(seed, arrivals=8)[2] == 0


@pytest.mark.long
def test_many_histories(capsys: pytest.CaptureFixture[str]) -> None:
    """The same for thousands of histories; prints how many, and how many rows differed."""
    found = [compare(seed, arrivals=20) for seed in range(LONG_HISTORIES)]
    events, tried, differences = map(sum, zip(*found, strict=True))
    with capsys.disabled():
        print(f"\n{len(found):,} histories, {events:,} events, {tried:,} arrivals, {differences} differences")  # noqa: T201 - the figure

    assert differences == 0


@given(seeds, st.integers(2, 5))
def test_changes_within_a_second_end_as_they_ended(seed: int, count: int) -> None:
    """Two to five changes of a link in one second, delivered in any order, end where the link ended."""
    rng = random.Random(seed)
    account = Account(seed=seed)
    link = account.create_payment_link()
    account.advance(rng.choice((0, 1)))
    for _ in range(count):
        account.update_payment_link(link, active=rng.random() < 0.5, metadata={"step": str(rng.randrange(3))})
    all_facts = [facts for event in account.events for facts in folds.judge(histories.event_of(event.body)).facts]
    rng.shuffle(all_facts)

    row = arrive(split(all_facts, rng)).row

    truth = account.payment_link(link)
    assert (row["active"], row["metadata"]) == (truth["active"], truth["metadata"])


def test_the_survey_of_a_chain_is_exact() -> None:
    """The fewest gaps and the possible last states, computed from degrees, are those found by trying every order."""
    rng = random.Random(20_261_122)
    for _ in range(3_000):
        states = rng.randint(1, 5)
        edges = [
            chain._Edge(rng.randrange(states), rng.randrange(states), step(f"evt_{index}", 0, 0))
            for index in range(rng.randint(1, 5))
        ]
        start = rng.choice([None, *range(states)])
        fewest: int | None = None
        lasts: set[object] = set()
        for order in permutations(edges):
            gaps, state = 0, start
            for index, edge in enumerate(order):
                gaps += edge.before != state and not (index == 0 and start is None)
                state = edge.after
            if fewest is None or gaps < fewest:
                fewest, lasts = gaps, set()
            if gaps == fewest:
                lasts.add(state)
        assert chain._survey(edges, start) == (fewest, lasts)


def test_an_honest_repeat_is_no_duplicate() -> None:
    """On, off, on, off within a second is off: the second "off" is not taken for a twin of the first."""
    steps = [step("evt_1", 1, 0), step("evt_2", 0, 1), step("evt_3", 1, 0)]
    earlier = step("evt_0", 0, 1, second=-1)

    for order in permutations([earlier, *steps]):
        assert arrive([[facts] for facts in order]).row["metadata"] == {"step": 0}


def test_a_later_second_needs_no_history() -> None:
    """Several changes of one later second advance a link's row without its history; a gap needs the history."""
    shape = folds.ROW_SPECS["payment_links"]
    row = folded(step("evt_0", 5, 0)).row
    chain = [step("evt_3", 0, 1, second=1), step("evt_1", 1, 2, second=1), step("evt_2", 2, 3, second=1)]

    for order in permutations(chain):
        advanced = join.advance(shape, row, order)
        assert advanced is not None
        assert (advanced.row["metadata"], advanced.row["event_id"]) == ({"step": 3}, "evt_2")
    assert join.advance(shape, row, chain[1:]) is None


def test_a_later_second_with_facts_beyond_the_columns() -> None:
    """Changes of one second that carry facts beyond the row's columns ask for all events, and raise no error."""
    row = folded(step("evt_0", 5, 0)).row
    steps = [
        structs.replace(step(name, 0, 0, second=1), columns={"_beyond": 1}, before=None) for name in ("evt_1", "evt_2")
    ]

    assert join.advance(folds.ROW_SPECS["payment_links"], row, steps) is None


def test_a_twin_does_not_break_the_chain() -> None:
    """A change reported twice, under two ids, does not hide the change that follows it."""
    steps = [step("evt_9", 0, 1), step("evt_2", 0, 1), step("evt_3", 1, 2)]
    earlier = step("evt_0", 5, 0, second=-1)

    for order in permutations([earlier, *steps]):
        row = arrive([[facts] for facts in order]).row
        assert (row["metadata"], row["event_id"]) == ({"step": 2}, "evt_3")


def test_the_chain_begins_where_the_second_before_ended() -> None:
    """A circle of changes ends where the earlier second left off, and is not ambiguous."""
    circle = [step("evt_1", 0, 1), step("evt_2", 1, 2), step("evt_3", 2, 0)]
    earlier = step("evt_0", 7, 1, second=-1)

    result = folded(*circle, earlier)

    assert result.row["metadata"] == {"step": 1}
    assert result.anomalies == ()


def test_an_ambiguous_order_is_noted() -> None:
    """Where two last states are possible, a real event beats an observation, and the ambiguity is noted."""
    steps = [step("evt_1", 1, 2), step("obs_9", 1, 3, source="observation"), step("evt_0", 0, 1, second=-1)]

    result = folded(*steps)

    assert result.row["event_id"] == "evt_1"
    assert [anomaly.kind for anomaly in result.anomalies] == [join.AMBIGUOUS_ORDER]


def test_a_later_second_ends_the_ambiguity() -> None:
    """Once a later event decides, an earlier ambiguous second no longer matters, by either way of joining."""
    steps = [step("evt_1", 1, 2), step("evt_2", 1, 3)]
    later = step("evt_3", 3, 4, second=1)

    whole = folded(*steps, later)
    advanced = join.advance(payment_link.ROW_SPEC, folded(*steps).row, [later])

    assert whole.anomalies == ()
    assert advanced is not None
    assert (advanced.row, advanced.anomalies) == (whole.row, ())


def test_nothing_comes_before_the_created_event() -> None:
    """An update in the second of a link's creation comes after the creation, even if it restores the first state."""
    steps = [step("evt_9", None, 0, first=True), step("evt_1", 0, 1), step("evt_2", 1, 0)]

    for order in permutations(steps):
        row = arrive([[facts] for facts in order]).row
        assert (row["metadata"], row["event_id"], row["created"]) == ({"step": 0}, "evt_2", SECOND)


def test_a_long_second_is_put_in_order() -> None:
    """Two hundred shuffled changes in one second end where they ended, without a search of all orders."""
    steps = [step(f"evt_{index:03}", index, index + 1) for index in range(200)]
    random.Random(7).shuffle(steps)

    assert folded(*steps).row["metadata"] == {"step": 200}


def test_only_a_strictly_later_event_advances_a_row() -> None:
    """An older event and an equally old one never advance a row; both need all events."""
    row = folded(step("evt_5", 0, 1, second=5)).row

    assert join.advance(payment_link.ROW_SPEC, row, [step("evt_4", 0, 1, second=4)]) is None
    assert join.advance(payment_link.ROW_SPEC, row, [step("evt_6", 0, 1, second=5)]) is None
    assert join.advance(payment_link.ROW_SPEC, row, [step("evt_6", 0, 1, second=6)]) is not None


def test_row_specs_fit_their_tables() -> None:
    """The columns that a row spec fills are exactly those of its table."""
    from schemas import tables  # noqa: PLC0415 - only this test wants the tables

    steps = {shape.child for shape in folds.ROW_SPECS.values() if shape.child}
    # Stripe lists the lines of orders on request, and no fetch does so yet.
    assert {*folds.ROW_SPECS} | steps | {"order_lines"} == {table.name for table in tables.PROJECTIONS}
    for name, shape in folds.ROW_SPECS.items():
        beyond = {"account", "livemode", *shape.key, "event_id", "as_of"}
        assert {*shape.empty} | beyond == {column.name for column in tables.metadata.tables[name].columns}
