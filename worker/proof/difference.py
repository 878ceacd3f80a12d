"""Compares two sets of the tables: table by table, row by row, column by column, to the smallest unit of money."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import BigInteger, Table

from schemas import tables
from schemas.database import Cursor
from schemas.progress import do_nothing
from worker import folds
from worker.proof.shadow import Shadow

ROWS_READ: Final = 500
MISSING: Final = "missing"
EXTRA: Final = "extra"
DIFFERENT: Final = "different"

_MONEY: Final = {
    str(table.name): tuple(
        str(column.name)
        for column in table.columns
        if isinstance(column.type, BigInteger) and column.name != "quantity"
    )
    for table in tables.PROJECTIONS
}
_CURRENCY_OF: Final = {"presentment_amount": "presentment_currency"}
"""By column of an amount, the column of its currency, where that is not the row's own."""
_OWNER_OF: Final = {
    "balance_changes": "customer",
    "balances": "customer",
    "credit_note_lines": "credit_note",
    "order_lines": "order_id",
}
"""By table, the column with the id of the object that a row is folded from, where that is not the row's own id."""


PERSONAL: Final = frozenset(
    ("customer_email", "description", "email", "memo", "metadata", "name", "recovery_url", "shipping")
)
"""Columns with personal data. A difference hides their values, since results are kept and passed from hand to hand."""
HIDDEN: Final = "(hidden)"


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between a row that is *held* and the row that is *expected*.

    *kind* is missing (the row is not held), extra (it is not expected) or different, in one *column*. *amount* is the
    money held less the money expected, in the smallest unit of *currency*; None where the column is no money, or the
    currencies differ. *at* is when the object was created, else the time of its deciding event.
    """

    table: str
    kind: str
    account: str
    livemode: bool
    id: str
    column: str | None = None
    held: object = None
    expected: object = None
    currency: str | None = None
    amount: int | None = None
    at: datetime | None = None
    detail: str | None = None


@dataclass(slots=True)
class Tally:
    """The result of comparing one table, in rows."""

    table: str
    held: int = 0
    expected: int = 0
    missing: int = 0
    extra: int = 0
    different: int = 0

    @property
    def drift(self) -> int:
        """The number of rows that are not as expected."""
        return self.missing + self.extra + self.different


@dataclass(slots=True)
class Comparison:
    """The result of a comparison.

    *money* is the money held less the money expected, by account, mode, table, column and currency.

    *objects_left_out* is how many objects were not compared, since payloads of *events_left_out* events are archived.
    """

    tallies: list[Tally] = field(default_factory=list)
    money: Counter[tuple[str, bool, str, str, str]] = field(default_factory=Counter)
    objects_left_out: int = 0
    events_left_out: int = 0

    @property
    def drift(self) -> int:
        """The number of rows, of all tables, that are not as expected."""
        return sum(tally.drift for tally in self.tallies)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each table, to be shown: its rows on both sides, and those that differ."""
        return [
            {
                "table": tally.table,
                "live": tally.held,
                "rebuilt": tally.expected,
                "missing": tally.missing,
                "extra": tally.extra,
                "different": tally.different,
            }
            for tally in self.tallies
        ]


@dataclass(frozen=True, slots=True)
class Pair:
    """A row of *table* as it is held and as it is expected, of which one may be None."""

    table: Table
    held: dict[str, Any] | None
    expected: dict[str, Any] | None

    @property
    def kind(self) -> str:
        """How they differ."""
        return MISSING if self.held is None else EXTRA if self.expected is None else DIFFERENT


def compare(
    cursor: Cursor,
    made: Shadow,
    *,
    on_difference: Callable[[Difference], None],
    pair: Callable[[Pair], None] = do_nothing,
) -> Comparison:
    """Compare the live tables with those of *made*.

    *on_difference* is called with each difference, *pair* with each pair of rows that differ. Rows of objects that
    *made* leaves out are not compared.
    """
    found = Comparison()
    compared = _compared(cursor, made)
    for table in sorted(tables.PROJECTIONS, key=lambda each: each.name):
        tally = Tally(str(table.name), *(_count(cursor, rows) for rows in compared(table)))
        for each in _pairs(cursor, compared, table):
            pair(each)
            setattr(tally, each.kind, getattr(tally, each.kind) + 1)
            _add_money(found.money, each)
            for difference in differences(each):
                on_difference(difference)
        found.tallies.append(tally)
    found.money = Counter({key: amount for key, amount in found.money.items() if amount})
    found.tallies.append(_compare_anomalies(cursor, compared, on_difference, with_events=not made.has_inbox))
    return found


_Compared = Callable[[Table], tuple[sql.Composable, sql.Composable]]
"""Returns the live rows of a table to compare, and the expected rows, each as SQL to select from."""


def _compared(cursor: Cursor, made: Shadow) -> _Compared:
    cursor.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(sql.Identifier(made.schema, "left_out")))
    is_part = cursor.fetchone() == (True,)

    def rows_of(table: Table) -> tuple[sql.Composable, sql.Composable]:
        held, expected = sql.Identifier(made.live, table.name), sql.Identifier(made.schema, table.name)
        if not is_part:
            return held, expected
        return _but_left_out(made, table, held), _but_left_out(made, table, expected)

    return rows_of


def _but_left_out(made: Shadow, table: Table, rows: sql.Identifier) -> sql.Composed:
    owner: sql.Composable = sql.Identifier("t", _OWNER_OF.get(table.name, "id"))
    if table is tables.anomalies:
        owner = sql.SQL("coalesce(t.object_id, t.subject_id)")
    return sql.SQL(
        "(SELECT * FROM {rows} AS t WHERE NOT EXISTS (SELECT FROM {left_out} AS l"
        " WHERE (l.account, l.livemode, l.object_id) = (t.account, t.livemode, {owner})))"
    ).format(rows=rows, left_out=sql.Identifier(made.schema, "left_out"), owner=owner)


def _count(cursor: Cursor, rows: sql.Composable) -> int:
    cursor.execute(sql.SQL("SELECT count(*) FROM {} AS t").format(rows))
    (count,) = cursor.fetchone() or (0,)
    return int(count)


def distinct(table: Table) -> sql.Composed:
    """Return the condition that rows *h* and *e* of a table differ; a row that does not exist is null."""
    names = [column.name for column in table.columns]
    held, expected = (sql.SQL(", ").join(sql.Identifier(alias, name) for name in names) for alias in ("h", "e"))
    return sql.SQL("ROW({}) IS DISTINCT FROM ROW({})").format(held, expected)


def key_of(table: Table) -> list[str]:
    """Return the names of the key columns of *table*."""
    return [column.name for column in table.primary_key]


def _pairs(cursor: Cursor, compared: _Compared, table: Table) -> Iterator[Pair]:
    held_rows, expected_rows = compared(table)
    # By name, since a column that a migration added comes after all others in the table.
    names = [str(column.name) for column in table.columns]
    statement = sql.SQL(
        "SELECT {columns} FROM {held} AS h FULL JOIN {expected} AS e USING ({key}) WHERE {distinct} ORDER BY {sorted}"
    ).format(
        columns=sql.SQL(", ").join(sql.Identifier(alias, name) for alias in ("h", "e") for name in names),
        held=held_rows,
        expected=expected_rows,
        key=sql.SQL(", ").join(map(sql.Identifier, key_of(table))),
        distinct=distinct(table),
        sorted=sql.SQL(", ").join(
            sql.SQL("coalesce(h.{0}, e.{0})").format(sql.Identifier(name)) for name in key_of(table)
        ),
    )
    with cursor.connection.cursor("differences", binary=True) as rows:
        rows.itersize = ROWS_READ
        rows.execute(statement)
        for row in rows:
            held, expected = (dict(zip(names, part, strict=True)) for part in (row[: len(names)], row[len(names) :]))
            yield Pair(
                table,
                held if held["account"] is not None else None,
                expected if expected["account"] is not None else None,
            )


def identity(table: Table, row: Mapping[str, Any]) -> str:
    """Return the key that names *row* within its account and mode."""
    return tables.key_name([str(row[name]) for name in key_of(table) if name not in ("account", "livemode")])


def owner(table: Table, row: Mapping[str, Any]) -> str:
    """Return the object that *row* is about: of a balance, its customer."""
    return str(row["customer" if table is tables.balances else "id"])


def differences(pair: Pair) -> list[Difference]:
    """Return the differences of the two rows: one for a row without its counterpart, else one for each column."""
    row = pair.held or pair.expected or {}
    world: dict[str, Any] = {
        "table": str(pair.table.name),
        "kind": pair.kind,
        "account": row["account"],
        "livemode": row["livemode"],
        "id": identity(pair.table, row),
        "at": row.get("created") or row["as_of"],
    }
    if pair.held is None or pair.expected is None:
        worth = tables.worth_of(row)
        sign = 1 if pair.expected is None else -1
        return [
            Difference(**world, currency=row.get("currency"), amount=sign * worth if isinstance(worth, int) else None)
        ]
    return [
        Difference(
            **world,
            column=name,
            held=shown_value(name, pair.held[name]),
            expected=shown_value(name, pair.expected[name]),
            **_by_how_much(pair, name),
        )
        for name in pair.held
        if pair.held[name] != pair.expected[name]
    ]


def shown_value(column: str | None, value: object) -> object:
    """Return *value* as a report may show it: the value of a column with personal data is hidden."""
    return HIDDEN if column in PERSONAL and value is not None else value


def _by_how_much(pair: Pair, name: str) -> dict[str, Any]:
    """Return the amount by which the two differ, and its currency, where both are money of one currency."""
    held, expected = pair.held or {}, pair.expected or {}
    currency = held.get(_CURRENCY_OF.get(name, "currency"))
    is_of_one = currency is not None and currency == expected.get(_CURRENCY_OF.get(name, "currency"))
    if name not in _MONEY[pair.table.name] or not is_of_one:
        return {}
    return {"currency": currency, "amount": (held[name] or 0) - (expected[name] or 0)}


def _add_money(money: Counter[tuple[str, bool, str, str, str]], pair: Pair) -> None:
    """Add the money held and subtract the money expected, each in the currency of its own row."""
    for name in _MONEY[pair.table.name]:
        for row, sign in ((pair.held, 1), (pair.expected, -1)):
            currency = row.get(_CURRENCY_OF.get(name, "currency")) if row is not None else None
            if row is not None and currency is not None and row[name]:
                key = (row["account"], row["livemode"], str(pair.table.name), str(name), currency)
                money[key] += sign * row[name]


def _compare_anomalies(
    cursor: Cursor, compared: _Compared, on_difference: Callable[[Difference], None], *, with_events: bool
) -> Tally:
    """Compare the anomalies that are in force: they too follow from the events.

    *with_events* includes anomalies of events with contradicting copies. A log may have only one of these copies.
    """
    held_rows, expected_rows = compared(tables.anomalies)
    statement = sql.SQL(
        """
        SELECT h.id IS NOT NULL AS is_held, e.id IS NOT NULL AS is_expected,
            account, livemode, kind, subject_id, coalesce(h.as_of, e.as_of) AS seen_of
        FROM (SELECT * FROM {held} AS h WHERE resolved_at IS NULL AND {wanted}) AS h
        FULL JOIN (SELECT * FROM {expected} AS e WHERE resolved_at IS NULL AND {wanted}) AS e
            USING (account, livemode, id, kind, subject, subject_id)
        """
    ).format(held=held_rows, expected=expected_rows, wanted=sql.SQL("true" if with_events else "subject <> 'event'"))
    tally = Tally("anomalies")
    with cursor.connection.cursor(row_factory=dict_row) as rows:
        rows.execute(statement)
        for row in rows:
            tally.held += row["is_held"]
            tally.expected += row["is_expected"]
            if row["is_held"] and row["is_expected"]:
                continue
            kind = EXTRA if row["is_held"] else MISSING
            setattr(tally, kind, getattr(tally, kind) + 1)
            on_difference(
                Difference(
                    "anomalies",
                    kind,
                    row["account"],
                    row["livemode"],
                    row["subject_id"],
                    row["kind"],
                    at=row["seen_of"],
                )
            )
    return tally


def subject_of(pair: Pair) -> tuple[str, str] | None:
    """Return what the change feed calls the row's subject, and its id; None for a row that is part of another."""
    spec = folds.ROW_SPECS.get(pair.table.name)
    row = pair.expected or pair.held
    return None if spec is None or row is None else (spec.subject, owner(pair.table, row))
