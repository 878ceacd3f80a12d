"""Compares the sums with the rows that they are of, and corrects them: see Note [Sums follow the rows].

The statements here count all rows, and share nothing with the triggers that keep the sums.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import Numeric, Table

from schemas import tables
from schemas.database import Cursor
from worker.proof.difference import DIFFERENT, EXTRA, MISSING, Comparison, Difference, Tally


class _Sums(NamedTuple):
    """A table of sums, the table of *deltas* to add to it, its *key*, and SQL that *counts* the rows themselves."""

    table: Table
    deltas: Table
    key: Sequence[str]
    counts: str

    @property
    def numbers(self) -> list[str]:
        """The columns that are summed."""
        return [str(column.name) for column in self.table.columns if column.name not in self.key]


def _hourly(table: str, subject: str, at: str, amount: str) -> str:
    return f"""
    SELECT account, livemode, '{subject}' AS subject, date_trunc('hour', {at}, 'UTC') AS hour, status, currency,
        count(*) AS counted, coalesce(sum({amount}) FILTER (WHERE currency IS NOT NULL), 0) AS amount,
        count(*) FILTER (WHERE {amount} IS NULL OR currency IS NULL) AS without_amount
    FROM {{live}}.{table} GROUP BY 1, 2, 4, 5, 6
    """


_HOURLY: Final = " UNION ALL ".join(
    (
        _hourly("orders", "order", "created", "amount_total"),
        _hourly("refunds", "refund", "created", "amount"),
        _hourly("disputes", "dispute", "as_of", "amount"),
    )
)
_LINKS: Final = """
SELECT account, livemode, payment_link, currency, count(*) AS opened, count(completed_at) AS completed,
    count(*) FILTER (WHERE status = 'paid') AS paid, count(*) FILTER (WHERE status = 'expired') AS expired,
    coalesce(sum(amount_total) FILTER (WHERE status = 'paid'), 0) AS amount_paid,
    count(*) FILTER (WHERE status = 'paid' AND amount_total IS NULL) AS without_amount
FROM {live}.orders WHERE payment_link IS NOT NULL GROUP BY 1, 2, 3, 4
"""
_SUMS: Final = (
    _Sums(
        tables.hourly_sums,
        tables.hourly_deltas,
        ("account", "livemode", "subject", "hour", "status", "currency"),
        _HOURLY,
    ),
    _Sums(tables.link_sums, tables.link_deltas, ("account", "livemode", "payment_link", "currency"), _LINKS),
)


def compare(cursor: Cursor, live: str, found: Comparison, *, on_difference: Callable[[Difference], None]) -> bool:
    """Compare the sums in the schema *live* with its rows, add the result to *found*, and return whether they differ.

    *on_difference* is called with each difference.
    """
    tallies = [Tally(str(sums.table.name)) for sums in _SUMS]
    for sums, tally in zip(_SUMS, tallies, strict=True):
        for difference in _differences(cursor, live, sums, tally):
            on_difference(difference)
    found.tallies += tallies
    return any(tally.drift for tally in tallies)


def correct(cursor: Cursor, live: str) -> None:
    """Bring the sums in the schema *live* to its rows, while no one else writes them."""
    for sums in _SUMS:
        key = sql.SQL(", ").join(map(sql.Identifier, sums.key))
        cursor.execute(
            sql.SQL("{groups} INSERT INTO {deltas} ({key}, {numbers}) SELECT {key}, {lacking} FROM differing").format(
                groups=_groups(live, sums),
                deltas=sql.Identifier(live, sums.deltas.name),
                key=key,
                numbers=sql.SQL(", ").join(map(sql.Identifier, sums.numbers)),
                lacking=sql.SQL(", ").join(_each(sums, "coalesce({expected}, 0) - coalesce({held}, 0)")),
            )
        )


def _differences(cursor: Cursor, live: str, sums: _Sums, tally: Tally) -> Iterator[Difference]:
    """Yield the differences of one table of sums, and count them in *tally*."""
    statement = sql.SQL(
        """
        {groups}
        SELECT t.*, d.* FROM (
            SELECT count(*) FILTER (WHERE is_held) AS all_held, count(*) FILTER (WHERE is_expected) AS all_expected
            FROM groups
        ) AS t LEFT JOIN differing AS d ON true
        """
    ).format(groups=_groups(live, sums))
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
        for row in rows.execute(statement):
            tally.held, tally.expected = row["all_held"], row["all_expected"]
            if row["account"] is not None:
                kind = DIFFERENT if row["is_held"] and row["is_expected"] else EXTRA if row["is_held"] else MISSING
                setattr(tally, kind, getattr(tally, kind) + 1)
                yield from _of_row(sums, row, kind)


def _of_row(sums: _Sums, row: dict[str, Any], kind: str) -> Iterator[Difference]:
    at = row.get("hour")
    names = [_text(row[name]) for name in sums.key if name not in ("account", "livemode")]
    world: dict[str, Any] = {"account": row["account"], "livemode": row["livemode"], "id": tables.key_name(names)}
    for name in sums.numbers:
        held, expected = (_whole(row[f"{side}_{name}"]) for side in ("held", "expected"))
        if (held or 0) != (expected or 0):
            is_money = isinstance(sums.table.columns[name].type, Numeric)
            of_money = {"currency": row["currency"], "amount": (held or 0) - (expected or 0)} if is_money else {}
            yield Difference(
                str(sums.table.name), kind, **world, column=name, held=held, expected=expected, at=at, **of_money
            )


def _text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else "null" if value is None else str(value)


def _whole(value: Any) -> int | None:  # noqa: ANN401 - a number of the driver
    return None if value is None else int(value)


def _groups(live: str, sums: _Sums) -> sql.Composed:
    """Return SQL with the tables ``groups``, a row for each key of the sums or of the rows, and ``differing``."""
    schema = sql.Identifier(live)
    summed = [sql.SQL("sum({0}) AS {0}").format(sql.Identifier(name)) for name in sums.numbers]
    return sql.SQL(
        """
        WITH each AS (
            SELECT true AS is_held, {key}, {summed}
            FROM (SELECT {columns} FROM {sums} UNION ALL SELECT {columns} FROM {deltas}) AS s GROUP BY {key}
            HAVING ({sums_of}) <> ({zeros})
            UNION ALL
            SELECT false, {columns} FROM ({counts}) AS r
        ), groups AS MATERIALIZED (
            SELECT bool_or(is_held) AS is_held, bool_or(NOT is_held) AS is_expected, {key}, {both}
            FROM each GROUP BY {key}
        ), differing AS (SELECT * FROM groups WHERE {differ})
        """
    ).format(
        key=sql.SQL(", ").join(map(sql.Identifier, sums.key)),
        columns=sql.SQL(", ").join(map(sql.Identifier, [*sums.key, *sums.numbers])),
        sums=sql.Identifier(live, sums.table.name),
        deltas=sql.Identifier(live, sums.deltas.name),
        summed=sql.SQL(", ").join(summed),
        sums_of=sql.SQL(", ").join(sql.SQL("sum({})").format(sql.Identifier(name)) for name in sums.numbers),
        zeros=sql.SQL(", ").join(sql.SQL("0") for _ in sums.numbers),
        counts=sql.SQL(sums.counts).format(live=schema),
        both=sql.SQL(", ").join(_each(sums, _BOTH)),
        differ=sql.SQL(" OR ").join(_each(sums, "{held} IS DISTINCT FROM {expected}")),
    )


_BOTH: Final = "sum({name}) FILTER (WHERE is_held) AS {held}, sum({name}) FILTER (WHERE NOT is_held) AS {expected}"


def _each(sums: _Sums, template: str) -> list[sql.Composed]:
    """Return *template* for each number of the sums, as it is *held* and as it is *expected*."""
    return [
        sql.SQL(template).format(
            name=sql.Identifier(name), held=sql.Identifier(f"held_{name}"), expected=sql.Identifier(f"expected_{name}")
        )
        for name in sums.numbers
    ]
