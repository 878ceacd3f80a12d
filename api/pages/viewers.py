"""The person who looks at a page: a token, exchanged for a cookie that ends by itself.

Note [The cookie proves the token, and nothing more]
    A cookie holds the name of its token and the time at which it was made, signed with a key that is derived from the
    hash of that token in ``PAYFOLD_TOKENS``. So each web process reads the cookies of all others, and no process keeps
    a session. At each request the token is looked up by its name: one that was removed, or replaced under the same
    name, opens nothing any more, and scopes are those that are configured now.
"""

import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Final
from urllib.parse import SplitResult, urlsplit

import structlog
from fastapi import Depends, Request
from itsdangerous import BadData, URLSafeTimedSerializer
from starlette.exceptions import HTTPException
from starlette.responses import Response

from schemas.errors import Permanent
from schemas.settings import Scope, Token

COOKIE: Final = "payfold"
COOKIE_SECONDS_MAX: Final = 12 * 60 * 60
ATTEMPTS_MAX: Final = 10
"""Failed attempts to log in from one address, within ATTEMPTS_SECONDS."""
ATTEMPTS_SECONDS: Final = 60.0
ADDRESSES_MAX: Final = 1_000
"""Addresses whose attempts are remembered: the last that failed."""

_PURPOSE: Final = "payfold.pages"
_log = structlog.get_logger()


class LoginNeeded(Permanent):
    """The page is shown after logging in."""


@dataclass(frozen=True, slots=True)
class Viewer:
    """The person at a page, as the token that the cookie stands for."""

    token: Token

    @property
    def sees(self) -> bool:
        """Whether personal data is shown."""
        return "personal" in self.token.scopes

    @property
    def acts(self) -> bool:
        """Whether acts are offered."""
        return "admin" in self.token.scopes


def serializer_of(token: Token) -> URLSafeTimedSerializer:
    """Return what signs the cookies of *token*, and checks them."""
    key = hmac.digest(token.sha256.encode(), _PURPOSE.encode(), "sha256")
    return URLSafeTimedSerializer(key, salt=_PURPOSE, signer_kwargs={"digest_method": hashlib.sha256})


def cookie_of(token: Token) -> str:
    """Return the value of a cookie that stands for *token*."""
    return str(serializer_of(token).dumps(token.name))


def token_of(cookie: str, tokens: Iterable[Token]) -> Token | None:
    """Return the one of *tokens* that *cookie* stands for; None where it is none of them, or ended."""
    for token in tokens:
        try:
            name = serializer_of(token).loads(cookie, max_age=COOKIE_SECONDS_MAX)
        except BadData:
            continue
        if name == token.name:
            return token
    return None


def set_cookie(response: Response, request: Request, token: Token) -> None:
    """Log the browser in as the holder of *token*."""
    secure = not is_loopback(request.url.hostname)
    response.set_cookie(
        COOKIE, cookie_of(token), max_age=COOKIE_SECONDS_MAX, httponly=True, samesite="strict", secure=secure
    )


def clear_cookie(response: Response) -> None:
    """Log the browser out."""
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")


def is_loopback(host: str | None) -> bool:
    """Return whether *host* is this machine, where a browser sends cookies without TLS."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def require(scope: Scope) -> Callable[[Request], Viewer]:
    """Return a dependency that lets a person with *scope* see a page, or act by it.

    Raises:
        LoginNeeded: there is no cookie that stands for a token.
        HTTPException: the token lacks the scope, or the act was asked for by a page that is not ours.
    """

    def check(request: Request) -> Viewer:
        token = token_of(request.cookies.get(COOKIE, ""), request.app.state.settings.tokens)
        if token is None:
            raise LoginNeeded
        if request.method != "GET":
            require_own_origin(request)
        if scope not in token.scopes:
            raise HTTPException(403, f"This wants a token of the scope {scope}.")
        return Viewer(token)

    return check


Reader = Annotated[Viewer, Depends(require("read"))]


def require_own_origin(request: Request) -> None:
    """Refuse an act unless the browser reports that a page of ours asked for it."""
    # By the browser's own word where a proxy has changed the Host; no script can send this header.
    if request.headers.get("sec-fetch-site") == "same-origin":
        return
    origin = origin_of(request)
    if origin is None or origin.netloc != request.headers.get("host"):
        raise HTTPException(403, "Acts are taken from the pages of this address alone.")


def origin_of(request: Request) -> SplitResult | None:
    """Return the origin of the page that asks, by the browser's word; None where it names none."""
    try:
        found = urlsplit(request.headers.get("origin", ""))
    except ValueError:
        return None
    return found if found.netloc else None


def is_unsafe(request: Request) -> bool:
    """Return whether the page was opened without TLS, from another machine: a browser would drop the cookie."""
    origin = origin_of(request)
    return origin is not None and origin.scheme == "http" and not is_loopback(origin.hostname)


@dataclass(slots=True)
class Attempts:
    """Counts failed attempts to log in, by the address that they came from: see ``address_of``."""

    failed: "OrderedDict[str, deque[float]]" = field(default_factory=OrderedDict)

    def require_few(self, address: str) -> None:
        """Refuse an attempt from an *address* that failed ATTEMPTS_MAX times within ATTEMPTS_SECONDS."""
        # As a copy, since another thread may add to it.
        times = tuple(self.failed.get(address, ()))
        recent = [at for at in times if at > time.monotonic() - ATTEMPTS_SECONDS]
        if len(recent) >= ATTEMPTS_MAX:
            wait = {"Retry-After": str(int(ATTEMPTS_SECONDS))}
            raise HTTPException(429, "Too many attempts to log in: try again in a minute.", headers=wait)

    def add(self, address: str) -> None:
        """Count and log an attempt from *address* that failed."""
        times = self.failed.setdefault(address, deque(maxlen=ATTEMPTS_MAX))
        times.append(time.monotonic())
        self.failed.move_to_end(address)
        while len(self.failed) > ADDRESSES_MAX:
            self.failed.popitem(last=False)
        _log.warning("login.failed", attempts=len(times))


def address_of(request: Request) -> str:
    """Return where *request* came from: the last address that a proxy noted, so that one person does not lock out all.

    Without a proxy, a client may note any address, and so has as many attempts as it likes, at a token of 256 bits.
    """
    noted = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
    return f"{request.client.host if request.client else ''} {noted[:64]}"
