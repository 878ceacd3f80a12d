"""The budget of calls to Stripe: shared by all processes, with lanes that leave room for each other."""

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
    """Return the number of calls that *budget* gives at once, up to *most*."""
    times = 0
    while times < most and budget.try_to_draw(CALL) == 0:
        times += 1
    return times


def emptied(budget: Budget) -> tuple[int, float]:
    """Draw all calls of *budget*; return their number, and the seconds until the next one."""
    for times in range(100_000):
        if seconds := budget.try_to_draw(CALL):
            return times, seconds
    pytest.fail("it has no end")


def test_a_full_bucket_holds_one_second_of_calls(redis: Redis) -> None:
    """A full bucket holds the calls of one second; an empty one returns the seconds to wait."""
    budget = Budget(redis, "t", Lane.EXPIRY, 100)

    times, seconds = emptied(budget)

    # A busy machine is slow to draw so many, and the bucket is refilled all the time.
    assert times >= 100
    assert 0 < seconds <= 0.01 + 1e-9


def test_all_processes_draw_from_one_bucket(redis: Redis) -> None:
    """Processes share one bucket for each account."""
    emptied(Budget(redis, "t", Lane.EXPIRY, 1))

    assert Budget(redis, "t", Lane.EXPIRY, 1).try_to_draw(CALL) > 0
    assert Budget(redis, "other", Lane.EXPIRY, 1).try_to_draw(CALL) == 0


def test_each_lane_leaves_room_for_those_before_it(redis: Redis) -> None:
    """A backfill takes only the top of a full bucket; discovery, refetches and expiry still find calls below it."""
    lanes = sorted(Lane, reverse=True)

    taken = [drawn(Budget(redis, "t", lane, 100), most=100) for lane in lanes]

    assert all(calls >= 15 for calls in taken), taken
    assert 38 <= taken[0] <= 60, taken


@pytest.mark.parametrize("lane", Lane)
def test_no_lane_starves_where_nothing_else_calls(redis: Redis, lane: Lane) -> None:
    """Even at a rate of one call a second a full bucket has a call for each lane."""
    assert Budget(redis, "t", lane, 1).try_to_draw(CALL) == 0


def test_a_global_limit_pauses_everything(redis: Redis) -> None:
    """A rate limit of the whole account pauses every lane and endpoint."""
    Budget(redis, "t", Lane.BACKFILL, 100).pause(CALL, "global-rate")

    assert Budget(redis, "t", Lane.EXPIRY, 100).try_to_draw("post checkout/sessions/expire") > 0.5


def test_an_endpoints_limit_pauses_that_endpoint(redis: Redis) -> None:
    """A rate limit of one endpoint does not pause the others."""
    budget = Budget(redis, "t", Lane.EXPIRY, 100)

    budget.pause(CALL, "endpoint-concurrency")

    assert budget.try_to_draw(CALL) > 0.5
    assert budget.try_to_draw("get events") == 0


def test_a_locked_object_pauses_nothing(redis: Redis) -> None:
    """A 429 without a reason concerns one locked object and not the rate, so it pauses nothing."""
    budget = Budget(redis, "t", Lane.EXPIRY, 100)

    budget.pause(CALL, "")

    assert budget.try_to_draw(CALL) == 0


def test_pauses_in_a_row_grow(redis: Redis) -> None:
    """Each further 429 doubles the pause, up to a bound."""
    budget = Budget(redis, "t", Lane.EXPIRY, 100)
    waits = []
    for _ in range(8):
        budget.pause(CALL, "global-rate")
        waits.append(budget.try_to_draw(CALL))

    assert waits[2] > waits[0] * 2
    assert 20 < waits[-1] <= 30 * 1.25


def test_without_redis_nothing_is_called() -> None:
    """Without Redis the calls of other processes are unknown, so no call is made."""
    with Redis(host="127.0.0.1", port=1) as no_redis, pytest.raises(BrokerAway):
        Budget(no_redis, "t", Lane.EXPIRY, 100).draw(CALL)
