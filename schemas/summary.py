"""What happened in a period, in numbers: orders, refunds and disputes, and the funnel of each payment link.

Note [Sums follow the rows]
    A summary has to cost the same however long the history is, so it reads sums by the hour. They are kept by triggers
    on ``orders``, ``refunds`` and ``disputes``: each statement that writes rows also writes the difference that it
    makes to the sums, in its own transaction. So the sums are right in every snapshot, by any writer of the rows: a
    fold, a swap, a rename, the release before this one during a deployment, a person with psql. The triggers
    run as the owner of their functions, so none of them needs a right on the tables of the sums.

    A batch must not wait for another that changes the same hour. So a trigger only appends rows of differences to
    ``hourly_deltas`` and ``link_deltas``, and a reader adds these to the sums. About every twentieth statement adds
    what is committed of them to ``hourly_sums`` and ``link_sums``. Only one transaction does that at a time, by a lock
    that the others do not wait for. As no one else writes these two tables, no two transactions can wait for each
    other's rows there.

    The digest does not cover the sums, since they follow from tables that it covers. A rebuild compares them with the
    rows, and a swap corrects them: worker/proof/sums.py.

Note [A sum is of known amounts in one currency]
    Rows are counted by status and currency, and either may be null. The amount of a sum is of the rows that have an
    amount and a currency; ``without_amount`` counts the others. It is null where all rows are without one, since a
    zero would be a claim. An order or a refund without a time of creation is in no period, and counted as undated. A
    dispute has no time of creation, so it counts in the hour of its deciding event, the last.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Date,
    FromClause,
    Row,
    Select,
    Table,
    cast,
    false,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
    union_all,
)

from schemas import lookup, tables
from schemas.errors import ConfigurationError

HOUR: Final = timedelta(hours=1)
USUAL: Final = timedelta(days=1)
"""The period of a summary, unless another is given."""


class Period(NamedTuple):
    """Whole hours: from *since* on, and before *until*."""

    since: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class Sum:
    """The *count* of rows of one status and currency, and their *amount*: see Note [A sum is of known amounts …]."""

    status: str | None
    currency: str | None
    count: int
    amount: int | None
    without_amount: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The sums of one account and mode in a period; *undated* counts orders and refunds, which are in no period."""

    account: str
    livemode: bool
    orders: Sequence[Sum]
    refunds: Sequence[Sum]
    disputes: Sequence[Sum]
    undated_orders: int
    undated_refunds: int

    @property
    def orders_by_status(self) -> dict[str | None, int]:
        """The number of orders of each status, in any currency."""
        counts = Counter[str | None]()
        for each in self.orders:
            counts[each.status] += each.count
        return dict(counts)


def period_of(since: datetime | None, until: datetime | None, *, now: datetime) -> Period:
    """Return the whole hours that a period touches: up to *now*, and a day long, unless given.

    Raises:
        ConfigurationError: the period has no end, or is empty.
    """
    try:
        end = _hour_of(until or now, is_end=True)
        begin = _hour_of(end - USUAL if since is None else since)
    except (OverflowError, ValueError):
        raise ConfigurationError("A time of the period is beyond the calendar.") from None
    if begin >= end or (since is not None and until is not None and since >= until):
        raise ConfigurationError("The period is empty: it ends before it begins.")
    return Period(begin, end)


def _hour_of(moment: datetime, *, is_end: bool = False) -> datetime:
    exact = moment.astimezone(UTC)
    hour = exact.replace(minute=0, second=0, microsecond=0)
    return hour + HOUR if is_end and hour < exact else hour


# ---- The summary ----


def read(
    connection: Connection, period: Period | None, *, account: str | None = None, livemode: bool | None = None
) -> list[Summary]:
    """Return the summary of each account and mode with rows in *period*, or at any time, or without a time."""
    rows = connection.execute(query_of(period, account=account, livemode=livemode)).all()
    worlds: dict[tuple[str, bool], list[Row[Any]]] = defaultdict(list)
    for row in rows:
        worlds[row.account, row.livemode].append(row)
    return [_summary(*world, worlds[world]) for world in sorted(worlds)]


def _summary(account: str, livemode: bool, rows: Sequence[Row[Any]]) -> Summary:  # noqa: FBT001 - a part of the key
    sums: dict[str, list[Sum]] = {subject: [] for subject in tables.SUMMED}
    undated = Counter[str]()
    for row in rows:
        if row.is_undated:
            undated[row.subject] += int(row.counted)
        else:
            sums[row.subject].append(_sum(row))
    return Summary(
        account, livemode, sums["order"], sums["refund"], sums["dispute"], undated["order"], undated["refund"]
    )


def _sum(row: Row[Any]) -> Sum:
    amount = None if row.counted == row.without_amount else int(row.amount)
    return Sum(row.status, row.currency, int(row.counted), amount, int(row.without_amount))


def query_of(period: Period | None, *, account: str | None, livemode: bool | None) -> Select[Any]:
    """Return the query of the sums in *period*, or at any time, and of those without a time."""
    given = {"account": account, "livemode": livemode}
    parts = [
        select(*(table.c[name] for name in _COUNTED), literal(is_undated).label("is_undated")).where(
            *_wanted(table, given), *hours
        )
        for table in (tables.hourly_sums, tables.hourly_deltas)
        for is_undated, hours in _hours(table, period)
    ]
    rows = union_all(*parts).subquery("rows")
    numbers = [func.sum(rows.c[name]).label(name) for name in _NUMBERS]
    kind = (rows.c.account, rows.c.livemode, rows.c.subject, rows.c.is_undated, rows.c.status, rows.c.currency)
    return (
        select(*kind, *numbers)
        .group_by(*kind)
        .having(or_(*(number.element != 0 for number in numbers)))
        .order_by(rows.c.status.nulls_last(), rows.c.currency.nulls_last())
    )


_NUMBERS: Final = ("counted", "amount", "without_amount")
_COUNTED: Final = ("account", "livemode", "subject", "status", "currency", *_NUMBERS)


def _hours(table: Table, period: Period | None) -> Sequence[tuple[bool, Sequence[ColumnElement[bool]]]]:
    """Return which hours of *table* to read, the undated apart."""
    if period is None:
        return [(False, [])]
    hour = table.c.hour
    return [(False, [hour >= period.since, hour < period.until]), (True, [hour.is_(None)])]


def _wanted(table: Table, given: Mapping[str, object]) -> list[ColumnElement[bool]]:
    return [table.c[name] == value for name, value in given.items() if value is not None]


@dataclass(frozen=True, slots=True)
class SumOfDay(Sum):
    """The sum of the orders that were created on one day, UTC, of one account and mode."""

    account: str
    livemode: bool
    day: date


def days(
    connection: Connection, period: Period, *, account: str | None = None, livemode: bool | None = None
) -> list[SumOfDay]:
    """Return the sums of the orders of each day in *period*, by account, mode, status and currency."""
    found = connection.execute(days_query_of(period, account=account, livemode=livemode))
    return [SumOfDay(**asdict(_sum(row)), account=row.account, livemode=row.livemode, day=row.day) for row in found]


def days_query_of(period: Period, *, account: str | None, livemode: bool | None) -> Select[Any]:
    """Return the query of the sums of the orders of each day in *period*."""
    given = {"account": account, "livemode": livemode, "subject": "order"}
    parts = [
        select(
            *(table.c[name] for name in ("account", "livemode", "status", "currency", *_NUMBERS)),
            cast(func.timezone("UTC", table.c.hour), Date).label("day"),
        ).where(*_wanted(table, given), table.c.hour >= period.since, table.c.hour < period.until)
        for table in (tables.hourly_sums, tables.hourly_deltas)
    ]
    rows = union_all(*parts).subquery("rows")
    numbers = [func.sum(rows.c[name]).label(name) for name in _NUMBERS]
    kind = [rows.c[name] for name in ("account", "livemode", "day", "status", "currency")]
    return select(*kind, *numbers).group_by(*kind).having(func.sum(rows.c.counted) != 0).order_by(*kind)


# ---- The funnel ----


class LinkKey(NamedTuple):
    """The place of a row in the funnel."""

    account: str
    livemode: bool
    payment_link: str
    currency: str | None


@dataclass(frozen=True, slots=True)
class LinkFunnel:
    """How far the sessions of one payment link came that are in one currency: as the view ``payment_link_funnel``.

    ``without_amount`` counts the paid sessions of which the amount is not known.
    """

    account: str
    livemode: bool
    payment_link: str
    currency: str | None
    opened: int
    completed: int
    paid: int
    expired: int
    amount_paid: int
    without_amount: int

    @property
    def key(self) -> LinkKey:
        """The row's place."""
        return LinkKey(self.account, self.livemode, self.payment_link, self.currency)


@dataclass(frozen=True, slots=True)
class FunnelPage:
    """Some *rows* of the funnel, and the key that the next page is *after*; None where this is the last page."""

    rows: Sequence[LinkFunnel]
    after: LinkKey | None


def funnel(
    connection: Connection,
    *,
    account: str | None = None,
    livemode: bool | None = None,
    payment_link: str | None = None,
    after: LinkKey | None = None,
    limit: int | None = None,
) -> FunnelPage:
    """Return the funnel of each payment link and currency in the order of their keys, those *after* a key."""
    given = {"account": account, "livemode": livemode, "payment_link": payment_link}
    last = [] if limit is None else connection.execute(end_query_of(given, after, limit)).all()
    end = LinkKey(*last[0]) if len(last) > 1 else None
    found = connection.execute(funnel_query_of(given, after, end)).all()
    rows = [LinkFunnel(*row[:4], *map(int, row[4:])) for row in found]
    if limit is not None and len(rows) > limit:
        return FunnelPage(rows[:limit], rows[limit - 1].key)
    return FunnelPage(rows, end)


def end_query_of(given: Mapping[str, object], after: LinkKey | None, limit: int) -> Select[Any]:
    """Return the query of the last key of a page, and of the one after it, if there is one.

    A page is bounded first and summed then, so that no more is summed than it shows.
    """
    sums = tables.link_sums
    key = [sums.c[name] for name in LinkKey._fields]
    wanted = [*lookup.where(sums, given), *_after(sums, after), sums.c.opened != 0]
    return select(*key).where(*wanted).order_by(*_in_order(sums)).offset(limit - 1).limit(2)


def funnel_query_of(given: Mapping[str, object], after: LinkKey | None, end: LinkKey | None) -> Select[Any]:
    """Return the query of the funnel's rows that are as *given*, after one key and up to another."""
    sums, deltas = tables.link_sums, tables.link_deltas
    parts = [
        select(table).where(*wanted, *_after(table, after), *_up_to(table, end))
        for table, wanted in ((sums, lookup.where(sums, given)), (deltas, _wanted(deltas, given)))
    ]
    rows = union_all(*parts).subquery("rows")
    key = [rows.c[name] for name in LinkKey._fields]
    numbers = [func.sum(column).label(column.name) for column in rows.c if column.name not in LinkKey._fields]
    return select(*key, *numbers).group_by(*key).having(func.sum(rows.c.opened) != 0).order_by(*_in_order(rows))


def _in_order(rows: FromClause) -> list[ColumnElement[Any]]:
    *link, currency = (rows.c[name] for name in LinkKey._fields)
    return [*link, currency.nulls_last()]


# In the next two, the first condition is one that an index answers, and the second excludes few rows, which the planner
# knows by its form.


def _after(table: Table, key: LinkKey | None) -> list[ColumnElement[bool]]:
    if key is None:
        return []
    link, currency = tuple_(*(table.c[name] for name in LinkKey._fields[:-1])), table.c.currency
    others = false() if key.currency is None else or_(currency > key.currency, currency.is_(None))
    return [link >= key[:-1], or_(link != key[:-1], others)]


def _up_to(table: Table, key: LinkKey | None) -> list[ColumnElement[bool]]:
    if key is None:
        return []
    link, currency = tuple_(*(table.c[name] for name in LinkKey._fields[:-1])), table.c.currency
    return [link <= key[:-1], or_(link != key[:-1], true() if key.currency is None else currency <= key.currency)]
