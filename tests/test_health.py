"""Whether the process runs, and whether it can take deliveries."""

from collections.abc import Iterator

import psycopg
import pytest

from deploy.services import Postgres, Valkey
from schemas.migrate import upgrade
from tests.web import Web, serving, settings_of, until

WELL = {"ready": True, "database": "ok", "migrations": "ok", "broker": "ok", "stripe": "no key"}


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


def test_ready(web: Web) -> None:
    """With everything there the process is alive and ready."""
    assert web.get("/health/live", {}).json() == {"status": "alive"}
    assert (web.get("/health/ready", {}).status_code, web.get("/health/ready", {}).json()) == (200, WELL)


@pytest.mark.parametrize("undo", ["DROP TABLE alembic_version", "DELETE FROM alembic_version"])
def test_behind(web: Web, undo: str) -> None:
    """A schema that is behind is not ready."""
    with psycopg.connect(web.settings.libpq) as connection:
        connection.execute(undo.encode())
    response = web.get("/health/ready", {})

    assert (response.status_code, response.json()) == (503, WELL | {"ready": False, "migrations": "pending"})


def test_ahead(web: Web) -> None:
    """While a newer release has migrated and not yet replaced this one, this one goes on being ready."""
    web.query("UPDATE alembic_version SET version_num = '9999'")

    assert web.get("/health/ready", {}).json() == WELL


def test_database_away(own_postgres: Postgres, redis_url: str) -> None:
    """Without PostgreSQL the process is alive and not ready, and is ready again when it is back."""
    upgrade(own_postgres.url)
    with serving(settings_of(own_postgres.url, redis_url)) as web:
        own_postgres.stop()
        response = web.get("/health/ready", {})
        assert response.status_code == 503
        assert response.json() == WELL | {"ready": False, "database": "away", "migrations": "unknown"}
        assert web.get("/health/live", {}).status_code == 200
        refused = web.get("/v1/orders")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")

        own_postgres.start()
        until(lambda: web.get("/health/ready", {}).json() == WELL)


def test_broker_away(database_url: str, own_valkey: Valkey) -> None:
    """Without Redis the process is ready all the same, and says so."""
    with serving(settings_of(database_url, own_valkey.url)) as web:
        own_valkey.stop()
        response = web.get("/health/ready", {})

        assert (response.status_code, response.json()) == (200, WELL | {"broker": "away"})
