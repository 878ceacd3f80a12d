"""Makes pages from templates: every value is escaped, and a browser runs nothing but our one script."""

import json
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PrefixLoader, StrictUndefined
from starlette.responses import HTMLResponse, RedirectResponse

from api import report
from api.pages.viewers import LoginNeeded, Viewer
from api.pages.worlds import Worlds
from schemas import currencies
from schemas.answers import TimelineEvent
from schemas.version import version
from schemas.visible import visible

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    # A stricter one would make browsers send no origin with a form.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_FOLDER: Final = Path(__file__).parent / "templates"
_REPORT: Final = Path(report.__file__).parent
_SHORT_MAX: Final = 24
"""Characters of an id in a list: a session's has 66, of which the beginning and the end tell most apart."""
_PLACES: Final = {"customer": "customers", "payment_link": "payment-links", "event_id": "events", "order_id": "orders"}
"""By column, the page of the object that it names."""
_FOUND: Final = ("payment_intent", "charge", "invoice", "subscription", "client_reference_id", "recovered_from")
"""Columns whose value leads on by a search."""
_UNITS: Final = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))


def page(
    request: Request, template: str, viewer: Viewer | None = None, worlds: Worlds | None = None, *, status: int = 200,
    **values: Any,  # noqa: ANN401 - whatever the template shows
) -> HTMLResponse:  # fmt: skip
    """Return the page that *template* makes of *values*, for *viewer* and within one of *worlds*."""
    known = {"viewer": viewer, "worlds": worlds, "here": request.url.path, "query": request.url.query}
    links = {"link": link_within(worlds), "now": datetime.now(UTC), "asked": dict(request.query_params)}
    text = _templates().get_template(template).render(known | links | values)
    return HTMLResponse(text, status, headers=HEADERS)


def link_within(worlds: Worlds | None) -> Callable[..., str]:
    """Return the function by which templates make addresses: *parts* of a path, and parameters, within the world."""

    def link(*parts: str, **parameters: object) -> str:
        path = "/" + "/".join(quote(part, safe="") for part in parts)
        world = {} if worlds is None else worlds.shown.asked
        # The account without a name is asked for by an empty text; of all else that is a field left empty.
        given = {k: v for k, v in {**world, **parameters}.items() if v is not None and (v != "" or k == "account")}
        return f"{path}?{urlencode(given)}" if given else path

    return link


def back(address: str) -> RedirectResponse:
    """Return the answer to an act: look at *address* now."""
    return RedirectResponse(address, 303, headers=HEADERS)


class PersonRoute(APIRoute):
    """A route for a person: without a login it leads to the login, and an error is a page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of requests."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except LoginNeeded:
                return _to_login(request)
            except Exception as error:  # noqa: BLE001 - the application knows an answer to each
                return _error_page(request, error)

        return answer


class PageRoute(PersonRoute):
    """A route of a page."""


def _to_login(request: Request) -> Response:
    asked = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    leads_back = request.method == "GET" and asked != "/"
    return back(f"/login?{urlencode({'next': asked})}" if leads_back else "/login")


def _error_page(request: Request, error: Exception) -> Response:
    """Return the problem document of *error* as a page."""
    handlers: Mapping[Any, Callable[[Request, Exception], Response]] = request.app.exception_handlers
    handler = next(handlers[kind] for kind in type(error).__mro__ if kind in handlers)
    answer = handler(request, error)
    problem = json.loads(bytes(answer.body))
    shown = page(request, "error.html.j2", status=answer.status_code, problem=problem)
    kept = ("retry-after", "allow")
    for name in kept:
        if name in answer.headers:
            shown.headers[name] = answer.headers[name]
    return shown


# ---- What templates ask for ----


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(_FOLDER), PrefixLoader({"report": FileSystemLoader(_REPORT)})]),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ago": ago,
        "amount": amount,
        "event_class": _event_class,
        "first_up": _first_up,
        "iso": _iso,
        "json": _json,
        "number": _number,
        "pretty": pretty,
        "short": _short,
        "span": span,
        "unlike": _unlike,
        "utc": utc,
        "words": _words,
    }
    environment.globals |= {"version": version(), "is_money": _is_money, "is_moment": _is_moment}
    environment.globals |= {"places": _PLACES, "found": _FOUND}
    return environment


def _shown(value: object) -> object:
    return value if hasattr(value, "__html__") else visible(str(value))


def utc(at: datetime) -> str:
    """Return *at* as a person reads it, in UTC."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def ago(seconds: float | None) -> str:
    """Return an age as a person states it: 3 minutes."""
    if seconds is None:
        return "not known"
    for name, length in _UNITS:
        count = int(seconds // length)
        if count:
            return f"{count:,} {name}{'' if count == 1 else 's'}"
    return "0 seconds"


def span(seconds: float) -> str:
    """Return how long something took: 12 ms, 1.4 seconds, 3 minutes."""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    return f"{seconds:.1f} seconds" if seconds < 60 else ago(seconds)  # noqa: PLR2004 - a minute


def amount(minor: int | None, currency: str | None) -> str:
    """Return an amount with its currency, and one without a known currency in its smallest unit."""
    if minor is None:
        return "not known"
    written = f"{minor:,}" if currency is None else currencies.written(minor, currency)
    return written.replace("-", "−")  # noqa: RUF001 - a minus, and not a hyphen


def _number(count: int | None) -> str:
    return "not known" if count is None else f"{count:,}"


def _words(name: object) -> str:
    """Return a code of ours or of Stripe's as words."""
    return str(name).replace("_", " ")


def pretty(payload: str) -> str:
    """Return *payload* with its JSON indented, and as it is where it is no JSON."""
    try:
        return msgspec.json.format(payload.encode(), indent=2).decode()
    except msgspec.DecodeError:
        return payload


def _first_up(text: str) -> str:
    return text[:1].upper() + text[1:]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _short(key: str) -> str:
    """Return the beginning and the end of a long id."""
    return key if len(key) <= _SHORT_MAX else f"{key[:14]}…{key[-6:]}"


def _unlike(values: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of *values* that *other* has not; a null is like no value."""
    return {name: value for name, value in values.items() if value != other.get(name)}


def _is_money(column: str) -> bool:
    return column.startswith("amount_") or column.endswith("_amount") or column in ("amount", "total")


def _is_moment(value: object) -> bool:
    return isinstance(value, datetime)


def _event_class(event: TimelineEvent) -> str:
    """Return how the timeline draws *event*: by what became of it."""
    if event.state in ("parked", "pending"):
        return f"is-{event.state}"
    return "is-setting" if event.sets else "is-still"
