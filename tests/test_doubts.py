"""Readings at Stripe that end a doubt about the order of events, and how often a doubt is read that does not end."""

from collections.abc import Iterator
from datetime import timedelta
from fnmatch import fnmatchcase

import pytest

from deploy.sandbox.rendering import twin
from tests import ledger
from tests.stage import Stage, stage
from worker.folding import projection
from worker.stripe_jobs import fetches

DAY = 24 * 3_600


@pytest.fixture
def at(database_url: str, redis_url: str) -> Iterator[Stage]:
    """Return a shop at the sandbox with nothing in it."""
    with stage(database_url, redis_url) as made:
        yield made


def fold(at: Stage, later: timedelta = timedelta(0)) -> None:
    """Fold what is pending, at the account's time or *later*."""
    projection.fold_pending(at.engine, now=at.now + later)


def deliver(at: Stage, *, twins: int = 0) -> None:
    """Take in every event of the account, and as many of the last ones as *twins* once more under other ids."""
    events = at.account.events
    bodies = [event.body for event in [*events, *(twin(event) for event in events[len(events) - twins :])]]
    ledger.record(at.engine, [ledger.delivery(body) for body in bodies])
    fold(at)


def fetch(at: Stage, later: timedelta = timedelta(0)) -> None:
    """Run the job that reads what is due, and fold what it recorded half a second later.

    The job's clock is *later* than Stripe's.
    """
    fetches.run_once(at.context(later=later))
    fold(at, later + timedelta(seconds=0.5))


def pass_seconds(at: Stage, seconds: int) -> None:
    """Let time pass, with a round of the job in every second."""
    for _ in range(seconds):
        at.account.advance(1)
        fetch(at)


def calls(at: Stage, path: str) -> int:
    """Return how often *path* was called."""
    return sum(fnmatchcase(made.path, path) for made in at.api.calls)


def observations(at: Stage, object_id: str) -> int:
    """Return how many observations the inbox holds of an object."""
    (row,) = at.rows(
        "SELECT count(*) AS found FROM inbox WHERE source = 'observation' AND object_id = :id", id=object_id
    )
    found: int = row["found"]
    return found


def back_and_forth(at: Stage, times: int) -> str:
    """Return a customer whose balance went from 0 to -500 and back within one second, so many *times*."""
    customer = at.account.create_customer(currency="usd")
    at.account.advance(5)
    for _ in range(times):
        at.account.adjust_balance(customer, -500)
        at.account.adjust_balance(customer, 500)
    return customer


def changes(at: Stage, customer: str) -> list[int]:
    """Return the amounts by which a balance changed, in any order."""
    rows = at.rows("SELECT amount FROM balance_changes WHERE customer = :id ORDER BY amount", id=customer)
    return [row["amount"] for row in rows]


def test_the_ledger_shows_how_often_a_balance_moved(at: Stage) -> None:
    """Four equal steps are two with a twin each, or four: the ledger decides, of whatever age, and is read once."""
    honest = back_and_forth(at, 2)
    at.account.advance(5)
    repeated = back_and_forth(at, 1)
    at.account.advance(40 * DAY)
    deliver(at, twins=2)
    assert ledger.anomalies(at.engine) == ["ambiguous_order", "ambiguous_order"]

    pass_seconds(at, 90)

    assert ledger.anomalies(at.engine) == []
    assert (changes(at, honest), changes(at, repeated)) == ([-500, -500, 500, 500], [-500, 500])
    for customer in (honest, repeated):
        assert (calls(at, f"/v1/customers/{customer}"), observations(at, customer)) == (1, 1)
        assert calls(at, f"/v1/customers/{customer}/*") == 1


def test_a_reading_of_the_same_second_is_made_again(at: Stage) -> None:
    """A reading in the second of the events decides nothing; the next ones end the doubts, and nothing more is read."""
    link = at.account.create_payment_link()
    customer = back_and_forth(at, 1)
    moves = at.account.events[-2:]
    for campaign in ("spring", "autumn"):
        changed = at.account.payment_link(link) | {"metadata": {"campaign": campaign}}
        at.account.emit("payment_link.updated", changed)
    ledger.record(at.engine, [ledger.delivery(twin(event).body) for event in moves])
    deliver(at)
    fetch(at)
    assert ledger.anomalies(at.engine) == ["ambiguous_order", "ambiguous_order"]

    pass_seconds(at, 8)
    settled = ledger.anomalies(at.engine)
    made = len(at.api.calls)
    pass_seconds(at, 70)

    assert (settled, len(at.api.calls)) == ([], made)
    assert changes(at, customer) == [-500, 500]
    assert at.rows("SELECT metadata FROM payment_links") == [{"metadata": {}}]
    # Each transaction is recorded as it was first read, and the newest once more, since that dates the ledger.
    read = at.rows(
        "SELECT count(*) AS times FROM inbox WHERE object_type = 'customer_balance_transaction' GROUP BY object_id"
    )
    assert sorted(row["times"] for row in read) == [1, 2]


def test_a_doubt_that_no_reading_ends(at: Stage) -> None:
    """If Stripe lists no transaction the doubt stays, and what is known is not recorded again.

    What is missing is asked for after growing pauses. A new event lets the customer be read again.
    """
    customer = at.account.create_customer(currency="usd")
    at.account.advance(5)
    now = at.account.object("customer", customer)
    for before, after in ((0, -500), (-500, 0)) * 2:
        at.account.emit("customer.updated", now | {"balance": after}, {"balance": before})
    deliver(at)
    at.account.advance(5)

    pass_seconds(at, 100)

    assert (calls(at, f"/v1/customers/{customer}"), observations(at, customer)) == (1, 1)
    # Pauses of 2, 4, 8, 16 and 32 seconds, each a quarter shorter or longer and up to a second late.
    assert 4 <= calls(at, "*/balance_transactions") <= 7
    assert ledger.anomalies(at.engine) == ["ambiguous_order"]
    at.account.advance(DAY)
    for _ in range(20):
        at.account.advance(3_600)
        fetch(at)
    assert calls(at, "*/balance_transactions") <= 9
    at.account.update_customer(customer, name="Zoë")
    deliver(at)
    at.account.advance(5)
    pass_seconds(at, 90)
    assert (calls(at, f"/v1/customers/{customer}"), observations(at, customer)) == (2, 2)


def test_a_clock_that_stands_still(at: Stage) -> None:
    """If all answers of Stripe are dated before the events, the readings end in time, and one is recorded."""
    link = at.account.create_payment_link()
    at.account.advance(5)
    for campaign in ("spring", "autumn"):
        changed = at.account.payment_link(link) | {"metadata": {"campaign": campaign}}
        at.account.emit("payment_link.updated", changed, created=at.account.now + 60)
    deliver(at)

    for second in range(90):
        fetch(at, timedelta(seconds=second))
    for hour in range(1, 30):
        fetch(at, timedelta(hours=hour))

    assert 5 <= calls(at, f"/v1/payment_links/{link}") <= 9
    assert observations(at, link) == 1
    assert ledger.anomalies(at.engine) == ["ambiguous_order"]


def test_a_doubt_that_comes_back(at: Stage) -> None:
    """A late event ends a doubt, and another one brings it back a day later: then the object is read."""
    link = at.account.create_payment_link()
    at.account.advance(5)
    began = at.account.now

    def arrives(to: str, before: str | None = None) -> None:
        changed = at.account.payment_link(link) | {"metadata": {"campaign": to}}
        previous = None if before is None else {"metadata": {"campaign": before}}
        at.account.emit("payment_link.updated", changed, previous, created=began)

    arrives("spring")
    arrives("autumn")
    deliver(at)
    doubts = [ledger.anomalies(at.engine)]
    arrives("autumn", "spring")
    deliver(at)
    doubts.append(ledger.anomalies(at.engine))
    at.account.advance(DAY)
    fetch(at)
    arrives("spring", "autumn")
    deliver(at)
    doubts.append(ledger.anomalies(at.engine))

    pass_seconds(at, 5)

    assert doubts == [["ambiguous_order"], [], ["ambiguous_order"]]
    assert (ledger.anomalies(at.engine), calls(at, f"/v1/payment_links/{link}")) == ([], 1)
