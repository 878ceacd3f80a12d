"""When an open session is going to end: by its own end at Stripe, or by our time to live before it.

Note [What a session is allowed]
    ``PAYFOLD_SESSION_TTL_MINUTES`` gives the minutes by mode, and those of payment links. A link's own metadata goes
    before the setting. The job that expires sessions and the list of those that are about to end share this rule.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from msgspec import Struct

from schemas import accounts
from schemas.database import Cursor, text_array
from schemas.observations import World
from schemas.settings import Settings

TTL_METADATA_KEY: Final = "payfold_session_ttl_minutes"
"""Key in a payment link's metadata; its value is the minutes for the sessions of this link, or off."""
OPEN_MAX: Final = 20_000
"""Open sessions of one account and mode among which the next to end are looked for: those that are open for longest."""

ALLOWED: Final = """
LEFT JOIN payment_links AS l ON (l.account, l.livemode, l.id) = (o.account, o.livemode, o.payment_link)
CROSS JOIN LATERAL (SELECT coalesce(l.metadata ->> %(key)s, o.metadata ->> %(key)s) AS minutes) AS link
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN o.payment_link IS NULL THEN (%(ttl)s::jsonb ->> coalesce(o.mode, 'payment'))::int
        WHEN link.minutes ~ '^[1-9][0-9]{0,3}$' THEN link.minutes::int
        WHEN link.minutes = 'off' THEN NULL
        ELSE (%(ttl)s::jsonb ->> 'link')::int
    END AS minutes
) AS allowed
"""
"""Joins ``allowed.minutes`` to rows ``o`` of orders, null where there is no limit; the values are from ``rule``."""


def rule(settings: Settings) -> dict[str, object]:
    """Return the values of ``ALLOWED``."""
    minutes = settings.session_ttl_minutes
    written = ", ".join(f'"{mode}": {"null" if allowed is None else allowed}' for mode, allowed in minutes.items())
    return {"ttl": f"{{{written}}}", "key": TTL_METADATA_KEY}


class EndingSession(Struct, frozen=True):
    """An open session, and when it ends. The times are null where they are not known, or there is no limit."""

    account: str
    livemode: bool
    id: str
    mode: str | None
    currency: str | None
    amount_total: int | None
    customer: str | None
    customer_email: str | None
    payment_link: str | None
    created: datetime | None
    expires_at: datetime | None
    allowed_until: datetime | None
    ends_at: datetime | None


_ENDING: Final = f"""
SELECT o.account, o.livemode, o.id, o.mode, o.currency, o.amount_total, o.customer, o.customer_email, o.payment_link,
    o.created, o.expires_at, until.allowed, least(o.expires_at, until.allowed) AS ends_at
FROM unnest(%(accounts)s::text[], %(modes)s::boolean[], %(served)s::boolean[]) AS world (account, livemode, is_served)
CROSS JOIN LATERAL (
    SELECT * FROM orders AS each
    WHERE (each.account, each.livemode, each.status) = (world.account, world.livemode, 'open')
    ORDER BY each.created LIMIT %(open_max)s
) AS o
{ALLOWED}
CROSS JOIN LATERAL (
    SELECT CASE WHEN world.is_served THEN o.created + make_interval(mins => allowed.minutes) END AS allowed
) AS until
ORDER BY ends_at NULLS LAST, o.account, o.livemode, o.id LIMIT %(limit)s
"""


def next_to_end(
    cursor: Cursor,
    settings: Settings,
    is_served: Callable[[World], bool],
    *,
    account: str | None,
    livemode: bool | None,
    limit: int,
    open_max: int = OPEN_MAX,
) -> list[EndingSession]:
    """Return up to *limit* open sessions, the next to end first, of the worlds that are asked for.

    Our own limit holds in the worlds that a key *is_served* by: without one, nothing is expired at Stripe.
    """
    modes = (True, False) if livemode is None else (livemode,)
    names = accounts.known(cursor) if account is None else [account]
    worlds = [World(name, mode) for name in names for mode in modes]
    given: dict[str, Any] = {
        "accounts": text_array([world.account for world in worlds]),
        "modes": [world.livemode for world in worlds],
        "served": [is_served(world) for world in worlds],
    }
    cursor.execute(_ENDING, {**given, **rule(settings), "limit": limit, "open_max": open_max})
    return [EndingSession(*row) for row in cursor.fetchall()]
