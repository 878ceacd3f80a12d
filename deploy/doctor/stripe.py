"""What is asked of Stripe with each configured key: what it may read, Stripe's clock, and the endpoints there."""

import time
from dataclasses import dataclass, field
from typing import Final

from deploy import endpoints
from deploy.doctor.findings import NOT_IN_TIME, Unread, attempt, reason_of
from deploy.endpoints import Endpoint
from schemas.budget import Lane
from schemas.errors import CallDeclined, KeyRefused, MissingAtStripe, NotServed, PayfoldError
from schemas.observations import World
from schemas.settings import Settings
from schemas.stripe_api import StripeApi
from worker.proof import kinds

ANSWER_SECONDS_MAX: Final = 5.0
"""For one answer; no call is tried twice."""
_NO_CUSTOMER: Final = "cus_payfold_doctor"
"""The id of no customer: Stripe answers 404 where the key may read ledgers, and 403 where it may not."""
FORBIDDEN: Final = Unread("the key may not read webhook endpoints")
EVENTS: Final = ("events",)
READ: Final = (
    EVENTS,
    *dict.fromkeys(kind.path for kind in kinds.WALKED),
    (*kinds.LEDGERS.path, _NO_CUSTOMER, "balance_transactions"),
)
"""The paths that jobs at Stripe read. One row is asked of each, and not looked at."""


@dataclass(slots=True)
class AtStripe:
    """What is known with the key of one *world*, each value as it is read: see Note [A part that hangs is left behind].

    *let_in* is whether the key is let in at all, and *forbidden* are the paths that it may not read. *ahead_seconds* is
    this machine's clock less Stripe's, which counts whole seconds. *acts_for* is set for a connected account, which has
    no endpoint of its own.
    """

    world: World
    acts_for: str | None = None
    let_in: bool | Unread = NOT_IN_TIME
    forbidden: list[str] = field(default_factory=list)
    read: int = 0
    ahead_seconds: float | Unread = NOT_IN_TIME
    endpoints: list[Endpoint] | Unread = NOT_IN_TIME


def parts(settings: Settings) -> list[AtStripe]:
    """Return a part for each key, with nothing read yet."""
    return [AtStripe(World(key.account, key.livemode), key.acts_for) for key in settings.api_keys]


def fill(settings: Settings, url: str | None, found: AtStripe) -> None:
    """Read everything into *found*; *url* is the webhook's address, if it is known."""
    api = StripeApi(
        settings,
        None,
        is_paced=False,
        retries_max=0,
        answer_seconds_max=ANSWER_SECONDS_MAX,
        body_seconds_max=ANSWER_SECONDS_MAX,
    )
    try:
        for path in READ if found.acts_for is None else (EVENTS,):
            _probe(api, path, found)
    except (PayfoldError, OSError) as error:
        if found.let_in is NOT_IN_TIME or isinstance(error, KeyRefused):
            why = Unread(reason_of(error).partition(". ")[0].removesuffix("."))
            found.let_in = False if isinstance(error, (KeyRefused, NotServed)) else why
            found.ahead_seconds = found.endpoints = why
            return
    if found.ahead_seconds is NOT_IN_TIME:
        found.ahead_seconds = Unread("no call was answered that has a time")
    if found.acts_for is None:
        found.endpoints = attempt(lambda: _endpoints(api, found.world, url))


def _endpoints(api: StripeApi, world: World, url: str | None) -> list[Endpoint] | Unread:
    try:
        return endpoints.listed(api, world, url=url)
    except KeyRefused as error:
        if not error.is_forbidden:
            raise
        return FORBIDDEN


def _probe(api: StripeApi, path: tuple[str, ...], found: AtStripe) -> None:
    """Ask for one row of *path*.

    Raises:
        KeyRefused: the key is let in nowhere.
        NotServed, Transient: as ``StripeApi.call``.
    """
    began = time.monotonic()
    try:
        answer = api.call(found.world, "get", *path, lane=Lane.DISCOVERY, limit=1)
        if found.ahead_seconds is NOT_IN_TIME:
            # The time of an answer is rounded down twice, so that a second in the middle is the best guess.
            found.ahead_seconds = time.time() - (time.monotonic() - began) - answer.at - 1
    except KeyRefused as error:
        if not error.is_forbidden:
            raise
        found.forbidden.append("/".join(path).replace(_NO_CUSTOMER, "{id}"))
    except (MissingAtStripe, CallDeclined):
        pass
    found.let_in = True
    found.read += 1
