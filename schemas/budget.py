"""How often Stripe may be called, by all processes together.

Note [One budget for all calls]
    Stripe counts the calls of all processes together, per account and mode. So every process draws from one bucket
    in Redis before each try of a call. Lanes leave each other room: a lane draws only while the bucket holds more
    than the lanes before it keep back, so that expiring a session never waits for a backfill. A 429 pauses what
    Stripe's header names: every call for a global limit, one endpoint for its own limit, and nothing where only an
    object was locked. Source: https://docs.stripe.com/rate-limits.
"""

import random
import time
from enum import IntEnum
from typing import Final

from redis import Redis
from redis.exceptions import RedisError

from schemas.errors import BrokerAway, BudgetSpent

BUDGET_SECONDS_MAX: Final = 4.0
"""How long a call waits for its turn before it is put off."""
PAUSE_SECONDS_MAX: Final = 30.0


class Lane(IntEnum):
    """What a call is for, the most urgent first."""

    EXPIRY = 0
    REFETCH = 1
    DISCOVERY = 2
    BACKFILL = 3


# A bucket that fills at the rate, up to one second's worth. Times are Redis's own, so that clocks need not agree.
_DRAW: Final = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
local paused = math.max(redis.call('PTTL', KEYS[2]), redis.call('PTTL', KEYS[3]))
if paused > 0 then return paused end
local rate, kept = tonumber(ARGV[1]), tonumber(ARGV[2])
local known = redis.call('HMGET', KEYS[1], 'level', 'at')
local level = rate
if known[1] then level = math.min(rate, known[1] + math.max(0, now - known[2]) * rate) end
if level - 1 < kept then return math.ceil((1 + kept - level) / rate * 1000) end
redis.call('HSET', KEYS[1], 'level', tostring(level - 1), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], 5000)
return 0
"""
_KEPT_SHARES: Final = {Lane.EXPIRY: 0.0, Lane.REFETCH: 0.2, Lane.DISCOVERY: 0.4, Lane.BACKFILL: 0.6}


class Budget:
    """The calls that one lane may make with one key, as Redis counts them for all processes."""

    def __init__(self, redis: Redis, name: str, lane: Lane, rate: int) -> None:
        self._redis = redis
        self._name = name
        self._rate = rate
        # A full bucket always holds one call more than the lanes before it keep back.
        self._kept = (rate - 1) * _KEPT_SHARES[lane]

    def draw(self, endpoint: str) -> None:
        """Wait for a call's turn.

        Raises:
            BudgetSpent: it does not come soon.
            BrokerAway: Redis does not answer.
        """
        deadline = time.monotonic() + BUDGET_SECONDS_MAX
        while seconds := self.try_to_draw(endpoint):
            if time.monotonic() + seconds > deadline:
                raise BudgetSpent
            time.sleep(seconds)

    def try_to_draw(self, endpoint: str) -> float:
        """Draw a call of *endpoint* and return 0, or the seconds after which to try again."""
        keys = [self._name, f"{self._name}:pause", f"{self._name}:pause:{endpoint}"]
        try:
            milliseconds = int(self._redis.eval(_DRAW, len(keys), *keys, str(self._rate), str(self._kept)))
        except (RedisError, OSError):
            raise BrokerAway from None
        return milliseconds / 1000

    def pause(self, endpoint: str, reason: str) -> None:
        """Pause calls of what Stripe reports as called too often, for longer each time in a row."""
        if not reason:
            return  # An object was locked by another call, which the rate of calls does not change.
        name = f"{self._name}:pause" if reason.startswith("global") else f"{self._name}:pause:{endpoint}"
        try:
            times = int(self._redis.incr(f"{name}:times"))
            seconds = min(PAUSE_SECONDS_MAX, 2 ** (times - 1)) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
            self._redis.pexpire(f"{name}:times", int(PAUSE_SECONDS_MAX * 2000))
            self._redis.set(name, reason, px=int(seconds * 1000))
        except (RedisError, OSError):
            return  # Without Redis no call draws either.
