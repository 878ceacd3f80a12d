"""Stripe's webhook endpoints: how their event types differ from those that the folds read, and making one."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from schemas.budget import Lane
from schemas.errors import CallDeclined, ConflictError, StripeAway
from schemas.observations import Object, World
from schemas.settings import Settings
from schemas.stripe_api import StripeApi
from worker.folds import API_VERSION, STRIPE_TYPES

PATH: Final = "/webhooks/stripe"
_ALL: Final = "*"
_KIND: Final = "webhook_endpoints"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint at Stripe and how its event types differ from ours; *superfluous* ones do no harm."""

    account: str
    livemode: bool
    id: str
    url: str
    status: str
    api_version: str | None
    missing: tuple[str, ...]
    superfluous: tuple[str, ...]

    @property
    def serves(self) -> bool:
        """Whether Stripe sends it everything that the folds read."""
        return self.status == "enabled" and not self.missing


@dataclass(frozen=True, slots=True)
class NewEndpoint:
    """A new endpoint with its signing secret, which Stripe shows only at its creation."""

    id: str
    account: str
    secret: str

    def __repr__(self) -> str:
        return f"Made(id={self.id!r}, account={self.account!r}, secret=hidden)"

    @property
    def entry(self) -> str:
        """The secret as an entry of STRIPE_WEBHOOK_SECRETS, labelled as its key is."""
        return f"{self.account}={self.secret}" if self.account else self.secret


@dataclass(frozen=True, slots=True)
class Fault:
    """What was *found* about an endpoint, and the *remedy*, if there is one.

    Harmful is what keeps events away; *types* are those that it lacks.
    """

    found: str
    remedy: str = ""
    is_harmful: bool = False
    types: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """Both in one sentence, or in two."""
        return f"{self.found}: {self.remedy}" if self.is_harmful else f"{self.found} {self.remedy}".rstrip()


def opened(settings: Settings) -> StripeApi:
    """Return Stripe's API for the few calls that are made here."""
    return StripeApi(settings, None, is_paced=False)


def worlds(settings: Settings, *, account: str | None, livemode: bool | None) -> list[World]:
    """Return the accounts and modes that have keys of their own configured, or those of them that were asked for."""
    return [
        World(key.account, key.livemode)
        for key in settings.api_keys
        if key.acts_for is None and account in (None, key.account) and livemode in (None, key.livemode)
    ]


def listed(api: StripeApi, world: World, *, url: str | None) -> list[Endpoint]:
    """Return the endpoints of *world* for *url*, or for ``PATH`` on any host; raises as ``StripeApi.pages``."""
    pages = api.pages(world, _KIND, lane=Lane.DISCOVERY)
    found = [_read(each.body, world) for page in pages for each in page.objects]
    return [each for each in found if _is_ours(each.url, url)]


def create(api: StripeApi, world: World, url: str) -> NewEndpoint:
    """Make an endpoint for *url* with exactly our event types.

    Raises:
        ConflictError: there is one, or Stripe declined.
        StripeAway: it is not known whether the endpoint was made.
        KeyRefused, NotServed: as ``StripeApi.call``.
    """
    if there := listed(api, world, url=url):
        raise ConflictError(
            f"{there[0].id} is there for {url}, and with a second one each event would come twice. `payfold endpoints"
            " check` compares it; its signing secret is in Stripe's Dashboard."
        )
    try:
        answer = api.call(
            world,
            "post",
            _KIND,
            lane=Lane.DISCOVERY,
            url=url,
            enabled_events=list(STRIPE_TYPES),
            api_version=API_VERSION,
            description="Payfold",
        )
    except CallDeclined as error:
        raise ConflictError(f"{error} It wants an https address that it can reach from outside.") from None
    except StripeAway as error:
        raise StripeAway(f"{error} Whether the endpoint was made is not known: payfold endpoints check") from None
    secret = answer.body.get("secret")
    if not isinstance(secret, str):
        raise StripeAway(f"Stripe made {answer.id} and answered no secret: it is in Stripe's Dashboard.")
    return NewEndpoint(str(answer.id), world.account, secret)


def advice(found: Iterable[Endpoint]) -> list[str]:
    """Return a sentence for each fault of an endpoint: the fault, and the remedy."""
    endpoints = list(found)
    urls = Counter((each.account, each.livemode, each.url) for each in endpoints)
    several = [
        f"{count} endpoints send to {url}, so each event comes {count} times; it is folded once. Keep one of them."
        for (_, _, url), count in urls.items()
        if count > 1
    ]
    return [each.sentence for endpoint in endpoints for each in faults(endpoint)] + several


def faults(endpoint: Endpoint) -> list[Fault]:
    """Return what is not as it should be with *endpoint*, the harmful first."""
    found = []
    if endpoint.status != "enabled":
        resting = f"{endpoint.id} is {endpoint.status}, so Stripe sends it nothing"
        found.append(Fault(resting, "enable it in the Dashboard.", is_harmful=True))
    if endpoint.missing:
        remedy = "choose these events for it in the Dashboard, else what they report stays unknown."
        lacking = f"{endpoint.id} lacks {', '.join(endpoint.missing)}"
        found.append(Fault(lacking, remedy, is_harmful=True, types=endpoint.missing))
    if endpoint.superfluous:
        found.append(
            Fault(
                f"{endpoint.id} sends {len(endpoint.superfluous)} event types that are recorded and not folded; they"
                " do no harm and take room."
            )
        )
    if endpoint.api_version != API_VERSION:
        version = endpoint.api_version or "the account's default version"
        found.append(
            Fault(
                f"{endpoint.id} sends objects as of {version}; the folds were written for {API_VERSION} and read what"
                " an older one has.",
                "The version of an endpoint cannot be changed: make another one, then disable this one.",
            )
        )
    return found


def _read(body: Object, world: World) -> Endpoint:
    """Return an endpoint as Stripe lists it.

    Raises:
        ConflictError: it has no address or no event types that can be read.
    """
    url, events, version = body.get("url"), body.get("enabled_events"), body.get("api_version")
    if not isinstance(url, str) or not isinstance(events, list):
        raise ConflictError(f"Stripe's answer about {body.get('id')} cannot be read: look at it in the Dashboard.")
    chosen = {str(each) for each in events}
    return Endpoint(
        world.account,
        world.livemode,
        str(body.get("id")),
        url,
        str(body.get("status")),
        version if isinstance(version, str) else None,
        missing=() if _ALL in chosen else tuple(each for each in STRIPE_TYPES if each not in chosen),
        superfluous=tuple(sorted(chosen.difference(STRIPE_TYPES))),
    )


def _is_ours(address: str, url: str | None) -> bool:
    if url is not None:
        return address.rstrip("/") == url.rstrip("/")
    return urlsplit(address).path.rstrip("/") == PATH
