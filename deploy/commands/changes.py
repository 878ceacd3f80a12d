"""``payfold changes``: the change feed in a terminal, and the changes that are withheld from it."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.text import Text
from sqlalchemy import Engine

from deploy import output
from deploy.commands.bars import bars
from deploy.commands.base import (
    LOOK_SECONDS,
    PAGE_BOUNDS,
    USAGE,
    AccountOption,
    FormatOption,
    ModeOption,
    Since,
    opened_database,
    patiently,
    utc,
)
from deploy.local import signals
from deploy.output import Format, err
from schemas import database, feed
from schemas.change_rows import IN_FEED
from schemas.database import Bounds
from schemas.errors import ConfigurationError
from schemas.feed import FeedPage, Selection
from schemas.kinds import CHOICES, SUBJECTS, chosen

if TYPE_CHECKING:
    from worker.folding.withheld import WithheldChanges

PAGE_ROWS: Final = 500

app: Final = typer.Typer(help="The change feed.", no_args_is_help=True)

KindOption = Annotated[
    list[str] | None,
    typer.Option("--kind", help="Only this kind, as order.paid or order.*; may be given several times."),
]
_COLUMNS: Final = ("seq", *IN_FEED)


@app.command()
def follow(
    after: Annotated[int, typer.Option(min=0, help="The last number that was seen; 0 is before all.")] = 0,
    kind: KindOption = None,
    subject: Annotated[str | None, typer.Option(help=f"Only changes of this: {', '.join(SUBJECTS)}.")] = None,
    subject_id: Annotated[str | None, typer.Option("--id", metavar="ID", help="Only changes of this object.")] = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    wait: Annotated[bool, typer.Option(help="Wait for what comes, until Ctrl-C.")] = True,
    form: FormatOption = Format.TABLE,
) -> None:
    """Print the changes after a number, and what comes, a line each."""
    if wait and form is Format.JSON:
        raise ConfigurationError("--format json wants an end: add --no-wait, or take ndjson.")
    wanted = _selection(kind, subject=subject, subject_id=subject_id, account=account, livemode=livemode)
    with signals.stop_on_signal():
        try:
            with opened_database() as engine:
                _follow(engine, after, wanted, form, waits=wait)
        except KeyboardInterrupt:
            signals.end_in_peace()


def _follow(engine: Engine, after: int, wanted: Selection, form: Format, *, waits: bool) -> None:
    rows: list[Mapping[str, Any]] = []
    page = FeedPage([], after, has_more=True)
    while waits or page.has_more:
        page = _next(engine, page.next_after, wanted, waits=waits)
        if form is Format.JSON:
            rows += page.rows
        else:
            output.stream(page.rows, _COLUMNS, form, _line)
        if not page.has_more and waits:
            time.sleep(LOOK_SECONDS)
    if form is Format.JSON:
        output.rows(rows, _COLUMNS, form, empty="")


def _next(
    engine: Engine, after: int, wanted: Selection, *, waits: bool, bounds: Bounds = PAGE_BOUNDS
) -> FeedPage:  # fmt: skip
    """Return the next page; a command that *waits* also waits for a database that is away, silent or busy."""
    return patiently(lambda: _page(engine, after, wanted, bounds), waits=waits)


def _page(engine: Engine, after: int, wanted: Selection, bounds: Bounds) -> FeedPage:
    with database.transaction(engine, bounds) as connection:
        return feed.page(connection, after, PAGE_ROWS, wanted)


def _line(change: Mapping[str, Any]) -> Text:
    """Return *change* as a person reads it: its time, kind, subject and money."""
    mode = "live" if change["livemode"] else "test"
    parts = [f"{change['seq']:>8}", output.shown(change["at"]), mode, f"{change['kind']:<24}", change["subject_id"]]
    parts += [part for part in (_money(change), change["account"]) if part]
    return Text("  ".join(output.shown(part) for part in parts))


_AMOUNTS: Final = {"order": "amount_total", "invoice": "amount_due"}


def _money(change: Mapping[str, Any]) -> str | None:
    """Return the amount that *change* is about, None where it has none."""
    after = change["after"] or {}
    name = "refunded_amount" if change["kind"] == "order.refund_changed" else _AMOUNTS.get(change["subject"], "amount")
    amount, currency = after.get(name), after.get("currency")
    return None if amount is None or currency is None else output.money(amount, currency)


@app.command()
def withheld(
    release: Annotated[bool, typer.Option("--release", help="Append them to the feed, as new.")] = False,
    kind: KindOption = None,
    since: Since = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only show what would be done.")] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Count the changes that are kept from the feed, by reason and kind; release them; exit 2 without --yes."""
    from worker.folding import withheld as keeping

    if yes and not release:
        raise ConfigurationError("--yes is for --release; without it, changes are only counted.")
    wanted = keeping.WithheldChanges(_selection(kind, account=account, livemode=livemode), utc(since))
    with opened_database() as engine:
        if release:
            _release(engine, wanted, form, yes=yes)
            return
        with database.transaction(engine) as connection:
            found = keeping.counts(connection, wanted)
    output.rows(found, _COUNTED, form, empty="No change is withheld.")


_COUNTED: Final = ("reason", "kind", "changes", "first", "last")


def _release(engine: Engine, wanted: "WithheldChanges", form: Format, *, yes: bool) -> None:
    from worker.folding import withheld as keeping

    with database.transaction(engine) as connection:
        found = keeping.counts(connection, wanted, overtaken=False)
        overtaken = sum(row["changes"] for row in keeping.counts(connection, wanted, overtaken=True))
    total = sum(row["changes"] for row in found)
    output.rows(found, _COUNTED, form, empty="There is nothing to release.")
    if overtaken:
        err.print(f"{overtaken:,} stay withheld: the feed has had later changes of the same objects.")
    if not total:
        return
    if not yes:
        err.print(f"{total:,} changes would be appended to the feed; nothing has been. Add --yes to do it.")
        raise typer.Exit(USAGE)
    with bars() as bar:
        task = bar.add_task("Releasing", total=total)
        released = keeping.release(engine, wanted, progress=lambda done: bar.update(task, completed=done))
    err.print(f"{released:,} changes were appended to the feed.")


def _selection(kinds: list[str] | None, *, subject: str | None = None, **given: object) -> Selection:
    """Return the selection of changes that the options choose.

    Raises:
        ConfigurationError: there is no such kind, or no such subject.
    """
    choices = [choice for choice in CHOICES if choice in (kinds or [])]
    if unknown := set(kinds or []) - set(choices):
        raise ConfigurationError(
            f"--kind: there is no {', '.join(sorted(unknown))}. It is one of {', '.join(CHOICES)}."
        )
    if subject is not None and subject not in SUBJECTS:
        raise ConfigurationError(f"--subject: there is no {subject}. It is one of {', '.join(SUBJECTS)}.")
    return feed.selection(kind=chosen(choices) if choices else None, subject=subject, **given)
