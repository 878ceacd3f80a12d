"""The part of Stripe's HTTP API that a shop's helpers call, answered from accounts of the sandbox.

    api = StripeApi({"sk_test_1": account})
    answer = api.answer(Call("GET", "/v1/checkout/sessions", {"status": "open"}, {"authorization": "Bearer sk_test_1"}))

It checks requests as Stripe does: an unknown parameter, a wrong filter or a reused idempotency key is answered 400,
so that a wrong call is noticed. ``server`` puts it onto a port. Source: https://docs.stripe.com/api.
"""

import base64
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from fnmatch import fnmatchcase
from typing import Any, Final

import msgspec

from deploy.sandbox.account import DAY_SECONDS, Account, ParameterError, SandboxError, UnknownObjectError
from deploy.sandbox.journal import Object
from deploy.sandbox.line_items import line_items

LIMIT_DEFAULT: Final = 10
LIMIT_MAX: Final = 100
TYPES_MAX: Final = 20
EVENTS_KEPT_SECONDS: Final = 30 * DAY_SECONDS
FIRST_PAGE: Final = 10

Params = Mapping[str, Any]
"""Parameters with their brackets resolved: ``created[gte]=1`` is ``{"created": {"gte": "1"}}``."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request. Header names are in lower case."""

    method: str
    path: str
    params: Params
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: its status, its JSON as bytes, and headers besides the usual ones."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A call that was made, for tests that count calls. It never holds the key."""

    method: str
    path: str
    params: Params
    idempotency_key: str | None
    stripe_account: str | None
    status: int | None
    """None where the caller got no answer."""


def encoded(body: object) -> bytes:
    """Return the JSON of an answer, in the layout of Stripe's."""
    return msgspec.json.format(msgspec.json.encode(body), indent=2)


class ApiError(SandboxError):
    """An error that Stripe answers with an error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        told = {"code": code, "message": message, "param": param, "type": kind}
        error = {name: value for name, value in told.items() if value is not None}
        self.answer = Answer(status, encoded({"error": error}), headers or {})


Handler = Callable[[Account, Params, str], Object]


@dataclass(frozen=True, slots=True)
class _Route:
    method: str
    path: "re.Pattern[str]"
    handler: Handler
    params: Mapping[str, Callable[[str, Any], object]]


@dataclass(slots=True)
class _Stored:
    """The first answer to an idempotency key."""

    at: int
    path: str
    params: Params
    answer: Answer


class StripeApi:
    """Stripe's API over *accounts*, by their secret key.

    *connected* are the accounts that a key may act for by the header ``Stripe-Account``; *forbidden* the path
    prefixes that a restricted key may not call. Each request moves its account's clock to *clock*, where one is
    given, and then lets Stripe's own timer expire what is due, unless *has_timer* is false. Change an account
    from another thread only while holding ``lock``.
    """

    def __init__(
        self,
        accounts: Mapping[str, Account],
        *,
        connected: Mapping[tuple[str, str], Account] | None = None,
        forbidden: Mapping[str, Iterable[str]] | None = None,
        clock: Callable[[], int] | None = None,
        has_timer: bool = True,
    ) -> None:
        self._accounts = accounts
        self._connected = connected or {}
        self._forbidden = {key: tuple(prefixes) for key, prefixes in (forbidden or {}).items()}
        self._clock = clock
        self._has_timer = has_timer
        self._timed_at: dict[int, int] = {}
        self._stored: dict[tuple[int, str], _Stored] = {}
        self._requests = 0
        self.lock = threading.RLock()
        self.calls: list[RecordedCall] = []

    def answer(self, call: Call) -> Answer:
        """Do *call*, and return Stripe's answer to it."""
        with self.lock:
            self._requests += 1
            account: Account | None = None
            try:
                account = self._account_of(call)
                self._pass_time(account)
                answer = self._answer_once(account, call)
            except ApiError as error:
                answer = error.answer
            now = account.now if account is not None else int(datetime.now(UTC).timestamp())
            usual = {"Date": _http_date(now), "Request-Id": f"req_{self._requests:014d}", "Stripe-Version": "sandbox"}
            return Answer(answer.status, answer.body, {**usual, **answer.headers})

    def count(self, path: str = "*", method: str = "*") -> int:
        """Return how many calls were made of a path, in which * stands for anything."""
        return sum(fnmatchcase(made.path, path) and fnmatchcase(made.method, method) for made in self.calls)

    # The account of a call, and its time.

    def _account_of(self, call: Call) -> Account:
        key = _key_of(call)
        if key not in self._accounts:
            raise ApiError(401, f"Invalid API Key provided: {key[:3]}****", code=None)
        if call.path.startswith(self._forbidden.get(key, ())):
            raise ApiError(403, "The provided key does not have the required permissions for this endpoint.")
        named = call.headers.get("stripe-account")
        if named is None or named == self._accounts[key].account:
            return self._accounts[key]
        if (key, named) not in self._connected:
            message = f"The provided key does not have access to account '{named}' (or that account does not exist)."
            raise ApiError(403, message, code="account_invalid")
        return self._connected[key, named]

    def _pass_time(self, account: Account) -> None:
        if self._clock is not None:
            account.advance(max(0, self._clock() - account.now))
        if self._has_timer and self._timed_at.get(id(account)) != account.now:
            self._timed_at[id(account)] = account.now
            for session in account.session_ids():
                current = account.peek("checkout.session", session)
                if current["status"] == "open" and current["expires_at"] <= account.now:
                    account.expire(session)

    # Idempotency: https://docs.stripe.com/api/idempotent_requests.

    def _answer_once(self, account: Account, call: Call) -> Answer:
        key = call.headers.get("idempotency-key")
        if call.method != "POST" or key is None:
            return self._do(account, call)
        stored = self._stored.get((id(account), key))
        if stored is not None and stored.at > account.now - DAY_SECONDS:
            if (stored.path, stored.params) != (call.path, call.params):
                message = "Keys for idempotent requests can only be used with the parameters they were first used with."
                raise ApiError(400, message, kind="idempotency_error")
            return Answer(stored.answer.status, stored.answer.body, {"Idempotent-Replayed": "true"})
        answer = self._do(account, call)
        self._stored[id(account), key] = _Stored(account.now, call.path, call.params, answer)
        return answer

    def _do(self, account: Account, call: Call) -> Answer:
        route, found = _route_of(call)
        for name, value in call.params.items():
            if name not in route.params:
                raise ApiError(400, f"Received unknown parameter: {name}", code="parameter_unknown", param=name)
            route.params[name](name, value)
        try:
            return Answer(200, encoded(route.handler(account, call.params, *found)))
        except UnknownObjectError as error:
            # An error of a call that was executed is an answer, which the idempotency key keeps.
            return ApiError(404, str(error).replace("'", ""), code="resource_missing", param="id").answer
        except ApiError as error:
            return error.answer
        except SandboxError as error:
            return ApiError(400, str(error)).answer


def _key_of(call: Call) -> str:
    """Return the key that a call names, as a bearer token or as the user of basic authentication."""
    scheme, _, given = call.headers.get("authorization", "").partition(" ")
    if scheme == "Basic":
        return base64.b64decode(given).decode().partition(":")[0]
    return given if scheme == "Bearer" else ""


def _http_date(seconds: int) -> str:
    return format_datetime(datetime.fromtimestamp(seconds, UTC), usegmt=True)


# The values that a parameter may have.


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ApiError(400, f"Invalid string: {name}", param=name)


def _whole(name: str, value: object) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"-?\d{1,18}", value):
        raise ApiError(400, f"Invalid integer: {value}", code="parameter_invalid_integer", param=name)


def _flag(name: str, value: object) -> None:
    if value not in {"true", "false"}:
        raise ApiError(400, f"Invalid boolean: {value}", param=name)


def _limit(name: str, value: object) -> None:
    _whole(name, value)
    if not 1 <= int(str(value)) <= LIMIT_MAX:
        raise ApiError(400, f"This value must be between 1 and {LIMIT_MAX}.", param=name)


def _times(name: str, value: object) -> None:
    if not isinstance(value, dict):
        _whole(name, value)
        return
    for bound, each in value.items():
        if bound not in {"gt", "gte", "lt", "lte"}:
            raise ApiError(400, f"Received unknown parameter: {name}[{bound}]", code="parameter_unknown", param=name)
        _whole(f"{name}[{bound}]", each)


def _one_of(*allowed: str) -> Callable[[str, Any], None]:
    def check(name: str, value: object) -> None:
        if value not in allowed:
            raise ApiError(400, f"Invalid {name}: must be one of {', '.join(allowed)}", param=name)

    return check


def _expand(*allowed: str) -> Callable[[str, Any], None]:
    def check(_: str, value: object) -> None:
        for each in _listed(value):
            if each not in allowed:
                raise ApiError(400, f"This property cannot be expanded ({each}).", param="expand")

    return check


def _anything(_: str, __: object) -> None:
    pass


def _listed(value: object) -> list[str]:
    """Return the values of an array, given as ``name[]`` or ``name[0]``."""
    if isinstance(value, dict):
        return [str(each) for each in value.values()]
    return [str(value)]


# Lists.

_PAGED: Final = {"limit": _limit, "starting_after": _text, "ending_before": _text, "expand": _expand()}


def _page(found: Iterable[Object], params: Params, url: str) -> Object:
    """Return the page of *found*, which is newest first, that *params* ask for."""
    limit = int(params.get("limit", LIMIT_DEFAULT))
    if "ending_before" in params:
        before = list(_until(found, params["ending_before"]))
        return _list(before[-limit:], url, has_more=len(before) > limit)
    data: list[Object] = []
    for each in _after(found, params.get("starting_after")):
        if len(data) == limit:
            return _list(data, url, has_more=True)
        data.append(each)
    return _list(data, url, has_more=False)


def _list(data: list[Object], url: str, *, has_more: bool) -> Object:
    return {"object": "list", "data": data, "has_more": has_more, "url": url}


def _after(found: Iterable[Object], last: str | None) -> Iterator[Object]:
    each = iter(found)
    if last is not None:
        for skipped in each:
            if skipped["id"] == last:
                break
    yield from each


def _until(found: Iterable[Object], first: str) -> Iterator[Object]:
    for each in found:
        if each["id"] == first:
            return
        yield each


def _is_within(at: int | None, wanted: object) -> bool:
    if wanted is None:
        return True
    if at is None:
        return False
    if not isinstance(wanted, dict):
        return at == int(str(wanted))
    bounds = {name: int(value) for name, value in wanted.items()}
    return (
        at > bounds.get("gt", -1)
        and at >= bounds.get("gte", 0)
        and at < bounds.get("lt", 2**62)
        and at <= bounds.get("lte", 2**62)
    )


def _lists(kind: str, url: str, *equal: str) -> Handler:
    """Return a handler that lists objects of a *kind*, with filters that are *equal* to a key of theirs."""

    def handle(account: Account, params: Params) -> Object:
        wanted = {name: params[name] for name in equal if name in params}
        matching = (
            each
            for each in account.newest(kind)
            if all(_plain(each.get(name)) == value for name, value in wanted.items())
            and _is_within(each.get("created"), params.get("created"))
            and not each.get("deleted")
        )
        return _page(matching, params, url)

    return handle  # type: ignore[return-value]  # a list has no id in its path


def _plain(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def _retrieves(kind: str) -> Handler:
    def handle(account: Account, _: Params, object_id: str) -> Object:
        return account.object(kind, object_id)

    return handle


# Checkout.


def _shown(session: Object, params: Params, *, prefix: str = "") -> Object:
    """Return *session* with its line items where *params* want it expanded: the first page of them."""
    if f"{prefix}line_items" not in _listed(params.get("expand", {})):
        return session
    lines = line_items(session)
    url = f"/v1/checkout/sessions/{session['id']}/line_items"
    return {**session, "line_items": _list(lines[:FIRST_PAGE], url, has_more=len(lines) > FIRST_PAGE)}


def _retrieve_session(account: Account, params: Params, session: str) -> Object:
    return _shown(account.session(session), params)


def _expire_session(account: Account, params: Params, session: str) -> Object:
    account.expire(session)
    return _shown(account.session(session), params)


def _list_sessions(account: Account, params: Params) -> Object:
    email = params.get("customer_details", {}).get("email")
    filters = ("status", "customer", "payment_intent", "payment_link", "subscription")
    wanted = {name: params[name] for name in filters if name in params}
    matching = (
        each
        for each in account.newest("checkout.session")
        if all(each[name] == value for name, value in wanted.items())
        and _is_within(each["created"], params.get("created"))
        and (email is None or (each["customer_details"] or {}).get("email") == email)
    )
    page = _page(matching, params, "/v1/checkout/sessions")
    return {**page, "data": [_shown(each, params, prefix="data.") for each in page["data"]]}


def _list_line_items(account: Account, params: Params, session: str) -> Object:
    return _page(line_items(account.session(session)), params, f"/v1/checkout/sessions/{session}/line_items")


def _create_session(account: Account, params: Params) -> Object:
    sold = [item for item in params.get("line_items", {}).values() if isinstance(item, dict)]
    prices = [item.get("price_data", {}) for item in sold]
    amount = sum(
        int(price.get("unit_amount", 2_000)) * int(item.get("quantity", 1))
        for item, price in zip(sold, prices, strict=True)
    )
    mode = params.get("mode", "payment")
    if mode != "setup" and not sold:
        raise ApiError(400, "Missing required param: line_items.", code="parameter_missing", param="line_items")
    session = account.open_session(
        mode=mode,
        amount=None if mode == "setup" else amount,
        currency=next((price["currency"] for price in prices if "currency" in price), None),
        customer=params.get("customer"),
        client_reference_id=params.get("client_reference_id"),
        metadata=params.get("metadata"),
        expires_in=int(params["expires_at"]) - account.now if "expires_at" in params else DAY_SECONDS,
        recoverable="after_expiration" in params,
    )
    return _shown(account.session(session), params)


# What comes after the sale.


def _list_balance_transactions(account: Account, params: Params, customer: str) -> Object:
    account.object("customer", customer)
    matching = (
        each
        for each in account.balance_transactions(customer)
        if _is_within(each["created"], params.get("created")) and params.get("invoice") in {None, each["invoice"]}
    )
    return _page(matching, params, f"/v1/customers/{customer}/balance_transactions")


def _list_note_lines(account: Account, params: Params, note: str) -> Object:
    account.object("credit_note", note)
    return _page(account.credit_note_lines(note), params, f"/v1/credit_notes/{note}/lines")


def _create_portal_session(account: Account, params: Params) -> Object:
    if "customer" not in params:
        raise ApiError(400, "Missing required param: customer.", code="parameter_missing", param="customer")
    if not account.knows("customer", params["customer"]):
        raise ApiError(400, f"No such customer: {params['customer']}", code="resource_missing", param="customer")
    session = account.create_portal_session(
        params["customer"],
        configuration=params.get("configuration"),
        flow=params.get("flow_data", {}).get("type"),
        return_url=params.get("return_url"),
    )
    return account.object("billing_portal.session", session)


def _list_events(account: Account, params: Params) -> Object:
    if "type" in params and "types" in params:
        raise ParameterError("You may only specify one of these parameters: type, types.")
    types = _listed(params["types"]) if "types" in params else []
    if len(types) > TYPES_MAX:
        raise ParameterError(f"You may pass at most {TYPES_MAX} types.")
    wanted = params.get("type")
    oldest = account.now - EVENTS_KEPT_SECONDS
    matching = (
        {"id": event.id, "event": event}
        for _, event in sorted(enumerate(account.events), key=lambda each: (each[1].created, each[0]), reverse=True)
        if event.created >= oldest
        and _is_within(event.created, params.get("created"))
        and (wanted is None or fnmatchcase(event.type, wanted))
        and (not types or event.type in types)
    )
    page = _page(matching, params, "/v1/events")
    return {**page, "data": [each["event"].payload() for each in page["data"]]}


def _retrieve_event(account: Account, _: Params, event: str) -> Object:
    for each in account.events:
        if each.id == event:
            return each.payload()
    raise UnknownObjectError(f"No such event: {event}")


def _create_endpoint(account: Account, params: Params) -> Object:
    for name in ("url", "enabled_events"):
        if name not in params:
            raise ApiError(400, f"Missing required param: {name}.", code="parameter_missing", param=name)
    return account.create_webhook_endpoint(
        params["url"],
        _listed(params["enabled_events"]),
        api_version=params.get("api_version"),
        description=params.get("description"),
    )


def _update_endpoint(account: Account, params: Params, endpoint: str) -> Object:
    if "enabled_events" in params:
        account.update_webhook_endpoint(endpoint, _listed(params["enabled_events"]))
    return account.object("webhook_endpoint", endpoint)


_CREATED: Final = {"created": _times}
_SESSION_EXPAND: Final = {"expand": _expand("line_items")}
_ROUTES: Final = [
    _Route(method, re.compile(re.sub(r"\{\w+\}", r"([^/]+)", path)), handler, params)  # type: ignore[arg-type]  # some take an id, some none
    for method, path, handler, params in (
        (
            "POST",
            "/v1/checkout/sessions",
            _create_session,
            {
                "mode": _one_of("payment", "setup", "subscription"),
                "after_expiration": _anything,
                "cancel_url": _text,
                "client_reference_id": _text,
                "currency": _text,
                "customer": _text,
                "customer_email": _text,
                "expires_at": _whole,
                "line_items": _anything,
                "metadata": _anything,
                "payment_intent_data": _anything,
                "return_url": _text,
                "success_url": _text,
                "ui_mode": _text,
                **_SESSION_EXPAND,
            },
        ),
        (
            "GET",
            "/v1/checkout/sessions",
            _list_sessions,
            {
                **_PAGED,
                **_CREATED,
                "customer": _text,
                "customer_account": _text,
                "customer_details": _anything,
                "payment_intent": _text,
                "payment_link": _text,
                "status": _one_of("open", "complete", "expired"),
                "subscription": _text,
                "expand": _expand("data.line_items"),
            },
        ),
        ("GET", "/v1/checkout/sessions/{id}", _retrieve_session, _SESSION_EXPAND),
        ("POST", "/v1/checkout/sessions/{id}/expire", _expire_session, _SESSION_EXPAND),
        ("GET", "/v1/checkout/sessions/{id}/line_items", _list_line_items, _PAGED),
        (
            "GET",
            "/v1/payment_links",
            _lists("payment_link", "/v1/payment_links", "active"),
            {**_PAGED, "active": _flag},
        ),
        ("GET", "/v1/payment_links/{id}", _retrieves("payment_link"), {}),
        ("GET", "/v1/customers", _lists("customer", "/v1/customers", "email"), {**_PAGED, **_CREATED, "email": _text}),
        ("GET", "/v1/customers/{id}", _retrieves("customer"), {}),
        (
            "GET",
            "/v1/customers/{id}/balance_transactions",
            _list_balance_transactions,
            {**_PAGED, **_CREATED, "invoice": _text},
        ),
        (
            "GET",
            "/v1/credit_notes",
            _lists("credit_note", "/v1/credit_notes", "customer", "invoice"),
            {**_PAGED, **_CREATED, "customer": _text, "invoice": _text},
        ),
        ("GET", "/v1/credit_notes/{id}", _retrieves("credit_note"), {}),
        ("GET", "/v1/credit_notes/{id}/lines", _list_note_lines, _PAGED),
        (
            "GET",
            "/v1/invoices",
            _lists("invoice", "/v1/invoices", "customer", "status"),
            {**_PAGED, **_CREATED, "customer": _text, "status": _text, "subscription": _text},
        ),
        ("GET", "/v1/invoices/{id}", _retrieves("invoice"), {}),
        (
            "GET",
            "/v1/invoice_payments",
            _lists("invoice_payment", "/v1/invoice_payments", "invoice", "status"),
            {**_PAGED, **_CREATED, "invoice": _text, "status": _text},
        ),
        ("GET", "/v1/invoice_payments/{id}", _retrieves("invoice_payment"), {}),
        (
            "GET",
            "/v1/refunds",
            _lists("refund", "/v1/refunds", "charge", "payment_intent"),
            {**_PAGED, **_CREATED, "charge": _text, "payment_intent": _text},
        ),
        ("GET", "/v1/refunds/{id}", _retrieves("refund"), {}),
        (
            "GET",
            "/v1/charges",
            _lists("charge", "/v1/charges", "customer", "payment_intent"),
            {**_PAGED, **_CREATED, "customer": _text, "payment_intent": _text},
        ),
        ("GET", "/v1/charges/{id}", _retrieves("charge"), {}),
        (
            "GET",
            "/v1/disputes",
            _lists("dispute", "/v1/disputes", "charge", "payment_intent"),
            {**_PAGED, **_CREATED, "charge": _text, "payment_intent": _text},
        ),
        ("GET", "/v1/disputes/{id}", _retrieves("dispute"), {}),
        (
            "GET",
            "/v1/billing_portal/configurations",
            _lists("billing_portal.configuration", "/v1/billing_portal/configurations", "active", "is_default"),
            {**_PAGED, "active": _flag, "is_default": _flag},
        ),
        ("GET", "/v1/billing_portal/configurations/{id}", _retrieves("billing_portal.configuration"), {}),
        (
            "POST",
            "/v1/billing_portal/sessions",
            _create_portal_session,
            {"customer": _text, "configuration": _text, "return_url": _text, "locale": _text, "flow_data": _anything},
        ),
        (
            "GET",
            "/v1/events",
            _list_events,
            {**_PAGED, **_CREATED, "type": _text, "types": _anything, "delivery_success": _flag},
        ),
        ("GET", "/v1/events/{id}", _retrieve_event, {}),
        ("GET", "/v1/webhook_endpoints", _lists("webhook_endpoint", "/v1/webhook_endpoints"), _PAGED),
        (
            "POST",
            "/v1/webhook_endpoints",
            _create_endpoint,
            {"url": _text, "enabled_events": _anything, "api_version": _text, "description": _text},
        ),
        ("POST", "/v1/webhook_endpoints/{id}", _update_endpoint, {"enabled_events": _anything}),
    )
]


def _route_of(call: Call) -> tuple[_Route, tuple[str, ...]]:
    for route in _ROUTES:
        found = route.path.fullmatch(call.path)
        if found is not None and route.method == call.method:
            return route, found.groups()
    raise ApiError(404, f"Unrecognized request URL ({call.method}: {call.path}).")
