"""What is counted and measured, in the format that Prometheus reads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.counts import OUTCOMES, REFUSED, Kind

_DELIVERIES: Final = "Webhook deliveries answered by all web processes, by what became of them."
_REFUSED: Final = "Webhook deliveries turned away for good by all web processes, by reason."


@dataclass(frozen=True)
class Instance:
    """A web process: its name among all, and when it began, in Unix seconds."""

    name: str
    began_at: float


@dataclass(frozen=True)
class _Families(Collector):
    families: tuple[Metric, ...]

    def collect(self) -> Iterator[Metric]:
        return iter(self.families)


def exposition(totals: Mapping[Kind, int] | None, instance: Instance, *, unwritten: int) -> bytes:
    """Return as text the *totals* of all processes, None where PostgreSQL does not answer, and what *instance* has."""
    up = GaugeMetricFamily("payfold_database_up", "Whether PostgreSQL answered just now.", int(totals is not None))
    shared = () if totals is None else _deliveries(totals)
    return generate_latest(_Families((up, *_of(instance, unwritten), *shared)))


def _of(instance: Instance, unwritten: int) -> Iterator[Metric]:
    for name, description, value in (
        ("payfold_process_start_time_seconds", "When the web process began, in Unix seconds.", instance.began_at),
        ("payfold_deliveries_unwritten", "Deliveries counted that are not in the counters yet.", unwritten),
    ):
        yield _labelled(GaugeMetricFamily(name, description, labels=["instance"]), {instance.name: value})


def _deliveries(totals: Mapping[Kind, int]) -> tuple[Metric, ...]:
    deliveries = CounterMetricFamily("payfold_deliveries", _DELIVERIES, labels=["outcome"])
    refused = CounterMetricFamily("payfold_deliveries_refused", _REFUSED, labels=["reason"])
    return (
        _labelled(deliveries, {outcome: totals.get((outcome, ""), 0) for outcome in OUTCOMES}),
        _labelled(refused, {reason: count for (outcome, reason), count in totals.items() if outcome == REFUSED}),
    )


def _labelled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
