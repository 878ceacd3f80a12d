"""``payfold summary`` and ``payfold funnel``: what happened in a period, and how far each link's sessions came."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deploy import output
from deploy.commands.base import TIMES, AccountOption, FormatOption, ModeOption, opened_database, utc
from deploy.output import Format, err
from schemas import database

if TYPE_CHECKING:
    from schemas.summary import Period, Summary

app: Final = typer.Typer()

Since = Annotated[
    datetime | None,
    typer.Option(formats=TIMES, metavar="TIME", help="The period's begin, UTC; a day before its end unless given."),
]
Until = Annotated[datetime | None, typer.Option(formats=TIMES, metavar="TIME", help="The period's end; else now.")]

_SUMS: Final = ("account", "livemode", "of", "status", "currency", "count", "amount", "without_amount")
_KINDS: Final = ("orders", "refunds", "disputes")
_LINKS: Final = (
    *("account", "livemode", "payment_link", "currency", "opened", "completed", "paid", "expired", "amount_paid"),
    "without_amount",
)


@app.command("summary")
def summarize(
    since: Since = None,
    until: Until = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Count the orders, refunds and disputes of a period, rounded outward to whole hours, with their money."""
    from schemas import summary

    period = summary.period_of(utc(since), utc(until), now=datetime.now(UTC))
    with opened_database() as engine, database.transaction(engine) as connection:
        found = summary.read(connection, period, account=account, livemode=livemode)
    if form is Format.JSON:
        output.one({"since": period.since, "until": period.until, "data": [_as_json(each) for each in found]}, form)
        return
    output.rows([_shown(row, form) for each in found for row in _rows(each)], _SUMS, form, empty=_EMPTY)
    _explain(period, found)


_EMPTY: Final = "No order, refund or dispute is in this period."


def _as_json(found: "Summary") -> dict[str, Any]:
    counts = [{"status": status, "count": count} for status, count in found.orders_by_status.items()]
    return {**asdict(found), "orders_by_status": counts}


def _rows(found: "Summary") -> Iterator[dict[str, Any]]:
    """Yield a row for each kind, status and currency."""
    world = {"account": found.account, "livemode": found.livemode}
    for kind in _KINDS:
        for each in getattr(found, kind):
            yield {**world, "of": kind, **asdict(each)}


def _shown(row: dict[str, Any], form: Format) -> dict[str, Any]:
    """Return *row* with its amounts as money in a table; other forms have them in minor units."""
    if form is not Format.TABLE:
        return row
    amounts = {name: output.amount(name, row[name], row["currency"]) for name in row if name.startswith("amount")}
    return {**row, **amounts}


def _explain(period: "Period", found: "Sequence[Summary]") -> None:
    """Print which hours the numbers are of, and how many rows are in no period."""
    err.print(f"From {output.shown(period.since)} to {output.shown(period.until)} UTC.")
    for kind in ("orders", "refunds"):
        if undated := sum(getattr(each, f"undated_{kind}") for each in found):
            err.print(f"In no period, since the time of their creation is not known: {undated:,} {kind}.")


@app.command("funnel")
def show_funnel(
    payment_link: Annotated[str | None, typer.Option("--payment-link", metavar="ID", help="Only this one.")] = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Show how far the sessions of each payment link came, by currency."""
    from schemas import summary

    with opened_database() as engine, database.transaction(engine) as connection:
        found = summary.funnel(connection, account=account, livemode=livemode, payment_link=payment_link)
    rows = [_shown(asdict(each), form) for each in found.rows]
    output.rows(rows, _LINKS, form, empty="No session of a payment link is known here.")
