"""The OpenAPI page and /docs: their declarations, and the page's content security policy."""

import re
from collections.abc import Iterator
from typing import Any, Final

import pytest

from api import problems
from deploy.local.services import Services
from schemas import answers, status
from tests.browser import chromium
from tests.web import TOKENS, Web, serving_many

PROBLEM: Final = "application/problem+json"
READS: Final = {401, 403, 422, 503}
ONE: Final = READS | {404, 409}
FAULTS: Final = {
    # The problem documents of each operation.
    "list_orders": READS,
    "show_order": ONE,
    "list_payment_links": READS,
    "show_payment_link": ONE,
    "list_invoices": READS,
    "list_credit_notes": READS,
    "show_credit_note": ONE,
    "list_refunds": READS,
    "list_portal_configurations": READS,
    "list_portal_sessions": READS,
    "list_expiring_orders": READS,
    "list_customers": READS,
    "show_customer": ONE,
    "show_balance": READS | {404},
    "list_anomalies": READS,
    "list_events": READS,
    "list_parked": READS,
    "show_event": ONE,
    "trace_event": ONE,
    "retry_events": READS | {409},
    "retry_event": ONE,
    "ignore_event": ONE | {408, 413},
    "find": READS,
    "summarize": READS,
    "summarize_days": READS,
    "show_funnel": READS,
    "explain_order": ONE,
    "show_related": ONE,
    "explain_credit_note": ONE,
    "explain_payment_link": ONE,
    "explain_customer": ONE,
    "list_changes": READS | {410},
    "list_reconciliations": READS,
    "show_reconciliation": READS | {404},
    "show_report": READS | {404, 409, 410},
    "ask_for_reconciliation": READS | {409},
    "show_status": READS,
    "register_order": READS | {408, 413},
    "expire_order": ONE | {502},
    "read_order": ONE | {502},
    "create_portal_session": ONE | {408, 413, 502},
    "take_delivery": {400, 408, 413, 503},
    "show_metrics": READS,
    "live": set[int](),
    "ready": set[int](),
}


@pytest.fixture(scope="module")
def web(services: Services) -> Iterator[Web]:
    """Return a running web process."""
    with serving_many(services) as running:
        yield running


@pytest.fixture(scope="module")
def page(web: Web) -> dict[str, Any]:
    """Return the OpenAPI page."""
    found: dict[str, Any] = web.client.get("/openapi.json").json()
    return found


def operations(page: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every operation of the page."""
    return [operation for methods in page["paths"].values() for operation in methods.values()]


def test_short_names(page: dict[str, Any]) -> None:
    """Each operation has a unique name of a verb and a noun."""
    names = [operation["operationId"] for operation in operations(page)]

    assert sorted(names) == sorted(FAULTS)


def test_problems_are_declared(page: dict[str, Any]) -> None:
    """Each operation declares its failures as problem documents, and FastAPI's own error schema is not used."""
    found = {
        operation["operationId"]: {
            int(status): answer["content"].keys()
            for status, answer in operation["responses"].items()
            if PROBLEM in answer.get("content", {})
        }
        for operation in operations(page)
    }

    assert found == {name: dict.fromkeys(statuses, {PROBLEM: 0}.keys()) for name, statuses in FAULTS.items()}
    assert "HTTPValidationError" not in str(page)
    assert page["components"]["schemas"]["Problem"]["required"] == ["type", "title", "status", "detail"]


def test_every_reference_leads_somewhere(page: dict[str, Any]) -> None:
    """Every reference of the page leads to an entry of the page."""
    wanted = set(re.findall(r"#/components/schemas/(\w+)", str(page)))

    assert wanted <= page["components"]["schemas"].keys()


def test_a_problem_is_as_declared(web: Web, page: dict[str, Any]) -> None:
    """A refusal has exactly the members of the declared schema."""
    schemas = page["components"]["schemas"]
    for refused in (web.client.get("/v1/orders"), web.get("/v1/orders?limit=0"), web.get("/v1/orders/none")):
        problem = refused.json()
        assert set(schemas["Problem"]["required"]) <= problem.keys() <= schemas["Problem"]["properties"].keys()
        for fault in problem.get("errors", ()):
            assert fault.keys() == schemas["InvalidValue"]["properties"].keys()


def test_a_name_has_one_schema() -> None:
    """No schema of a problem document has the name of an answer, which it would replace on the page."""
    of_answers = {name for module in (answers, status) for name in vars(module)}

    assert not problems.SCHEMAS.keys() & of_answers


def test_policy(web: Web) -> None:
    """The page may load only from our server, and runs only the bundle and the script that starts it."""
    answer = web.client.get("/docs")
    policy = dict(each.split(" ", 1) for each in answer.headers["content-security-policy"].split("; "))

    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert re.fullmatch(r"'self' 'sha256-[A-Za-z0-9+/]{43}='", policy["script-src"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "cache-control" not in answer.headers


@pytest.mark.browser
def test_the_page_works(web: Web) -> None:
    """In a browser the page shows every operation, accepts a token, calls the API, and violates no policy."""
    printed: list[str] = []
    asked: list[str] = []
    with chromium() as browser:
        opened = browser.new_page()
        opened.set_default_timeout(120_000)  # a busy machine draws slowly
        opened.on("console", lambda message: printed.append(message.text))
        opened.on("pageerror", lambda error: printed.append(str(error)))
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(f"{web.client.base_url}/docs")
        opened.click(".btn.authorize")
        opened.fill(".auth-container input", TOKENS["read"])
        opened.click(".auth-btn-wrapper button.authorize")
        opened.click(".auth-btn-wrapper .btn-done")
        shown = opened.locator(".opblock").count()
        orders = "#operations-orders-list_orders"
        for button in ("button.opblock-summary-control", ".try-out button", "button.execute"):
            opened.click(f"{orders} {button}")
        status = opened.inner_text(f"{orders} .live-responses-table tbody .response-col_status")

    assert (shown, status.split()) == (len(FAULTS), ["200"])
    assert printed == []
    assert [each for each in asked if not each.startswith((str(web.client.base_url), "data:"))] == []
