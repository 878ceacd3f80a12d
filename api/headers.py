"""Headers that every answer carries, so that no cache keeps it and no browser guesses what it is."""

from collections.abc import Iterable
from typing import Final

Header = tuple[bytes, bytes]

NO_STORE: Final[Header] = (b"cache-control", b"no-store")
NO_SNIFF: Final[Header] = (b"x-content-type-options", b"nosniff")
SHARED: Final = ("/docs", "/openapi.json", "/static-offline-docs/", "/static/")
"""These are the same for every client, so that a cache may keep them."""


def completed(path: str, given: Iterable[Header]) -> list[Header]:
    """Return the headers of the answer to *path*: those *given*, and those that each answer has."""
    found = list(given)
    names = {name.lower() for name, _ in found}
    wanted = [NO_SNIFF] if path.startswith(SHARED) else [NO_SNIFF, NO_STORE]
    return found + [each for each in wanted if each[0] not in names]
