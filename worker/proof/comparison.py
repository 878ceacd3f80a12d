"""Compares objects as Stripe lists them with the rows at rest, in two ways.

Note [An object differs when it would change its row]
    An object as Stripe lists it is turned into the observation that would be recorded of it. This is joined with all
    events that the inbox has of the object. If the result is another row than the existing one, the existing one is
    wrong. Events that were recorded after the list was made are therefore no difference, nor are values that a list
    does not show. This comparison finds missing rows, and a repair corrects what it finds.

Note [The map is a second witness]
    If the folds read a column from the wrong place, it is as wrong in the observation as in the row, so joining cannot
    find the fault. Each column that an object has is therefore also compared with the row in the table, by the map of
    proof/witness.py, which shares nothing with the folds. Only settled rows are compared: no event of the object is
    pending, and the row was decided before Stripe answered. A repair cannot correct what only the map finds.

Note [An older API version carries less]
    Stripe lists objects in the newest version of its API, and an endpoint may send events of an older version, which
    lacks some keys. The column of such a key is null, which means not known, and so are columns that are inferred from
    it, such as an order's status. Features of a portal that were added later are also absent. The map decides whether
    the deciding event states a column, and not the folds. So if a fold reads a column from the wrong place, and finds
    nothing there, that is still a difference.

Note [What no event of a charge reports]
    A dispute sets ``disputed`` of its charge, and a refund that fails may lower ``amount_refunded``, without an event
    of the charge. The row has the new values only from the charge's next event on. Until then they are not reported as
    differences, if the dispute or the refunds are in the tables and explain them to the cent.

Note [No event of a session reports its capture]
    If a payment is captured by hand, its session completes as unpaid, and its charge reports the capture later: see
    Note [A charge decides what its session leaves open] in worker/folds/payment.py. Stripe then shows the session as
    paid, without an event of it. That is no difference if a charge of the intent was captured. A repair may not record
    the session as it is shown: the order would be paid at the time Stripe was asked, not when the charge was captured.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from msgspec import Struct
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import Table

from schemas import checkout, database, events, inbox, observations, tables
from schemas.database import Cursor
from schemas.errors import NotAnObject
from schemas.events import Key
from schemas.inbox import Delivery
from schemas.observations import Answer, World
from worker import folds
from worker.folding import settling
from worker.folding.claim import event_of_delivery
from worker.folding.joining import facts_at_hand
from worker.folding.rows import load_rows
from worker.folds import join, payment
from worker.folds.facts import Facts, Row, Subject, object_of, utc
from worker.folds.join import Joined
from worker.proof import difference, witness
from worker.proof.difference import DIFFERENT, Difference, Pair
from worker.proof.witness import Statement
from worker.stripe_jobs.rounds import JobContext

DECIDED_BY: Final = ("event_id", "as_of")
"""Columns that name the deciding event."""


@dataclass(slots=True)
class Compared:
    """The result of comparing some objects: the *differences*, and the numbers of objects that were not compared.

    *archived* objects have rows that are folded from archived payloads; *unreadable* ones have no id or cannot be
    folded. *only_by_map* counts differing rows that would stay the same if the objects were folded. *unstated* counts
    Stripe's values that are absent from the API version of the events. *deliveries* are the observations that a repair
    may record, by the ids of their objects. *wrong* maps the id of each row that a repair changes to the object that
    the row is folded from.
    """

    differences: list[Difference] = field(default_factory=list)
    archived: int = 0
    unreadable: int = 0
    only_by_map: int = 0
    unstated: int = 0
    deliveries: dict[str, Delivery] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


def compare(context: JobContext, world: World, objects: Sequence[Answer], *, by_map: bool = True) -> Compared:
    """Compare *objects* of *world* with their rows by joining them and, if wanted, *by_map*.

    It takes a fixed number of queries, however many objects there are.
    """
    found = Compared()
    for each in objects:
        try:
            found.deliveries[str(each.id)] = _observed(each, world, context.now())
        except NotAnObject:
            found.unreadable += 1
    context.within(lambda opened: _compare(opened, world, objects, found, by_map=by_map))
    return found


def _observed(answer: Answer, world: World, now: datetime) -> Delivery:
    if answer.body.get("object") == "checkout.session":
        return checkout.observed(_without_lines(answer), world, now=now)
    return observations.of_answer(observations.kind_of(answer), answer, world, now=now)


def _without_lines(session: Answer) -> Answer:
    """Return *session* without its lines: another job reads them, and the map compares them."""
    odd, span = session.odd, events.span_of(session.odd, "line_items") if session.odd else None
    if span is not None:
        odd = odd[: span[0]] + b"null" + odd[span[1] :]
    return Answer({name: value for name, value in session.body.items() if name != "line_items"}, session.at, odd)


_Place: TypeAlias = tuple[str, str]
"""Table, and the key of a row within its account and mode."""
_Name: TypeAlias = tuple[str, str, str | None]
"""The same, and a column."""


def _compare(cursor: Cursor, world: World, objects: Sequence[Answer], found: Compared, *, by_map: bool) -> None:
    # An event that is recorded or folded between two of the queries would look like a difference.
    database.take_snapshot(cursor, read_only=False)
    joined = _by_joining(cursor, found)
    pairs = list(joined.pairs.values())
    changed = {_row(pair) for pair in pairs if _differences(pair)}
    if by_map:
        pairs = [*_by_map(cursor, world, [each for each in objects if str(each.id) in joined.readable]), *pairs]
    known = {_name(each): each for pair in pairs for each in _differences(pair)}
    unstated = _unstated(cursor, world, pairs) if by_map else set()
    captured = _captured(cursor, world, joined.pairs)
    explained = _explained(cursor, world, list(known.values()), joined.pairs, captured)
    for id_ in captured:
        found.deliveries.pop(id_, None)
    found.differences = [each for name, each in known.items() if name not in unstated | explained]
    found.archived, found.unstated = len(joined.archived), len(unstated)
    rows = {(each.table, each.id) for each in found.differences}
    found.only_by_map = sum(
        table in folds.ROW_SPECS and (*_world(world), id_.split(" ")[0]) not in joined.archived
        for table, id_ in rows - changed
    )
    found.wrong = {subject.id: subject.source for subject, pair in joined.pairs.items() if _row(pair) in rows & changed}


def _name(each: Difference) -> _Name:
    return (each.table, each.id, each.column)


def _row(pair: Pair) -> _Place:
    return (str(pair.table.name), difference.identity(pair.table, pair.held or pair.expected or {}))


def _differences(pair: Pair) -> list[Difference]:
    return [each for each in difference.differences(pair) if each.column not in DECIDED_BY]


# ---- By joining ----


class _Joinings(NamedTuple):
    """Rows as they are and as joining makes them; objects with archived payloads; ids that a fold can read."""

    pairs: dict[Subject, Pair]
    archived: set[Key]
    readable: set[str]


def _by_joining(cursor: Cursor, found: Compared) -> _Joinings:
    """See Note [An object differs when it would change its row]."""
    at_hand, readable = _facts(found)
    known = load_rows(cursor, at_hand)
    own = settling.at_rest(cursor, [subject for subject in known if subject.table == "orders"])
    on_the_way = _on_the_way(cursor, map(object_of, at_hand))
    joined: dict[Subject, Joined] = {}
    archived: set[Key] = set()
    for subject, facts in facts_at_hand(cursor, set(at_hand)):
        if facts is None:
            row = own[subject][1].row if subject in own else known.get(subject)
            made = _laid_over(subject, row, at_hand[subject])
        else:
            made = _joined(subject, facts, at_hand)
        if made is None and facts is None:
            archived.add(object_of(subject))
        elif made is not None and object_of(subject) not in on_the_way:
            joined[subject] = made
    joined |= settling.settled(cursor, settling.open_rows(joined))
    pairs = {
        subject: Pair(tables.metadata.tables[subject.table], known.get(subject), made.row)
        for subject, made in joined.items()
    }
    return _Joinings(pairs, archived, readable)


def _facts(found: Compared) -> tuple[dict[Subject, list[Facts]], set[str]]:
    at_hand: dict[Subject, list[Facts]] = defaultdict(list)
    readable: set[str] = set()
    for id_, delivery in found.deliveries.items():
        verdict = folds.judge(event_of_delivery(delivery))
        if verdict.state == "parked":
            found.unreadable += 1
        else:
            readable.add(id_)
        for one in verdict.facts:
            at_hand[one.subject].append(one)
    return at_hand, readable


def _laid_over(subject: Subject, row: Row | None, facts: Sequence[Facts]) -> Joined | None:
    """Return *row* with *facts* applied to it; None if the archived payloads would be needed to know."""
    return None if row is None else join.advance(folds.ROW_SPECS[subject.table], row, facts)


def _joined(subject: Subject, facts: Iterable[Facts], at_hand: Mapping[Subject, list[Facts]]) -> Joined | None:
    spec = folds.ROW_SPECS[subject.table]
    # If the inbox has the same answer already, it is used once.
    read = {(one.subject, one.event_id): one for one in (*join.with_leader(spec, subject, at_hand), *facts)}
    return join.fold_all(spec, read.values())


def _on_the_way(cursor: Cursor, objects: Iterable[Key]) -> set[Key]:
    """Return the objects that have an event that is not folded yet: their next rows are not known."""
    wanted = sorted(set(objects))
    cursor.execute(
        """
        SELECT DISTINCT account, livemode, object_id
        FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, object_id)
        JOIN inbox AS i USING (account, livemode, object_id) JOIN pending USING (seq)
        """,
        [list(column) for column in zip(*wanted, strict=True)] or [[], [], []],
    )
    return {(account, livemode, object_id) for account, livemode, object_id in cursor.fetchall()}


# ---- By the map ----


class _Lines(NamedTuple):
    """The key under which an object lists its lines, the *table* of their rows, and its *column* for the object."""

    listed: str
    table: str
    column: str
    parent: str


_LINES: Final = {
    "checkout.session": _Lines("line_items", "order_lines", "order_id", "orders"),
    "credit_note": _Lines("lines", "credit_note_lines", "credit_note", "credit_notes"),
}
_PARENT_COLUMNS: Final = {each.table: each.column for each in _LINES.values()}


def _by_map(cursor: Cursor, world: World, objects: Sequence[Answer]) -> Iterator[Pair]:
    """Yield rows as they are and as the map makes them: see Note [The map is a second witness]."""
    stated = {str(each.id): (each, witness.statements(each.body)) for each in objects if not each.odd}
    rows = _rows_at_rest(cursor, world, stated)
    names = {statement.id for _, statements in stated.values() for statement in statements}
    busy = {id_ for *_, id_ in _on_the_way(cursor, ((*_world(world), id_) for id_ in {*stated, *names}))}
    for id_, (answer, statements) in stated.items():
        if id_ in busy:
            continue
        lines = _LINES.get(str(answer.body.get("object")))
        has_lines = lines is not None and _has_all_lines(lines, answer, rows)
        for statement in statements:
            row = rows.get(_place(statement))
            is_compared = statement.id not in busy and (has_lines or statement.table not in _PARENT_COLUMNS)
            if row is not None and is_compared and _is_settled(row, answer):
                yield Pair(_table(statement.table), row, {**row, **_known(statement, row)})
        if lines is not None and has_lines:
            yield from _missing_lines(world, lines, answer, statements, rows)


def _world(world: World) -> tuple[str, bool]:
    return (world.account, world.livemode)


def _known(statement: Statement, row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in statement.columns.items() if name in row}


def _place(statement: Statement) -> _Place:
    return (
        statement.table,
        tables.key_name([statement.id, statement.currency] if statement.currency else [statement.id]),
    )


def _table(name: str) -> Table:
    return tables.metadata.tables[name]


def _is_settled(row: Mapping[str, Any], answer: Answer) -> bool:
    """Return whether *row* was decided before Stripe answered, so that the answer includes all that the row has."""
    decided: datetime = row["as_of"]
    return decided < utc(answer.at)


def _rows_at_rest(
    cursor: Cursor, world: World, stated: Mapping[str, tuple[Answer, Sequence[Statement]]]
) -> dict[_Place, dict[str, Any]]:
    """Return the rows that the objects state, and all lines of objects that list any, by one query for each table."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for id_, (_, statements) in stated.items():
        for statement in statements:
            wanted[statement.table].add(id_ if statement.table in _PARENT_COLUMNS else statement.id)
    rows: dict[_Place, dict[str, Any]] = {}
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as opened:
        for name, ids in wanted.items():
            column = _PARENT_COLUMNS.get(name, "customer" if name == "balances" else "id")
            query = sql.SQL("SELECT * FROM {} WHERE (account, livemode) = (%s, %s) AND {} = ANY (%s)").format(
                sql.Identifier(name), sql.Identifier(column)
            )
            opened.execute(query, (*_world(world), sorted(ids)))
            rows |= {(name, difference.identity(_table(name), row)): row for row in opened}
    return rows


def _has_all_lines(lines: _Lines, answer: Answer, rows: Mapping[_Place, dict[str, Any]]) -> bool:
    """Return whether the lines can be compared: Stripe lists all, and the object's row is settled and has all."""
    parent, page = rows.get((lines.parent, str(answer.id))), answer.body.get(lines.listed)
    if parent is None or not isinstance(page, dict) or page.get("has_more") is not False:
        return False
    return parent["lines_complete"] is True and _is_settled(parent, answer)


def _missing_lines(
    world: World,
    lines: _Lines,
    answer: Answer,
    statements: Sequence[Statement],
    rows: Mapping[_Place, dict[str, Any]],
) -> Iterator[Pair]:
    """Yield the listed lines that have no row, and the rows of lines that are not listed."""
    table, parent = _table(lines.table), rows[lines.parent, str(answer.id)]
    listed = {_place(statement): statement for statement in statements if statement.table == lines.table}
    key = {"account": world.account, "livemode": world.livemode, "as_of": parent["as_of"]}
    for place, statement in listed.items():
        if place not in rows:
            yield Pair(table, None, {**statement.columns, **key, "id": statement.id})
    for place, row in rows.items():
        if place[0] == lines.table and row[lines.column] == answer.id and place not in listed:
            yield Pair(table, row, None)


# ---- What the tables explain ----


def _explained(
    cursor: Cursor,
    world: World,
    found: Sequence[Difference],
    pairs: Mapping[Subject, Pair],
    captured: Mapping[str, datetime],
) -> set[_Name]:
    """Return those of *found* that other rows explain."""
    charges = [each for each in found if each.table == "charges"]
    orders = [each for each in found if each.table == "orders" and each.id in captured]
    return {
        *_explained_charges(cursor, world, charges),
        *_paid_by_invoice(cursor, world, pairs),
        *(_name(each) for each in orders if _is_by_capture(each, captured[each.id])),
    }


_REPORTED_BY_OTHERS: Final = ("amount_refunded", "refunded", "disputed")
_OF_CHARGES: Final = """
SELECT c.id, c.amount, c.amount_captured, r.newer, r.not_older, r.newer_failed, r.failed_since, r.failed_from,
    EXISTS (
        SELECT FROM disputes AS d WHERE (d.account, d.livemode, d.charge) = (c.account, c.livemode, c.id)
    ) AS is_disputed
FROM charges AS c CROSS JOIN LATERAL (
    SELECT
        coalesce(sum(r.amount) FILTER (WHERE failed_at IS NULL AND r.created > c.as_of), 0) AS newer,
        coalesce(sum(r.amount) FILTER (WHERE failed_at IS NULL AND r.created >= c.as_of), 0) AS not_older,
        coalesce(sum(r.amount) FILTER (WHERE failed_at IS NOT NULL AND r.created >= c.as_of), 0) AS newer_failed,
        coalesce(sum(r.amount) FILTER (WHERE r.created <= c.as_of AND failed_at > c.as_of), 0) AS failed_since,
        coalesce(sum(r.amount) FILTER (WHERE r.created <= c.as_of AND failed_at >= c.as_of), 0) AS failed_from
    FROM refunds AS r
    WHERE (r.account, r.livemode, r.charge, r.currency) = (c.account, c.livemode, c.id, c.currency)
) AS r
WHERE (c.account, c.livemode) = (%s, %s) AND c.id = ANY (%s)
"""


def _explained_charges(cursor: Cursor, world: World, found: Sequence[Difference]) -> Iterator[_Name]:
    """See Note [What no event of a charge reports]."""
    by_charge: dict[str, dict[str | None, Difference]] = defaultdict(dict)
    for each in found:
        if each.kind == DIFFERENT and each.column in _REPORTED_BY_OTHERS:
            by_charge[each.id][each.column] = each
    if not by_charge:
        return
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as opened:
        for row in opened.execute(_OF_CHARGES, (*_world(world), sorted(by_charge))):
            for column in _explained_columns(row, by_charge[row["id"]]):
                yield ("charges", row["id"], column)


def _explained_columns(row: Mapping[str, Any], columns: Mapping[str | None, Difference]) -> Iterator[str]:
    disputed, refunded = columns.get("disputed"), columns.get("refunded")
    if disputed is not None and disputed.expected is True and row["is_disputed"]:
        yield "disputed"
    amount = columns.get("amount_refunded")
    if amount is not None and _is_moved_by_refunds(row, amount):
        yield "amount_refunded"
        if refunded is not None and _may_be_refunded(row, amount.expected) in (refunded.expected, None):
            yield "refunded"


def _may_be_refunded(row: Mapping[str, Any], amount: object) -> bool | None:
    """Return whether a charge with *amount* refunded is fully refunded.

    None if that is all that was captured, but less than the charge's amount: it is not documented whether Stripe calls
    that a full refund.
    """
    if amount == row["amount"]:
        return True
    return None if amount == row["amount_captured"] else False


def _is_moved_by_refunds(row: Mapping[str, Any], amount: Difference) -> bool:
    if not isinstance(amount.held, int) or not isinstance(amount.expected, int):
        return False
    # It is not known whether the event counts refunds of its own second, and whether the amount falls when one fails.
    grown, failed = (row["newer"], row["not_older"]), (0, row["newer_failed"])
    fallen = (0, row["failed_since"], row["failed_from"])
    explained = {more + lost - less for more, lost, less in product(grown, failed, fallen)}
    return amount.expected - amount.held in explained


def _paid_by_invoice(cursor: Cursor, world: World, pairs: Mapping[Subject, Pair]) -> Iterator[_Name]:
    """Yield the invoice payments without a row for which the invoice itself reports a payment, as before basil."""
    invoices = {
        subject.id: pair.expected["invoice"]
        for subject, pair in pairs.items()
        if subject.table == "invoice_payments" and pair.held is None and pair.expected is not None
    }
    if not invoices:
        return
    cursor.execute(
        "SELECT id FROM invoice_payments WHERE (account, livemode) = (%s, %s) AND id = ANY (%s)",
        (*_world(world), [str(invoice) for invoice in invoices.values()]),
    )
    known = {id_ for (id_,) in cursor.fetchall()}
    for id_, invoice in invoices.items():
        if invoice in known:
            yield ("invoice_payments", id_, None)


_CAPTURED: Final = """
SELECT o.id, min(c.captured_at) FROM orders AS o JOIN charges AS c USING (account, livemode, payment_intent)
WHERE (o.account, o.livemode) = (%s, %s) AND o.id = ANY (%s) AND c.captured_at IS NOT NULL
    AND (c.status = 'succeeded' OR c.released_at IS NOT NULL)
GROUP BY o.id
"""


def _captured(cursor: Cursor, world: World, pairs: Mapping[Subject, Pair]) -> dict[str, datetime]:
    """Return the time of the capture for each order that Stripe shows as paid, though its session left it open.

    See Note [No event of a session reports its capture].
    """
    orders = [
        subject.id
        for subject, pair in pairs.items()
        if subject.table == "orders" and pair.held and pair.expected and payment.is_open(pair.held)
        if pair.expected["payment_status"] == "paid"
    ]
    if not orders:
        return {}
    cursor.execute(_CAPTURED, (*_world(world), orders))
    return dict(cursor.fetchall())


def _is_by_capture(order: Difference, captured_at: datetime) -> bool:
    return order.column == "payment_status" or (order.column == "paid_at" and order.held == captured_at)


# ---- What older API versions do not carry ----

_MAPPED: Final = {(each.table, each.column) for each in witness.MAP}


def _unstated(cursor: Cursor, world: World, pairs: Sequence[Pair]) -> set[_Name]:
    """See Note [An older API version carries less]."""
    doubted = [pair for pair in pairs if pair.held is not None and pair.expected is not None and _differences(pair)]
    events_of = {str(pair.held["event_id"]) for pair in doubted if pair.held is not None}
    stated = _stated_by_old_events(cursor, world, events_of) if events_of else {}
    return {
        (*_row(pair), name)
        for pair in doubted
        if pair.held is not None and pair.expected is not None
        for name in pair.held
        if (statement := stated.get((str(pair.held["event_id"]), _row(pair)))) is not None
        and _is_unstated(statement, name, pair.held, pair.expected)
    }


_INFERRED_FROM: Final = {
    ("orders", "status"): ("session_status", "payment_status", "mode"),
    ("orders", "completed_at"): ("session_status",),
    ("orders", "expired_at"): ("session_status",),
    ("orders", "paid_at"): ("session_status", "payment_status", "mode"),
    ("refunds", "failed_at"): ("status",),
    ("charges", "captured_at"): ("captured", "status"),
}
"""By table and column that no object has, the mapped columns from which the folds infer it."""


def _is_unstated(statement: Statement, name: str, held: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Return whether a column differs from Stripe's list because its deciding event is of an older API version."""
    if (statement.table, name) == ("credit_notes", "refund"):
        # Only versions before basil state it. It is null where the parts of the note are known.
        return held[name] is not None and expected[name] is None
    if (statement.table, name) == ("portal_configurations", "features"):
        was, now = held[name], expected[name]
        return was != now and statement.columns.get(name) == was and _is_part(_without_removed(was), now)
    if held[name] is not None or expected[name] is None:
        return False
    inputs = _INFERRED_FROM.get((statement.table, name), ())
    return _is_lacking(statement, name) or any(
        held[each] is None and expected[each] is not None and _is_lacking(statement, each) for each in inputs
    )


def _is_lacking(statement: Statement, name: str) -> bool:
    return (statement.table, name) in _MAPPED and name not in statement.columns


_REMOVED_FEATURES: Final = ("subscription_pause",)
"""Features of a portal until 2024-04-10. Since 2026-10-28 another feature has this name; no version has both."""


def _without_removed(features: object) -> object:
    """Return the *features* of a portal in an older version, without those that the newest version lacks."""
    if not isinstance(features, dict):
        return features
    return {name: value for name, value in features.items() if name not in _REMOVED_FEATURES}


def _is_part(held: object, whole: object) -> bool:
    """Return whether *whole* equals *held*, except for keys that only *whole* has."""
    if isinstance(held, dict) and isinstance(whole, dict):
        return all(key in whole and _is_part(value, whole[key]) for key, value in held.items())
    return held == whole


def _stated_by_old_events(
    cursor: Cursor, world: World, ids: Iterable[str]
) -> dict[tuple[str, _Place], Statement]:  # fmt: skip
    """Return what the events *ids* state of each row, of those events with an older API version than the folds have."""
    cursor.execute(
        "SELECT id, seq FROM inbox"
        " WHERE (account, livemode) = (%s, %s) AND id = ANY (%s) AND left(api_version, 10) < %s",
        (*_world(world), sorted(ids), folds.API_VERSION[:10]),
    )
    seqs: dict[str, int] = dict(cursor.fetchall())
    payloads = inbox.payloads_of(cursor, list(seqs.values())) if seqs else {}
    found: dict[tuple[str, _Place], Statement] = {}
    for id_, seq in seqs.items():
        with suppress(msgspec.DecodeError, KeyError, RecursionError):
            body = msgspec.json.decode(payloads[seq], type=_Event).data.object
            found |= {(id_, _place(statement)): statement for statement in witness.statements(body)}
    return found


class _Data(Struct):
    object: dict[str, Any]


class _Event(Struct):
    data: _Data
