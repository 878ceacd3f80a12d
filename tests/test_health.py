"""The health routes report whether the process runs, and whether it can record deliveries."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from typing import LiteralString
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from api.app import DATABASE_CONNECTIONS_MAX
from deploy.local.postgres import Postgres
from deploy.local.services import Services
from deploy.local.valkey import Valkey
from schemas.migrate import upgrade
from tests.faults import Proxy, paused
from tests.test_recorder import held
from tests.waiting import WAITS_FOR_A_LOCK, until
from tests.web import READER, TOKENS, Raw, Web, event, serving, settings_of

WELL = {"ready": True, "database": "ok", "migrations": "ok", "broker": "ok", "stripe": "no key"}
UNKNOWN = {"migrations": "unknown", "workers": "unknown", "clock": "unknown"}
"""The other values of the health where PostgreSQL does not answer."""
ANSWER_SECONDS_MAX = 5.0
"""An answer is promised within two seconds; the rest is for a busy machine. An unbounded answer takes 10 or more."""
READS = 120
FULL = """
    CREATE FUNCTION disk_is_full() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE SQLSTATE '53100' USING MESSAGE = 'could not extend file: No space left on device'; END $$;
"""


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


def ready(web: Web) -> httpx.Response:
    """Ask whether *web* is ready; fails where the answer takes too long."""
    return web.client.get("/health/ready", timeout=ANSWER_SECONDS_MAX)


def becomes(web: Web, **health: object) -> float:
    """Return the seconds until the health at *web* is WELL but for *health*; the process stays alive throughout."""
    began_at = time.monotonic()
    wanted = WELL | health

    def is_so() -> bool:
        answer = ready(web)
        assert answer.status_code == (200 if answer.json()["ready"] else 503)
        assert web.client.get("/health/live", timeout=ANSWER_SECONDS_MAX).status_code == 200
        return bool(wanted.items() <= answer.json().items())

    until(is_so)
    return time.monotonic() - began_at


def test_ready(web: Web) -> None:
    """With PostgreSQL and Redis up the process is alive and ready, and its trial recordings leave no row."""
    assert web.get("/health/live", {}).json() == {"status": "alive"}
    becomes(web)
    assert [web.client.head(f"/health/{which}").status_code for which in ("live", "ready")] == [200, 200]
    assert web.query(
        "SELECT (SELECT count(*) FROM inbox), (SELECT count(*) FROM pending), last_value FROM inbox_seq_seq"
    ) == [(0, 0, 1)]


@pytest.mark.parametrize("undo", ["DROP TABLE alembic_version", "DELETE FROM alembic_version"])
def test_behind(web: Web, undo: str) -> None:
    """With a schema that is behind the process is not ready, even if the schema was current at the last check."""
    becomes(web)
    with psycopg.connect(web.settings.libpq) as connection:
        connection.execute(undo.encode())

    becomes(web, ready=False, migrations="pending")


def test_ahead(web: Web) -> None:
    """After a newer release has migrated the schema, the older process stays ready until it is replaced."""
    web.query("UPDATE alembic_version SET version_num = '9999'")

    becomes(web)


def test_one_try_for_all(web: Web) -> None:
    """However many clients ask at once, a trial recording runs at most once a second."""
    web.query("CREATE SEQUENCE tries")
    web.query("ALTER TABLE inbox ADD CONSTRAINT counted CHECK (nextval('tries') > 0)")
    began_at = time.monotonic()
    with ThreadPoolExecutor(20) as asking:
        assert len(list(asking.map(lambda _: ready(web), range(200)))) == 200
    seconds = time.monotonic() - began_at

    ((tries,),) = web.query("SELECT last_value FROM tries")
    assert 1 <= tries <= seconds + 1


def test_busy_reads(web: Web) -> None:
    """While slow reads occupy every thread, the process stays alive and ready."""
    with psycopg.connect(web.settings.libpq) as blocker:
        blocker.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
        reads = [blocked_read(web) for _ in range(READS)]
        until(lambda: len(web.query(WAITS_FOR_A_LOCK)) >= DATABASE_CONNECTIONS_MAX)

        becomes(web)
        for path in ("/health/live", "/v1/status", "/metrics"):
            assert web.client.get(path, headers=READER, timeout=ANSWER_SECONDS_MAX).status_code == 200
        for read in reads:
            read.connection.close()
        blocker.rollback()


def blocked_read(web: Web) -> Raw:
    """Request a locked row, and do not wait for the answer."""
    token = f"Authorization: Bearer {TOKENS['read']}"
    return web.send_raw(f"GET /v1/orders HTTP/1.1\r\nHost: payfold\r\n{token}\r\n\r\n".encode())


# ---- PostgreSQL takes no writes ----


@contextmanager
def executed(web: Web, do: LiteralString, undo: LiteralString) -> Iterator[None]:
    """Execute *do* before and *undo* after, as an operator would."""
    name = web.query("SELECT current_database()")[0][0]
    with psycopg.connect(web.settings.libpq, autocommit=True) as operator:
        operator.execute(do.replace("DATABASE", f'DATABASE "{name}"').encode())
        yield
        operator.execute(b"SET default_transaction_read_only = off")
        operator.execute(undo.replace("DATABASE", f'DATABASE "{name}"').encode())


def read_only(web: Web) -> AbstractContextManager[object]:
    """Make new sessions read-only."""
    return executed(
        web,
        "ALTER DATABASE SET default_transaction_read_only = on",
        "ALTER DATABASE RESET default_transaction_read_only",
    )


def locked(web: Web) -> AbstractContextManager[object]:
    """Let another session hold the inbox."""
    return held(web.settings.libpq)


def full(web: Web) -> AbstractContextManager[object]:
    """Let each new row fail as it does on a full disk: with PostgreSQL's code for that, raised by a trigger."""
    return executed(
        web,
        FULL + "CREATE TRIGGER full_disk BEFORE INSERT ON inbox FOR EACH ROW EXECUTE FUNCTION disk_is_full()",
        "DROP TRIGGER full_disk ON inbox; DROP FUNCTION disk_is_full",
    )


@pytest.mark.parametrize("fault", [read_only, locked, full])
def test_nothing_can_be_recorded(web: Web, fault: Callable[[Web], AbstractContextManager[object]]) -> None:
    """While nothing can be recorded the process is alive and not ready, and it is ready again without a delivery."""
    becomes(web)
    with fault(web):
        until_not = becomes(web, ready=False, database=fault.__name__)
        assert web.client.head("/health/ready").status_code == 503
    until_again = becomes(web)

    print(f"{fault.__name__}: not ready after {until_not:.2f} s, ready after {until_again:.2f} s")  # noqa: T201 - figures
    assert web.inbox() == []


def test_database_away(own_postgres: Postgres, redis_url: str) -> None:
    """Without PostgreSQL the process is alive and not ready, and is ready again when it is back."""
    upgrade(own_postgres.url)
    with serving(settings_of(own_postgres.url, redis_url)) as web:
        for fault in (stopped, killed, paused):
            becomes(web)
            with fault(own_postgres):
                database = "silent" if fault is paused else "away"
                until_not = becomes(web, ready=False, database=database, **UNKNOWN)
                if fault is stopped:
                    refused = web.get("/v1/orders")
                    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            until_again = becomes(web)
            print(f"{fault.__name__}: not ready after {until_not:.2f} s, ready after {until_again:.2f} s")  # noqa: T201 - as above
        assert web.inbox() == []


@contextmanager
def stopped(server: Postgres) -> Iterator[None]:
    """Stop a server, and start it again."""
    server.stop()
    yield
    server.start()


@contextmanager
def killed(server: Postgres) -> Iterator[None]:
    """Kill a server, and start it again."""
    server.kill()
    yield
    server.start()


def test_newer_attempt(web: Web) -> None:
    """A failed delivery outweighs an earlier trial recording, and a later trial outweighs the delivery."""
    web.query(
        FULL + "CREATE TRIGGER full_disk BEFORE INSERT ON inbox FOR EACH ROW WHEN (NEW.id = 'evt_1')"
        " EXECUTE FUNCTION disk_is_full()"
    )

    def counts() -> bool:
        becomes(web)
        assert web.deliver(event(1)).status_code == 503
        # On a busy machine a second may pass in between, and then another trial recording has run.
        return bool(ready(web).json()["database"] == "full")

    until(counts)
    becomes(web)


def test_full_for_all_but_small_rows(web: Web) -> None:
    """After a delivery found the disk full, a small row that fits proves nothing, and a large one does."""
    web.query(FULL)
    web.query(
        "CREATE TRIGGER full_disk BEFORE INSERT ON payloads FOR EACH ROW WHEN (octet_length(NEW.payload) > 10000)"
        " EXECUTE FUNCTION disk_is_full()"
    )
    becomes(web)
    assert web.deliver(event(1, data={"object": {"note": "x" * 10_000}})).status_code == 503
    full_until = time.monotonic() + 2.5
    while time.monotonic() < full_until:
        assert ready(web).json()["database"] == "full"
    web.query("DROP TRIGGER full_disk ON payloads")
    becomes(web)


def test_no_new_session(web: Web, services: Services) -> None:
    """Where PostgreSQL takes no further session, the recorder uses the session it has, and the process is ready."""
    assert web.deliver(event(1)).status_code == 200
    becomes(web)
    tried_again_at = time.monotonic() + 1.5
    name = Identifier(urlsplit(web.settings.libpq).path[1:])
    with psycopg.connect(services.database_url, autocommit=True) as operator:
        operator.execute(SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
        while time.monotonic() < tried_again_at:
            assert WELL.items() <= ready(web).json().items()
        assert web.deliver(event(2)).status_code == 200
        operator.execute(SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))


def test_no_session_at_all(web: Web, services: Services) -> None:
    """Where PostgreSQL takes no further session and the recorder has none, the process is not ready."""
    becomes(web)
    name = Identifier(urlsplit(web.settings.libpq).path[1:])
    with psycopg.connect(services.database_url, autocommit=True) as operator:
        operator.execute(SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
        becomes(web, ready=False, database="away", **UNKNOWN)
        assert web.deliver(event(1)).status_code == 503
        operator.execute(SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
    becomes(web)


def test_new_sessions_without_an_answer(database_url: str, redis_url: str) -> None:
    """While the recorder records, an unanswered trial in a new session does not make the process unready."""
    with closing(Proxy(database_url)) as proxy, serving(settings_of(proxy.url, redis_url)) as web:
        numbers = itertools.count()
        assert web.deliver(event(next(numbers))).status_code == 200
        for migrations in ("unknown", "ok"):
            proxy.silences_new = True
            # One answer may come from an earlier trial, which is reused for a second.
            for _ in range(2):
                answer = ready_while_delivering(web, numbers)
                assert (answer["ready"], answer["database"], answer["migrations"]) == (True, "ok", migrations)
            proxy.silences_new = False
            becomes(web)


def ready_while_delivering(web: Web, numbers: Iterator[int]) -> dict[str, object]:
    """Return the health that is answered while deliveries arrive, once the last trial is over a second old."""

    def ask() -> httpx.Response:
        time.sleep(1.1)
        return ready(web)

    with ThreadPoolExecutor(1) as asking:
        found = asking.submit(ask)
        while not found.done():
            assert web.deliver(event(next(numbers))).status_code == 200
            time.sleep(0.01)
    health: dict[str, object] = found.result().json()
    return health


def test_a_lock_on_rows_that_only_the_report_reads(web: Web) -> None:
    """While other sessions lock rows that only the report reads, the process stays ready."""
    becomes(web)
    with psycopg.connect(web.settings.libpq) as blocker:
        blocker.execute("LOCK TABLE stripe_jobs, alembic_version IN ACCESS EXCLUSIVE MODE")
        locked_until = time.monotonic() + 2.5
        while time.monotonic() < locked_until:
            health = ready(web).json()
            assert (health["ready"], health["database"], health["migrations"]) == (True, "ok", "ok")


def test_fault_of_data(web: Web) -> None:
    """A delivery that PostgreSQL refuses for a fault in its own data is no reason not to be ready."""
    web.query("ALTER TABLE inbox ADD CONSTRAINT no_poison CHECK (id <> 'evt_poison')")
    for _ in range(3):
        assert web.deliver(event("poison")).status_code == 503
        assert ready(web).json()["database"] != "refused"


# ---- Redis is away ----


def test_broker_away(database_url: str, own_valkey: Valkey) -> None:
    """Without Redis, or with a silent one, the process is ready, and its answer comes in time."""
    with serving(settings_of(database_url, own_valkey.url)) as web:
        becomes(web)
        with paused(own_valkey):
            becomes(web, broker="away")
        becomes(web)
        own_valkey.stop()
        becomes(web, broker="away")
