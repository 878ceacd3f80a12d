"""Checks of the running system: its processes, its jobs at Stripe, the names of accounts, and what arrives."""

from collections.abc import Iterator
from datetime import datetime
from typing import Final

from deploy.doctor.findings import Finding, counted, fault, skipped, warning
from deploy.doctor.postgres import SEQS_MAX, Arrivals
from deploy.output import lasting, shown
from schemas.errors import SignatureMismatch
from schemas.settings import Settings
from schemas.status import Heartbeat, Limits, Silent, Status

ACCOUNTS: Final = "accounts"
PROCESSES: Final = "processes"
JOBS: Final = "jobs at Stripe"
WEBHOOKS: Final = "webhooks"
COMMANDS: Final = {"web": "python -m api", "worker": "python -m worker", "clock": "python -m worker.clock"}
_PROCESS: Final = {"web": "web", "clock": "clock", "fold": "worker", "consumer": "worker"}
_NOT_KNOWN: Final = "PostgreSQL is busy, or a table is locked"


def accounts(status: Status) -> Iterator[Finding]:
    """Judge whether a label splits an account."""
    if status.faults is None:
        yield skipped(ACCOUNTS, _NOT_KNOWN, "Try again.")
    for each in status.faults or ():
        is_begun = each.code == "rename_unfinished"
        act = "Let the rename come to its end:" if is_begun else "Join the names, if they are of one account:"
        yield fault(ACCOUNTS, each.detail, f"{act}\n  {each.command}")


# ---- Processes ----


def processes(status: Status, settings: Settings) -> Iterator[Finding]:
    """Judge whether a web process, a worker and a clock are alive."""
    if status.heartbeats is None or status.silent is None:
        yield skipped(PROCESSES, _NOT_KNOWN, "Try again.")
        return
    silent = _silent(status, settings)
    for process, command in COMMANDS.items():
        if process in silent:
            yield fault(
                PROCESSES, f"{_article(process)} {silent[process]}", f"Look at its log, and start it:\n  {command}"
            )


def _silent(status: Status, settings: Settings) -> dict[str, str]:
    """Return for each process that gives no sign of life since when it has not."""
    limits = Limits()
    # Where a web process has just begun, the others still have time to start.
    judged: list[Silent] | list[Heartbeat] = list(status.silent or ())
    if not status.expected:
        judged = [each for each in status.heartbeats or () if each.kind in _PROCESS]
    web = [each for each in status.heartbeats or () if each.kind == "web"]
    found: dict[str, str] = {}
    for each in (*web, *judged):
        limit = limits.web if each.kind == "web" else limits.of(each.kind, settings.payfold_sweep_seconds)
        if each.age_seconds is None:
            found.setdefault(_PROCESS[each.kind], "was never seen")
        elif each.age_seconds > limit:
            found.setdefault(_PROCESS[each.kind], f"is silent for {lasting(each.age_seconds)}{_part(each)}")
    return found


def _article(process: str) -> str:
    return "no web process runs: it" if process == "web" else f"the {process}"


def _part(beat: Heartbeat) -> str:
    return f" (its queue {beat.name})" if beat.kind == "consumer" else ""


def processes_in_words(status: Status) -> str:
    """Return how long ago each process was seen."""
    ages: dict[str, float] = {}
    for each in status.heartbeats or ():
        if each.kind in _PROCESS and each.age_seconds is not None:
            ages[_PROCESS[each.kind]] = max(each.age_seconds, ages.get(_PROCESS[each.kind], 0.0))
    return ", ".join(f"{process} {lasting(age)} ago" for process, age in ages.items())


# ---- Jobs at Stripe ----


def jobs(status: Status) -> Iterator[Finding]:
    """Judge whether a job at Stripe is stopped or fails."""
    if status.stripe is None:
        yield skipped(JOBS, _NOT_KNOWN, "Try again.")
        return
    for each in status.stripe.jobs:
        if each.state == "ok":
            continue
        owner = f"{each.account or 'the default account'} ({'live' if each.livemode else 'test'})"
        fix = "It goes on by itself when the cause is gone."
        if each.state == "stopped":
            fix = "Give the key what the job needs, or set another one. It is tried again every 10 minutes."
        yield fault(JOBS, f"{each.job} of {owner} is {each.state}: {each.cause}", fix)
    if status.stripe.calls_given_up:
        yield warning(
            JOBS,
            f"{counted(status.stripe.calls_given_up, 'call was', 'calls were')} given up",
            "See what is missing, and repair it:\n  payfold reconcile --stripe --repair",
        )


def jobs_in_words(status: Status) -> str:
    """Return how many jobs there are."""
    known = status.stripe.jobs if status.stripe is not None else ()
    return f"{len(known)} known, none is stopped or fails" if known else "none has run yet"


# ---- Webhooks ----


_TRY: Final = "  payfold doctor --send --to https://YOUR-HOST/webhooks/stripe"


def webhooks(found: Arrivals, status: Status) -> Iterator[Finding]:
    """Judge the last delivery, next to the last refusal and the last event that had to be fetched."""
    findings = (_refusals(found, status), _none_ever(found), _gaps(found), _quiet(found, status))
    yield from [each for each in findings if each is not None][:1]


def _refusals(found: Arrivals, status: Status) -> Finding | None:
    """Judge deliveries that were refused for their signature and not followed by a good one."""
    refused = next((each for each in status.refused or () if each.reason == SignatureMismatch.reason), None)
    if refused is None or (found.webhook is not None and refused.last_at < found.webhook):
        return None
    # A stranger may send something too, so that this is only a sign where deliveries came.
    level, since = (fault, _ever(found)) if found.webhook is None else (warning, "since")
    return level(
        WEBHOOKS,
        f"{counted(refused.count, 'delivery was', 'deliveries were')} refused for a wrong signature, the last"
        f" {_since(refused.last_at, found)}, and none was accepted {since}",
        "Set STRIPE_WEBHOOK_SECRETS to the signing secret of the endpoint, as Stripe's Dashboard shows it, and restart"
        " the web process. Stripe sends what was refused again, for three days.",
    )


def _none_ever(found: Arrivals) -> Finding | None:
    if found.webhook is not None:
        return None
    if not found.gaps:
        return warning(WEBHOOKS, "none has come yet", f"Send one through the public address:\n{_TRY}")
    return fault(
        WEBHOOKS,
        f"{counted(found.gaps, 'event was', 'events were')} fetched from Stripe, and no webhook came {_ever(found)}:"
        " the address is wrong",
        "Compare the address of the endpoint with the one of the web process, and send a test delivery:\n"
        f"  payfold endpoints check\n{_TRY}",
    )


def _gaps(found: Arrivals) -> Finding | None:
    if found.gap is None or found.webhook is None or found.gap <= found.webhook:
        return None
    return warning(
        WEBHOOKS,
        f"since the last one, {_since(found.webhook, found)}, events had to be fetched from Stripe (the last"
        f" {_since(found.gap, found)})",
        f"See in Stripe's Dashboard why deliveries to the endpoint fail, and send a test delivery:\n{_TRY}",
    )


def _quiet(found: Arrivals, status: Status) -> Finding | None:
    if found.webhook is None or not _is_quiet(status):
        return None
    usual = ", ".join(str(each) for each in _weeks_before(status))
    return warning(
        WEBHOOKS,
        f"none in the last hour, and in the same hour of the weeks before {usual}; the last came"
        f" {_since(found.webhook, found)}",
        "See in Stripe's Dashboard whether deliveries to the endpoint fail.",
    )


def _is_quiet(status: Status) -> bool:
    """Return whether there were no deliveries within the hour, though each of several weeks before had some."""
    before = _weeks_before(status)
    return status.webhooks is not None and status.webhooks.last_hour == 0 and len(before) > 1 and all(before)


def _weeks_before(status: Status) -> list[int]:
    return [each for each in status.webhooks.same_hour_weeks_before if each is not None] if status.webhooks else []


def webhooks_in_words(found: Arrivals) -> str:
    """Return when the last delivery came, and when the last event had to be fetched."""
    last = "never" if found.webhook is None else _since(found.webhook, found)
    gap = (
        "none had to be fetched" if found.gap is None else f"the last that was fetched came {_since(found.gap, found)}"
    )
    return f"the last came {last}; {gap}"


def has_deliveries(found: Arrivals) -> bool:
    """Return whether a webhook came within a day."""
    return found.webhook is not None and (found.now - found.webhook).days < 1


def _ever(found: Arrivals) -> str:
    return "ever" if found.events <= SEQS_MAX else f"among the last {SEQS_MAX:,} events"


def _since(at: datetime, found: Arrivals) -> str:
    return f"{lasting(max(0.0, (found.now - at).total_seconds()))} ago ({shown(at)} UTC)"
