"""Explains one row: which event set each of its columns, and why every other event about it did not.

The order of events is the join's own (``join.in_order``), and the row is its result, so nothing is decided here a
second time.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from typing import Any, Final

from msgspec.structs import replace
from psycopg.rows import dict_row
from sqlalchemy import Engine

from schemas import database, tables
from schemas.database import Bounds, Cursor
from schemas.errors import ConflictError, NotFoundError
from worker import folds
from worker.folding import settling
from worker.folding.rows import load_rows
from worker.folds import credit_note, join, payment
from worker.folds.chain import Path
from worker.folds.facts import Facts, Row, Subject, event_of
from worker.folds.join import Joined, RowSpec
from worker.folds.payment import Payment
from worker.proof import refund_sources

_KEY: Final = ("account", "livemode", "event_id", "as_of")


_TABLES_OF_OBJECTS: Final = frozenset(chain.from_iterable(folds.TABLES_OF_OBJECT.values()))
_INFERRED: Final = "inferred from the other columns"
_NO_PATH: Final = Path([], set(), is_ambiguous=False)


@dataclass(frozen=True, slots=True)
class Explanation:
    """A row of *table* as its events make it, None where they make none, with the event that set each column.

    *columns* are dicts of column, value, event_id, type, created and how; *timeline* dicts of event_id, type, created,
    received_at, source, api_version, state, cause, verdict and sets. *anomalies* are those in force. *money* explains
    an order's refunded amount: see ``refund_sources.of_order``.

    Where payloads are archived, the row is the one in the table, and the event that set a column is not known: it may
    be one of those with archived payloads. There is no row then as of an earlier time.
    """

    table: str
    id: str
    account: str
    livemode: bool
    row: Row | None
    columns: list[dict[str, Any]]
    timeline: list[dict[str, Any]]
    anomalies: list[dict[str, Any]] = field(default_factory=list)
    dashboard: str | None = None
    money: list[dict[str, Any]] = field(default_factory=list)


def explain(
    engine: Engine, subject: Subject, *, as_of: datetime | None = None, events_max: int | None = None,
    bounds: Bounds | None = None,
) -> Explanation:  # fmt: skip
    """Explain the row *subject* as it is, or from the events that had been received by *as_of*.

    *bounds* limit each of the two transactions in time.

    Raises:
        NotFoundError: no event is about it, or none had been received by then.
        ConflictError: more than *events_max* events are about it.
    """
    explained = _explained(engine, subject, as_of, events_max, bounds)
    if subject.table != "orders" or explained.row is None:
        return explained
    with database.transaction(engine, bounds) as connection, database.cursor(connection) as cursor:
        return dataclasses.replace(explained, money=refund_sources.of_order(cursor, explained.row, as_of=as_of))


def _explained(
    engine: Engine, subject: Subject, as_of: datetime | None, events_max: int | None, bounds: Bounds | None
) -> Explanation:  # fmt: skip
    with database.transaction(engine, bounds) as connection, database.cursor(connection) as cursor:
        database.take_snapshot(cursor)
        if events_max is not None:
            _require_few(cursor, subject, events_max)
        reports = _reports_of(cursor, subject, as_of)
        anomalies = [] if as_of is not None else _anomalies(cursor, subject)
        at_rest = None if as_of is not None else load_rows(cursor, [subject]).get(subject)
        facts = _facts(subject, reports)
        own = join.fold_all(folds.ROW_SPECS[subject.table], facts)
        joined, event_id = (None, None) if own is None else _settled(cursor, subject, own, as_of)
        by = _decider(cursor, subject, own, joined, event_id)
    if at_rest is None and not any(_may_make(subject, each) for each in reports):
        raise NotFoundError(
            f"No event is about {subject.id}" + ("." if as_of is None else f", or none had been received by {as_of}.")
        )
    spec = folds.ROW_SPECS[subject.table]
    if any(each["payload"] is None and each["state"] == "folded" for each in reports):
        return _in_part(subject, spec, reports, at_rest, anomalies)
    path = join.in_order(spec, facts) if joined is not None else _NO_PATH
    row = None if joined is None else joined.row
    setters = {} if row is None else _setters(path, row)
    by_id = {each["id"]: each for each in reports}
    columns = [] if row is None else [_column(spec, name, row, setters, by_id, by) for name in row if name not in _KEY]
    timeline = [*_timeline(reports, path, setters), *([] if by is None else [by.line])]
    return _explanation(subject, row, columns, timeline, anomalies)


def _may_make(subject: Subject, event: dict[str, Any]) -> bool:
    """Return whether *event* is about an object that has a row in the table of *subject*, and not only mentions it."""
    is_own = subject.table in folds.TABLES_OF_OBJECT.get(str(event["object_type"]), ())
    return is_own or subject.table not in _TABLES_OF_OBJECTS


def _explanation(
    subject: Subject,
    row: Row | None,
    columns: list[dict[str, Any]],
    timeline: list[dict[str, Any]],
    anomalies: list[dict[str, Any]],
) -> Explanation:
    return Explanation(
        subject.table,
        tables.key_name(subject.key),
        subject.account,
        subject.livemode,
        row,
        columns,
        timeline,
        anomalies,
        None if row is None else _dashboard(subject, row),
    )


def _facts(subject: Subject, reports: list[dict[str, Any]]) -> list[Facts]:
    """Return the facts, from the events *reports*, of *subject* and its leader; none where a payload is archived."""
    folded = [each for each in reports if each["state"] == "folded"]
    if any(each["payload"] is None for each in folded):
        return []
    wanted = (subject, join.leader_of(folds.ROW_SPECS[subject.table], subject))
    return [one for each in folded for one in folds.judge(event_of(each)).facts if one.subject in wanted]


# ---- Columns that an order's charges, or a note's refund, set ----


@dataclass(frozen=True, slots=True)
class _Decider:
    """The event of another object that set some columns: *how*, and its *line* in the timeline."""

    how: str
    line: dict[str, Any]


_HOW: Final = {"charges": "by its charge", "payment_intents": "by its payment intent", "refunds": "by its refund"}
_WHY: Final = {
    "orders": "it settles the payment, which the session leaves open",
    "credit_notes": "it reports the amount of the refund, which the note only names",
}


def _settled(cursor: Cursor, subject: Subject, own: Joined, as_of: datetime | None) -> tuple[Joined, str | None]:
    """Return the row *own*, as its own events make it, with the columns set that other objects decided by *as_of*.

    The second value is the event that set them, None where none did.
    """
    left_open = settling.open_rows({subject: own})
    if not left_open:
        return own, None
    if subject.table == "credit_notes":
        return _with_refund(cursor, subject, own, as_of)
    known = settling.payments_of(cursor, left_open)[subject]
    then = known if as_of is None else _payment_as_of(cursor, subject, own.row, known, as_of)
    joined = payment.settle(own, then)
    return joined, None if joined.decided_by is None else joined.decided_by.event_id


def _with_refund(cursor: Cursor, note: Subject, own: Joined, as_of: datetime | None) -> tuple[Joined, str | None]:
    if as_of is None:
        refund = settling.refunds_of(cursor, {note: own}).get(note)
    else:
        refund = _row_as_of(cursor, replace(note, table="refunds", id=str(own.row["refund"])), as_of)
    joined = credit_note.with_refund(own, refund)
    return joined, None if refund is None or joined == own else str(refund["event_id"])


def _payment_as_of(cursor: Cursor, subject: Subject, order: Row, known: Payment, as_of: datetime) -> Payment:
    """Return the part of the payment *known* now that was known at *as_of*."""

    def then(table: str, rows: Iterable[Row]) -> list[Row]:
        found = (_row_as_of(cursor, replace(subject, table=table, id=str(row["id"])), as_of) for row in rows)
        return [row for row in found if row is not None]

    charges = [row for row in then("charges", known.charges) if row["payment_intent"] == order["payment_intent"]]
    releases = [row for row in then("refunds", known.releases) if row["reason"] == payment.RELEASED]
    canceled = then("payment_intents", [] if known.cancellation is None else [known.cancellation])
    return Payment(charges, releases, next(iter(canceled), None), known.read_at)


def _row_as_of(cursor: Cursor, subject: Subject, as_of: datetime) -> Row | None:
    reports = _reports_of(cursor, subject, as_of)
    joined = join.fold_all(folds.ROW_SPECS[subject.table], _facts(subject, reports))
    return None if joined is None else {**joined.row, "source": joined.source, **_moved_by(joined.row, reports)}


def _moved_by(row: Row, reports: Iterable[dict[str, Any]]) -> Row:
    """Return the one of the events *reports* that captured or released the charge *row*; nothing where none did."""
    at = row.get("captured_at") or row.get("released_at")
    own = [each for each in reports if each["object_id"] == row["id"] and each["state"] == "folded"]
    moved = [each for each in own if at is not None and each["created"] == at]
    step = min(moved, key=_place_in_its_second, default=None)
    return {} if step is None else {"event_id": step["id"], "as_of": step["created"], "source": step["source"]}


def _place_in_its_second(event: dict[str, Any]) -> tuple[bool, bool, bool, str]:
    """Order the events of a charge in one second as ``settling`` does, which takes the first."""
    is_named = event["type"] in ("charge.captured", "charge.expired")
    return not is_named, event["type"] == "charge.updated", event["source"] == "observation", event["id"]


def _decider(
    cursor: Cursor, subject: Subject, own: Joined | None, joined: Joined | None, event_id: str | None
) -> _Decider | None:
    """Return the event of another object that turned *own* into *joined*, with the columns it set; None without one."""
    if own is None or joined is None or event_id is None:
        return None
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
        wanted = (subject.account, subject.livemode, event_id)
        event = rows.execute("SELECT * FROM events WHERE (account, livemode, id) = (%s, %s, %s)", wanted).fetchone()
    if event is None:
        return None
    sets = sorted(name for name in own.row if joined.row[name] != own.row[name])
    table = folds.TABLES_OF_OBJECT[str(event["object_type"])][0]
    return _Decider(_HOW[table], _line(event, sets, _WHY[subject.table]))


def _in_part(
    subject: Subject, spec: RowSpec, reports: list[dict[str, Any]], row: Row | None, anomalies: list[dict[str, Any]]
) -> Explanation:
    """Explain as much as is possible without the archived payloads."""
    by_id = {each["id"]: each for each in reports}
    decides = None if row is None else row["event_id"]
    columns = [] if row is None else [_column(spec, name, row, {}, by_id, None) for name in row if name not in _KEY]
    for column in columns:
        if column["how"] == _INFERRED:
            column["how"] = "not known: events are archived"
    timeline = [
        each | {"verdict": _verdict_in_part(by_id[each["event_id"]], decides)}
        for each in _timeline(reports, _NO_PATH, {})
    ]
    return _explanation(subject, row, columns, timeline, anomalies)


def _verdict_in_part(reports: dict[str, Any], decides: object) -> str:
    if reports["state"] != "folded":
        return _verdict(reports, None, _NO_PATH, {})
    what = "archived" if reports["payload"] is None else "at hand, beside archived ones"
    return f"it decides; {what}" if reports["id"] == decides else what


_SPOKEN: Final = f"""
WITH spoken AS (
    SELECT seq FROM inbox WHERE {tables.of_object("inbox", "%(account)s", "%(livemode)s", "%(source)s")}
    UNION
    SELECT seq FROM mentions WHERE (account, livemode, object_id) = (%(account)s, %(livemode)s, %(source)s)
)
"""
_TOLD: Final = f"""
{_SPOKEN}
SELECT e.* FROM spoken JOIN events AS e USING (seq)
WHERE %(as_of)s::timestamptz IS NULL OR e.received_at <= %(as_of)s ORDER BY e.created, e.seq
"""


def _require_few(cursor: Cursor, subject: Subject, events_max: int) -> None:
    """Raise ConflictError where more than *events_max* events are about the object of *subject*, or mention it."""
    wanted = {"account": subject.account, "livemode": subject.livemode, "source": subject.source}
    cursor.execute(
        f"{_SPOKEN} SELECT count(*) FROM (SELECT FROM spoken LIMIT %(limit)s) AS few",
        {**wanted, "limit": events_max + 1},
    )
    if cursor.fetchall()[0][0] > events_max:
        raise ConflictError(f"More than {events_max:,} events are about {subject.id}: use the explain command for it.")


def _reports_of(cursor: Cursor, subject: Subject, as_of: datetime | None) -> list[dict[str, Any]]:
    wanted = {"account": subject.account, "livemode": subject.livemode, "source": subject.source, "as_of": as_of}
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
        return rows.execute(_TOLD, wanted).fetchall()


def _anomalies(cursor: Cursor, subject: Subject) -> list[dict[str, Any]]:
    with cursor.connection.cursor(row_factory=dict_row) as rows:
        rows.execute(
            "SELECT kind, detail, seen_at FROM anomalies"
            " WHERE (account, livemode, subject, subject_id) = (%s, %s, %s, %s) AND resolved_at IS NULL"
            " ORDER BY kind, id",
            (subject.account, subject.livemode, folds.ROW_SPECS[subject.table].subject, tables.key_name(subject.key)),
        )
        return rows.fetchall()


def _setters(path: Path, row: Row) -> dict[str, Facts]:
    """Return, by column, the step that set it: the last step that has the column, or for a time the first."""
    found: dict[str, Facts] = {}
    for step in path.steps:
        found |= dict.fromkeys(step.columns, step)
        found |= {name: step for name, value in step.references.items() if value is not None}
    # A value that was inferred afterwards comes from no event.
    found = {name: step for name, step in found.items() if name in row and row[name] == step.after[name]}
    for step in reversed(join.real_moments(path.steps)):
        found |= {name: step for name, at in step.moments.items() if row.get(name) == at}
    return found


def _column(
    spec: RowSpec,
    name: str,
    row: Row,
    setters: dict[str, Facts],
    by_id: dict[str, dict[str, Any]],
    by: _Decider | None,
) -> dict[str, Any]:
    if by is not None and name in by.line["sets"]:
        event = {each: by.line[each] for each in ("event_id", "type", "created")}
        return {"column": name, "value": row[name], "how": by.how, **event}
    step = setters.get(name)
    reports = None if step is None else by_id[step.event_id]
    is_empty = row[name] == spec.empty.get(name)
    how = "reported" if reports is not None else "no event reports it" if is_empty else _INFERRED
    if name in spec.key and reports is None:
        how = "the key"
    return {
        "column": name,
        "value": row[name],
        "how": how,
        "event_id": None if reports is None else reports["id"],
        "type": None if reports is None else reports["type"],
        "created": None if reports is None else reports["created"],
    }


def _timeline(reports: list[dict[str, Any]], path: Path, setters: dict[str, Facts]) -> list[dict[str, Any]]:
    """Return the events in the order of the join, and those that are not part of it at their own time."""
    place = {step.event_id: number for number, step in enumerate(path.steps)}
    steps = {step.event_id: step for step in path.steps}
    last_place, keys = -1, {}
    for each in reports:
        last_place = max(last_place, place.get(each["id"], last_place))
        keys[each["id"]] = (place.get(each["id"], last_place), each["id"] not in place)
    return [
        _line(
            each,
            sorted(name for name, step in setters.items() if step.event_id == each["id"]),
            _verdict(each, steps.get(each["id"]), path, setters),
        )
        for each in sorted(reports, key=lambda each: keys[each["id"]])
    ]


def _line(event: dict[str, Any], sets: list[str], verdict: str) -> dict[str, Any]:
    return {
        "event_id": event["id"],
        "type": event["type"],
        "created": event["created"],
        "received_at": event["received_at"],
        "source": event["source"],
        "api_version": event["api_version"],
        "state": event["state"],
        "cause": event["cause"],
        "sets": sets,
        "verdict": verdict,
    }


def _verdict(reports: dict[str, Any], step: Facts | None, path: Path, setters: dict[str, Facts]) -> str:
    if reports["state"] != "folded":
        return f"{reports['state']}: {reports['reason']}" if reports["reason"] else str(reports["state"])
    if step is None:
        return "it reports nothing of this row"
    if step is path.steps[-1]:
        return "it decides" + (", by a choice between several that may be the last" if path.is_ambiguous else "")
    if any(each is step for each in setters.values()):
        return "it still stands, in part"
    return _why_it_lost(step, path)


def _why_it_lost(step: Facts, path: Path) -> str:
    last = path.steps[-1]
    if step.event_id in path.twins:
        twin = next(each for each in path.steps if each.event_id not in path.twins and _same_report(each, step))
        return f"a duplicate: {twin.event_id} reports the same step"
    if step.rank < last.rank:
        return f"an older state, which {last.event_id} has left behind"
    overtaking = path.steps[path.steps.index(step) + 1]
    if step.position == overtaking.position:
        return f"a tie in one second, in which {overtaking.event_id} comes after it"
    return f"overtaken by {overtaking.event_id}"


def _same_report(one: Facts, other: Facts) -> bool:
    shared = one.after.keys() & other.after.keys()
    return one.position == other.position and all(one.after[name] == other.after[name] for name in shared)


# Source: the address line of Stripe's Dashboard for an object of each kind.
_PLACES: Final = {
    "orders": ("payments", "payment_intent"),
    "payment_links": ("payment-links", "id"),
    "customers": ("customers", "id"),
    "balances": ("customers", "customer"),
    "invoices": ("invoices", "id"),
    "credit_notes": ("invoices", "invoice"),
}


def _dashboard(subject: Subject, row: Row) -> str | None:
    """Return the address at which Stripe's Dashboard shows the object; no request is made to it."""
    place, name = _PLACES.get(subject.table, ("", ""))
    if not place or row.get(name) is None:
        return None
    parts = ["https://dashboard.stripe.com", subject.account, "" if subject.livemode else "test", place, str(row[name])]
    return "/".join(part for part in parts if part)
