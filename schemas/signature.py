"""Verifies that a delivery comes from Stripe.

Source: https://docs.stripe.com/webhooks#verify-manually. The signed bytes are the timestamp, a full stop and
the raw body; the key is the whole text of the endpoint's secret.
"""

import hmac
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

from schemas.errors import SignatureExpired, SignatureMalformed, SignatureMismatch, SignatureMissing
from schemas.settings import SigningSecret

TOLERANCE_SECONDS: Final = 300
"""How far a signature's time may be from ours, both ways."""
HEADER_BYTES_MAX: Final = 4096
"""While a secret is rolled Stripe signs with each: a header of two signatures has 150 bytes."""
SIGNATURES_MAX: Final = 16

_TIMESTAMP: Final = re.compile(rb"[0-9]{1,12}")


class Claim(NamedTuple):
    """The parts of a Stripe-Signature header, before its body is known."""

    timestamp: bytes
    signatures: list[bytes]


def read(header: bytes | None, *, now: float) -> Claim:
    """Return the claim of the Stripe-Signature *header*, given the time in Unix seconds.

    It is judged before the body is read, so that no body is read for a header that cannot be accepted.

    Raises:
        SignatureMissing, SignatureMalformed, SignatureExpired: the fault.
    """
    if not header:
        raise SignatureMissing
    claim = _parse(header)
    if abs(now - int(claim.timestamp)) > TOLERANCE_SECONDS:
        raise SignatureExpired(
            f"The signature's timestamp is more than {TOLERANCE_SECONDS} seconds from this server's clock."
        )
    return claim


def verify(claim: Claim, body: bytes, secrets: Sequence[SigningSecret]) -> SigningSecret:
    """Return the secret that signed *body*.

    Raises:
        SignatureMismatch: none of them did.
    """
    signed = claim.timestamp + b"." + body
    for secret in secrets:
        expected = hmac.digest(secret.secret, signed, "sha256").hex().encode()
        for signature in claim.signatures:
            if hmac.compare_digest(expected, signature):
                return secret
    raise SignatureMismatch


def is_by_any(header: str, body: bytes, secrets: Sequence[SigningSecret]) -> bool:
    """Return whether one of *secrets* signed *body*, however long ago, by the *header* that came with it."""
    return signer_of(header, body, secrets) is not None


def signer_of(header: str, body: bytes, secrets: Sequence[SigningSecret]) -> SigningSecret | None:
    """Return the one of *secrets* that signed *body*, however long ago, by the *header* that came with it, or None."""
    try:
        return verify(_parse(header.encode()), body, secrets)
    except (SignatureMalformed, SignatureMismatch):
        return None


def signed_at(header: str) -> datetime | None:
    """Return when the signature of the *header* was made, None where it has no time that can be read."""
    try:
        return datetime.fromtimestamp(int(_parse(header.encode()).timestamp), UTC)
    except (SignatureMalformed, ValueError, OverflowError, OSError):
        return None


def _parse(header: bytes) -> Claim:
    if len(header) > HEADER_BYTES_MAX:
        raise SignatureMalformed(f"The Stripe-Signature header is longer than {HEADER_BYTES_MAX} bytes.")
    parts = [part.partition(b"=") for part in header.split(b",")]
    timestamps = [value for key, _, value in parts if key == b"t"]
    signatures = [value for key, _, value in parts if key == b"v1"]
    if len(timestamps) != 1 or not _TIMESTAMP.fullmatch(timestamps[0]) or not header.isascii():
        raise SignatureMalformed
    if not 0 < len(signatures) <= SIGNATURES_MAX:
        raise SignatureMalformed(f"The Stripe-Signature header wants 1 to {SIGNATURES_MAX} v1 signatures.")
    return Claim(timestamps[0], signatures)
