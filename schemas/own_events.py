"""The types of our own events, the observations, which Payfold records next to those of Stripe."""

from typing import Final

PREFIX: Final = "payfold."


def observed(object_type: str) -> str:
    """Return the type of the observation that an object of the type *object_type* was as Stripe answered."""
    return f"{PREFIX}{object_type}.observed"


def is_own(event_type: str) -> bool:
    """Return whether events of *event_type* are observations."""
    return event_type.startswith(PREFIX)


SESSION_OBSERVED: Final = observed("checkout.session")
SESSION_REGISTERED: Final = f"{PREFIX}checkout.session.registered"
"""A shop registered the Checkout Session that it had just created."""
SESSION_MISSING: Final = f"{PREFIX}checkout.session.missing"
"""Stripe knows no such Checkout Session."""
SESSION_CLOCK_EXPIRED: Final = f"{PREFIX}checkout.session.clock_expired"
"""A Checkout Session expired by our clock."""
PORTAL_SESSION_OBSERVED: Final = observed("billing_portal.session")
PORTAL_SESSION_CLOCK_EXPIRED: Final = f"{PREFIX}billing_portal.session.clock_expired"
"""A portal session expired by our clock."""
EVENT_IGNORED: Final = f"{PREFIX}event.ignored"
"""An operator's instruction to ignore another event. It has no row of its own."""
BY_COMMAND: Final = "command"
"""Stands in such an instruction for the person at a command, whose name is not asked for."""
