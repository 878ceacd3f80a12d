"""Stripe's own library accepts our signatures."""

import pytest
import stripe

from deploy.sandbox.signing import sign, sign_rolling, signature

VECTORS = [
    (
        "whsec_payfold_vector",
        1_700_000_000,
        b'{"id":"evt_vec_1","object":"event"}',
        "09eef22d52bdc15ce83c7013e8b25c6560c6834830fc0012cd5b648defae497f",
    ),
    (
        "whsec_payfold_old",
        1_700_000_000,
        b'{"id":"evt_vec_1","object":"event"}',
        "844fd96bc38fabfac798a41b1406cbe1dc52aadb611a100327c9cdb639572c62",
    ),
    ("whsec_a", 1, b"x", "06b7434ab5e3d1ce4be5c1b43e8d91c1c0a9fbeb0a1bfac56425d7b13fce8740"),
    (
        "whsec_payfold_vector",
        1_700_000_000,
        '{"id":"evt_vec_2","name":"Zoë ☕ \\u20ac"}\n'.encode(),
        "3a1701b2d54b57ca735a09becef8229649d3478897e474fa29a8195ea9db76ec",
    ),
]


@pytest.mark.parametrize(("secret", "timestamp", "body", "expected"), VECTORS)
def test_vectors(secret: str, timestamp: int, body: bytes, expected: str) -> None:
    """The signature of fixed bytes equals the one that openssl computes."""
    assert signature(body, secret, timestamp) == expected
    assert sign(body, secret, timestamp) == f"t={timestamp},v1={expected}"


@pytest.mark.parametrize(("secret", "timestamp", "body", "expected"), VECTORS)
def test_stripe_accepts(secret: str, timestamp: int, body: bytes, expected: str) -> None:
    """Stripe's library accepts the header, and refuses it for other bytes or another secret."""
    verify = stripe.WebhookSignature.verify_header
    header = sign(body, secret, timestamp)

    assert verify(body.decode(), header, secret)
    with pytest.raises(stripe.SignatureVerificationError):
        verify(body.decode() + " ", header, secret)
    with pytest.raises(stripe.SignatureVerificationError):
        verify(body.decode(), header, "whsec_other")


def test_rolling() -> None:
    """While a secret is rolled, the old and the new one both verify, and the decoy verifies with neither."""
    verify = stripe.WebhookSignature.verify_header
    header = sign_rolling(b"{}", ["whsec_old", "whsec_new"], 1_700_000_000, decoy=True)

    assert header.count("v1=") == 2
    assert header.count("v0=") == 1
    assert verify("{}", header, "whsec_old")
    assert verify("{}", header, "whsec_new")
    with pytest.raises(stripe.SignatureVerificationError):
        verify("{}", sign_rolling(b"{}", [], 1_700_000_000, decoy=True), "whsec_old")
