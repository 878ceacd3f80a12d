"""Ids of any text in addresses, and the parameters that a route knows."""

import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deploy.local.services import Services
from tests.web import Web, bearer, event, serving_many

OWNER: Final = bearer("an-owner")
PLANT: Final = """
    WITH one AS (SELECT '' AS account, false AS livemode, %s AS id, 'evt_1' AS event_id, now() AS as_of),
    orders AS (INSERT INTO orders (account, livemode, id, event_id, as_of, status, invoice)
        SELECT *, 'paid', id FROM one),
    invoices AS (INSERT INTO invoices (account, livemode, id, event_id, as_of) SELECT * FROM one),
    links AS (INSERT INTO payment_links (account, livemode, id, event_id, as_of) SELECT * FROM one),
    notes AS (INSERT INTO credit_notes (account, livemode, id, event_id, as_of) SELECT * FROM one),
    customers AS (INSERT INTO customers (account, livemode, id, event_id, as_of) SELECT * FROM one)
    INSERT INTO balances (account, livemode, customer, event_id, as_of, currency) SELECT *, 'usd' FROM one
"""
ODD: Final = [
    *(
        "a/b",
        "/a",
        "a/",
        "a//b",
        "?",
        "a?b=c",
        "#",
        "a b",
        "%",
        "%2F",
        "a%2Fb",
        "..",
        "../orders",
        ".",
        "a+b",
        "é",
        "\u202e",
    ),
    *(
        "a/expire",
        "a/balance",
        "a/portal-sessions",
        "a/retry",
        "a/explanation",
        "expire",
        "retry",
        "balance",
        "a;b",
        "a&b",
        "'",
        '"',
        "\\",
    ),
]
AS_IT_IS: Final = [
    id_
    for id_ in ODD
    if re.fullmatch("[a-z/]+", id_) and "//" not in id_ and not id_.startswith("/")
    if id_ not in ("a/explanation", "a/balance")
]
"""Ids that may be unencoded in an address, unless another route has that address."""
FOUND: Final = {
    # For each route with an id: the status of the answer if the row exists, which differs from that without a row.
    "GET /v1/orders/{}": 200,
    "PUT /v1/orders/{}": 200,
    "POST /v1/orders/{}/expire": 409,
    "POST /v1/orders/{}/read": 409,
    "GET /v1/orders/{}/explanation": 200,
    "GET /v1/orders/{}/related": 200,
    "GET /v1/payment-links/{}/explanation": 200,
    "GET /v1/credit-notes/{}/explanation": 200,
    "GET /v1/customers/{}/explanation": 200,
    "GET /v1/payment-links/{}": 200,
    "GET /v1/credit-notes/{}": 200,
    "GET /v1/customers/{}": 200,
    "GET /v1/customers/{}/balance": 200,
    "POST /v1/customers/{}/portal-sessions": 409,
    "GET /v1/events/{}": 200,
    "GET /v1/events/{}/trace": 200,
    "POST /v1/events/{}/retry": 202,
    "POST /v1/events/{}/ignore": 202,
}


NUMBERED: Final = {"GET /v1/reconciliations/{}", "GET /v1/reconciliations/{}/report"}
"""Routes with a number of ours in place of an id of Stripe's."""


@pytest.fixture(scope="module")
def web(services: Services) -> Iterator[Web]:
    """Return a running web process with rows for every odd id."""
    with serving_many(services) as running:
        for key in ODD:
            plant(running, key)
        yield running


def plant(web: Web, key: str) -> None:
    """Insert a row with the id *key* into every table with a route for one row."""
    web.query(PLANT, key)
    assert web.deliver(event(id=key)).status_code == 200
    assert ask(web, "PUT /v1/orders/{}", key, quote(key, safe=""))[0] in {200, 201}


def ask(web: Web, route: str, key: str, written: str) -> tuple[int, Any]:
    """Request *route* for the id *key*, spelled as *written*; return the status and the id in the answer."""
    method, path = route.split(" ")
    session = {"object": "checkout.session", "id": key, "status": "open", "payment_status": "unpaid", "mode": "payment"}
    more = {"livemode": False, "created": 0, "expires_at": 1}
    posted = {"reason": "a test"} if path.endswith("/ignore") else {}
    body = msgspec.json.encode({**session, **more} if method == "PUT" else posted)
    head = [f"{method} {path.format(written)} HTTP/1.1", "Host: payfold", f"Authorization: {OWNER['Authorization']}"]
    head += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    # HTTP clients remove dots from an address and encode characters; here it is sent as written.
    answer = web.send_raw("\r\n".join(head).encode() + body).answer()
    status, _, rest = answer.partition(b"\r\n")
    found = msgspec.json.decode(rest.partition(b"\r\n\r\n")[2])
    # What belongs to an order names its invoice, which is planted with the same id.
    named = found["invoice"] if "disputes" in found else found
    return int(status.split()[1]), named.get("id", named.get("customer"))


def test_every_route_with_an_id_is_asked(web: Web) -> None:
    """The routes above are all routes with an id, or a number, on the OpenAPI page."""
    listed = web.client.get("/openapi.json").json()["paths"]

    found = {
        f"{method.upper()} {re.sub(r'{.+?}', '{}', path)}" for path in listed if "{" in path for method in listed[path]
    }

    assert found == FOUND.keys() | NUMBERED


@pytest.mark.parametrize("route", FOUND)
def test_odd_ids(web: Web, route: str) -> None:
    """Every route finds the row of an id of any characters, once the id is percent-encoded."""
    found = {key: ask(web, route, key, quote(key, safe="")) for key in ODD}

    shown = {key: key if FOUND[route] in {200, 202} else None for key in ODD}
    assert found == {key: (FOUND[route], shown[key]) for key in ODD}
    # What is put is there for the other routes.
    unknown = f"none-{route.partition(' ')[0]}"
    assert ask(web, route, unknown, unknown)[0] in {404, 201}


@pytest.mark.parametrize("key", AS_IT_IS)
def test_slashes_as_they_are(web: Web, key: str) -> None:
    """An id with an unencoded slash is found if no other route has that address."""
    for route, status in FOUND.items():
        if route.startswith("GET"):
            assert ask(web, route, key, key) == (status, key)
    assert ask(web, "POST /v1/orders/{}/expire", key, key)[0] == 409


def test_no_parameter_takes_a_nul(web: Web) -> None:
    """Every route refuses a NUL in an id and in any text of its query, since PostgreSQL cannot hold one."""
    listed = web.client.get("/openapi.json").json()["paths"]
    places = [
        (method, path, each["in"], each["name"])
        for path, methods in listed.items()
        for method, operation in methods.items()
        for each in operation.get("parameters", ())
        if each["in"] in {"path", "query"}
    ]

    for method, path, where, name in places:
        address = re.sub(r"{.+?}", "%00" if where == "path" else "none", path)
        address += f"?{name}=%00" if where == "query" else ""
        answer = web.client.request(method, address, headers=OWNER, json=None if method == "get" else {})
        assert (method, path, name, answer.status_code) == (method, path, name, 422)
        assert any(fault["place"].startswith(f"{where}.{name}") for fault in answer.json()["errors"])


@pytest.mark.parametrize("listed", ["orders", "payment-links", "customers", "credit-notes", "events"])
def test_no_id(web: Web, listed: str) -> None:
    """A slash after the address of a list is no id."""
    answer = web.client.get(f"/v1/{listed}/", headers=OWNER, follow_redirects=True)

    assert (answer.status_code, "data" in answer.json()) == (200, True)


def test_an_act_is_not_read(web: Web) -> None:
    """A GET of an action's address is answered with the allowed method, unless a row has such an id."""
    answer = web.client.get("/v1/orders/none/expire", headers=OWNER)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert web.client.get("/v1/orders/none/other", headers=OWNER).status_code == 404


@pytest.mark.parametrize(
    ("address", "methods"),
    [
        ("/v1/orders", "GET"),
        ("/v1/orders/none", "GET, PUT"),
        ("/v1/orders/none/expire", "POST"),
        ("/v1/orders/none/explanation", "GET"),
        ("/v1/customers/none/portal-sessions", "POST"),
        ("/health/live", "GET, HEAD"),
        ("/webhooks/stripe", "POST"),
    ],
)
def test_methods_of_an_address(web: Web, address: str, methods: str) -> None:
    """Another method is answered with all methods that the address has, also where several routes have it."""
    for method in ("OPTIONS", "DELETE", "PATCH"):
        answer = web.client.request(method, address, headers=OWNER)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)
        assert answer.json()["status"] == 405


@given(key=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20))
@example(key="%252F")
@settings(max_examples=30)
def test_any_id(web: Web, key: str) -> None:
    """An event of any id that the inbox takes is shown."""
    web.deliver(event(id=key))

    assert ask(web, "GET /v1/events/{}", key, quote(key, safe="")) == (200, key)


def test_unknown_parameters(web: Web) -> None:
    """Every route refuses an unknown parameter by its name, once the token is accepted."""
    listed = web.client.get("/openapi.json").json()["paths"]
    for path, methods in listed.items():
        for method in methods if path.startswith("/v1/") else ():
            address = re.sub(r"{.+?}", "none", path)
            refused = web.client.request(method, f"{address}?colour=red", headers=OWNER)
            assert (path, refused.status_code) == (path, 422)
            assert refused.json()["errors"][0]["place"] == "query.colour"
            known = {each["name"] for each in methods[method].get("parameters", ()) if each["in"] == "query"}
            assert all(name in refused.json()["errors"][0]["fault"] for name in known), path
            assert web.client.request(method, f"{address}?colour=red").status_code == 401


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/orders?status=refunded", ["open", "processing", "paid", "failed", "expired", "complete"]),
        ("/v1/events?state=done", ["pending", "folded", "ignored", "parked"]),
        ("/v1/anomalies?kind=odd", ["broken_chain", "unknown_status"]),
        ("/v1/anomalies?subject=orders", ["order", "credit_note"]),
    ],
)
def test_unknown_values(web: Web, path: str, allowed: list[str]) -> None:
    """A value that one of our columns never has is refused with the list of allowed values."""
    refused = web.get(path)

    assert (refused.status_code, refused.headers["content-type"]) == (422, "application/problem+json")
    (fault,) = refused.json()["errors"]
    assert fault["place"] == f"query.{re.split('[?=]', path)[1]}"
    assert all(value in fault["fault"] for value in allowed)


@pytest.mark.parametrize("path", ["/v1/invoices?status=novel", "/v1/refunds?status=novel", "/v1/events?type=novel"])
def test_values_of_stripe(web: Web, path: str) -> None:
    """An unknown value of a column with Stripe's own words is accepted, and finds no row."""
    answer = web.get(path)

    assert (answer.status_code, answer.json()["data"]) == (200, [])
