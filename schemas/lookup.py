"""Finds rows by an id without their account, quickly in a table of any size.

Note [An id is looked up in every account]
    Keys, and the indexes of what an object is part of, begin with the account and the mode, so that accounts can be
    dealt out. For a query by the id alone, PostgreSQL before 18 would read a whole index. There are few accounts, and
    the index leads from each to the next. So the accounts are listed first, and the id is then looked up in each.

Note [Orders of one status]
    The newest orders of a status are the first of it in an index that begins with the status. Where many orders have
    the status, PostgreSQL takes the index by time alone for a better one, since it supposes that they lie evenly among
    all orders. They do not: a program that tries stolen cards leaves sessions by the thousand, and the newest paid
    order lies behind them. So the list is sorted by the status first, which only the one index does. PostgreSQL
    drops a column from the order if it is equal to one value, so the condition is a list with one status.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BindParameter,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    FromClause,
    RowMapping,
    Select,
    Table,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    func,
    literal,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY

from schemas import tables
from schemas.database import by_key, cursor, id_arrays, take_snapshot
from schemas.errors import ConflictError, NotFoundError

FOUND_MAX: Final = 2
"""Rows that are looked for: one, and a second one, which makes the id ambiguous."""
NEWEST: Final[ColumnElement[Any]] = literal_column(tables.NEWEST)
_KEY: Final = ("account", "livemode", "id")
_KEYS: Final = {tables.order_book.name: tables.orders, tables.events.name: tables.inbox}
"""By view, the table that has the keys of its rows."""


def by_id(
    connection: Connection, table: Table, key: str, *, account: str | None, livemode: bool | None
) -> list[RowMapping]:
    """Return the rows of *table*, or of a view, that have the id *key* in the world that is asked for, at most two."""
    modes = [True, False] if livemode is None else [livemode]
    query = query_of(table, of_account=account is not None)
    given = {"id": key, "modes": modes, "account": account}
    return list(by_key(connection, query, given).mappings())


@cache
def query_of(table: Table, *, of_account: bool) -> Select[Any]:
    """Return the query by ``id``, ``modes`` and, where it is *of_account*, ``account``.

    The query is cached, since building it takes as long as running it.
    """
    modes = (
        func.unnest(bindparam("modes", type_=ARRAY(Boolean))).table_valued("livemode", name="modes").render_derived()
    )
    found = select(table).where(table.c.id == bindparam("id"), table.c.livemode == modes.c.livemode)
    if of_account:
        worlds: FromClause = modes
        found = found.where(table.c.account == bindparam("account"))
    else:
        accounts = _accounts(table)
        worlds = accounts.join(modes, true())
        found = found.where(table.c.account == accounts.c.account)
    # The offset keeps this at one look at the index for each, no matter what the planner estimates.
    of_each = found.offset(0).lateral("found")
    return select(of_each).select_from(worlds.join(of_each, true())).limit(FOUND_MAX)


def lines_of(connection: Connection, table: Table, owner: str, row: Mapping[str, Any]) -> Sequence[RowMapping]:
    """Return the rows of *table* that name *row* in the column *owner*, by their ids."""
    given = {"owner": row["id"], "account": row["account"], "livemode": row["livemode"]}
    # Not prepared: while the table is empty, its key, by which the rows are sorted, looks as good as the owner's index.
    return connection.execute(_of_owner(table, owner), given).mappings().all()


@cache
def _of_owner(table: Table, owner: str) -> Select[Any]:
    """Return the query of ``lines_of`` by ``account``, ``livemode`` and ``owner``, cached as ``query_of`` is."""
    world = [table.c[name] == bindparam(name) for name in _KEY[:2]]
    return select(table).where(*world, table.c[owner] == bindparam("owner")).order_by(table.c.id)


def world_of(
    connection: Connection, object_id: str, *, account: str | None, livemode: bool | None
) -> tuple[str, bool]:  # fmt: skip
    """Return the account and the mode of the events about the object *object_id*.

    Raises:
        NotFoundError: there is none, in the world that is asked for.
        ConflictError: several accounts or modes have such an object.
    """
    inbox = tables.inbox
    wanted = of_object(object_id, account=account, livemode=livemode)
    query = select(inbox.c.account, inbox.c.livemode).where(*wanted).distinct().limit(2)
    found = connection.execute(query).all()
    if not found:
        raise NotFoundError(f"There is no {object_id} here.")
    if len(found) > 1:
        raise ConflictError(f"Several accounts or modes have {object_id}: choose the account, and live or test.")
    return found[0].account, found[0].livemode


def renderings_of(connection: Connection, event: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the other contents that are kept of a row of ``events``, the last received first.

    The hash of a content is null until it has been compared, and the payload where it is archived.
    """
    table = tables.renderings
    binary, hidden = ("content_sha256", "payload_sha256"), ("account", "livemode", "id", "signature", "verified")
    columns: list[ColumnElement[Any]] = [func.encode(table.c[name], "hex").label(name) for name in binary]
    columns += [(table.c.signature.is_not(None) & table.c.verified).label("signed")]
    columns += [column for column in table.c if column.name not in (*binary, *hidden)]
    same = [table.c[name] == event[name] for name in ("account", "livemode", "id")]
    query = select(*columns).where(*same).order_by(table.c.received_at.desc(), table.c.payload_sha256)
    found = (dict(row) for row in connection.execute(query).mappings())
    return [
        {**row, "payload": None if row["payload"] is None else row["payload"].decode(errors="replace")} for row in found
    ]


def where(table: Table, given: Mapping[str, object]) -> list[ColumnElement[bool]]:
    """Return the conditions that columns of *table*, or of a view, have the values *given* by name; None is any.

    They find the rows by an index where there is one that begins with the account, the mode and one of the columns.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    found: list[ColumnElement[bool]] = [table.c[name] == value for name, value in asked.items()]
    if _indexed(_KEYS.get(table.name, table)) & asked.keys():
        found += [_OF_ANY[name](table) for name in _OF_ANY if name not in asked]
    return found


def of_object(object_id: str, *, account: str | None, livemode: bool | None) -> list[ColumnElement[bool]]:
    """Return the conditions that rows of the inbox are about *object_id*; None is any account, or any mode.

    See Note [Events of an object are found by a hash] in schemas/tables.py.
    """
    inbox = tables.inbox
    given = {"account": account, "livemode": livemode}
    return [
        # As the index has it: a parameter in place of the seed would hide it from a plan for all parameters.
        literal_column(tables.id_hash("inbox.object_id")) == func.hashtextextended(object_id, literal_column("0")),
        inbox.c.object_id == object_id,
        *(inbox.c[name].is_not_distinct_from(value) for name, value in given.items() if value is not None),
    ]


def order_of(table: Table, by: ColumnElement[Any] = NEWEST) -> tuple[ColumnElement[Any], ...]:
    """Return the columns by which a list of *table* is sorted, all of them falling."""
    return (by, table.c.id, table.c.account, table.c.livemode)


def newest(
    table: Table,
    wanted: Sequence[ColumnElement[bool]],
    *,
    limit: int,
    by: ColumnElement[Any] = NEWEST,
) -> Select[Any]:
    """Return the query of the *limit* newest rows of *table* that are as *wanted*, with the time *by* in Unix seconds.

    That column is called ``newest``.
    """
    falling = (column.desc() for column in order_of(table, by))
    return select(table, _epoch(by)).where(and_(true(), *wanted)).order_by(*falling).limit(limit)


def _epoch(at: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.extract("epoch", at).label("newest")


def newest_orders(
    connection: Connection, wanted: Sequence[ColumnElement[bool]], *, status: str | None, limit: int
) -> Sequence[RowMapping]:
    """Return the *limit* newest rows of ``order_book`` that are as *wanted* in ``orders``, each with ``newest``.

    *status* is the one status that they have, None for any. The keys are found by a plan for these conditions, and
    their rows by one for all keys: the view takes longer to plan than to read. Both see the same moment, so the
    transaction of *connection* has read nothing yet, and writes nothing later.
    """
    with cursor(connection) as driver:
        take_snapshot(driver)
    keys = connection.execute(newest_keys(wanted, status=status, limit=limit)).all()
    if not keys:
        return []
    given = dict(zip(_KEY, id_arrays(keys), strict=True))
    return by_key(connection, _orders_by_keys(), given).mappings().all()


def newest_keys(wanted: Sequence[ColumnElement[bool]], *, status: str | None, limit: int) -> Select[Any]:
    """Return the query of the keys of ``newest_orders``: see Note [Orders of one status]."""
    orders = tables.orders
    query = select(*(orders.c[name] for name in _KEY)).where(and_(true(), *wanted)).limit(limit)
    if status is not None:
        query = query.where(orders.c.status == any_(literal([status], ARRAY(Text)))).order_by(orders.c.status)
    return query.order_by(*(column.desc() for column in order_of(orders)))


@cache
def _orders_by_keys() -> Select[Any]:
    """Return the query of rows of ``order_book`` by arrays of keys, in the order of the keys, with ``newest``."""
    book = tables.order_book
    # As texts, which the driver passes on as they are; it would write a list value by value.
    arrays = (cast(bindparam(name, type_=Text()), ARRAY(book.c[name].type)) for name in _KEY)
    keys = func.unnest(*arrays).table_valued(*_KEY, with_ordinality="place").render_derived(name="keys")
    same = and_(*(book.c[name] == keys.c[name] for name in _KEY))
    # The offset keeps each to a look-up of its own.
    of_each = select(book, _epoch(NEWEST)).where(same).offset(0).lateral("found")
    return select(of_each).select_from(keys.join(of_each, true())).order_by(keys.c.place)


def created_within(table: Table, since: datetime | None, before: datetime | None) -> list[ColumnElement[bool]]:
    """Return the conditions that rows of *table* were created from *since* on, and before *before*; None is any."""
    # Both columns, since the index by which a list pages has no null.
    moments: tuple[ColumnElement[Any], ...] = (table.c.created, NEWEST)
    found: list[ColumnElement[bool]] = [] if since is None else [moment >= since for moment in moments]
    return found if before is None else [*found, *(moment < before for moment in moments)]


def has_email(column: ColumnElement[Any], email: "str | BindParameter[str]") -> ColumnElement[bool]:
    """Return the condition that *column* has *email*, in any case, as its index finds it."""
    return func.lower(column) == func.lower(email)


def in_world(table: Table, *, account: str | None, livemode: bool | None) -> list[ColumnElement[bool]]:
    """Return the conditions that its key finds the rows of *table* of *account* and *livemode* by; None is any."""
    asked: dict[str, object] = {"account": account, "livemode": livemode}
    return [_OF_ANY[name](table) if value is None else table.c[name] == value for name, value in asked.items()]


@cache
def _indexed(table: Table) -> frozenset[str]:
    """Return the columns of *table* by which an index finds rows once account and mode are known."""
    keys: list[Iterable[object]] = [table.primary_key.columns, *(index.expressions for index in table.indexes)]
    leads = [[part.name for part in key if isinstance(part, Column)] for key in keys]
    return frozenset(column for names in leads if names[:2] == ["account", "livemode"] for column in names[2:3])


@cache
def _accounts(table: Table) -> FromClause:
    """Return the accounts in *table*, by reading one index entry for each."""
    keys = _KEYS.get(table.name, table)
    # A statement may look into several tables, and into one of them several times.
    name = f"accounts_of_{table.name}"
    accounts = select(func.min(keys.c.account).label("account")).cte(name, recursive=True)
    following = select(func.min(keys.c.account)).where(keys.c.account > accounts.c.account).scalar_subquery()
    return accounts.union_all(select(following).where(accounts.c.account.is_not(None)))


def _of_any_account(table: Table) -> ColumnElement[bool]:
    accounts = _accounts(table)
    return table.c.account == any_(func.array(select(accounts.c.account).scalar_subquery()))


def _of_any_mode(table: Table) -> ColumnElement[bool]:
    return table.c.livemode == any_(literal([True, False], ARRAY(Boolean)))


_OF_ANY: Final = {"account": _of_any_account, "livemode": _of_any_mode}
