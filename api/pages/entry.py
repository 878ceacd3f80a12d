"""The doors of the pages: log in, log out, and what browsers load with each page."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from api import bodies, tokens
from api.pages.rendering import PageRoute, back, page
from api.pages.viewers import Attempts, address_of, clear_cookie, is_unsafe, require_own_origin, set_cookie

FORM_BYTES_MAX: Final = 16 * 1024
FIELDS_MAX: Final = 100
STATIC: Final = StaticFiles(directory=Path(__file__).parent / "static")

router: Final = APIRouter(route_class=PageRoute, include_in_schema=False)

Next = Annotated[str, Query(max_length=2048)]


async def form_body(request: Request) -> AsyncIterator[bytes]:
    """Read the body of a form."""
    app = request.app.state
    async with bodies.taken(
        request.scope, request.receive, app.room, bytes_max=FORM_BYTES_MAX, seconds_max=app.body_seconds_max
    ) as body:
        yield body


def form_of(body: Annotated[bytes, Depends(form_body)]) -> dict[str, str]:
    """Return the fields of a form by their names; of a field that is there twice the last."""
    try:
        found = parse_qs(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=FIELDS_MAX)
    except ValueError:
        raise HTTPException(422, f"The form has more than {FIELDS_MAX} fields.") from None
    return {name: values[-1] for name, values in found.items()}


Form = Annotated[dict[str, str], Depends(form_of)]


def attempts_of(request: Request) -> Attempts:
    """Return the failed attempts that this process remembers."""
    found: Attempts = request.app.state.attempts
    return found


@router.get("/login")
def show_login(request: Request, next: Next = "/") -> Response:  # noqa: A002 - the parameter's name in the address
    """Ask for a token."""
    return _login_page(request, _local(next), 200, None)


def _login_page(request: Request, wanted: str, status: int, fault: str | None) -> Response:
    has_tokens = bool(request.app.state.settings.tokens)
    return page(request, "login.html.j2", status=status, next=wanted, fault=fault, has_tokens=has_tokens)


@router.post("/login")
def log_in(request: Request, form: Form, attempts: Annotated[Attempts, Depends(attempts_of)]) -> Response:
    """Exchange a token for a cookie."""
    require_own_origin(request)
    address = address_of(request)
    attempts.require_few(address)
    wanted = _local(form.get("next", "/"))
    known = request.app.state.settings.tokens
    token = tokens.of_text(known, form.get("token", "").strip())
    if token is None:
        attempts.add(address)
        return _login_page(request, wanted, 401, "This token is not known here.")
    if is_unsafe(request):
        fault = "This page was opened without TLS, so that the browser would drop the login: open it by https."
        return _login_page(request, wanted, 400, fault)
    response = back(wanted)
    set_cookie(response, request, token)
    return response


@router.post("/logout")
def log_out(request: Request) -> Response:
    """Forget the cookie."""
    require_own_origin(request)
    response = back("/login")
    clear_cookie(response)
    return response


def _local(path: str) -> str:
    """Return *path* where it is one of ours, else that of the first page: a login leads nowhere else."""
    is_ours = path.startswith("/") and not path.startswith(("//", "/\\"))
    return path if is_ours and path.isprintable() else "/"
