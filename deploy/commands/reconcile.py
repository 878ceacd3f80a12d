"""``payfold reconcile``: are the tables right? By money's rules, by a rebuild, by a log, and by Stripe."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import Progress

from api.report import results
from deploy import output
from deploy.commands.bars import bars, shown_on
from deploy.commands.base import (
    DRIFT,
    FAILED,
    ArchiveOption,
    FormatOption,
    Since,
    logs_named,
    opened_database,
    require_writable,
    settings_here,
    utc,
)
from deploy.commands.jobs import opened_context
from deploy.commands.rebuild import left_out
from deploy.output import Format, err
from schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from worker.logs.reader import Entry

_LOG_COLUMNS: Final = ("events", "missing_here", "missing_there", "different", "refused")
SHOWN_MAX: Final = 50
"""A table shows this many differences; JSON has a thousand, and the CSV file all."""
CSV_COLUMNS: Final = (
    "check",
    "kind",
    "account",
    "livemode",
    "table",
    "id",
    "column",
    "held",
    "expected",
    "currency",
    "amount",
    "at",
    "detail",
)

app: Final = typer.Typer(help="Are the tables right?", invoke_without_command=True)


@app.callback()
def reconcile(
    context: typer.Context,
    logs: Annotated[
        list[str] | None,
        typer.Option("--log", metavar="FILE", help="Hold the inbox against this log too; may be given several times."),
    ] = None,
    stripe: Annotated[bool, typer.Option("--stripe", help="Ask Stripe too, within the budget of calls.")] = False,
    since: Since = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Choose the customers and ledgers that --stripe looks at if there are too many; else the day does.",
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Record what is missing, put the tables right, and look again.")
    ] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page to read and to print.")] = None,
    differences: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE.csv", help="Write every difference, a line each.")
    ] = None,
    archive: ArchiveOption = None,
    account: Annotated[str, typer.Option(help="The account of events of the logs that name none.")] = "",
    form: FormatOption = Format.TABLE,
) -> None:
    """Check the tables by money's rules and by a rebuild, on request by logs and by Stripe; exit 3 on a difference.

    It exits 1 if there is none, and a part that was asked for could not be looked at.
    """
    if context.invoked_subcommand is not None:
        return
    from worker.proof import reconcile as reconciling

    logs = logs_named(logs or [])
    for path, option in ((report, "--report"), (differences, "--csv")):
        if path is not None:
            require_writable(path, option)
    checks = [reconciling.RULES, reconciling.REBUILD]
    checks += [reconciling.LOG] if logs else []
    checks += [reconciling.STRIPE] if stripe else []
    with ExitStack() as opened:
        each = opened.enter_context(_csv(differences)) if differences is not None else lambda _: None
        at_stripe = opened.enter_context(opened_context()) if stripe else None
        engine = at_stripe.engine if at_stripe is not None else opened.enter_context(opened_database())
        bar = opened.enter_context(bars())
        wanted = reconciling.ReconcileRequest(
            logs=logs,
            account=account,
            secrets=settings_here().signing_secrets,
            context=at_stripe,
            since=utc(since),
            seed=seed,
            archive=archive,
            repair=repair,
            each=each,
            refuse=_told_on(bar),
            progress=shown_on(bar),
        )
        result = reconciling.run(engine, checks, wanted)
    if report is not None:
        _write_report(report, result)
    _print(result, form)
    if result["drift_total"]:
        raise typer.Exit(DRIFT)
    if result["run"]["outcome"] == "incomplete":
        raise typer.Exit(FAILED)


@app.command("history")
def reconcile_history(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 20, form: FormatOption = Format.TABLE
) -> None:
    """List the last reconciliations, newest first."""
    from worker.proof import reconcile as reconciling

    with opened_database() as engine:
        found = reconciling.history(engine, limit=limit)
    columns = ("id", "started_at", "finished_at", "outcome", "checks", "drift")
    output.rows(found, columns, form, empty="Nothing has been reconciled yet.")


def _told_on(bar: Progress) -> "Callable[[Entry], None]":
    return lambda entry: bar.console.print(output.in_one_line(f"{entry.place}: {entry.fault}"))


@contextmanager
def _csv(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes a difference as a line of *path*."""
    try:
        file = path.open("w", newline="", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"Cannot write {path}: {error.strerror}.") from None
    with file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        yield lambda row: writer.writerow(_plain(row[name]) for name in CSV_COLUMNS)


def _plain(value: object) -> str:
    """Return *value* so that a spreadsheet takes no text for a formula."""
    if value is None:
        return ""
    text = output.shown(value)
    return f"'{text}" if isinstance(value, str) and text[:1] in ("=", "+", "-", "@") else text


def _write_report(path: Path, result: dict[str, Any]) -> None:
    from api.report.page import html

    try:
        path.write_text(html(output.plain(result)), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"Cannot write {path}: {error.strerror}.") from None
    err.print(f"Wrote {path}.")


def _print(result: dict[str, Any], form: Format) -> None:
    if form is not Format.TABLE:
        output.one(result, form)
        return
    from api.report.verdict import notes_on_stripe

    witnesses = result.get("witnesses", {})
    _section(
        _title("Money rules", witnesses.get("rules")),
        result.get("rules"),
        ("rule", "checked", "holds", "broken", "not_provable"),
    )
    _unproven(result.get("rules", ()))
    _section(
        _title("Rebuild", witnesses.get("rebuild")),
        result.get("tables"),
        ("table", "live", "rebuilt", "missing", "extra", "different"),
    )
    if "logs" in result:
        _section("Logs", [result["logs"]], _LOG_COLUMNS)
        if result["logs"].get("archived"):
            err.print(
                f"{result['logs']['archived']:,} events of the log are archived here, and not compared: --archive DIR."
            )
    columns = ("account", "livemode", "object", "listed", "missing_here", "missing_there", "different")
    _section(_title("Stripe", witnesses.get("stripe")), result.get("stripe"), columns)
    for words in notes_on_stripe(result.get("stripe", ())):
        err.print(words)
    _failed(result)
    shown = [_shown(row) for row in result["drift"][:SHOWN_MAX]]
    why = ("detail",) if any(row["detail"] for row in shown) else ()
    _section("Differences", shown, ("check", "kind", "table", "id", "column", "held", "expected", "too much", *why))
    if result["drift_total"] > len(shown):
        err.print(f"… and {result['drift_total'] - len(shown):,} more: --csv FILE.csv has them all.")
    if "repaired" in result:
        there_were = result["repaired"]["drift_total"]
        err.print(f"There were {there_were:,} differences before the repair, and {result['drift_total']:,} are left.")
    err.print(verdict(result))
    if (proven := results.percent_proven(result.get("rules", ()))) is not None:
        percent, checked = proven
        err.print(f"Of {checked:,} rows: {percent} % of what the money rules checked is proven.")
    if "left_out" in result:
        err.print(left_out(**result["left_out"]))


def _failed(result: dict[str, Any]) -> None:
    """Print why Stripe could not be asked, or why nothing could be repaired there, and the remedy."""
    for part in (result, result.get("repaired", {})):
        if failed := part.get("stripe_error"):
            err.print(output.shown(f"Stripe: {failed['detail']} {failed['to_do']}"), style="red")


def _title(name: str, witness: str | None) -> str:
    return name if witness is None else f"{name}: {witness}"


def verdict(result: dict[str, Any]) -> str:
    """Return a sentence on the result of a run, and another on the parts that it did not look at."""
    names = {"log": "Event logs", "stripe": "Stripe"}
    left = [f"{names[check]}: only in part ({'; '.join(words)})." for check, words in results.in_part(result).items()]
    return output.in_one_line(" ".join([_verdict(result), *left]))


def _verdict(result: dict[str, Any]) -> str:
    if not result["drift_total"]:
        return "The tables are what the events say."
    money = ", ".join(output.money(each["amount"], each["currency"]) for each in result["drift_money"])
    return f"{result['drift_total']:,} differences" + (f", in total {money} too much." if money else ".")


def _unproven(rules: Sequence[Mapping[str, Any]]) -> None:
    """Print why rules could not be proven, a line each."""
    lines = [(rule["rule"], why) for rule in rules if (why := results.why_not_provable(rule))]
    for name, why in lines:
        output.out.print(f"{name}: {why}")
    if lines:
        output.out.print()


def _section(title: str, rows: list[dict[str, Any]] | None, columns: tuple[str, ...]) -> None:
    if rows:
        output.out.print(title, style="bold")
        output.rows(rows, columns, Format.TABLE, empty="")
        output.out.print()


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    has_money = row["amount"] is not None and row["currency"] is not None
    return {**row, "too much": output.money(row["amount"], row["currency"]) if has_money else None}
