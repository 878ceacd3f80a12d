"""A job's failure at Stripe is stored and shown, and delays no other world and no other job."""

import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import pytest

from deploy.sandbox.account import Account
from deploy.sandbox.server import Fault
from schemas import broker
from schemas.database import BATCH
from schemas.errors import BrokerAway
from schemas.observations import World
from schemas.settings import Settings
from schemas.stripe_api import StripeApi
from tests import command, ledger
from tests.stage import HOUR, KEY, Stage, stage
from tests.waiting import until
from tests.web import serving
from worker.stripe_jobs import discovery, fetches, gaps, rounds
from worker.stripe_jobs.rounds import JobContext

A_DAY: Final = timedelta(days=1)


@pytest.fixture
def at(database_url: str, redis_url: str) -> Iterator[Stage]:
    """Return an empty shop at the sandbox, with a clock close to that of the command."""
    with stage(database_url, redis_url, start=int(time.time())) as made:
        yield made


def job(at: Stage, name: str, account: str = "") -> dict[str, Any]:
    """Return the state of an account's job."""
    (row,) = at.rows(
        "SELECT leased_until, done_at, stopped, failed_at, failure FROM stripe_jobs"
        " WHERE (job, account) = (:job, :account)",
        job=name,
        account=account,
    )
    return row


def status(at: Stage) -> dict[str, Any]:
    """Return the part about Stripe of the command's status."""
    shown: dict[str, Any] = command.python("deploy", "status", "--format", "json", settings=at.environment).json
    return dict(shown["stripe"])


def health(at: Stage) -> str:
    """Return the part about Stripe of the web process's health."""
    with serving(at.settings) as web:
        # A process that was just begun may not have read its status yet.
        until(lambda: web.get("/health/ready", {}).json()["stripe"] != "unknown")
        answer = web.get("/health/ready", {})
    assert answer.status_code == 200
    shown: str = answer.json()["stripe"]
    return shown


def refuse_rows(at: Stage, table: str, condition: str) -> None:
    """Let PostgreSQL refuse rows of *table* for which *condition* holds, with words that quote one."""
    ledger.execute(
        at.engine,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no room for %', NEW; END $$",
    )
    ledger.execute(
        at.engine,
        f"CREATE TRIGGER refused BEFORE INSERT ON {table} FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION refuse()",
    )


@pytest.mark.parametrize(
    ("fault", "words"), [(Fault.DECLINED, "Stripe answered 400"), (Fault.MISSING, "Stripe knows no such object")]
)
def test_a_declined_job_is_shown(at: Stage, fault: Fault, words: str) -> None:
    """A job that Stripe declines ends its round; `status` and health show it until a round succeeds."""
    at.faults.add(fault, "/v1/events")

    found = gaps.run_once(at.context())

    assert any(words in reason for reason in found.failed)
    kept = job(at, "fill_gaps")
    assert words in kept["failure"]
    assert (kept["failed_at"], kept["leased_until"], kept["done_at"]) == (at.now, None, None)
    (shown,) = status(at)["jobs"]
    assert (shown["job"], shown["account"], shown["livemode"], shown["state"]) == ("fill_gaps", "", False, "failing")
    assert words in shown["cause"]
    assert shown["since"] is not None
    assert health(at) == "failing: fill_gaps"

    gaps.run_once(at.context())
    assert (job(at, "fill_gaps")["failure"], job(at, "fill_gaps")["failed_at"]) == (None, None)
    assert health(at) == "ok"
    assert [each["state"] for each in status(at)["jobs"]] == ["ok"]


def test_an_unforeseen_fault_is_kept_and_logged(at: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """An unforeseen fault ends no task: it logs one error line that quotes no row, and returns the lease."""
    at.account.complete(at.account.open_session())
    at.account.advance(120)
    refuse_rows(at, "inbox", "NEW.source = 'gap'")

    gaps.run_once(at.context(), since=at.now - A_DAY)

    kept = job(at, "fill_gaps")
    assert (kept["failure"], kept["leased_until"]) == ("It failed with RaiseException.", None)
    printed = "".join(capsys.readouterr())
    assert printed.count("stripe.failed") == 1
    assert "no room for" not in printed
    ledger.execute(at.engine, "DROP TRIGGER refused ON inbox")
    assert gaps.run_once(at.context(), since=at.now - A_DAY).recorded > 0
    assert job(at, "fill_gaps")["failure"] is None


@pytest.mark.parametrize("fault", [Fault.FAILED, Fault.DROP_BEFORE, Fault.UNAVAILABLE])
def test_an_outage_is_shown_when_it_lasts(at: Stage, fault: Fault) -> None:
    """A job without Stripe is shown as failing after ten minutes, until a round succeeds."""
    at.faults.add(fault, "*", times=3)

    for minutes, is_shown in ((0, False), (9, False), (10, True)):
        gaps.run_once(at.context(later=timedelta(minutes=minutes)))
        assert (job(at, "fill_gaps")["failure"] is not None) == is_shown
        assert job(at, "fill_gaps")["leased_until"] is None
    assert job(at, "fill_gaps")["failed_at"] == at.now
    assert health(at) == "failing: fill_gaps"
    gaps.run_once(at.context(later=timedelta(minutes=11)))
    assert (job(at, "fill_gaps")["failure"], job(at, "fill_gaps")["failed_at"]) == (None, None)


def test_short_outages_are_no_failure(at: Stage) -> None:
    """Two short outages with a successful round between them are never shown as a failure."""
    for minutes in (0, 30):
        at.faults.add(Fault.FAILED, "*", times=1)
        for more in (0, 1):
            gaps.run_once(at.context(later=timedelta(minutes=minutes + more)))
            assert job(at, "fill_gaps")["failure"] is None


def test_a_refused_key_is_no_second_fault(at: Stage) -> None:
    """A job that Stripe stops by refusing the key is shown as stopped, and not as failing too."""
    at.faults.add(Fault.DECLINED, "/v1/events")
    gaps.run_once(at.context())
    at.api._accounts = {}
    gaps.run_once(at.context())

    assert (job(at, "fill_gaps")["failure"], job(at, "fill_gaps")["stopped"] is not None) == (None, True)
    shown = status(at)
    assert (shown["state"], shown["jobs"][0]["job"], shown["jobs"][0]["state"]) == ("stopped", "fill_gaps", "stopped")


def test_one_worlds_failure_delays_no_other(database_url: str, redis_url: str) -> None:
    """A job that fails for one account still runs for the next account, and so does the next job."""
    with stage(database_url, redis_url) as at:
        theirs = {name: Account(seed=9, account=name) for name in ("acct_1", "acct_3")}
        at.api._connected = {(KEY, name): account for name, account in theirs.items()}
        for account in theirs.values():
            account.complete(account.open_session())
            account.open_session()
            ledger.record(at.engine, [ledger.delivery(event.body) for event in account.events])
        at.fold()
        at.account.open_session()
        refuse_rows(at, "inbox", "NEW.account = 'acct_1' AND NEW.source = 'observation'")

        found = discovery.run_once(at.context())

        assert found.failed == ["It failed with RaiseException."]
        assert job(at, "poll_sessions", "acct_1")["failure"] == "It failed with RaiseException."
        for name in ("", "acct_3"):
            assert job(at, "poll_sessions", name)["failure"] is None
            assert job(at, "poll_sessions", name)["done_at"] is not None
        assert fetches.run_once(at.context()).counted["sessions"] > 0
        assert health(at) == "failing: poll_sessions"


def test_a_call_that_fails_delays_no_other(at: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """An unrecordable answer about one session is tried again and finally given up; the others are expired."""
    sessions = at.open(5)
    refuse_rows(at, "inbox", f"NEW.object_id = '{sessions[0]}' AND NEW.type = 'payfold.checkout.session.observed'")

    found = at.expire()

    assert found.counted == {"expired": 4, "failed": 1}
    assert found.failed == []
    assert {at.status(session) for session in sessions[1:]} == {"expired"}
    assert "stripe.call_failed" in "".join(capsys.readouterr())
    ((call,)) = at.rows("SELECT object_id, attempts, leased_until, given_up FROM stripe_calls")
    assert call == {"object_id": sessions[0], "attempts": 1, "leased_until": None, "given_up": None}
    for attempt in range(1, rounds.ATTEMPTS_MAX):
        at.expire(at.context(later=attempt * timedelta(hours=1)))
    assert at.rows("SELECT given_up FROM stripe_calls") == [{"given_up": "It failed with RaiseException."}]


def test_our_own_clocks_failure_is_kept(database_url: str, redis_url: str) -> None:
    """Without a key too, a failure of our clock's expiry is stored, shown, and cleared afterwards."""
    with stage(database_url, redis_url, STRIPE_API_KEY="") as at:
        at.open(2, ago=26 * HOUR)
        refuse_rows(at, "inbox", "NEW.type = 'payfold.checkout.session.clock_expired'")

        assert at.expire().failed == ["It failed with RaiseException."]
        assert job(at, "expire_sessions")["failure"] == "It failed with RaiseException."
        assert health(at) == "failing: expire_sessions"
        ledger.execute(at.engine, "DROP TRIGGER refused ON inbox")
        assert at.expire().counted == {"expired_by_clock": 2}
        assert health(at) == "no key"


@pytest.mark.parametrize(("is_by_hand", "bound"), [(False, f"{BATCH.statement:.0f}s"), (True, "0")])
def test_a_jobs_transactions_are_bounded(at: Stage, bound: str, *, is_by_hand: bool) -> None:
    """A worker's statements have a time limit; a command's statements have none, since its user can end it."""
    context = at.context(is_by_hand=is_by_hand)

    assert context.within(lambda opened: opened.execute("SHOW statement_timeout").fetchone()) == (bound,)


def test_no_call_waits_for_a_silent_redis(at: Stage) -> None:
    """Where Redis accepts a connection and does not answer, the call and its job are postponed within seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = Settings.load(at.environment | {"REDIS_URL": f"redis://127.0.0.1:{silent.getsockname()[1]}"})
        context = JobContext(at.engine, StripeApi(settings, broker.redis(settings)), settings, now=lambda: at.now)
        began = time.monotonic()
        found = gaps.run_once(context)
        took = time.monotonic() - began

    assert found.failed == [str(BrokerAway())]
    assert took < 60
    assert job(at, "fill_gaps")["leased_until"] is None


def test_a_round_ends_with_its_slice(at: Stage) -> None:
    """A round that gets no lease within its time slice does not wait for the other worlds either."""
    worlds = [World(account, livemode=False) for account in ("acct_1", "acct_2", "acct_3")]
    ledger.execute(at.engine, "ALTER TABLE stripe_jobs RENAME TO away")

    found = [
        len(rounds.run_job(at.context(seconds_max=most), "fetch", lambda *_: None, worlds=worlds).failed)
        for most in (60, -1)
    ]

    assert found == [3, 1]
