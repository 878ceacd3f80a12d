"""Prints the events that made a row."""

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from deploy import output
from deploy.commands.base import TIMES, opened_database, utc
from deploy.output import Format, err
from schemas import database

if TYPE_CHECKING:
    from worker.proof.explain import Explanation


AsOf = Annotated[
    datetime | None,
    typer.Option(
        formats=TIMES, metavar="TIME", help="As it was known then, by what had been received: 2026-01-31T12:00:00, UTC."
    ),
]


def explain_row(
    table: str,
    id_: str,
    as_of: datetime | None,
    *,
    currency: str = "",
    account: str | None,
    livemode: bool | None,
    form: Format,
) -> None:
    """Print the events that made the row *id_* of *table*, as they were known *as_of* a time."""
    from schemas import lookup
    from worker.folds.facts import Subject
    from worker.proof import explain

    with opened_database() as engine:
        with database.transaction(engine) as connection:
            world = lookup.world_of(connection, id_, account=account, livemode=livemode)
        explanation = explain.explain(engine, Subject(table, *world, id_, currency=currency), as_of=utc(as_of))
    if form is Format.TABLE:
        _print(explanation, as_of)
    else:
        output.one(asdict(explanation), form)


_MONEY = ("object", "id", "status", "amount", "amount_captured", "amount_refunded", "amount_by_refunds", "verdict")


def _print(explanation: "Explanation", as_of: datetime | None) -> None:
    if as_of is not None:
        err.print(f"As it was known at {output.shown(utc(as_of))} UTC, by what had been received until then.")
    out = output.out
    out.print("Timeline, in the order in which the events are laid over each other", style="bold")
    events = [{**each, "sets": ", ".join(each["sets"]) or None} for each in explanation.timeline]
    shown = ("created", "received_at", "source", "type", "event_id", "verdict", "sets")
    output.rows(events, shown, Format.TABLE, empty="")
    out.print()
    if explanation.row is None:
        out.print("These events make no row.")
        return
    out.print("Columns", style="bold")
    currency = explanation.row.get("currency")
    columns = [
        {**each, "value": output.amount(each["column"], each["value"], currency), "event": each["event_id"]}
        for each in explanation.columns
    ]
    output.rows(columns, ("column", "value", "how", "type", "event", "created"), Format.TABLE, empty="")
    if explanation.money:
        out.print("\nThe charges and refunds behind refunded_amount", style="bold")
        # A refund has no amounts of a charge.
        money = [
            {name: output.amount(name, each.get(name), each["currency"]) for name in _MONEY}
            for each in explanation.money
        ]
        output.rows(money, _MONEY, Format.TABLE, empty="")
    for anomaly in explanation.anomalies:
        out.print(f"\n{anomaly['kind']}: {output.shown(anomaly['detail'])}")
    if explanation.dashboard is not None:
        out.print(f"\nStripe shows it at {explanation.dashboard}")
