"""Counts and measurements, in the format that Prometheus reads.

A value that is not known has no sample. A value of one web process alone has the label ``instance``; every other value
is the same from each process.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.counts import CONNECTION, OUTCOMES, REFUSED, Kind
from schemas.broker import RECONCILE, short_name
from schemas.heartbeats import OK, RUNNING
from schemas.status import Job, Reconciliation, Status

_DELIVERIES: Final = "Webhook deliveries answered, by what became of them."
_REFUSED: Final = "Webhook deliveries turned away for good, by reason."
_CONNECTIONS: Final = "Requests turned away before they were known to be deliveries, by reason."

Values = Mapping[tuple[str], float | None] | Mapping[tuple[str, str], float | None]


@dataclass(frozen=True)
class Instance:
    """A web process: its name among all, and when it began, in Unix seconds."""

    name: str
    began_at: float


@dataclass(frozen=True)
class Own:
    """The values of one web process: deliveries that wait for their commit, and counts that wait to be written."""

    instance: Instance
    in_flight: int
    unwritten: int


@dataclass(frozen=True)
class _Families(Collector):
    families: tuple[Metric, ...]

    def collect(self) -> Iterator[Metric]:
        return iter(self.families)


def exposition(totals: Mapping[Kind, int] | None, status: Status | None, own: Own, *, reconciles_daily: bool) -> bytes:
    """Return as text the *totals* of all processes, None where PostgreSQL does not answer, the status, and *own*.

    *reconciles_daily* is whether the clock is to ask for a reconciliation each day.
    """
    families = [
        _gauge("payfold_database_up", "Whether PostgreSQL answered just now.", int(totals is not None)),
        _gauge("payfold_reconciliation_is_daily", "Whether PAYFOLD_RECONCILE_AT is set.", int(reconciles_daily)),
    ]
    families += _of_process(own)
    if totals is not None:
        families += _deliveries(totals)
        families += _gauges(status) if status is not None else ()
    return generate_latest(_Families(tuple(family for family in families if family.samples)))


def _of_process(own: Own) -> Iterator[Metric]:
    for name, text, value in (
        ("payfold_web_start_time_seconds", "When the web process began, in Unix seconds.", own.instance.began_at),
        ("payfold_deliveries_in_flight", "Deliveries that wait for their commit.", own.in_flight),
        ("payfold_deliveries_unwritten", "Deliveries counted that are not in the totals yet.", own.unwritten),
    ):
        yield _gauge(name, text, {(own.instance.name,): value}, "instance")


def _deliveries(totals: Mapping[Kind, int]) -> tuple[Metric, ...]:
    deliveries = CounterMetricFamily("payfold_deliveries", _DELIVERIES, labels=["outcome"])
    for outcome in OUTCOMES:
        deliveries.add_metric([outcome], totals.get((outcome, ""), 0))
    refused = {
        REFUSED: CounterMetricFamily("payfold_deliveries_refused", _REFUSED, labels=["reason"]),
        CONNECTION: CounterMetricFamily("payfold_connections_refused", _CONNECTIONS, labels=["reason"]),
    }
    for (outcome, reason), count in sorted(totals.items()):
        if outcome in refused:
            refused[outcome].add_metric([reason], count)
    return deliveries, *refused.values()


def _gauges(status: Status) -> Iterator[Metric]:
    yield from _of_events(status)
    yield from _of_webhooks(status)
    yield from _of_processes(status)
    yield from _of_proof(status)
    yield from _of_stripe(status)
    yield from _of_faults(status)


def _of_events(status: Status) -> Iterator[Metric]:
    yield _gauge("payfold_events_pending", "Events that are not folded yet.", status.pending)
    yield _gauge(
        "payfold_events_pending_oldest_age_seconds",
        "Since the oldest pending event was received; 0 where none is pending.",
        0 if status.pending == 0 else status.oldest_pending_age_seconds,
    )
    yield _gauge(
        "payfold_events_retrying", "Pending events that wait to be tried again.", status.pending_to_be_tried_again
    )
    parked = {(each.cause or "unknown",): each.count for each in status.parked_by_cause or ()}
    yield _gauge("payfold_events_parked", "Events that cannot be folded, by cause.", parked, "cause")
    withheld = {(each.reason,): each.count for each in status.withheld_by_reason or ()}
    yield _gauge("payfold_changes_withheld", "Changes that are not in the feed, by reason.", withheld, "reason")
    yield _gauge("payfold_fold_version", "The version of the folds of this release.", status.fold_version)
    yield _gauge("payfold_outcomes_of_older_folds", "Events to be folded again by this release.", status.to_fold_anew)


def _of_webhooks(status: Status) -> Iterator[Metric]:
    if status.webhooks is None:
        return
    found = status.webhooks
    yield _gauge("payfold_webhook_last_age_seconds", "Since the last new event was delivered.", found.age_seconds)
    weeks = {(str(week),): count for week, count in enumerate((found.last_hour, *found.same_hour_weeks_before))}
    text = "New events delivered within the last hour, and the same hour of earlier weeks."
    yield _gauge("payfold_webhooks_last_hour", text, weeks, "weeks_ago")


def _of_faults(status: Status) -> Iterator[Metric]:
    since = {(each.reason,): each.since.timestamp() for each in status.refused or ()}
    text = "When a delivery was first refused for a reason, in Unix seconds."
    yield _gauge("payfold_deliveries_refused_since_time_seconds", text, since, "reason")
    faults = Counter((each.code,) for each in status.faults or ())
    yield _gauge("payfold_account_faults", "What would split an account, by code.", faults, "code")


def _of_stripe(status: Status) -> Iterator[Metric]:
    if status.stripe is None:
        return
    jobs = Counter((each.job, str(each.state)) for each in status.stripe.jobs)
    yield _gauge("payfold_stripe_jobs", "Accounts and modes of a job, by its state there.", jobs, "job", "state")
    calls = {("waiting",): status.stripe.calls_waiting, ("given_up",): status.stripe.calls_given_up}
    yield _gauge("payfold_stripe_calls", "Calls to Stripe that wait, or were given up.", calls, "state")
    fetched = CounterMetricFamily("payfold_events_fetched", "Events that were fetched since they never came.")
    # Before the first job at Stripe there is no sum. Without a sample of 0 its first events would be no increase.
    if (count := status.stripe.events_fetched if status.stripe.jobs else 0) is not None:
        fetched.add_metric([], count)
    yield fetched


def _of_processes(status: Status) -> Iterator[Metric]:
    beats = {(each.kind, each.name): each.age_seconds for each in status.heartbeats or ()}
    yield _gauge("payfold_heartbeat_age_seconds", "Since the freshest heartbeat of a loop.", beats, "kind", "name")
    jobs = status.jobs or ()
    ages = {(each.job,): each.age_seconds for each in jobs}
    yield _gauge("payfold_job_age_seconds", "Since the last run of a job, or its last step.", ages, "job")
    outcomes = {(each.job, each.outcome): 1 for each in jobs if each.outcome is not None}
    yield _gauge("payfold_job_outcome", "1 for what ended the last run of a job.", outcomes, "job", "outcome")
    if status.expected is not None and status.silent is not None:
        missed = {each.process for each in status.silent}
        silent = {(process,): int(process in missed) for process in ("worker", "clock")}
        yield _gauge("payfold_process_silent", "Whether it is expected and gives no sign of life.", silent, "process")
    yield _gauge("payfold_broker_up", "Whether Redis answered.", int(status.broker.state == "ok"))
    waiting = {("fold",): status.broker.fold_waiting, ("stripe",): status.broker.stripe_waiting}
    yield _gauge("payfold_broker_messages_waiting", "Messages in a queue.", waiting, "queue")


def _of_proof(status: Status) -> Iterator[Metric]:
    yield _gauge(
        "payfold_anomalies_in_force", "Rows of which something is not as it should be.", status.anomalies_in_force
    )
    if status.jobs is not None:
        text = "Whether the last nightly one failed or was lost, and none has ended since."
        yield _gauge("payfold_reconciliation_failed", text, int(_has_failed(status.jobs, status.reconciliation)))
    if (run := status.reconciliation) is not None:
        finished_at = run.finished_at.timestamp()
        yield _gauge("payfold_reconciliation_time_seconds", "When the last one ended, in Unix seconds.", finished_at)
        yield _gauge("payfold_reconciliation_drift", "Differences that the last one found.", run.drift)
        outcome = {(run.outcome,): 1}
        yield _gauge("payfold_reconciliation_outcome", "1 for the outcome of the last one.", outcome, "outcome")


def _has_failed(jobs: Sequence[Job], last: Reconciliation | None) -> bool:
    ran = next((each for each in jobs if each.job == short_name(RECONCILE)), None)
    return ran is not None and ran.outcome not in (OK, RUNNING) and (last is None or last.finished_at < ran.at)


def _gauge(name: str, text: str, value: float | Values | None, *labels: str) -> Metric:
    """Return the gauge of a *value*, or of one for each value of the *labels*; without those that are not known."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for each, known in value.items() if isinstance(value, Mapping) else [((), value)]:
        if known is not None:
            family.add_metric(each, known)
    return family
