"""``payfold replay``: logs of events into the inbox, and from there into the tables."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from deploy import output
from deploy.commands.base import (
    FAILED,
    FormatOption,
    ModeOption,
    Since,
    Until,
    logs_named,
    opened_database,
    require_writable,
    settings_here,
    utc,
)
from deploy.output import Format, err
from schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from worker.logs.reader import Entry
    from worker.logs.selection import Counts

app: Final = typer.Typer()

_COUNTS: Final = (
    "seen",
    "filtered",
    "new",
    "newer",
    "mended",
    "duplicate",
    "folded",
    "ignored",
    "parked",
    "pending",
    "refused",
)
_PLAN: Final = ("table", "rows_would", "status", "rows", "money")


@app.command()
def replay(  # noqa: PLR0913 - an option each
    files: Annotated[
        list[str],
        typer.Argument(help="Logs, or patterns as 'logs/*.zst': NDJSON, an array, list pages; .gz, .zst; - is stdin."),
    ],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; show which rows would change.")] = False,
    since: Since = None,
    until: Until = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only this type; * stands for anything.")] = None,
    only_account: Annotated[str | None, typer.Option(help="Only events of this account.")] = None,
    livemode: ModeOption = None,
    account: Annotated[str, typer.Option(help="The account of events that name none.")] = "",
    rejects: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where lines go that cannot be read; by default a file here, by the time."),
    ] = None,
    record_only: Annotated[
        bool, typer.Option("--record-only", help="Leave the folding to the workers, and show how they get on.")
    ] = False,
    no_announce: Annotated[
        bool, typer.Option("--no-announce", help="Of a first import only: keep the changes it makes from the feed.")
    ] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Record what the inbox lacks of the logs, then fold it; exit 1 if a line is refused or an event not folded."""
    from worker.folding import parallel
    from worker.logs import replay as logs_of_events
    from worker.logs.dry_run import plan
    from worker.logs.selection import LogFilters, Reading
    from worker.logs.writer import remark

    if sum((dry_run, record_only, no_announce)) > 1:
        raise ConfigurationError("Only one of --dry-run, --record-only and --no-announce can be meant.")
    paths = logs_named(files)
    if rejects is not None:
        require_writable(rejects, "--rejects")
    filters = LogFilters(utc(since), utc(until), kind, only_account, livemode)
    more: dict[str, Any] = {}
    with opened_database() as engine, TemporaryFile() as aside, _bar() as bar:

        def refuse(entry: "Entry") -> None:
            bar.console.print(output.in_one_line(f"{entry.place}: {entry.fault}"))
            aside.write(remark(entry.place, entry.fault))
            piece = b""
            for piece in entry.text:
                aside.write(piece)
            aside.write(b"" if piece.endswith(b"\n") else b"\n")

        def warn(words: str) -> None:
            bar.console.print(output.in_one_line(f"warning: {words}"))
            more.setdefault("warnings", []).append(words)

        show = _shown_on(bar, paths)
        secrets = settings_here().signing_secrets
        logs = Reading(paths, datetime.now(UTC), filters, account, refuse, show, warn, secrets=secrets)
        if dry_run:
            foreseen = plan(engine, logs)
            counts, more["plan"] = foreseen.counts, foreseen.rows
        else:
            others = partial(_follow, engine, bar) if record_only else None
            parallel.settle_down()
            done = logs_of_events.replay(engine, logs, others=others, withhold=no_announce)
            counts, more["parked_by_cause"] = done.counts, [asdict(each) for each in done.parked]
            if no_announce:
                more["withheld"] = dict(sorted(done.withheld.items()))
        bar.stop()
        _print(counts, more, form)
        if counts["refused"] and not dry_run:
            _keep(aside, rejects or Path(f"payfold-rejects-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.ndjson"))
        waiting = _why_pending(engine, is_left_to_others=record_only) if counts["pending"] and not dry_run else None
    _end(counts, waiting=waiting, has_parked=bool(more.get("parked_by_cause")))


def _why_pending(engine: "Engine", *, is_left_to_others: bool) -> str:
    from worker.logs.replay import why_pending

    if is_left_to_others:
        return "These are recorded, and no worker has folded any for a while: do the worker and the clock run?"
    return why_pending(engine)


def _end(counts: "Counts", *, waiting: str | None, has_parked: bool) -> None:
    """Print the remedy for events that were not folded, and exit 1 if any was refused or is not folded."""
    if waiting is not None:
        err.print(waiting)
    if has_parked:
        err.print(_PARKED)
    if counts["refused"] or has_parked or waiting is not None:
        raise typer.Exit(FAILED)


_PARKED: Final = (
    "What is parked is in the inbox and in no table. `payfold events list --state parked` has each with its reason, and"
    " `payfold events show EVENT` its payload. Once the reason is gone: payfold events retry EVENT. For good: payfold"
    " events ignore EVENT."
)


def _keep(aside: IO[bytes], path: Path) -> None:
    """Write the refused lines in *aside* to *path*, which may be one of the logs that were read."""
    aside.seek(0)
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(aside, file)
    except OSError as error:
        raise ConfigurationError(f"Cannot write {path}: {error.strerror}.") from None
    err.print(f"What could not be read is in {path}: put it right there, and replay that file.")


class _Rate(ProgressColumn):
    """The count of events that were read, and their rate a second."""

    def render(self, task: Task) -> Text:
        events = task.fields["events"]
        return Text(f"{events:,} events, {events / max(task.elapsed or 0, 0.1):,.0f}/s")


def _bar() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn())
    times = (_Rate(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, *times, console=err, transient=True, disable=not err.is_terminal)


def _shown_on(bar: Progress, paths: Sequence[str]) -> Callable[[int, int], None]:
    """Return a function that shows how far the logs are read, by their bytes where these are known."""
    is_known = all(Path(path).is_file() for path in paths)
    total = sum(Path(path).stat().st_size for path in paths) if is_known else None
    task = bar.add_task("Reading", total=total, events=0)
    return lambda events, more: bar.update(task, advance=more, events=events)


def _follow(engine: "Engine", bar: Progress) -> None:
    """Watch the deployment's workers fold what is pending."""
    from schemas.broker import Waker
    from worker.logs.replay import follow

    settings = settings_here()
    task = bar.add_task("Folding", total=None, events=0)
    # Without a broker the sweep of the clock finds the pending events.
    waker = Waker(settings) if settings.redis_url is not None else None
    try:
        follow(
            engine,
            wake=waker.wake if waker is not None else lambda: None,
            progress=lambda done, total: bar.update(task, completed=done, total=total, events=done),
        )
    finally:
        if waker is not None:
            waker.stop()


def _print(counts: "Counts", more: dict[str, Any], form: Format) -> None:
    told = {count: counts[count] for count in _COUNTS}
    if form is not Format.TABLE:
        output.one(told | more, form)
        return
    output.one(told, form)
    if more.get("parked_by_cause"):
        rows = [{"parked because": each["cause"], **each} for each in more["parked_by_cause"]]
        output.out.print()
        output.rows(rows, ("parked because", "events", "example", "reason"), form, empty="")
    if "plan" in more:
        rows = [{**row, "money": _money(row["amount"], row["currency"])} for row in more["plan"]]
        output.out.print()
        output.rows(rows, _PLAN, form, empty="No row would change.")
    if "withheld" in more:
        rows = [{"kept from the feed": kind, "changes": count} for kind, count in more["withheld"].items()]
        output.out.print()
        output.rows(rows, ("kept from the feed", "changes"), form, empty="Nothing was kept from the feed.")


def _money(amount: int | None, currency: str | None) -> str | None:
    return None if amount is None or currency is None else output.money(amount, currency)
