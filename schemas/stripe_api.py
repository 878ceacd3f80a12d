"""The door to Stripe's API: which key serves which rows, and what Stripe's answers mean."""

import math
import re
import threading
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import quote, urlsplit

import msgspec
import stripe
from redis import Redis

from schemas.budget import Budget, Lane
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
PAGE_ROWS: Final = 100
"""The most that Stripe lists on a page."""


class StripeApi:
    """Calls Stripe with the keys that *settings* hold, within the budget that *redis* keeps; without keys, never."""

    def __init__(
        self,
        settings: Settings,
        redis: Redis | None,
        *,
        retries_max: int = NETWORK_RETRIES_MAX,
        answer_seconds_max: float = ANSWER_SECONDS_MAX,
    ) -> None:
        self._settings = settings
        self._redis = redis
        self._retries_max = retries_max
        self._answer_seconds_max = answer_seconds_max
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
                Budget(self._redis, name, lane, self._settings.calls_per_second(livemode=key.livemode)),
                answer_seconds_max=self._answer_seconds_max,
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
    # The SDK gives some kinds of error their code, and others only the body.
    status, code = error.http_status, error.code or getattr(error.error, "code", None)
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

    def __init__(self, budget: Budget, *, answer_seconds_max: float) -> None:
        super().__init__(timeout=(CONNECT_SECONDS_MAX, answer_seconds_max))
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
