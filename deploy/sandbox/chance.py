"""Everything random in the sandbox: seeded ids in Stripe's layouts, and invented buyers."""

import random
import string
from typing import Any

# A byte maps to a letter or digit, so that an id costs one call. The slight bias towards the first few is of
# no consequence here.
_ALPHABET = (string.ascii_letters + string.digits).encode()
_LETTERS = bytes(_ALPHABET[byte % len(_ALPHABET)] for byte in range(256))

# Not all ASCII, because buyers' names are not.
_GIVEN_NAMES = (
    "Ada",
    "Birk",
    "Chidi",
    "Dolores",
    "Esmé",
    "Farid",
    "Grażyna",
    "Håkon",
    "Inês",
    "Jürgen",
    "Zoë",
    "晴香",
)
_FAMILY_NAMES = (
    "Ardenholt",
    "Brambleway",
    "Corvane",
    "Dünnebier-Fjeld",
    "Eastmarrow",
    "O'Fennel",
    "Quillon",
    "Ważka",
)
_PLACES = (
    ("US", "CA", "Redwood Falls", "94999"),
    ("DE", None, "Neustadt an der Probe", "00001"),
    ("JP", "Tokyo", "見本市", "100-0000"),
    ("GB", None, "Sampleton", "ZZ1 1ZZ"),
    ("KW", None, "Kuwait City", "13999"),
)


class Chance:
    """A seeded source of ids and buyers. The same seed and the same calls give the same answers."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed)

    def token(self, length: int) -> str:
        """Return *length* letters and digits."""
        return self._random.randbytes(length).translate(_LETTERS).decode("ascii")

    def id(self, prefix: str) -> str:
        """Return an id as most objects have it: ``plink_1`` and 23 letters and digits."""
        return f"{prefix}_1{self.token(23)}"

    def short_id(self, prefix: str) -> str:
        """Return an id as customers, products and requests have it: ``cus_`` and 14 letters and digits."""
        return f"{prefix}_{self.token(14)}"

    def session_id(self, *, livemode: bool) -> str:
        """Return a Checkout Session's id, which names its mode."""
        return f"cs_{'live' if livemode else 'test'}_a1{self.token(56)}"

    def event_id(self) -> str:
        """Return an event's id."""
        return self.id("evt")

    def idempotency_key(self) -> str:
        """Return a key such as Stripe's libraries make: a version 4 UUID."""
        digits = self._random.randbytes(16).hex()
        return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"

    def flip(self, probability: float) -> bool:
        """Return true in *probability* (0 to 1) of the calls."""
        return self._random.random() < probability

    def email(self) -> str:
        """Return an address in a domain that is reserved for examples."""
        return f"buyer.{self.token(8).lower()}@example.{'com' if self.flip(0.7) else 'org'}"

    def person(self) -> tuple[str, dict[str, Any]]:
        """Return a buyer's name and postal address (Stripe's six keys)."""
        bits = self._random.getrandbits(32)
        country, state, city, postal_code = _PLACES[bits % len(_PLACES)]
        given = _GIVEN_NAMES[(bits >> 8) % len(_GIVEN_NAMES)]
        family = _FAMILY_NAMES[(bits >> 16) % len(_FAMILY_NAMES)]
        address = {
            "city": city,
            "country": country,
            "line1": f"{1 + (bits >> 24) % 200} Example Street",
            "line2": None,
            "postal_code": postal_code,
            "state": state,
        }
        return f"{given} {family}", address
