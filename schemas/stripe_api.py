"""The door to Stripe's API: which key serves which rows, how often it may be called, and what its answers mean.

Note [One budget for all calls]
    Stripe counts calls per account and mode, whoever makes them. So every process draws from one bucket in
    Redis before each try of a call. Lanes leave each other room: a lane draws only while the bucket holds more
    than those before it keep back, so that expiring a session never waits for a backfill. A 429 pauses what
    Stripe's header names: everything for a global limit, one endpoint for its own, and nothing where only an
    object was locked. Source: https://docs.stripe.com/rate-limits.
"""

import math
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from enum import IntEnum
from typing import Any, Final
from urllib.parse import quote, urlsplit

import msgspec
import stripe
from redis import Redis
from redis.exceptions import RedisError

from schemas.errors import (
    BrokerAway,
    BudgetSpent,
    CallDeclined,
    KeyRefused,
    MissingAtStripe,
    NotServed,
    StripeAway,
)
from schemas.observations import Answer, Object, World
from schemas.settings import ApiKey, Settings

CONNECT_SECONDS_MAX: Final = 3.0
ANSWER_SECONDS_MAX: Final = 10.0
NETWORK_RETRIES_MAX: Final = 2
"""The SDK tries again by itself, with jitter and the same idempotency key, when a connection or Stripe fails."""
BUDGET_SECONDS_MAX: Final = 4.0
"""How long a call waits for its turn before it is put off."""
PAUSE_SECONDS_MAX: Final = 30.0
PAGE_ROWS: Final = 100
"""The most that Stripe lists on a page."""


class Lane(IntEnum):
    """What a call is for, the most urgent first."""

    EXPIRY = 0
    REFETCH = 1
    DISCOVERY = 2
    BACKFILL = 3


class StripeApi:
    """Calls Stripe with the keys that *settings* hold, within the budget that *redis* keeps; without keys, never."""

    def __init__(self, settings: Settings, redis: Redis | None, *, retries_max: int = NETWORK_RETRIES_MAX) -> None:
        self._settings = settings
        self._redis = redis
        self._retries_max = retries_max
        self._clients: dict[tuple[str, Lane], tuple[stripe.StripeClient, _PacedClient]] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is no key, so that nothing is ever called."""
        return not self._settings.api_keys

    def key_for(self, world: World) -> ApiKey | None:
        """Return the key that serves *world*: its own, else the unlabelled one, as for an account connected to it."""
        of_mode = {key.account: key for key in self._settings.api_keys if key.livemode == world.livemode}
        if world.account in of_mode:
            return of_mode[world.account]
        platform = of_mode.get("")
        if platform is None or not world.account.startswith("acct_"):
            return None
        return ApiKey("", platform.livemode, platform.secret, acts_for=world.account)

    def serves(self, world: World) -> bool:
        """Tell whether a key serves *world*."""
        return self.key_for(world) is not None

    def own_worlds(self) -> list[World]:
        """Return the worlds that keys are labelled with."""
        return [World(key.account, key.livemode) for key in self._settings.api_keys]

    def call(
        self,
        world: World,
        method: str,
        *path: str,
        lane: Lane,
        idempotency_key: str | None = None,
        **params: Any,  # noqa: ANN401 - Stripe's own parameters
    ) -> Answer:
        """Call ``/v1/`` and *path*, whose parts are quoted, and return the answer.

        Raises:
            NotServed: no key serves *world*; nothing was called.
            KeyRefused: 401 or 403.
            MissingAtStripe: 404.
            CallDeclined: 400 or 402.
            BudgetSpent, BrokerAway: nothing was called; try again later.
            StripeAway: 409, 429, 5xx, a time-out or a lost connection; whether it acted is not known.
        """
        key = self.key_for(world)
        if key is None:
            raise NotServed
        options: Object = {} if key.acts_for is None else {"stripe_account": key.acts_for}
        if idempotency_key is not None:
            options["idempotency_key"] = idempotency_key
        client, paced = self._client(key, lane)
        paced.tries = 0
        started = time.monotonic()
        try:
            answer = client.raw_request(method, url_of(*path), **params, **options)
        except stripe.StripeError as error:
            raise _meaning(error, key) from None
        except (BudgetSpent, BrokerAway):
            if paced.tries:
                raise StripeAway from None
            raise
        duration = time.monotonic() - started
        return Answer(msgspec.json.decode(answer.body), _surely_at(answer.headers, duration))

    def pages(self, world: World, *path: str, lane: Lane, **params: Any) -> Iterator[Answer]:  # noqa: ANN401 - as above
        """Call a list, newest first, page by page; raises as ``call`` does."""
        following: Object = {}
        while True:
            page = self.call(world, "get", *path, lane=lane, limit=PAGE_ROWS, **params, **following)
            yield page
            if not page.body["has_more"] or not page.body["data"]:
                return
            following = {"starting_after": page.body["data"][-1]["id"]}

    def _client(self, key: ApiKey, lane: Lane) -> "tuple[stripe.StripeClient, _PacedClient]":
        # Calls for connected accounts are counted with those of the account whose key makes them.
        if self._redis is None:
            raise BrokerAway
        if (key.secret, lane) not in self._clients:
            label = next(known.account for known in self._settings.api_keys if known.secret == key.secret)
            name = f"payfold:stripe:{label}:{'live' if key.livemode else 'test'}"
            paced = _PacedClient(
                _Budget(self._redis, name, lane, self._settings.calls_per_second(livemode=key.livemode))
            )
            client = stripe.StripeClient(
                key.secret,
                base_addresses={"api": self._settings.stripe_api_base},
                max_network_retries=self._retries_max,
                http_client=paced,
            )
            self._clients[key.secret, lane] = client, paced
        return self._clients[key.secret, lane]


def url_of(*path: str) -> str:
    """Return the path of a call; an id out of an event may hold any character."""
    return "/v1/" + "/".join(quote(part, safe="") for part in path)


def _surely_at(headers: Mapping[str, str], duration: float) -> int:
    try:
        answered = parsedate_to_datetime(headers["Date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        answered = time.time()
    return math.floor(answered - duration)


def _meaning(error: stripe.StripeError, key: ApiKey) -> Exception:
    """Return our error for the SDK's; its message may quote the key, so only its status and code are kept."""
    status, code = error.http_status, error.code
    detail = f"Stripe answered {status}" + (f" ({code})" if code else "") + "."
    if status == 403 and code == "account_invalid" and key.acts_for:  # noqa: PLR2004 - HTTP's number
        return NotServed(f"{NotServed.__doc__} The unlabelled key has no access to {key.acts_for}.")
    if status in {401, 403}:
        return KeyRefused(f"{detail} {KeyRefused.__doc__}")
    if status == 404:  # noqa: PLR2004 - HTTP's number
        return MissingAtStripe()
    if status in {400, 402}:
        return CallDeclined(f"{detail} {CallDeclined.__doc__}")
    if status is None:
        return StripeAway(f"Stripe did not answer ({type(error).__name__}). {StripeAway.__doc__}")
    return StripeAway(f"{detail} {StripeAway.__doc__}")


class _PacedClient(stripe.RequestsClient):
    """The SDK's HTTP client, which draws from the budget before each try, and counts the tries of a thread's call."""

    def __init__(self, budget: "_Budget") -> None:
        super().__init__(timeout=(CONNECT_SECONDS_MAX, ANSWER_SECONDS_MAX))
        self._budget = budget
        self._tried = threading.local()

    @property
    def tries(self) -> int:
        """How often Stripe was asked since this was last set to 0."""
        return getattr(self._tried, "times", 0)

    @tries.setter
    def tries(self, times: int) -> None:
        self._tried.times = times

    def request(  # type: ignore[override]  # the SDK passes these, and its own subclasses take no more
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        post_data: Any = None,  # noqa: ANN401 - as in the SDK
    ) -> tuple[bytes, int, Mapping[str, str]]:
        """Try a call once, in its turn."""
        endpoint = _endpoint(method, url)
        self._budget.draw(endpoint)
        self.tries += 1
        answer = super().request(method, url, headers, post_data)
        status, answered = answer[1], answer[2]
        if status == 429:  # noqa: PLR2004 - HTTP's number
            self._budget.pause(endpoint, answered.get("Stripe-Rate-Limited-Reason", ""))
        return answer


def _endpoint(method: str, url: str) -> str:
    """Return what a call's endpoint is called in the budget: its path without ids."""
    words = [part for part in urlsplit(url).path.split("/")[2:] if not _ID.search(part)]
    return f"{method} {'/'.join(words)}"


_ID: Final = re.compile(r"[^a-z_]")


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


class _Budget:
    """The calls that one lane may make with one key, as Redis counts them for all processes."""

    def __init__(self, redis: Redis, name: str, lane: Lane, rate: int) -> None:
        self._redis = redis
        self._name = name
        self._rate = rate
        # Whatever the lanes before it keep back, a full bucket always holds one call more.
        self._kept = (rate - 1) * _KEPT_SHARES[lane]

    def draw(self, endpoint: str) -> None:
        """Wait for a call's turn.

        Raises:
            BudgetSpent: it does not come soon.
            BrokerAway: Redis does not answer.
        """
        keys = [self._name, f"{self._name}:pause", f"{self._name}:pause:{endpoint}"]
        deadline = time.monotonic() + BUDGET_SECONDS_MAX
        while True:
            try:
                wait = int(self._redis.eval(_DRAW, len(keys), *keys, str(self._rate), str(self._kept)))
            except (RedisError, OSError):
                raise BrokerAway from None
            if wait <= 0:
                return
            if time.monotonic() + wait / 1000 > deadline:
                raise BudgetSpent
            time.sleep(wait / 1000)

    def pause(self, endpoint: str, reason: str) -> None:
        """Let nobody call what Stripe said is called too often, for longer each time in a row."""
        if not reason:
            return  # An object was locked, by another call: that is no matter of how often.
        name = f"{self._name}:pause" if reason.startswith("global") else f"{self._name}:pause:{endpoint}"
        try:
            times = int(self._redis.incr(f"{name}:times"))
            seconds = min(PAUSE_SECONDS_MAX, 2 ** (times - 1)) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
            self._redis.pexpire(f"{name}:times", int(PAUSE_SECONDS_MAX * 2000))
            self._redis.set(name, reason, px=int(seconds * 1000))
        except (RedisError, OSError):
            return  # Then nothing draws either.
