"""Who may ask what: a bearer token of the scope, or nothing."""

from collections.abc import Iterator

import pytest

from deploy.services import Services
from tests.web import TOKENS, Web, bearer, serving, serving_many, settings_of

OPEN = {"/webhooks/stripe", "/health/live", "/health/ready"}


@pytest.fixture(scope="module")
def shared(services: Services) -> Iterator[Web]:
    """Return a running web process for the tests that leave nothing behind."""
    with serving_many(services) as running:
        yield running


def closed_paths(web: Web) -> list[str]:
    """Return every path that wants a token."""
    paths = set(web.client.get("/openapi.json").json()["paths"])
    assert paths >= OPEN
    return sorted(path.replace("{", "").replace("}", "") for path in paths - OPEN)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        bearer("unknown"),
        bearer("a-reade"),
        {"Authorization": "Basic YS1yZWFkZXI6"},
        {"Authorization": b"Bearer \xff"},
        {"Authorization": TOKENS["admin"]},
    ],
    ids=str,
)
def test_no_token(shared: Web, headers: dict[str, str]) -> None:
    """Without a known token everything is closed but the webhook and the health routes, and says how to ask."""
    for path in closed_paths(shared):
        response = shared.client.get(path, headers=headers)
        assert (path, response.status_code) == (path, 401)
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["content-type"] == "application/problem+json"


def test_none_configured(database_url: str, redis_url: str) -> None:
    """Where no token is configured nobody is let in, not even with an empty one."""
    with serving(settings_of(database_url, redis_url, PAYFOLD_TOKENS="")) as web:
        for path in closed_paths(web):
            for headers in ({}, {"Authorization": "Bearer"}, bearer(TOKENS["admin"])):
                assert web.client.get(path, headers=headers).status_code == 401
        assert "payfold tokens new" in web.client.get("/v1/orders").json()["detail"]


@pytest.mark.parametrize("scope", ["read", "register", "admin"])
def test_scopes(shared: Web, scope: str) -> None:
    """Every scope reads; only an operator sees payloads."""
    headers = bearer(TOKENS[scope])

    assert shared.get("/v1/orders", headers).status_code == 200
    assert shared.get("/v1/changes", headers).status_code == 200
    assert shared.get("/metrics", headers).status_code == 200
    assert shared.get("/v1/events/evt_1", headers).status_code == (404 if scope == "admin" else 403)
