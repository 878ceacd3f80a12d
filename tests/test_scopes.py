"""Each scope opens its routes, and only the scope ``personal`` gets personal data."""

import ast
import re
import typing
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import httpx
import psycopg
import pytest
from psycopg.types.json import Jsonb
from pydantic import BaseModel
from sqlalchemy import Column, Table
from sqlalchemy.dialects.postgresql import JSONB

from deploy.local.services import Services
from schemas import answers, database, kinds, reconciliations, status, tables
from schemas.answers import Audience
from schemas.reconciliations import REBUILD, RULES
from tests.web import TOKENS, Web, bearer, event, migrated_database, serving, settings_of
from worker.proof import reconcile
from worker.proof.reconcile import ReconcileRequest

NAME: Final = "x_1"
"""The id of every planted row, and of every row that it refers to."""
MARK: Final = "planted"
PERSONAL: Final = {
    "orders": ["customer_email", "recovery_url", "shipping", "metadata"],
    "order_lines": ["description"],
    "payment_links": ["metadata"],
    "customers": ["email", "name", "metadata"],
    "credit_notes": ["memo"],
    "credit_note_lines": ["description"],
    "balance_transactions": ["description"],
    "portal_sessions": ["return_url"],
}
READ, REGISTER, ADMIN = "read", "register", "admin"
ROUTES: Final = {
    # The scope that opens the route, and the answer.
    "GET /v1/orders": (READ, 200),
    "GET /v1/orders/{order_id}": (READ, 200),
    "GET /v1/payment-links": (READ, 200),
    "GET /v1/payment-links/{link_id}": (READ, 200),
    "GET /v1/invoices": (READ, 200),
    "GET /v1/credit-notes": (READ, 200),
    "GET /v1/credit-notes/{note_id}": (READ, 200),
    "GET /v1/refunds": (READ, 200),
    "GET /v1/portal/configurations": (READ, 200),
    "GET /v1/portal/sessions": (READ, 200),
    "GET /v1/orders/expiring": (READ, 200),
    "GET /v1/customers": (READ, 200),
    "GET /v1/customers/{customer_id}": (READ, 200),
    "GET /v1/customers/{customer_id}/balance": (READ, 200),
    "GET /v1/anomalies": (READ, 200),
    "GET /v1/events": (READ, 200),
    "GET /v1/events/parked": (READ, 200),
    "GET /v1/events/{event_id}": (READ, 200),
    "GET /v1/events/{event_id}/trace": (READ, 200),
    "GET /v1/changes": (READ, 200),
    "GET /v1/search": (READ, 200),
    "GET /v1/summary": (READ, 200),
    "GET /v1/summary/days": (READ, 200),
    "GET /v1/funnel": (READ, 200),
    "GET /v1/orders/{order_id}/explanation": (READ, 200),
    "GET /v1/orders/{order_id}/related": (READ, 200),
    "GET /v1/payment-links/{link_id}/explanation": (READ, 200),
    "GET /v1/credit-notes/{note_id}/explanation": (READ, 200),
    "GET /v1/customers/{customer_id}/explanation": (READ, 200),
    "GET /v1/reconciliations": (READ, 200),
    "GET /v1/reconciliations/{number}": (READ, 200),
    "GET /v1/reconciliations/{number}/report": (READ, 200),
    "GET /v1/status": (READ, 200),
    "GET /metrics": (READ, 200),
    "PUT /v1/orders/{order_id}": (REGISTER, 200),
    # The order is paid; no key serves this account; and one waits already.
    "POST /v1/orders/{order_id}/expire": (ADMIN, 409),
    "POST /v1/orders/{order_id}/read": (ADMIN, 409),
    "POST /v1/customers/{customer_id}/portal-sessions": (ADMIN, 409),
    "POST /v1/reconciliations": (ADMIN, 409),
    "POST /v1/events/retry": (ADMIN, 200),
    # The event is ignored already.
    "POST /v1/events/{event_id}/retry": (ADMIN, 409),
    "POST /v1/events/{event_id}/ignore": (ADMIN, 409),
}
OPENED: Final = {"read": {READ}, "personal": set[str](), "register": {READ, REGISTER}, "admin": {READ, REGISTER, ADMIN}}
"""The scopes that each scope includes: admin register, register read; none includes personal."""
OPEN: Final = {"/webhooks/stripe", "/health/live", "/health/ready"}


def mark(table: str, column: str) -> str:
    """Return the value that is planted only in this column."""
    return f"{MARK}-{table}-{column}"


def planted(table: Table, column: Column[Any]) -> object:
    """Return the value planted in *column*: a mark if it holds personal data, else a minimal value."""
    text = mark(table.name, column.name)
    if column.name in PERSONAL.get(table.name, ()):
        return Jsonb({"note": text}) if isinstance(column.type, JSONB) else text
    match column.name:
        case "account":
            return ""
        case "currency":
            return "usd"
        case "status" if table is tables.orders:
            return "paid"
    values: dict[type, object] = {str: NAME, bool: False, int: 1, datetime: datetime.fromisoformat("2026-11-01T00Z")}
    return Jsonb({}) if isinstance(column.type, JSONB) else values[column.type.python_type]


def plant(web: Web) -> None:
    """Fill a row of each projection, and record an event, with a mark in every personal field."""
    with psycopg.connect(web.settings.libpq, autocommit=True) as connection:
        for table in tables.PROJECTIONS:
            names = [column.name for column in table.columns]
            row = [planted(table, column) for column in table.columns]
            query = f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({', '.join(['%s'] * len(row))})"  # noqa: S608
            connection.execute(query.encode(), row)
    body = event(data={"object": {"email": mark("payloads", "payload")}}, id=NAME)
    assert web.deliver(body).status_code == 200
    ignored = "INSERT INTO outcomes SELECT seq, 'ignored', %s, 1, now(), 1, 'set_aside' FROM inbox WHERE id = %s"
    web.query(ignored, mark("outcomes", "reason"), NAME)
    web.query("DELETE FROM pending")
    # As they are with a row in each table: a row of the projections differs from what its event gives.
    engine = database.engine(web.settings.postgresql)
    reconcile.run(engine, (RULES, REBUILD), ReconcileRequest())
    with database.transaction(engine) as opened, database.cursor(opened) as cursor:
        reconciliations.ask(cursor, [RULES], by="a test")
    engine.dispose()


@pytest.fixture(scope="module")
def web(services: Services) -> Iterator[Web]:
    """Return a running web process on tables with a mark in every personal field."""
    with migrated_database(services) as url, serving(settings_of(url, services.redis_url)) as running:
        plant(running)
        yield running


def ask(web: Web, route: str, token: str) -> httpx.Response:
    """Request *route* with the token of the scopes *token*."""
    method, path = route.split(" ")
    session = {
        "object": "checkout.session",
        "id": NAME,
        "status": "open",
        "payment_status": "unpaid",
        "mode": "payment",
    }
    more = {"livemode": False, "created": 0, "expires_at": 1, "metadata": {"note": mark("put", "metadata")}}
    posted = {"reason": mark("posted", "reason")} if path.endswith("/ignore") else {}
    json = {"GET": None, "PUT": {**session, **more}, "POST": posted}[method]
    address = re.sub(r"{\w+}", NAME, path.replace("{number}", "1")) + ("?q=" + NAME if path.endswith("/search") else "")
    return web.client.request(method, address, headers=bearer(TOKENS[token]), json=json)


@pytest.fixture(scope="module")
def walked(web: Web) -> dict[str, dict[str, httpx.Response]]:
    """Return by token the answer of each route of the OpenAPI page."""
    listed = web.client.get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in listed.items() if path not in OPEN for method in methods}
    assert routes == ROUTES.keys(), "a route is declared here with the scope that opens it"
    ask(web, "PUT /v1/orders/{order_id}", "register")  # so that the order exists, and each token puts it again
    return {token: {route: ask(web, route, token) for route in ROUTES} for token in TOKENS}


@pytest.mark.parametrize("token", TOKENS)
def test_a_scope_opens_its_routes(walked: dict[str, dict[str, httpx.Response]], token: str) -> None:
    """Every route answers the scopes that open it, and answers all others with 403."""
    opened = set[str]().union(*(OPENED[scope] for scope in token.split("+")))

    answered = {route: response.status_code for route, response in walked[token].items()}

    assert answered == {route: status if scope in opened else 403 for route, (scope, status) in ROUTES.items()}


@pytest.mark.parametrize("token", [token for token in TOKENS if "+" not in token])
def test_personal_data_is_left_out(walked: dict[str, dict[str, httpx.Response]], token: str) -> None:
    """No answer to a token of one scope has a personal value: the fields are absent, and not null."""
    texts = {route: response.text for route, response in walked[token].items()}

    assert {route: text for route, text in texts.items() if MARK in text} == {}
    names = {name for columns in PERSONAL.values() for name in columns} - {"name"} | {"payload", "reason"}
    for route in (
        "/v1/orders",
        "/v1/customers",
        "/v1/payment-links",
        "/v1/credit-notes",
        "/v1/portal/sessions",
        "/v1/events",
    ):
        if token != "personal":
            (row,) = [row for row in walked[token][f"GET {route}"].json()["data"] if row["id"] == NAME]
            assert row.keys() & names == ({"reason"} if route == "/v1/credit-notes" else set()), route


def test_personal_data_is_there(walked: dict[str, dict[str, httpx.Response]]) -> None:
    """With a token of the scopes read and personal the reading routes show every personal value."""
    shown = set(re.findall(rf"{MARK}-\w+-\w+", "".join(response.text for response in walked["read+personal"].values())))

    expected = {mark(table, name) for table, names in PERSONAL.items() for name in names}
    # The session that was put is an event, whose payload no route returns here.
    assert shown == expected | {mark("payloads", "payload"), mark("outcomes", "reason")}


def test_filters_by_personal_data(web: Web) -> None:
    """A filter by personal data needs the scope, since its answer would show whether the value exists."""
    paths = [f"/v1/orders?customer_email={mark('orders', 'customer_email')}"]
    paths += [f"/v1/customers?email={mark('customers', 'email').upper()}"]

    for path in paths:
        for token in ("read", "admin"):
            refused = web.get(path, bearer(TOKENS[token]))
            assert (refused.status_code, refused.headers["content-type"]) == (403, "application/problem+json")
            assert "personal" in refused.json()["detail"]
        assert [row["id"] for row in web.get(path, bearer(TOKENS["read+personal"])).json()["data"]] == [NAME]


def test_headers(web: Web, walked: dict[str, dict[str, httpx.Response]]) -> None:
    """Every answer, refusals included, forbids caching and content sniffing."""
    answered = [response for responses in walked.values() for response in responses.values()]
    answered += [web.client.get("/v1/orders"), web.client.get("/v1/none"), web.get("/v1/orders?limit=x")]
    answered += [web.get("/v1/orders/none"), web.client.delete("/v1/orders"), web.client.get("/health/live")]

    assert {response.status_code for response in answered} == {200, 401, 403, 404, 405, 409, 422}
    for response in answered:
        assert response.headers.get_list("cache-control") == ["no-store"]
        assert response.headers.get_list("x-content-type-options") == ["nosniff"]


# ---- Declarations ----


def models(base: type[BaseModel]) -> set[type[BaseModel]]:
    """Return every model that is derived from *base*."""
    return {base}.union(*(models(each) for each in base.__subclasses__()))


ANSWERS: Final = sorted(models(answers.Answer) - {status.Health}, key=lambda model: model.__name__)
"""The answers that need a token; the health is answered without one."""


def undeclared(kind: object) -> bool:
    """Return whether *kind*, the annotation of a field, holds a text that is not declared."""
    if typing.get_origin(kind) is typing.Annotated:
        inner, *marks = typing.get_args(kind)
        return not any(isinstance(each, Audience) for each in marks) and undeclared(inner)
    return kind in (str, Any) or any(undeclared(each) for each in typing.get_args(kind))


@pytest.mark.parametrize("model", ANSWERS)
def test_every_text_is_declared(model: type[BaseModel]) -> None:
    """Each field that holds text, or JSON, is declared as public or personal, also a new one."""
    kinds = typing.get_type_hints(model, include_extras=True)

    assert [name for name in model.model_fields if undeclared(kinds[name])] == []


@pytest.mark.parametrize("table", PERSONAL)
def test_the_columns_are_declared(table: str) -> None:
    """The columns with planted marks are those that the models declare as personal."""
    shown = {"orders": answers.OrderWithLines, "order_lines": answers.OrderLine, "payment_links": answers.PaymentLink}
    shown |= {"credit_notes": answers.CreditNoteWithLines, "credit_note_lines": answers.CreditNoteLine}
    shown |= {"balance_transactions": answers.BalanceTransaction, "portal_sessions": answers.PortalSession}
    shown |= {"customers": answers.Customer}
    assert answers.personal_fields(shown[table]) == set(PERSONAL[table])


def test_a_text_that_is_not_declared() -> None:
    """The test above finds an undeclared text at any place in an annotation."""
    for kind in (str, str | None, list[str], dict[str, Any] | None, list[dict[str, int]], Any):
        assert undeclared(kind)
    for declared in (
        answers.Id | None,
        typing.Annotated[str | None, answers.PERSONAL],
        answers.OrderStatus,
        list[answers.Order],
        int | None,
    ):
        assert not undeclared(declared)


# ---- Payfold's own enumerations ----


def calls(name: str) -> Iterator[ast.Call]:
    """Yield every call of *name* in the worker."""
    for path in (Path(__file__).parents[1] / "worker").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                yield node


def test_every_kind_of_anomaly_is_listed() -> None:
    """The list has each kind that a fold or the join finds, and no other."""
    from worker.folds import credit_note, join  # noqa: PLC0415 - their constants alone

    first = [call.args[0] for call in calls("Anomaly")]
    named = {**vars(credit_note), **vars(join)}
    found = {each.value if isinstance(each, ast.Constant) else named[ast.unparse(each)] for each in first}

    assert found == set(tables.ANOMALY_KINDS)


def test_every_kind_of_anomaly_has_a_meaning() -> None:
    """Each kind is explained in sentences, and nothing else is."""
    assert tables.ANOMALY_MEANINGS.keys() == set(tables.ANOMALY_KINDS)
    assert all(meaning[0].isupper() and meaning.endswith(".") for meaning in tables.ANOMALY_MEANINGS.values())


def test_every_subject_of_an_anomaly_is_listed() -> None:
    """The list has the subject of each row spec."""
    named = [each.value for call in calls("RowSpec") for each in call.keywords if each.arg == "subject"]
    found = {each.value for each in named if isinstance(each, ast.Constant)}

    # An event has no row spec, but its copies may contradict each other.
    assert found | {"event"} == set(tables.ANOMALY_SUBJECTS)


def test_the_lists_are_on_the_page(web: Web) -> None:
    """The OpenAPI page lists the values of Payfold's own enumerations, and none of Stripe's."""
    schemas = web.client.get("/openapi.json").json()["components"]["schemas"]

    def listed(model: str, field: str) -> object:
        schema = schemas[model]["properties"][field]
        return schema.get("enum") or next((each["enum"] for each in schema.get("anyOf", ()) if "enum" in each), None)

    assert listed("Order", "status") == ["open", "processing", "paid", "failed", "expired", "complete"]
    assert listed("Order", "refund_status") == ["none", "partial", "full"]
    assert listed("Event", "state") == ["pending", "folded", "ignored", "parked"]
    assert listed("Event", "source") == listed("Change", "source") == ["webhook", "replay", "gap", "observation"]
    assert listed("Event", "cause") == list(tables.CAUSES)
    assert listed("Change", "kind") == list(kinds.KINDS)
    assert listed("Change", "subject") == ["balance", "credit_note", "dispute", "invoice", "order", "payment_link"]
    assert listed("Anomaly", "kind") == list(tables.ANOMALY_KINDS)
    assert listed("Anomaly", "subject") == list(tables.ANOMALY_SUBJECTS)
    assert listed("Invoice", "status") is listed("Order", "payment_status") is None
    assert schemas["Order"]["properties"]["customer_email"]["x-payfold-scope"] == "personal"
    assert "customer_email" not in schemas["Order"]["required"]
