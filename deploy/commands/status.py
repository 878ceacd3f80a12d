"""`payfold status`: the state of the whole system, on one screen or as values."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from deploy import output
from deploy.commands.base import FAILED, MIGRATIONS_PENDING, FormatOption, settings_of_reader
from deploy.output import Format, err, lasting, shown
from schemas import database
from schemas.errors import DatabaseAway
from schemas.settings import Settings

if TYPE_CHECKING:
    from schemas.status import Limits, Silent, Status

app: Final = typer.Typer()

Line = tuple[str, str]
_COMMANDS: Final = {"worker": "python -m worker", "clock": "python -m worker.clock"}
_JUDGED: Final = {
    "silent": "whether a process is silent",
    "faults": "whether an account is split in two",
}
NOT_KNOWN: Final = "not known"
_LOOPS: Final = {"fold": "folding", "consumer": "queue"}


@app.command("status")
def show(
    form: FormatOption = Format.TABLE,
    silent_after: Annotated[
        float | None,
        typer.Option(
            min=1, help="Seconds after which a worker or a clock without a heartbeat is silent; 30 unless given."
        ),
    ] = None,
) -> None:
    """Show how everything is.

    Exit 1 where the database is away, a process is silent, an account would be split, or that cannot be known; 4 with
    migrations pending.
    """
    from schemas.status import Limits

    settings = settings_of_reader()
    found = _read(settings, Limits() if silent_after is None else Limits(silent=silent_after))
    if form is Format.TABLE:
        _print(found)
    else:
        output.one(found.model_dump(), form)
    if found.migrations:
        raise typer.Exit(MIGRATIONS_PENDING)
    wrong = [*_silences(found.silent or ()), *(f"{fault.detail}\n  {fault.command}" for fault in found.faults or ())]
    wrong += [
        f"It is not known {what}: PostgreSQL is busy, or a table is locked. Try again." for what in _unjudged(found)
    ]
    for each in wrong:
        err.print(each, style="red")
    if wrong or found.database != "ok":
        raise typer.Exit(FAILED)


def _read(settings: Settings, limits: "Limits") -> "Status":
    from schemas import queues, status
    from schemas.fold_version import FOLD_VERSION

    redis = queues.lengths(settings) if settings.redis_url else None
    state = status.broker_state(redis)
    try:
        with database.reading(settings.libpq, status.READ) as driver:
            return status.read(driver, settings, broker=state, fold_version=FOLD_VERSION, limits=limits)
    except DatabaseAway as error:
        err.print(
            f"PostgreSQL does not answer, so check DATABASE_URL: {database.first_line(error.__cause__)}", style="red"
        )
        return status.away(state)
    finally:
        if redis is not None:
            redis.close()


# ---- What is wrong ----


def _unjudged(found: "Status") -> Iterator[str]:
    """Yield those of the values that decide the exit code and are not known."""
    for name, what in _JUDGED.items():
        if _is_unknown(found, name):
            yield what


def _is_unknown(found: "Status", *names: str) -> bool:
    """Return whether one of the values called *names* could not be read."""
    return not set(names).isdisjoint(found.not_known or ())


def _silences(silent: "Sequence[Silent]") -> Iterator[str]:
    """Yield a line for the clock and for the worker: since when each is silent, and the remedy."""
    for process, command in _COMMANDS.items():
        theirs = [each for each in silent if each.process == process]
        if theirs:
            since = min((each.at for each in theirs if each.at is not None), default=None)
            seen = "was never seen" if since is None else f"is silent since {shown(since)}"
            yield f"The {process} {seen}{_parts(theirs)}. Look at its log and start it again: {command}"


def _parts(silent: "Sequence[Silent]") -> str:
    """Return which loops of the worker are silent, and at which job they were seen."""
    parts = [f"{_LOOPS[each.kind]} {each.name}".strip() for each in silent if each.kind in _LOOPS]
    jobs = sorted({each.job for each in silent if each.job is not None})
    at_job = f", at the job {', '.join(jobs)}" if jobs else ""
    return f" ({', '.join(parts)}{at_job})" if parts else ""


# ---- The screen ----


def _print(found: "Status") -> None:
    """Print a block for each subject, its labels in one column."""
    blocks = {"services": _services(found)}
    if found.at is not None:
        blocks |= {
            "processes": _processes(found),
            "jobs": _jobs(found),
            "webhooks": _webhooks(found),
            "inbox": _inbox(found),
            "tables": _tables(found),
            "stripe": _stripe(found),
        }
    blocks = {title: list(lines) for title, lines in blocks.items()}
    width = max(len(label) for lines in blocks.values() for label, _ in lines)
    for title, lines in blocks.items():
        if lines:
            output.out.print(Text(title, "bold"))
        for label, value in lines:
            output.out.print(f"  {label:<{width}}  {value}")


def _services(found: "Status") -> Iterable[Line]:
    yield "database", found.database
    if found.migrations is not None:
        pending = ", ".join(found.migrations)
        yield "migrations", f"{pending} pending: payfold migrate up" if pending else "ok"
    broker = found.broker
    waiting = {
        "ok": f"ok, messages waiting: {_count(broker.fold_waiting)} fold, {_count(broker.stripe_waiting)} stripe",
        "away": "away: events are recorded, and folded by the worker's own timer",
        "unset": "unset: REDIS_URL",
    }
    yield "broker", waiting[broker.state]


def _processes(found: "Status") -> Iterable[Line]:
    if _is_unknown(found, "heartbeats", "silent"):
        yield "silent", NOT_KNOWN
    silent = {(each.kind, each.name) for each in found.silent or ()}
    for beat in found.heartbeats or ():
        label = {"fold": "worker folding", "consumer": f"worker queue {beat.name}"}.get(beat.kind, beat.kind)
        yield label, f"{'SILENT, ' if (beat.kind, beat.name) in silent else ''}{_ago(beat.age_seconds)}"
    if found.expected == []:
        yield "expected", "none, since no web process runs and no webhook waits"


def _jobs(found: "Status") -> Iterable[Line]:
    if _is_unknown(found, "jobs"):
        yield "last runs", NOT_KNOWN
    for job in found.jobs or ():
        yield job.job, f"{job.outcome or NOT_KNOWN}, {_ago(job.age_seconds)}"


def _webhooks(found: "Status") -> Iterable[Line]:
    webhooks = found.webhooks
    if webhooks is not None:
        last = _at(webhooks.last_received_at, webhooks.age_seconds)
        yield "last", NOT_KNOWN if webhooks.age_seconds is None and _is_unknown(found, "webhooks") else last
        weeks = ", ".join("-" if each is None else _count(each) for each in webhooks.same_hour_weeks_before)
        yield "last hour", f"{_count(webhooks.last_hour)}; the same hour of the four weeks before: {weeks}"
    if _is_unknown(found, "refused"):
        yield "refused", NOT_KNOWN
    for refused in found.refused or ():
        last = f"since {shown(refused.since)}, last {shown(refused.last_at)}"
        yield "refused", f"{refused.count:,} {refused.reason}, {last}"


def _inbox(found: "Status") -> Iterable[Line]:
    seq = found.last_event_seq
    none = NOT_KNOWN if _is_unknown(found, "last_event_seq") else "none"
    yield "last event", none if seq is None else f"seq {seq}, {shown(found.last_event_received_at)}"
    oldest = f", the oldest {NOT_KNOWN}" if _is_unknown(found, "oldest_pending_age_seconds") else ""
    if found.oldest_pending_age_seconds is not None:
        oldest = f", the oldest {_ago(found.oldest_pending_age_seconds)}"
    again = f"{_count(found.pending_to_be_tried_again)} to be tried again"
    yield "pending", f"{_count(found.pending)}{oldest}, {again}"
    causes = [(each.cause or "no cause", each.count) for each in found.parked_by_cause or ()]
    yield "parked", _sum(found.parked, causes)


def _tables(found: "Status") -> Iterable[Line]:
    none = NOT_KNOWN if _is_unknown(found, "last_change_seq") else "none"
    yield "last change", none if found.last_change_seq is None else f"seq {found.last_change_seq}"
    yield (
        "withheld changes",
        _sum(found.withheld, [(each.reason, each.count) for each in found.withheld_by_reason or ()]),
    )
    yield "anomalies in force", _count(found.anomalies_in_force)
    outdated = f"{_count(found.to_fold_anew)} to fold anew"
    if found.to_fold_anew_archived:
        archived = f"{found.to_fold_anew_archived:,} of them archived: payfold rebuild --archive DIR --swap"
        outdated = f"{outdated}, {archived}"
    yield "fold version", f"{found.fold_version}: {outdated}"
    last = found.reconciliation
    if last is None:
        yield "reconciled", NOT_KNOWN if _is_unknown(found, "reconciliation") else "never"
    else:
        checks = ", ".join(last.checks)
        yield "reconciled", f"{last.outcome}, {last.drift:,} differences ({checks}), {shown(last.finished_at)}"


def _stripe(found: "Status") -> Iterable[Line]:
    stripe = found.stripe
    if stripe is None:
        yield "state", NOT_KNOWN
        return
    yield "state", "unset: STRIPE_API_KEY" if stripe.state == "unset" else stripe.state
    for job in stripe.jobs:
        if job.state != "ok":
            of = f"{job.job} of {job.account or 'the default account'} ({'live' if job.livemode else 'test'})"
            yield job.state.upper(), f"{of} since {shown(job.since)}: {job.cause}"
    if stripe.state != "unset":
        yield "calls", f"{_count(stripe.calls_waiting)} waiting, {_count(stripe.calls_given_up)} given up"
        yield "fetched", f"{_count(stripe.events_fetched)} events that never came by themselves"


def _count(value: int | None) -> str:
    return NOT_KNOWN if value is None else f"{value:,}"


def _sum(total: int | None, parts: Sequence[tuple[str, int]]) -> str:
    listed = ", ".join(f"{count:,} {name}" for name, count in parts)
    return f"{_count(total)}{f': {listed}' if listed else ''}"


def _at(at: object, age: float | None) -> str:
    return "never" if at is None else f"{shown(at)}, {_ago(age)}"


def _ago(seconds: float | None) -> str:
    """Return an age as a person reads it."""
    return "never seen" if seconds is None else f"{lasting(seconds)} ago"
