"""Outcomes of deliveries are counted for all web processes together, and the counts survive each process."""

import re
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine

from deploy.local.postgres import Postgres
from schemas.migrate import upgrade
from tests import ledger
from tests.faults import paused
from tests.waiting import until
from tests.web import PATH, READER, Web, event, serving, settings_of, signed
from worker.folds import FOLD_VERSION

ANSWER_SECONDS_MAX = 10.0
COUNTS = "SELECT outcome, reason, count FROM delivery_counts ORDER BY outcome, reason"


def metrics(web: Web) -> list[str]:
    """Return the samples that `/metrics` shows."""
    text = web.client.get("/metrics", headers=READER, timeout=ANSWER_SECONDS_MAX).text
    return [line for line in text.splitlines() if not line.startswith("#")]


def totals(web: Web) -> list[str]:
    """Return the counters in `/metrics`."""
    return [line for line in metrics(web) if "_total{" in line]


def own(web: Web) -> dict[str, str]:
    """Return the gauges of one process, without the name of the process."""
    return dict(re.findall(r'^(\w+){instance="[^"]+"} (.+)$', "\n".join(metrics(web)), re.MULTILINE))


def refuse(web: Web) -> None:
    """Send an unsigned delivery."""
    assert web.client.post(PATH, content=event()).status_code == 400


def test_outlasts_its_process(database_url: str, redis_url: str) -> None:
    """A new process continues the counts of the previous one, and counts each delivery and refusal once."""
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
    """Every web process returns the counts of all processes, and its own gauges under its name."""
    settings = settings_of(database_url, redis_url)
    with serving(settings) as one, serving(settings) as other:
        for number, web in enumerate([one, one, other]):
            assert web.deliver(event(number)).status_code == 200
        refuse(other)
        totals(one)
        shown = totals(other)

        assert shown == totals(one)
        assert 'payfold_deliveries_total{outcome="new"} 3.0' in shown
        assert 'payfold_deliveries_refused_total{reason="signature_missing"} 1.0' in shown


def test_nothing_new(database_url: str, redis_url: str) -> None:
    """Without a new count nothing is written."""
    with serving(settings_of(database_url, redis_url)) as web:
        refuse(web)
        metrics(web)
        written = web.query("SELECT ctid, xmin FROM delivery_counts")
        metrics(web)

        assert len(written) == 1
        assert web.query("SELECT ctid, xmin FROM delivery_counts") == written


def test_away(own_postgres: Postgres, redis_url: str) -> None:
    """While PostgreSQL is down metrics are answered, and counts are kept and written once it is back."""
    upgrade(own_postgres.url)
    with serving(settings_of(own_postgres.url, redis_url), answer_seconds_max=0.5) as web:
        with paused(own_postgres):
            assert web.deliver(event(1)).status_code == 503
            assert "payfold_database_up 0.0" in metrics(web)
        own_postgres.stop()
        refuse(web)
        assert totals(web) == []
        assert own(web)["payfold_deliveries_unwritten"] == "2.0"

        own_postgres.start()
        until(lambda: web.query(COUNTS) == [("postponed", "", 1), ("refused", "signature_missing", 1)])
        assert web.client.post(PATH, content=event(2), headers=signed(event(2))).status_code == 200


def test_gauges(engine: Engine, database_url: str, redis_url: str) -> None:
    """The metrics show waiting work and faults, and the status shows the same values."""
    beats = "INSERT INTO heartbeats (kind, name, instance, at, since, outcome)"
    for kind, name, age, outcome in (
        ("web", "", 1, None),
        ("clock", "", 500, None),
        ("job", "reconcile", 7200, "drift"),
    ):
        values = "VALUES (:kind, :name, 'a:1', now() - make_interval(secs => :age), now() - interval '1 day', :outcome)"
        ledger.execute(engine, f"{beats} {values}", kind=kind, name=name, age=age, outcome=outcome)
    ledger.execute(
        engine,
        "INSERT INTO reconciliations (started_at, finished_at, outcome, drift, checks, result)"
        " VALUES (to_timestamp(1), to_timestamp(60), 'drift', 3, '{rules}', '{}')",
    )
    for statement in (
        "INSERT INTO stripe_jobs (account, livemode, job, failure) VALUES ('acct_1', true, 'fetch', 'why')",
        "INSERT INTO account_names VALUES ('a', 'acct_1', now(), NULL)",
        "INSERT INTO delivery_counts VALUES ('refused', 'body_empty', 2, to_timestamp(60), now())",
    ):
        ledger.execute(engine, statement)
    with serving(settings_of(database_url, redis_url)) as web:
        assert web.deliver(event(1)).status_code == 200
        shown = metrics(web)
        status = web.get("/v1/status").json()
        health = web.get("/health/ready").json()

    assert {
        "payfold_database_up 1.0",
        "payfold_broker_up 1.0",
        "payfold_events_pending 1.0",
        'payfold_webhooks_last_hour{weeks_ago="0"} 1.0',
        'payfold_job_outcome{job="reconcile",outcome="drift"} 1.0',
        'payfold_process_silent{process="clock"} 1.0',
        'payfold_process_silent{process="worker"} 1.0',
        "payfold_reconciliation_time_seconds 60.0",
        "payfold_reconciliation_drift 3.0",
        "payfold_anomalies_in_force 0.0",
        f"payfold_fold_version {FOLD_VERSION}.0",
        'payfold_deliveries_refused_since_time_seconds{reason="body_empty"} 60.0',
        'payfold_stripe_jobs{job="fetch",state="failing"} 1.0',
        'payfold_stripe_calls{state="given_up"} 0.0',
        'payfold_account_faults{code="rename_unfinished"} 1.0',
    } <= set(shown)
    # No event was received four weeks ago, since there was no inbox.
    assert not [line for line in shown if 'weeks_ago="4"' in line]
    assert (status["database"], status["pending"], status["webhooks"]["last_hour"]) == ("ok", 1, 1)
    assert {each["process"] for each in status["silent"]} == {"worker", "clock"}
    assert (health["ready"], health["workers"], health["clock"]) == (True, "silent", "silent")
    overview = health["status"]
    assert (overview["pending"], overview["fold_version"], overview["not_known"]) == (1, FOLD_VERSION, [])
    assert overview["reconciliation"].keys() == {"finished_at", "age_seconds", "outcome", "drift"}
    assert [(each["job"], each["outcome"]) for each in overview["jobs"]] == [("reconcile", "drift")]
    assert "acct_1" not in str(health)
