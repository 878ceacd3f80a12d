"""Signatures as Stripe makes them: HMAC-SHA256 over the time, a dot and the raw body.

The key is the whole ``whsec_…`` string as it stands, never decoded. See https://docs.stripe.com/webhooks/signature.
"""

import hashlib
import hmac
from collections.abc import Iterable


def signature(body: bytes, secret: str, timestamp: int) -> str:
    """Return the MAC of *body* sent at *timestamp* (Unix seconds), in lowercase hex."""
    signed = b"%d.%b" % (timestamp, body)
    return hmac.digest(secret.encode(), signed, hashlib.sha256).hex()


def sign(body: bytes, secret: str, timestamp: int) -> str:
    """Return the value of the ``Stripe-Signature`` header for *body* sent at *timestamp* (Unix seconds)."""
    return f"t={timestamp},v1={signature(body, secret, timestamp)}"


def sign_rolling(body: bytes, secrets: Iterable[str], timestamp: int, *, decoy: bool = False) -> str:
    """Return the header's value while an endpoint's secret is being rolled: a ``v1`` for each live secret.

    With *decoy* there is also a ``v0``, as Stripe adds to test events. It proves nothing, and a receiver ignores
    it.
    """
    parts = [f"t={timestamp}"]
    parts += [f"v1={signature(body, secret, timestamp)}" for secret in secrets]
    if decoy:
        parts.append(f"v0={signature(body, 'not a secret', timestamp)}")
    return ",".join(parts)
