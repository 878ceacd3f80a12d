"""The inbox: events listed, tried again, ignored, exported and archived."""

import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from sqlalchemy import Engine

from deploy import output
from deploy.commands.bars import bars, shown_on
from deploy.commands.base import (
    FAILED,
    USAGE,
    AccountOption,
    ArchiveOption,
    FormatOption,
    ModeOption,
    Since,
    Until,
    one_row,
    opened_database,
    require_writable,
    utc,
)
from deploy.commands.events_archive import events_archive
from deploy.commands.events_chosen import (
    CauseOption,
    ObjectOption,
    ReceivedSince,
    ReceivedUntil,
    SourceOption,
    TypeOption,
    chosen,
    events_list,
)
from deploy.output import Format, err
from schemas import database, event_acts, lookup, tables
from schemas.errors import ConfigurationError, CountDiffers
from schemas.event_acts import FoundEvent, Matching
from schemas.event_filters import EventFilters

app: Final = typer.Typer(help="The inbox.", no_args_is_help=True)
EventId = Annotated[str, typer.Argument(metavar="EVENT", help="Its id, as evt_1…; behind -- if it begins with -.")]
app.command("list")(events_list)


@app.command("show")
def events_show(
    event_id: EventId, account: AccountOption = None, livemode: ModeOption = None, form: FormatOption = Format.TABLE
) -> None:
    """Show one event with its payload, which holds personal data, and its copies with other contents."""
    with opened_database() as engine:
        row = one_row(engine, tables.events, event_id, account=account, livemode=livemode)
        with database.transaction(engine) as connection:
            others = lookup.renderings_of(connection, row)
    payload = row["payload"]
    text = None if payload is None else payload.decode(errors="replace")
    shown = {**row, "payload": text, "archived": payload is None}
    output.one(shown if form is Format.TABLE else {**shown, "renderings": others}, form)
    if form is Format.TABLE and others:
        output.out.print()
        output.rows([{"not folded": _copied(each), **each} for each in others], _COPY_COLUMNS, form, empty="")
    if payload is None:
        err.print("Its payload is archived.")


_COPY_COLUMNS: Final = ("not folded", "type", "object_id", "api_version", "signed", "source", "received_at", "payload")


def _copied(rendering: dict[str, Any]) -> str:
    """Return the beginning of the hash of a copy's content, as anomalies name it."""
    return (rendering["content_sha256"] or "to be compared")[:16]


@app.command("retry")
def events_retry(  # noqa: PLR0913, PLR0917 - an option each
    event_id: Annotated[
        str | None, typer.Argument(metavar="[EVENT]", help="One event, as evt_1…; behind -- if it begins with -.")
    ] = None,
    archive: ArchiveOption = None,
    state: Annotated[
        str | None, typer.Option("--state", help=f"Retry all that are {' or '.join(event_acts.OPEN_STATES)}.")
    ] = None,
    cause: CauseOption = None,
    kind: TypeOption = None,
    object_id: ObjectOption = None,
    source: SourceOption = None,
    since: ReceivedSince = None,
    until: ReceivedUntil = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only count the events that match.")] = False,
) -> None:
    """Fold one event, or all that match, again, now and in this process; exit 1 if one fails again, 2 without --yes."""
    named = {"state": state, "cause": cause, "type": kind, "object_id": object_id, "source": source}
    filters = chosen(since, until, **named, account=account, livemode=livemode)
    if event_id is None:
        _retry_all(filters, archive, yes=yes)
    elif yes or filters != EventFilters(account=account, livemode=livemode):
        raise ConfigurationError("Name one event, or choose events by their state and more, not both.")
    else:
        _retry_one(event_id, filters, archive)


def _retry_one(event_id: str, world: EventFilters, archive: Path | None) -> None:
    from worker.logs import retry

    with opened_database() as engine:
        found = retry.retry(
            engine, event_id, now=datetime.now(UTC), account=world.account, livemode=world.livemode, archive=archive
        )
    _announce(found)
    if found.is_open:
        raise typer.Exit(FAILED)


def _retry_all(filters: EventFilters, archive: Path | None, *, yes: bool) -> None:
    """Fold all events again that match *filters*; without *yes* only count them, and exit 2."""
    if filters.state is None:
        raise ConfigurationError("Name an event, or choose events: --state parked, and more to narrow them.")
    if archive is not None:
        raise ConfigurationError("--archive is for one event.")
    with opened_database() as engine:
        with database.transaction(engine) as connection:
            found = event_acts.matching(connection, filters)
        event_acts.require_not_too_many(found)
        if not found.count:
            err.print("No such event.")
            return
        if not yes:
            err.print(f"Events to fold again: {found.count:,}. Nothing has been done: add --yes to do it.")
            raise typer.Exit(USAGE)
        _fold_again(engine, filters, found)


def _fold_again(engine: Engine, filters: EventFilters, counted: Matching) -> None:
    from worker.folding import projection

    with database.transaction(engine) as connection:
        done = event_acts.retry_matching(connection, filters, confirm=counted.count, until=counted.until)
    if done.count != counted.count:
        raise CountDiffers(done.count, done.until)
    with bars() as bar:
        task = bar.add_task("Folding", total=done.count)
        while folded := projection.run_once(engine, now=datetime.now(UTC)):
            bar.advance(task, folded)
    with database.transaction(engine) as connection:
        states = event_acts.states_of(connection, done.queued)
    became = ", ".join(f"{states[state]:,} {state}" for state in tables.STATES if state in states)
    err.print(f"Events tried again: {done.count:,}. They are now: {became}.")
    if states.keys() & set(event_acts.OPEN_STATES):
        raise typer.Exit(FAILED)


@app.command("ignore")
def events_ignore(
    event_id: EventId,
    reason: Annotated[str, typer.Option(help="Why, for those who look later.")] = "",
    account: AccountOption = None,
    livemode: ModeOption = None,
) -> None:
    """Ignore a parked or pending event, by an observation that replays like everything else."""
    from worker.logs import retry

    with opened_database() as engine:
        now = datetime.now(UTC)
        _announce(retry.ignore(engine, event_id, reason=reason, now=now, account=account, livemode=livemode))


def _announce(found: FoundEvent) -> None:
    reason = f": {output.shown(found.reason)}" if found.reason else "."
    err.print(f"{output.in_one_line(found.id)} is {found.state}{reason}")


@app.command("export")
def events_export(
    to: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file: .gz or .ndjson by its ending, else Zstandard; default is stdout."),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Do not compress, no matter how the file is called.")] = False,
    since: Since = None,
    until: Until = None,
    archive: ArchiveOption = None,
    renderings: Annotated[
        bool, typer.Option("--renderings", help="Of an event whose copies differ, write the others too.")
    ] = False,
) -> None:
    """Write the inbox as a log that `replay` reads; exit 1 if archived events are left out.

    A line is an event; it is compressed by Zstandard unless the file's ending says otherwise, and not in a terminal.
    """
    from worker.logs.export import export, left_out
    from worker.logs.selection import LogFilters
    from worker.logs.writer import compressed, form_of, writing
    from worker.proof import archived

    filters = LogFilters(since=utc(since), until=utc(until))
    if to is not None:
        require_writable(to, "--output", is_replaced=True)
    written = 0
    is_plain = plain or (to is None and sys.stdout.isatty())
    form = "plain" if is_plain else form_of(to)
    with (
        opened_database() as engine,
        bars() as bar,
        nullcontext(engine) if archive is None else archived.within(engine, archive, progress=shown_on(bar)) as source,
    ):
        with compressed(sys.stdout.buffer, form) if to is None else writing(to.resolve(), form) as stream:
            for line in export(source, filters=filters, with_renderings=renderings):
                stream.write(line)
                written += 1
        sys.stdout.buffer.flush()
        missing = left_out(source, filters=filters)
    if to is not None:
        err.print(f"Wrote {written:,} {'copies of events' if renderings else 'events'} to {to}.")
    if missing:
        err.print(f"Left out: {missing:,} events whose payloads are archived. --archive DIR covers them.")
        raise typer.Exit(FAILED)


app.command("archive")(events_archive)
