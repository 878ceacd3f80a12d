"""Connections to PostgreSQL: every wait is bounded, and a connection in an unknown state is not reused."""

import os
import threading
import time
from contextlib import ExitStack, closing
from typing import Any, Final

import psycopg
import pytest
from sqlalchemy import Connection, Engine, Select, bindparam, column, event, select, text
from sqlalchemy.exc import NotSupportedError

from schemas import background, database
from schemas.database import Bounds
from schemas.errors import DatabaseAway
from tests.faults import Proxy
from tests.waiting import until

SOON = Bounds(statement=20, lock=20, whole=0.5)


def pid(engine: Engine) -> int:
    """Return the process id of the session of the engine's next transaction."""
    with database.transaction(engine) as connection:
        found: int = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        return found


def test_a_silent_connection_is_ended(database_url: str) -> None:
    """A thread that waits for a silent connection gets an error within the bounds, and the next transaction works."""
    with closing(Proxy(database_url)) as way:
        engine = database.engine(way.url, connections_max=1)
        with pytest.raises(DatabaseAway), database.transaction(engine, SOON) as connection:
            _silence_and_ask(way, connection)

        with database.transaction(engine, SOON) as connection:
            assert connection.execute(text("SELECT 3")).scalar_one() == 3
        engine.dispose()


def _silence_and_ask(way: Proxy, connection: Connection) -> None:
    connection.execute(text("SELECT 1"))
    way.fall_silent()
    connection.execute(text("SELECT 2"))


def test_a_silent_connection_in_the_pool_is_found_out(database_url: str) -> None:
    """A connection that fell silent in the pool is tested before use, and replaced."""
    with closing(Proxy(database_url)) as way:
        engine = database.engine(way.url, connections_max=1)
        before = pid(engine)
        way.fall_silent()
        with engine.connect() as connection:
            connection.info["used_at"] = time.monotonic() - 3_600

        assert pid(engine) != before
        engine.dispose()


def test_a_pool_of_silent_connections(database_url: str) -> None:
    """A pool of silent connections costs one wait, and not one for each connection."""
    with closing(Proxy(database_url)) as way, ExitStack() as held:
        engine = database.engine(way.url, connections_max=4)
        for connection in [held.enter_context(engine.connect()) for _ in range(4)]:
            connection.execute(text("SELECT 1"))
            connection.info["used_at"] = time.monotonic() - 3_600
        held.close()
        way.fall_silent()

        began = time.monotonic()
        pid(engine)
        assert time.monotonic() - began < 3 * database.PING_SECONDS_MAX
        engine.dispose()


def test_a_connection_that_falls_silent_once_it_is_made(database_url: str) -> None:
    """A server that lets a client in and answers nothing then is waited for within bounds, as any other is."""
    with closing(Proxy(database_url)) as way:
        way.silences_once_ready = True
        engine = database.engine(way.url, connections_max=1)
        with pytest.raises(DatabaseAway), database.transaction(engine, SOON):
            pass
        engine.dispose()


def test_a_new_connection_may_be_used_for_long(database_url: str) -> None:
    """Only what is done on connecting is bounded, and not what its first user does, however he came by it."""
    engine = database.engine(database_url, connections_max=1)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        assert database.shut_down_connections() == 0
        assert connection.execute(text("SELECT 2")).scalar_one() == 2
    engine.dispose()


READ: Final[Select[Any]] = select(column("n")).select_from(text("numbers")).where(column("n") == bindparam("wanted"))


def _statements_prepared(engine: Engine) -> int:
    with database.transaction(engine) as connection:
        for wanted in (1, 2):
            assert database.by_key(connection, READ, {"wanted": wanted}).scalars().all() == [wanted]
        with database.cursor(connection) as cursor:
            for _ in range(2 * database.PREPARE_AFTER):
                cursor.execute("SELECT n FROM numbers WHERE n = %s", (1,))
        found: int = connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one()
        return found


def test_statements_are_prepared_only_without_a_pooler(database_url: str) -> None:
    """A prepared statement is the session's, so there is none behind a pooler, which deals sessions out."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE numbers AS SELECT n FROM generate_series(1, 9) AS n")
    with closing(Proxy(database_url)) as way:
        direct = database.engine(way.url, connections_max=1)
        by_key_only = database.engine(way.url, connections_max=1, prepare_after=database.NEVER)

        assert _statements_prepared(direct) == 2
        assert _statements_prepared(by_key_only) == 1

        way.makes_up_backends = True
        pooled = database.engine(way.url, connections_max=1)
        assert _statements_prepared(pooled) == 0
        for engine in (direct, by_key_only, pooled):
            engine.dispose()


def _generic_plans_and_settings(engine: Engine) -> tuple[list[int], list[str]]:
    """Read twice in a transaction by keys; return how often each plan for all values was used, and the settings."""
    sent: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def seen(_: object, __: object, statement: str, *more: object) -> None:
        sent.append(statement)

    with database.transaction(engine, SOON, by_keys=True) as connection:
        for wanted in (1, 2):
            assert database.by_key(connection, READ, {"wanted": wanted}).scalars().all() == [wanted]
        plans = list(connection.execute(text("SELECT generic_plans FROM pg_prepared_statements")).scalars())
    return plans, [statement for statement in sent if statement.startswith("SET")]


def test_a_transaction_by_keys_sets_its_plan_once(database_url: str) -> None:
    """The plan for all values is asked for together with the bounds, and only where statements are prepared."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE numbers AS SELECT n FROM generate_series(1, 9) AS n")
    with closing(Proxy(database_url)) as way:
        direct = database.engine(way.url, connections_max=1)
        plans, set_directly = _generic_plans_and_settings(direct)
        way.makes_up_backends = True
        pooled = database.engine(way.url, connections_max=1)
        no_plans, set_by_pooler = _generic_plans_and_settings(pooled)
        for engine in (direct, pooled):
            engine.dispose()

    assert (plans, no_plans) == ([2], [])
    assert [statement.count("plan_cache_mode") for statement in set_directly] == [1]
    assert [statement.count("plan_cache_mode") for statement in set_by_pooler] == [0]


def test_statements_without_parameters_are_not_prepared(database_url: str) -> None:
    """Several statements at once, as those that bound a transaction, cannot be prepared, however often they come."""
    engine = database.engine(database_url, connections_max=1)
    for _ in range(2 * database.PREPARE_AFTER):
        with database.transaction(engine, SOON) as connection, database.cursor(connection) as cursor:
            cursor.execute("SELECT 1; SELECT 2")
            prepared = connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one()

    assert prepared == 0
    engine.dispose()


def test_a_prepared_statement_whose_result_changes(database_url: str) -> None:
    """After a change of the schema, a prepared statement of another shape fails once, and then works."""
    engine = database.engine(database_url, connections_max=1)
    everything: Select[Any] = select(text("*")).select_from(text("numbers")).where(column("n") == bindparam("n"))
    with psycopg.connect(database_url, autocommit=True) as other:
        other.execute("CREATE TABLE numbers AS SELECT 1 AS n")
        with database.transaction(engine) as connection:
            assert [*map(tuple, database.by_key(connection, everything, {"n": 1}))] == [(1,)]
        other.execute("ALTER TABLE numbers ADD m integer DEFAULT 2")

        with pytest.raises(NotSupportedError), database.transaction(engine) as connection:
            database.by_key(connection, everything, {"n": 1})
        with database.transaction(engine) as connection:
            assert [*map(tuple, database.by_key(connection, everything, {"n": 1}))] == [(1, 2)]
    engine.dispose()


def test_all_connections_of_a_process_that_ends(database_url: str) -> None:
    """`shut_down_connections` ends every wait, also of a transaction without bounds."""
    with closing(Proxy(database_url)) as way:
        engine = database.engine(way.url, connections_max=2)
        faults: list[Exception] = []
        waiting = threading.Barrier(3)

        def wait_for_ever() -> None:
            try:
                with database.transaction(engine) as connection:
                    connection.execute(text("SELECT 1"))
                    waiting.wait()
                    connection.execute(text("SELECT pg_sleep(600)"))
            except DatabaseAway as fault:
                faults.append(fault)

        threads = [threading.Thread(target=wait_for_ever) for _ in range(2)]
        for each in threads:
            each.start()
        waiting.wait()

        assert database.shut_down_connections() == 2
        for each in threads:
            each.join(timeout=30)
        assert len(faults) == 2
        engine.dispose()


def test_a_statement_and_a_lock_are_bounded(engine: Engine, database_url: str) -> None:
    """PostgreSQL itself ends a statement, or a wait for a lock, that takes longer than the bounds."""
    with (
        pytest.raises(Exception, match="statement timeout"),
        database.transaction(engine, Bounds(statement=0.1, lock=10, whole=30)) as connection,
    ):
        connection.execute(text("SELECT pg_sleep(60)"))
    with psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE orders")
        with (
            pytest.raises(Exception, match="lock timeout"),
            database.transaction(engine, Bounds(statement=20, lock=0.1, whole=30)) as connection,
        ):
            connection.execute(text("LOCK TABLE orders"))


@pytest.mark.parametrize(
    ("statement", "is_kept"),
    [
        ("SELECT 1 / 0", True),
        ("INSERT INTO pending (seq) VALUES (1), (1)", True),
        ("SELECT repeat('x', 2000000000)", True),
        ("SELECT nonsense", False),
        ("LOCK TABLE pg_authid", False),
        ("SET LOCAL transaction_read_only = on; DELETE FROM pending", False),
        ("SET LOCAL statement_timeout = 10; SELECT pg_sleep(60)", False),
    ],
)
def test_a_connection_in_doubt_is_thrown_away(engine: Engine, statement: str, *, is_kept: bool) -> None:
    """After an error about the data a connection stays in the pool; after any other error it is closed."""
    before = pid(engine)
    with pytest.raises(Exception, match=r"."), database.transaction(engine) as connection:
        connection.exec_driver_sql(statement)

    assert (pid(engine) == before) is is_kept


def raising(state: str) -> str:
    """Return a statement that fails with a SQLSTATE."""
    return f"DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$"


def test_obstacles(engine: Engine) -> None:
    """Each reason for which PostgreSQL refuses work has a code, by which programs distinguish them."""
    words = {
        "SET LOCAL transaction_read_only = on; DELETE FROM pending": "read_only",
        "SET LOCAL statement_timeout = 10; SELECT pg_sleep(60)": "slow",
        "SELECT nonsense": "refused",
        # https://www.postgresql.org/docs/current/errcodes-appendix.html
        raising("55P03"): "locked",
        raising("53100"): "full",
        raising("53200"): "exhausted",
        raising("53300"): "exhausted",
        raising("57P03"): "away",
    }
    for statement, word in words.items():
        with pytest.raises(Exception, match=r".") as raised, engine.begin() as connection:
            connection.exec_driver_sql(statement)
        assert (statement, database.obstacle(raised.value)) == (statement, word)
    assert [database.obstacle(error) for error in (TimeoutError(), ValueError())] == ["silent", "failed"]


def test_a_pool_that_is_in_use(database_url: str) -> None:
    """If every connection is in use for too long, the error names the pool."""
    engine = database.engine(database_url, connections_max=1, pool_seconds_max=0.05)
    with database.transaction(engine), pytest.raises(DatabaseAway, match="in use"), database.transaction(engine):
        pytest.fail("there is one connection")
    engine.dispose()


def test_a_fork_leaves_its_parents_connections_alone(database_url: str) -> None:
    """A forked process watches only its own connections, and ends none of its parent's."""
    engine = database.engine(database_url)
    with database.transaction(engine) as connection:
        child = os.fork()
        if child == 0:
            os._exit(database.shut_down_connections())
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert connection.execute(text("SELECT 1")).scalar_one() == 1
    engine.dispose()


def test_a_thread_that_fails_goes_on() -> None:
    """A background thread that raises is restarted until it returns."""
    runs: list[int] = []

    def work() -> None:
        runs.append(len(runs))
        if len(runs) < 3:
            raise ValueError("something unforeseen")

    thread = background.start("a test", work, restart_seconds=0.01)
    until(lambda: not thread.is_alive())
    assert runs == [0, 1, 2]
