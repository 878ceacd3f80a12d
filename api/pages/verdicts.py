"""Is it working? The answer in one line, and below it what a person should look at."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from statistics import median
from typing import Final

from api.pages.rendering import ago
from schemas.broker import FOLD_QUEUE
from schemas.status import Heartbeat, Status

QUIET_SECONDS: Final = 9.0
"""A worker and a clock that live give a sign every five seconds; one that is late is shown long before it is judged."""
WAITING_SECONDS: Final = 60.0
"""An event that waits for longer than this shows that folding falls behind."""


class Level(IntEnum):
    """How bad something is."""

    OK = 0
    WARNING = 1
    FAULT = 2


@dataclass(frozen=True, slots=True)
class Remark:
    """Something to look at, and where: a page of ours, or what to type."""

    level: Level
    words: str
    page: str | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole answer."""

    level: Level
    headline: str
    line: str
    remarks: list[Remark]


_HEADLINES: Final = {
    Level.OK: "Everything works",
    Level.WARNING: "Working, with something to look at",
    Level.FAULT: "Something is wrong",
}


def verdict(status: Status | None) -> Verdict:
    """Return the answer that *status* gives; None is a status that could not be read."""
    if status is None or status.database == "away":
        away = Remark(Level.FAULT, "PostgreSQL does not answer. Deliveries are answered 503, and Stripe repeats them.")
        return Verdict(Level.FAULT, "The database is away", "Nothing else can be known until it is back.", [away])
    remarks = sorted(_remarks(status), key=lambda each: -each.level)
    level = max((each.level for each in remarks), default=Level.OK)
    return Verdict(level, _HEADLINES[level], "; ".join(_line(status)) + ".", remarks)


def _line(status: Status) -> Iterator[str]:
    """Yield the parts of the sentence that sums up the status."""
    webhooks = status.webhooks
    if webhooks is None:
        yield "When the last webhook came is not known"
    elif webhooks.last_received_at is None:
        yield "No webhook has come yet"
    else:
        yield f"Last webhook {ago(webhooks.age_seconds)} ago"
        if webhooks.last_hour is not None:
            usual = _usual(webhooks.same_hour_weeks_before)
            yield f"{webhooks.last_hour:,} in the last hour" + ("" if usual is None else f", {usual:,} usual")
    signs = [f"{name} {ago(beat.age_seconds)}" for name, beat in _signs(status) if beat.age_seconds is not None]
    if signs:
        yield f"sign of life of {', '.join(signs)} ago"
    if status.pending == 0:
        yield "nothing waits"
    elif status.pending is not None:
        yield f"{status.pending:,} wait, the oldest for {ago(status.oldest_pending_age_seconds)}"


def _usual(before: list[int | None]) -> int | None:
    """Return the middle of the same hour of the weeks before; None where there was none."""
    known = [each for each in before if each is not None]
    return round(median(known)) if known else None


def _signs(status: Status) -> Iterator[tuple[str, Heartbeat]]:
    """Yield the worker's and the clock's heartbeats."""
    for beat in status.heartbeats or ():
        if beat.kind == "consumer" and beat.name == FOLD_QUEUE:
            yield "worker", beat
        elif beat.kind == "clock":
            yield "clock", beat


def _remarks(status: Status) -> Iterator[Remark]:
    if status.migrations:
        words = f"The database is behind by {len(status.migrations)} migrations, so that most is not known."
        yield Remark(Level.FAULT, words, command="payfold migrate up")
    yield from _of_processes(status)
    yield from (Remark(Level.FAULT, each.detail, command=each.command) for each in status.faults or ())
    if status.broker.state != "ok":
        yield Remark(Level.WARNING, "Redis does not answer. The worker's own timer folds, some seconds later.")
    if status.parked:
        words = f"{status.parked:,} event{'' if status.parked == 1 else 's'} could not be folded and are parked."
        yield Remark(Level.WARNING, words, page="parked")
    if (status.oldest_pending_age_seconds or 0) > WAITING_SECONDS:
        yield Remark(Level.WARNING, "Folding is behind: events wait for more than a minute.", page="events")
    yield from _of_webhooks(status)
    yield from _of_stripe(status)
    if status.reconciliation is not None and status.reconciliation.outcome != "ok":
        level = Level.FAULT if status.reconciliation.outcome == "drift" else Level.WARNING
        words = f"The last reconciliation ended with {status.reconciliation.outcome}."
        yield Remark(level, words, page="reconciliations")
    if status.anomalies_in_force:
        one = status.anomalies_in_force == 1
        words = f"{status.anomalies_in_force:,} {'anomaly is' if one else 'anomalies are'} in force."
        yield Remark(Level.OK, words, page="anomalies")


def _of_processes(status: Status) -> Iterator[Remark]:
    silent: set[str] = {each.process for each in status.silent or ()}
    for process in sorted(silent):
        yield Remark(Level.FAULT, f"The {process} gives no sign of life.", command="payfold status")
    if status.expected:
        for process, beat in _signs(status):
            if process not in silent and (beat.age_seconds is None or beat.age_seconds > QUIET_SECONDS):
                since = "yet" if beat.age_seconds is None else f"for {ago(beat.age_seconds)}"
                words = f"The {process} has given no sign of life {since}."
                yield Remark(Level.WARNING, words, command="payfold status")


def _of_webhooks(status: Status) -> Iterator[Remark]:
    webhooks = status.webhooks
    if webhooks is None:
        return
    usual = _usual(webhooks.same_hour_weeks_before)
    if webhooks.last_hour == 0 and usual:
        words = f"No webhook has come within the last hour, in which {usual:,} are usual."
        yield Remark(Level.WARNING, words, command="payfold endpoints check")
    fetched = status.stripe.events_fetched if status.stripe is not None else None
    if webhooks.last_received_at is None and fetched:
        words = (
            f"No webhook ever came, and {fetched:,} events were fetched from Stripe: the endpoint's address is wrong."
        )
        yield Remark(Level.FAULT, words, command="payfold endpoints check")


def _of_stripe(status: Status) -> Iterator[Remark]:
    for job in status.stripe.jobs if status.stripe is not None else ():
        if job.state != "ok":
            words = f"The job {job.job} at Stripe is {job.state}" + (f": {job.cause}." if job.cause else ".")
            level = Level.FAULT if job.state == "stopped" else Level.WARNING
            yield Remark(level, words, command="payfold status")
