"""The door to Stripe's API: which key serves which rows, and what Stripe's answers mean.

Note [Answers are ours to decode]
    Stripe's SDK makes every call, and judges what is an error. It would also decode each answer whole, and raise where
    one object of a page is odd. So the client beneath it keeps an answer's bytes, and gives the SDK an empty object in
    their place: what was answered is then cut and read here, object by object.
"""

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import quote, urlsplit

import stripe
from redis import Redis

from schemas import listing, observations
from schemas.budget import Budget, Lane
from schemas.errors import (
    BrokerAway,
    BudgetSpent,
    CallDeclined,
    KeyRefused,
    MissingAtStripe,
    NotAnObject,
    NotServed,
    StripeAway,
)
from schemas.observations import Answer, Object, World
from schemas.settings import ApiKey, Settings

CONNECT_SECONDS_MAX: Final = 3.0
ANSWER_SECONDS_MAX: Final = 10.0
"""Without a byte of an answer."""
BODY_SECONDS_MAX: Final = 30.0
"""For the whole body of an answer, which may come in drops."""
NETWORK_RETRIES_MAX: Final = 2
"""The SDK tries again by itself, with jitter and the same idempotency key, when a connection or Stripe fails."""
PAGE_ROWS: Final = 100
"""The most that Stripe lists on a page."""


class Page:
    """A page of a list: its *items*, each as Stripe wrote it, and a time at which they were surely so.

    With *has_more* another page follows it.
    """

    def __init__(self, items: list[bytes], at: int, *, has_more: bool) -> None:
        self.items = items
        self.at = at
        self.has_more = has_more
        self.objects: list[Answer] = []
        """Those items that have an id, decoded as far as they can be."""
        for item in items:
            with suppress(NotAnObject):
                if (answer := observations.answer_of(item, at)).id is not None:
                    self.objects.append(answer)

    @property
    def unreadable(self) -> int:
        """How many items have no id that can be read, so that nothing can be done with them."""
        return len(self.items) - len(self.objects)


class StripeApi:
    """Calls Stripe with the keys that *settings* hold, within the budget that *redis* keeps; without keys, never.

    Unless it *is_paced* it needs no Redis: for the few calls of an operator's own command. *step* is called before each
    try of a call, so that the work is seen to come further.
    """

    def __init__(
        self,
        settings: Settings,
        redis: Redis | None,
        *,
        retries_max: int = NETWORK_RETRIES_MAX,
        answer_seconds_max: float = ANSWER_SECONDS_MAX,
        body_seconds_max: float = BODY_SECONDS_MAX,
        is_paced: bool = True,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._is_paced = is_paced
        self._redis = redis
        self._retries_max = retries_max
        self._answer_seconds_max = answer_seconds_max
        self._body_seconds_max = body_seconds_max
        self._step = step
        self._clients: dict[tuple[str, Lane], tuple[stripe.StripeClient, _PacedClient]] = {}
        self._names: Mapping[str, str] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is no key, so that nothing is ever called."""
        return not self._settings.api_keys

    def learn(self, names: Mapping[str, str]) -> None:
        """Take the labels of keys under the newest *names* of accounts, by the old ones, from now on."""
        self._names = names

    def key_for(self, world: World) -> ApiKey | None:
        """Return the key that serves *world*: its own, else the unlabelled one, as for an account connected to it."""
        of_mode = {key.account: key for key in self._settings.api_keys if key.livemode == world.livemode}
        own = [key for label, key in of_mode.items() if self._names.get(label, label) == world.account]
        if own:
            return of_mode.get(world.account, own[0])
        platform = of_mode.get("")
        if platform is None or not world.account.startswith("acct_"):
            return None
        return ApiKey("", platform.livemode, platform.secret, acts_for=world.account)

    def serves(self, world: World) -> bool:
        """Return whether a key serves *world*."""
        return self.key_for(world) is not None

    def own_worlds(self) -> list[World]:
        """Return the worlds that keys are labelled with."""
        keys = self._settings.api_keys
        return list({World(self._names.get(key.account, key.account), key.livemode): key for key in keys})

    def call(
        self,
        world: World,
        method: str,
        *path: str,
        lane: Lane,
        idempotency_key: str | None = None,
        **params: Any,  # noqa: ANN401 - Stripe's own parameters
    ) -> Answer:
        """Call ``/v1/`` and *path*, after quoting its parts, and return the object that is answered.

        Raises:
            NotServed: no key serves *world*; nothing was called.
            KeyRefused: 401 or 403.
            MissingAtStripe: 404.
            CallDeclined: 400 or 402.
            BudgetSpent, BrokerAway: nothing was called; try again later.
            StripeAway: 409, 429, 5xx, a time-out, a lost connection, or an answer that is not Stripe's; whether
                Stripe acted is not known.
        """
        text, at = self._bytes_of(world, method, *path, lane=lane, idempotency_key=idempotency_key, **params)
        try:
            return observations.answer_of(text, at)
        except NotAnObject:
            raise StripeAway(f"What was answered is not JSON. {StripeAway.__doc__}") from None

    def event(self, world: World, event_id: str, *, lane: Lane) -> bytes:
        """Return an event as Stripe writes it; raises as ``call`` does."""
        return self._bytes_of(world, "get", "events", event_id, lane=lane)[0]

    def pages(self, world: World, *path: str, lane: Lane, **params: Any) -> Iterator[Page]:  # noqa: ANN401 - as above
        """Call a list, newest first, page by page; raises as ``call`` does.

        Raises:
            NotAnObject: nothing on a page has an id, behind which the next page would begin.
        """
        following: Object = {}
        while True:
            text, at = self._bytes_of(world, "get", *path, lane=lane, limit=PAGE_ROWS, **{**params, **following})
            found = listing.cut(text)
            if found is None:
                raise StripeAway(f"What was answered is no list. {StripeAway.__doc__}")
            page = Page(found.items, at, has_more=found.has_more and bool(found.items))
            yield page
            if not page.has_more:
                return
            last = next((each.id for each in reversed(page.objects) if _is_askable(each.id)), None)
            if last is None or last == following.get("starting_after"):
                raise NotAnObject("Stripe's list cannot be followed: no object on a page has a readable id.")
            following = {"starting_after": last}

    def whole(self, world: World, *path: str, lane: Lane) -> list[Object] | None:
        """Return every object of a list, None where one of them is odd; raises as ``pages`` does."""
        found: list[Object] = []
        for page in self.pages(world, *path, lane=lane):
            if page.unreadable or any(each.odd for each in page.objects):
                return None
            found += [each.body for each in page.objects]
        return found

    def _bytes_of(
        self,
        world: World,
        method: str,
        *path: str,
        lane: Lane,
        idempotency_key: str | None = None,
        **params: Any,  # noqa: ANN401 - Stripe's own parameters
    ) -> tuple[bytes, int]:
        """Return what Stripe answers, and a time at which it was surely so; raises as ``call`` does."""
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
        return paced.taken(), _surely_at(answer.headers, time.monotonic() - started)

    def _client(self, key: ApiKey, lane: Lane) -> "tuple[stripe.StripeClient, _PacedClient]":
        # Calls for connected accounts are counted with those of the account that owns the key.
        if (key.secret, lane) not in self._clients:
            paced = _PacedClient(
                self._budget(key, lane) if self._is_paced else None,
                answer_seconds_max=self._answer_seconds_max,
                body_seconds_max=self._body_seconds_max,
                step=self._step,
            )
            client = stripe.StripeClient(
                key.secret,
                base_addresses={"api": self._settings.stripe_api_base},
                max_network_retries=self._retries_max,
                http_client=paced,
            )
            self._clients[key.secret, lane] = client, paced
        return self._clients[key.secret, lane]

    def _budget(self, key: ApiKey, lane: Lane) -> Budget:
        if self._redis is None:
            raise BrokerAway
        label = next(known.account for known in self._settings.api_keys if known.secret == key.secret)
        name = f"payfold:stripe:{label}:{'live' if key.livemode else 'test'}"
        return Budget(self._redis, name, lane, self._settings.calls_per_second(livemode=key.livemode))


def url_of(*path: str) -> str:
    """Return the path of a call; an id out of an event may hold any character."""
    return "/v1/" + "/".join(quote(part, safe="") for part in path)


def _is_askable(object_id: str | None) -> bool:
    """Return whether an id can stand in an address; half of a surrogate pair cannot."""
    try:
        return object_id is not None and quote(object_id) != ""
    except UnicodeEncodeError:
        return False


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
        return KeyRefused(f"{detail} {KeyRefused.__doc__}", is_forbidden=status == 403)  # noqa: PLR2004 - HTTP's number
    if status == 404:  # noqa: PLR2004 - HTTP's number
        return MissingAtStripe()
    if status in {400, 402}:
        return CallDeclined(f"{detail} {CallDeclined.__doc__}")
    if status is None:
        return StripeAway(f"Stripe did not answer ({type(error).__name__}). {StripeAway.__doc__}")
    return StripeAway(f"{detail} {StripeAway.__doc__}")


class _PacedClient(stripe.RequestsClient):
    """The SDK's HTTP client, which draws from the budget before each try, and counts the tries of a thread's call.

    See Note [Answers are ours to decode].
    """

    def __init__(
        self, budget: Budget | None, *, answer_seconds_max: float, body_seconds_max: float, step: Callable[[], None]
    ) -> None:
        super().__init__(timeout=(CONNECT_SECONDS_MAX, answer_seconds_max))
        self._budget = budget
        self._step = step
        self._body_seconds_max = body_seconds_max
        self._of_thread = threading.local()

    @property
    def tries(self) -> int:
        """How often Stripe was asked since this was last set to 0."""
        return getattr(self._of_thread, "tries", 0)

    @tries.setter
    def tries(self, times: int) -> None:
        self._of_thread.tries = times

    def taken(self) -> bytes:
        """Return the bytes of this thread's last answer, once."""
        body, self._of_thread.body = self._of_thread.body, b""
        found: bytes = body
        return found

    def request(  # type: ignore[override]  # the SDK passes these, and its own subclasses take no more
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        post_data: Any = None,  # noqa: ANN401 - as in the SDK
    ) -> tuple[bytes, int, Mapping[str, str]]:
        """Try a call once, in its turn."""
        endpoint = _endpoint(method, url)
        self._step()
        if self._budget is not None:
            self._budget.draw(endpoint)
        self.tries += 1
        stream, status, answered = super().request_stream(method, url, headers, post_data)
        body = _read(stream, self._body_seconds_max)
        if status == 429 and self._budget is not None:  # noqa: PLR2004 - HTTP's number
            self._budget.pause(endpoint, answered.get("Stripe-Rate-Limited-Reason", ""))
        if not 200 <= status < 300:  # noqa: PLR2004 - HTTP's numbers
            return body, status, answered
        self._of_thread.body = body
        return b"{}", status, answered


def _read(stream: Any, seconds_max: float) -> bytes:  # noqa: ANN401 - urllib3's answer, which the SDK does not type
    """Return the body of an answer; each part of it has its own time-out, and the whole has *seconds_max*."""
    try:
        parts = list(_parts(stream, until=time.monotonic() + seconds_max))
    except Exception as error:  # noqa: BLE001 - the libraries beneath have many kinds for a lost connection
        stream.close()
        lost: stripe.StripeError = stripe.APIConnectionError(type(error).__name__, should_retry=True)  # type: ignore[no-untyped-call]  # the SDK's own
        raise lost from None
    stream.release_conn()
    return b"".join(parts)


def _parts(stream: Any, *, until: float) -> Iterator[bytes]:  # noqa: ANN401 - as above
    while part := stream.read1(decode_content=True):
        yield part
        if time.monotonic() > until:
            raise TimeoutError
    if stream.length_remaining:
        raise EOFError


def _endpoint(method: str, url: str) -> str:
    """Return what a call's endpoint is called in the budget: its path without ids."""
    words = [part for part in urlsplit(url).path.split("/")[2:] if not _ID.search(part)]
    return f"{method} {'/'.join(words)}"


_ID: Final = re.compile(r"[^a-z_]")
