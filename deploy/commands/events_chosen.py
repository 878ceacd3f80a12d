"""The options that choose events, and ``payfold events list``, which may follow what comes."""

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import typer
from rich.text import Text
from sqlalchemy import Connection, Engine, func, select

from deploy import output
from deploy.commands.base import (
    LOOK_SECONDS,
    PAGE_BOUNDS,
    TIMES,
    AccountOption,
    FormatOption,
    ModeOption,
    opened_database,
    patiently,
    utc,
)
from deploy.local import signals
from deploy.output import Format
from schemas import database, event_filters, tables
from schemas.errors import ConfigurationError
from schemas.event_filters import TYPE_HELP, EventFilters

LATE_SECONDS: Final = 60.0
"""An event may be committed so long after one with a higher number: transactions that record are shorter."""
LATE_SEQS_MAX: Final = 10_000
"""At the beginning, so many of the last numbers are looked at again."""
PAGE_ROWS: Final = 1_000
LIMIT_DEFAULT: Final = 50
LIMIT_MAX: Final = 10_000

StateOption = Annotated[str | None, typer.Option("--state", help=f"Only those {', '.join(tables.STATES)}.")]
CauseOption = Annotated[str | None, typer.Option("--cause", help="Only those with this cause, as row_refused.")]
TypeOption = Annotated[str | None, typer.Option("--type", help=f"Only {TYPE_HELP}.")]
ObjectOption = Annotated[str | None, typer.Option("--object", help="Only those of this object.")]
SourceOption = Annotated[str | None, typer.Option("--source", help=f"Only those of {', '.join(tables.SOURCES)}.")]
ReceivedSince = Annotated[
    datetime | None,
    typer.Option(
        "--since", formats=TIMES, metavar="TIME", help="Only those received from then on: 2026-01-31T12:00:00, UTC."
    ),
]
ReceivedUntil = Annotated[
    datetime | None,
    typer.Option("--until", formats=TIMES, metavar="TIME", help="Only those received before then: 2026-02-01, UTC."),
]

_EVENT_COLUMNS: Final = ("seq", "id", "type", "object_id", "created", "state", "cause", "reason")
_FURTHER_COLUMNS: Final = ("attempts", "due_at", "account", "livemode", "source", "received_at")
_COLUMNS: Final = (*_EVENT_COLUMNS, *_FURTHER_COLUMNS)


def chosen(since: datetime | None, until: datetime | None, **given: Any) -> EventFilters:  # noqa: ANN401 - by the names of the filters
    """Return the filters that the options choose.

    Raises:
        ConfigurationError: a value cannot be used.
    """
    filters = EventFilters(received_from=utc(since), received_before=utc(until), **given)
    for name, fault in filters.faults().items():
        raise ConfigurationError(f"--{name}: {fault}.")
    return filters


def events_list(  # noqa: PLR0913, PLR0917 - an option each
    state: StateOption = None,
    cause: CauseOption = None,
    kind: TypeOption = None,
    object_id: ObjectOption = None,
    source: SourceOption = None,
    since: ReceivedSince = None,
    until: ReceivedUntil = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    limit: Annotated[int, typer.Option(min=1, max=LIMIT_MAX, help="How many.")] = LIMIT_DEFAULT,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print them oldest first, then what comes, until Ctrl-C.")
    ] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """List events, newest received first."""
    world = {"account": account, "livemode": livemode}
    filters = chosen(since, until, state=state, cause=cause, type=kind, object_id=object_id, source=source, **world)
    if follow:
        _require_endless(until, form)
        _follow(filters, limit, form)
        return
    with opened_database() as engine, database.transaction(engine) as connection:
        found = event_filters.latest(connection, filters, _columns(), limit=limit)
    output.rows(found, _EVENT_COLUMNS if form is Format.TABLE else _COLUMNS, form, empty="No such event.")


def _columns() -> list[Any]:
    return [tables.events.c[name] for name in _COLUMNS]


def _require_endless(until: datetime | None, form: Format) -> None:
    if form is Format.JSON:
        raise ConfigurationError("--format json wants an end: leave out --follow, or take ndjson.")
    if until is not None:
        raise ConfigurationError("--until is an end: leave it out, or --follow.")


# ---- What comes ----


class Following:
    """Which events were printed, and from which number on others are looked for.

    Numbers are given before the events are committed. So the events of the last ``LATE_SECONDS`` are looked at again.
    """

    def __init__(self, after: int) -> None:
        self.after = after
        self._printed = set[int]()
        self._marks = deque[tuple[float, int]]()

    def new(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return those of *rows* that were not returned before."""
        found = [row for row in rows if row["seq"] not in self._printed]
        self._printed.update(row["seq"] for row in found)
        return found

    def reach(self, last: int, now: float) -> None:
        """Note that at *now*, in seconds of a clock that never steps, *last* was the highest number."""
        self._marks.append((now, last))
        while self._marks[0][0] <= now - LATE_SECONDS:
            self.after = max(self.after, self._marks.popleft()[1])
        self._printed = {seq for seq in self._printed if seq > self.after}


def _follow(filters: EventFilters, limit: int, form: Format) -> None:
    with signals.stop_on_signal():
        try:
            with opened_database() as engine:
                state = patiently(lambda: _begin(engine, filters, limit, form), waits=True)
                while True:
                    time.sleep(LOOK_SECONDS)
                    patiently(lambda: _look(engine, filters, state, form), waits=True)
        except KeyboardInterrupt:
            signals.end_in_peace()


def _begin(engine: Engine, filters: EventFilters, limit: int, form: Format) -> Following:
    """Print the events that are there, and return the state in which what comes is looked for."""
    with database.transaction(engine, PAGE_BOUNDS) as connection:
        with database.cursor(connection) as cursor:
            database.take_snapshot(cursor)
        last = _last(connection)
        rows = event_filters.latest(connection, filters, _columns(), limit=limit)
        state = Following(max(0, last - LATE_SEQS_MAX))
        state.new(list(_after(connection, filters, state.after, [tables.events.c.seq])))
    state.reach(last, time.monotonic())
    output.stream(sorted(rows, key=lambda row: int(row["seq"])), _COLUMNS, form, _line)
    return state


def _look(engine: Engine, filters: EventFilters, state: Following, form: Format) -> None:
    """Print the events that have come since the last look."""
    with database.transaction(engine, PAGE_BOUNDS) as connection:
        last = _last(connection)
        found = list(_after(connection, filters, state.after, _columns()))
    output.stream(state.new(found), _COLUMNS, form, _line)
    state.reach(last, time.monotonic())


def _last(connection: Connection) -> int:
    return int(connection.execute(select(func.coalesce(func.max(tables.inbox.c.seq), 0))).scalar_one())


def _after(
    connection: Connection, filters: EventFilters, after: int, columns: Collection[Any]
) -> Iterator[Mapping[str, Any]]:  # fmt: skip
    """Yield all events with a number above *after*, page by page."""
    rows: Sequence[Mapping[str, Any]] = [{"seq": after}]
    while rows:
        rows = event_filters.following(connection, filters, columns, after=rows[-1]["seq"], limit=PAGE_ROWS)
        yield from rows


def _line(event: Mapping[str, Any]) -> Text:
    """Return *event* as a person reads it: its number, time, mode, type, object and state."""
    mode = "live" if event["livemode"] else "test"
    parts = [f"{event['seq']:>8}", output.shown(event["received_at"]), mode, f"{event['type']:<32}", event["id"]]
    parts += [part for part in (event["object_id"], event["account"], event["state"], event["cause"]) if part]
    return Text("  ".join(output.in_one_line(part) for part in parts))
