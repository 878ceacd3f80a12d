"""The whole examination: everything is read at the same time, and then each check judges what it is about."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from deploy.doctor import at_stripe, configured, delivery, engines, postgres, redis, running, stripe
from deploy.doctor.findings import NOT_IN_TIME, Finding, Unread, attempt, fault, judged, skipped
from deploy.doctor.postgres import Arrivals, Postgres, Server
from deploy.doctor.reading import Reading
from deploy.doctor.redis import Redis
from deploy.doctor.stripe import AtStripe
from schemas.settings import Settings

DELIVERY_SECONDS_MAX: Final = 60.0
"""For the request, which has ten seconds for each of its steps, and for the event's outcome."""


def of_names(unknown: Sequence[str], settings: Settings) -> Iterator[Finding]:
    """Yield the findings about the settings as such; a fault of these is one of configuration."""
    judge = partial(configured.names, unknown)
    yield from judged(configured.SETTINGS, settings, judge, well=configured.in_force)


def of_system(settings: Settings, *, url: str | None) -> Iterator[Finding]:
    """Yield the findings of every other check but the test delivery; *url* is the webhook's address, if it is known."""
    of_postgres = Reading(Postgres(), partial(postgres.fill, settings))
    of_redis = Reading(Redis(), partial(redis.fill, settings))
    of_keys = [Reading(part, partial(stripe.fill, settings, url)) for part in stripe.parts(settings)]
    found = of_postgres.result()
    yield from _secrets(settings, found)
    yield from _postgres(settings, found)
    yield from _redis(of_redis.result())
    yield from _stripe(settings, [each.result() for each in of_keys], found, url)
    yield from _running(settings, found)


def of_delivery(settings: Settings, url: str, *, livemode: bool | None = None) -> Finding:
    """Return what became of a test delivery to *url*, in the mode *livemode*; None for that of what is there."""
    sent = Reading(
        _Delivered(), partial(_deliver, settings, url, livemode=livemode), seconds_max=DELIVERY_SECONDS_MAX
    ).result()
    if isinstance(sent.finding, Unread):
        return fault(delivery.DELIVERY, f"it was not followed to its end: {sent.finding.reason}", "Try again.")
    return sent.finding


@dataclass(slots=True)
class _Delivered:
    finding: Finding | Unread = NOT_IN_TIME


def _deliver(settings: Settings, url: str, found: _Delivered, *, livemode: bool | None) -> None:
    found.finding = attempt(lambda: delivery.check(settings, url, livemode=livemode))


# ---- The checks of each part ----


def _secrets(settings: Settings, found: Postgres) -> Iterator[Finding]:
    yield from judged(configured.SECRETS, settings, configured.secrets, well=configured.secrets_in_words)
    yield from judged(configured.KEYS, settings, configured.keys, well=configured.keys_in_words)
    yield from judged(configured.TOKENS, settings, configured.tokens, well=configured.tokens_in_words)
    renamed = {} if isinstance(found.renamed, Unread) else found.renamed
    yield from judged(
        configured.LABELS,
        renamed,
        partial(configured.labels, settings),
        well=lambda _: "none splits an account by itself",
    )
    yield from judged(
        running.ACCOUNTS, found.status, running.accounts, well=lambda _: "the inbox shows no account that is split"
    )


def _postgres(settings: Settings, found: Postgres) -> Iterator[Finding]:
    server = found.server
    yield from judged(
        engines.DATABASE,
        server,
        engines.database,
        well=engines.database_in_words,
        unread=None if server == postgres.UNSET else engines.database_away,
    )
    yield from judged(
        engines.MIGRATIONS, found.migrations, engines.migrations, well=lambda _: "the schema is this release's"
    )
    yield from judged(engines.GRANTS, found.grants, engines.grants, well=engines.grants_in_words)
    is_pooled = isinstance(server, Server) and server.is_pooled
    yield from judged(
        engines.CONNECTIONS, found.sessions, partial(engines.connections, settings=settings, is_pooled=is_pooled)
    )
    clock = partial(engines.clock, check=engines.CLOCK, owner="PostgreSQL's")
    yield from judged(engines.CLOCK, found.ahead_seconds, clock)


def _redis(found: Redis) -> Iterator[Finding]:
    unread = None if found.engine == redis.UNSET else engines.redis_away
    yield from judged(engines.REDIS, found.engine, engines.redis, unread=unread)
    yield from judged(engines.MEMORY, found.memory, engines.memory, well=engines.memory_in_words)


def _stripe(settings: Settings, parts: Sequence[AtStripe], found: Postgres, url: str | None) -> Iterator[Finding]:
    has_deliveries = isinstance(found.arrivals, Arrivals) and running.has_deliveries(found.arrivals)
    judge = partial(at_stripe.endpoint, api_base=settings.stripe_api_base, url=url, has_deliveries=has_deliveries)
    for part in parts:
        yield from judged(f"{at_stripe.KEY} ({at_stripe.named(part.world)})", part, at_stripe.key)
    # One of the keys is enough to see Stripe's clock.
    known = [each for each in parts if not isinstance(each.ahead_seconds, Unread)] or parts
    for part in known[:1]:
        yield from judged(at_stripe.CLOCK, part, at_stripe.clock)
    for part in parts:
        if part.acts_for is None:
            yield from judged(f"{at_stripe.ENDPOINT} ({at_stripe.named(part.world)})", part, judge)


def _running(settings: Settings, found: Postgres) -> Iterator[Finding]:
    status = found.status
    processes = partial(running.processes, settings=settings)
    yield from judged(running.JOBS, status, running.jobs, well=running.jobs_in_words)
    yield from judged(running.PROCESSES, status, processes, well=running.processes_in_words)
    if isinstance(status, Unread):
        yield skipped(running.WEBHOOKS, status.reason)
        return
    webhooks = partial(running.webhooks, status=status)
    yield from judged(running.WEBHOOKS, found.arrivals, webhooks, well=running.webhooks_in_words)
