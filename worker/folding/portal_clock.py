"""Records the ends of portal sessions as observations, because Stripe sends no event when a session ends."""

from datetime import datetime, timedelta
from typing import Final

from schemas import inbox, observations
from schemas.database import Cursor
from schemas.own_events import PORTAL_SESSION_CLOCK_EXPIRED

PORTAL_SESSIONS_MAX: Final = 500
"""Portal sessions that one pass ends."""


def end_portal_sessions(cursor: Cursor, *, now: datetime, after: timedelta, limit: int = PORTAL_SESSIONS_MAX) -> int:
    """Record the end of up to *limit* portal sessions that began *after* ago, oldest first; return how many."""
    cursor.execute(
        "SELECT account, livemode, id, created FROM portal_sessions"
        " WHERE expired_at IS NULL AND created < %s ORDER BY created LIMIT %s",
        (now - after, limit),
    )
    ended = [
        observations.observe(
            PORTAL_SESSION_CLOCK_EXPIRED,
            {"object": "billing_portal.session", "id": session},
            account=account,
            livemode=livemode,
            # The time at which the session ended, not the time of this pass, so that two passes record one observation.
            created=int((created + after).timestamp()),
            now=now,
        )
        for account, livemode, session, created in cursor.fetchall()
    ]
    if ended:
        inbox.record(cursor, ended)
    return len(ended)
