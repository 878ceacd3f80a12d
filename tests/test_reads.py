"""The tables over HTTP: pages, filters, single rows, and their documentation."""

import asyncio
import base64
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import psycopg
import pytest
from fastapi import APIRouter, FastAPI, Response
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from api.reads import Route
from deploy.local.services import Services
from tests.web import CLERK, OPERATOR, Web, event, serving, serving_many, settings_of

ORDER = """INSERT INTO orders (account, livemode, id, created, event_id, as_of, status, customer)
    VALUES (%s, %s, %s, to_timestamp(%s), 'evt_1', now(), %s, %s)"""
LINK = """INSERT INTO payment_links (account, livemode, id, created, event_id, as_of, active)
    VALUES ('', false, %s, to_timestamp(%s), 'evt_1', now(), true)"""
LISTS = ["/v1/orders", "/v1/payment-links", "/v1/events"]
SINGLES = ["/v1/orders/{}", "/v1/payment-links/{}", "/v1/events/{}"]


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


@pytest.fixture(scope="module")
def shared(services: Services) -> Iterator[Web]:
    """Return a running web process for the tests that change no data."""
    with serving_many(services) as running:
        yield running


def order(web: Web, number: object, *, created: float | None = 1000, **more: Any) -> None:  # noqa: ANN401 - a column's
    """Put an order into the table, as the worker would."""
    row = {"account": "", "livemode": False, "status": "paid", "customer": None} | more
    web.query(ORDER, row["account"], row["livemode"], f"cs_{number}", created, row["status"], row["customer"])


def page(web: Web, path: str, **parameters: object) -> tuple[list[str], str | None]:
    """Return the ids on a page and the cursor of the next."""
    query = "&".join(f"{name}={quote(str(value))}" for name, value in parameters.items() if value is not None)
    response = web.get(f"{path}?{query}")
    assert response.status_code == 200, response.text
    answer = response.json()
    return [row["id"] for row in answer["data"]], answer["next_cursor"]


def walk(web: Web, path: str, limit: int, **parameters: object) -> Iterator[list[str]]:
    """Yield the ids of each page."""
    cursor = None
    while True:
        ids, cursor = page(web, path, limit=limit, cursor=cursor, **parameters)
        yield ids
        if cursor is None:
            return


def is_problem(response: Any, status: int) -> bool:  # noqa: ANN401 - the client's answer
    """Return whether the answer is a problem document of *status*."""
    found = (response.status_code, response.headers["content-type"], response.json()["status"])
    return found == (status, "application/problem+json", status)


@pytest.mark.parametrize("status", [None, "paid"])
@pytest.mark.parametrize("limit", [1, 3, 20])
def test_order_pages(web: Web, limit: int, status: str | None) -> None:
    """The cursor visits every order once, newest first: same times by id, worlds apart, those without a time last.

    So it does among orders of another status, which it leaves out. Orders that are made while paging are newer, and do
    not disturb the pages.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - repeats the run
    rows = [(created, f"cs_{number}") for number, created in enumerate([None, None, 5, 5, 5, 7.123457, 7.123456, 9, 0])]
    for created, key in random.Random(seed).sample(rows, len(rows)):
        order(web, key.removeprefix("cs_"), created=created)
    order(web, "4", created=5, account="acct_1")
    order(web, "4", created=5, livemode=True)
    for number, created in enumerate([None, 0, 5, 5, 9, 90] if status else []):
        order(web, f"4_{number}", created=created, status="failed")
    seen = []
    for number, ids in enumerate(walk(web, "/v1/orders", limit, status=status)):
        seen += ids
        order(web, f"new_{number}", created=100 + number)

    assert seen == ["cs_7", "cs_5", "cs_6", "cs_4", "cs_4", "cs_4", "cs_3", "cs_2", "cs_8", "cs_1", "cs_0"]


def test_link_pages(web: Web) -> None:
    """Links without a creation time come last, and all are visited."""
    for number, created in enumerate([None, 1, None, 2, None]):
        web.query(LINK, f"plink_{number}", created)

    assert list(walk(web, "/v1/payment-links", 2)) == [["plink_3", "plink_1"], ["plink_4", "plink_2"], ["plink_0"]]


def test_event_pages(web: Web) -> None:
    """The inbox is visited once, last recorded first, while more is recorded."""
    for number in range(5):
        web.deliver(event(number))
    seen = []
    for number, ids in enumerate(walk(web, "/v1/events", 2)):
        seen += ids
        web.deliver(event(f"later_{number}"))

    assert seen == [f"evt_{number}" for number in (4, 3, 2, 1, 0)]


def test_filters(web: Web) -> None:
    """Filters select the matching rows, alone and together, and work with the cursor."""
    order(web, 1, created=1000, customer="cus_1")
    order(web, 2, created=2000, customer="cus_1", status="open")
    order(web, 3, created=3000, customer="cus_2", livemode=True)
    order(web, 4, created=4000, account="acct_1", customer="cus_1")
    orders = "/v1/orders"

    assert page(web, orders, status="open")[0] == ["cs_2"]
    assert page(web, orders, customer="cus_1", status="paid")[0] == ["cs_4", "cs_1"]
    assert page(web, orders, account="acct_1")[0] == ["cs_4"]
    assert page(web, orders, account="")[0] == ["cs_3", "cs_2", "cs_1"]
    assert page(web, orders, livemode="true")[0] == ["cs_3"]
    first, cursor = page(web, orders, customer="cus_1", limit=2)
    assert first == ["cs_4", "cs_2"]
    assert page(web, orders, customer="cus_1", limit=2, cursor=cursor) == (["cs_1"], None)
    half = {"created_from": "1970-01-01T00:33:20Z", "created_before": "1970-01-01T02:06:40+01:00"}
    assert page(web, orders, **half)[0] == ["cs_3", "cs_2"]
    assert page(web, orders, customer="nonsense' OR true --")[0] == []


def test_event_filters(web: Web) -> None:
    """The inbox can be filtered by type, state, cause, object, source, world and time, newest received first."""
    web.deliver(event(1, type="a.b", data={"object": {"object": "a", "id": "a_1"}}))
    web.deliver(event(2, type="a.c", account="acct_1", livemode=True))
    web.deliver(event(3))
    web.query("UPDATE inbox SET source = 'gap' WHERE id = 'evt_3'")
    web.query("UPDATE pending SET cause = 'database_busy' WHERE seq = (SELECT seq FROM inbox WHERE id = 'evt_2')")
    # As in a log that is replayed, the last recorded was not the last received.
    for number, minute in ((1, 2), (2, 3), (3, 1)):
        at = datetime(2026, 11, 1, 12, minute, tzinfo=UTC)
        web.query("UPDATE inbox SET received_at = %s WHERE id = %s", at, f"evt_{number}")
    events = "/v1/events"

    assert page(web, events)[0] == ["evt_2", "evt_1", "evt_3"]
    assert page(web, events, type="a.b")[0] == ["evt_1"]
    assert page(web, events, type="a.*")[0] == ["evt_2", "evt_1"]
    assert page(web, events, object_id="a_1", state="pending")[0] == ["evt_1"]
    assert page(web, events, state="parked")[0] == []
    assert page(web, events, cause="database_busy")[0] == ["evt_2"]
    assert page(web, events, source="gap")[0] == ["evt_3"]
    assert page(web, events, account="")[0] == ["evt_1", "evt_3"]
    assert page(web, events, livemode="true")[0] == ["evt_2"]
    assert page(web, events, livemode="false", account="acct_1")[0] == []
    within = {"received_from": "2026-11-01T13:01:00+01:00", "received_before": "2026-11-01T12:03:00Z"}
    assert page(web, events, **within)[0] == ["evt_1", "evt_3"]
    for wanted in ({}, {"state": "pending"}, {"type": "*"}, within):
        seen = [id_ for ids in walk(web, events, 1, **wanted) for id_ in ids]
        assert seen == page(web, events, **wanted)[0]
    far = base64.urlsafe_b64encode(b"[1000000,%d]" % 2**62).decode()
    assert page(web, events, cursor=far) == ([], None)
    beyond = base64.urlsafe_b64encode(b"[%d,1]" % 2**62).decode()
    assert is_problem(web.get(f"{events}?cursor={quote(beyond)}"), 422)


CURSORS = {
    "words": "hello",
    "not base64": "%%%",
    "not ASCII": "é",
    "empty": "",
    "other JSON": base64.urlsafe_b64encode(b"{}").decode(),
    "short": base64.urlsafe_b64encode(b'["1"]').decode(),
    "of other types": base64.urlsafe_b64encode(b"[1,2,3,4]").decode(),
    "no time": base64.urlsafe_b64encode(b'["now","a","b","true"]').decode(),
    "not a time": base64.urlsafe_b64encode(b'["nan","a","b","true"]').decode(),
    "end of time": base64.urlsafe_b64encode(b'["1e300","a","b","true"]').decode(),
    "infinite": base64.urlsafe_b64encode(b'["Infinity","a","b","true"]').decode(),
    "NUL": base64.urlsafe_b64encode(b'["1","a\\u0000","b","true"]').decode(),
    "true": base64.urlsafe_b64encode(b"[true]").decode(),
    "fraction": base64.urlsafe_b64encode(b"[1.5]").decode(),
    "too long": "A" * 1025,
}


@pytest.mark.parametrize("cursor", CURSORS.values(), ids=CURSORS.keys())
def test_bad_cursors(shared: Web, cursor: str) -> None:
    """A cursor that is not of this list is refused by name."""
    for path in LISTS:
        response = shared.get(f"{path}?cursor={quote(cursor)}")
        assert is_problem(response, 422)
        assert response.json()["errors"][0]["place"] == "query.cursor"


part = st.text(max_size=5) | st.integers() | st.floats() | st.none() | st.booleans()


@given(parts=st.lists(part, max_size=5) | st.tuples(st.text(max_size=5), st.text(), st.text(), st.text()))
@example(parts=[2**63])
@settings(max_examples=40)
def test_any_cursor(shared: Web, parts: list[object]) -> None:
    """Any cursor is answered with a page or with a refusal."""
    cursor = base64.urlsafe_b64encode(msgspec.json.encode(parts)).decode()

    assert {shared.get(f"{path}?cursor={cursor}").status_code for path in LISTS} <= {200, 422}


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=x",
        "livemode=maybe",
        "account=%00",
        "status=a%00b",
        f"customer={'x' * 256}",
        "created_from=yesterday",
        "created_from=0.5",
        "created_before=1793491200",
        "created_from=2026-11-01T00:00:00",
    ],
)
def test_bad_values(shared: Web, query: str) -> None:
    """An impossible value is refused with the name of its parameter."""
    response = shared.get(f"/v1/orders?{query}")

    assert is_problem(response, 422)
    assert response.json()["errors"][0]["place"] == f"query.{query.partition('=')[0]}"


@pytest.mark.parametrize("path", SINGLES)
def test_not_there(shared: Web, path: str) -> None:
    """An unknown id is a 404, and an impossible id is refused."""
    assert is_problem(shared.get(path.format("x_1"), OPERATOR), 404)
    assert is_problem(shared.get(path.format("a%FFb"), OPERATOR), 404)
    assert is_problem(shared.get(path.format("a%00b"), OPERATOR), 422)
    assert is_problem(shared.get(path.format("x" * 300), OPERATOR), 422)


def test_single(web: Web) -> None:
    """One order is shown by its id; if two accounts have it the request must name one."""
    order(web, 1)
    assert web.get("/v1/orders/cs_1").json()["status"] == "paid"

    order(web, 1, account="acct_1", status="open")
    order(web, 1, livemode=True, status="expired")
    refused = web.get("/v1/orders/cs_1")
    assert is_problem(refused, 409)
    assert "account=" in refused.json()["detail"]
    assert web.get("/v1/orders/cs_1?account=acct_1").json()["status"] == "open"
    assert web.get("/v1/orders/cs_1?account=&livemode=true").json()["status"] == "expired"


def test_payload(web: Web) -> None:
    """A token of the scope personal is shown an event with its payload as it was sent."""
    body = event(name="a\0b").replace(b"a\\u0000b", b"\\ud800 \xc3\xa9")
    web.deliver(body)
    shown = web.get("/v1/events/evt_1", CLERK).json()

    assert shown["payload"].encode() == body
    assert shown["state"] == "pending"
    assert "payload" not in web.get("/v1/events").json()["data"][0]


def test_archived_payload(web: Web) -> None:
    """An archived event is shown without its payload, and marked as archived."""
    web.deliver(event())
    at_hand = web.get("/v1/events/evt_1", CLERK).json()
    web.query("DELETE FROM payloads")

    shown = web.get("/v1/events/evt_1", CLERK)

    assert shown.status_code == 200
    assert shown.json() == at_hand | {"payload": None, "archived": True}
    assert at_hand["archived"] is False


@pytest.mark.parametrize("path", ["/v1/nothing", "/nothing", "/v1/orders/", "/v1", "/.env", "/v1//nothing"])
def test_unknown_route(shared: Web, path: str) -> None:
    """An unknown path is answered with a problem document."""
    response = shared.client.get(path, follow_redirects=True)

    assert response.status_code in {404, 401}
    assert response.headers["content-type"] == "application/problem+json"


class Named(BaseModel):
    """An answer with a field that may be left out."""

    name: str | None = None
    email: str | None = None


def test_the_status_and_headers_of_a_route() -> None:
    """A route that has a status of its own, or sets headers, answers with them, and with no field that is not set."""
    app, router = FastAPI(), APIRouter(route_class=Route)

    @router.get("/plain")
    def plain() -> Named:
        return Named(name="A")

    @router.get("/accepted", status_code=202)
    def accepted() -> Named:
        return Named(name="A")

    @router.get("/dated")
    def dated(response: Response) -> Named:
        response.headers["last-modified"] = "Mon, 30 Nov 2026 00:00:00 GMT"
        return Named(name="A")

    app.include_router(router)

    async def answers() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop.example") as client:
            return [await client.get(path) for path in ("/plain", "/accepted", "/dated")]

    found = asyncio.run(answers())

    assert [each.status_code for each in found] == [200, 202, 200]
    assert [each.text for each in found] == ['{"name":"A"}'] * 3
    assert {each.headers["content-type"] for each in found} == {"application/json"}
    assert found[2].headers["last-modified"] == "Mon, 30 Nov 2026 00:00:00 GMT"


def test_wrong_method(shared: Web) -> None:
    """A wrong method is answered with a problem document that names the right one."""
    response = shared.client.post("/v1/orders")

    assert is_problem(response, 405)
    assert response.headers["allow"] == "GET"


def test_documentation(shared: Web) -> None:
    """The page of the API loads every file from Payfold itself."""
    html = shared.client.get("/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', html)

    assert len(loaded) >= 3
    assert "//" not in "".join(loaded)
    assert not re.search(r"https?://|//[a-z]", html.replace("window.location.protocol + '//'", ""))
    assert {shared.client.get(path).status_code for path in loaded} == {200}


def test_openapi(shared: Web) -> None:
    """The OpenAPI description has the webhook, with each of its answers."""
    operation = shared.client.get("/openapi.json").json()["paths"]["/webhooks/stripe"]["post"]

    assert set(operation["responses"]) == {"200", "400", "408", "413", "503"}


def test_hanging(web: Web) -> None:
    """While a lock is held requests are answered in time, also the one for readiness."""
    with psycopg.connect(web.settings.libpq) as blocker, ThreadPoolExecutor(20) as readers:
        blocker.execute("LOCK TABLE orders, alembic_version IN ACCESS EXCLUSIVE MODE")
        paths = [*["/v1/orders"] * 4, "/health/ready"]
        started = time.monotonic()

        assert [response.status_code for response in readers.map(web.get, paths)] == [503] * 5
        assert time.monotonic() - started < 20
        blocker.rollback()
    assert web.get("/v1/orders").status_code == 200
