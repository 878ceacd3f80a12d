"""Stale sessions are expired at Stripe once, despite faults of Stripe and the network, and races with buyers."""

import random
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from redis import Redis

from deploy.sandbox.http_api import StripeApi as SandboxApi
from deploy.sandbox.server import Fault
from schemas import checkout, database, inbox, observations, session_ends
from schemas.observations import World
from schemas.own_events import SESSION_REGISTERED
from schemas.stripe_api import StripeApi
from tests.conftest import SEED_OPTION
from tests.stage import HOUR, KEY, Stage, stage
from worker.stripe_jobs import discovery, expiry, queue
from worker.stripe_jobs.rounds import JobContext

HERE = World("", livemode=False)
EXPIRE = "*/expire"


@pytest.fixture
def at(database_url: str, redis_url: str) -> Iterator[Stage]:
    """Return an empty shop at the sandbox."""
    with stage(database_url, redis_url) as made:
        yield made


def test_a_stale_session_is_expired(at: Stage) -> None:
    """A session that is open for too long is expired at Stripe by one call, and so is its order, with its items."""
    (session,) = at.open()

    found = at.expire()

    assert found.counted == {"expired": 1}
    assert at.account.expected_status(session) == "expired"
    assert at.status(session) == "expired"
    assert at.kinds(session) == ["order.opened", "order.expired"]
    assert [made.status for made in at.api.calls] == [200]
    assert at.rows("SELECT lines_complete FROM orders") == [{"lines_complete": True}]


def test_a_session_in_time_is_left_alone(at: Stage) -> None:
    """A session that is open for less than an hour causes no call."""
    at.open(ago=HOUR - 1)

    assert at.expire().counted == {}
    assert at.api.calls == []


@pytest.mark.parametrize(
    ("ttl", "fields", "expires"),
    [
        ("90", {}, True),
        ("off", {}, False),
        ("off,payment=90", {}, True),
        ("90,setup=off", {"mode": "setup"}, False),
        ("90,setup=off", {"mode": "subscription", "amount": 0}, True),
        ("180", {}, False),
    ],
)
def test_the_time_to_live_follows_the_mode(
    database_url: str, redis_url: str, ttl: str, fields: dict[str, Any], *, expires: bool
) -> None:
    """A setting has for each mode the minutes after which a session is stale, or off."""
    with stage(database_url, redis_url, PAYFOLD_SESSION_TTL_MINUTES=ttl) as at:
        (session,) = at.open(**fields)
        at.expire()
        assert (at.status(session) == "expired") is expires


@pytest.mark.parametrize(
    ("ttl", "metadata", "expires"),
    [
        ("90", {}, False),
        ("90,link=90", {}, True),
        ("90", {session_ends.TTL_METADATA_KEY: "90"}, True),
        ("90,link=90", {session_ends.TTL_METADATA_KEY: "off"}, False),
        ("90,link=90", {session_ends.TTL_METADATA_KEY: "soon"}, True),
    ],
)
def test_a_link_sets_the_time_to_live_of_its_sessions(
    database_url: str, redis_url: str, ttl: str, metadata: dict[str, str], *, expires: bool
) -> None:
    """Sessions of links are never stale unless the setting or the link's metadata has a valid number of minutes."""
    with stage(database_url, redis_url, PAYFOLD_SESSION_TTL_MINUTES=ttl) as at:
        link = at.account.create_payment_link(metadata=metadata)
        at.deliver()
        (session,) = at.open(payment_link=link)
        at.expire()
        assert (at.status(session) == "expired") is expires


def test_the_oldest_goes_first(at: Stage) -> None:
    """Sessions are expired in the order of their opening."""
    first = at.open(5, ago=60)
    second = at.open(5, ago=2 * HOUR)

    at.expire()

    expired = [made.path.split("/")[-2] for made in at.api.calls]
    assert set(expired[:5]) == set(first)
    assert set(expired[5:]) == set(second)


def test_a_buyer_who_was_faster_has_paid(at: Stage) -> None:
    """If the buyer has paid, Stripe declines with a 400, the session is read, and the order is paid, never expired."""
    (session,) = at.open()
    at.account.complete(session)

    found = at.expire()

    assert found.counted == {"was_over": 1}
    assert [made.status for made in at.api.calls] == [400, 200]
    assert at.status(session) == "paid"
    assert at.kinds(session) == ["order.opened", "order.paid"]


def test_a_session_that_has_expired_already(at: Stage) -> None:
    """A session that has expired already is read after the 400, and is announced once, despite the later event."""
    (session,) = at.open()
    at.account.expire(session)

    at.expire()
    at.deliver()

    assert at.status(session) == "expired"
    assert at.kinds(session) == ["order.opened", "order.expired"]


def test_a_session_that_stripe_does_not_know(at: Stage) -> None:
    """A 404 is an anomaly, changes no row, and is never retried."""
    (session,) = at.open()
    del at.account._objects["checkout.session"][session]

    at.expire()
    at.account.advance(HOUR)
    at.expire()

    assert [made.status for made in at.api.calls] == [404]
    assert at.status(session) == "open"
    assert at.rows("SELECT kind, subject_id FROM anomalies") == [{"kind": "missing_at_stripe", "subject_id": session}]


def test_an_end_that_has_passed_is_read(at: Stage) -> None:
    """A session past its expires_at is not expired but read, by one call."""
    (session,) = at.open(ago=26 * HOUR)
    assert [row["action"] for row in expiry.listed(at.context())] == ["read from Stripe"]

    assert at.expire().counted == {"sessions": 1}

    assert at.status(session) == "expired"
    assert [(made.method, made.status) for made in at.api.calls] == [("GET", 200)]
    assert at.kinds(session) == ["order.opened", "order.expired"]


def test_stripes_timer_may_be_late(database_url: str, redis_url: str) -> None:
    """A session past its expires_at stays open while Stripe reports it open; if not to be expired it is only read."""
    with stage(database_url, redis_url, PAYFOLD_SESSION_TTL_MINUTES="off") as at:
        at.api._has_timer = False
        (session,) = at.open(ago=26 * HOUR)
        at.expire()
        assert at.expire().counted == {}
        assert at.status(session) == "open"

        at.account.expire(session)
        at.expire(at.context(later=timedelta(minutes=1)))
        assert at.status(session) == "expired"
        assert [made.method for made in at.api.calls] == ["GET", "GET"]


def test_unreadable_ended_sessions_delay_no_other(at: Stage) -> None:
    """A stale session is expired in the same run as many ended sessions that cannot be read."""
    at.open(expiry.BATCH_MAX, ago=25 * HOUR)
    (session,) = at.open()
    at.faults.add(Fault.FAILED, method="GET", times=expiry.BATCH_MAX)

    # So many answers may take longer than a job has on a busy machine.
    found = at.expire(at.context(seconds_max=60.0))

    assert found.counted == {"postponed": expiry.BATCH_MAX, "expired": 1}
    assert at.status(session) == "expired"


def test_an_ended_session_that_stripe_does_not_know(at: Stage) -> None:
    """A 404 to a read is an anomaly too, and the session is not read again."""
    (session,) = at.open(ago=26 * HOUR)
    del at.account._objects["checkout.session"][session]

    assert at.expire().counted == {"missing": 1}
    assert at.expire(at.context(later=timedelta(hours=1))).counted == {}
    assert at.rows("SELECT kind, subject_id FROM anomalies") == [{"kind": "missing_at_stripe", "subject_id": session}]


def test_a_session_that_can_neither_be_expired_nor_read(at: Stage) -> None:
    """A session that Stripe declines to expire and to read is given up with the reason, and delays no other."""
    first, second = at.open(2)
    at.faults.add(Fault.DECLINED, f"*/{first}*", times=2)

    assert at.expire().counted == {"declined": 1, "expired": 1}
    assert (at.status(first), at.status(second)) == ("open", "expired")
    ((call,)) = at.rows("SELECT given_up FROM stripe_calls")
    assert "Stripe answered 400" in call["given_up"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_stops_the_job_loudly(
    at: Stage, redis_url: str, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    """A refused key stops the job after one call, with the reason in its state; later it calls with a good key."""
    sessions = at.open(3)
    refused = SandboxApi({}) if status == 401 else SandboxApi({KEY: at.account}, forbidden={KEY: ["/v1/checkout"]})
    good = at.api._accounts, at.api._forbidden
    at.api._accounts, at.api._forbidden = refused._accounts, refused._forbidden

    found = at.expire(at.context())
    again = at.expire(at.context())

    assert len(found.failed) == 1
    assert f"Stripe answered {status}" in found.failed[0]
    assert "STRIPE_API_KEY" in found.failed[0]
    assert again.failed == []
    assert [made.status for made in at.api.calls] == [status]
    assert [at.status(session) for session in sessions] == ["open"] * 3
    ((job,)) = at.rows("SELECT job, stopped FROM stripe_jobs WHERE stopped IS NOT NULL")
    assert job["job"] == "expire_sessions"
    assert KEY not in str(at.rows("SELECT * FROM stripe_jobs"))

    at.api._accounts, at.api._forbidden = good
    assert at.expire(at.context(later=timedelta(hours=1))).counted == {"expired": 3}
    assert at.rows("SELECT job FROM stripe_jobs WHERE stopped IS NOT NULL") == []


@pytest.mark.parametrize("fault", [Fault.LOCKED, Fault.CONFLICT, Fault.FAILED, Fault.UNAVAILABLE, Fault.DROP_BEFORE])
def test_a_failed_call_is_retried(at: Stage, fault: Fault) -> None:
    """A failed call is postponed, and the session is read before it is expired with a new idempotency key."""
    (session,) = at.open()
    at.faults.add(fault, EXPIRE)

    assert at.expire().counted == {"postponed": 1}
    assert at.status(session) == "open"
    assert at.expire().counted == {}
    at.expire(at.context(later=timedelta(minutes=1)))

    assert at.status(session) == "expired"
    assert [made.method for made in at.api.calls] == ["POST", "GET", "POST"]
    first, last = at.api.calls[0].idempotency_key, at.api.calls[2].idempotency_key
    assert first
    assert last
    assert first != last


@pytest.mark.parametrize("fault", [Fault.DROP_AFTER, Fault.FAILED_AFTER, Fault.TIMED_OUT])
def test_an_answer_that_was_lost_is_found_by_reading(at: Stage, fault: Fault) -> None:
    """If Stripe's answer is lost, the session is read, and not expired a second time."""
    (session,) = at.open()
    at.faults.add(fault, EXPIRE)

    at.expire(at.context(answer_seconds_max=0.5))
    at.expire(at.context(later=timedelta(minutes=1)))
    at.deliver()

    assert [made.method for made in at.api.calls] == ["POST", "GET"]
    assert at.status(session) == "expired"
    assert at.kinds(session) == ["order.opened", "order.expired"]


@pytest.mark.parametrize("fault", [Fault.FAILED, Fault.DROP_BEFORE, Fault.DROP_AFTER])
def test_the_network_is_tried_again_with_the_same_key(at: Stage, fault: Fault) -> None:
    """After a lost connection the SDK repeats the call with the same idempotency key, so that Stripe acts once."""
    (session,) = at.open()
    at.faults.add(fault, EXPIRE)

    at.expire(at.context(retries_max=1))

    assert at.status(session) == "expired"
    keys = [made.idempotency_key for made in at.api.calls if made.method == "POST"]
    assert len(keys) == 2
    assert len(set(keys)) == 1


@pytest.mark.parametrize(("fault", "is_global"), [(Fault.RATE_LIMITED, True), (Fault.ENDPOINT_LIMITED, False)])
def test_a_rate_limit_pauses_the_account_or_endpoint(at: Stage, fault: Fault, *, is_global: bool) -> None:
    """After a 429 no process calls the account, or only the endpoint, for a while; then the call is repeated."""
    sessions = at.open(2)
    at.faults.add(fault, EXPIRE)

    at.expire(at.context(seconds_max=0.0))

    paused = sorted(name.decode().rsplit(":", 1)[-1] for name in at.redis.keys("*:pause*") if b":times" not in name)  # type: ignore[union-attr]  # names
    assert paused == (["pause"] if is_global else ["post checkout/sessions/expire"])

    at.redis.flushdb()  # the pause is over
    at.expire(at.context(later=timedelta(minutes=1)))
    assert sorted((made.method, made.status) for made in at.api.calls) == [
        *(("GET", 200), ("POST", 200), ("POST", 200), ("POST", 429)),
    ]
    assert {at.status(session) for session in sessions} == {"expired"}


def test_a_dead_worker_leaves_its_session_to_another(at: Stage) -> None:
    """If a worker dies between Stripe's answer and its commit, the session is read once, after the end of its lease."""
    (session,) = at.open()
    dying = at.context()
    dying.within(lambda opened: expiry._ask(opened, dying, HERE))
    dying.within(lambda opened: queue.lease(opened, HERE, ["expire"], limit=1, now=at.now))
    checkout.expire(dying.api, HERE, session, read_first=False, now=at.now)

    assert at.expire().counted == {}
    at.expire(at.context(later=queue.LEASE))

    assert [made.method for made in at.api.calls] == ["POST", "GET"]
    assert at.status(session) == "expired"
    assert at.kinds(session) == ["order.opened", "order.expired"]


def test_two_clocks_and_four_workers(at: Stage) -> None:
    """With several concurrent jobs each session is expired by one call and changes once."""
    sessions = at.open(60)
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(2):
            expiry.run_once(at.context(threads=2))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    at.expire()

    assert sorted(made.path.split("/")[-2] for made in at.api.calls) == sorted(sessions)
    changes = at.rows("SELECT count(*) AS changes FROM changes WHERE kind = 'order.expired'")
    assert changes == [{"changes": 60}]


def test_a_thousand_sessions_cost_a_thousand_calls(at: Stage) -> None:
    """Expiring a session costs one call, and finding sessions at most one call for every fifty."""
    for _ in range(1_000):
        at.account.open_session()
    assert discovery.run_once(at.context()).recorded == 1_000
    at.fold()
    at.account.advance(2 * HOUR)

    found = at.expire(at.context(threads=4, seconds_max=600.0))

    assert found.counted == {"expired": 1_000}
    assert at.api.count(EXPIRE) == 1_000
    assert len(at.api.calls) - 1_000 <= 1_000 // 50


def test_a_slice_leaves_the_rest_to_its_successor(at: Stage) -> None:
    """A job ends when its time is over, and reports that there is more work."""
    at.open(5)

    found = at.expire(at.context(seconds_max=0.0))
    assert found.is_more
    while at.expire(at.context()).is_more:
        pass

    assert at.rows("SELECT count(*) AS left FROM orders WHERE status = 'open'") == [{"left": 0}]


RACES = 1_000


def test_a_buyer_who_pays_while_we_expire(at: Stage, request: pytest.FixtureRequest) -> None:
    """In a thousand races, in both orders and with answers lost or late, no paid order ends expired."""
    rng = random.Random(str(request.config.getoption(SEED_OPTION)))
    sessions = at.open(RACES)
    paying = {session for session in sessions if rng.random() < 0.7}

    def pay(session: str) -> None:
        if at.account.session(session)["status"] == "open":
            at.account.complete(session, payment_status=rng.choice(("paid", "paid", "unpaid")))

    for session in sessions:
        moves = {rng.choice(("before", "after")): (lambda session=session: pay(session)) if session in paying else bool}
        faults = [None] * 6 + [Fault.DROP_BEFORE, Fault.DROP_AFTER, Fault.FAILED, Fault.FAILED_AFTER, Fault.LOCKED]
        at.faults.add(rng.choice(faults), f"*/{session}/expire", **moves)  # type: ignore[arg-type]  # named above
    rounds = 0
    while at.rows("SELECT FROM orders WHERE status = 'open' LIMIT 1"):
        at.expire(at.context(threads=4, later=timedelta(minutes=rounds), seconds_max=600.0))
        rounds += 1
        assert rounds < 10
    rng.shuffle(at.account.events)
    at.deliver()

    held = {row["id"]: row["status"] for row in at.rows("SELECT id, status FROM orders")}
    assert held == {session: at.account.expected_status(session) for session in sessions}
    assert {"paid", "expired"} <= set(held.values())
    counted = at.rows("SELECT subject_id, kind, count(*) AS times FROM changes GROUP BY 1, 2 HAVING count(*) > 1")
    assert counted == []
    assert at.rows("SELECT FROM anomalies") == []


def test_without_a_key_the_clock_decides(database_url: str, redis_url: str) -> None:
    """Without a key our clock expires a session past its expires_at and the grace; any real event outranks that."""
    with stage(database_url, redis_url, STRIPE_API_KEY="") as at:
        (stale, late) = at.open(2, ago=24 * HOUR + 59 * 60)
        assert at.expire().counted == {}
        at.account.advance(2 * 60)
        assert at.expire().counted == {"expired_by_clock": 2}
        assert (at.status(stale), at.status(late)) == ("expired", "expired")
        assert at.api.calls == []
        assert at.expire().counted == {}

        at.account.now -= 3 * HOUR
        at.account.complete(late)
        at.deliver()
        assert (at.status(stale), at.status(late)) == ("expired", "paid")


def test_rows_without_a_key_are_never_called_for(at: Stage) -> None:
    """Rows of a mode or account without a key are not changed, and are counted."""
    (session,) = at.open()
    for account, livemode in (("", True), ("shop", False)):
        body = at.account.session(session) | {"livemode": livemode}
        with database.transaction(at.engine) as connection, database.cursor(connection) as cursor:
            observed = observations.observe(
                SESSION_REGISTERED,
                body,
                account=account,
                livemode=livemode,
                created=body["created"],
                now=at.now,
            )
            inbox.record(cursor, [observed])
    at.fold()

    found = at.expire()

    assert found.counted == {"expired": 1, "not_served": 2}
    assert len(at.api.calls) == 1
    open_ones = at.rows("SELECT account, livemode FROM orders WHERE status = 'open' ORDER BY account")
    assert open_ones == [{"account": "", "livemode": True}, {"account": "shop", "livemode": False}]


def test_a_pass_can_be_looked_at_first(at: Stage) -> None:
    """A dry run lists the sessions to expire with the reasons, oldest first, without a call."""
    (old,) = at.open(ago=HOUR)
    (stale,) = at.open(ago=HOUR)

    listed = expiry.listed(at.context())

    assert [(row["id"], row["action"], row["why"]) for row in listed] == [
        (old, "expire at Stripe", "open for 120 minutes, of 60 allowed"),
        (stale, "expire at Stripe", "open for 60 minutes, of 60 allowed"),
    ]
    assert at.api.calls == []


def test_nothing_is_called_without_redis(at: Stage) -> None:
    """While Redis, which holds the budget, is down, the job waits, and no session is lost or called twice."""
    (session,) = at.open()
    with Redis(host="127.0.0.1", port=1) as no_redis:
        found = at.expire(
            JobContext(at.engine, StripeApi(at.settings, no_redis), at.settings, now=lambda: at.now, threads=1)
        )

    assert "Redis does not answer" in found.failed[0]
    assert at.expire().counted == {"expired": 1}
    assert [made.status for made in at.api.calls] == [200]
    assert at.status(session) == "expired"
