"""The budget of calls to Stripe: one for all processes, with lanes that leave each other room."""

from collections.abc import Iterator

import pytest
from redis import Redis

from schemas.budget import Budget, Lane
from schemas.errors import BrokerAway

CALL = "get checkout/sessions"


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """Return a client of an empty server."""
    with Redis.from_url(redis_url) as client:
        yield client


def drawn(budget: Budget, *, most: int) -> int:
    """Return how many calls *budget* gives at once, *most* at the most."""
    times = 0
    while times < most and budget.try_to_draw(CALL) == 0:
        times += 1
    return times


def emptied(budget: Budget) -> tuple[int, float]:
    """Return how many calls *budget* gives until there is none, and after how many seconds it then has one."""
    for times in range(100_000):
        if seconds := budget.try_to_draw(CALL):
            return times, seconds
    pytest.fail("it has no end")


def test_a_second_gives_what_the_rate_says(redis: Redis) -> None:
    """A full bucket holds a second's worth, and then says how long to wait."""
    budget = Budget(redis, "t", Lane.EXPIRY, 100)

    times, seconds = emptied(budget)

    # A busy machine takes long to draw so many, and the bucket fills again all the time.
    assert times >= 100
    assert 0 < seconds <= 0.01 + 1e-9


def test_all_processes_draw_from_one_bucket(redis: Redis) -> None:
    """What one has drawn another cannot; another account's bucket is its own."""
    emptied(Budget(redis, "t", Lane.EXPIRY, 1))

    assert Budget(redis, "t", Lane.EXPIRY, 1).try_to_draw(CALL) > 0
    assert Budget(redis, "other", Lane.EXPIRY, 1).try_to_draw(CALL) == 0


def test_each_lane_leaves_room_for_those_before_it(redis: Redis) -> None:
    """A backfill takes the top of a full bucket only; then discovery, refetches and expiry still find calls."""
    lanes = sorted(Lane, reverse=True)

    taken = [drawn(Budget(redis, "t", lane, 100), most=100) for lane in lanes]

    assert all(calls >= 15 for calls in taken), taken
    assert 38 <= taken[0] <= 60, taken


@pytest.mark.parametrize("lane", Lane)
def test_no_lane_starves_where_nothing_else_calls(redis: Redis, lane: Lane) -> None:
    """Even at one call a second a full bucket has a call for each lane."""
    assert Budget(redis, "t", lane, 1).try_to_draw(CALL) == 0


def test_a_global_limit_pauses_everything(redis: Redis) -> None:
    """What Stripe says of the whole account holds for each lane and endpoint."""
    Budget(redis, "t", Lane.BACKFILL, 100).pause(CALL, "global-rate")

    assert Budget(redis, "t", Lane.EXPIRY, 100).try_to_draw("post checkout/sessions/expire") > 0.5


def test_an_endpoints_limit_pauses_that_endpoint(redis: Redis) -> None:
    """What Stripe says of one endpoint leaves the others alone."""
    budget = Budget(redis, "t", Lane.EXPIRY, 100)

    budget.pause(CALL, "endpoint-concurrency")

    assert budget.try_to_draw(CALL) > 0.5
    assert budget.try_to_draw("get events") == 0


def test_a_locked_object_pauses_nothing(redis: Redis) -> None:
    """A 429 without a reason is about one object, and no matter of how often anybody calls."""
    budget = Budget(redis, "t", Lane.EXPIRY, 100)

    budget.pause(CALL, "")

    assert budget.try_to_draw(CALL) == 0


def test_pauses_in_a_row_grow(redis: Redis) -> None:
    """Each further 429 waits about twice as long as the one before, up to a bound."""
    budget = Budget(redis, "t", Lane.EXPIRY, 100)
    waits = []
    for _ in range(8):
        budget.pause(CALL, "global-rate")
        waits.append(budget.try_to_draw(CALL))

    assert waits[2] > waits[0] * 2
    assert 20 < waits[-1] <= 30 * 1.25


def test_without_redis_nothing_is_called() -> None:
    """Nobody knows what others have called, so it waits until somebody does."""
    with Redis(host="127.0.0.1", port=1) as nobody, pytest.raises(BrokerAway):
        Budget(nobody, "t", Lane.EXPIRY, 100).draw(CALL)
