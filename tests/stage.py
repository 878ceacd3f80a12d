"""The sandbox Stripe on a port, and the jobs that call it, for the tests of Payfold's calls to Stripe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from tempfile import TemporaryDirectory
from typing import Any

from redis import Redis
from sqlalchemy import Engine

from deploy.sandbox.account import START, Account
from deploy.sandbox.http_api import StripeApi as SandboxApi
from deploy.sandbox.server import Faults, serving
from schemas import database, inbox, observations
from schemas.own_events import SESSION_REGISTERED
from schemas.settings import Settings
from schemas.stripe_api import ANSWER_SECONDS_MAX, BODY_SECONDS_MAX, StripeApi
from tests import ledger
from worker.stripe_jobs import expiry
from worker.stripe_jobs.rounds import JobContext, JobResult

KEY = "sk_test_sandbox_key_that_must_stay_secret"
HOUR = 3_600


@dataclass(frozen=True)
class Stage:
    """A shop's account at the sandbox, its API on a port, and a job context with the account's clock."""

    account: Account
    api: SandboxApi
    faults: Faults
    engine: Engine
    settings: Settings
    redis: Redis
    environment: dict[str, str]
    """The settings, for a process of its own."""

    def context(
        self,
        *,
        threads: int = 1,
        later: timedelta = timedelta(0),
        retries_max: int = 0,
        answer_seconds_max: float = ANSWER_SECONDS_MAX,
        body_seconds_max: float = BODY_SECONDS_MAX,
        **more: Any,  # noqa: ANN401 - the context's own
    ) -> JobContext:
        """Return a worker's job context with a clock *later* than Stripe's; the SDK does not retry by itself."""
        api = StripeApi(
            self.settings,
            self.redis,
            retries_max=retries_max,
            answer_seconds_max=answer_seconds_max,
            body_seconds_max=body_seconds_max,
        )
        return JobContext(self.engine, api, self.settings, now=lambda: self.now + later, threads=threads, **more)

    @property
    def now(self) -> datetime:
        """The account's time."""
        return datetime.fromtimestamp(self.account.now, UTC)

    def open(self, count: int = 1, *, ago: int = 2 * HOUR, **fields: Any) -> list[str]:  # noqa: ANN401 - a session's own
        """Open and register sessions, let *ago* seconds pass, and return them."""
        sessions = [self.account.open_session(**fields) for _ in range(count)]
        self.register(sessions)
        self.account.advance(ago)
        return sessions

    def register(self, sessions: list[str]) -> None:
        """Record *sessions* as the shop does when it has opened them, and fold them."""
        registered = [
            observations.observe(
                SESSION_REGISTERED,
                self.account.session(session),
                account="",
                livemode=False,
                created=self.account.now,
                now=self.now,
            )
            for session in sessions
        ]
        with database.transaction(self.engine) as connection, database.cursor(connection) as cursor:
            inbox.record(cursor, registered)
        self.fold()

    def fold(self) -> None:
        """Fold what is pending."""
        ledger.fold(self.engine)

    def deliver(self) -> None:
        """Take in every event of the account."""
        ledger.record(self.engine, [ledger.delivery(event.body) for event in self.account.events])
        self.fold()

    def expire(self, context: JobContext | None = None) -> JobResult:
        """Run the clock's job that expires stale sessions, and fold what it recorded."""
        found = expiry.run_once(context or self.context())
        self.fold()
        return found

    def status(self, session: str) -> str | None:
        """Return the status of an order."""
        (row,) = self.rows("SELECT status FROM orders WHERE id = :id", id=session)
        status: str | None = row["status"]
        return status

    def rows(self, statement: str, **values: object) -> list[dict[str, Any]]:
        """Return the rows that *statement* selects."""
        return ledger.rows(self.engine, statement, **values)

    def kinds(self, session: str) -> list[str]:
        """Return the kinds of an order's changes."""
        return ledger.kinds(self.engine, session)

    def statuses(self) -> list[tuple[str, int | None]]:
        """Return the calls in order: the last word of the path, and the status of the answer."""
        return [(f"{made.method} {made.path.rsplit('/', 1)[-1][:6]}", made.status) for made in self.api.calls]


@contextmanager
def stage(
    database_url: str,
    redis_url: str,
    *,
    seed: int = 8,
    start: int = START,
    history: Callable[[], Account] | None = None,
    **settings: str,
) -> Iterator[Stage]:
    """Serve an account of *seed*, or one with a *history*, and yield it with the jobs that call it.

    *settings* are laid over the usual ones.
    """
    account = Account(seed=seed, payments=True, start=start) if history is None else history()
    api, faults = SandboxApi({KEY: account}), Faults()
    engine = database.engine(database_url, connections_max=9)
    with serving(api, faults) as address, Redis.from_url(redis_url) as redis, TemporaryDirectory() as folder:
        environment = {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "STRIPE_API_KEY": KEY,
            "STRIPE_API_BASE": address,
            "PAYFOLD_DATA_DIR": folder,
            "PAYFOLD_STRIPE_CALLS_PER_SECOND": "1000",
            **settings,
        }
        yield Stage(account, api, faults, engine, Settings.load(environment), redis, environment)
    engine.dispose()
