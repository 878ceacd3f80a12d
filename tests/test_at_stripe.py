"""Payfold's reads at Stripe: open sessions, fields that events leave out, and missing events; and its secrets."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from deploy.sandbox.account import Account
from deploy.sandbox.line_items import MANY, line_items
from deploy.sandbox.server import Fault
from schemas import database, inbox, observations
from schemas.budget import Lane
from schemas.errors import NotServed
from schemas.observations import World
from schemas.stripe_api import StripeApi
from tests import ledger
from tests.stage import HOUR, KEY, Stage, stage
from tests.waiting import until
from tests.web import OPERATOR, READER, serving, settings_of
from worker.stripe_jobs import discovery, expiry, fetches, gaps
from worker.stripe_jobs.rounds import JobContext, JobResult

HERE = World("", livemode=False)


@pytest.fixture
def at(database_url: str, redis_url: str) -> Iterator[Stage]:
    """Return a shop at the sandbox with nothing in it."""
    with stage(database_url, redis_url) as made:
        yield made


def poll(at: Stage, context: JobContext | None = None) -> JobResult:
    """Run the clock's job that lists open sessions, and fold the result."""
    found = discovery.run_once(context or at.context())
    at.fold()
    return found


def fetch(at: Stage, context: JobContext | None = None) -> JobResult:
    """Run the clock's job that reads the objects that are due from Stripe, and fold what it recorded."""
    found = fetches.run_once(context or at.context())
    at.fold()
    return found


def fill(at: Stage, context: JobContext | None = None, **more: Any) -> JobResult:  # noqa: ANN401 - the job's own
    """Run the clock's job that fetches missing events, and fold them."""
    found = gaps.run_once(context or at.context(), **more)
    at.fold()
    return found


def paths(at: Stage) -> list[str]:
    """Return the paths of the calls, without ids."""
    words = (made.path.removeprefix("/v1/").split("/") for made in at.api.calls)
    return ["/".join(word for word in parts if word.islower() and not any(map(str.isdigit, word))) for parts in words]


# Open sessions.


def test_sessions_of_visitors_are_found(at: Stage) -> None:
    """A payment link's visitor has an open session that no event reports; the poll records it as an open order."""
    link = at.account.create_payment_link()
    visitor, cart = at.account.open_session(payment_link=link), at.account.open_session()
    at.account.complete(at.account.open_session())

    assert poll(at).recorded == 2
    assert (at.status(visitor), at.status(cart)) == ("open", "open")
    assert at.kinds(visitor) == ["order.opened"]
    assert poll(at).recorded == 0
    at.account.advance(120)
    assert poll(at).recorded == 0


def test_all_pages_are_asked_for(at: Stage) -> None:
    """Hundreds of open sessions are listed with one call for each hundred."""
    for _ in range(250):
        at.account.open_session()

    assert poll(at).recorded == 250
    assert len(at.api.calls) == 3


def test_windows_overlap(at: Stage) -> None:
    """A session that Stripe lists some minutes late is found by a later poll."""
    poll(at)
    at.account.advance(200)
    late = at.account.open_session()
    at.account.advance(120)
    poll(at)
    at.account.peek("checkout.session", late)["created"] -= 260
    again = at.account.open_session()
    at.account.peek("checkout.session", again)["created"] -= 260

    poll(at)

    assert {at.status(late), at.status(again)} == {"open"}


def test_open_sessions_bring_their_lines(at: Stage) -> None:
    """The poll records the lines of the shop's own carts, and by default no lines of links' sessions."""
    cart = next(s for s in (at.account.open_session(amount=900) for _ in range(50)) if len(lines(at, s)) < MANY)
    visitor = at.account.open_session(payment_link=at.account.create_payment_link())
    poll(at)

    held = at.rows("SELECT id, lines_complete FROM orders WHERE id = ANY (:ids) ORDER BY 2", ids=[cart, visitor])
    assert held == [{"id": visitor, "lines_complete": False}, {"id": cart, "lines_complete": True}]


def lines(at: Stage, session: str) -> list[dict[str, Any]]:
    """Return a session's true lines."""
    return line_items(at.account.session(session))


@pytest.mark.parametrize(("setting", "expected"), [("off", [False, False]), ("all", [True, True])])
def test_a_setting_decides_which_lines_are_kept(
    database_url: str, redis_url: str, setting: str, expected: list[bool]
) -> None:
    """The lines of no session are read, or those of every session."""
    with stage(database_url, redis_url, PAYFOLD_OPEN_SESSION_LINES=setting) as at:
        for link in (None, at.account.create_payment_link()):
            at.account.open_session(payment_link=link)
        poll(at)
        fetch(at)
        assert [row["lines_complete"] for row in at.rows("SELECT lines_complete FROM orders")] == expected


# Fields that events leave out.


def long_session(at: Stage) -> str:
    """Return a session with more lines than a first page shows."""
    while True:
        session = at.account.open_session(amount=5_000)
        if len(lines(at, session)) == MANY:
            return session


def test_the_lines_of_a_completed_order_are_read_in_whole(at: Stage) -> None:
    """All pages of the lines are read, and add up to the order's total."""
    session = long_session(at)
    at.account.complete(session)
    at.deliver()

    assert fetch(at).counted == {"sessions": 1}
    found = at.rows("SELECT id, amount_total FROM order_lines WHERE order_id = :id", id=session)
    assert {row["id"] for row in found} == {line["id"] for line in lines(at, session)}
    assert sum(row["amount_total"] for row in found) == 5_000
    assert fetch(at).counted == {}


def test_the_lines_of_a_registered_session_are_read(at: Stage) -> None:
    """A registered session has no lines; they are read, so that its expiry can report them."""
    (session,) = at.open(ago=HOUR)
    fetch(at)
    at.expire()

    ((change,)) = at.rows("SELECT after FROM changes WHERE kind = 'order.expired'")
    assert len(change["after"]["lines"]) == len(lines(at, session))


def test_a_setup_session_sells_nothing(at: Stage) -> None:
    """No lines are read of a session that only saves a card."""
    at.account.complete(at.account.open_session(mode="setup"))
    at.deliver()

    assert fetch(at).counted == {}
    assert at.api.calls == []


def test_a_moved_balance_is_explained_by_its_ledger(at: Stage) -> None:
    """All transactions of the customer are read once, in every currency, and later only new ones."""
    customer = at.account.create_customer(currency="usd")
    for amount in (-300, 100, -50):
        at.account.adjust_balance(customer, amount)
    at.account.adjust_balance(customer, -700, currency="eur")
    at.deliver()

    assert fetch(at).counted == {"ledgers": 1}
    expected = [("eur", -700), ("usd", -250)]
    held = at.rows("SELECT currency, amount FROM balances ORDER BY currency")
    assert [tuple(row.values()) for row in held] == expected
    assert at.rows("SELECT count(*) AS rows FROM balance_transactions") == [{"rows": 4}]
    assert fetch(at).counted == {}
    at.account.advance(5)
    at.account.adjust_balance(customer, 25)
    at.deliver()
    assert fetch(at).recorded == 1
    assert ledger.anomalies(at.engine) == []


def test_a_long_ledger_is_listed_whole_or_not_at_all(at: Stage) -> None:
    """If a page fails, no page is recorded, since the next read would stop at the first known transaction."""
    customer = at.account.create_customer(currency="usd")
    for amount in range(1, 251):
        at.account.adjust_balance(customer, amount)
    at.deliver()
    at.faults.add(None, "*/balance_transactions", times=1)
    at.faults.add(Fault.FAILED, "*/balance_transactions")

    assert fetch(at).counted == {"postponed": 1}
    assert at.rows("SELECT FROM balance_transactions") == []
    fetch(at, at.context(later=timedelta(minutes=1)))
    assert at.rows("SELECT count(*) AS rows FROM balance_transactions") == [{"rows": 250}]


def test_a_ledger_is_as_old_as_its_first_page(at: Stage) -> None:
    """All pages are dated by the first one, since entries may be added between the first page and the last."""
    customer = at.account.create_customer(currency="usd")
    for amount in range(1, 251):
        at.account.adjust_balance(customer, amount)
    at.deliver()
    at.faults.add(None, "*/balance_transactions", times=3, after=lambda: at.account.advance(10))

    assert fetch(at).recorded == 250
    read = at.rows("SELECT DISTINCT created FROM inbox WHERE source = 'observation'")
    # An answer is dated by a whole second, less the duration of the call.
    assert [at.now - timedelta(seconds=30) - row["created"] <= timedelta(seconds=2) for row in read] == [True]


def test_all_lines_of_a_long_credit_note(at: Stage) -> None:
    """All lines are read of a note if its event has only the first page."""
    customer = at.account.create_customer(currency="usd")
    invoice = at.account.create_invoice(customer, 5_000)
    at.account.finalize_invoice(invoice)
    note = at.account.issue_credit_note(invoice, 2_300, lines=[100] * 23)
    at.deliver()
    assert at.rows("SELECT lines_complete FROM credit_notes") == [{"lines_complete": False}]

    fetch(at)

    assert at.rows("SELECT lines_complete FROM credit_notes") == [{"lines_complete": True}]
    assert at.rows("SELECT count(*) AS lines FROM credit_note_lines WHERE credit_note = :id", id=note) == [
        {"lines": 23}
    ]


def test_an_object_with_an_ambiguous_order_is_read(at: Stage) -> None:
    """If several last states are possible, a read at Stripe decides, and the anomaly ends."""
    link = at.account.create_payment_link()
    at.deliver()
    at.account.advance(5)
    for campaign in ("spring", "autumn"):
        changed = at.account.payment_link(link) | {"metadata": {"campaign": campaign}}
        at.account.emit("payment_link.updated", changed)
    at.deliver()
    assert ledger.anomalies(at.engine) == ["ambiguous_order"]
    at.account.advance(30)

    assert fetch(at, at.context(later=timedelta(days=30))).counted == {"objects": 1}
    assert ledger.anomalies(at.engine) == []
    assert at.rows("SELECT metadata FROM payment_links") == [{"metadata": {}}]


def thin(number: int, kind: str, **fields: Any) -> bytes:  # noqa: ANN401 - JSON values
    """Return a thin event."""
    least = {"id": f"evt_thin_{number}", "object": "v2.core.event", "livemode": False, "type": kind}
    return msgspec.json.encode(least | {"created": "2026-11-01T00:00:01.000Z"} | fields)


def test_a_thin_event_brings_its_twin(at: Stage) -> None:
    """The snapshot of a thin event is fetched once, unless it was delivered already; both are one event."""
    first, second = at.account.open_session(), at.account.open_session()
    at.account.complete(first)
    at.account.complete(second)
    twins = [event for event in at.account.events if event.type == "checkout.session.completed"]
    ledger.record(at.engine, [ledger.delivery(twins[0].body)])
    for number, (twin, session) in enumerate(zip(twins, (first, second), strict=True)):
        about = {"id": session, "type": "checkout.session", "url": "/v1/x"}
        body = thin(number, "v1.checkout.session.completed", snapshot_event=twin.id, related_object=about)
        ledger.record(at.engine, [ledger.delivery(body)])
    at.fold()

    fetch(at, at.context(later=timedelta(days=20)))

    assert at.api.count("/v1/events/*") == 1
    assert (at.status(first), at.status(second)) == ("paid", "paid")
    assert at.rows("SELECT source FROM inbox WHERE id = :id", id=twins[1].id) == [{"source": "gap"}]


@pytest.mark.parametrize("odd", [b'"\\u0000"', b'"\\ud800"', b"1e999999"])
def test_an_odd_thin_event_holds_up_no_other(at: Stage, odd: bytes) -> None:
    """A thin event that PostgreSQL does not accept as JSON is recorded, and the object of the next one is read."""
    session = at.account.open_session()
    at.account.complete(session)
    about = {"id": session, "type": "checkout.session", "url": "/v1/x"}
    wanted = thin(1, "v1.checkout.session.completed", related_object=about)
    strange = thin(2, "v1.checkout.session.completed", related_object={**about, "id": "cs_2"})
    ledger.record(at.engine, [ledger.delivery(strange[:-1] + b',"reason":' + odd + b"}"), ledger.delivery(wanted)])
    at.fold()

    fetch(at, at.context(later=timedelta(days=20)))

    assert at.status(session) == "paid"


def test_every_page_of_thin_events_is_read(at: Stage) -> None:
    """The object of a thin event is read, even behind many thin events of objects that are not read."""
    session = at.account.open_session()
    at.account.complete(session)
    others = [
        thin(number, "v1.account.updated", related_object={"id": f"acct_{number}", "type": "account", "url": "/v1/x"})
        for number in range(fetches.THIN_EVENTS_READ)
    ]
    about = {"id": session, "type": "checkout.session", "url": "/v1/x"}
    wanted = thin(fetches.THIN_EVENTS_READ, "v1.checkout.session.completed", related_object=about)
    ledger.record(at.engine, [ledger.delivery(body) for body in (*others, wanted)])
    at.fold()

    fetch(at, at.context(later=timedelta(days=20)))

    assert at.status(session) == "paid"


def test_an_event_that_was_never_generated(at: Stage) -> None:
    """Stripe reports an event that it did not generate by a thin event; the named object is read once."""
    customer = at.account.create_customer(currency="usd", email="buyer@example.com")
    about = {"id": customer, "type": "customer", "url": "/v1/customers/x"}
    kind = "v2.core.health.event_generation_failure.resolved"
    ledger.record(at.engine, [ledger.delivery(thin(1, kind, related_object=about))])
    at.fold()

    assert fetch(at, at.context(later=timedelta(days=22))).counted == {"objects": 1}
    assert fetch(at, at.context(later=timedelta(days=22))).counted == {}
    assert at.rows("SELECT email FROM customers") == [{"email": "buyer@example.com"}]


def test_an_answer_older_than_an_event_changes_nothing(at: Stage) -> None:
    """An answer is dated before its call, so a newer event that it does not show still decides the row."""
    session = at.account.open_session()
    api = at.context().api
    answer = api.call(HERE, "get", "checkout", "sessions", session, lane=Lane.REFETCH)
    assert answer.at <= at.account.now
    at.account.complete(session)
    at.deliver()
    lagging = observations.of_answer("payfold.checkout.session.observed", answer, HERE, now=at.now)
    with database.transaction(at.engine) as connection, database.cursor(connection) as cursor:
        inbox.record(cursor, [lagging])
    at.fold()

    assert at.status(session) == "paid"
    assert at.kinds(session) == ["order.paid"]


def test_objects_of_old_events_are_not_read(at: Stage) -> None:
    """A log of last year is folded without a call to Stripe."""
    at.account.complete(at.account.open_session())
    at.deliver()

    assert fetch(at, at.context(later=timedelta(days=31))).counted == {}


# Missing events.


def test_gaps_are_filled(at: Stage) -> None:
    """Events that Stripe lists and the inbox lacks are recorded once and counted; the tables are then complete."""
    for _ in range(30):
        at.account.complete(at.account.open_session())
        at.account.advance(60)
    generated = [event for event in at.account.events if event.type.startswith("checkout.")]
    ledger.record(at.engine, [ledger.delivery(event.body) for event in generated[::3]])
    at.account.advance(120)

    filled = fill(at, since=at.now - timedelta(days=1))

    wanted = {event.id for event in at.account.events if event.type in gaps.wanted_types()}
    assert {row["id"] for row in at.rows("SELECT id FROM inbox")} == wanted
    assert filled.recorded == len(wanted) - 10
    assert at.rows("SELECT DISTINCT source FROM inbox ORDER BY 1") == [{"source": "gap"}, {"source": "webhook"}]
    assert at.rows("SELECT count(*) AS paid FROM orders WHERE status = 'paid'") == [{"paid": 30}]
    assert fill(at).recorded == 0
    assert at.rows("SELECT found FROM stripe_jobs") == [{"found": filled.recorded}]


def test_a_later_start_leaves_no_gap(at: Stage) -> None:
    """A run with a later start than the checkpoint fills its own range; the next run continues from the checkpoint."""
    fill(at)
    at.account.complete(at.account.open_session())
    at.account.advance(3 * HOUR)

    assert fill(at, since=at.now - timedelta(hours=1)).recorded == 0
    assert fill(at).recorded > 0
    assert at.rows("SELECT count(*) AS paid FROM orders WHERE status = 'paid'") == [{"paid": 1}]


def test_types_are_requested_in_few_calls(at: Stage) -> None:
    """Every type that a fold reads is requested, in as few calls as Stripe allows."""
    fill(at, since=at.now - timedelta(hours=1))

    asked = [set(made.params["types"].values()) for made in at.api.calls]
    assert set().union(*asked) == set(gaps.wanted_types())
    assert len(asked) == -(-len(gaps.wanted_types()) // gaps.TYPES_MAX)


def test_a_long_gap_is_filled_in_steps(at: Stage) -> None:
    """When its time is over the job saves a checkpoint, from which the next run continues."""
    at.account.advance(3 * 24 * HOUR)
    at.account.complete(at.account.open_session())
    at.account.advance(300)
    first = at.account.open_session()
    ledger.record(
        at.engine, [ledger.delivery(at.account.emit("checkout.session.expired", at.account.session(first)).body)]
    )
    with database.transaction(at.engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("UPDATE inbox SET received_at = %s", (at.now - timedelta(days=3),))
    rounds = 0
    while fill(at, at.context(seconds_max=0.0)).is_more:
        rounds += 1

    assert rounds == 12
    assert at.rows("SELECT count(*) AS paid FROM orders WHERE status = 'paid'") == [{"paid": 1}]


def test_a_full_window_is_left_between_its_pages(at: Stage) -> None:
    """A job at the end of its time budget stops after the current page, and further runs finish it."""
    for _ in range(250):
        at.account.complete(at.account.open_session())
        at.account.open_session()
        at.account.advance(60)
    ledger.record(at.engine, [ledger.delivery(at.account.events[0].body)])
    ledger.execute(at.engine, "UPDATE inbox SET received_at = :then", then=at.now - timedelta(hours=5))
    lists = -(-len(gaps.wanted_types()) // gaps.TYPES_MAX)
    wanted = [event for event in at.account.events if event.created <= (at.now - gaps.SETTLED).timestamp()]

    for run_once, calls_max in ((gaps.run_once, lists), (discovery.run_once, 1)):
        context, rounds, is_more = at.context(seconds_max=0.0), 0, True
        while is_more and rounds < 200:
            before, rounds = len(at.api.calls), rounds + 1
            is_more = run_once(context).is_more
            assert len(at.api.calls) - before <= calls_max
        assert 5 < rounds < 200
    assert at.rows("SELECT count(*) AS events FROM inbox WHERE source <> 'observation'") == [
        {"events": sum(event.type in gaps.wanted_types() for event in wanted)}
    ]
    assert at.rows("SELECT count(*) AS found FROM inbox WHERE source = 'observation'") == [{"found": 250}]


def test_an_old_checkpoint_is_logged(at: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """Stripe lists events of thirty days: a job that has not run for twenty-six days logs a warning and continues."""
    fill(at)
    at.account.advance(26 * 24 * HOUR)

    fill(at)

    # Another test of this process may have redirected the log to stdout or stderr.
    assert "stripe.checkpoint_is_old" in "".join(capsys.readouterr())
    assert not fill(at).is_more


def test_a_quiet_hour_costs_less_than_a_hundred_calls(at: Stage) -> None:
    """An hour of the clock's jobs without any event costs less than a hundred calls."""
    settings = at.settings
    jobs = {
        settings.payfold_expire_seconds: expiry.run_once,
        settings.payfold_fetch_seconds: fetches.run_once,
        settings.payfold_poll_seconds: discovery.run_once,
        settings.payfold_gap_seconds: gaps.run_once,
    }
    assert len(jobs) == 4
    for second in range(HOUR):
        for every, run_once in jobs.items():
            if second % every == 0:
                run_once(at.context())
        at.account.advance(1)

    assert 0 < len(at.api.calls) < 100


# Keys, and secrets.


def test_a_connected_account_is_called_in_its_own_name(database_url: str, redis_url: str) -> None:
    """A connected account's sessions are expired with the platform's key and the account's id in the header."""
    with stage(database_url, redis_url) as at:
        theirs = Account(seed=9, account="acct_9")
        at.api._connected = {(KEY, "acct_9"): theirs}
        session = theirs.open_session()
        theirs.complete(theirs.open_session())
        ledger.record(at.engine, [ledger.delivery(event.body) for event in theirs.events])
        at.fold()
        poll(at)
        theirs.advance(2 * HOUR)
        at.account.advance(2 * HOUR)
        at.expire()

        assert theirs.expected_status(session) == "expired"
        assert at.rows("SELECT account, status FROM orders WHERE id = :id", id=session) == [
            {"account": "acct_9", "status": "expired"}
        ]
        assert {made.stripe_account for made in at.api.calls} == {None, "acct_9"}


def test_an_account_that_is_not_connected_stops_nothing(at: Stage) -> None:
    """Stripe refuses access to such an account: its jobs pause, and the shop's own jobs continue."""
    stranger = Account(seed=10, account="acct_stranger")
    stranger.complete(stranger.open_session())
    ledger.record(at.engine, [ledger.delivery(event.body) for event in stranger.events])
    at.fold()
    mine = at.account.open_session()

    found = poll(at)

    assert any("acct_stranger" in reason for reason in found.failed)
    assert at.status(mine) == "open"


def test_no_key_serves_the_other_mode(at: Stage) -> None:
    """A test key is never used for a live row."""
    with pytest.raises(NotServed):
        at.context().api.call(World("", livemode=True), "get", "events", lane=Lane.REFETCH)
    assert at.api.calls == []


def test_an_id_is_never_a_path(at: Stage) -> None:
    """An id with slashes and question marks is encoded, so that no other path is called."""
    api = at.context().api
    with pytest.raises(Exception, match="no such object"):
        api.call(HERE, "get", "checkout", "sessions", "../events?limit=1", lane=Lane.REFETCH)


def test_the_shop_expires_one_now(at: Stage, database_url: str, redis_url: str) -> None:
    """The route expires an open order at Stripe and answers with the result, also if the buyer was faster."""
    first, second = at.open(2, ago=60)
    at.account.complete(second)
    with serving(_web_settings(at, database_url, redis_url)) as web:
        done = web.client.post(f"/v1/orders/{first}/expire", headers=OPERATOR)
        late = web.client.post(f"/v1/orders/{second}/expire", headers=OPERATOR)
        none = web.client.post("/v1/orders/cs_none/expire", headers=OPERATOR)
        reader = web.client.post(f"/v1/orders/{first}/expire", headers=READER)

    assert (done.status_code, done.json()["session_status"]) == (200, "expired")
    assert (late.status_code, none.status_code, reader.status_code) == (409, 404, 403)
    assert "buyer has completed it" in late.text
    at.fold()
    assert (at.status(first), at.status(second)) == ("expired", "paid")


def test_failures_of_stripe_are_answered_to_the_shop(at: Stage, database_url: str, redis_url: str) -> None:
    """A lost answer is resolved by a read; a failure is answered 503, 502 or 404, and the order does not change."""
    lost, open_one, gone = at.open(3, ago=60)
    del at.account._objects["checkout.session"][gone]
    with serving(_web_settings(at, database_url, redis_url)) as web:

        def expire(session: str) -> tuple[int, dict[str, Any]]:
            answer = web.client.post(f"/v1/orders/{session}/expire", headers=OPERATOR)
            return answer.status_code, answer.json()

        at.faults.add(Fault.DROP_AFTER, f"*/{lost}/expire")
        assert expire(lost)[0] == 200
        assert len({made.idempotency_key for made in at.api.calls}) == 1
        assert expire(gone)[0] == 404
        at.faults.add(Fault.UNAVAILABLE, "*/expire")
        assert expire(open_one)[0] == 503
        at.api._forbidden = {KEY: ("/v1/checkout",)}
        refused = expire(open_one)
    assert (refused[0], refused[1]["type"]) == (502, "urn:payfold:problem:key_refused")
    at.fold()
    assert [at.status(session) for session in (lost, open_one, gone)] == ["expired", "open", "open"]
    assert ledger.anomalies(at.engine) == ["missing_at_stripe"]


def test_an_order_is_read_now(at: Stage, database_url: str, redis_url: str) -> None:
    """The route reads a session at Stripe and records what is new, once, and a session that Stripe does not know."""
    paid, gone = at.open(2, ago=60)
    at.account.complete(paid)
    del at.account._objects["checkout.session"][gone]
    with serving(_web_settings(at, database_url, redis_url)) as web:

        def read(session: str, headers: dict[str, str] = OPERATOR, query: str = "") -> tuple[int, dict[str, Any]]:
            answer = web.client.post(f"/v1/orders/{session}/read{query}", headers=headers)
            return answer.status_code, answer.json()

        first, second = read(paid), read(paid)
        assert [each[1].pop("recorded") for each in (first, second)] == [True, False]
        shown = {"id": paid, "account": "", "livemode": False, "session_status": "complete", "payment_status": "paid"}
        assert first == second == (200, shown)
        until(lambda: web.fold_messages() == 1)
        assert (read(gone)[0], read("cs_none")[0], read(paid, READER)[0]) == (404, 404, 403)
        assert read(paid, query="?livemode=true")[0] == 404
        ledger.execute(
            at.engine,
            "INSERT INTO orders (account, livemode, id, event_id, as_of)"
            " VALUES ('acct_1', true, 'cs_1', 'evt_1', now())",
        )
        assert (read("cs_1")[0], read("cs_1")[1]["type"]) == (409, "urn:payfold:problem:not_served")
        at.faults.add(Fault.UNAVAILABLE, f"*/{paid}")
        assert read(paid)[0] == 503
        at.api._forbidden = {KEY: ("/v1/checkout",)}
        assert (read(paid)[0], read(paid)[1]["type"]) == (502, "urn:payfold:problem:key_refused")
    at.fold()
    assert (at.status(paid), at.status(gone)) == ("paid", "open")
    assert ledger.anomalies(at.engine) == ["missing_at_stripe"]
    assert {made.method for made in at.api.calls} == {"GET"}


def test_an_order_in_doubt_is_read_again(at: Stage, database_url: str, redis_url: str) -> None:
    """What is read of an order in doubt is recorded although it is not new, since it may end the doubt."""
    (session,) = at.open(ago=60)
    with serving(_web_settings(at, database_url, redis_url)) as web:

        def recorded() -> bool:
            found: bool = web.client.post(f"/v1/orders/{session}/read", headers=OPERATOR).json()["recorded"]
            return found

        assert [recorded(), recorded()] == [True, False]
        ledger.execute(
            at.engine,
            "INSERT INTO anomalies (account, livemode, id, kind, subject, subject_id, detail, event_id, as_of, seen_at)"
            " VALUES ('', false, 'anm_1', 'ambiguous_order', 'order', :id, '{}', 'evt_1', now(), now())",
            id=session,
        )
        at.account.advance(1)
        assert recorded()


def _web_settings(at: Stage, database_url: str, redis_url: str) -> Any:  # noqa: ANN401 - settings
    return settings_of(
        database_url,
        redis_url,
        STRIPE_API_KEY=KEY,
        STRIPE_API_BASE=at.settings.stripe_api_base,
        PAYFOLD_STRIPE_CALLS_PER_SECOND="1000",
    )


def test_a_portal_url_is_answered_once_and_kept_nowhere(
    at: Stage, database_url: str, redis_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The route answers with the url, and no log, table or Redis key contains it or any API key."""
    customer = at.account.create_customer(email="buyer@example.com")
    at.deliver()
    with serving(_web_settings(at, database_url, redis_url)) as web:
        made = web.client.post(
            f"/v1/customers/{customer}/portal-sessions",
            headers=OPERATOR,
            json={"return_url": "https://shop.example.com"},
        )
        wrong = web.client.post(
            f"/v1/customers/{customer}/portal-sessions", headers=OPERATOR, json={"configuration": "bpc_0"}
        )
    assert made.status_code == 201, made.text
    url = made.json()["url"]
    assert url.startswith("https://billing.stripe.com/")
    assert made.headers["cache-control"] == "no-store"
    assert wrong.status_code in {404, 422}
    at.deliver()
    at.open()
    at.faults.add(Fault.FAILED, "*/expire")
    at.expire()
    poll(at)
    fetch(at)
    fill(at)

    logged = "".join(capfd.readouterr())
    dumped = subprocess.run(
        [sys.executable, "-c", _DUMP, database_url, redis_url],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert customer in dumped
    for place in (logged, dumped):
        assert KEY not in place
        assert url not in place
        assert url.rsplit("/", 1)[-1] not in place
    # Payfold writes nothing else at Stripe.
    written = {made.path.rsplit("/", 1)[-1] for made in at.api.calls if made.method != "GET"}
    assert written == {"sessions", "expire"}
    assert at.rows("SELECT customer, return_url FROM portal_sessions") == [
        {"customer": customer, "return_url": "https://shop.example.com"}
    ]


# All data of PostgreSQL and Redis, as text.
_DUMP = """
import sys, psycopg, redis
with psycopg.connect(sys.argv[1]) as connection:
    names = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    for (name,) in names:
        for row in connection.execute(f"SELECT * FROM {name}").fetchall():
            print(name, row)
with redis.Redis.from_url(sys.argv[2]) as client:
    for key in client.keys("*"):
        print(key, client.dump(key))
"""


def test_without_a_key_nothing_is_read(database_url: str, redis_url: str) -> None:
    """Without a key the jobs that call Stripe do nothing."""
    with stage(database_url, redis_url, STRIPE_API_KEY="") as at:
        at.account.complete(at.account.open_session())
        at.deliver()
        for run_once in (discovery.run_once, fetches.run_once, gaps.run_once):
            assert run_once(JobContext(at.engine, StripeApi(at.settings, None), at.settings)).counted == {}
        assert at.api.calls == []
