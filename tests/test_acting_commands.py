"""Commands that call Stripe: an operator lists the work first, then does it, and sees the result."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from schemas.observations import World
from tests import command
from tests.stage import HOUR, KEY, Stage, stage
from tests.waiting import until
from tests.web import serving
from worker.stripe_jobs import expiry, queue

HERE = World("", livemode=False)


@pytest.fixture
def at(database_url: str, redis_url: str) -> Iterator[Stage]:
    """Return a shop at the sandbox with about the same time as the command."""
    with stage(database_url, redis_url, start=int(time.time()) - 2 * HOUR) as made:
        yield made


def payfold(at: Stage, *arguments: str, **settings: str) -> command.Ran:
    """Run the command against the shop."""
    ran = command.python("deploy", *arguments, "--format", "json", settings=at.environment | settings)
    assert KEY not in ran.out + ran.err
    assert "Traceback" not in ran.err
    return ran


def test_dry_run_of_expiry(at: Stage) -> None:
    """A dry run lists the stale sessions with reasons, without a call or a change; the command then expires these."""
    stale = at.open(2, ago=0)
    at.account.advance(2 * HOUR)
    young = at.open(ago=0)

    listed = payfold(at, "sessions", "expire", "--dry-run")
    assert listed.code == 0
    assert sorted(row["id"] for row in listed.json) == sorted(stale)
    assert {row["why"] for row in listed.json} == {"open for 120 minutes, of 60 allowed"}
    assert at.api.calls == []
    assert {at.status(session) for session in stale + young} == {"open"}

    done = payfold(at, "sessions", "expire")
    assert (done.code, done.json) == (0, {"recorded": 2, "expired": 2})
    assert {at.status(session) for session in stale} == {"expired"}
    assert {at.status(session) for session in young} == {"open"}
    assert payfold(at, "sessions", "expire", "--dry-run").json == []


def test_a_key_that_stripe_refuses(at: Stage) -> None:
    """A refused key is reported each time, with exit 1, and changes no row; a good key then works at once."""
    (session,) = at.open()

    for _ in range(2):
        refused = payfold(at, "sessions", "expire", STRIPE_API_KEY="sk_test_unknown")
        assert refused.code == 1
        assert "401" in refused.err
    assert at.status(session) == "open"
    shown = payfold(at, "status").json["stripe"]
    assert (shown["state"], shown["jobs"][0]["job"], shown["jobs"][0]["state"]) == (
        "stopped",
        "expire_sessions",
        "stopped",
    )
    assert "401" in shown["jobs"][0]["cause"]
    with serving(at.settings) as web:
        until(lambda: web.get("/health/ready", {}).json()["stripe"] != "unknown")
        ready = web.get("/health/ready", {})
        assert (ready.status_code, ready.json()["stripe"]) == (200, "stopped: expire_sessions")

    assert payfold(at, "sessions", "expire").json == {"recorded": 1, "expired": 1}
    assert at.status(session) == "expired"


def test_a_session_that_another_worker_expires(at: Stage) -> None:
    """The command skips a session that another worker is expiring, and exits with 1 and a message."""
    (session,) = at.open()
    context = at.context()
    context.within(lambda opened: queue.begin(opened, HERE, expiry.JOB, now=datetime.now(UTC)))

    ran = payfold(at, "sessions", "expire")

    assert (ran.code, ran.json) == (1, {"recorded": 0})
    assert "Another worker" in ran.err
    assert at.api.calls == []
    assert at.status(session) == "open"


def test_open_sessions_by_hand(at: Stage) -> None:
    """A poll finds open sessions, which no event reports; a second poll finds nothing new."""
    session = at.account.open_session()
    at.account.create_payment_link()
    at.deliver()  # Payfold knows an account by its events

    assert payfold(at, "sessions", "poll").json == {"recorded": 1}
    assert at.status(session) == "open"
    assert payfold(at, "sessions", "poll").json == {"recorded": 0}


def test_gaps_by_hand(at: Stage) -> None:
    """Events that were never delivered are found as far back as requested, and no further."""
    at.account.create_payment_link()
    at.deliver()
    old = at.account.open_session()
    at.account.complete(old)
    at.account.advance(HOUR)
    session = at.account.open_session()
    at.account.complete(session)
    at.account.advance(600)
    since = datetime.fromtimestamp(at.account.now, UTC) - timedelta(minutes=30)

    filled = payfold(at, "gaps", "fill", "--since", since.isoformat(timespec="seconds").removesuffix("+00:00"))
    assert filled.code == 0
    assert filled.json["recorded"] > 0
    assert at.status(session) == "paid"
    assert at.rows("SELECT FROM orders WHERE id = :id", id=old) == []

    assert payfold(at, "gaps", "fill", "--since", "2020-01-01").json["recorded"] > 0
    assert at.status(old) == "paid"
    assert payfold(at, "gaps", "fill", "--since", "2020-01-01").json == {"recorded": 0}


@pytest.mark.parametrize("arguments", [("sessions", "poll"), ("gaps", "fill")], ids=" ".join)
def test_without_a_key(at: Stage, arguments: tuple[str, ...]) -> None:
    """Without a key the commands that ask Stripe fail, and the error names the setting."""
    ran = payfold(at, *arguments, STRIPE_API_KEY="")

    assert ran.code == 2
    assert "STRIPE_API_KEY" in ran.err
    assert at.api.calls == []
