"""The inbox: events listed, tried again, ignored, exported and archived."""

import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deploy import output
from deploy.commands.base import (
    FAILED,
    AccountOption,
    ArchiveOption,
    FormatOption,
    ModeOption,
    Since,
    Until,
    bars,
    one_row,
    opened_database,
    require_writable,
    shown_on,
    utc,
)
from deploy.commands.events_archive import events_archive
from deploy.output import Format, err
from schemas import database, event_filters, lookup, tables
from schemas.errors import ConfigurationError
from schemas.event_filters import EventFilters

if TYPE_CHECKING:
    from schemas.event_acts import FoundEvent


app: Final = typer.Typer(help="The inbox.", no_args_is_help=True)
EventId = Annotated[str, typer.Argument(metavar="EVENT", help="Its id, as evt_1…; behind -- if it begins with -.")]
_EVENT_COLUMNS: Final = ("seq", "id", "type", "object_id", "created", "state", "cause", "reason")
_FURTHER_COLUMNS: Final = ("attempts", "due_at", "account", "livemode", "source", "received_at")


@app.command("list")
def events_list(
    state: Annotated[str | None, typer.Option(help=f"Only those {', '.join(tables.STATES)}.")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only this type.")] = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Only those of this object.")] = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 50,
    form: FormatOption = Format.TABLE,
) -> None:
    """List events, last recorded first."""
    if state is not None and state not in tables.STATES:
        raise ConfigurationError(f"--state is one of {', '.join(tables.STATES)}.")
    filters = EventFilters(state=state, type=kind, object_id=object_id, account=account, livemode=livemode)
    columns = [tables.events.c[column] for column in (*_EVENT_COLUMNS, *_FURTHER_COLUMNS)]
    with opened_database() as engine, database.transaction(engine) as connection:
        found = event_filters.latest(connection, filters, columns, limit=limit)
    shown = _EVENT_COLUMNS if form is Format.TABLE else [column.name for column in columns]
    output.rows([dict(row) for row in found], shown, form, empty="No such event.")


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
def events_retry(
    event_id: EventId, archive: ArchiveOption = None, account: AccountOption = None, livemode: ModeOption = None
) -> None:
    """Fold an event again, now and in this process; exit 1 if it fails again."""
    from worker.logs import retry

    with opened_database() as engine:
        found = retry.retry(
            engine, event_id, now=datetime.now(UTC), account=account, livemode=livemode, archive=archive
        )
    _announce(found)
    if found.state in ("parked", "pending"):
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


def _announce(found: "FoundEvent") -> None:
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
