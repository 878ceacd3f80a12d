"""The state of the whole system: read from PostgreSQL and Redis in bounded time, for commands, routes and metrics.

Note [A count that takes too long is null]
    Each query has a bound of its own, and all of them together have one. A query that exceeds its bound, or waits for
    a lock for that long, answers null: a part of a count would be wrong, and the other values are shown all the same.

Note [Who is expected]
    A worker and a clock are expected where a web process beat within the last minute, or a webhook is pending. They are
    silent once they were expected, and not seen, for longer than their limit. So a system that is just being started
    after a pause of days has no fault. The worker is judged by its fold turns and by the consumer of each queue, so
    that a slot that hangs is found while the other one works.

The queries are texts for the driver: a command that shows a status starts in half the time without SQLAlchemy.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, LiteralString, NamedTuple, Self, TypeVar

import psycopg
from psycopg.rows import dict_row, scalar_row
from pydantic import Field

from schemas import accounts, database, migrate, progress
from schemas.database import Bounds, Cursor, Driver
from schemas.heartbeats import RUNNING
from schemas.queues import FOLD, FOLD_QUEUE, RECONCILE, RECONCILE_ASKED, STRIPE_QUEUE, SWEEP, Plain, short_name
from schemas.readers import Answer, Id, Public, Word
from schemas.settings import Settings

if TYPE_CHECKING:
    from redis import Redis
    from sqlalchemy import Connection

SILENT_SECONDS: Final = 30.0
"""A clock or a worker without a heartbeat for this long is silent; a beat is 5 seconds old before it is written."""
WEB_SECONDS: Final = 60.0
"""A web process that beat within this is there, so that a worker and a clock are expected."""
SWEEPS_MISSED: Final = 4
"""So many intervals of the sweep may pass without a fold turn: the worker's own timer begins after three."""
RECONCILE_STEP_SECONDS_MAX: Final = progress.STEP_SECONDS_MAX
"""For so long a slot is not silent that is at a step of a reconciliation."""
_RECONCILING: Final = frozenset(map(short_name, (RECONCILE, RECONCILE_ASKED)))
QUERY_SECONDS_MAX: Final = 1.0
READ_SECONDS_MAX: Final = 3.0
"""For all queries together."""
LATENCY_SEQS_MAX: Final = 500
"""Events by which the time from Stripe to the tables is judged: the last that were recorded."""
FAULTS_SECONDS: Final = 120.0
"""For this long the faults that were found are kept: they change only with the settings, or with a rename."""
READ: Final = Bounds(statement=2, lock=1, whole=5)
"""Of the transaction in which a status is read."""
WEEKS: Final = 4
STRIPE_JOBS_MAX: Final = 100
"""Jobs at Stripe that are listed, those in trouble first: each account has four."""
WEBHOOK_SEQS_MAX: Final = 1_000_000
"""The last webhook is looked for among this many of the newest events."""
UNCOMMITTED_SEQS_MAX: Final = 10_000
"""This many of the newest events are looked at again, since one with a lower number may commit later."""


class Broker(Answer):
    """How Redis is, and how many messages wait there; null where it cannot be asked."""

    state: Literal["ok", "away", "unset"]
    fold_waiting: int | None = None
    stripe_waiting: int | None = None


class StripeJob(Answer):
    """A job at Stripe, for one account and mode."""

    job: Word
    account: Id
    livemode: bool
    state: Literal["ok", "failing", "stopped"] = Field(description="stopped: Stripe refuses the key")
    cause: Word | None = Field(description="why it is stopped or failing")
    since: datetime | None = Field(description="since when no round has ended well; null where it is not known")
    done_at: datetime | None = Field(description="when a round last ended well")


class Stripe(Answer):
    """What the jobs at Stripe have come to."""

    state: Literal["ok", "failing", "stopped", "unset"] = Field(description="of the job that is worst; unset: no key")
    jobs: list[StripeJob] = Field(description=f"those in trouble first, {STRIPE_JOBS_MAX} at most")
    calls_waiting: int | None
    calls_given_up: int | None
    events_fetched: int | None = Field(description="events that were fetched since they never came")


class Heartbeat(Answer):
    """The freshest heartbeat of a kind of loop; null where none was ever written."""

    kind: Word = Field(description="web, clock, fold or consumer")
    name: Word = Field(description="of a consumer its queue, else empty")
    at: datetime | None
    age_seconds: float | None


class Job(Answer):
    """The last run of a job of the worker."""

    job: Word
    at: datetime = Field(description="when it ended, or when it last came further where it is running")
    age_seconds: float
    outcome: Word | None = Field(
        description="ok, running, or the kind of error that ended it; null where its process ended before"
    )


class Cause(Answer):
    """How many events are parked for one cause."""

    cause: Word | None = Field(description="null where a release before kept none")
    count: int


class Webhooks(Answer):
    """Deliveries by Stripe that brought a new event; what was replayed, fetched or observed does not count."""

    last_received_at: datetime | None = Field(
        description=f"null where there is none among the last {WEBHOOK_SEQS_MAX:,} events"
    )
    age_seconds: float | None
    last_hour: int | None
    same_hour_weeks_before: list[int | None] = Field(
        description="the same hour of the last four weeks, the last first; null before the first event was recorded"
    )


class Refused(Answer):
    """Deliveries that were refused for one reason."""

    reason: Word
    count: int
    since: datetime
    last_at: datetime


class Delivered(Answer):
    """Deliveries that ended in one way, since they are counted."""

    outcome: Word = Field(description="new, copy, duplicate, postponed (503, since the database was away) or failed")
    count: int
    since: datetime
    last_at: datetime


class Latency(Answer):
    """The time from Stripe to the tables, of the last webhooks: the median, and the longest but one in twenty."""

    webhooks: int = Field(description=f"how many were looked at, of the last {LATENCY_SEQS_MAX:,} events")
    to_us_median: float = Field(description="seconds from Stripe's event to our commit; Stripe counts whole seconds")
    to_us_p95: float
    to_row_median: float = Field(description="seconds from our commit to the folded row")
    to_row_p95: float


class Withheld(Answer):
    """Changes that are kept out of the feed for one reason."""

    reason: Word
    count: int


class LastRun(Answer):
    """How the last reconciliation ended."""

    finished_at: datetime
    age_seconds: float
    outcome: Word = Field(
        description="ok, drift or incomplete: no difference, and a part that was asked for was not looked at"
    )
    drift: int


class Reconciliation(LastRun):
    """The last reconciliation."""

    id: int
    checks: Public[list[str]]


class Silent(Heartbeat):
    """An expected process, or a slot of the worker, that gives no sign of life."""

    process: Literal["worker", "clock"]
    job: Word | None = Field(description="the job that it was last seen at")


class Fault(Answer):
    """What a person has to put right."""

    code: Word
    detail: Word
    command: Word = Field(description="what to type")


class Status(Answer):
    """How everything is. Null is what is not known: the database is away or behind, or a count took too long."""

    database: Literal["ok", "away"]
    migrations: Public[list[str]] | None = Field(
        default=None, description="the pending ones; the rest is null where there are any"
    )
    broker: Broker
    at: datetime | None = Field(default=None, description="the database's time, by which every age is measured")
    expected: Public[list[str]] | None = Field(
        default=None, description="worker and clock, where they are expected to run"
    )
    silent: list[Silent] | None = Field(default=None, description="those of the expected that give no sign of life")
    faults: list[Fault] | None = Field(default=None, description="what a person has to put right")
    heartbeats: list[Heartbeat] | None = None
    jobs: list[Job] | None = None
    stripe: Stripe | None = None
    webhooks: Webhooks | None = None
    refused: list[Refused] | None = None
    deliveries: list[Delivered] | None = Field(default=None, description="those that were not refused, by outcome")
    latency: Latency | None = Field(default=None, description="null where no webhook is among the last events")
    pending: int | None = None
    pending_to_be_tried_again: int | None = None
    oldest_pending_received_at: datetime | None = None
    oldest_pending_age_seconds: float | None = Field(default=None, description="null where nothing is pending")
    parked: int | None = None
    parked_by_cause: list[Cause] | None = None
    withheld: int | None = None
    withheld_by_reason: list[Withheld] | None = None
    fold_version: int | None = None
    to_fold_anew: int | None = Field(default=None, description="outcomes of an older fold version")
    to_fold_anew_archived: int | None = Field(
        default=None, description="those of them that `rebuild --archive` alone can fold"
    )
    anomalies_in_force: int | None = None
    last_event_seq: int | None = None
    last_event_received_at: datetime | None = None
    last_change_seq: int | None = None
    reconciliation: Reconciliation | None = Field(default=None, description="the last; null where there is none")
    not_known: Public[list[str]] | None = Field(
        default=None, description="the names of those of these values that are null, or null in part, for want of time"
    )


class Overview(Answer):
    """What of a status is shown without a token: ages, counts and codes of ours, null where not known."""

    at: datetime = Field(description="the database's time at which it was read, by which every age is measured")
    heartbeats: list[Heartbeat] | None
    jobs: list[Job] | None
    pending: int | None
    pending_to_be_tried_again: int | None
    oldest_pending_age_seconds: float | None
    parked_by_cause: list[Cause] | None
    webhooks: Webhooks | None
    refused: list[Refused] | None
    withheld_by_reason: list[Withheld] | None
    fold_version: int | None
    to_fold_anew: int | None
    reconciliation: LastRun | None
    not_known: Public[list[str]] | None

    @classmethod
    def of_status(cls, status: Status | None) -> "Overview | None":
        """Return the overview of *status*; None where nothing is known."""
        if status is None or status.at is None:
            return None
        found = {name: getattr(status, name) for name in cls.model_fields}
        run = status.reconciliation
        last = None if run is None else LastRun(**{name: getattr(run, name) for name in LastRun.model_fields})
        return cls(**found | {"reconciliation": last})


class Health(Answer):
    """Whether this process can take deliveries, and how its neighbours are."""

    ready: bool
    database: str = Field(
        description="ok, or why nothing can be recorded: away, silent, read_only, locked, full, slow, exhausted,"
        " refused or failed"
    )
    migrations: str = Field(description="ok, pending, or unknown")
    broker: str = Field(description="reported only: a broker that is away does not stop deliveries")
    stripe: str = Field(
        description="reported only: ok, no key, unknown, or stopped with the jobs that Stripe refuses, and failing with"
        " those that end before their time"
    )
    workers: str = Field(description="reported only: ok, silent, not_expected or unknown")
    clock: str = Field(description="reported only, likewise")
    status: Overview | None = Field(description="reported only, up to a minute old; null where not known")


class Limits(NamedTuple):
    """After how many seconds without a heartbeat a process is silent."""

    silent: float = SILENT_SECONDS
    web: float = WEB_SECONDS

    def of(self, kind: str, sweep_seconds: float) -> float:
        """Return the limit of a kind of loop; a fold turn may come as seldom as the worker's own timer lets it."""
        return max(self.silent, SWEEPS_MISSED * sweep_seconds + self.silent / 3) if kind == "fold" else self.silent


@dataclass(slots=True)
class Memory:
    """Values that one process keeps from one read to the next, since they cost much and seldom change."""

    faults: list[Fault] | None = None
    faults_at: float = 0.0
    webhook_seq: int = 0
    """Up to this event the last webhook was looked for, and *webhook_at* is when it was received."""
    webhook_at: datetime | None = None


def broker_state(redis: "Redis | Plain | None") -> Broker:
    """Return how the broker is; None stands for a broker that no setting names."""
    if redis is None:
        return Broker(state="unset")
    try:
        fold, stripe = (redis.llen(queue) for queue in (FOLD_QUEUE, STRIPE_QUEUE))
    except _redis_is_away():
        return Broker(state="away")
    return Broker(state="ok", fold_waiting=fold, stripe_waiting=stripe)


def _redis_is_away() -> tuple[type[Exception], ...]:
    """Return the errors of a Redis that does not answer: the client is loaded only where there is one."""
    from redis.exceptions import RedisError

    return (RedisError, OSError)


def away(broker: Broker) -> Status:
    """Return what is known while PostgreSQL does not answer."""
    return Status(database="away", broker=broker)


def read(
    connection: "Connection | Driver",
    settings: Settings,
    *,
    broker: Broker,
    fold_version: int,
    limits: Limits = Limits(),  # noqa: B008 - it is frozen
    seconds_max: float = READ_SECONDS_MAX,
    memory: "Memory | None" = None,
) -> Status:
    """Return the status, within about *seconds_max*; open the transaction of *connection* with ``READ``.

    See Note [A count that takes too long is null]. A process that reads often hands in the same *memory* each time.

    Raises:
        DriverError: PostgreSQL goes away, or refuses a query.
    """
    driver = connection if isinstance(connection, psycopg.Connection) else database.driver_of(connection)
    with driver.cursor() as cursor:
        behind = migrate.pending_for(cursor)
    if behind:
        return Status(database="ok", migrations=behind, broker=broker)
    query = _Bounded(driver, seconds_max)
    now = _now(driver)
    memory = memory or Memory()
    # The queries on the inbox come last: if another session holds it, they take all the time that is left.
    parts: list[Callable[[], Values]] = [
        lambda: {"refused": query.answers(Refused, _REFUSED)},
        lambda: {"deliveries": query.answers(Delivered, _DELIVERED)},
        lambda: _grouped(query.answers(Cause, _PARKED), "parked", "parked_by_cause"),
        lambda: _grouped(query.answers(Withheld, _WITHHELD), "withheld", "withheld_by_reason"),
        lambda: _folding(query, fold_version),
        lambda: {"anomalies_in_force": query.value(_ANOMALIES)},
        lambda: {"last_change_seq": query.value(_LAST_CHANGE)},
        lambda: {"reconciliation": _reconciliation(query, now)},
        lambda: {"stripe": _stripe(query, settings)},
        lambda: _waiting(query, now),
        lambda: _liveness(query, now, settings, limits),
        lambda: query.row(_LAST_EVENT, "last_event_seq", "last_event_received_at"),
        lambda: {"faults": _faults(query, settings, memory)},
        lambda: {"webhooks": _webhooks(query, now, memory)},
        lambda: {"latency": _latency(query)},
    ]
    found: Values = {"at": now}
    not_known: list[str] = []
    for part in parts:
        missed = query.missed
        values = part()
        found |= values
        if query.missed > missed:
            not_known += [name for name, value in values.items() if value is None or isinstance(value, Answer)]
    return Status(database="ok", migrations=[], broker=broker, not_known=sorted(not_known), **found)


Values = dict[str, Any]
Row = TypeVar("Row", bound=Answer)
Found = TypeVar("Found")


class _Bounded:
    """The queries of one status, each of which is bounded: see Note [A count that takes too long is null]."""

    def __init__(self, driver: Driver, seconds_max: float) -> None:
        self._driver, self._until = driver, time.monotonic() + seconds_max
        self.missed = 0
        """How many queries took too long."""

    def seconds_left(self) -> float:
        """Return how long the next query may take."""
        return min(QUERY_SECONDS_MAX, self._until - time.monotonic())

    def rows(self, query: LiteralString, **values: object) -> list[dict[str, Any]] | None:
        """Return the rows of *query*; None if they take too long."""

        def fetched(driver: Driver) -> list[dict[str, Any]]:
            with driver.cursor(row_factory=dict_row) as cursor:
                return cursor.execute(query, values).fetchall()

        return self.within(fetched)

    def within(self, work: Callable[[Driver], Found]) -> Found | None:
        """Return what *work* returns; None where a statement of its takes too long."""
        seconds = self.seconds_left()
        if seconds <= 0:
            self.missed += 1
            return None
        self._driver.execute(f"SAVEPOINT part; {_timeout(seconds)}")
        try:
            found = work(self._driver)
        except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable):
            self._driver.execute("ROLLBACK TO SAVEPOINT part")
            self.missed += 1
            return None
        self._driver.execute("RELEASE SAVEPOINT part")
        return found

    def row(self, query: LiteralString, *names: str, **values: object) -> dict[str, Any]:
        """Return the one row of *query*; each value is None, by its name, where there is none or it takes too long."""
        rows = self.rows(query, **values)
        return rows[0] if rows else dict.fromkeys(names)

    def value(self, query: LiteralString, **values: object) -> Any:  # noqa: ANN401 - a value of any type
        """Return the one value of *query*, likewise."""
        return next(iter(self.row(query, "value", **values).values()))

    def answers(self, model: type[Row], query: LiteralString, **values: object) -> list[Row] | None:
        """Return the rows of *query* as *model* has them."""
        rows = self.rows(query, **values)
        return None if rows is None else [model(**row) for row in rows]


def _timeout(seconds: float) -> str:
    return f"SET LOCAL statement_timeout = {max(1, round(seconds * 1000))}"


class _UntilCursor(Cursor):
    """Lets all its statements together take until a moment of the monotonic clock, and each the time that is left."""

    until = float("inf")

    def execute(self, *given: Any, **options: Any) -> Self:  # noqa: ANN401 - as the driver's
        """Execute a statement."""
        seconds = self.until - time.monotonic()
        if seconds <= 0:
            raise psycopg.errors.QueryCanceled
        super().execute(_timeout(seconds))
        return super().execute(*given, **options)


def _now(driver: Driver) -> datetime:
    with driver.cursor(row_factory=scalar_row) as cursor:
        now: Any = cursor.execute("SELECT now()").fetchone()
    moment: datetime = now.astimezone(UTC)
    return moment


def _seconds(at: datetime, now: datetime) -> float:
    """Return how many seconds ago *at* was; a time that a skewed clock put into the future counts as now."""
    return max(0.0, round((now - at).total_seconds(), 3))


def _age(at: datetime | None, now: datetime) -> float | None:
    return None if at is None else _seconds(at, now)


def _faults(query: _Bounded, settings: Settings, memory: "Memory") -> list[Fault] | None:
    """Return the faults that a person has to mend: those found a short while ago, else those found now."""
    if memory.faults is None or time.monotonic() - memory.faults_at >= FAULTS_SECONDS:
        memory.faults = query.within(partial(_look_for_faults, settings, time.monotonic() + query.seconds_left()))
        memory.faults_at = time.monotonic()
    return memory.faults


def _look_for_faults(settings: Settings, until: float, driver: Driver) -> list[Fault]:
    with _UntilCursor(driver) as cursor:
        cursor.until = until
        return [
            Fault(code=each.code, detail=each.detail, command=each.command)
            for each in accounts.faults(cursor, settings)
        ]


# ---- Liveness ----

_LOOPS: Final = (("web", ""), ("clock", ""), ("fold", ""), ("consumer", FOLD_QUEUE), ("consumer", STRIPE_QUEUE))
_JUDGED: Final[dict[str, Literal["clock", "worker"]]] = {"clock": "clock", "fold": "worker", "consumer": "worker"}
_FOLDING_JOBS: Final = frozenset(map(short_name, (FOLD, SWEEP)))

_BEATS: Final = "SELECT kind, name, at, since, outcome FROM heartbeats ORDER BY kind, name, at"


def _liveness(query: _Bounded, now: datetime, settings: Settings, limits: Limits) -> dict[str, Any]:
    """Return the heartbeats, the jobs, the expected processes, and the silent ones: see Note [Who is expected]."""
    beats = query.rows(_BEATS)
    if beats is None:
        return dict.fromkeys(("heartbeats", "jobs", "expected", "silent"))
    missed = query.missed
    webhook_waits_since = query.value(_OLDEST_WEBHOOK)
    # Of several processes the one that was seen last is kept: it comes last.
    found = {(beat["kind"], beat["name"]): beat for beat in beats}
    heartbeats = [
        Heartbeat(kind=kind, name=name, at=at, age_seconds=_age(at, now))
        for kind, name in _LOOPS
        for at in [found[kind, name]["at"] if (kind, name) in found else None]
    ]
    jobs = [
        Job(job=name, at=beat["at"], age_seconds=_seconds(beat["at"], now), outcome=_outcome(beat, found))
        for (kind, name), beat in found.items()
        if kind == "job"
    ]
    expected_for = _expected_for(beats, webhook_waits_since, now, limits)
    if expected_for is None and query.missed > missed:
        return {"heartbeats": heartbeats, "jobs": jobs, "expected": None, "silent": None}
    return {
        "heartbeats": heartbeats,
        "jobs": jobs,
        "expected": [] if expected_for is None else ["worker", "clock"],
        "silent": [] if expected_for is None else _silent(heartbeats, jobs, expected_for, settings, limits),
    }


def _queue_of(job: str) -> str:
    return FOLD_QUEUE if job in _FOLDING_JOBS else STRIPE_QUEUE


def _outcome(job: Mapping[str, Any], found: Mapping[tuple[str, str], Mapping[str, Any]]) -> str | None:
    """Return how a job ended; None where it was running and its process has been followed by another."""
    consumer = found.get(("consumer", _queue_of(job["name"])))
    is_lost = job["outcome"] == RUNNING and consumer is not None and consumer["since"] > job["at"]
    return None if is_lost else job["outcome"]


def _expected_for(
    beats: Sequence[Mapping[str, Any]], webhook_waits_since: datetime | None, now: datetime, limits: Limits
) -> float | None:
    """Return for how many seconds a worker and a clock have been expected; None where they are not."""
    since = [beat["since"] for beat in beats if beat["kind"] == "web" and _seconds(beat["at"], now) <= limits.web]
    if webhook_waits_since is not None:
        since.append(webhook_waits_since)
    return max((_seconds(each, now) for each in since), default=None)


def _silent(
    heartbeats: Sequence[Heartbeat], jobs: Sequence[Job], expected_for: float, settings: Settings, limits: Limits
) -> list[Silent]:
    """Return the processes that were not seen for too long; a process that just began has as much time first."""
    running = {_queue_of(job.job): job for job in jobs if job.outcome == RUNNING}
    found = []
    for beat in heartbeats:
        process = _JUDGED.get(beat.kind)
        unseen_for = expected_for if beat.age_seconds is None else min(beat.age_seconds, expected_for)
        if process is None or unseen_for <= limits.of(beat.kind, settings.payfold_sweep_seconds):
            continue
        job = running.get(beat.name or FOLD_QUEUE) if process == "worker" else None
        if not _is_reconciling(job):
            found.append(Silent(**beat.model_dump(), process=process, job=job.job if job else None))
    return found


def _is_reconciling(job: Job | None) -> bool:
    """Return whether a slot is at a reconciliation, the steps of which are long."""
    return job is not None and job.job in _RECONCILING and job.age_seconds <= RECONCILE_STEP_SECONDS_MAX


# ---- What came, and what became of it ----

# When the first of the pending events was received.
_OLDEST: Final = """
SELECT received_at FROM inbox JOIN pending ON pending.seq = inbox.seq ORDER BY pending.seq LIMIT 1
"""
_OLDEST_WEBHOOK: Final = """
SELECT received_at FROM inbox JOIN pending ON pending.seq = inbox.seq WHERE inbox.source = 'webhook'
ORDER BY pending.seq LIMIT 1
"""
_WAITING: Final = """
SELECT count(*) AS pending, count(*) FILTER (WHERE due_at > now()) AS pending_to_be_tried_again FROM pending
"""


def _waiting(query: _Bounded, now: datetime) -> dict[str, Any]:
    """Return how much is pending, and how old the oldest of it is."""
    counted = query.row(_WAITING, "pending", "pending_to_be_tried_again")
    oldest = query.value(_OLDEST) if counted["pending"] != 0 else None
    return counted | {"oldest_pending_received_at": oldest, "oldest_pending_age_seconds": _age(oldest, now)}


def _grouped(found: Sequence[Cause] | Sequence[Withheld] | None, total: str, parts: str) -> dict[str, Any]:
    return {total: None if found is None else sum(each.count for each in found), parts: found}


_PARKED: Final = """
SELECT cause, count(*) AS count FROM outcomes WHERE state = 'parked' GROUP BY cause ORDER BY cause
"""
_WITHHELD: Final = """
SELECT withheld AS reason, count(*) AS count FROM changes WHERE withheld IS NOT NULL
GROUP BY withheld ORDER BY withheld
"""
_ANOMALIES: Final = "SELECT count(*) FROM anomalies WHERE resolved_at IS NULL"
_LAST_EVENT: Final = """
SELECT seq AS last_event_seq, received_at AS last_event_received_at FROM inbox ORDER BY seq DESC LIMIT 1
"""
_LAST_CHANGE: Final = "SELECT max(seq) FROM changes"
_REFUSED: Final = """
SELECT reason, count, since, last_at FROM delivery_counts WHERE outcome = 'refused' ORDER BY reason
"""
_DELIVERED: Final = """
SELECT outcome, count, since, last_at FROM delivery_counts WHERE outcome <> 'refused' ORDER BY outcome
"""
_OLDER: Final = "SELECT count(*) FROM outcomes WHERE fold_version < %(fold_version)s"
_OLDER_ARCHIVED: Final = """
SELECT count(*) FROM outcomes
WHERE fold_version < %(fold_version)s AND NOT EXISTS (SELECT FROM payloads WHERE payloads.seq = outcomes.seq)
"""


def _folding(query: _Bounded, fold_version: int) -> dict[str, Any]:
    """Return how many outcomes are of an older fold version, and how many of those are archived."""
    older = query.value(_OLDER, fold_version=fold_version)
    return {
        "fold_version": fold_version,
        "to_fold_anew": older,
        # Each is looked up only if there are any.
        "to_fold_anew_archived": query.value(_OLDER_ARCHIVED, fold_version=fold_version) if older else older,
    }


_FIRST_EVENT: Final = "SELECT received_at FROM inbox ORDER BY seq LIMIT 1"
_LAST_SEQ: Final = "SELECT max(seq) FROM inbox"
_NEWEST_WEBHOOK: Final = """
SELECT received_at FROM inbox WHERE source = 'webhook' AND seq > %(after)s ORDER BY seq DESC LIMIT 1
"""
_WITHIN_HOUR: Final = """
SELECT count(*) FROM inbox WHERE source = 'webhook' AND received_at > %(since)s AND received_at <= %(until)s
"""


def _webhooks(query: _Bounded, now: datetime, memory: "Memory") -> Webhooks:
    last, first = _last_webhook(query, memory), query.value(_FIRST_EVENT)
    hours = [_received_within_hour(query, now - timedelta(weeks=weeks)) for weeks in range(WEEKS + 1)]
    before = [
        count if first is not None and first <= now - timedelta(weeks=weeks, hours=1) else None
        for weeks, count in enumerate(hours[1:], start=1)
    ]
    return Webhooks(
        last_received_at=last, age_seconds=_age(last, now), last_hour=hours[0], same_hour_weeks_before=before
    )


def _last_webhook(query: _Bounded, memory: "Memory") -> datetime | None:
    """Return when the last webhook was received; the events that an earlier read looked at are not looked at again."""
    missed = query.missed
    last_seq = query.value(_LAST_SEQ) or 0
    if last_seq < memory.webhook_seq:
        # The database was restored from an older backup.
        memory.webhook_seq, memory.webhook_at = 0, None
    after = max(memory.webhook_seq, last_seq - WEBHOOK_SEQS_MAX)
    found = query.value(_NEWEST_WEBHOOK, after=after)
    if query.missed > missed:
        return None
    memory.webhook_seq = max(0, last_seq - UNCOMMITTED_SEQS_MAX)
    memory.webhook_at = memory.webhook_at if found is None else found
    return memory.webhook_at


# With a limit, so that no estimate of the planner makes it read the whole inbox. An event that was folded again has the
# time of the last fold, so only the first fold counts.
_LATENCY: Final = """
WITH newest AS (SELECT * FROM inbox ORDER BY seq DESC LIMIT %(seqs_max)s), taken AS (
    SELECT extract(epoch FROM received_at - created) AS to_us, extract(epoch FROM folded_at - received_at) AS to_row
    FROM newest JOIN outcomes ON outcomes.seq = newest.seq
    WHERE source = 'webhook' AND state = 'folded' AND attempts = 1
)
SELECT count(*) AS webhooks,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY to_us) AS to_us_median,
    percentile_cont(0.95) WITHIN GROUP (ORDER BY to_us) AS to_us_p95,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY to_row) AS to_row_median,
    percentile_cont(0.95) WITHIN GROUP (ORDER BY to_row) AS to_row_p95
FROM taken
"""


def _latency(query: _Bounded) -> Latency | None:
    found = query.row(_LATENCY, "webhooks", seqs_max=LATENCY_SEQS_MAX)
    return Latency(**found) if found["webhooks"] else None


def _received_within_hour(query: _Bounded, until: datetime) -> int | None:
    count: int | None = query.value(_WITHIN_HOUR, since=until - timedelta(hours=1), until=until)
    return count


# ---- Stripe and the reconcile ----

_STRIPE_JOBS: Final = """
SELECT * FROM (
    SELECT job, account, livemode,
        CASE WHEN stopped_until > now() THEN 'stopped' WHEN failure IS NOT NULL THEN 'failing' ELSE 'ok' END AS state,
        CASE WHEN stopped_until > now() THEN stopped ELSE failure END AS cause,
        failed_at AS since, done_at
    FROM stripe_jobs
) AS jobs ORDER BY state = 'ok', job, account, livemode LIMIT %(jobs_max)s
"""
_STRIPE_CALLS: Final = """
SELECT count(*) FILTER (WHERE given_up IS NULL) AS calls_waiting,
    count(*) FILTER (WHERE given_up IS NOT NULL) AS calls_given_up
FROM stripe_calls
"""
_FETCHED: Final = "SELECT sum(found) FROM stripe_jobs"
# By their ends: the number of one that was asked for is older than its result.
_RECONCILIATION: Final = """
SELECT id, finished_at, outcome, drift, checks FROM reconciliations ORDER BY finished_at DESC, id DESC LIMIT 1
"""


def _worst(states: set[str], *, has_key: bool) -> Literal["ok", "failing", "stopped", "unset"]:
    """Return the state of the job that is worst; without a key one is left, which ends sessions by our clock."""
    if "stopped" in states:
        return "stopped"
    if "failing" in states:
        return "failing"
    return "ok" if has_key else "unset"


def _stripe(query: _Bounded, settings: Settings) -> Stripe | None:
    jobs = query.answers(StripeJob, _STRIPE_JOBS, jobs_max=STRIPE_JOBS_MAX)
    if jobs is None:
        return None
    return Stripe(
        state=_worst({str(job.state) for job in jobs}, has_key=bool(settings.api_keys)),
        jobs=jobs,
        events_fetched=query.value(_FETCHED),
        **query.row(_STRIPE_CALLS, "calls_waiting", "calls_given_up"),
    )


def _reconciliation(query: _Bounded, now: datetime) -> Reconciliation | None:
    rows = query.rows(_RECONCILIATION)
    return Reconciliation(**rows[0], age_seconds=_seconds(rows[0]["finished_at"], now)) if rows else None
