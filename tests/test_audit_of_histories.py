"""An audit of a consistent account finds no difference between Stripe's lists and the tables.

The account is the one of tests/hidden, which knows nothing of the folds. Its objects are served as Stripe lists them.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import Engine

from schemas import database
from schemas.inbox import Delivery
from schemas.observations import World
from schemas.settings import Settings
from schemas.stripe_api import StripeApi
from tests import ledger, stripe_lists
from tests.conftest import SEED_OPTION
from tests.hidden import judge, shop
from tests.hidden.account import Account, Body, Thing
from worker.proof import against_stripe, in_flight
from worker.proof.difference import Difference
from worker.proof.kinds import Listed
from worker.stripe_jobs.rounds import JobContext

SHORT = 10
MIDST = 5
MIDST_LONG = 15
LONG = 200
PATHS = {
    "orders": "checkout/sessions",
    "payment_links": "payment_links",
    "invoices": "invoices",
    "credit_notes": "credit_notes",
    "refunds": "refunds",
    "charges": "charges",
    "disputes": "disputes",
    "invoice_payments": "invoice_payments",
    "customers": "customers",
    "portal_configurations": "billing_portal/configurations",
}
KEYS = {World("", livemode=False): "sk_test_a", World("", livemode=True): "sk_live_a"}
KEYS[World("acct_1", livemode=False)] = "sk_test_b"
FLAGGED = {"order": "orders", "balance": "balances"}


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Return an engine for several workers on an empty database."""
    made = database.engine(database_url, connections_max=9)
    yield made
    made.dispose()


@pytest.mark.parametrize("histories", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
def test_an_honest_account(
    engine: Engine, redis_url: str, tmp_path: Path, request: pytest.FixtureRequest, histories: int
) -> None:
    """No row differs, by joining or by the map, unless an anomaly marks its order as ambiguous."""
    seed = random.Random(str(request.config.getoption(SEED_OPTION))).randrange(10**9)
    print(f"the account's seed is {seed}")  # noqa: T201 - repeats a failure
    accounts = [shop.live(f"{seed}.{number}", number, twins=0.0) for number in range(histories)]
    judge.take_in(engine, accounts, random.Random(seed))

    listed, found = audited(engine, redis_url, tmp_path, accounts)

    honest = [str(each) for each in found if not is_in_doubt(engine, each)]
    assert not honest, "\n".join(honest)
    for kind in ("checkout.session", "charge", "customer", "invoice"):
        assert listed[kind] > 0


@pytest.mark.parametrize("histories", [MIDST, pytest.param(MIDST_LONG, marks=pytest.mark.long)])
def test_an_account_in_the_midst(
    engine: Engine, redis_url: str, tmp_path: Path, request: pytest.FixtureRequest, histories: int
) -> None:
    """What Stripe reported within the last minute, and is not here yet, is no difference from what it lists."""
    chance = random.Random(str(request.config.getoption(SEED_OPTION)))
    seed = chance.randrange(10**9)
    print(f"the account's seed is {seed}")  # noqa: T201 - repeats a failure
    lived = [shop.live(f"{seed}.{number}", number, twins=0.0) for number in range(histories)]
    accounts: list[Account] = []
    late = 0
    # At each audit those before it are over.
    for account in sorted(lived, key=last_of):
        accounts.append(account)
        now = last_of(account) + chance.randrange(30)
        since = now - chance.randrange(30, in_flight.SETTLED.seconds)
        news = [each for _, each in account.deliveries if is_late(each, since)]
        late += len(news)
        take_in_some(engine, [each for _, each in account.deliveries if not is_late(each, since)], chance)

        _, found = audited(engine, redis_url, tmp_path, accounts, now=now, news=news)

        honest = [str(each) for each in found if not is_in_doubt(engine, each)]
        assert not honest, "\n".join((f"history {account.number}", *honest))
        take_in_some(engine, news, chance)
    assert late >= histories


def last_of(account: Account) -> int:
    """Return the second of the last event of *account*."""
    return max(each.envelope.created for _, each in account.deliveries)


def is_late(delivery: Delivery, since: int) -> bool:
    """Return whether *delivery* is a webhook of an event that Stripe created *since*."""
    return delivery.source != "observation" and delivery.envelope.created >= since


def take_in_some(engine: Engine, deliveries: Sequence[Delivery], chance: random.Random) -> None:
    """Record *deliveries* in any order, and fold them."""
    if deliveries:
        ledger.record(engine, chance.sample(deliveries, len(deliveries)))
    ledger.fold(engine)


def audited(
    engine: Engine,
    redis_url: str,
    folder: Path,
    accounts: Sequence[Account],
    *,
    now: int | None = None,
    news: Sequence[Delivery] = (),
) -> tuple[dict[str, int], list[Difference]]:
    """Return the number of listed objects of each kind, and the differences, at *now* or a day after the last event.

    The *news* are the events that Stripe lists.
    """
    now = max(account.now for account in accounts) + 86_400 if now is None else now
    listed: dict[str, int] = defaultdict(int)
    found: list[Difference] = []
    lists = served(accounts)
    for event in news:
        key = KEYS[World(event.account, event.envelope.livemode)]
        lists[key] = {**lists[key], "events": [*lists[key]["events"], json.loads(event.envelope.payload)]}
    with stripe_lists.serving(lists, now=now) as address, Redis.from_url(redis_url) as redis:
        settings = Settings.load(
            {
                "DATABASE_URL": engine.url.render_as_string(hide_password=False),
                "REDIS_URL": redis_url,
                "STRIPE_API_KEY": "sk_test_a,sk_live_a,acct_1=sk_test_b",
                "STRIPE_API_BASE": address,
                "PAYFOLD_DATA_DIR": str(folder),
                "PAYFOLD_STRIPE_CALLS_PER_SECOND": "1000",
            }
        )
        context = JobContext(engine, StripeApi(settings, redis), settings, now=lambda: datetime.fromtimestamp(now, UTC))
        for each in against_stripe.audit(context):
            if isinstance(each, Listed):
                listed[each.object] += each.listed
                assert (each.unreadable, each.archived) == (0, 0)
            else:
                found.append(each)
    return listed, found


def served(accounts: Sequence[Account]) -> dict[str, stripe_lists.Lists]:
    """Return the objects of each key: those that an event or a read has reported, in their final state."""
    worlds: dict[str, dict[str, list[Body]]] = {
        key: {path: [] for path in (*PATHS.values(), "events")} for key in KEYS.values()
    }
    for account in accounts:
        lists = worlds[KEYS[account.world]]
        for table, path in PATHS.items():
            lists[path] += [shown(thing) for thing in account.all_of(table) if thing.is_known and is_there(thing)]
        for customer in account.all_of("customers"):
            if not customer.facts["deleted"]:
                known = customer.facts["ledger"][: customer.facts["read_up_to"]]
                lists[f"customers/{customer.id}/balance_transactions"] = known[::-1]
    return worlds  # type: ignore[return-value]  # lists are sequences


def is_there(thing: Thing) -> bool:
    """Return whether an object can still be read at Stripe; a deleted draft cannot."""
    return thing.table != "invoices" or not thing.facts["deleted"]


def shown(thing: Thing) -> Body:
    """Return an object as Stripe lists it: a session with its lines, a deleted customer as id, type and ``deleted``."""
    if thing.table == "customers" and thing.facts["deleted"]:
        return {"id": thing.id, "object": "customer", "deleted": True}
    if thing.table == "orders":
        lines = {"object": "list", "data": thing.facts["lines"], "has_more": False}
        return {**thing.body, "line_items": lines}
    return thing.body


def is_in_doubt(engine: Engine, found: Difference) -> bool:
    """Return whether the row has an anomaly in force."""
    rows = ledger.rows(
        engine,
        "SELECT subject FROM anomalies WHERE resolved_at IS NULL AND (account, livemode, subject_id) = (:a, :l, :i)",
        a=found.account,
        l=found.livemode,
        i=found.id,
    )
    return any(FLAGGED.get(row["subject"], f"{row['subject']}s") == found.table for row in rows)
