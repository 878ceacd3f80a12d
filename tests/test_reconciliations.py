"""A reconciliation can be asked for: a worker does it, and its result and report are read by their number."""

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psycopg
import pytest
import redis
from celery import Celery
from sqlalchemy import Engine

from api.report import page as report
from deploy.local.valkey import Valkey
from schemas import broker, database, reconciliations
from schemas.errors import ConflictError
from schemas.reconciliations import DETAILS_KEPT, REBUILD, RULES, STRIPE
from schemas.settings import Settings
from tests import ledger
from tests.browser import chromium
from tests.stage import HOUR, Stage, stage
from tests.test_slots import children, worker
from tests.test_worker import with_links
from tests.waiting import WAITS_FOR_A_LOCK, until
from tests.web import OPERATOR, READER, Web, serving, settings_of
from worker import app
from worker.folding import projection
from worker.proof import asked, reconcile
from worker.proof.reconcile import ReconcileRequest

PATH = "/v1/reconciliations"


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    """Return settings for this test's own servers."""
    return settings_of(database_url, redis_url)


@pytest.fixture
def web(settings: Settings) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings) as running:
        yield running


@pytest.fixture
def celery(settings: Settings, engine: Engine) -> Celery:
    """Return the worker's application, whose tasks run here."""
    return app.create(settings, engine)


def ask(web: Web, query: str = "") -> httpx.Response:
    """Ask for a reconciliation with the token of an operator."""
    return web.client.post(PATH + query, headers=OPERATOR)


def shown(web: Web, number: int) -> dict[str, object]:
    """Return a reconciliation."""
    found: dict[str, object] = web.get(f"{PATH}/{number}").json()
    return found


def messages(web: Web) -> int:
    """Return how many messages wait for the slot of Stripe."""
    with redis.Redis.from_url(web.settings.broker) as client:
        return int(client.llen(broker.STRIPE_QUEUE))


def with_drift(engine: Engine) -> str:
    """Fold three payment links, remove one of their rows, and return its id."""
    with_links(engine, 3)
    projection.run_once(engine, now=ledger.NOW)
    (row,) = ledger.rows(engine, "SELECT min(id) AS id FROM payment_links")
    ledger.execute(engine, "DELETE FROM payment_links WHERE id = :id", id=row["id"])
    return str(row["id"])


def test_asked_and_done(web: Web, engine: Engine, celery: Celery) -> None:
    """One that is asked for waits, then a worker does it: its differences and its report are there."""
    lost = with_drift(engine)

    answer = ask(web)
    number = answer.json()["id"]
    waiting = shown(web, number)
    assert (answer.status_code, answer.headers["location"]) == (202, f"{PATH}/{number}")
    assert (waiting["state"], waiting["asked_by"], waiting["result"], waiting["drift"]) == (
        "waiting",
        "admin",
        None,
        None,
    )
    assert waiting == answer.json() | {"result": None}
    assert messages(web) == 1
    early = web.get(f"{PATH}/{number}/report")
    assert (early.status_code, early.json()["detail"]) == (409, "This reconciliation has no result: it is waiting.")

    assert celery.tasks[broker.RECONCILE_ASKED](a_word_of_a_newer_release=True) == 1
    assert celery.tasks[broker.RECONCILE_ASKED]() == 0

    done = shown(web, number)
    result = done["result"]
    assert isinstance(result, dict)
    assert (done["state"], done["outcome"], done["drift"], done["checks"]) == ("done", "drift", 1, [RULES, REBUILD])
    assert done["asked_at"] == waiting["asked_at"]
    assert result["run"]["id"] == number
    assert [(each["kind"], each["id"]) for each in result["drift"]] == [("missing", lost)]
    page = web.get(f"{PATH}/{number}/report")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.text == report.html(result)
    assert lost in page.text
    # The page's own policy, and that no other page may show it in a frame.
    policy = page.headers["content-security-policy"]
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[A-Za-z0-9+/]{43}='; img-src data:; base-uri 'none';"
        r" form-action 'none'; frame-ancestors 'none'",
        policy,
    )
    assert web.get("/v1/status").json()["reconciliation"]["id"] == number


@pytest.mark.browser
def test_a_browser_shows_the_report(web: Web, engine: Engine) -> None:
    """Under the policy of the answer a browser shows the page with its style, and has nothing to complain about."""
    with_drift(engine)
    number = reconcile.run(engine, (RULES, REBUILD), ReconcileRequest())["run"]["id"]
    messages: list[str] = []
    with chromium() as browser:
        page = browser.new_page(extra_http_headers=READER)
        page.on("console", lambda message: messages.append(message.text))
        page.goto(f"http://127.0.0.1:{web.port}{PATH}/{number}/report")
        # Without the style sheet it is as high as a line.
        margin = page.evaluate("getComputedStyle(document.querySelector('.eyebrow')).marginTop")
        heading = page.inner_text("h1")

    assert (messages, margin) == ([], "0px")
    assert heading.startswith("1 difference")


def test_one_at_a_time(web: Web, engine: Engine, celery: Celery) -> None:
    """While one waits or runs another is refused; Stripe is not asked without a key; a reader asks for none."""
    assert ask(web, "?stripe=true").json()["detail"] == "STRIPE_API_KEY is not set here, so Stripe cannot be asked."
    assert web.client.post(PATH, headers=READER).status_code == 403
    assert ask(web).status_code == 202
    assert ask(web).status_code == 409
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        assert reconciliations.take(cursor) is not None
        assert reconciliations.take(cursor) is None
    refused = ask(web)

    assert (refused.status_code, refused.json()["type"]) == (409, "urn:payfold:problem:conflict")
    assert [each["state"] for each in web.get(PATH).json()["data"]] == ["running"]


def test_a_lost_message_is_made_up_for(database_url: str, own_valkey: Valkey, engine: Engine) -> None:
    """Without Redis it can be asked for; then the clock's next message finds it, or the slot's own timer."""
    settings = settings_of(database_url, own_valkey.url)
    celery = app.create(settings, engine)
    entry = celery.conf.beat_schedule["asked"]
    with serving(settings) as web:
        own_valkey.stop()
        number = ask(web).json()["id"]
        celery.tasks[entry["task"]]()
        assert shown(web, number)["outcome"] == "ok"

    # As often as it looks for stale sessions.
    assert (entry["schedule"], entry["options"]["queue"]) == (30, broker.STRIPE_QUEUE)
    assert entry["task"] in {each.job for each in app.periodic(celery, broker.STRIPE_QUEUE)}


def test_a_failure_is_kept(web: Web, engine: Engine, celery: Celery) -> None:
    """Where a run fails, its row has the reason, in words where they are ours, and another may be asked for."""
    first = ask(web).json()["id"]
    ledger.execute(engine, "INSERT INTO account_names (old, new, renamed_at) VALUES ('a', 'b', now())")
    celery.tasks[broker.RECONCILE_ASKED]()
    ledger.execute(engine, "DELETE FROM account_names")
    second = ask(web).json()["id"]
    ledger.execute(engine, "REVOKE SELECT ON charges FROM CURRENT_USER")
    celery.tasks[broker.RECONCILE_ASKED]()

    renamed, refused = shown(web, first), shown(web, second)
    assert (renamed["state"], renamed["failure"], renamed["outcome"]) == ("failed", "ConflictError", None)
    assert "rename" in str(renamed["detail"])
    assert (refused["state"], refused["failure"], refused["detail"]) == ("failed", "InsufficientPrivilege", None)
    assert refused["finished_at"] is not None
    assert ask(web).status_code == 202
    assert [each["id"] for each in web.get(f"{PATH}?state=failed").json()["data"]] == [second, first]


def test_one_that_no_worker_takes(web: Web, engine: Engine, celery: Celery) -> None:
    """What waited for an hour is failed for all who look: it is shown so, not begun any more, and another is let in."""
    first = ask(web).json()["id"]
    aged(engine, "59 minutes")
    assert shown(web, first)["state"] == "waiting"
    assert ask(web).status_code == 409

    aged(engine, "1 hour")
    given_up = shown(web, first)
    assert (given_up["state"], given_up["failure"], given_up["started_at"]) == ("failed", "not_taken", None)
    assert given_up["detail"] == "No worker took it within 60 minutes: check that one runs."
    assert given_up["finished_at"] is not None
    assert [each["id"] for each in web.get(f"{PATH}?state=failed").json()["data"]] == [first]
    assert web.get(f"{PATH}?state=waiting").json()["data"] == []

    second = ask(web).json()["id"]
    assert shown(web, first) == given_up
    aged(engine, "1 hour")
    assert celery.tasks[broker.RECONCILE_ASKED]() == 0
    assert [each["state"] for each in web.get(PATH).json()["data"]] == ["failed", "failed"]
    assert shown(web, second)["failure"] == "not_taken"


def aged(engine: Engine, interval: str) -> None:
    """Let what waits have been asked for so long ago."""
    statement = "UPDATE reconciliation_requests SET asked_at = now() - CAST(:since AS interval) WHERE state = 'waiting'"
    ledger.execute(engine, statement, since=interval)


@contextmanager
def held(web: Web) -> Iterator[None]:
    """Hold a table that a reconciliation reads, so that it waits."""
    with psycopg.connect(web.settings.libpq) as blocker:
        blocker.execute("LOCK TABLE balance_transactions IN ACCESS EXCLUSIVE MODE")
        yield
        blocker.rollback()


def test_a_real_worker(web: Web, engine: Engine, database_url: str, redis_url: str) -> None:
    """A worker without a key takes one by its message and folds at the same time; killed, it leaves no doubt."""
    with stage(database_url, redis_url, start=int(time.time()) - 2 * HOUR) as at:
        run_and_kill(web, engine, at)


def run_and_kill(web: Web, engine: Engine, at: Stage) -> None:
    """Let a worker do one reconciliation, and end its slot within another."""
    with worker(at, STRIPE_API_KEY="") as process:
        first = ask(web).json()["id"]
        until(lambda: shown(web, first)["state"] == "done")
        assert shown(web, first)["outcome"] == "ok"
        with held(web):
            second = ask(web).json()["id"]
            until(lambda: web.query(WAITS_FOR_A_LOCK) != [])
            with_links(engine, 1)
            broker.celery(web.settings).send_task(broker.FOLD, queue=broker.FOLD_QUEUE)
            until(lambda: web.query("SELECT id FROM payment_links") != [])
            assert shown(web, second)["state"] == "running"
            os.kill(children(process.pid)[1], signal.SIGKILL)
        # As if a minute had passed.
        lapse(engine)
        lost = shown(web, second)
        assert (lost["state"], lost["failure"]) == ("failed", "lost")
        third = ask(web).json()["id"]
        until(lambda: shown(web, third)["state"] == "done")
    assert [each["state"] for each in web.get(PATH).json()["data"]] == ["done", "failed", "done"]
    assert web.query("SELECT state FROM reconciliation_requests ORDER BY id") == [("done",), ("failed",), ("done",)]


def lapse(engine: Engine) -> None:
    """Let every lease have ended a second ago."""
    ledger.execute(engine, "UPDATE reconciliation_requests SET leased_until = now() - interval '1 second'")


def test_the_lease_goes_on_with_the_steps(web: Web, engine: Engine, database_url: str, redis_url: str) -> None:
    """The lease is extended while steps are made; a result that comes after it was given up is kept all the same."""
    stepped = [time.monotonic()]
    with ThreadPoolExecutor(1) as threads, stage(database_url, redis_url) as at:
        with held(web):
            number = ask(web).json()["id"]
            running = threads.submit(asked.run_once, at.context(), stepped_at=lambda: stepped[0], extend_seconds=0.02)
            until(lambda: web.query(WAITS_FOR_A_LOCK) != [])
            lapse(engine)
            until(lambda: shown(web, number)["state"] == "running")

            stepped[0] -= reconciliations.STEP_SECONDS_MAX + 1
            until(lambda: is_given_up(web, engine, number))
        result = running.result(30)

    assert result is not None
    assert result["run"]["id"] == number
    assert (shown(web, number)["state"], shown(web, number)["failure"]) == ("done", None)


def is_given_up(web: Web, engine: Engine, number: int) -> bool:
    """Return whether nothing extends the lease any more."""
    lapse(engine)
    return shown(web, number)["state"] == "failed" and shown(web, number)["failure"] == "lost"


def test_stripe_is_asked(database_url: str, redis_url: str) -> None:
    """With a key Stripe can be asked too, and its tallies are in the result."""
    with stage(database_url, redis_url) as at:
        at.open(2)
        number = asked_for(at.engine, RULES, REBUILD, STRIPE)
        result = asked.run_once(at.context(), stepped_at=time.monotonic)

        assert result is not None
        assert (result["run"]["id"], result["run"]["checks"]) == (number, [RULES, REBUILD, STRIPE])
        assert {"checkout.session": 2}.items() <= {each["object"]: each["listed"] for each in result["stripe"]}.items()


def asked_for(engine: Engine, *checks: str) -> int:
    """Ask for a reconciliation as the route does."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        return reconciliations.ask(cursor, checks, by="a test")


def test_the_history(web: Web, engine: Engine) -> None:
    """Every run is listed, newest first and in pages; of older ones the sums are kept and the report is not."""
    lost = with_drift(engine)
    number = reconcile.run(engine, (RULES, REBUILD), ReconcileRequest())["run"]["id"]
    ended = {"started_at": ledger.NOW, "finished_at": ledger.NOW, "outcome": "ok", "checks": [RULES]}
    for _ in range(DETAILS_KEPT - 1):
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            reconciliations.keep(cursor, {"run": dict(ended), "drift_total": 0, "drift": []})
    first = shown(web, number)
    assert (first["has_report"], first["asked_by"], first["drift"]) == (True, None, 1)
    assert lost in web.get(f"{PATH}/{number}/report").text
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        last = reconciliations.keep(cursor, {"run": dict(ended), "drift_total": 0, "drift": []})

    page = web.get(f"{PATH}?limit=30").json()
    rest = web.get(f"{PATH}?limit=30&cursor={page['next_cursor']}").json()
    ids = [each["id"] for each in page["data"] + rest["data"]]
    assert ids == sorted(ids, reverse=True)
    assert (len(ids), ids[0], ids[-1], rest["next_cursor"]) == (DETAILS_KEPT + 1, last, number, None)
    assert [each["id"] for each in web.get(f"{PATH}?outcome=drift").json()["data"]] == [number]
    older = shown(web, number)
    assert isinstance(older["result"], dict)
    assert (older["has_report"], older["result"]["drift_total"], "drift" in older["result"]) == (False, 1, False)
    assert web.get(f"{PATH}/{number}/report").status_code == 410
    for path in (f"{PATH}/999", f"{PATH}/999/report"):
        assert web.get(path).status_code == 404
    for query in ("?state=odd", "?outcome=odd", "?cursor=odd", "?livemode=true", "/x", "/0", f"/{2**63}"):
        assert web.get(PATH + query).status_code == 422, query


def test_two_ask_at_once(engine: Engine) -> None:
    """Of many that ask at the same time one is let in."""
    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(let_in, [engine] * 8)) == [False] * 7 + [True]


def let_in(engine: Engine) -> bool:
    """Return whether a reconciliation could be asked for."""
    try:
        asked_for(engine, RULES)
    except ConflictError:
        return False
    return True
