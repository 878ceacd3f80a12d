"""Verifies that a delivery comes from Stripe.

Source: https://docs.stripe.com/webhooks#verify-manually. The signed bytes are the timestamp, a full stop and
the raw body; the key is the whole text of the endpoint's secret.
"""

import hmac
import re
from collections.abc import Sequence
from typing import Final

from schemas.errors import SignatureExpired, SignatureMalformed, SignatureMismatch, SignatureMissing
from schemas.settings import SigningSecret

TOLERANCE_SECONDS: Final = 300
"""How far a signature's time may be from ours, both ways."""
HEADER_BYTES_MAX: Final = 4096
"""While a secret is rolled Stripe signs with each: a header of two signatures has 150 bytes."""
SIGNATURES_MAX: Final = 16

_TIMESTAMP: Final = re.compile(rb"[0-9]{1,12}")


def verify(header: bytes | None, body: bytes, secrets: Sequence[SigningSecret], *, now: float) -> SigningSecret:
    """Return the secret that signed *body*, given the Stripe-Signature *header* and the time in Unix seconds.

    Raises:
        SignatureMissing, SignatureMalformed, SignatureMismatch, SignatureExpired: each says what is wrong.
    """
    if not header:
        raise SignatureMissing
    timestamp, signatures = _parse(header)
    signer = _signer(timestamp + b"." + body, signatures, secrets)
    # Judged after the signature, so that only Stripe can learn anything of our clock.
    if abs(now - int(timestamp)) > TOLERANCE_SECONDS:
        raise SignatureExpired(
            f"The signature's timestamp is more than {TOLERANCE_SECONDS} seconds from this server's clock."
        )
    return signer


def _parse(header: bytes) -> tuple[bytes, list[bytes]]:
    if len(header) > HEADER_BYTES_MAX:
        raise SignatureMalformed(f"The Stripe-Signature header is longer than {HEADER_BYTES_MAX} bytes.")
    parts = [part.partition(b"=") for part in header.split(b",")]
    timestamps = [value for key, _, value in parts if key == b"t"]
    signatures = [value for key, _, value in parts if key == b"v1"]
    if len(timestamps) != 1 or not _TIMESTAMP.fullmatch(timestamps[0]) or not header.isascii():
        raise SignatureMalformed
    if not 0 < len(signatures) <= SIGNATURES_MAX:
        raise SignatureMalformed(f"The Stripe-Signature header wants 1 to {SIGNATURES_MAX} v1 signatures.")
    return timestamps[0], signatures


def _signer(signed: bytes, signatures: Sequence[bytes], secrets: Sequence[SigningSecret]) -> SigningSecret:
    for secret in secrets:
        expected = hmac.digest(secret.secret, signed, "sha256").hex().encode()
        if any(hmac.compare_digest(expected, signature) for signature in signatures):
            return secret
    raise SignatureMismatch
