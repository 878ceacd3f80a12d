"""Bearer tokens, and the scopes that routes require."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated, Final

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from api.problems import Unauthorized
from schemas.settings import Scope, Token

_bearer: Final = HTTPBearer(auto_error=False, description="A token made by `payfold tokens new`.")

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def require(scope: Scope) -> Callable[[Request, HTTPAuthorizationCredentials | None], Awaitable[Token]]:
    """Return a dependency that lets a request pass if its token has *scope* or one that includes it."""

    # Asynchronous, since it waits for nothing: anything else FastAPI runs in a thread of its own.
    async def check(request: Request, credentials: Credentials) -> Token:
        token = _holder(request.app.state.settings.tokens, credentials)
        if scope not in token.scopes:
            raise HTTPException(403, f"This wants a token of the scope {scope}.")
        return token

    return check


async def _sees_personal_data(request: Request, credentials: Credentials) -> bool:
    return "personal" in _holder(request.app.state.settings.tokens, credentials).scopes


SeesPersonalData = Annotated[bool, Depends(_sees_personal_data)]
"""Whether the token of the request has the scope ``personal``, which no other scope includes."""


def _holder(tokens: tuple[Token, ...], credentials: HTTPAuthorizationCredentials | None) -> Token:
    if not tokens:
        raise Unauthorized("No token is configured here: make one with `payfold tokens new` and set PAYFOLD_TOKENS.")
    if credentials is None:
        raise Unauthorized("This wants a bearer token.")
    found = of_text(tokens, credentials.credentials)
    if found is None:
        raise Unauthorized("This bearer token is not known here.")
    return found


def of_text(tokens: tuple[Token, ...], text: str) -> Token | None:
    """Return the one of *tokens* that *text* is; None where it is none of them."""
    given = hashlib.sha256(text.encode()).hexdigest()
    return next((token for token in tokens if hmac.compare_digest(token.sha256, given)), None)
