"""``payfold rebuild``: the tables again, from the events alone, and every difference."""

from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import Progress
from sqlalchemy import Engine, func, select

from deploy import output
from deploy.commands.bars import bars, shown_on
from deploy.commands.base import (
    DRIFT,
    FAILED,
    ArchiveOption,
    FormatOption,
    logs_named,
    opened_database,
    settings_here,
)
from deploy.output import Format, err
from schemas import database, tables
from schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from worker.logs.reader import Entry
    from worker.proof.difference import Comparison, Difference

DIFFERENCES_SHOWN: Final = 100

app: Final = typer.Typer()


@app.command()
def rebuild(
    logs: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="FILE", help="Fold this log instead of the inbox; may be given several times."),
    ] = None,
    swap: Annotated[bool, typer.Option("--swap", help="Bring the live tables to what the rebuild says.")] = False,
    archive: ArchiveOption = None,
    account: Annotated[str, typer.Option(help="The account of events of the logs that name none.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="How many differences are listed.")] = DIFFERENCES_SHOWN,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Rebuild with this many processes, instead of one a core, up to 8.")
    ] = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Fold the inbox next to the live tables and print every difference; exit 3 if there is one and no --swap."""
    from worker.proof import archived, shadow
    from worker.proof import rebuild as rebuilding
    from worker.proof import swap as swapping

    logs, sizes = logs_named(logs or []), rebuilding.sizes_for(processes)
    if logs and swap:
        raise ConfigurationError(
            "--swap is for a rebuild of the inbox, since the tables have to be what the inbox says. Bring the logs in"
            " first, with `payfold replay`."
        )
    if logs and archive is not None:
        raise ConfigurationError(
            "--archive is for a rebuild of the inbox: name its logs with --from, among the others."
        )
    refused, changes, listed = 0, 0, _Listed(limit)
    with ExitStack() as opened:
        engine, bar = opened.enter_context(opened_database()), opened.enter_context(bars())
        if logs:
            made = opened.enter_context(shadow.shadow(engine, has_inbox=True))
            secrets = settings_here().signing_secrets
            refused = rebuilding.record(
                made, logs, account=account, now=datetime.now(UTC), refuse=_told_on(bar), secrets=secrets
            )
        else:
            made = opened.enter_context(archived.with_archived(engine, archive, progress=shown_on(bar)))
        if swap:
            archived.require_all(made)
        rebuilding.rebuild(made, progress=shown_on(bar), sizes=sizes)
        if swap:
            found, changes = swapping.swap(made, on_difference=listed)
        else:
            found = swapping.compare(made, on_difference=listed)
        unfolded = _unfolded(engine)
    _print(found, listed, form, changes=changes if swap else None, unfolded=unfolded)
    if refused:
        raise typer.Exit(FAILED)
    if found.drift and not swap:
        raise typer.Exit(DRIFT)


def _told_on(bar: Progress) -> "Callable[[Entry], None]":
    return lambda entry: bar.console.print(output.in_one_line(f"{entry.place}: {entry.fault}"))


def _unfolded(engine: Engine) -> dict[str, int]:
    """Return how many events of the inbox are in no table, live or rebuilt, by their state."""
    counts = {
        "pending": select(func.count()).select_from(tables.pending),
        "parked": select(func.count()).where(tables.outcomes.c.state == "parked"),
    }
    with database.transaction(engine) as connection:
        return {state: connection.execute(count).scalar_one() for state, count in counts.items()}


class _Listed:
    """Keeps the first *limit* differences that it is called with, and counts all in *found*."""

    def __init__(self, limit: int) -> None:
        self.kept: list[Difference] = []
        self.found = 0
        self._limit = limit

    def __call__(self, difference: "Difference") -> None:
        self.found += 1
        if len(self.kept) < self._limit:
            self.kept.append(difference)


TALLY: Final = ("table", "live", "rebuilt", "missing", "extra", "different")


def money_of(found: "Comparison") -> list[dict[str, Any]]:
    """Return by how much the live tables hold too much, by account, mode, table, column and currency."""
    names = ("account", "livemode", "table", "column", "currency")
    return [{**dict(zip(names, key, strict=True)), "amount": amount} for key, amount in sorted(found.money.items())]


def _print(
    found: "Comparison", listed: _Listed, form: Format, *, changes: int | None, unfolded: dict[str, int]
) -> None:
    rows = [row_of(difference) for difference in listed.kept]
    if form is not Format.TABLE:
        told = {"tables": found.rows, "money": money_of(found), "differences": rows, "drift": found.drift}
        told |= {"differences_found": listed.found, **unfolded}
        left = {"objects": found.objects_left_out, "events": found.events_left_out}
        told |= {"left_out": left} if found.events_left_out else {}
        output.one(told if changes is None else told | {"swapped": True, "changes": changes}, form)
        return
    output.rows(found.rows, TALLY, form, empty="")
    if found.drift:
        output.out.print()
        output.rows([shown_difference(row) for row in rows], SHOWN, form, empty="")
        if listed.found > len(rows):
            err.print(f"… and {listed.found - len(rows):,} more: --limit says how many are listed.")
    if found.money:
        output.out.print()
        output.rows(
            [{**row, "too much": output.money(row["amount"], row["currency"])} for row in money_of(found)],
            ("account", "livemode", "table", "column", "too much"),
            form,
            empty="",
        )
    if changes is not None:
        err.print(
            f"Swapped: {found.drift:,} rows are now what the events say, and {changes:,} changes were added. Those of"
            " events that had been folded before are withheld: `payfold changes withheld`."
        )
    elif found.drift:
        err.print(f"{found.drift:,} rows are not what the events say. `payfold rebuild --swap` puts them right.")
    else:
        err.print("The tables are what the events say.")
    if found.events_left_out:
        err.print(left_out(found.objects_left_out, found.events_left_out))
    for state, events in unfolded.items():
        if events:
            err.print(
                f"In none of the tables: {events:,} {state} events. `payfold events list --state {state}` has them."
            )


def left_out(objects: int, events: int) -> str:
    """Return a sentence on the objects that could not be compared."""
    return f"Left out: {objects:,} objects of {events:,} archived events. --archive DIR covers them."


SHOWN: Final = ("table", "id", "kind", "column", "live", "rebuilt", "too much")


def row_of(difference: "Difference") -> dict[str, Any]:
    """Return *difference* as JSON has it."""
    return {
        "account": difference.account,
        "livemode": difference.livemode,
        "table": difference.table,
        "id": difference.id,
        "kind": difference.kind,
        "column": difference.column,
        "held": difference.held,
        "expected": difference.expected,
        "currency": difference.currency,
        "amount": difference.amount,
        "at": difference.at,
    }


def shown_difference(row: dict[str, Any]) -> dict[str, Any]:
    """Return a difference as a person reads it."""
    amount, currency = row["amount"], row["currency"]
    too_much = output.money(amount, currency) if amount is not None and currency is not None else None
    return {**row, "live": row["held"], "rebuilt": row["expected"], "too much": too_much}
