"""Only a delivery that Stripe signed recently with a configured secret is accepted."""

import hashlib
import hmac
from collections.abc import Sequence

import pytest
import stripe
from hypothesis import given
from hypothesis import strategies as st

from deploy.sandbox.signing import sign, sign_rolling, signature
from schemas import signature as judge
from schemas.errors import Refused, SignatureExpired, SignatureMalformed, SignatureMismatch, SignatureMissing
from schemas.settings import SigningSecret
from schemas.signature import HEADER_BYTES_MAX, SIGNATURES_MAX, TOLERANCE_SECONDS

NOW = 1_700_000_000
SECRET = "whsec_payfold_vector"
SECRETS = (SigningSecret("", SECRET.encode()),)
FIRST = b'{"id":"evt_vec_1","object":"event"}'
LAST = '{"id":"evt_vec_2","name":"Zoë ☕ \\u20ac"}\n'.encode()
VECTORS = [
    (SECRET, NOW, FIRST, "09eef22d52bdc15ce83c7013e8b25c6560c6834830fc0012cd5b648defae497f"),
    ("whsec_payfold_old", NOW, FIRST, "844fd96bc38fabfac798a41b1406cbe1dc52aadb611a100327c9cdb639572c62"),
    ("whsec_a", 1, b"x", "06b7434ab5e3d1ce4be5c1b43e8d91c1c0a9fbeb0a1bfac56425d7b13fce8740"),
    (SECRET, NOW, LAST, "3a1701b2d54b57ca735a09becef8229649d3478897e474fa29a8195ea9db76ec"),
]

secret_texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1).map("whsec_{}".format)
bodies = st.text().map(str.encode)


def verify(header: bytes | None, body: bytes, secrets: Sequence[SigningSecret], *, now: float) -> SigningSecret:
    """Verify a delivery as the webhook does: its header, and then its body."""
    return judge.verify(judge.read(header, now=now), body, secrets)


def header(body: bytes = FIRST) -> bytes:
    """Return the header of *body* as Stripe sends it now."""
    return sign(body, SECRET, NOW).encode()


@pytest.mark.parametrize(("secret", "timestamp", "body", "expected"), VECTORS)
def test_vectors(secret: str, timestamp: int, body: bytes, expected: str) -> None:
    """Signatures that openssl computes are accepted."""
    signer = SigningSecret("", secret.encode())

    assert verify(f"t={timestamp},v1={expected}".encode(), body, [signer], now=timestamp) is signer


@pytest.mark.parametrize(
    "body",
    [LAST.removesuffix(b"\n"), LAST + b"\n", LAST.replace(b":", b": "), LAST.replace(b"\\u20ac", "€".encode())],
    ids=["newline lost", "newline added", "spaced", "unescaped"],
)
def test_other_bytes(body: bytes) -> None:
    """A signature does not hold for the same JSON in other bytes."""
    with pytest.raises(SignatureMismatch):
        verify(header(LAST), body, SECRETS, now=NOW)


@pytest.mark.parametrize("offset", [TOLERANCE_SECONDS, -TOLERANCE_SECONDS, 0])
def test_within_tolerance(offset: int) -> None:
    """A signature may be five minutes old, or five minutes ahead."""
    assert verify(header(), FIRST, SECRETS, now=NOW + offset) is SECRETS[0]


@pytest.mark.parametrize("offset", [TOLERANCE_SECONDS + 1, -TOLERANCE_SECONDS - 1, 0.5 + TOLERANCE_SECONDS])
def test_beyond_tolerance(offset: float) -> None:
    """A signature beyond five minutes, either way, is refused with the reason."""
    with pytest.raises(SignatureExpired, match="300 seconds"):
        verify(header(), FIRST, SECRETS, now=NOW + offset)


def test_time_is_judged_first() -> None:
    """A header that is too old is refused before the body is read and the signature compared."""
    with pytest.raises(SignatureExpired):
        judge.read(sign(FIRST, "whsec_other", 1).encode(), now=NOW)


@pytest.mark.parametrize("given", [None, b""])
def test_missing(given: bytes | None) -> None:
    """Without a header, or with an empty one, the signature is missing."""
    with pytest.raises(SignatureMissing):
        verify(given, FIRST, SECRETS, now=NOW)


V1 = signature(FIRST, SECRET, NOW)
MALFORMED = {
    "no time": f"v1={V1}",
    "no signature": f"t={NOW}",
    "test signature only": f"t={NOW},v0={V1}",
    "two times": f"t={NOW},t={NOW},v1={V1}",
    "two different times": f"t={NOW},t=1,v1={V1}",
    "signed time": f"t=+{NOW},v1={V1}",
    "time is a text": f"t=now,v1={V1}",
    "time without end": f"t={'9' * 5000},v1={V1}"[:HEADER_BYTES_MAX],
    "time of other digits": f"t={NOW},v1={V1}".translate({ord("1"): "\u0661"}),
    "space after the comma": f"t={NOW}, v1={V1}",
    "not ASCII": f"t={NOW},v1={V1},v2=é",
    "upper case names": f"T={NOW},V1={V1}",
    "64 KiB": f"t={NOW}," + ",".join([f"v1={V1}"] * 969),
    "more signatures than secrets": f"t={NOW}," + ",".join([f"v1={V1}"] * (SIGNATURES_MAX + 1)),
    "punctuation": ",=,=,",
}


@pytest.mark.parametrize("given", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(given: str) -> None:
    """A malformed header is refused as malformed, even if a signature in it is right."""
    with pytest.raises(SignatureMalformed):
        verify(given.encode(), FIRST, SECRETS, now=NOW)


@pytest.mark.parametrize("v1", [V1.upper(), V1[:-1], V1 + "0", "", V1[::-1], f" {V1}"])
def test_other_signature(v1: str) -> None:
    """A signature with one wrong character is refused."""
    with pytest.raises(SignatureMismatch):
        verify(f"t={NOW},v1={v1}".encode(), FIRST, SECRETS, now=NOW)


def test_second_signature() -> None:
    """One right signature is enough, at any place among the wrong ones and the decoy."""
    rolling = sign_rolling(FIRST, ["whsec_old", SECRET], NOW, decoy=True)

    assert verify(rolling.encode(), FIRST, SECRETS, now=NOW) is SECRETS[0]


def test_rotation() -> None:
    """With several secrets configured, the result is the one that signed, with its account."""
    secrets = [SigningSecret("acct_1", b"whsec_one"), SigningSecret("acct_2", b"whsec_two")]

    for secret in secrets:
        given = sign(FIRST, secret.secret.decode(), NOW).encode()
        assert verify(given, FIRST, secrets, now=NOW) is secret


def test_no_secret() -> None:
    """Without a secret no delivery is accepted, not even one signed with an empty key."""
    given = f"t={NOW},v1={hmac.digest(b'', b'%d.%b' % (NOW, FIRST), hashlib.sha256).hex()}"

    with pytest.raises(SignatureMismatch):
        verify(given.encode(), FIRST, (), now=NOW)


@given(body=bodies, secret=secret_texts, timestamp=st.integers(0, 10**10))
def test_stripe_signs(body: bytes, secret: str, timestamp: int) -> None:
    """A delivery signed by Stripe's library is accepted."""
    given = stripe.WebhookSignature.generate_signature_header(body.decode(), secret, timestamp)
    signer = SigningSecret("", secret.encode())

    assert verify(given.encode(), body, [signer], now=timestamp) is signer


@given(
    body=bodies,
    other=bodies,
    secret=secret_texts,
    signers=st.lists(secret_texts, max_size=3),
    decoy=st.booleans(),
    cut=st.integers(0, 60),
)
def test_stripe_agrees(body: bytes, other: bytes, secret: str, signers: list[str], decoy: bool, cut: int) -> None:  # noqa: FBT001 - a drawn value
    """For any header, body and secret we accept exactly what Stripe's library accepts."""
    for sent in (sign_rolling(body, signers, NOW, decoy=decoy), sign_rolling(body, [*signers, secret], NOW)[cut:]):
        for received in (body, other):
            assert is_accepted(sent, received, secret) == is_accepted_by_stripe(sent, received, secret)


def is_accepted(sent: str, body: bytes, secret: str) -> bool:
    """Return whether Payfold accepts a delivery."""
    try:
        verify(sent.encode(), body, [SigningSecret("", secret.encode())], now=NOW)
    except Refused:
        return False
    return True


def is_accepted_by_stripe(sent: str, body: bytes, secret: str) -> bool:
    """Return whether Stripe's library accepts a delivery."""
    try:
        stripe.WebhookSignature.verify_header(body.decode(), sent, secret)
    except stripe.SignatureVerificationError:
        return False
    return True


@given(st.binary(max_size=300))
def test_any_header(given: bytes) -> None:
    """A header of any bytes is refused without another error."""
    with pytest.raises(Refused):
        verify(given, FIRST, SECRETS, now=NOW)


@given(st.text("tv10=,a", max_size=40))
def test_any_header_of_its_alphabet(given: str) -> None:
    """A header of the right characters without a signature is refused."""
    with pytest.raises(Refused):
        verify(given.encode(), FIRST, SECRETS, now=NOW)
