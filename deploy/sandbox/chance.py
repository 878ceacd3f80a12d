"""Everything random in the sandbox: seeded ids in Stripe's layouts, and invented buyers.

Stripe does not document what an id contains, so no code of ours may read it. But how ids lie in an index decides what a
write costs, so the sandbox's lie as Stripe's do. In every published example with its moment, most ids begin with the
second in which the object was made, and short ones with the minute, both in base 62 since one moment of 2012:
``evt_1NG8Du2eZvKYlo2CUI79vXWy`` was created at 1686089970 (https://docs.stripe.com/api/events/object),
``cus_NffrFeUfNV2Hib`` at 1680893993 (https://docs.stripe.com/api/customers/object). Ten letters name the account. A
charge, its refunds and their events have the second of their PaymentIntent. A Checkout Session's id is random.
"""

import random
import string
from collections.abc import Callable
from typing import Any, Final

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


_DIGITS: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
_EPOCH: Final = 1_342_389_380
"""What ids count from, in Unix seconds; from the examples above."""
_ID_LENGTH: Final = 24
_OWN_LENGTH: Final = 8
"""Random characters at an id's end. A PaymentIntent and its charges share the characters before them."""


def _in_base_62(number: int, length: int) -> str:
    """Return the last *length* digits of *number*."""
    digits = ""
    for _ in range(length):
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits


class Chance:
    """A seeded source of ids and buyers. The same seed and the same calls give the same answers.

    *now* gives the Unix seconds that ids hold, and *owner* decides which ten letters name the account in them.
    """

    def __init__(self, seed: int | str, *, now: Callable[[], int], owner: str = "") -> None:
        self._random = random.Random(seed)
        self._now = now
        self._owner = random.Random(owner or seed).randbytes(10).translate(_LETTERS).decode("ascii")
        self._second: tuple[str, int | None] = ("", None)

    def token(self, length: int) -> str:
        """Return *length* letters and digits."""
        return self._random.randbytes(length).translate(_LETTERS).decode("ascii")

    def id(self, prefix: str) -> str:
        """Return an id as most objects have it: ``plink_1``, a second, an account and eight letters and digits."""
        return f"{prefix}_1{self._made()}{self.token(23)[-_OWN_LENGTH:]}"

    def intent_id(self) -> str:
        """Return a PaymentIntent's id."""
        return f"pi_3{self._made()}{self.token(23)[-_OWN_LENGTH:]}"

    def id_beside(self, prefix: str, other: str | None) -> str:
        """Return an id that begins as *other* does if *other* is of a PaymentIntent, and else a new one."""
        own = self.id(prefix)
        stem = (other or "").partition("_")[2]
        is_of_an_intent = stem.startswith("3") and len(stem) == _ID_LENGTH
        return f"{prefix}_{stem[:-_OWN_LENGTH]}{own[-_OWN_LENGTH:]}" if is_of_an_intent else own

    def twin_id(self, other: str) -> str:
        """Return the id of another object that was made together with the one with the id *other*."""
        return other[:-_OWN_LENGTH] + self.token(_OWN_LENGTH)

    def short_id(self, prefix: str) -> str:
        """Return an id as customers and products have it: ``cus_``, a minute and ten letters and digits."""
        return f"{prefix}_{_in_base_62((self._now() - _EPOCH) // 60, 4)}{self.token(14)[-10:]}"

    def session_id(self, *, livemode: bool) -> str:
        """Return a Checkout Session's id, which names its mode."""
        return f"cs_{'live' if livemode else 'test'}_a1{self.token(56)}"

    def event_id(self, object_id: str) -> str:
        """Return the id of an event about the object with *object_id*."""
        return self.id_beside("evt", object_id)

    def request_id(self) -> str:
        """Return a request's id: ``req_`` and 14 letters and digits."""
        return f"req_{self.token(14)}"

    def _made(self) -> str:
        """Return the second and the account that an id holds."""
        now = self._now()
        if self._second[1] != now:
            self._second = (_in_base_62(now - _EPOCH, 5) + self._owner, now)
        return self._second[0]

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
