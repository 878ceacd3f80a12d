"""What becomes of deliveries is counted for all web processes together, and the counts outlast each of them."""

import re
from datetime import UTC, datetime, timedelta

from deploy.services import Postgres
from schemas.migrate import upgrade
from tests.faults import paused
from tests.web import PATH, READER, Web, event, serving, settings_of, signed, until

ANSWER_SECONDS_MAX = 10.0
COUNTS = "SELECT outcome, reason, count FROM delivery_counts ORDER BY outcome, reason"


def metrics(web: Web) -> list[str]:
    """Return what `/metrics` shows of all processes, without the comments and without what is one process's own."""
    text = web.client.get("/metrics", headers=READER, timeout=ANSWER_SECONDS_MAX).text
    return [line for line in text.splitlines() if "instance=" not in line and not line.startswith("#")]


def refuse(web: Web) -> None:
    """Send a delivery that nobody signed."""
    assert web.client.post(PATH, content=event()).status_code == 400


def test_outlasts_its_process(database_url: str, redis_url: str) -> None:
    """Deliveries and refusals are counted on from where the process before was, and once each."""
    settings = settings_of(database_url, redis_url)
    began_at = datetime.now(UTC) - timedelta(seconds=1)
    with serving(settings) as web:
        refuse(web)
        assert web.deliver(event(1)).status_code == 200
    with serving(settings) as web:
        assert web.query(COUNTS) == [("new", "", 1), ("refused", "signature_missing", 1)]
        assert [web.deliver(event(1)).status_code for _ in range(2)] == [200, 200]
        refuse(web)
        assert 'payfold_deliveries_refused_total{reason="signature_missing"} 2.0' in metrics(web)
        assert 'payfold_deliveries_total{outcome="duplicate"} 2.0' in metrics(web)
        times = web.query("SELECT since, last_at FROM delivery_counts ORDER BY outcome, reason")
        assert all(began_at < since <= last_at <= datetime.now(UTC) for since, last_at in times)
        assert [since < last_at for since, last_at in times] == [False, False, True]


def test_alike(database_url: str, redis_url: str) -> None:
    """Every web process answers with the counts of all of them, and with what is its own under its name."""
    settings = settings_of(database_url, redis_url)
    with serving(settings) as one, serving(settings) as other:
        for number, web in enumerate([one, one, other]):
            assert web.deliver(event(number)).status_code == 200
        refuse(other)
        metrics(one)
        shown = metrics(other)

        assert shown == metrics(one)
        assert 'payfold_deliveries_total{outcome="new"} 3.0' in shown
        assert 'payfold_deliveries_refused_total{reason="signature_missing"} 1.0' in shown


def test_nothing_new(database_url: str, redis_url: str) -> None:
    """Where nothing was counted nothing is written."""
    with serving(settings_of(database_url, redis_url)) as web:
        refuse(web)
        metrics(web)
        written = web.query("SELECT ctid, xmin FROM delivery_counts")
        metrics(web)

        assert len(written) == 1
        assert web.query("SELECT ctid, xmin FROM delivery_counts") == written


def test_away(own_postgres: Postgres, redis_url: str) -> None:
    """While PostgreSQL is away counts are kept, and written by themselves once it is back; metrics are answered."""
    upgrade(own_postgres.url)
    with serving(settings_of(own_postgres.url, redis_url), answer_seconds_max=0.5) as web:
        with paused(own_postgres):
            assert web.deliver(event(1)).status_code == 503
            assert metrics(web) == ["payfold_database_up 0.0"]
        own_postgres.stop()
        refuse(web)
        assert metrics(web) == ["payfold_database_up 0.0"]
        text = web.client.get("/metrics", headers=READER).text
        assert re.search(r'^payfold_deliveries_unwritten\{instance="[^"]+"\} 2.0$', text, re.MULTILINE)

        own_postgres.start()
        until(lambda: web.query(COUNTS) == [("postponed", "", 1), ("refused", "signature_missing", 1)])
        assert web.client.post(PATH, content=event(2), headers=signed(event(2))).status_code == 200
