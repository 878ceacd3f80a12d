"""The door to PostgreSQL.

Nothing here needs a session's state: no session settings, no LISTEN, and prepared statements only where there is no
pooler, so that a pooler in transaction mode may stand between.

Note [Statements are prepared where PostgreSQL itself answers]
    Planning the long statements anew takes a fifth of what PostgreSQL does for a fold, and nine tenths of what it does
    to show an order. A prepared statement belongs to a session, and a pooler deals out sessions by the transaction. On
    connecting, PostgreSQL sends the number of the process that serves the session. A pooler has to make one up, since
    it has no session yet. So statements are prepared where that number is the one that the session itself reports. A
    plan is made again by PostgreSQL after a change of the schema; if a result changes its shape, the statement fails
    once, and its connection is thrown away.

Note [A silent connection is ended from outside]
    After a failover, behind a NAT that forgets or a pooler that hangs, bytes stop and no socket closes. TCP's own
    timeouts do not see a peer that still acknowledges, and no statement timeout runs where no statement arrives. So a
    transaction may have a deadline, and a thread of this process shuts down the socket of one that is overdue: the
    thread that waits for it gets an error, and the connection is thrown away.

Note [A connection in doubt is thrown away]
    A session that was opened while the server was read-only may stay so, and one with a canceled statement may be about
    to be. Only an error that judges the data leaves its connection in the pool.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, LiteralString, NamedTuple, Protocol, Self

import msgspec
import psycopg
from psycopg.abc import Params
from psycopg.types.json import set_json_dumps, set_json_loads

from schemas import background
from schemas.errors import DatabaseAway
from schemas.lines import log

if TYPE_CHECKING:
    from sqlalchemy import Connection, CursorResult, Engine, Select
    from sqlalchemy.engine.interfaces import ExecutionContext
    from sqlalchemy.pool import ConnectionPoolEntry

CONNECT_SECONDS_MAX: Final = 5
POOL_SECONDS_MAX: Final = 10
"""A thread waits this long for one of the engine's connections."""
PING_SECONDS_MAX: Final = 3.0
FRESH_SECONDS: Final = 1.0
"""A connection that was used within this is not asked whether it is still there."""
WATCH_SECONDS: Final = 0.5
WATCH: Final = "database-watch"
"""The name of the thread that shuts down connections that are overdue."""
PREPARE_AFTER: Final = 4
NEVER: Final = 2**31
"""For ``prepare_after``: only ``by_key`` prepares, since one plan for all values of a filter is bad for some."""
_PREPARED: Final = "payfold_prepared"
_BY_KEYS: Final = "payfold_by_keys"
# Else PostgreSQL plans for each value, since it takes the plan for all values to cost more than planning does. The one
# plan may be of a time when the tables were empty, so it must not scan them. Before release 18 PostgreSQL shuns a scan
# by its estimated cost, and what looks dear it would compile first (jit).
ONE_PLAN: Final = "SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL enable_seqscan = off; SET LOCAL jit = off"
"""For a transaction that finds rows by their keys: each statement has one plan, by indexes where there are any."""
_NEW: Final = "payfold_new"
BACKEND: Final = "SELECT pg_backend_pid()"
# A peer that is gone is found out after 25 seconds without a byte.
_KEEPALIVE: Final = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}

Cursor = psycopg.Cursor[tuple[Any, ...]]
DriverError = psycopg.Error
Driver = psycopg.Connection[Any]

set_json_dumps(msgspec.json.encode)
set_json_loads(msgspec.json.decode)


class Bounds(NamedTuple):
    """How many seconds one statement, one wait for a lock, and the whole transaction may take."""

    statement: float
    lock: float
    whole: float


BATCH: Final = Bounds(statement=10, lock=5, whole=20)
"""Of a transaction in a process that runs for good: less than the 30 seconds it has to stop."""


def sqlalchemy_url(database_url: str) -> str:
    """Return *database_url*, in any of PostgreSQL's spellings, as SQLAlchemy wants it."""
    return f"postgresql+psycopg://{database_url.split('://', 1)[1]}"


def connect_options() -> dict[str, Any]:
    """Return how to connect, for the driver: bounded in time, and without a session's state."""
    return {"prepare_threshold": None, "connect_timeout": CONNECT_SECONDS_MAX, **_KEEPALIVE}


def engine(
    database_url: str,
    *,
    connections_max: int = 5,
    pool_seconds_max: float = POOL_SECONDS_MAX,
    prepare_after: int = PREPARE_AFTER,
) -> "Engine":
    """Return an engine for *database_url* that never shows a statement's parameters in an error.

    A connection prepares a statement after it was executed *prepare_after* times, or at once by ``by_key``: see Note
    [Statements are prepared where PostgreSQL itself answers].
    """
    from sqlalchemy import create_engine, event

    def begin(driver: Driver, record: "ConnectionPoolEntry") -> None:
        # SQLAlchemy asks for some settings on the first connection, so the watch ends where it is handed out.
        record.info[_NEW] = (_watch, _watch.begin(driver, CONNECT_SECONDS_MAX))
        driver.prepare_threshold = prepare_after if is_direct(driver) else None
        driver.cursor_factory = _Cursor
        driver.rollback()

    def handed_out(_: object, record: "ConnectionPoolEntry", __: object) -> None:
        if new := record.info.pop(_NEW, None):
            watch, key = new
            watch.end(key)

    made = create_engine(
        sqlalchemy_url(database_url),
        pool_size=connections_max,
        max_overflow=0,
        pool_timeout=pool_seconds_max,
        hide_parameters=True,
        json_serializer=lambda value: msgspec.json.encode(value).decode(),
        json_deserializer=msgspec.json.decode,
        connect_args=connect_options(),
    )
    event.listen(made, "connect", begin, insert=True)
    event.listen(made, "checkout", handed_out)
    event.listen(made, "do_execute", _execute)
    return made


class _Cursor(psycopg.Cursor[Any]):
    """Prepares no statement without parameters.

    Such a statement may be several, which cannot be prepared, and holds no snapshot once it is done, which some need.
    """

    def execute(
        self,
        query: Any,  # noqa: ANN401 - of any kind that the driver takes
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        binary: bool | None = None,
    ) -> Self:
        return super().execute(query, params, prepare=prepare if params else False, binary=binary)


def is_direct(driver: Driver) -> bool:
    """Return whether PostgreSQL itself is at the other end, and not a pooler."""
    return driver.execute(BACKEND).fetchone() == (driver.info.backend_pid,)


def by_key(connection: "Connection", query: "Select[Any]", given: Mapping[str, Any]) -> "CursorResult[Any]":
    """Execute *query*, which finds rows by their keys alone, by one plan for all values."""
    if driver_of(connection).prepare_threshold is not None and _BY_KEYS not in connection.get_execution_options():
        connection.exec_driver_sql(ONE_PLAN)
    return connection.execute(query, given, execution_options={_PREPARED: True})


async def prepare_where_direct(connection: psycopg.AsyncConnection[Any]) -> None:
    """Let asyncio's *connection* prepare its statements if PostgreSQL itself is at the other end."""
    pid = await (await connection.execute(BACKEND)).fetchone()
    if pid == (connection.info.backend_pid,):
        connection.prepare_threshold = PREPARE_AFTER


def _execute(cursor: Cursor, statement: LiteralString, parameters: Any, context: "ExecutionContext") -> bool:  # noqa: ANN401 - the driver's own
    """Execute a statement that is to be prepared at once, and return whether it was one."""
    if _PREPARED not in context.execution_options:
        return False
    cursor.execute(statement, parameters, prepare=True)
    return True


@contextmanager
def transaction(
    of: "Engine", bounds: Bounds | None = None, *, may_idle: bool = False, by_keys: bool = False
) -> "Iterator[Connection]":
    """Open one transaction, committed at the end and rolled back on an error.

    With *bounds* PostgreSQL ends a statement or a transaction that takes too long; if PostgreSQL is silent, this
    process ends it. With *may_idle* PostgreSQL does not end the transaction for waiting on us, as hosts configure it
    to do. That is for the few transactions that keep one snapshot while other work goes on. *by_keys* is whether all
    its queries find rows by their keys alone: ``by_key`` then sets nothing more.

    Raises:
        DatabaseAway: when PostgreSQL does not answer, goes away during the transaction, or takes no writes.
    """
    try:
        with _connected(of) as connection, _watched(connection, None if bounds is None else bounds.whole):
            try:
                with connection.begin():
                    wanted = [] if bounds is None else [_limits(bounds)]
                    if may_idle:
                        wanted.append("SET LOCAL idle_in_transaction_session_timeout = 0")
                    if by_keys:
                        connection.execution_options(**{_BY_KEYS: True})
                        wanted += [ONE_PLAN] if driver_of(connection).prepare_threshold is not None else []
                    if wanted:
                        connection.exec_driver_sql("; ".join(wanted))
                    yield connection
            except refusals() as error:
                if not is_fault_of_data(error):
                    connection.invalidate()
                raise
    except refusals() as error:
        if is_away(error):
            raise DatabaseAway from error
        raise
    except _exhaustion() as error:
        raise DatabaseAway("Every connection to PostgreSQL is in use: try again.") from error


def _limits(bounds: Bounds) -> str:
    return (
        f"SET LOCAL statement_timeout = {round(bounds.statement * 1000)};"
        f" SET LOCAL lock_timeout = {round(bounds.lock * 1000)}"
    )


def refusals() -> tuple[type[Exception], ...]:
    """Return the kinds of error in which PostgreSQL's own arrive: SQLAlchemy's, and the driver's."""
    from sqlalchemy.exc import DBAPIError

    return (DBAPIError, DriverError)


def _exhaustion() -> type[Exception]:
    from sqlalchemy.exc import TimeoutError as NoConnectionLeft

    return NoConnectionLeft


@contextmanager
def reading(libpq_url: str, bounds: Bounds | None = None) -> Iterator[Driver]:
    """Open a connection by the driver alone, and one transaction in it, for a command that reads a little.

    SQLAlchemy takes as long to load as all the rest of such a command.

    Raises:
        DatabaseAway: when PostgreSQL does not answer, or goes away during the transaction.
    """
    try:
        with (
            psycopg.connect(libpq_url, **connect_options()) as driver,
            _watching(driver, None if bounds is None else bounds.whole),
        ):
            if bounds is not None:
                driver.execute(_limits(bounds))
            yield driver
    except DriverError as error:
        if is_away(error):
            raise DatabaseAway from error
        raise


@contextmanager
def _connected(of: "Engine") -> "Iterator[Connection]":
    """Yield a connection that was there a moment ago."""
    while True:
        with of.connect() as connection:
            if not _is_alive(connection):
                # The other idle connections are as old: only one silent connection is waited for, and not each in turn.
                connection.invalidate()
                of.dispose()
                continue
            try:
                yield connection
            finally:
                if not connection.invalidated:
                    connection.info["used_at"] = time.monotonic()
            return


def _is_alive(connection: "Connection") -> bool:
    """Return whether a connection answers. Only one that was not used for a while is asked; a new one just answered."""
    used_at = connection.info.setdefault("used_at", time.monotonic())
    if time.monotonic() - used_at < FRESH_SECONDS:
        return True
    try:
        with _watched(connection, PING_SECONDS_MAX):
            return connection.dialect.do_ping(connection.connection.dbapi_connection)  # type: ignore[arg-type]  # it has one
    except refusals():
        return False


class _Watch:
    """The connections that are in use, and a thread that shuts down the overdue ones.

    The thread does its work only while it holds ``at_work``, so a fork that holds it finds the thread at rest.
    """

    def __init__(self) -> None:
        self.at_work = threading.Lock()
        self._lock = threading.Lock()
        self._open: dict[object, tuple[Driver, float | None]] = {}
        self._thread: threading.Thread | None = None

    def begin(self, driver: Driver, seconds_max: float | None) -> object:
        key = object()
        with self._lock:
            self._open[key] = (driver, None if seconds_max is None else time.monotonic() + seconds_max)
            if self._thread is None and seconds_max is not None:
                self._thread = background.start(WATCH, self._run)
        return key

    def end(self, key: object) -> None:
        with self._lock:
            self._open.pop(key, None)

    def shut_down_all(self) -> int:
        with self._lock:
            for driver, _ in self._open.values():
                _shut_down(driver)
            return len(self._open)

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(WATCH_SECONDS):
            with self.at_work:
                self._shut_down_overdue()

    def _shut_down_overdue(self) -> None:
        now = time.monotonic()
        with self._lock:
            overdue = [key for key, (_, due) in self._open.items() if due is not None and due < now]
            for key in overdue:
                driver, _ = self._open[key]
                _shut_down(driver)
                del self._open[key]  # once is enough
        if overdue:
            log.error("database.silent", connections=len(overdue))


def _shut_down(driver: Driver) -> None:
    """End both directions of the connection's socket."""
    with suppress(OSError, DriverError), socket.socket(fileno=os.dup(driver.pgconn.socket)) as ours:
        ours.shutdown(socket.SHUT_RDWR)


_watch = _Watch()


def _watch_anew() -> None:
    global _watch  # noqa: PLW0603 - a forked process has none of its parent's threads, and must leave its sockets alone
    _watch = _Watch()


def _rest() -> None:
    _watch.at_work.acquire()


def _go_on() -> None:
    _watch.at_work.release()


os.register_at_fork(before=_rest, after_in_parent=_go_on, after_in_child=_watch_anew)


def may_fork() -> bool:
    """Return whether this process may fork: no thread holds a lock meanwhile that the child would wait for.

    Of other threads than this one it may have the watch alone, which a fork finds at rest. Outside Linux the system's
    own libraries may have threads.
    """
    names = {thread.name for thread in threading.enumerate()}
    return sys.platform == "linux" and names <= {threading.current_thread().name, WATCH}


def shut_down_connections() -> int:
    """Shut down the socket of every connection that is in a transaction here, and return how many those are.

    A thread that waits for one gets ``DatabaseAway``: for a process that has to end.
    """
    return _watch.shut_down_all()


def driver_of(connection: "Connection") -> Driver:
    """Return the driver's own connection, in the same transaction."""
    return connection.connection.driver_connection  # type: ignore[return-value]  # the pool does not know the driver's type


def _watched(connection: "Connection", seconds_max: float | None) -> AbstractContextManager[None]:
    return _watching(driver_of(connection), seconds_max)


@contextmanager
def _watching(driver: Driver, seconds_max: float | None) -> Iterator[None]:
    watch = _watch
    key = watch.begin(driver, seconds_max)
    try:
        yield
    finally:
        watch.end(key)


def _cause(error: BaseException) -> BaseException | None:
    # SQLAlchemy keeps the driver's error so.
    return getattr(error, "orig", error)


# A server that is starting, stopping, standing by, full of connections, or out of reach; and one that takes no writes.
_STATES_OF_AWAY: Final = ("08", "25006", "53300", "57P01", "57P02", "57P03", "57P05")


def is_away(error: BaseException) -> bool:
    """Return whether the server is gone or takes no writes, rather than the work being wrong."""
    cause = _cause(error)
    if not isinstance(cause, psycopg.Error):
        return False
    if cause.sqlstate is not None:
        return cause.sqlstate.startswith(_STATES_OF_AWAY)
    is_lost: bool = getattr(error, "connection_invalidated", False)
    return is_lost or isinstance(cause, (psycopg.OperationalError, psycopg.InterfaceError))


# Classes of SQLSTATE that judge the data: data exception, integrity violation, limit exceeded.
_CLASSES_OF_DATA: Final = ("22", "23", "54")


def is_fault_of_data(error: BaseException) -> bool:
    """Return whether the same data would fail again.

    What the driver refuses to send has no SQLSTATE, and is the data's fault where the connection is good.
    """
    cause = _cause(error)
    if not isinstance(cause, psycopg.Error):
        return False
    if cause.sqlstate is not None:
        return cause.sqlstate.startswith(_CLASSES_OF_DATA)
    return not is_away(error)


# Other work is in the way: a lock or a statement timed out, transactions collided, or the server lacks a resource.
_STATES_OF_BUSY: Final = ("40", "53", "55", "57")


def is_busy(error: BaseException) -> bool:
    """Return whether PostgreSQL could not do the work now, rather than not at all."""
    cause = _cause(error)
    return isinstance(cause, psycopg.Error) and (cause.sqlstate or "").startswith(_STATES_OF_BUSY)


LOCKS_MORE: Final = "PostgreSQL's lock table is full: raise max_locks_per_transaction and restart PostgreSQL"


def is_short_of_locks(error: BaseException) -> bool:
    """Return whether PostgreSQL's lock table is full. Only the hint shows that, by a name that is not translated."""
    cause = _cause(error)
    is_memory = isinstance(cause, psycopg.Error) and cause.sqlstate == "53200"
    return is_memory and "max_locks_per_transaction" in (cause.diag.message_hint or "")  # type: ignore[union-attr]  # it is one


def condition(error: BaseException) -> str:
    """Return PostgreSQL's name for what went wrong; its message could quote the data."""
    return type(_cause(error)).__name__


def first_line(error: BaseException | None) -> str:
    """Return the first line of *error*'s message; the lines after it may quote data."""
    return str(None if error is None else _cause(error)).strip().partition("\n")[0]


# By SQLSTATE or the beginning of one; the first that fits.
_OBSTACLES: Final = {
    "25006": "read_only",
    "55P03": "locked",
    "53100": "full",
    "57014": "slow",
    "53": "exhausted",
}


SPEECHLESS: Final = ("away", "silent")
"""With these obstacles PostgreSQL answers no other statement either."""


def obstacle(error: BaseException) -> str:
    """Return in a word why PostgreSQL did not do the work.

    One of silent, read_only, locked, full, slow, exhausted, away, refused, or failed where it was not PostgreSQL.
    """
    if isinstance(error, TimeoutError):
        return "silent"
    cause = _cause(error)
    if not isinstance(cause, psycopg.Error):
        return "failed"
    state = cause.sqlstate or ""
    named = next((word for begin, word in _OBSTACLES.items() if state.startswith(begin)), None)
    return named or ("away" if is_away(error) else "refused")


def text_array(values: Sequence[str]) -> str:
    """Return *values* as PostgreSQL writes a text[]: the driver's own way takes ten times as long."""
    joined = '","'.join(values)
    if "\\" in joined or joined.count('"') != 2 * max(len(values) - 1, 0):
        joined = '","'.join(value.replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return f'{{"{joined}"}}' if values else "{}"


def integer_array(values: Iterable[int]) -> str:
    """Return *values* as PostgreSQL writes a bigint[]."""
    return f"{{{','.join(map(str, values))}}}"


def boolean_array(values: Iterable[bool]) -> str:
    """Return *values* as PostgreSQL writes a boolean[]."""
    return f"{{{','.join('t' if value else 'f' for value in values)}}}"


def take_snapshot(cursor: "Cursor", *, read_only: bool = True) -> None:
    """Let the transaction of *cursor*, which has read nothing yet, see the database as it is at one moment."""
    cursor.execute(f"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ{' READ ONLY' if read_only else ''}")


class InWorld(Protocol):
    """Anything that belongs to an account and a mode."""

    @property
    def account(self) -> str: ...  # noqa: D102 - described by its class
    @property
    def livemode(self) -> bool: ...  # noqa: D102 - described by its class


class Named(InWorld, Protocol):
    """Anything that has an id in an account and a mode."""

    @property
    def id(self) -> str: ...  # noqa: D102 - described by its class


def world_arrays(keys: Collection[InWorld]) -> tuple[str, str]:
    """Return the accounts and modes of *keys*, an array each."""
    return text_array([key.account for key in keys]), boolean_array(key.livemode for key in keys)


def id_arrays(keys: Collection[Named]) -> tuple[str, str, str]:
    """Return the accounts, modes and ids of *keys*, an array each."""
    return *world_arrays(keys), text_array([key.id for key in keys])


@contextmanager
def cursor(connection: "Connection") -> Iterator[Cursor]:
    """Return the driver's own cursor within *connection*'s transaction, for the hot paths."""
    with driver_of(connection).cursor() as opened:
        yield opened
