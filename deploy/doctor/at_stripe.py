"""Checks of what Stripe answered."""

from collections.abc import Iterator, Sequence
from typing import Final

from deploy import endpoints
from deploy.doctor import engines
from deploy.doctor.findings import Finding, Unread, fault, ok, public, skipped, warning
from deploy.doctor.stripe import EVENTS, FORBIDDEN, READ, AtStripe
from deploy.endpoints import Endpoint, Fault
from schemas.observations import World
from worker.folds import STRIPE_TYPES

KEY: Final = "key"
CLOCK: Final = "clock of Stripe"
ENDPOINT: Final = "endpoint"


def named(world: World) -> str:
    """Return the account and mode as a person reads them."""
    return f"{world.account or 'default account'}, {'live' if world.livemode else 'test'}"


def key(found: AtStripe) -> Iterator[Finding]:
    """Judge whether the key is let in, and what it may not read."""
    check = f"{KEY} ({named(found.world)})"
    if isinstance(found.let_in, Unread):
        yield fault(
            check,
            f"the key cannot be tried: {found.let_in.reason}",
            "Check that this machine can reach STRIPE_API_BASE, and what https://status.stripe.com reports.",
        )
    elif not found.let_in:
        yield fault(
            check,
            "Stripe refuses the key",
            "Set STRIPE_API_KEY to a key that is not revoked or expired, and that has access to this account.",
        )
    elif found.forbidden:
        yield fault(
            check,
            f"the key may not read {', '.join(found.forbidden)}",
            "Give the restricted key read access to these in Stripe's Dashboard, or what they hold stays unknown.",
        )
    else:
        of = len(READ) if found.acts_for is None else len((EVENTS,))
        yield ok(check, f"may read {found.read} of the {of} lists that are read")


def clock(found: AtStripe) -> Finding:
    """Judge this machine's clock next to Stripe's."""
    if isinstance(found.ahead_seconds, Unread):
        return skipped(CLOCK, found.ahead_seconds.reason)
    return engines.clock(found.ahead_seconds, CLOCK, "Stripe's")


def endpoint(found: AtStripe, *, api_base: str, url: str | None, has_deliveries: bool) -> Iterator[Finding]:
    """Judge the endpoints of one key: *url* is the address that was looked for, None for any.

    Where deliveries come without one, as by Stripe's CLI or an organization's destination, that is no fault.
    """
    check = f"{ENDPOINT} ({named(found.world)})"
    if isinstance(found.endpoints, Unread):
        allow = "Let it read them, or compare the event types in the Dashboard with those of:\n  payfold init"
        yield skipped(check, found.endpoints.reason, allow if found.endpoints == FORBIDDEN else "")
        return
    if not found.endpoints:
        yield _none(check, found.world, url, has_deliveries=has_deliveries)
    serving = [each for each in found.endpoints if each.serves]
    for each in found.endpoints:
        yield from _faults(check, each, api_base, is_spare=bool(serving) and each not in serving)
    if len(serving) > 1:
        yield warning(check, f"{len(serving)} endpoints send here, so each event comes as often", "Keep one of them.")
    for each in serving[:1]:
        yield ok(check, f"{each.id} sends all {len(STRIPE_TYPES)} event types to {public(each.url)}")


def _none(check: str, world: World, url: str | None, *, has_deliveries: bool) -> Finding:
    options = "".join(
        [f" --account {world.account}" * bool(world.account), " --live" if world.livemode else " --test", " --yes"]
    )
    create = f"payfold endpoints create --url {public(url) if url else f'https://YOUR-HOST{endpoints.PATH}'}{options}"
    found = f"Stripe has no endpoint for {public(url) if url else endpoints.PATH}"
    if has_deliveries:
        return warning(
            check,
            f"{found}, and deliveries come nevertheless",
            "Nothing is to be done where Stripe's CLI or an organization's destination sends them. Else make one:\n"
            f"  {create}",
        )
    return fault(check, found, f"Make it, and set the secret that is printed:\n  {create}")


def _faults(check: str, each: Endpoint, api_base: str, *, is_spare: bool) -> Iterator[Finding]:
    """Yield the faults of one endpoint, as warnings where another one serves."""
    level = warning if is_spare else fault
    for found in endpoints.faults(each):
        if found.is_harmful:
            yield level(check, found.found, _remedy(each, found, api_base))
        elif found.remedy:
            yield warning(check, found.found, found.remedy)


def _remedy(each: Endpoint, found: Fault, api_base: str) -> str:
    remedy = f"{found.remedy[:1].upper()}{found.remedy[1:]}"
    if found.types:
        return f"{remedy} Or, with the key in $KEY:\n  {_adding(each, api_base)}"
    return remedy


def _adding(each: Endpoint, api_base: str) -> str:
    """Return the call that gives an endpoint our event types, next to its own."""
    chosen: Sequence[str] = (*STRIPE_TYPES, *each.superfluous)
    types = " ".join(f"-d 'enabled_events[]={kind}'" for kind in chosen)
    return f'curl {api_base}/v1/webhook_endpoints/{each.id} -u "$KEY:" {types}'
