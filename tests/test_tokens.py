"""Every closed route needs a bearer token of its scope."""

from collections.abc import Iterator

import pytest

from deploy.local.services import Services
from tests.web import TOKENS, Web, bearer, serving, serving_many, settings_of

OPEN = {"/webhooks/stripe", "/health/live", "/health/ready"}


@pytest.fixture(scope="module")
def shared(services: Services) -> Iterator[Web]:
    """Return a running web process for the tests that change no data."""
    with serving_many(services) as running:
        yield running


def closed_routes(web: Web) -> list[tuple[str, str]]:
    """Return the method and the path of every route that needs a token."""
    paths = web.client.get("/openapi.json").json()["paths"]
    assert paths.keys() >= OPEN
    routes = [
        (method.upper(), path.replace("{", "").replace("}", ""))
        for path, methods in paths.items()
        for method in methods
        if path not in OPEN
    ]
    assert {method for method, _ in routes} == {"GET", "POST", "PUT"}
    return sorted(routes)


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
    """Without a known token every route but the webhook and health refuses, and names the way to authenticate."""
    for method, path in closed_routes(shared):
        response = shared.client.request(method, path, headers=headers)
        assert (method, path, response.status_code) == (method, path, 401)
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["content-type"] == "application/problem+json"


def test_none_configured(database_url: str, redis_url: str) -> None:
    """Without configured tokens no request is accepted, not even with an empty token."""
    with serving(settings_of(database_url, redis_url, PAYFOLD_TOKENS="")) as web:
        for method, path in closed_routes(web):
            for headers in ({}, {"Authorization": "Bearer"}, bearer(TOKENS["admin"])):
                assert web.client.request(method, path, headers=headers).status_code == 401
        assert "payfold tokens new" in web.client.get("/v1/orders").json()["detail"]
